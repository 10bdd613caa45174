"""One forward of a model with what its backward brought; the layers that take part."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from fisherlab.extract.layer import LayerCapture
from fisherlab.extract.record import Call as GraphCall
from fisherlab.extract.select import choices


@dataclass
class Call:
    """One call of a layer: its input and output, and the gradients that reached the output.

    Those that the approximation needs, or their sums over the `examples`.
    """

    examples: int
    raw_input: Tensor
    output: Tensor | None
    gradient: Tensor | None = None
    arrived: bool = False
    columns: list[Tensor] = field(default_factory=list)
    graph: GraphCall | None = None
    # the input awaits the gradient, which says what positions its sum is over
    waiting: bool = False
    # of a Linear: the edge behind its output until the forward ends, and the positions `[n, t]`
    # that a gradient has reached behind a rectifier
    edge: GradientEdge | None = None
    shape: torch.Size = torch.Size()
    behind: Tensor | None = None


@dataclass
class Pass:
    """One forward of the model: its layer calls, its output, and what the backward brought."""

    calls: dict[str, list[Call]] = field(default_factory=dict)
    output: Tensor | None = None
    output_gradient: Tensor | None = None
    loss_scale: Tensor | None = None
    labels: Tensor | None = None
    # the tensor whose columns were sent back
    criterion_saw: Tensor | None = None

    @property
    def arrived(self) -> bool:
        """Whether a backward pass came through."""
        return any(c.arrived for calls in self.calls.values() for c in calls)


def blocked_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that an optimizer preconditions, those that share a weight included."""
    return {c.name: c.module for c in choices(model) if c.status in ("exact", "tied")}


def delivered(captures: Iterable[dict[str, LayerCapture]], name: str) -> list[LayerCapture]:
    """The captures of one layer, one per pass in which it took part."""
    return [capture[name] for capture in captures if name in capture]
