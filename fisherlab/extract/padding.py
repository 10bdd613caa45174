"""Padding: which positions of an example count, in the loss and in means over positions.

A position counts in a layer's input factor if any backpropagated vector is non-zero there. The
vector may belong to a column or to the observed labels, at the layer's output or behind the
rectifier that follows (see `dead`). An example without any gradient counts with all its positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fisherlab.extract.criteria import Rules, WithRules, name_of, reduction_of, rules_of
from fisherlab.extract.geometry import CaptureError, Geometry
from fisherlab.extract.layer import LayerCapture


def mask_of(mask: Tensor | str | None, x: object, y: Tensor) -> Tensor | None:
    """The mask `[n, ...]` as booleans, or the entry of a batch that it names."""
    if isinstance(mask, str):
        if not isinstance(x, Mapping) or mask not in x:
            found = list(x) if isinstance(x, Mapping) else type(x).__name__
            raise CaptureError(f"mask {mask!r} names an entry of a mapping batch; got {found}")
        mask = x[mask]
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.is_floating_point() or mask.is_complex():
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise CaptureError(f"mask is {kind}; pass a bool tensor, True for a real position")
    if mask.ndim < 2 or len(mask) != len(y):
        raise CaptureError(
            f"mask has shape {tuple(mask.shape)}; it needs the example as first of at least two "
            f"axes, [{len(y)}, positions]"
        )
    mask = mask.bool()
    if not mask.any():
        raise CaptureError("mask is False everywhere: no position is real")
    return mask


class Masked(WithRules):
    """`L' = (1/Z') sum of the terms at real positions`: a criterion without its padding.

    Where the outputs have no positions, such as one score per class and example, it is the
    criterion itself.
    """

    def __init__(self, criterion: Any, mask: Tensor) -> None:
        self.inner, self.mask = criterion, mask
        self.reduction = reduction_of(criterion)
        self.__name__ = name_of(criterion)
        rules = rules_of(criterion)
        self.known = Rules() if rules is None else rules
        if rules is None or rules.terms is None:
            self.rules = None
            return
        self.rules = Rules(
            terms=self._terms,
            weights=self._weights,
            root=None if rules.root is None else self._root,
            sample=None if rules.sample is None else self._sample,
            score=None if rules.score is None else self._score,
            check=lambda _, outputs, y: rules.check(criterion, outputs, y),
            unknown=lambda _, outputs: rules.unknown(criterion, outputs),
            factor=self._factor,
            classes=rules.classes,
            proven=True,
        )

    def __call__(self, outputs: Tensor, y: Tensor) -> Tensor:
        """The loss of the real positions."""
        if self.spread(outputs) is None:
            return self.known.call(self.inner, outputs, y)
        if self.rules is None:
            raise CaptureError(
                f"mask needs the loss terms of {self.__name__} at each position; register them by "
                "fl.register_criterion(..., terms=)"
            )
        total = self._terms(self, outputs, y).sum()
        return total / self._weights(self, outputs, y).sum() if self.reduction == "mean" else total

    def spread(self, outputs: Tensor) -> Tensor | None:
        """The mask in the axes of the outputs; None where these have no positions."""
        mask, shape = self.mask, tuple(outputs.shape)
        first = (shape[0], *shape[2:]) == mask.shape
        if self.known.classes:
            return mask.unsqueeze(1) if first else None
        last = shape[: mask.ndim] == mask.shape
        if (first and last) or shape == mask.shape:
            raise CaptureError(
                f"outputs of shape {shape} and the mask {tuple(mask.shape)} leave open which axes "
                "are positions; add a last axis of one to the outputs and the targets"
            )
        if last:
            return mask.view(*mask.shape, *[1] * (outputs.ndim - mask.ndim))
        return mask.unsqueeze(1) if first else None

    def _of_terms(self, terms: Tensor, outputs: Tensor) -> Tensor:
        """Terms, 0 at masked positions."""
        spread = self.spread(outputs)
        if spread is None:
            return terms
        if terms.shape == self.mask.shape:
            return torch.where(self.mask, terms, 0)
        if terms.ndim == outputs.ndim and all(
            real in (1, size) for real, size in zip(spread.shape, terms.shape, strict=True)
        ):
            return torch.where(spread, terms, 0)
        raise CaptureError(
            f"mask {tuple(self.mask.shape)} fits no axes of the loss terms of {self.__name__}, "
            f"{tuple(terms.shape)}"
        )

    def _terms(self, _: Any, outputs: Tensor, y: Tensor) -> Tensor:
        assert self.known.terms is not None
        return self._of_terms(self.known.terms(self.inner, outputs, y), outputs)

    def _weights(self, _: Any, outputs: Tensor, y: Tensor) -> Tensor:
        if self.known.weights is not None:
            return self._of_terms(self.known.weights(self.inner, outputs, y), outputs)
        with torch.no_grad():
            return self._of_terms(torch.ones_like(self._terms(_, outputs, y)), outputs)

    def _factor(self, _: Any, outputs: Tensor, y: Tensor) -> Tensor | None:
        return None if self.known.factor is None else self.known.factor(self.inner, outputs, y)

    def _root(self, _: Any, outputs: Tensor, y: Tensor) -> Iterator[Tensor]:
        assert self.known.root is not None
        spread = self.spread(outputs)
        for S in self.known.root(self.inner, outputs, y):
            yield S if spread is None else torch.where(spread, S, 0)

    def _sample(self, _: Any, outputs: Tensor, generator: torch.Generator) -> Tensor:
        assert self.known.sample is not None
        return self.known.sample(self.inner, outputs, generator)

    def _score(self, _: Any, outputs: Tensor, drawn: Tensor, y: Tensor) -> Tensor:
        assert self.known.score is not None
        spread = self.spread(outputs)
        score = self.known.score(self.inner, outputs, drawn, y)
        return score if spread is None else torch.where(spread, score, 0)


def bare(criterion: Callable[..., Any]) -> Callable[..., Any]:
    """The criterion behind a mask."""
    return criterion.inner if isinstance(criterion, Masked) else criterion


def counted(
    geometries: Sequence[Geometry],
    columns: Sequence[Tensor],
    labels: Sequence[Tensor] | None,
    mask: Tensor | None = None,
    behind: Callable[[], Sequence[Tensor]] | None = None,
) -> Tensor | None:
    """Which positions count, `[n, t]` over all calls; None where all do.

    Positions of a convolution count unless they are masked: maxima and dead units leave many of
    them without a gradient.

    Args:
        geometries: of every call.
        columns: the backpropagated vectors `[m, n, ...]` of every call.
        labels: the gradients `[n, ...]` at the observed labels, if they are not the columns.
        mask: the real positions `[n, ...]`; used for calls with the same position axes.
        behind: positions `[n, t]` of every call with a gradient behind a rectifier.

    Raises:
        CaptureError: a masked position has a gradient.
    """
    images = [g.conv is not None or g.transposed is not None for g in geometries]
    total = sum(math.prod(positions_of(g, raw)) for g, raw in zip(geometries, columns, strict=True))
    if mask is None and (all(images) or total == 1):
        return None
    found: list[Tensor] = []
    real: list[Tensor] = []
    for k, (geometry, image, raw) in enumerate(zip(geometries, images, columns, strict=True)):
        n = raw.shape[1]
        t = geometry.positions(raw, 2)
        fits = mask is not None and positions_of(geometry, raw) == mask.shape[1:]
        kept = mask.reshape(n, t) if fits and mask is not None else None
        if image and kept is None:
            found.append(torch.ones(n, t, dtype=torch.bool, device=raw.device))
            real.append(found[-1])
            continue
        arrived = (_all_groups(geometry, raw, 2) != 0).any(3).any(0)
        if labels is not None:
            arrived = arrived | (_all_groups(geometry, labels[k], 1) != 0).any(2)
        if kept is not None and bool((arrived & ~kept).any()):
            raise CaptureError(
                f"{int((arrived & ~kept).sum())} masked positions have a gradient, so the model "
                "uses them; pass the mask to the model too (attention_mask), or no mask"
            )
        real.append(torch.ones_like(arrived) if kept is None else kept)
        found.append(real[-1] if image else arrived)
    counts, possible = torch.cat(found, 1), torch.cat(real, 1)
    if behind is not None and not bool((counts == possible).all()):
        counts = counts | (torch.cat(list(behind()), 1) & possible)
    counts = torch.where(counts.any(1, keepdim=True), counts, possible)
    return None if bool(counts.all()) else counts


def weighed_input(raw: Tensor, gradient: Tensor, behind: Tensor | None) -> Tensor:
    """The input `[n, ..., i]` of a Linear with weights `T / T_n`, 0 at positions that do not count.

    Sums of it over positions, divided by T, are means over the positions that count.
    """
    n = len(raw)
    arrived = (gradient != 0).any(-1).reshape(n, -1)
    if behind is not None:
        arrived = arrived | behind
    counts = torch.where(arrived.any(1, keepdim=True), arrived, True)
    if bool(counts.all()):
        return raw
    weights = counts * (counts.shape[1] / counts.sum(1, keepdim=True).double())
    return torch.where(counts, weights, 0).to(raw).view(*raw.shape[:-1], 1) * raw


def masks(
    criterion: Any, outputs: Tensor, layers: Iterable[LayerCapture], known: bool = False
) -> bool:
    """Whether the mask of a criterion fits the outputs or the positions of some layer.

    Args:
        criterion: a `Masked` one.
        outputs: of the model.
        layers: those captured.
        known: whether a layer has these positions and is left out, since the model uses them.
    """
    assert isinstance(criterion, Masked)
    if criterion.spread(outputs) is not None:
        return True
    axes = criterion.mask.shape[1:]
    if math.prod(axes) == 1:  # as many positions as a bias has, or a layer behind a mean
        return bool(criterion.mask.all())
    # sums and unit vectors have no positions, and no outputs
    found = [layer for layer in layers if layer.raw_outputs is not None]
    if any(
        positions_of(geometry, raw) == axes and bool(raw.any())
        for layer in found
        for geometry, raw in layer.calls(layer.raw_output_gradients or ())
    ):
        return True
    # a layer that uses masked positions may have as many by chance, beside those that are meant
    return known and all(layer.positions == 1 for layer in found)


def positions_of(geometry: Geometry, raw: Tensor) -> tuple[int, ...]:
    """The position axes of a raw output gradient `[m, n, ...]`."""
    if geometry.transposed is not None:
        return (geometry.positions(raw, 2),)
    return tuple(raw.shape[2:-1] if geometry.conv is None else raw.shape[3:])


def _all_groups(geometry: Geometry, raw: Tensor, leading: int) -> Tensor:
    """`[*leading, t, o]`, of all groups of a convolution."""
    if geometry.conv is None:
        return geometry.outputs(raw, leading)
    return raw.flatten(leading + 1).transpose(leading, leading + 1)
