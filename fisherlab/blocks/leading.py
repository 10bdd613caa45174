"""A few eigenvectors, whatever their form, and one eigenvalue beside them."""

from __future__ import annotations

import torch
from torch import Tensor

from fisherlab import doors
from fisherlab.blocks.base import Block
from fisherlab.blocks.numerics import (
    BlockError,
    check_alike,
    check_orthonormal,
    negative_share,
    spectrum_power,
)
from fisherlab.blocks.serialise import remembers


@remembers("vectors", "values", "level")
class Leading(Block):
    """`F = V diag(values) V^T + level (I - V V^T)`.

    Args:
        vectors: `[k, o, i]`, orthonormal.
        values: `[k]`, their eigenvalues.
        level: 0-d, the eigenvalue of everything beside them; None is 0.

    Raises:
        BlockError: there are not as many values as vectors.

    Example:
        >>> import torch
        >>> from fisherlab import blocks
        >>> F = blocks.Leading(torch.tensor([[[0.0, 1.0]]]), torch.tensor([3.0]))
        >>> F.solve(torch.tensor([[2.0, 8.0]]), damping=1.0).tolist()
        [[2.0, 2.0]]
    """

    def __init__(self, vectors: Tensor, values: Tensor, level: Tensor | None = None) -> None:
        self.vectors = doors.tensor(vectors, "vectors", ndim=(3,), error=BlockError)
        self.values = doors.tensor(values, "values", ndim=(1,), error=BlockError)
        level = values.new_zeros(()) if level is None else level
        self.level = doors.tensor(level, "level", ndim=(0,), error=BlockError)
        check_alike(vectors, values, self.level)
        if len(values) != len(vectors):
            raise BlockError(f"{len(vectors)} eigenvectors have {len(values)} eigenvalues")
        check_orthonormal(self.vectors.flatten(1).mT, "vectors")

    @property
    def shape(self) -> tuple[int, int]:
        return self.vectors.shape[1], self.vectors.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        return self.vectors.dtype

    @property
    def device(self) -> torch.device:
        return self.vectors.device

    @property
    def missing(self) -> int:
        """The number of dimensions beside the eigenvectors."""
        return self.size - len(self.values)

    @property
    def _below(self) -> bool:
        """Whether the eigenvalue beside the vectors is larger than one of theirs."""
        return bool((self.values < self.level).any())

    def __matmul__(self, V: Tensor) -> Tensor:
        flat, Q = V.reshape(-1, self.size), self.vectors.flatten(1)
        inside = (flat @ Q.mT * (self.values - self.level)) @ Q
        return (inside + self.level * flat).view(V.shape)

    def power(self, exponent: float, damping: float = 0.0) -> Block:
        beside = self.level.reshape(-1)[: self.missing]
        every = torch.cat([self.values, beside])
        powers = spectrum_power(every, exponent, damping, "low-rank block")
        level = powers[-1] if len(beside) else torch.zeros_like(self.level)
        return Leading(self.vectors, powers[: len(self.values)], level)

    def _inner(self, other: Block) -> Tensor | None:
        inside = other.quadratic(self.vectors.to(other.dtype)).double()
        level = self.level.double()
        found = (inside * (self.values.double() - level)).sum()
        return found + level * other.trace() if bool(level) else found

    def trace(self) -> Tensor:
        return self.values.sum(dtype=torch.float64) + self.missing * self.level.double()

    def squared_norm(self) -> Tensor:
        return self.values.double().square().sum() + self.missing * self.level.double().square()

    def diagonal(self) -> Tensor:
        squares = self.vectors.square()
        return torch.einsum("k,koi->oi", self.values - self.level, squares) + self.level

    def eigenvalues(self) -> Tensor:
        beside = self.level.double().expand(self.missing)
        return torch.cat([self.values.double(), beside]).sort(descending=True).values

    def leading(self, k: int) -> tuple[Tensor, Tensor]:
        """The largest eigenpairs of those that are kept; all of a block where `level` is above."""
        if self._below:
            return super().leading(k)
        values, order = self.values.double().sort(descending=True)
        return values[:k], self.vectors[order[:k]]

    @property
    def clamped(self) -> float:
        return negative_share(self.eigenvalues(), self.dtype)

    def diagonal_of(self, other: Block) -> Tensor:
        if self._below:
            return super().diagonal_of(other)
        _, vectors = self.leading(self.size)
        return other.quadratic(vectors.to(other.dtype)).double()

    def chosen(self, other: Block) -> Tensor:
        if self._below:
            return super().chosen(other)
        return self.nothing_chosen
