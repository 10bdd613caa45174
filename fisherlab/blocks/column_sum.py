"""A weight whose columns fall into independent parts, as `[W | b]` of an optimizer does."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fisherlab import doors
from fisherlab.blocks.base import Block
from fisherlab.blocks.basis import Basis, matrix_of
from fisherlab.blocks.diagonal import Diagonal
from fisherlab.blocks.eigen import Eigen
from fisherlab.blocks.kronecker import Kronecker
from fisherlab.blocks.numerics import BlockError, check_alike
from fisherlab.blocks.serialise import remembers


@remembers("parts")
class ColumnSum(Block):
    """`F vec([V_1 | V_2 ...]) = vec([F_1 V_1 | F_2 V_2 ...])`: part k acts on its own columns.

    An optimizer that treats a weight and its bias apart has one part for each. Sums, spectra and
    powers are those of the parts; nothing couples two parts.

    Args:
        parts: blocks on `[o, i_k]`.
    """

    def __init__(self, parts: Sequence[Block]) -> None:
        if not isinstance(parts, Sequence) or not all(isinstance(p, Block) for p in parts):
            raise BlockError(f"parts must be a list of blocks, got {doors.said(parts)}")
        if not parts or len({part.shape[0] for part in parts}) != 1:
            raise BlockError(
                "a column sum takes at least one block, all with the same number of rows; got "
                f"shapes {[part.shape for part in parts]}"
            )
        check_alike(*parts)
        self.parts = tuple(parts)

    @property
    def shape(self) -> tuple[int, int]:
        return self.parts[0].shape[0], sum(part.shape[1] for part in self.parts)

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    @property
    def device(self) -> torch.device:
        return self.parts[0].device

    def sizes(self) -> dict[int, int]:
        return {key: size for part in self.parts for key, size in part.sizes().items()}

    def formed_bytes(self) -> int:
        return sum(part.formed_bytes() for part in {id(part): part for part in self.parts}.values())

    def split(self, V: Tensor) -> tuple[Tensor, ...]:
        """The columns of each part."""
        self.check(V)
        return V.split([part.shape[1] for part in self.parts], -1)

    def __matmul__(self, V: Tensor) -> Tensor:
        return torch.cat([p @ v for p, v in zip(self.parts, self.split(V), strict=True)], -1)

    def power(self, exponent: float, damping: float = 0.0) -> Block:
        return ColumnSum([part.power(exponent, damping) for part in self.parts])

    def solve(self, V: Tensor, damping: float) -> Tensor:
        pairs = zip(self.parts, self.split(V), strict=True)
        return torch.cat([part.solve(v, damping) for part, v in pairs], -1)

    def quadratic(self, V: Tensor) -> Tensor:
        pairs = zip(self.parts, self.split(V), strict=True)
        return torch.stack([part.quadratic(v.contiguous()) for part, v in pairs]).sum(0)

    def column_quadratics(self, a: Tensor, g: Tensor) -> Tensor:
        inputs = a.split([part.shape[1] for part in self.parts], -1)
        pairs = zip(self.parts, inputs, strict=True)
        return torch.stack([part.column_quadratics(a.contiguous(), g) for part, a in pairs]).sum(0)

    def _inner(self, other: Block) -> Tensor | None:
        if isinstance(other, ColumnSum) and [p.shape for p in self.parts] == [
            p.shape for p in other.parts
        ]:
            pairs = zip(self.parts, other.parts, strict=True)
            return torch.stack([one.inner(two) for one, two in pairs]).sum()
        return None

    def _total(self, value: Callable[[Block], Tensor]) -> Tensor:
        return torch.stack([value(part) for part in self.parts]).sum(0)

    def trace(self) -> Tensor:
        return self._total(lambda part: part.trace())

    def squared_norm(self) -> Tensor:
        return self._total(lambda part: part.squared_norm())

    def logdet(self, damping: float) -> Tensor:
        return self._total(lambda part: part.logdet(damping))

    def diagonal(self) -> Tensor:
        return torch.cat([part.diagonal() for part in self.parts], 1)

    def eigenvalues(self) -> Tensor:
        values = torch.cat([part.eigenvalues() for part in self.parts])
        return values.sort(descending=True).values

    def leading_values(self, k: int) -> Tensor:
        values = torch.cat([part.leading_values(k) for part in self.parts])
        return values.sort(descending=True).values[:k]

    def leading(self, k: int) -> tuple[Tensor, Tensor]:
        values, vectors, start = [], [], 0
        for part in self.parts:
            top, inside = part.leading(k)
            whole = inside.new_zeros(len(top), *self.shape)
            whole[:, :, start : start + part.shape[1]] = inside
            values.append(top)
            vectors.append(whole)
            start += part.shape[1]
        everything = torch.cat(values)
        order = everything.argsort(descending=True)[:k]
        return everything[order], torch.cat(vectors)[order]

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

    def rotated_diagonal(self, Q_G: Basis, Q_A: Basis) -> Tensor:
        rows = matrix_of(Q_A).split([part.shape[1] for part in self.parts])
        pairs = zip(self.parts, rows, strict=True)
        return torch.stack(
            [part.rotated_diagonal(Q_G, part_rows) for part, part_rows in pairs]
        ).sum(0)

    @property
    def clamped(self) -> float:
        sums = [float(part.eigenvalues().abs().sum()) for part in self.parts if part.clamped]
        if not sums:
            return 0.0
        total = float(self.eigenvalues().abs().sum())
        shares = [part.clamped for part in self.parts if part.clamped]
        return sum(s * w for s, w in zip(shares, sums, strict=True)) / total
