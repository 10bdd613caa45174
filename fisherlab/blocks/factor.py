"""Sides of a Kronecker product: symmetric matrices as values, with their decompositions on them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fisherlab import doors
from fisherlab.blocks.basis import Basis, Coordinates, Thin, matrix_of, size_of
from fisherlab.blocks.contractions import second_moment, symmetric_product
from fisherlab.blocks.numerics import (
    STACKED,
    BlockError,
    check_damping,
    check_dense,
    check_symmetric,
    damped_inverse,
    damped_inverses,
    dot,
    eigh,
    eigh_each,
    spectrum_power,
    symmetrise,
    trace_of,
)
from fisherlab.blocks.work import cached, once

# Rows above which an optimizer keeps the diagonal of a factor only: its eigenvectors would take
# minutes (d^3) and its matrix a quarter of a GiB.
LARGEST_FACTOR = 8192

Span = Callable[[], tuple[Tensor, Tensor] | None]
Spectrum = tuple[Tensor, Basis]


class Factor(ABC):
    """A symmetric positive semi-definite `S` `[d, d]`, immutable; `parts` are what it is made of.

    Who holds the same factor shares its decomposition, and so do its multiples.
    """

    # the factor that this one is a multiple of, and by what
    _source: tuple[Factor, float | Tensor] | None = None

    def __init__(self, d: int, *parts: Tensor) -> None:
        self.shape, self.parts = torch.Size((d, d)), parts
        self._kept: dict[str, Spectrum] = {}

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    @property
    def device(self) -> torch.device:
        return self.parts[0].device

    def tensors(self) -> Iterator[Tensor]:
        """The tensors that the factor is made of."""
        yield from self.parts

    def sizes(self) -> dict[int, int]:
        """Bytes of what it is made of, by its id."""
        return {id(part): part.numel() * part.element_size() for part in self.parts}

    @abstractmethod
    def _decompose(self, name: str) -> Spectrum: ...

    @abstractmethod
    def _times(self, scale: float | Tensor) -> Factor: ...

    @abstractmethod
    def _form(self) -> Tensor: ...

    @property
    def decomposed(self) -> bool:
        """Whether its spectrum costs nothing any more."""
        return "spectrum" in self._kept if self._source is None else self._source[0].decomposed

    def spectrum(self, name: str = "factor") -> Spectrum:
        """Eigenvalues `[r]` and their vectors `[d, r]`; `S` is zero beside them.

        Raises:
            BlockError: `S`, by that name, has none.
        """
        if self._source is not None:
            factor, scale = self._source
            values, Q = factor.spectrum(name)
            return values * scale, Q
        return once(self._kept, "spectrum", lambda: self._decompose(name))

    def scaled(self, scale: float | Tensor) -> Factor:
        """`scale S`, with the same eigenvectors."""
        other = self._times(scale)
        other._source = self, scale
        return other

    @cached
    def matrix(self) -> Tensor:
        """`S` itself."""
        return self._form()

    def formed(self) -> Tensor:
        """`matrix`."""
        return self.matrix

    def apply(self, V: Tensor) -> Tensor:
        """`V S` for `V` `[..., d]`."""
        return V @ self.matrix

    def trace(self) -> Tensor:
        """`tr S`, 0-d."""
        return trace_of(self.matrix)

    def diagonal(self) -> Tensor:
        """The diagonal, `[d]`."""
        return self.matrix.diagonal()

    def squared_norm(self) -> Tensor:
        """`||S||_F^2`, 0-d float64."""
        side = self.spectrum()[0] if self.decomposed else self.matrix
        return dot(side, side)

    def formed_bytes(self) -> int:
        """Bytes of the matrix."""
        return self.shape[0] ** 2 * self.dtype.itemsize

    def saved(self) -> Tensor:
        """The tensors from which another factor like this is made."""
        return self.matrix

    def mapped(self, function: Callable[[Tensor], Tensor], name: str = "factor") -> Factor:
        """The function of `S` that does this to its eigenvalues, those beside a thin basis too."""
        values, Q = self.spectrum(name)
        powers, vectors = function(values), matrix_of(Q)
        if vectors.shape[1] == len(vectors):
            return Dense(symmetrise(vectors * powers @ vectors.mT))
        rest = function(values.new_zeros(1))
        eye = torch.eye(len(self), dtype=self.dtype, device=self.device)
        return Dense(symmetrise(rest * eye + vectors * (powers - rest) @ vectors.mT))

    def power(self, exponent: float, damping: float = 0.0, name: str = "factor") -> Factor:
        """`(S + damping I)^exponent`."""
        damping = check_damping(damping)
        if exponent == 1:
            eye = torch.eye(len(self), dtype=self.dtype, device=self.device)
            return Dense(self.matrix + damping * eye)
        if exponent == -1 and not self._thin and not self.decomposed:
            inverse = damped_inverse(self.matrix, damping)
            if inverse is not None:
                return Dense(inverse)
        return self.mapped(lambda values: spectrum_power(values, exponent, damping, name), name)

    # whether its eigenvectors cost less than an inverse
    _thin = False


class Dense(Factor):
    """A matrix as it stands."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__(len(matrix), matrix)

    def _decompose(self, name: str) -> Spectrum:
        return eigh(self.parts[0], name)

    def _times(self, scale: float | Tensor) -> Factor:
        return Dense(self.parts[0] * scale)

    def _form(self) -> Tensor:
        return self.parts[0]


