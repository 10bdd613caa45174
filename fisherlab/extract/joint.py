"""Captures of the shards of one batch, brought together layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor

from fisherlab.distributed import Ranks
from fisherlab.extract.api import Captures
from fisherlab.extract.layer import LayerCapture, Raw


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
        raw_preactivations=each(layer.raw_preactivations),
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
