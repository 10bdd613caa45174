"""A block known by its inverse, as quasi-Newton methods keep it."""

from __future__ import annotations

import torch
from torch import Tensor

from fisherlab import doors
from fisherlab.blocks.base import Block
from fisherlab.blocks.basis import Basis
from fisherlab.blocks.numerics import BlockError
from fisherlab.blocks.work import cached


class FromInverse(Block):
    """`F = P^{-1}`; `power(-1, 0)` is `P` itself, untouched.

    Args:
        inverse: `P`, a positive definite block.
    """

    def __init__(self, inverse: Block) -> None:
        if not isinstance(inverse, Block):
            raise BlockError(f"inverse must be a block of fl.blocks, got {doors.said(inverse)}")
        self.inverse = inverse

    @property
    def shape(self) -> tuple[int, int]:
        return self.inverse.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.inverse.dtype

    @property
    def device(self) -> torch.device:
        return self.inverse.device

    def sizes(self) -> dict[int, int]:
        return self.inverse.sizes()

    def formed_bytes(self) -> int:
        return self.inverse.formed_bytes()

    @cached
    def forward(self) -> Block:
        """`F` in the form that the inverse of `P` takes."""
        return self.inverse.power(-1, 0.0)

    def __matmul__(self, V: Tensor) -> Tensor:
        return self.forward @ V

    def power(self, exponent: float, damping: float = 0.0) -> Block:
        if exponent == -1 and damping == 0:
            return self.inverse
        return self.forward.power(exponent, damping)

    def column_quadratics(self, a: Tensor, g: Tensor) -> Tensor:
        return self.forward.column_quadratics(a, g)

    def quadratic(self, V: Tensor) -> Tensor:
        return self.forward.quadratic(V)

    def _inner(self, other: Block) -> Tensor | None:
        return self.forward.inner(other)

    def trace(self) -> Tensor:
        return self.forward.trace()

    def squared_norm(self) -> Tensor:
        return self.forward.squared_norm()

    def diagonal(self) -> Tensor:
        return self.forward.diagonal()

    def logdet(self, damping: float) -> Tensor:
        return self.forward.logdet(damping)

    def eigenvalues(self) -> Tensor:
        return self.forward.eigenvalues()

    def leading_values(self, k: int) -> Tensor:
        return self.forward.leading_values(k)

    def leading_factors(self, k: int) -> tuple[Tensor, Tensor] | None:
        return self.forward.leading_factors(k)

    def leading(self, k: int) -> tuple[Tensor, Tensor]:
        return self.forward.leading(k)

    def diagonal_of(self, other: Block) -> Tensor:
        return self.forward.diagonal_of(other)

    def chosen(self, other: Block) -> Tensor:
        return self.forward.chosen(other)

    def rotated_diagonal(self, Q_G: Basis, Q_A: Basis) -> Tensor:
        return self.forward.rotated_diagonal(Q_G, Q_A)

    @property
    def clamped(self) -> float:
        return self.inverse.clamped
