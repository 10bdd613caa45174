"""A side of a Kronecker product that is no matrix: unformed, a diagonal, or the basis `I`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

from fisherlab.blocks.numerics import check_dense
from fisherlab.blocks.span import multiplied

# Rows above which an optimizer keeps the diagonal of a factor only: its eigenvectors would take
# minutes (d^3) and its matrix a quarter of a GiB.
LARGEST_FACTOR = 8192


class Identity:
    """The basis `I` `[d, d]`, never formed: what `Q_G` and `Q_A` are where a side is diagonal."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        d = len(like)
        self.shape = torch.Size((d, d))

    dtype = property(lambda self: self.like.dtype)
    device = property(lambda self: self.like.device)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def mT(self) -> Identity:
        return self

    def __matmul__(self, X: Tensor) -> Tensor:
        return X

    def __rmatmul__(self, X: Tensor) -> Tensor:
        return X

    def __rmul__(self, X: Tensor) -> Tensor:
        return X.diagonal().diag()

    def square(self) -> Identity:
        """Entrywise, which is `I` again."""
        return self

    def double(self) -> Identity:
        return Identity(self.like.double())

    def sum(self, axis: int) -> Tensor:
        return torch.ones_like(self.like)

    def __getitem__(self, index: tuple[slice, Tensor]) -> Tensor:
        """Columns `Q[:, columns]`, formed."""
        _, columns = index
        return torch.nn.functional.one_hot(columns, len(self)).mT.to(self.dtype)

    def tensors(self) -> Iterator[Tensor]:
        """What it is made of."""
        yield self.like


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


class DiagonalFactor(Unformed):
    """A factor `diag(entries)`, `[d, d]`."""

    def __init__(self, entries: Tensor) -> None:
        super().__init__(len(entries), entries)
        self.entries = entries

    def spectral(self, name: str) -> tuple[Tensor, Tensor]:
        # in no order
        return self.entries, identity(self.entries)

    def apply(self, V: Tensor) -> Tensor:
        return V * self.entries

    def trace(self) -> Tensor:
        return self.entries.sum(dtype=torch.float64)

    def formed(self) -> Tensor:
        check_dense(len(self.entries), self.dtype, self.device, "diagonal factor")
        return self.entries.diag()


def identity(like: Tensor) -> Tensor:
    """`I` as a basis of the coordinates of `like` `[d]`: a tensor to whoever multiplies by it."""
    return cast(Tensor, Identity(like))


def formed(Q: Tensor) -> Tensor:
    """A basis as a matrix."""
    return torch.ones_like(Q.like).diag() if isinstance(Q, Identity) else multiplied(Q)
