"""Mini-block Fisher."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from fisherlab.approximations.base import Approximation, Means
from fisherlab.blocks import Block, RowBlocks
from fisherlab.blocks import MiniBlock as Form
from fisherlab.blocks.mini_block import check_blocks
from fisherlab.extract import LayerCapture


@dataclass(frozen=True)
class MiniBlock(Approximation, name="mini_block"):
    """`F ~ blockdiag`, the exact restriction of `F`.      FNGD fig. 2; Bahamou et al. 2022 (MBF).

    Linear: one `[i, i]` block per output row. Convolution: one `[k, k]` per pair of output and
    input channel, k the kernel's size, the bias a block of its own. `shared=True` gives every row
    (every pair) of the layer the mean of its blocks.

    Raises `BlockTooLarge` where the blocks exceed the memory budget.
    """

    shared: bool = False

    def sums(self, layer: LayerCapture) -> dict[str, Tensor]:
        c, k = _groups(layer)
        result = {"blocks": layer.columns.grouped_moments(c, k)}
        if c * k < layer.shape[1]:
            result["bias"] = layer.columns.squares[:, -1]
        return result

    def of_whole(self, layer: LayerCapture) -> Block | None:
        rows = layer.geometry.conv is None and layer.positions == 1 and not self.shared
        if not rows or layer.column_share != 1:
            return None
        columns = layer.columns
        return RowBlocks(columns.a, columns.g, 1 / layer.examples, columns)

    def block(
        self, means: Means, basis: dict[str, Tensor], corrections: dict[str, Tensor]
    ) -> Block:
        blocks, bias = means["blocks"], means.get("bias")
        if self.shared:
            blocks = blocks.mean((0, 1), keepdim=True).expand_as(blocks).contiguous()
            bias = None if bias is None else bias.mean().expand_as(bias).contiguous()
        return Form(blocks, bias)


def _groups(layer: LayerCapture) -> tuple[int, int]:
    """Groups of inputs and their size; refused where the blocks exceed the memory budget."""
    o, i = layer.shape
    conv = layer.geometry.conv
    k = math.prod(conv.kernel) if conv else i
    c = (i - (layer.geometry.bias if conv else 0)) // k
    check_blocks(o, c, k, layer.dtype, layer.device, f"layer {layer.name!r}")
    return c, k
