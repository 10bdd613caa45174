"""The Pareto front of cost against error."""

from __future__ import annotations

from collections.abc import Sequence

from fisherlab.metrics.entry import entered


@entered
def pareto_front(costs: Sequence[float], errors: Sequence[float]) -> list[int]:
    """Indices of the points that no other is both cheaper and better than, by rising cost."""
    if len(costs) != len(errors):
        raise ValueError(f"{len(costs)} costs and {len(errors)} errors are of different points")
    front: list[int] = []
    for index in sorted(range(len(costs)), key=lambda k: (costs[k], errors[k])):
        if not front or errors[index] < errors[front[-1]]:
            front.append(index)
    return front
