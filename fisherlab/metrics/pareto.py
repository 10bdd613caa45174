"""The Pareto front of cost against error."""

from __future__ import annotations

from collections.abc import Sequence


def pareto_front(costs: Sequence[float], errors: Sequence[float]) -> list[int]:
    """Indices of the points that no other is both cheaper and better than, by rising cost."""
    front: list[int] = []
    for index in sorted(range(len(costs)), key=lambda k: (costs[k], errors[k])):
        if not front or errors[index] < errors[front[-1]]:
            front.append(index)
    return front
