"""The diagonal form."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from fisherlab import doors
from fisherlab.blocks.base import Block
from fisherlab.blocks.basis import Basis
from fisherlab.blocks.numerics import BlockError, dot, negative_share, spectrum_power


class Diagonal(Block):
    """`F = diag(vec(entries))`.

    Args:
        entries: `[o, i]`, not negative.

    Example:
        >>> import torch
        >>> from fisherlab import blocks
        >>> F = blocks.Diagonal(torch.tensor([[2.0, 3.0]]))
        >>> F.solve(torch.tensor([[6.0, 8.0]]), damping=1.0).tolist()
        [[2.0, 2.0]]
    """

    def __init__(self, entries: Tensor) -> None:
        self.entries = doors.tensor(entries, "entries", ndim=(2,), full=True, error=BlockError)

    @property
    def shape(self) -> tuple[int, int]:
        return self.entries.shape[0], self.entries.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.entries.dtype

    @property
    def device(self) -> torch.device:
        return self.entries.device

    def __matmul__(self, V: Tensor) -> Tensor:
        return self.entries * V

    def power(self, exponent: float, damping: float = 0.0) -> Block:
        powers = spectrum_power(self.entries, exponent, damping, "diagonal block", rounded=False)
        return Diagonal(powers)

    def column_quadratics(self, a: Tensor, g: Tensor) -> Tensor:
        if a.shape[1] == 1:
            inputs = (a[:, 0].square() @ self.entries.mT).double()
            return (g[:, :, 0].square() * inputs).sum(-1)
        return super().column_quadratics(a, g)

    def _inner(self, other: Block) -> Tensor | None:
        return dot(self.entries, other.diagonal())

    def diagonal(self) -> Tensor:
        return self.entries

    def squared_norm(self) -> Tensor:
        return dot(self.entries, self.entries)

    def eigenvalues(self) -> Tensor:
        return self.entries.double().flatten().sort(descending=True).values

    def logdet(self, damping: float) -> Tensor:
        values = self.entries.clamp(min=0).double()
        return values.add_(damping).log_().sum()

    def leading(self, k: int) -> tuple[Tensor, Tensor]:
        values, flat = self.entries.double().flatten().topk(min(k, self.size))
        vectors = torch.zeros(len(flat), self.size, dtype=self.dtype, device=self.device)
        vectors[torch.arange(len(flat), device="cpu"), flat] = 1
        return values, vectors.view(-1, *self.shape)

    def leading_values(self, k: int) -> Tensor:
        return self.entries.double().flatten().topk(min(k, self.size)).values

    def leading_factors(self, k: int) -> tuple[Tensor, Tensor]:
        flat = self.entries.double().flatten().topk(min(k, self.size)).indices
        o, i = self.shape
        sides = one_hot(flat // i, o), one_hot(flat % i, i)
        q_G, q_A = (side.mT.to(self.dtype) for side in sides)
        return q_G, q_A

    @property
    def clamped(self) -> float:
        return negative_share(self.entries.flatten(), self.dtype)

    def diagonal_of(self, other: Block) -> Tensor:
        return other.diagonal().double()

    def chosen(self, other: Block) -> Tensor:
        return self.nothing_chosen

    def rotated_diagonal(self, Q_G: Basis, Q_A: Basis) -> Tensor:
        return Q_G.double().square().mT @ self.entries.double() @ Q_A.double().square()
