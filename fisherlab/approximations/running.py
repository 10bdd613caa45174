"""Means of an approximation's sums over chunks, batches, ranks and time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fisherlab.approximations.base import Approximation, Means
from fisherlab.approximations.exact import Exact
from fisherlab.blocks import Block, BlockError, Outer
from fisherlab.blocks.coordinates import LARGEST_FACTOR
from fisherlab.blocks.numerics import all_finite
from fisherlab.blocks.work import once
from fisherlab.extract import LayerCapture
from fisherlab.extract.image import sharing
from fisherlab.extract.joint import one_sample

Sums = dict[str, Tensor]


def add(terms: Iterable[Mapping[str, Tensor]]) -> Sums:
    """Entrywise sum of dictionaries with the same keys; a key of one term keeps its own tensor."""
    total: Sums = {}
    for term in terms:
        for key, value in term.items():
            if key in total:
                total[key] = total[key] + value
            else:
                total[key] = value
    return total


def divide(sums: Sums, count: float | Tensor) -> Sums:
    """The means: every sum over the number of loss terms it covers."""
    return {key: value / count for key, value in sums.items()}


class Memo:
    """The statistics of one layer, computed once and shared by every approximation that asks.

    `layers` are captures of the same layer: one batch, chunks of it, or many batches. The memo dies
    with the layer.
    """

    def __init__(self, layers: Sequence[LayerCapture], memory: int | None = None) -> None:
        whole = one_sample(layers)
        self.layers = tuple(sharing(replace(layer, shared={})) for layer in whole)
        self.memory = memory
        self.count = sum(layer.examples for layer in self.layers)
        self._means: dict[Approximation, Means] = {}
        self._basis: dict[Approximation, Sums] = {}
        self._blocks: dict[Approximation, Block] = {}

    def _chunks(self) -> Iterable[LayerCapture]:
        return (chunk for layer in self.layers for chunk in layer.chunks(self.memory))

    def means(self, approximation: Approximation) -> Means:
        """The means of the sums of `approximation.origin`."""
        origin = approximation.origin
        return once(self._means, origin, lambda: self._means_of(origin))

    def _means_of(self, origin: Approximation) -> Means:
        whole = self._whole()
        if whole is None:
            return Means(add(origin.sums(chunk) for chunk in self._chunks()), self.count)
        return Means(origin.sums(whole), self.count, origin.moments(whole))

    def _whole(self) -> LayerCapture | None:
        """The capture, if it is one whole batch: its inputs may span less than their space."""
        return self.layers[0] if len(self.layers) == 1 and self.memory is None else None

    def basis(self, approximation: Approximation) -> Sums:
        """The basis of the approximation, from its means."""
        return once(
            self._basis, approximation, lambda: approximation.basis(self.means(approximation))
        )

    def block(self, approximation: Approximation) -> Block:
        """The block of the approximation."""
        return once(self._blocks, approximation, lambda: self._make(approximation))

    def exact(self) -> Outer:
        """The block itself, of the same columns that the approximations use."""
        block = self.block(Exact())
        assert isinstance(block, Outer)
        return block

    def _make(self, approximation: Approximation) -> Block:
        if not approximation.additive:
            return approximation.of_batch(self.layers)
        if len(self.layers) == 1 and self.memory is None:
            block = approximation.of_whole(self.layers[0])
            if block is not None:
                return block
        means, basis = self.means(approximation), self.basis(approximation)
        corrections = add(approximation.corrections(chunk, basis) for chunk in self._chunks())
        if not corrections and not basis:
            return means.block(approximation)
        return approximation.block(means, basis, divide(corrections, self.count))


def too_large(
    approximation: Approximation, shape: tuple[int, int], largest: int
) -> dict[str, tuple[str, int]]:
    """The Kronecker factors with more than `largest` rows: the side of the layer, and the rows."""
    rows = dict(zip(("output", "input"), shape, strict=True))
    sides = approximation.origin.sides
    return {key: (side, rows[side]) for key, side in sides.items() if rows[side] > largest}


class Running:
    """Means of an approximation's sums over time.

    `mean = S / c`, `S <- decay S + s`, `c <- decay c + n`.

    A sum travels with the number of loss terms it covers and both decay together, so the first
    estimate is the first estimate and a short batch counts less. Sums, basis and corrections are
    refreshed by separate calls, at whatever intervals the caller keeps. `reduce` adds those of all
    ranks, sums and count together in one call. Of a factor whose side exceeds `largest_factor` the
    diagonal is kept: its matrix would not fit, its eigenvectors would take minutes.

    Raises `BlockError` for an approximation whose blocks are of the current batch only.
    """

    def __init__(
        self,
        approximation: Approximation,
        decay: float = 0.95,
        reduce: Callable[[Sums], Sums] | None = None,
        largest_factor: int = LARGEST_FACTOR,
    ) -> None:
        if not approximation.additive:
            raise BlockError(
                f"{type(approximation).__name__} has no memory: its blocks are of the current "
                "batch; call it on the captures instead"
            )
        if not 0 <= decay <= 1:
            raise BlockError(f"decay is the weight of the past, in [0, 1]; got {decay}")
        self.approximation, self.decay, self.reduce = approximation, decay, reduce
        self.largest_factor = largest_factor
        self.sums: Sums = {}
        self.count = 0.0
        self.basis: Sums = {}
        self.corrections: Sums = {}
        self.corrections_count = 0.0

    @property
    def means(self) -> Means:
        """The current means."""
        return Means(self.sums, self.count)

    def update(self, *layers: LayerCapture) -> None:
        """Add one batch, given whole or in chunks; the past decays once.

        Raises `BlockError` where its sums have NaN or inf entries, which would stay for good.
        """
        total = add(self._sums(layer) for layer in one_sample(layers))
        count = sum(layer.examples for layer in layers)
        if not all(all_finite(value) for value in total.values()):
            raise BlockError(
                f"the statistics of {layers[0].name!r} have NaN or inf entries, so have its input "
                "or the gradient at its output; the running means are as before"
            )
        self.count = self._blend(self.sums, self.count, total, count)

    def _sums(self, layer: LayerCapture) -> Mapping[str, Tensor]:
        origin = self.approximation.origin
        sums = origin.sums(layer)
        large = too_large(origin, layer.shape, self.largest_factor)
        if not large:
            return sums
        diagonals = origin.diagonals(layer)

        def kept(key: str) -> Tensor:
            if key not in large:
                return sums[key]
            return diagonals[key] if key in diagonals else sums[key].diagonal()

        return {key: kept(key) for key in sums}

    def new_basis(self) -> Sums:
        """The basis of the current means: the expensive part."""
        return self.approximation.basis(self.means, self.basis or None)

    def refresh_basis(self, new: Sums | None = None) -> None:
        """Take the basis of the means, or one made elsewhere; corrections are carried into it."""
        new = self.new_basis() if new is None else new
        if self.basis and self.corrections:
            self.corrections = self.approximation.carry(self.corrections, self.basis, new)
        self.basis = new

    def correct(self, *layers: LayerCapture) -> None:
        """Add one batch to the corrections, in the current basis."""
        whole = one_sample(layers)
        total = add(self.approximation.corrections(layer, self.basis) for layer in whole)
        if not total:
            return
        count = sum(layer.examples for layer in layers)
        self.corrections_count = self._blend(self.corrections, self.corrections_count, total, count)

    def block(self) -> Block:
        """The block of the current means, basis and corrections."""
        if not self.sums:
            raise BlockError("no batch has been seen yet: call update() first")
        corrections = divide(self.corrections, self.corrections_count) if self.corrections else {}
        return self.approximation.block(self.means, self.basis, corrections)

    def _blend(self, into: Sums, count: float, total: Sums, terms: float) -> float:
        if self.reduce is not None:
            counted = torch.tensor(terms, dtype=torch.float64)
            *reduced, counted = self.reduce({**total, "count": counted}).values()
            total, terms = dict(zip(total, reduced, strict=True)), float(counted)
        for key, value in total.items():
            if key in into:
                into[key].mul_(self.decay).add_(value)
            else:
                into[key] = value.clone()
        return self.decay * count + terms

    def state_dict(self) -> dict[str, Tensor]:
        """Everything remembered, as flat named tensors."""
        state = {f"sums.{k}": v for k, v in self.sums.items()}
        state |= {f"basis.{k}": v for k, v in self.basis.items()}
        state |= {f"corrections.{k}": v for k, v in self.corrections.items()}
        counts = torch.tensor([self.count, self.corrections_count], dtype=torch.float64)
        return {**state, "counts": counts}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` returned, dtypes included."""
        self.sums, self.basis, self.corrections = {}, {}, {}
        groups = {"sums": self.sums, "basis": self.basis, "corrections": self.corrections}
        for key, value in state.items():
            group, _, field = key.partition(".")
            if field:
                groups[group][field] = value.clone()
        self.count, self.corrections_count = state["counts"].tolist()
