"""Kronecker products `G (x) A` and sums of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TypeGuard, TypeVar

import torch
from torch import Tensor

from fisherlab.blocks import contractions
from fisherlab.blocks.base import Block
from fisherlab.blocks.coordinates import DiagonalFactor, Unformed
from fisherlab.blocks.dense import Dense
from fisherlab.blocks.eigen import Eigen
from fisherlab.blocks.moment import Decomposed, Moment
from fisherlab.blocks.numerics import (
    BlockError,
    check_damping,
    check_dense,
    coordinates,
    damped_inverse,
    dot,
    spectral,
    spectrum_power,
    sum_of,
    symmetrise,
    trace_of,
)
from fisherlab.blocks.work import cached

Factor = Tensor | Unformed
AnyFactor = TypeVar("AnyFactor", Tensor, Factor)


def _square(matrix: AnyFactor, role: str) -> AnyFactor:
    if matrix.shape[-1] != matrix.shape[-2]:
        raise BlockError(f"the {role} factor must be square, got {tuple(matrix.shape)}")
    return matrix


class Kronecker(Block):
    """`F = G (x) A`, `F vec(V) = vec(G V A)`: `G` `[o, o]` of outputs, `A` `[i, i]` of inputs.

    A factor may be `Unformed` until somebody asks for the matrix, or a vector `[d]`, the entries of
    a diagonal one.
    """

    def __init__(self, G: Factor, A: Factor) -> None:
        self._G, self._A = (
            _square(DiagonalFactor(F) if isinstance(F, Tensor) and F.ndim == 1 else F, role)
            for F, role in ((G, "output"), (A, "input"))
        )

    @property
    def G(self) -> Tensor:
        """The output factor."""
        if isinstance(self._G, DiagonalFactor):
            return self._G.formed()
        if isinstance(self._G, Unformed):
            self._G = self._G.formed()
        return self._G

    @property
    def A(self) -> Tensor:
        """The input factor."""
        if isinstance(self._A, DiagonalFactor):
            return self._A.formed()
        if isinstance(self._A, Unformed):
            self._A = self._A.formed()
        return self._A

    def saved(self, name: str) -> Tensor:
        factor = self._G if name == "G" else self._A
        return factor.entries if isinstance(factor, DiagonalFactor) else getattr(self, name)

    @property
    def traces(self) -> tuple[Tensor, Tensor]:
        """`tr G` and `tr A`, in float64."""
        return _trace(self._G), _trace(self._A)

    @property
    def shape(self) -> tuple[int, int]:
        return self._G.shape[0], self._A.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self._A.dtype

    @property
    def device(self) -> torch.device:
        return self._A.device

    def tensors(self) -> Iterator[Tensor]:
        for factor in (self._G, self._A):
            if isinstance(factor, Tensor):
                yield factor
            else:
                yield from factor.tensors()

    def formed_bytes(self) -> int:
        factors = {id(factor): factor for factor in (self._G, self._A)}.values()
        sides = (
            len(F.entries) if isinstance(F, DiagonalFactor) else F.shape[0] ** 2 for F in factors
        )
        return sum(sides) * self.dtype.itemsize

    def __matmul__(self, V: Tensor) -> Tensor:
        self.check(V)
        right = V @ self.A if _formed(V, self._A) else self._A.apply(V)
        return self.G @ right if _formed(V, self._G) else self._G.apply(right.mT).mT

    @cached
    def spectra(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Eigenvalues and vectors of `G` and of `A`, thin where the rank is known to be low."""
        return (
            _spectral(self._G, "output factor G"),
            _spectral(self._A, "input factor A"),
        )

    @cached
    def eigen(self) -> Eigen:
        """The same matrix in its Kronecker eigenbasis."""
        (l_G, Q_G), (l_A, Q_A) = self.spectra
        return Eigen(Q_G, Q_A, torch.outer(l_G, l_A)).of_factors(l_G, l_A)

    def power(self, exponent: float, damping: float = 0.0) -> Block:
        if exponent == 1 and damping == 0:
            return self
        if check_damping(damping) > 0:
            return self.eigen.power(exponent, damping)
        return Kronecker(*(_factor_power(F, exponent, name) for F, name in self._named()))

    def factored_power(self, exponent: float, damping_G: float, damping_A: float) -> Kronecker:
        """`(G + damping_G I)^exponent (x) (A + damping_A I)^exponent`: damping in the factors."""
        powers = (
            _factor_power(factor, exponent, name, damping)
            for (factor, name), damping in zip(self._named(), (damping_G, damping_A), strict=True)
        )
        return Kronecker(*powers)

    def _named(self) -> tuple[tuple[Tensor | DiagonalFactor, str], ...]:
        G = self._G if isinstance(self._G, DiagonalFactor) else self.G
        A = self._A if isinstance(self._A, DiagonalFactor) else self.A
        return (G, "output factor G"), (A, "input factor A")

    def within(self, V: Tensor) -> Block | None:
        if isinstance(self._A, DiagonalFactor):
            return None
        values, vectors = self.spectra[1]
        C = coordinates(vectors, V)
        return None if C is None else Kronecker(self._G, Decomposed(values, C))

    def column_quadratics(self, a: Tensor, g: Tensor) -> Tensor:
        return contractions.kronecker_quadratic(a, g, self.G, self.A)

    def _inner(self, other: Block) -> Tensor | None:
        if isinstance(other, Kronecker):
            return dot(self.G, other.G) * dot(self.A, other.A)
        return None

    def trace(self) -> Tensor:
        left, right = self.traces
        return left * right

    def squared_norm(self) -> Tensor:
        known = Kronecker.spectra.known(self)
        if known is None:
            sides = [_entries(factor) for factor, _ in self._named()]
        else:
            sides = [values for values, _ in known]
        left, right = (dot(side, side) for side in sides)
        return left * right

    def diagonal(self) -> Tensor:
        return torch.outer(*(_diagonal(factor) for factor, _ in self._named()))

    def logdet(self, damping: float) -> Tensor:
        return self.eigen.logdet(damping)

    def eigenvalues(self) -> Tensor:
        return self.eigen.eigenvalues()

    def leading(self, k: int) -> tuple[Tensor, Tensor]:
        return self.eigen.leading(k)

    def leading_values(self, k: int) -> Tensor:
        return self.eigen.leading_values(k)

    def leading_factors(self, k: int) -> tuple[Tensor, Tensor]:
        return self.eigen.leading_factors(k)

    def diagonal_of(self, other: Block) -> Tensor:
        return self.eigen.diagonal_of(other)

    def chosen(self, other: Block) -> Tensor:
        return self.eigen.chosen(other)

    def rotated_diagonal(self, Q_G: Tensor, Q_A: Tensor) -> Tensor:
        rotated_G = ((self.G @ Q_G) * Q_G).sum(0, dtype=torch.float64)
        rotated_A = ((self.A @ Q_A) * Q_A).sum(0, dtype=torch.float64)
        return torch.outer(rotated_G, rotated_A)

    def dense(self) -> Tensor:
        check_dense(self.size, self.dtype, self.device, "Kronecker")
        return torch.kron(self.G.contiguous(), self.A.contiguous())


