"""Budgets: what a layer needs at least, and a capture in parts where a whole one does not fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fisherlab.extract import fisher
from fisherlab.extract.api import Captures, capture, check_generator, split_batch
from fisherlab.extract.criteria import rules_of
from fisherlab.extract.geometry import CaptureError
from fisherlab.extract.inside import Inside, criterion_of, rows_of
from fisherlab.extract.layer import LayerCapture


def form_bytes(layer: LayerCapture) -> int:
    """Bytes of the weight-sharing form, `a` and `g` of all examples."""
    m, n = layer.columns_per_example, layer.raw_inputs[0].shape[0]
    o, i = layer.shape
    return n * layer.positions * (m * o + i) * layer.dtype.itemsize


def least_bytes(layer: LayerCapture) -> int:
    """Bytes of the smallest chunk: one output vector of one example."""
    return layer.positions * sum(layer.shape) * layer.dtype.itemsize


def check_memory(layers: Mapping[str, LayerCapture], memory: int | None) -> None:
    """Refuse a budget that some layer cannot keep, naming the layer and what all of them need."""
    if memory is None:
        return
    needs = {layer.name: least_bytes(layer) for layer in layers.values()}
    worst = max(needs, key=lambda name: needs[name])
    short = sum(need > memory for need in needs.values())
    if short:
        raise CaptureError(
            f"memory={memory:,} bytes cannot be met: layer {worst!r} needs {needs[worst]:,} for "
            f"one output vector of one example, and {short} of {len(needs)} layers need more than "
            f"that budget; raise `memory` to {needs[worst]:,} or leave the layer out with `layers=`"
        )


def captures_in_parts(
    model: nn.Module,
    criterion: Callable[[Tensor, Tensor], Tensor],
    x: object,
    y: Tensor | None = None,
    **options: Any,
) -> list[Captures]:
    """The capture of a batch, or those of its halves (and theirs) where the device is too small.

    Blocks of the parts together are those of the batch. Not where the halves count different
    numbers of loss terms (ignored labels, class weights): there the mean is that of the whole.
    """
    criterion = criterion_of(criterion, options.pop("loss_scale", None))
    inside = isinstance(criterion, Inside)
    x, y = split_batch(x, y, inside)
    generator = options.get("generator")
    if generator is None:  # one for all halves: none repeats another's draws
        generator = options["generator"] = torch.Generator().manual_seed(0)
    check_generator(generator)
    state = generator.get_state()
    try:
        return [capture(model, criterion, x, None if inside else y, **options)]
    except torch.OutOfMemoryError as error:
        message = str(error)
    # out of the handler, whose traceback holds on to the tensors that did not fit
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    n = len(y)
    cut = n // 2
    mean = fisher.reduction_of(fisher.as_module(criterion)) == "mean"
    # halves may have other numbers of terms
    masked = mean and (inside or options.get("mask") is not None)
    if (
        n < 2
        or masked
        or not _alike(criterion, y[:cut], y[cut:])
        or options.get("ranks") is not None
    ):
        raise CaptureError(
            f"capturing a batch of {n} examples ran out of memory and cannot be done in halves; "
            f"pass a loader of smaller batches ({message})"
        )
    generator.set_state(state)
    return [
        part
        for rows in (slice(0, cut), slice(cut, n))
        for part in captures_in_parts(
            model,
            criterion,
            rows_of(x, n, rows),
            None if inside else y[rows],
            **options | {"mask": rows_of(options.get("mask"), n, rows)},
        )
    ]


def _alike(criterion: Callable[..., Any], one: Tensor, two: Tensor) -> bool:
    """Whether a mean over each half divides by the same number per example."""
    criterion = fisher.as_module(criterion)
    if fisher.reduction_of(criterion) == "sum":
        return True
    rules = rules_of(criterion)
    if rules is not None and not rules.proven:  # its functions need outputs, which are not at hand
        return rules.weights is None
    return fisher.divisor(criterion, one, one) * len(two) == (
        fisher.divisor(criterion, two, two) * len(one)
    )
