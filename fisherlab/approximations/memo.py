"""The statistics of one layer, each computed once for all methods that are made of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from fisherlab import doors
from fisherlab.approximations.means import Means, Sums, add, check_approximation, divide
from fisherlab.blocks import Block, BlockError
from fisherlab.blocks.work import once
from fisherlab.extract import LayerCapture
from fisherlab.extract.image import sharing
from fisherlab.extract.joint import one_sample
from fisherlab.statistics import Statistic, View, totals

if TYPE_CHECKING:
    from fisherlab.approximations.base import Approximation


class Memo:
    """The statistics of one layer, computed once and shared by every approximation that asks.

    `layers` are captures of the same layer: one batch, chunks of it, or many batches. The memo dies
    with the layer.
    """

    def __init__(self, layers: Sequence[LayerCapture], memory: int | None = None) -> None:
        whole = one_sample(layers)
        if memory is not None:
            memory = doors.count(memory, "memory", error=BlockError)
        self.layers = tuple(sharing(replace(layer, shared={})) for layer in whole)
        self.memory = memory
        self.count = sum(layer.examples for layer in self.layers)
        self._totals: dict[Statistic, Tensor | View] = {}
        self._means = Means(self._total, self.count, self.layers[0].shape)
        self._basis: dict[Approximation, Sums] = {}
        self._blocks: dict[Approximation, Block] = {}

    def means(self, approximation: Approximation) -> Means:
        """The means of the statistics of an approximation."""
        check_approximation(approximation)
        if self._whole() is None:
            # all of them of a chunk while it is at hand
            self._collect(approximation.statistics_by_name.values())
        return self._means.read_by(approximation)

    def _whole(self) -> LayerCapture | None:
        """The capture, if it is one whole batch: its inputs may span less than their space."""
        return self.layers[0] if len(self.layers) == 1 and self.memory is None else None

    def _total(self, statistic: Statistic) -> Tensor | View:
        whole = self._whole()
        if whole is not None:
            return once(self._totals, statistic, lambda: _of_whole(statistic, whole))
        self._collect([statistic])
        return self._totals[statistic]

    def _collect(self, statistics: Iterable[Statistic]) -> None:
        new = [S for S in dict.fromkeys(statistics) if S not in self._totals]
        sums: dict[Statistic, Tensor] = {}
        for layer in self.layers if new else ():
            for found in totals(new, layer, self.memory):
                for S, term in found.items():
                    known = sums.get(S)
                    sums[S] = term if known is None else known + term
        self._totals.update(sums)

    def basis(self, approximation: Approximation) -> Sums:
        """The basis of the approximation, from its means."""
        check_approximation(approximation)
        return once(
            self._basis, approximation, lambda: approximation.basis(self.means(approximation))
        )

    def block(self, approximation: Approximation) -> Block:
        """The block of the approximation."""
        check_approximation(approximation)
        return once(self._blocks, approximation, lambda: self._make(approximation))

    def _make(self, approximation: Approximation) -> Block:
        if not approximation.additive:
            return approximation.of_batch(self.layers)
        means, basis = self.means(approximation), self.basis(approximation)
        chunks = (chunk for layer in self.layers for chunk in layer.chunks(self.memory))
        corrections = add(approximation.corrections(chunk, basis) for chunk in chunks)
        if not corrections and not basis:
            return means.block(approximation)
        means = means.given(basis, divide(corrections, self.count))
        return approximation.block(means, means.shape)


def _of_whole(statistic: Statistic, layer: LayerCapture) -> Tensor | View:
    view = statistic.rows(layer)
    return statistic.over(layer) if view is None else view