class Diagonal(Factor):
    """`diag(entries)`."""

    def __init__(self, entries: Tensor) -> None:
        super().__init__(len(entries), entries)
        self.entries = entries

    def _decompose(self, name: str) -> Spectrum:
        return self.entries, Coordinates(self.entries)  # in no order

    def _times(self, scale: float | Tensor) -> Factor:
        return Diagonal(self.entries * scale)

    def _form(self) -> Tensor:
        check_dense(len(self.entries), self.dtype, self.device, "diagonal factor")
        return self.entries.diag()

    def apply(self, V: Tensor) -> Tensor:
        return V * self.entries

    def trace(self) -> Tensor:
        return self.entries.sum(dtype=torch.float64)

    def diagonal(self) -> Tensor:
        return self.entries

    def squared_norm(self) -> Tensor:
        return dot(self.entries, self.entries)

    def formed_bytes(self) -> int:
        return self.entries.numel() * self.dtype.itemsize

    def saved(self) -> Tensor:
        return self.entries

    def mapped(self, function: Callable[[Tensor], Tensor], name: str = "factor") -> Factor:
        return Diagonal(function(self.entries))

    def power(self, exponent: float, damping: float = 0.0, name: str = "factor") -> Factor:
        damping = check_damping(damping)
        return Diagonal(spectrum_power(self.entries, exponent, damping, name, rounded=False))


