"""From the calls of one pass to the captures of its layers, in units of the per-example loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from fisherlab.extract.assemble import Piece, capture_of
from fisherlab.extract.backward import widened
from fisherlab.extract.layer import LayerCapture
from fisherlab.extract.padding import counted
from fisherlab.extract.rows import take
from fisherlab.optim.coverage import Coverage
from fisherlab.optim.needs import Needs
from fisherlab.optim.passes import Call, Pass
from fisherlab.optim.scale import OptimizerError
from fisherlab.optim.weight import Weight


def captures_of(
    one: Pass, factor: float, needs: Needs, coverage: Coverage
) -> dict[str, LayerCapture]:
    """The captures of the layers that a backward pass reached.

    Args:
        one: the pass.
        factor: what turns the gradients that arrived into those of the per-example loss.
        needs: what of the captures is read.
        coverage: the matrices; those left out have no capture.

    Returns:
        One capture per layer, or per group of a convolution.

    Raises:
        OptimizerError: a layer whose first axis is not the example.
    """
    found: dict[str, LayerCapture] = {}
    batch = len(cast(Tensor, one.output))
    for name, calls in one.calls.items():
        arrived = [call for call in calls if call.arrived]
        if arrived and name not in coverage.left_out:
            if why := one.untold.get(name):
                raise OptimizerError(
                    f"layer {name!r}: {why}; leave the batch out; no parameter was changed"
                )
            found |= _layer(coverage.weights[name], arrived, factor, needs, batch)
    return found


def _layer(
    weight: Weight, calls: list[Call], factor: float, needs: Needs, batch: int
) -> dict[str, LayerCapture]:
    for index, call in enumerate(calls):
        _check_axis(weight.name, index, call, batch, needs)
    n = len(calls[0].raw_input) if needs.summed or needs.examples is not None else batch
    parts, why = weight.pieces(calls, n)
    if why:
        raise OptimizerError(f"layer {weight.name!r}: {why}; no parameter was changed")
    # columns of the model's own distribution are of the per-example loss already
    labels = partial(_labels, factor=factor if needs.columns else 1.0)
    sums = None
    if needs.slopes:
        sums = torch.stack([c.slopes.sums for c in calls if c.slopes]).sum(0)[: needs.examples]
    layers = capture_of(
        weight.name,
        type(weight.module).__name__,
        parts,
        weight.form,
        labels if needs.gradients else _nothing_arrived,
        _columns_read(needs),
        slopes=sums,
        fisher_type=needs.fisher_type,
        gradient_scale=1.0 if needs.columns else factor,
        summed=calls[0].count if needs.summed else 1,
    )
    if not needs.gradients:
        return {key: replace(layer, raw_label_gradients=None) for key, layer in layers.items()}
    if not needs.inputs or needs.summed:
        return layers
    first = next(iter(layers.values()))
    maps = first.maps or [first.geometry] * len(parts)
    rows = cast(tuple[Tensor, ...], first.raw_label_gradients)
    own = first.raw_output_gradients
    own = tuple(g[None] for g in rows) if own is None else own
    seen = partial(_seen_behind, parts, needs.examples, first.device)
    counts = counted(maps, own, rows, behind=seen)
    return {key: replace(layer, counted=counts) for key, layer in layers.items()}


def _check_axis(name: str, index: int, call: Call, batch: int, needs: Needs) -> None:
    """Refuse a call whose first axis is not the example; a sum over positions becomes a mean."""
    if len(call.shape) < 2:
        raise OptimizerError(
            f"call {index} of layer {name!r} received one row without an axis of examples, in a "
            f"batch of {batch}: call it on the batch, [n, features]"
        )
    if call.positions > 1:
        # a mean over positions, as of `[n, t, i]`
        call.raw_input, call.count = call.raw_input / call.positions, batch
        call.positions = 1
    given = (call.count, *call.raw_input.shape[1:])
    moved = needs.examples is None and call.count != batch and call.examples is None
    if len(given) < 2 or moved:
        raise OptimizerError(
            f"call {index} of layer {name!r} received {given} in a "
            f"batch of {batch}: the first axis must be the example"
        )


def _seen_behind(parts: list[Piece], examples: int | None, device: torch.device) -> list[Tensor]:
    """The positions of each part that the loss reaches behind a rectifier."""
    found = []
    for part in parts:
        call = cast(Call, part.call)
        seen = call.behind
        if seen is None:
            shape = (call.shape[0], call.shape[1:-1].numel())
            seen = torch.zeros(shape, dtype=torch.bool, device=device)[:examples]
        found.append(seen if part.rows is None else take(seen.flatten(), part.rows))
    return found


def _columns_read(needs: Needs) -> Callable[[Any], Tensor] | None:
    """How the columns of the Fisher matrix are read off a call; None where nobody reads any."""
    if needs.columns:
        return _columns
    return _label_columns if needs.gradients and needs.fisher_type == "empirical" else None


def _labels(call: Any, factor: float = 1.0) -> Tensor:
    g = widened(cast(Tensor, call.gradient))
    return g if factor == 1 else factor * g


def _label_columns(call: Any) -> Tensor:
    return _labels(call)[None]


def _columns(call: Any) -> Tensor:
    return torch.stack([widened(v) for v in call.columns])


def _nothing_arrived(call: Any) -> Tensor:
    """In place of a gradient that is not kept: zeros that take no memory."""
    return widened(call.raw_input).new_zeros(()).expand(call.shape)[: call.count]
