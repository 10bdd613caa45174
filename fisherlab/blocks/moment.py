"""Factors that are not kept as matrices: a second moment of few rows, a known decomposition."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fisherlab.blocks.contractions import second_moment
from fisherlab.blocks.numerics import _eigh, declare_range, symmetrise


class Unformed(ABC):
    """A symmetric factor `S` `[d, d]` of a Kronecker product, formed only when asked for.

    It is made of `parts` whose last axis is, or whose first axis is, the d features.
    """

    def __init__(self, features: int, *parts: Tensor) -> None:
        self.shape, self.parts = torch.Size((features, features)), parts

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    @property
    def device(self) -> torch.device:
        return self.parts[0].device

    def tensors(self) -> Iterator[Tensor]:
        """What it is made of."""
        yield from self.parts

    @abstractmethod
    def spectral(self, name: str) -> tuple[Tensor, Tensor]:
        """Eigenvalues `[r]` and their vectors `[d, r]`; `S` is zero beside them."""

    @abstractmethod
    def apply(self, V: Tensor) -> Tensor:
        """`V S` for `V` `[..., d]`."""

    @abstractmethod
    def trace(self) -> Tensor:
        """`tr S`, 0-d."""

    @abstractmethod
    def formed(self) -> Tensor:
        """`S` itself; its thin eigenvectors go with it."""


class Moment(Unformed):
    """`S = scale X^T W X` of rows `X` `[r, d]`, r clearly less than d.

    `weighted` is `W X`, with a symmetric `W` over the rows; None for the identity. `space()`
    returns orthonormal columns `[d, r']` that span the rows: eigenvectors are found inside it, by
    products with r rows instead of d.
    """

    def __init__(
        self,
        rows: Tensor,
        scale: float | Tensor,
        space: Callable[[], Tensor | None],
        weighted: Tensor | None = None,
    ) -> None:
        d = rows.shape[-1]
        self.rows, self.scale, self.space = rows.reshape(-1, d), scale, space
        self.weighted = self.rows if weighted is None else weighted.reshape(-1, d)
        super().__init__(d, self.rows, self.weighted)
        self._pairs: tuple[Tensor, Tensor] | None = None

    def scaled(self, factor: float | Tensor) -> Moment:
        """`factor S`, with the same eigenvectors."""
        other = Moment(self.rows, self.scale * factor, self.space, self.weighted)
        if self._pairs is not None:
            other._pairs = self._pairs[0] * factor, self._pairs[1]
        return other

    def spectral(self, name: str) -> tuple[Tensor, Tensor]:
        if self._pairs is None:
            V = self.space()
            assert V is not None, "a moment of few rows has a thin basis"
            rows = self.rows @ V
            weighted = rows if self.weighted is self.rows else self.weighted @ V
            values, Q = _eigh(rows.mT @ weighted * self.scale, name)
            self._pairs = values, V @ Q
        return self._pairs

    def apply(self, V: Tensor) -> Tensor:
        return (V @ self.weighted.mT) @ self.rows * self.scale

    def trace(self) -> Tensor:
        return (self.rows * self.weighted).sum(dtype=torch.float64) * self.scale

    def formed(self) -> Tensor:
        if self.weighted is self.rows:
            matrix = second_moment(self.rows) * self.scale
        else:
            matrix = symmetrise(self.rows.mT @ self.weighted) * self.scale
        declare_range(matrix, self.space, self._pairs)
        return matrix


class Decomposed(Unformed):
    """`S = Q diag(values) Q^T`, with orthonormal columns `Q` `[d, r]`."""

    def __init__(self, values: Tensor, vectors: Tensor) -> None:
        self.values, self.vectors = values, vectors
        super().__init__(len(vectors), values, vectors)

    def spectral(self, name: str) -> tuple[Tensor, Tensor]:
        return self.values, self.vectors

    def apply(self, V: Tensor) -> Tensor:
        return (V @ self.vectors * self.values) @ self.vectors.mT

    def trace(self) -> Tensor:
        return self.values.sum(dtype=torch.float64)

    def formed(self) -> Tensor:
        matrix = self.vectors * self.values @ self.vectors.mT
        declare_range(matrix, lambda: self.vectors, (self.values, self.vectors))
        return matrix
