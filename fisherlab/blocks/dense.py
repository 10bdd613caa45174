"""The matrix as it stands: for small layers, references and forms without structure."""

from __future__ import annotations

import torch
from torch import Tensor

from fisherlab.blocks.base import Block
from fisherlab.blocks.numerics import (
    BlockError,
    check_damping,
    chosen_squares,
    eigh,
    spectrum_power,
    symmetrise,
)
from fisherlab.blocks.work import cached


class Dense(Block):
    """`F` as a symmetric `[o i, o i]` matrix; negative eigenvalues count as zero in `power`."""

    def __init__(self, matrix: Tensor, shape: tuple[int, int]) -> None:
        if matrix.shape != (shape[0] * shape[1],) * 2:
            raise BlockError(
                f"a dense block on a weight {shape} is {shape[0] * shape[1]} x "
                f"{shape[0] * shape[1]}, got {tuple(matrix.shape)}"
            )
        self.matrix = symmetrise(matrix)
        self._shape = (int(shape[0]), int(shape[1]))

    @property
    def shape(self) -> tuple[int, int]:
        return self._shape

    @property
    def dtype(self) -> torch.dtype:
        return self.matrix.dtype

    @property
    def device(self) -> torch.device:
        return self.matrix.device

    @cached
    def _eigh(self) -> tuple[Tensor, Tensor]:
        return eigh(self.matrix, "dense block")

    def __matmul__(self, V: Tensor) -> Tensor:
        self.check(V)
        return (V.reshape(-1, self.size) @ self.matrix).view(V.shape)

    def power(self, exponent: float, damping: float = 0.0) -> Block:
        values, vectors = self._eigh
        powers = spectrum_power(values, exponent, check_damping(damping), "dense block")
        return Dense(vectors * powers @ vectors.mT, self.shape)

    def chosen(self, other: Block) -> Tensor:
        values, _ = self.leading(self.size)
        return chosen_squares(self.diagonal_of(other)[None], None, values, other.trace())

    def _inner(self, other: Block) -> Tensor | None:
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for part, rows in other.rows():
            total += (rows.double() * self.matrix[part].double()).sum()
        return total

    def diagonal(self) -> Tensor:
        return self.matrix.diagonal().reshape(self.shape)

    def squared_norm(self) -> Tensor:
        return self.matrix.double().square().sum()

    def eigenvalues(self) -> Tensor:
        return self._eigh[0].flip(0).double()

    def leading(self, k: int) -> tuple[Tensor, Tensor]:
        values, vectors = self._eigh
        k = min(k, self.size)
        return values[-k:].flip(0).double(), vectors[:, -k:].flip(1).mT.reshape(k, *self.shape)

    def dense(self) -> Tensor:
        return self.matrix

    @property
    def clamped(self) -> float:
        values = self._eigh[0].double()
        return float(-values.clamp(max=0).sum() / values.abs().sum().clamp(min=1e-300))