# A sum of two or more products has no cheap spectrum: up to this many parameters it is found
# densely (9 N^3 operations, a few seconds at 3000), beyond it refused.
DENSE_SPECTRUM = 3000


class KroneckerSum(Block):
    """`F = sum_k G_k (x) A_k`, with `G` `[k, o, o]` and `A` `[k, i, i]`.

    `G_k` and `A_k` of a term are both symmetric or both antisymmetric, and the term is symmetric.
    A sum of two or more need not be positive semi-definite; `power` goes through the dense
    form (refused past `DENSE_SPECTRUM`), takes negative eigenvalues as zero, and `clamped` says
    how much.
    """

    def __init__(self, G: Tensor, A: Tensor) -> None:
        if G.ndim != 3 or A.ndim != 3 or G.shape[0] != A.shape[0]:
            raise BlockError(
                f"a Kronecker sum takes [k, o, o] and [k, i, i] factors, got {tuple(G.shape)} and "
                f"{tuple(A.shape)}"
            )
        self.G, self.A = _square(G, "output"), _square(A, "input")

    @property
    def shape(self) -> tuple[int, int]:
        return self.G.shape[-1], self.A.shape[-1]

    @property
    def dtype(self) -> torch.dtype:
        return self.A.dtype

    @property
    def device(self) -> torch.device:
        return self.A.device

    @property
    def terms(self) -> list[Kronecker]:
        """The products, largest first as the approximation ordered them."""
        return [Kronecker(G, A) for G, A in zip(self.G, self.A, strict=True)]

    @cached
    def _form(self) -> Block:
        """A single product as it is, otherwise the dense matrix."""
        if len(self.G) == 1:
            return self.terms[0]
        if self.size > DENSE_SPECTRUM:
            raise BlockError(
                f"the spectrum of a sum of {len(self.G)} Kronecker products needs a dense "
                f"eigendecomposition of {self.size} x {self.size}, over the limit of "
                f"{DENSE_SPECTRUM} (fl.blocks.kronecker.DENSE_SPECTRUM); products, norms and inner "
                "products need none, and kronecker_optimal has a spectrum at any size"
            )
        return Dense(self.dense(), self.shape)

    def __matmul__(self, V: Tensor) -> Tensor:
        self.check(V)
        result = torch.zeros_like(V)
        for G, A in zip(self.G, self.A, strict=True):
            result += G @ V @ A.mT
        return result

    def power(self, exponent: float, damping: float = 0.0) -> Block:
        return self._form.power(exponent, damping)

    def column_quadratics(self, a: Tensor, g: Tensor) -> Tensor:
        return torch.stack([term.column_quadratics(a, g) for term in self.terms]).sum(0)

    def _inner(self, other: Block) -> Tensor | None:
        if isinstance(other, KroneckerSum):
            return sum_of(one.inner(two) for one in self.terms for two in other.terms)
        if isinstance(other, Kronecker | Eigen):
            return sum_of(term.inner(other) for term in self.terms)
        return None

    def trace(self) -> Tensor:
        return sum_of(term.trace() for term in self.terms)

    def squared_norm(self) -> Tensor:
        G, A = self.G.double().flatten(1), self.A.double().flatten(1)
        return ((G @ G.mT) * (A @ A.mT)).sum()

    def diagonal(self) -> Tensor:
        return torch.einsum("ko,ki->oi", self.G.diagonal(0, 1, 2), self.A.diagonal(0, 1, 2))

    def eigenvalues(self) -> Tensor:
        return self._form.eigenvalues()

    def leading(self, k: int) -> tuple[Tensor, Tensor]:
        return self._form.leading(k)

    def diagonal_of(self, other: Block) -> Tensor:
        return self._form.diagonal_of(other)

    def chosen(self, other: Block) -> Tensor:
        return self._form.chosen(other)

    def rotated_diagonal(self, Q_G: Tensor, Q_A: Tensor) -> Tensor:
        return sum_of(term.rotated_diagonal(Q_G, Q_A) for term in self.terms)

    @property
    def clamped(self) -> float:
        """NaN where the spectrum is out of reach."""
        within = len(self.G) == 1 or self.size <= DENSE_SPECTRUM
        return self._form.clamped if within else math.nan