class Rows(Factor):
    """`S = scale X^T W X` of rows `X` `[..., d]`, clearly fewer than d.

    `weight` applies the symmetric `W` to rows of any width (None: `W = I`). `span()` returns
    orthonormal columns `V` `[d, r]` that span the rows, and the rows in these coordinates,
    `[..., r]`: eigenvectors are found there, by products with r features instead of d.
    """

    _thin = True

    def __init__(
        self,
        rows: Tensor,
        scale: float | Tensor,
        span: Span,
        weight: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(rows.shape[-1], rows)
        self.rows, self.scale, self.span, self.weight = rows, scale, span, weight

    def _times(self, scale: float | Tensor) -> Rows:
        return Rows(self.rows, self.scale * scale, self.span, self.weight)

    def _sides(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """`X` and `W X`, `[r, d]` each."""
        weighted = rows if self.weight is None else self.weight(rows)
        return rows.reshape(-1, rows.shape[-1]), weighted.reshape(-1, rows.shape[-1])

    def _decompose(self, name: str) -> Spectrum:
        span = self.span()
        assert span is not None, "a moment of few rows has a thin basis"
        V, inside = span
        values, C = eigh(symmetric_product(*self._sides(inside)), name)
        return values * self.scale, Thin(V, C)

    def apply(self, V: Tensor) -> Tensor:
        one = V.numel() <= V.shape[-2] * V.shape[-1]
        if not one or len(self.rows) > len(self) or Factor.matrix.known(self) is not None:
            return V @ self.matrix
        rows, weighted = self._sides(self.rows)
        return (V @ weighted.mT) @ rows * self.scale

    @cached
    def _trace(self) -> Tensor:
        if self._source is not None:
            return self._source[0].trace() * self._source[1]
        return dot(*self._sides(self.rows)) * self.scale

    def trace(self) -> Tensor:
        return self._trace

    def _form(self) -> Tensor:
        if self.weight is None:
            return second_moment(self.rows) * self.scale
        return symmetric_product(*self._sides(self.rows)) * self.scale


class Spectral(Factor):
    """`S = Q diag(values) Q^T`, with orthonormal columns `Q` `[d, r]`."""

    _thin = True

    def __init__(self, values: Tensor, vectors: Basis) -> None:
        kept = (vectors,) if isinstance(vectors, Tensor) else ()
        super().__init__(len(vectors), values, *kept)
        self.values, self.vectors = values, vectors
        self._kept["spectrum"] = values, vectors

    def sizes(self) -> dict[int, int]:
        return super().sizes() | size_of(self.vectors)

    def _decompose(self, name: str) -> Spectrum:
        return self.values, self.vectors

    def _times(self, scale: float | Tensor) -> Factor:
        return Spectral(self.values * scale, self.vectors)

    def apply(self, V: Tensor) -> Tensor:
        return (V @ self.vectors * self.values) @ self.vectors.mT

    def trace(self) -> Tensor:
        return self.values.sum(dtype=torch.float64)

    def _form(self) -> Tensor:
        vectors = matrix_of(self.vectors)
        return vectors * self.values @ vectors.mT


class Subspace(Factor):
    """`S = V C V^T`, with orthonormal columns `V` `[d, r]` and a symmetric `C` `[r, r]`."""

    _thin = True

    def __init__(self, V: Tensor, C: Tensor) -> None:
        super().__init__(len(V), V, C)
        self.V, self.C = V, C

    def _decompose(self, name: str) -> Spectrum:
        values, inside = eigh(self.C, name)
        return values, Thin(self.V, inside)

    def _times(self, scale: float | Tensor) -> Factor:
        return Subspace(self.V, self.C * scale)

    def apply(self, V: Tensor) -> Tensor:
        return V @ self.V @ self.C @ self.V.mT

    def trace(self) -> Tensor:
        return trace_of(self.C)

    def _form(self) -> Tensor:
        return self.V @ self.C @ self.V.mT


def decompose(factors: Iterable[Factor], name: str = "factor") -> None:
    """Find the spectra of factors together, as far as they are small matrices as they stand."""
    roots = {id(root): root for root in map(_root, factors)}.values()
    waiting = [F for F in roots if isinstance(F, Dense) and not F.decomposed and len(F) <= STACKED]
    if len(waiting) < 2:
        return
    found = eigh_each([F.matrix for F in waiting], [name] * len(waiting))
    for F, spectrum in zip(waiting, found, strict=True):
        F._kept["spectrum"] = spectrum


def inverses(factors: Sequence[Factor], dampings: Sequence[Any], names: Sequence[str]) -> Any:
    """`(S + damping I)^{-1}` of each factor, of matrices as they stand together."""
    small = [k for k, F in enumerate(factors) if isinstance(F, Dense) and not F.decomposed]
    found = damped_inverses([factors[k].matrix for k in small], [dampings[k] for k in small])
    known = {k: Dense(x) for k, x in zip(small, found, strict=True) if x is not None}
    return [
        known[k] if k in known else F.power(-1, dampings[k], names[k])
        for k, F in enumerate(factors)
    ]


def _root(factor: Factor) -> Factor:
    """The factor whose decomposition a multiple has."""
    return factor if factor._source is None else _root(factor._source[0])


def factor_of(S: Tensor | Factor, what: str = "the factor") -> Factor:
    """A side as a factor: a matrix, or a vector `[d]`, the entries of a diagonal one.

    Raises:
        BlockError: it is no tensor of real numbers, or no square matrix.
    """
    if isinstance(S, Factor):
        return S
    doors.tensor(S, what, ndim=(1, 2), full=True, error=BlockError)
    if S.ndim == 1:
        return Diagonal(S)
    if S.shape[-1] != S.shape[-2]:
        raise BlockError(f"{what} must be square, got {tuple(S.shape)}")
    check_symmetric(S, what)
    return Dense(S)


def within_span(span: Span, combine: Callable[[Tensor], Tensor]) -> Span:
    """The span of rows that are linear combinations of a span's rows.

    Args:
        span: returns a basis `V` `[d, r]` and rows in its coordinates, `[..., r]`.
        combine: maps rows of any width to their combinations, such as means over positions.

    Returns:
        A span with the same `V` and the combined coordinates.
    """

    def combined() -> tuple[Tensor, Tensor] | None:
        found = span()
        return None if found is None else (found[0], combine(found[1]))

    return combined
