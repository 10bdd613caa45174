"""A second moment of few rows, kept as the rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fisherlab.blocks.contractions import second_moment
from fisherlab.blocks.numerics import _eigh, declare_range


class Moment:
    """`S = scale X^T X` of rows `X` `[r, d]`, r clearly less than d; formed only when asked for.

    `space()` returns orthonormal columns `[d, r']` that span the rows: eigenvectors are found
    inside it, by products with r rows instead of d.
    """

    def __init__(
        self, rows: Tensor, scale: float | Tensor, space: Callable[[], Tensor | None]
    ) -> None:
        self.rows, self.scale, self.space = rows.reshape(-1, rows.shape[-1]), scale, space
        self._pairs: tuple[Tensor, Tensor] | None = None

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.rows.shape[1],) * 2)

    @property
    def dtype(self) -> torch.dtype:
        return self.rows.dtype

    @property
    def device(self) -> torch.device:
        return self.rows.device

    def tensors(self) -> Iterator[Tensor]:
        """What it is made of."""
        yield self.rows

    def scaled(self, factor: float | Tensor) -> Moment:
        """`factor S`, with the same eigenvectors."""
        other = Moment(self.rows, self.scale * factor, self.space)
        if self._pairs is not None:
            other._pairs = self._pairs[0] * factor, self._pairs[1]
        return other

    def spectral(self, name: str) -> tuple[Tensor, Tensor]:
        """Eigenvalues `[r']`, ascending, and their vectors `[d, r']`; `S` is zero beside them."""
        if self._pairs is None:
            V = self.space()
            assert V is not None, "a moment of few rows has a thin basis"
            inside = self.rows @ V
            values, Q = _eigh(inside.mT @ inside * self.scale, name)
            self._pairs = values, V @ Q
        return self._pairs

    def apply(self, V: Tensor) -> Tensor:
        """`V S` for `V` `[..., d]`."""
        return (V @ self.rows.mT) @ self.rows * self.scale

    def trace(self) -> Tensor:
        return self.rows.square().sum(dtype=torch.float64) * self.scale

    def formed(self) -> Tensor:
        """`S` itself; its thin eigenvectors go with it."""
        matrix = second_moment(self.rows) * self.scale
        declare_range(matrix, self.space, self._pairs)
        return matrix