def _formed(V: Tensor, factor: Factor) -> TypeGuard[Tensor]:
    """Whether a product takes the matrix: a moment's rows are cheaper for few matrices `V`."""
    if not isinstance(factor, Moment):
        return isinstance(factor, Tensor)
    few = V.numel() <= V.shape[-2] * V.shape[-1] and len(factor.rows) <= factor.shape[0]
    return not few


def _entries(factor: Tensor | DiagonalFactor) -> Tensor:
    return factor if isinstance(factor, Tensor) else factor.entries


def _diagonal(factor: Tensor | DiagonalFactor) -> Tensor:
    return factor.diagonal() if isinstance(factor, Tensor) else factor.entries


def _spectral(factor: Factor, name: str) -> tuple[Tensor, Tensor]:
    return spectral(factor, name) if isinstance(factor, Tensor) else factor.spectral(name)


def _trace(factor: Factor) -> Tensor:
    return trace_of(factor) if isinstance(factor, Tensor) else factor.trace()


def _factor_power(
    factor: Tensor | DiagonalFactor, exponent: float, name: str, damping: float = 0.0
) -> Tensor:
    damping = check_damping(damping)
    if isinstance(factor, DiagonalFactor):
        return spectrum_power(factor.entries, exponent, damping, name, rounded=False)
    if exponent == 1:
        return factor + damping * torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    if exponent == -1 and (inverse := damped_inverse(factor, damping)) is not None:
        return inverse
    values, vectors = spectral(factor, name)
    powers = spectrum_power(values, exponent, damping, name)
    if vectors.shape[1] == len(vectors):
        return symmetrise(vectors * powers @ vectors.mT)
    # zero on the complement of a thin basis, so damping^p there
    rest = spectrum_power(values.new_zeros(1), exponent, damping, name)
    eye = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    return symmetrise(rest * eye + vectors * (powers - rest) @ vectors.mT)
