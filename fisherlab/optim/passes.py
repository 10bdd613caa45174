"""One forward of a model with what its backward brought."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from fisherlab.extract import tape
from fisherlab.extract.layer import LayerCapture


@dataclass(eq=False)
class Call(tape.Call):
    """One product of a layer: its input and output, and the gradients that reached the output.

    The tensors that the approximation needs, or their sums over the `count` examples.
    """

    count: int = field(kw_only=True)
    shape: torch.Size = field(kw_only=True)
    gradient: Tensor | None = None
    arrived: bool = False
    columns: list[Tensor] = field(default_factory=list)
    # the edge behind the output, while something is still to be asked of the graph
    edge: GradientEdge | None = None
    # `[n, 2]` sums of slopes, and why there are none
    slopes: tape.Slopes | None = None
    # the positions `[n, t]` that the loss reaches behind a rectifier
    behind: Tensor | None = None
    # how many rows each example has, where rows are summed and are no examples
    positions: int = 1
    # the input awaits the gradient, which says what positions its sum is over
    waiting: bool = False


@dataclass
class Pass:
    """One forward of the model: its layer calls, its output, and what the backward brought."""

    calls: dict[str, list[Call]] = field(default_factory=dict)
    output: Tensor | None = None
    output_gradient: Tensor | None = None
    loss_scale: Tensor | None = None
    # the gradient that arrived at the loss that the model itself returned
    own_scale: Tensor | None = None
    labels: Tensor | None = None
    # whether a gradient came through that has a graph of its own (create_graph=True)
    twice: bool = False
    # layers that this pass could not tell to have a block, each with the reason
    untold: dict[str, str] = field(default_factory=dict)
    # those that it shows to have none, which counts once it takes part in a step
    lost: dict[str, str] = field(default_factory=dict)
    # whether its gradients were put into `.grad` by the loop, after `autograd.grad`
    by_hand: bool = False
    # the tensor whose columns were sent back; held, it would keep a graph that is thrown away
    criterion_saw: weakref.ref[Tensor] | None = None

    @property
    def arrived(self) -> bool:
        """Whether a backward pass came through."""
        return any(c.arrived for calls in self.calls.values() for c in calls)

    def every(self) -> list[Call]:
        """All calls, layer by layer."""
        return [call for calls in self.calls.values() for call in calls]

    def release(self) -> None:
        """Let go of the graph, which holds this pass by its hooks: nothing would free the two."""
        for call in self.every():
            call.edge = None


def behind(saw: object, key: str, latest: Any, weights: Iterable[Tensor]) -> list[Any]:
    """The passes whose outputs a loss was taken of: the output, or what was made of it.

    Args:
        saw: what the criterion was called with.
        key: the name under which a node of the graph knows its pass.
        latest: the latest pass, which a loss is of that depends on the weights in another way.
        weights: those of the model; a loss without them is another model's.
    """
    if not isinstance(saw, Tensor):
        return [] if latest is None else [latest]
    found: dict[int, Any] = {}
    seen: set[Any] = set()
    ours, depends = {id(weight) for weight in weights}, False
    stack: list[Any] = [saw.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        depends |= id(getattr(node, "variable", None)) in ours
        known = node.metadata.get(key)
        current = None if known is None else known()
        if current is None:
            stack += [before for before, _ in node.next_functions]
        else:
            found[id(current)] = current
    if found or latest is None or not depends:
        return list(found.values())
    return [latest]


def mark(output: Tensor, key: str, call: Call) -> None:
    """Have the node behind a call's output know the call, for `edges_behind`."""
    node = cast(Any, output.grad_fn)
    node.metadata.setdefault(key, {})[output.output_nr] = weakref.ref(call)


def edges_behind(saw: Tensor, key: str, calls: list[Call]) -> list[GradientEdge | None]:
    """The edges behind the outputs of calls that were marked; None where `saw` needs none of it."""
    wanted = {id(call) for call in calls}
    found: dict[int, GradientEdge] = {}
    seen: set[Any] = set()
    stack: list[Any] = [saw.grad_fn]
    while stack and len(found) < len(wanted):
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        marked = node.metadata.get(key, {}).items()
        of = {id(call): nr for nr, known in marked if (call := known()) is not None}
        found |= {k: GradientEdge(node, nr) for k, nr in of.items() if k in wanted}
        stack += [before for before, _ in node.next_functions]
    return [found.get(id(call)) for call in calls]


def delivered(captures: Iterable[dict[str, LayerCapture]], name: str) -> list[LayerCapture]:
    """The captures of one layer, one per pass in which it took part."""
    return [capture[name] for capture in captures if name in capture]
