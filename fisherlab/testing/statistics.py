"""Laws of a statistic: totals add up, and the cheaper views are views of the total."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from fisherlab.extract import LayerCapture
from fisherlab.statistics import Statistic
from fisherlab.testing.cases import FIRST, Problem, captured, problem
from fisherlab.testing.laws import Report, Run, near, unchanged

BOUND = {torch.float64: 1e-12, torch.float32: 1e-5}
# the fields of a capture that may be absent, and the needs that fill them
OPTIONAL = {
    "raw_output_gradients": {"output_gradients"},
    "raw_label_gradients": {"label_gradients", "label_gradient_sum", "gradient"},
    "raw_outputs": {"outputs"},
    "slopes": {"activation_slope"},
}


def equal(found: Tensor, expected: Tensor, layer: LayerCapture) -> None:
    """Assert equality up to rounding of sums in another order."""
    near(found, expected, layer.dtype, bound=BOUND[layer.dtype])


def bare(layer: LayerCapture, needs: frozenset[str]) -> LayerCapture:
    """The capture with nothing but what is needed."""
    absent = {field: None for field, needed in OPTIONAL.items() if not needed & needs}
    return replace(layer, **absent)  # type: ignore[arg-type]


def tensors(layer: LayerCapture) -> Iterator[Tensor]:
    """The tensors of the capture."""
    for held in ("raw_inputs", *OPTIONAL):
        value = getattr(layer, held)
        if value is not None:
            yield from value if isinstance(value, tuple) else (value,)


def parts_of(found: Problem, layer: LayerCapture) -> list[LayerCapture]:
    """Three parts of the capture, of different sizes where there are examples enough."""
    n = len(found.x)
    cuts = [0, max(1, n // 3), max(2, n // 3 + 1), n]
    return [layer.part(slice(a, b)) for a, b in pairwise(cuts) if a < b]


def _total(S: Statistic, layer: LayerCapture) -> None:
    total = S.total(layer)
    assert isinstance(total, Tensor), f"total is a {type(total).__name__}, not a tensor"
    assert total.dtype in (layer.dtype, torch.float64), (
        f"total is {total.dtype} where the capture is {layer.dtype}"
    )
    assert torch.isfinite(total).all(), "total has NaN or inf entries"
    assert not total.requires_grad, "total carries a graph"
    if S.side is not None:
        assert S.side in ("input", "output"), f"side is 'input', 'output' or None, not {S.side!r}"
        d = layer.shape[("output", "input").index(S.side)]
        assert total.shape == (d, d), (
            f"side is {S.side!r} of a layer {list(layer.shape)}, so total is [{d}, {d}]; it is "
            f"{list(total.shape)}"
        )
        equal(total.mT, total, layer)


def _views(S: Statistic, layer: LayerCapture) -> None:
    total = S.total(layer)
    if S.side is not None:
        equal(S.diagonal(layer), total.diagonal(), layer)
    rows = S.rows(layer)
    if rows is not None:
        equal(rows.formed(), total, layer)
        equal(rows.scaled(0.25).formed(), total / 4, layer)
    # whichever way the columns are laid out
    equal(S.total(layer.at_hand()), total, layer)


def _same(S: Statistic, layer: LayerCapture) -> None:
    unchanged(lambda: S.total(layer), tensors(layer), "totals")


def _needs(S: Statistic, layer: LayerCapture) -> None:
    equal(S.total(bare(layer, S.needs)), S.total(layer), layer)


def _adds_up(S: Statistic, found: Problem, layer: LayerCapture) -> None:
    whole = S.total(layer)
    singles = [layer.part(slice(k, k + 1)) for k in range(len(found.x))]
    for parts in (parts_of(found, layer), singles):
        equal(torch.stack([S.over(part) for part in parts]).sum(0), whole, layer)


def _columnwise(S: Statistic, layer: LayerCapture) -> None:
    # one example at a time, and one of its output vectors
    size = layer.positions * sum(layer.shape) * layer.dtype.itemsize
    parts = list(layer.chunks(size))
    assert len(parts) == len(layer.raw_inputs[0]) * layer.columns_per_example
    equal(torch.stack([S.over(part) for part in parts]).sum(0), S.total(layer), layer)


def check_statistic(statistic: Statistic, *, additive: bool = True) -> Report:
    """A statistic on thin and full layers, positions, convolutions, groups and padding.

    Args:
        statistic: The sum to test.
        additive: False where it is of a whole batch, as the mean gradient's moments are: its
            totals are not tested for adding up.

    Returns:
        The laws that hold, with the layers, in float64 and float32.

    Raises:
        LawError: a law is broken; the message lists each with its figures.
        TypeError: `statistic` is no instance of `fisherlab.statistics.Statistic`.
    """
    if not isinstance(statistic, Statistic):
        raise TypeError(
            f"check_statistic takes an instance such as InputMoment(), got {statistic!r}"
        )
    run, S = Run(str(statistic)), statistic
    for dtype in (torch.float64, torch.float32):
        for kind in FIRST:
            found = problem(kind, dtype)
            layer, where = captured(kind, dtype), found.label
            if not run.law("a finite total in the capture's precision", where, _total, S, layer):
                continue
            run.law("views are views of the total", where, _views, S, layer)
            run.law("the same again, the capture unchanged", where, _same, S, layer)
            run.law("it reads what `needs` names", where, _needs, S, layer)
            if additive:
                run.law("it adds up over examples", where, _adds_up, S, found, layer)
            if additive and S.columnwise:
                run.law("it adds up over output vectors", where, _columnwise, S, layer)
    return run.report()
