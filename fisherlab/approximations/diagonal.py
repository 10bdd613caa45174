"""The diagonal."""

from __future__ import annotations

from dataclasses import dataclass

from fisherlab import blocks
from fisherlab.approximations.base import Approximation
from fisherlab.approximations.means import Means
from fisherlab.blocks import Block
from fisherlab.statistics import Squares, Statistic


@dataclass(frozen=True)
class Diagonal(Approximation, name="diagonal"):
    """`F ~ diag((1/M) sum_r D_r^2)`, the exact diagonal of the block.

    Args:
        squares: statistic of the diagonal `[o, i]`.
    """

    squares: Statistic = Squares()

    def block(self, mean: Means, shape: tuple[int, int]) -> Block:
        return blocks.Diagonal(mean(self.squares))
