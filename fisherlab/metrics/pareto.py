"""The Pareto front of cost against error."""

from __future__ import annotations

from collections.abc import Sequence

from fisherlab.metrics.entry import entered


@entered
def pareto_front(costs: Sequence[float], errors: Sequence[float]) -> list[int]:
    """Points for which no other is both cheaper and better.

    Args:
        costs: one per point.
        errors: one per point.

    Returns:
        Indices of the points, by rising cost.

    Example:
        >>> from fisherlab import metrics
        >>> metrics.pareto_front([1.0, 2.0, 3.0], [0.5, 0.6, 0.1])
        [0, 2]
    """
    if len(costs) != len(errors):
        raise ValueError(f"{len(costs)} costs and {len(errors)} errors are of different points")
    front: list[int] = []
    for index in sorted(range(len(costs)), key=lambda k: (costs[k], errors[k])):
        if not front or errors[index] < errors[front[-1]]:
            front.append(index)
    return front
