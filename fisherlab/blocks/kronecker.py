"""Kronecker products `G (x) A` and sums of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fisherlab import doors
from fisherlab.blocks import contractions
from fisherlab.blocks.base import Block, Dense
from fisherlab.blocks.basis import Basis, Space, coordinates
from fisherlab.blocks.eigen import Eigen
from fisherlab.blocks.factor import Dense as Matrix
from fisherlab.blocks.factor import Factor, Spectral, Spectrum, factor_of, inverses
from fisherlab.blocks.numerics import (
    BlockError,
    check_alike,
    check_damping,
    check_dense,
    check_exponent,
    dot,
    is_none,
    negative_share,
    sum_of,
)
from fisherlab.blocks.work import cached


class Kronecker(Block):
    """`F = G (x) A`, `F vec(V) = vec(G V A)`.

    Args:
        G: the factor of outputs: a matrix `[o, o]`, the entries `[o]` of a diagonal one, or a
            `Factor`, which is formed on demand.
        A: the factor of inputs: `[i, i]`, `[i]` or a `Factor`.

    Example:
        >>> import torch
        >>> from fisherlab import blocks
        >>> F = blocks.Kronecker(torch.tensor([[2.0]]), torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
        >>> (F @ torch.tensor([[1.0, 1.0]])).tolist()
        [[2.0, 6.0]]
    """

    def __init__(self, G: Tensor | Factor, A: Tensor | Factor) -> None:
        self.factors = factor_of(G, "output factor G"), factor_of(A, "input factor A")
        check_alike(*self.factors)

    @property
    def G(self) -> Tensor:
        """The output factor."""
        return self.factors[0].matrix

    @property
    def A(self) -> Tensor:
        """The input factor."""
        return self.factors[1].matrix

    def saved(self, name: str) -> Tensor:
        return self.factors[name == "A"].saved()

    @property
    def traces(self) -> tuple[Tensor, Tensor]:
        """`tr G` and `tr A`, in float64."""
        G, A = self.factors
        return G.trace(), A.trace()

    @cached_property
    def shape(self) -> tuple[int, int]:
        return len(self.factors[0]), len(self.factors[1])

    @cached_property
    def dtype(self) -> torch.dtype:
        return self.factors[1].dtype

    @cached_property
    def device(self) -> torch.device:
        return self.factors[1].device

    def tensors(self) -> Iterator[Tensor]:
        for factor in self.factors:
            yield from factor.tensors()

    def sizes(self) -> dict[int, int]:
        G, A = self.factors
        return G.sizes() | A.sizes()

    def formed_bytes(self) -> int:
        return sum(F.formed_bytes() for F in {id(F): F for F in self.factors}.values())

    def __matmul__(self, V: Tensor) -> Tensor:
        G, A = self.factors
        return G.apply(A.apply(V).mT).mT

    @property
    def spectra(self) -> tuple[Spectrum, Spectrum]:
        """Eigenvalues and vectors of `G` and of `A`, thin where the rank is known to be low."""
        G, A = self.factors
        return G.spectrum("output factor G"), A.spectrum("input factor A")

    @cached
    def eigen(self) -> Eigen:
        """The same matrix in its Kronecker eigenbasis."""
        (l_G, Q_G), (l_A, Q_A) = self.spectra
        return Eigen(Q_G, Q_A, torch.outer(l_G, l_A)).of_factors(l_G, l_A)

    def power(self, exponent: float, damping: float = 0.0) -> Block:
        if exponent == 1 and damping == 0:
            return self
        if not is_none(damping):
            return self.eigen.power(exponent, damping)
        return self.factored_power(exponent, 0.0, 0.0)

    def factored_power(self, exponent: float, damping_G: float, damping_A: float) -> Kronecker:
        """`(G + damping_G I)^exponent (x) (A + damping_A I)^exponent`: damping in the factors."""
        G, A = self.factors
        exponent = check_exponent(exponent)
        return Kronecker(
            G.power(exponent, damping_G, "output factor G"),
            A.power(exponent, damping_A, "input factor A"),
        )

    @staticmethod
    def inverses(products: Sequence[Kronecker], dampings: Sequence[tuple[Any, Any]]) -> list[Block]:
        """`factored_power(-1, *dampings)` of each product, small factors of one shape together."""
        for product in doors.listed(products, "products", error=BlockError):
            doors.instance(product, "each of products", Kronecker, "a Kronecker product")
        for pair in doors.listed(dampings, "dampings", error=BlockError):
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise BlockError(f"dampings must be pairs, of G and A, got {doors.said(pair)}")
        if len(dampings) != len(products):
            raise BlockError(f"{len(products)} products need as many pairs, got {len(dampings)}")
        factors = [F for product in products for F in product.factors]
        each = [check_damping(x) for pair in dampings for x in pair]
        names = ["output factor G", "input factor A"] * len(products)
        found = inverses(factors, each, names)
        return [Kronecker(G, A) for G, A in zip(found[::2], found[1::2], strict=True)]

    def restricted_to(self, space: Space) -> Block | None:
        sides = []
        for factor, spectrum, V in zip(self.factors, self.spectra, (space.G, space.A), strict=True):
            C = None if V is None else coordinates(spectrum[1], V)
            if V is not None and C is None:
                return None
            sides.append(factor if C is None else Spectral(spectrum[0], C))
        return Kronecker(*sides)

    def column_quadratics(self, a: Tensor, g: Tensor) -> Tensor:
        return contractions.kronecker_quadratic(a, g, self.G, self.A)

    def _inner(self, other: Block) -> Tensor | None:
        if isinstance(other, Kronecker):
            return dot(self.G, other.G) * dot(self.A, other.A)
        return other.inner_with_rotated(self) if isinstance(other, Eigen) else None

    def trace(self) -> Tensor:
        left, right = self.traces
        return left * right

    def squared_norm(self) -> Tensor:
        G, A = self.factors
        return G.squared_norm() * A.squared_norm()

    def diagonal(self) -> Tensor:
        G, A = self.factors
        return torch.outer(G.diagonal(), A.diagonal())

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

    @property
    def clamped(self) -> float:
        return negative_share(self.eigen.spectrum.flatten(), self.dtype)

    def diagonal_of(self, other: Block) -> Tensor:
        return self.eigen.diagonal_of(other)

    def chosen(self, other: Block) -> Tensor:
        return self.eigen.chosen(other)

    def rotated_diagonal(self, Q_G: Basis, Q_A: Basis) -> Tensor:
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
    """`F = sum_k G_k (x) A_k`.

    `G_k` and `A_k` of a term are both symmetric or both antisymmetric, and the term is symmetric. A
    sum of two or more terms need not be positive semi-definite. `power` goes through the dense form
    (refused past `DENSE_SPECTRUM`) and takes negative eigenvalues as zero; `clamped` states their
    share.

    Args:
        G: `[k, o, o]`, the factors of outputs.
        A: `[k, i, i]`, the factors of inputs.

    Raises:
        BlockError: the factors do not fit together.
    """

    def __init__(self, G: Tensor, A: Tensor) -> None:
        doors.tensor(G, "G", full=True, error=BlockError)
        doors.tensor(A, "A", full=True, error=BlockError)
        if G.ndim != 3 or A.ndim != 3 or G.shape[0] != A.shape[0] or not len(G):
            raise BlockError(
                "a Kronecker sum takes [k, o, o] and [k, i, i] factors of k >= 1, got "
                f"{tuple(G.shape)} and {tuple(A.shape)}"
            )
        for factors, role in ((G, "output"), (A, "input")):
            if factors.shape[1] != factors.shape[2]:
                raise BlockError(f"the {role} factors must be square, got {tuple(factors.shape)}")
        check_alike(G, A)
        self.G, self.A = G, A

    @cached_property
    def shape(self) -> tuple[int, int]:
        return self.G.shape[-1], self.A.shape[-1]

    @cached_property
    def dtype(self) -> torch.dtype:
        return self.A.dtype

    @cached_property
    def device(self) -> torch.device:
        return self.A.device

    @property
    def terms(self) -> list[Kronecker]:
        """The products, largest first as the approximation ordered them."""
        pairs = zip(self.G, self.A, strict=True)
        return [Kronecker(Matrix(G), Matrix(A)) for G, A in pairs]

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

    def rotated_diagonal(self, Q_G: Basis, Q_A: Basis) -> Tensor:
        return sum_of(term.rotated_diagonal(Q_G, Q_A) for term in self.terms)

    @property
    def clamped(self) -> float:
        """NaN where the spectrum is out of reach."""
        within = len(self.G) == 1 or self.size <= DENSE_SPECTRUM
        return self._form.clamped if within else math.nan
