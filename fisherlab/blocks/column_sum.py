"""A weight whose columns fall into independent parts, as `[W | b]` of an optimizer does."""

from __future__ import annotations

import torch
from torch import Tensor

from fisherlab.blocks.base import Block
from fisherlab.blocks.basis import matrix_of
from fisherlab.blocks.diagonal import Diagonal
from fisherlab.blocks.direct_sum import Parted
from fisherlab.blocks.eigen import Eigen
from fisherlab.blocks.kronecker import Kronecker
from fisherlab.blocks.serialise import remembers


@remembers("parts")
class ColumnSum(Parted):
    """`F vec([V_1 | V_2 ...]) = vec([F_1 V_1 | F_2 V_2 ...])`: part k acts on its own columns.

    An optimizer that treats a weight and its bias apart has one part for each.

    Args:
        parts: blocks on `[o, i_k]`.
    """

    axis, called = -1, "column sum"

    def diagonal_of(self, other: Block) -> Tensor:
        found, start = [], 0
        for part in self.parts:
            columns = slice(start, start + part.shape[1])
            start = columns.stop
            if isinstance(part, Diagonal):
                found.append(other.diagonal().double()[:, columns].flatten())
                continue
            if not isinstance(part, Eigen | Kronecker):
                return super().diagonal_of(other)
            eigen = part.eigen if isinstance(part, Kronecker) else part
            Q_A = matrix_of(eigen.Q_A)
            whole = Q_A.new_zeros(self.shape[1], Q_A.shape[1])
            whole[columns] = Q_A
            found.append(other.rotated_diagonal(matrix_of(eigen.Q_G), whole).flatten())
        return torch.cat(found)
