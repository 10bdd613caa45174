"""Recording one forward pass: each call of each tracked layer, and what the layer feeds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from fisherlab.extract.layer import CaptureError

NORMALISATIONS = (
    nn.modules.batchnorm._BatchNorm,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.modules.instancenorm._InstanceNorm,
)
# Backward nodes that only rename axes: the values behind them are the same values.
_SHAPE_ONLY = frozenset(
    f"{name}Backward{k}"
    for name in "View UnsafeView ReshapeAlias Permute Transpose T Squeeze Unsqueeze Clone".split()
    for k in (0, 1)
)
_ACTIVATIONS: dict[str, Callable[[Any], Callable[[Tensor], Tensor]]] = {
    "ReluBackward0": lambda node: F.relu,
    "TanhBackward0": lambda node: torch.tanh,
    "SigmoidBackward0": lambda node: torch.sigmoid,
    "SiluBackward0": lambda node: F.silu,
    "GeluBackward0": lambda node: _with(F.gelu, approximate=node._saved_approximate),
    "LeakyReluBackward0": lambda node: _with(
        F.leaky_relu, negative_slope=node._saved_negative_slope
    ),
    "EluBackward0": lambda node: _with(F.elu, alpha=node._saved_alpha),
    "SoftplusBackward0": lambda node: _with(
        F.softplus, beta=node._saved_beta, threshold=node._saved_threshold
    ),
}


def _with(function: Callable, **options: Any) -> Callable[[Tensor], Tensor]:
    return lambda s: function(s, **options)


@dataclass
class Call:
    """One call of a layer: its input, the edge behind its output, and the gradients that arrive."""

    raw_input: Tensor
    edge: GradientEdge
    output: Tensor
    input_version: int
    output_version: int
    preactivation: Tensor | None = None
    # what arrived at the output: the loss gradient, and every column of the Fisher
    label_gradient: Tensor = field(init=False)
    gradients: Tensor = field(init=False)


@dataclass
class Record:
    """The calls of every tracked layer in one forward pass."""

    calls: dict[str, list[Call]] = field(default_factory=dict)
    without_graph: set[str] = field(default_factory=set)
    norms: dict[Any, Tensor] = field(default_factory=dict)
    active: bool = True
    # the gradient of the summed per-example loss at the outputs
    labels: Tensor = field(init=False)

    def every(self) -> list[Call]:
        """All calls, layer by layer."""
        return [call for calls in self.calls.values() for call in calls]

    def check_inputs(self) -> None:
        """Refuse a model that overwrote a layer's input in place after the layer read it."""
        for name, calls in self.calls.items():
            if any(call.raw_input._version != call.input_version for call in calls):
                raise CaptureError(
                    f"the input of layer {name!r} was modified in place after the layer read it; "
                    "make that operation out of place"
                )


@contextmanager
def recording(modules: dict[str, nn.Module], model: nn.Module) -> Iterator[Record]:
    """Record the calls of `modules`; every hook is gone when the block is left."""
    record = Record()
    handles = []

    def remember(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:
            if not record.active:
                return None
            raw = args[0] if args else kwargs["input"]
            if not isinstance(output, Tensor):
                raise CaptureError(
                    f"layer {name!r} is a {type(module).__name__} that returns "
                    f"{type(output).__name__}, not one tensor; leave it out with `layers=`"
                )
            if not output.requires_grad:
                record.without_graph.add(name)
                return None
            # the edge is taken here, before an in-place activation can rewire the output
            call = Call(raw.detach(), get_gradient_edge(output), output.detach(), raw._version, 0)
            call.output_version = call.output._version
            record.calls.setdefault(name, []).append(call)
            # a Linear over [n, t, i] returns a view; an in-place operation on a view replaces the
            # view's history, and the edge would silently receive nothing
            return output.clone() if output._is_view() else None

        return hook

    def remember_norm(module: nn.Module, args: tuple, output: Tensor) -> None:
        if record.active and output.requires_grad:
            record.norms[get_gradient_edge(output).node] = output.detach()

    try:
        for name, module in modules.items():
            handles.append(module.register_forward_hook(remember(name), with_kwargs=True))
        for module in model.modules():
            if isinstance(module, NORMALISATIONS):
                handles.append(module.register_forward_hook(remember_norm))
        yield record
    finally:
        for handle in handles:
            handle.remove()


def find_activations(outputs: Tensor, record: Record) -> dict[str, Callable | None]:
    """The element-wise activation each layer feeds, and `call.preactivation` where it is evaluated.

    Read off the autograd graph, so that functional activations count; a normalisation in between is
    looked through. A layer whose calls feed different things counts as feeding none.
    """
    consumers: dict[Any, list[Any]] = {}
    stack, seen = [outputs.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for source, _ in node.next_functions:
            if source is not None:
                consumers.setdefault(source, []).append(node)
                stack.append(source)
    found: dict[str, Callable | None] = {}
    for name, calls in record.calls.items():
        results = [_follow(call.edge.node, call.output, consumers, record.norms) for call in calls]
        functions = [function for function, _ in results]
        together = functions[0] if len({type(f) for f in functions}) == 1 else None
        for call, (_, value) in zip(calls, results, strict=True):
            overwritten = value is call.output and call.output._version != call.output_version
            # an in-place ReLU leaves the sign of its argument readable; other overwrites do not
            call.preactivation = None if overwritten and together is not F.relu else value
        found[name] = together
    return found


def _follow(
    node: Any, value: Tensor, consumers: dict[Any, list[Any]], norms: dict[Any, Tensor]
) -> tuple[Callable[[Tensor], Tensor] | None, Tensor]:
    for consumer in consumers.get(node, ()):
        name = consumer.name()
        if name in _ACTIVATIONS:
            return _ACTIVATIONS[name](consumer), value
        if consumer in norms:
            function, at = _follow(consumer, norms[consumer], consumers, norms)
        elif name in _SHAPE_ONLY:
            function, at = _follow(consumer, value, consumers, norms)
        else:
            continue
        if function is not None:
            return function, at
    return None, value
