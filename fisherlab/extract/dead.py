"""Dead units: positions whose gradient a rectifier stops, though the loss depends on what it makes.

Padding has no gradient behind the rectifier either; a dead position has one there and counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from fisherlab.extract.backward import pulled_back
from fisherlab.extract.broadcast import users_of
from fisherlab.extract.slopes import _RENAMED, _name

# Element-wise functions whose derivative is exactly 0 somewhere.
_STOPPING = frozenset(
    "Relu Threshold Hardtanh Hardswish Hardsigmoid Hardshrink Softshrink Clamp ClampMin "
    "ClampMax".split()
)
_PASSED = _RENAMED | {"Add", "Sub", "Neg"}


def stopping(output: Tensor, edges: Sequence[GradientEdge]) -> list[list[Any]]:
    """The nodes that may stop the gradient of each edge, one element at a time."""
    users = users_of(output)
    found: list[list[Any]] = []
    for edge in edges:
        nodes, seen, stack = [], set(), [(edge.node, edge.output_nr)]
        while stack:
            for user in users[stack.pop()]:
                if user in seen:
                    continue
                seen.add(user)
                if _name(user) in _STOPPING:
                    nodes.append(user)
                elif _name(user) in _PASSED:
                    stack.append((user, 0))
        found.append(nodes)
    return found


def behind(
    output: Tensor, vector: Tensor, edges: Sequence[GradientEdge], shapes: Sequence[torch.Size]
) -> list[Tensor]:
    """Positions `[n, t]` with a gradient of `<f, vector>` behind the rectifier, edge by edge."""
    nodes = stopping(output, edges)
    flat = [GradientEdge(node, 0) for found in nodes for node in found]
    rest, patterns = iter(pulled_back(output, vector, flat)), []
    for found, shape in zip(nodes, shapes, strict=True):
        pattern = torch.zeros(shape[0], shape[1:-1].numel(), dtype=torch.bool, device=output.device)
        for _ in found:
            pattern = pattern | seen_at(next(rest), shape).to(pattern.device)
        patterns.append(pattern)
    return patterns


def seen_at(gradient: Tensor | None, shape: torch.Size) -> Tensor:
    """Positions `[n, t]` of an output `[n, ..., o]` that a gradient of its elements reaches."""
    n, t = shape[0], shape[1:-1].numel()
    if gradient is None or gradient.numel() != shape.numel():
        device = None if gradient is None else gradient.device
        return torch.zeros(n, t, dtype=torch.bool, device=device)
    return (gradient != 0).reshape(n, t, -1).any(2)
