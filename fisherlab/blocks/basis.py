"""Bases of one side of a weight that are no matrices: a thin one in another's span, coordinates."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Thin:
    """`Q = V C` `[d, k]`, multiplied out when it is first used as a matrix.

    `V` `[d, r]` and `C` `[r, k]` have orthonormal columns. Whoever works in coordinates of `V`
    reads `C` and never pays for the product, d r k.
    """

    V: Tensor
    C: Tensor

    @cached_property
    def matrix(self) -> Tensor:
        """`Q`."""
        return self.V @ self.C

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.V.shape[0], self.C.shape[1]))

    @property
    def dtype(self) -> torch.dtype:
        return self.C.dtype

    @property
    def device(self) -> torch.device:
        return self.C.device

    @property
    def mT(self) -> Tensor:
        return self.matrix.mT

    def __len__(self) -> int:
        return len(self.V)

    def __rmatmul__(self, X: Tensor) -> Tensor:
        return X @ self.matrix

    def __matmul__(self, X: Basis) -> Tensor:
        return self.matrix @ X

    def __rmul__(self, X: Tensor) -> Tensor:
        return X * self.matrix

    def square(self) -> Tensor:
        """Entrywise."""
        return self.matrix.square()

    def double(self) -> Tensor:
        """The matrix in float64."""
        return self.matrix.double()

    def __getitem__(self, index: tuple[slice, Tensor]) -> Tensor:
        return self.matrix[index]


@dataclass(frozen=True, eq=False)
class Coordinates:
    """The basis `I` `[d, d]`, never formed: that of a side that is diagonal.

    `like` `[d]` has its length, dtype and device.
    """

    like: Tensor

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.like),) * 2)

    @property
    def dtype(self) -> torch.dtype:
        return self.like.dtype

    @property
    def device(self) -> torch.device:
        return self.like.device

    @property
    def mT(self) -> Coordinates:
        return self

    @property
    def matrix(self) -> Tensor:
        """`I`."""
        return torch.ones_like(self.like).diag()

    def __len__(self) -> int:
        return len(self.like)

    def __rmatmul__(self, X: Tensor) -> Tensor:
        return X

    def __matmul__(self, X: Basis) -> Tensor:
        return matrix_of(X)

    def __rmul__(self, X: Tensor) -> Tensor:
        return X.diagonal().diag()

    def square(self) -> Coordinates:
        """Entrywise, which is `I` again."""
        return self

    def double(self) -> Coordinates:
        """The same in float64."""
        return Coordinates(self.like.double())

    def sum(self, axis: int) -> Tensor:
        """Sums along an axis, `[d]`."""
        return torch.ones_like(self.like)

    def __getitem__(self, index: tuple[slice, Tensor]) -> Tensor:
        _, columns = index
        return torch.nn.functional.one_hot(columns, len(self)).mT.to(self.dtype)


# Orthonormal columns `[d, r]` on one side of a weight.
Basis = Tensor | Thin | Coordinates


@dataclass(frozen=True, eq=False)
class Space:
    """The weights `V_G W V_A^T`, with orthonormal columns `G` `[o, r]` and `A` `[i, s]`.

    None stands for a whole side.
    """

    G: Tensor | None
    A: Tensor | None

    def coordinates(self, weight: Tensor) -> Tensor:
        """`V_G^T D V_A` of weights `[..., o, i]`."""
        inside = weight if self.A is None else weight @ self.A
        return inside if self.G is None else self.G.mT @ inside

    def lifted(self, inside: Tensor) -> Tensor:
        """`V_G W V_A^T` of coordinates `[..., r, s]`."""
        outputs = inside if self.G is None else self.G @ inside
        return outputs if self.A is None else outputs @ self.A.mT

    def bases(self, Q_G: Basis, Q_A: Basis) -> tuple[Basis | None, Basis | None]:
        """Both bases in these coordinates; None for one that is not known to lie in them."""
        return (
            Q_G if self.G is None else coordinates(Q_G, self.G),
            Q_A if self.A is None else coordinates(Q_A, self.A),
        )


def matrix_of(Q: Basis) -> Tensor:
    """A basis as a matrix."""
    return Q if isinstance(Q, Tensor) else Q.matrix


def size_of(Q: Basis) -> dict[int, int]:
    """Bytes, by its id, of a basis that is no tensor: of a thin one as its vectors."""
    return {id(Q): Q.shape.numel() * Q.dtype.itemsize} if isinstance(Q, Thin) else {}


def coordinates(Q: Basis, V: Tensor) -> Tensor | None:
    """`C` of `Q = V C`, where the columns are known to lie in the span of `V` or are few enough."""
    if isinstance(Q, Thin) and Q.V is V:
        return Q.C
    if isinstance(Q, Coordinates) or len(V) * Q.shape[1] > 64 * V.shape[1]:
        return None
    Q = matrix_of(Q)
    C = V.mT @ Q
    lost = (Q.double().square().sum(0) - C.double().square().sum(0)).abs()
    return C if bool((lost <= 1e2 * torch.finfo(C.dtype).eps).all()) else None
