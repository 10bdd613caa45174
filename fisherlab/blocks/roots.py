"""Roots of second moments, and the Kronecker products that Shampoo makes of them."""

from __future__ import annotations

import torch
from torch import Tensor

from fisherlab.blocks.base import Block
from fisherlab.blocks.kronecker import Factor, Kronecker
from fisherlab.blocks.moment import Decomposed, Moment
from fisherlab.blocks.numerics import (
    RANK_TOLERANCE,
    spectral,
    spectrum_power,
    trace_of,
)
from fisherlab.blocks.serialise import remembers

NAME = "Shampoo's second moment"


@remembers("L", "R", "G", "A")
class Sided(Kronecker):
    """Shampoo's product with the second moments it was made of."""

    def __init__(self, L: Tensor | Moment, R: Tensor | Moment, G: Factor, A: Factor) -> None:
        super().__init__(G, A)
        self.L, self.R = L, R

    @property
    def moments(self) -> tuple[Tensor, Tensor]:
        """`L` and `R`, formed."""
        L, R = (S if isinstance(S, Tensor) else S.formed() for S in (self.L, self.R))
        return L, R

    def of_moments(self, exponent: float, damping: float) -> tuple[Tensor, Tensor]:
        """`(L + damping I)^exponent` and `(R + damping I)^exponent`."""
        L, R = self.moments
        return _power(L, exponent, damping), _power(R, exponent, damping)

    def saved(self, name: str) -> Tensor:
        if name in ("G", "A"):
            return super().saved(name)
        moment = getattr(self, name)
        return moment if isinstance(moment, Tensor) else moment.formed()


@remembers("L", "R", "G", "A")
class Rooted(Sided):
    """`L^{1/2} (x) R^{1/2}`."""

    def squared_norm(self) -> Tensor:
        # tr L tr R, which needs no root: those of small eigenvalues are lost in float32
        return moment_trace(self.L).double() * moment_trace(self.R).double()

    @property
    def unseen(self) -> float:
        left, right = (_unseen(side) for side in (self.L, self.R))
        return 1 - (1 - left) * (1 - right)

    def within(self, V: Tensor) -> Block | None:
        near = super().within(V)
        if not isinstance(near, Kronecker):
            return near
        return Rooted(self.L, self.R, near._G, near._A)


def moment_trace(side: Tensor | Moment) -> Tensor:
    """`tr S` of a moment, of its rows or of the entries of a diagonal one."""
    if isinstance(side, Moment):
        return side.trace()
    return trace_of(side) if side.ndim == 2 else side.sum(dtype=torch.float64)


def _noise(values: Tensor) -> Tensor:
    """The largest eigenvalue that rounding alone can leave.

    The usual bound where the spectrum breaks off above it, as that of a moment of low rank does.
    Where it runs on below, the bound is too careful by far, and 1/damping makes much of what it
    cuts: there as much as the negative eigenvalues are, which are nothing but rounding.
    """
    eps = torch.finfo(values.dtype).eps
    bound = RANK_TOLERANCE * eps * values.abs().max()
    small = values <= bound
    below = values.masked_fill(~small, -torch.inf).max()
    above = values.masked_fill(small, torch.inf).min()
    breaks_off = above * eps**0.5 > below
    seen = RANK_TOLERANCE * -values.min().clamp(max=0)
    return torch.where(breaks_off, bound, torch.minimum(bound, seen))


def _raised(values: Tensor, exponent: float, damping: float) -> Tensor:
    # a root makes rounding of a rank-deficient moment visible (1e-16 becomes 1e-8), and what is
    # cut for it as well: of a float32 moment of 2304 rows a cut at eps times rows took 3/4 of tr X
    values = torch.where(values > _noise(values), values, torch.zeros_like(values))
    return spectrum_power(values, exponent, damping, NAME)


def _spectral(side: Tensor | Moment) -> tuple[Tensor, Tensor]:
    return spectral(side, NAME) if isinstance(side, Tensor) else side.spectral(NAME)


def moment_root(side: Tensor | Moment) -> Tensor | Decomposed:
    """`S^{1/2}`, in the eigenvectors of `S`."""
    if isinstance(side, Tensor) and side.ndim == 1:
        return _raised(side, 0.5, 0.0)
    values, vectors = _spectral(side)
    return Decomposed(_raised(values, 0.5, 0.0), vectors)


def _unseen(side: Tensor | Moment) -> float:
    """The share of `tr S^{1/2}` that its cut eigenvalues may have had, at most."""
    if isinstance(side, Tensor) and side.ndim == 1:
        return 0.0
    values, _ = _spectral(side)
    noise = _noise(values)
    kept = values > noise
    cut = (~kept).sum() * noise.double().sqrt()
    return float(cut / (cut + values[kept].double().sqrt().sum()).clamp(min=1e-300))


def _power(side: Tensor, exponent: float, damping: float) -> Tensor:
    if side.ndim == 1:
        return _raised(side, exponent, damping)
    values, vectors = spectral(side, NAME)
    powers = _raised(values, exponent, damping)
    if vectors.shape[1] == len(vectors):
        return vectors * powers @ vectors.mT
    # zero on the complement of a thin basis, so damping^p there
    rest = _raised(values.new_zeros(1), exponent, damping)
    eye = torch.eye(len(side), dtype=side.dtype, device=side.device)
    return rest * eye + vectors * (powers - rest) @ vectors.mT
