"""Recording one forward pass: each call of each tracked layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from fisherlab.extract.geometry import CaptureError
from fisherlab.extract.slopes import Slopes, slopes


@dataclass
class Call:
    """One call of a layer: its input, the edge behind its output, and the gradients that arrive."""

    raw_input: Tensor
    edge: GradientEdge
    output: Tensor
    input_version: int
    slopes: Slopes | None = None
    # what arrived at the output: the loss gradient, and every column of the Fisher
    label_gradient: Tensor = field(init=False)
    gradients: Tensor = field(init=False)


@dataclass
class Record:
    """The calls of every tracked layer in one forward pass."""

    calls: dict[str, list[Call]] = field(default_factory=dict)
    without_graph: set[str] = field(default_factory=set)
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
            # both are taken here, before an in-place activation can rewire and overwrite the output
            edge, kept = get_gradient_edge(output), output.detach().clone()
            call = Call(raw.detach(), edge, kept, raw._version)
            record.calls.setdefault(name, []).append(call)
            # a Linear over [n, t, i] returns a view; an in-place operation on a view replaces the
            # view's history, and the edge would silently receive nothing
            return output.clone() if output._is_view() else None

        return hook

    try:
        for name, module in modules.items():
            handles.append(module.register_forward_hook(remember(name), with_kwargs=True))
        yield record
    finally:
        for handle in handles:
            handle.remove()


def set_slopes(outputs: Tensor, calls: Sequence[Call]) -> None:
    """Leave at every call what its function's derivative is; before the graph is freed."""
    found = slopes([outputs], [call.edge for call in calls])
    for call, each in zip(calls, found, strict=True):
        call.slopes = each


def joined_slopes(name: str, calls: Sequence[Call]) -> tuple[Tensor, str]:
    """Over all calls of a map: the sums `[n, 2]`, and why there is no `nu`, or ""."""
    found = [call.slopes for call in calls if call.slopes is not None]
    reason = next((each.reason for each in found if each.reason), "")
    sums = torch.stack([each.sums for each in found]).sum(0)
    return sums, reason and f"layer {name!r} has no slope nu: {reason}"
