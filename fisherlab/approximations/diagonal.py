"""The diagonal."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fisherlab import blocks
from fisherlab.approximations.base import Approximation, Means
from fisherlab.blocks import Block
from fisherlab.extract import LayerCapture


@dataclass(frozen=True)
class Diagonal(Approximation, name="diagonal"):
    """`F ~ diag((1/M) sum_r D_r^2)`, the exact diagonal of the block."""

    def sums(self, layer: LayerCapture) -> dict[str, Tensor]:
        return {"squares": layer.columns.squares}

    def block(
        self, means: Means, basis: dict[str, Tensor], corrections: dict[str, Tensor]
    ) -> Block:
        return blocks.Diagonal(means["squares"])
