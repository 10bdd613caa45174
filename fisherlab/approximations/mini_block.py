"""Mini-block Fisher."""

from __future__ import annotations

from dataclasses import dataclass

from fisherlab.approximations.base import Approximation
from fisherlab.approximations.means import Means
from fisherlab.blocks import Block
from fisherlab.blocks import MiniBlock as Form
from fisherlab.statistics import GroupedMoment, RowMoments, Statistic, Ungrouped


@dataclass(frozen=True)
class MiniBlock(Approximation, name="mini_block"):
    """`F ~ blockdiag`, the exact restriction of `F`.      FNGD fig. 2; Bahamou et al. 2022 (MBF).

    A Linear layer has one `[i, i]` block per output row. A convolution has one `[k, k]` block per
    pair of output and input channel, k the kernel's size, and its bias a block of its own.

    Args:
        shared: whether all rows (all pairs) of the layer get the mean of their blocks.
        blocks: statistic of the blocks.
        bias: statistic of the bias.

    Raises:
        BlockTooLarge: the blocks exceed the memory budget.
    """

    shared: bool = False
    blocks: Statistic = GroupedMoment()
    bias: Statistic = Ungrouped()

    def block(self, mean: Means, shape: tuple[int, int]) -> Block:
        rows = mean.view(self.blocks)
        if isinstance(rows, RowMoments) and not self.shared:
            return rows.block()
        blocks = mean(self.blocks)
        _, c, k, _ = blocks.shape
        bias = mean(self.bias)[:, 0] if c * k < shape[1] else None
        if self.shared:
            blocks = blocks.mean((0, 1), keepdim=True).expand_as(blocks).contiguous()
            bias = None if bias is None else bias.mean().expand_as(bias).contiguous()
        return Form(blocks, bias)
