"""Captures of several batches or shards that are one sample, brought together by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fisherlab import doors
from fisherlab.distributed import Ranks
from fisherlab.extract.api import Captures
from fisherlab.extract.geometry import CaptureError
from fisherlab.extract.layer import LayerCapture, Raw


def one_sample(layers: Sequence[LayerCapture]) -> tuple[LayerCapture, ...]:
    """Captures of one layer with the loss terms of all of them under one mean, `c = M / Z`.

    Each batch was captured under its own mean, which divides by its own loss terms. If padding or
    class weights make these differ per example, the gradients take the factor of the whole,
    `c / c_b`. The vectors of a Hessian take its root.
    """
    layers = check_layers(layers)
    scales = {layer.term_scale for layer in layers}
    if len(scales) == 1:
        return tuple(layers)
    M = sum(layer.examples for layer in layers)
    c = M / sum(layer.examples / layer.term_scale for layer in layers)
    return tuple(_under(layer, c) for layer in layers)


def check_layers(layers: object) -> tuple[LayerCapture, ...]:
    """Refuse what are no captures, at least one."""
    found = tuple(doors.listed(layers, "layers", error=CaptureError))
    if not found:
        raise CaptureError("layers must be captures of one layer, at least one; got none")
    for layer in found:
        if isinstance(layer, type) or not hasattr(layer, "term_scale"):
            raise CaptureError(f"a layer must be that of fl.capture, got {doors.said(layer)}")
    return found


def _under(layer: LayerCapture, c: float) -> LayerCapture:
    ratio = c / layer.term_scale
    root = ratio if layer.fisher_type == "empirical" else ratio**0.5

    def times(raw: Raw, factor: float) -> Raw:
        return None if raw is None else tuple(factor * tensor for tensor in raw)

    return replace(
        layer,
        raw_output_gradients=times(layer.raw_output_gradients, root),
        raw_label_gradients=times(layer.raw_label_gradients, ratio),
        term_scale=c,
        shared=None,
        after=None if layer.after is None else _under(layer.after, c),
    )


def joined(layer: LayerCapture, ranks: Ranks, to: int | None = None) -> LayerCapture:
    """The capture of the examples of all ranks, in rank order; shards may differ in size.

    Raw inputs and raw output gradients travel, `n (|x| + (m + 1) |s|)` numbers per layer (`|s|`
    twice more where outputs were captured), never per-example gradients. With `to` that rank alone
    receives it, and the others get their own shard back.
    """

    def gather(dim: int) -> Callable[[Tensor], Tensor]:
        return lambda tensor: ranks.gather(tensor, dim, to)

    def each(raw: Raw, dim: int = 0) -> Raw:
        return None if raw is None else tuple(map(gather(dim), raw))

    counted = layer.counted
    if any(ranks.objects(counted is not None)):
        if counted is None:
            counted = torch.ones(len(layer.raw_inputs[0]), layer.positions, device=layer.device)
        counted = gather(0)(counted.to(layer.dtype)).bool()
    labels = layer.raw_label_gradients
    columns = each(layer.raw_output_gradients, 1)
    if columns is not None and layer.fisher_type == "empirical":
        # the observed labels' gradients are the columns themselves
        labels = tuple(g[0] for g in columns)
    else:
        labels = each(labels)
    return replace(
        layer,
        raw_inputs=tuple(map(gather(0), layer.raw_inputs)),
        raw_output_gradients=columns,
        raw_label_gradients=labels,
        raw_outputs=each(layer.raw_outputs),
        slopes=None if layer.slopes is None else gather(0)(layer.slopes),
        counted=counted,
        shared=None,
    )


def shared_out(captures: Captures, ranks: Ranks, owners: Mapping[str, int]) -> Captures:
    """The joint captures of the layers that this rank owns; its shards of the others are let go.

    `owners` names a rank for each layer, the same on all ranks.
    """
    mine: dict[str, LayerCapture] = {}
    for key in list(captures):
        layer = captures.pop(key)
        owner = owners[layer.name]
        whole = joined(layer, ranks, owner)
        if owner == ranks.index:
            mine[key] = whole
    return Captures(
        mine, captures.report, ranks.gather(captures.outputs), ranks.gather(captures.labels)
    )
