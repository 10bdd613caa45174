"""A weight whose columns fall into independent parts, as `[W | b]` of an optimizer does."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from fisherlab.blocks.base import Block
from fisherlab.blocks.basis import Basis, matrix_of
from fisherlab.blocks.direct_sum import Parted
from fisherlab.blocks.serialise import remembers


@remembers("parts")
class ColumnSum(Parted):
    """`F vec([V_1 | V_2 ...]) = vec([F_1 V_1 | F_2 V_2 ...])`: part k acts on its own columns.

    An optimizer that treats a weight and its bias apart has one part for each.

    Args:
        parts: blocks on `[o, i_k]`.
    """

    axis, called = -1, "column sum"

    def _pairs(self, other: Block) -> Iterator[tuple[Block, Block]]:
        """Each part with the other block on its columns."""
        start = 0
        for part in self.parts:
            yield part, Within(other, start, part.shape[1])
            start += part.shape[1]

    def diagonal_of(self, other: Block) -> Tensor:
        return torch.cat([part.diagonal_of(near).flatten() for part, near in self._pairs(other)])

    def chosen(self, other: Block) -> Tensor:
        return torch.stack([part.chosen(near) for part, near in self._pairs(other)]).sum()


class Within(Block):
    """A block on some columns of its weight: `V -> (F [0 | V | 0])` on these columns.

    Args:
        whole: `F`, on `[o, i]`.
        start: the first of the columns.
        width: how many there are.
    """

    def __init__(self, whole: Block, start: int, width: int) -> None:
        self.whole, self.start, self.width = whole, start, width

    @property
    def shape(self) -> tuple[int, int]:
        return self.whole.shape[0], self.width

    @property
    def dtype(self) -> torch.dtype:
        return self.whole.dtype

    @property
    def device(self) -> torch.device:
        return self.whole.device

    def _padded(self, V: Tensor) -> Tensor:
        """`[0 | V | 0]`."""
        return pad(V, (self.start, self.whole.shape[1] - self.start - self.width))

    def __matmul__(self, V: Tensor) -> Tensor:
        return (self.whole @ self._padded(V)).narrow(-1, self.start, self.width)

    def quadratic(self, V: Tensor) -> Tensor:
        return self.whole.quadratic(self._padded(V))

    def diagonal(self) -> Tensor:
        return self.whole.diagonal().narrow(-1, self.start, self.width)

    def rotated_diagonal(self, Q_G: Basis, Q_A: Basis) -> Tensor:
        lifted = self._padded(matrix_of(Q_A).mT).mT
        return self.whole.rotated_diagonal(matrix_of(Q_G), lifted)
