"""Roots of second moments, and the Kronecker products that Shampoo makes of them."""

from __future__ import annotations

import torch
from torch import Tensor

from fisherlab.blocks.base import Block
from fisherlab.blocks.basis import Space
from fisherlab.blocks.factor import Diagonal, Factor, Spectral, factor_of
from fisherlab.blocks.kronecker import Kronecker
from fisherlab.blocks.numerics import RANK_TOLERANCE, spectrum_power
from fisherlab.blocks.serialise import remembers

NAME = "Shampoo's second moment"


@remembers("L", "R", "G", "A")
class Sided(Kronecker):
    """Shampoo's product with the second moments it was made of."""

    def __init__(
        self, L: Tensor | Factor, R: Tensor | Factor, G: Tensor | Factor, A: Tensor | Factor
    ) -> None:
        super().__init__(G, A)
        self.L, self.R = factor_of(L, "L"), factor_of(R, "R")

    @property
    def moments(self) -> tuple[Tensor, Tensor]:
        """`L` and `R`; the entries of a diagonal one."""
        return self.L.saved(), self.R.saved()

    def of_moments(self, exponent: float, damping: float) -> tuple[Factor, Factor]:
        """`(L + damping I)^exponent` and `(R + damping I)^exponent`."""

        def raised(values: Tensor) -> Tensor:
            return _raised(values, exponent, damping)

        return self.L.mapped(raised, NAME), self.R.mapped(raised, NAME)

    def saved(self, name: str) -> Tensor:
        return super().saved(name) if name in ("G", "A") else getattr(self, name).saved()


@remembers("L", "R", "G", "A")
class Rooted(Sided):
    """`L^{1/2} (x) R^{1/2}`."""

    def squared_norm(self) -> Tensor:
        # tr L tr R, which needs no root: those of small eigenvalues are lost in float32
        return self.L.trace().double() * self.R.trace().double()

    @property
    def trace_below_rounding(self) -> float:
        left, right = (_unseen(side) for side in (self.L, self.R))
        return 1 - (1 - left) * (1 - right)

    def restricted_to(self, space: Space) -> Block | None:
        near = super().restricted_to(space)
        if not isinstance(near, Kronecker):
            return near
        return Rooted(self.L, self.R, *near.factors)


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
    # cut for it as well: in a float32 moment of 2304 rows, a cut at eps times rows took 3/4 of tr X
    values = torch.where(values > _noise(values), values, torch.zeros_like(values))
    return spectrum_power(values, exponent, damping, NAME)


def moment_root(side: Factor) -> Factor:
    """`S^{1/2}`, in the eigenvectors of `S`."""
    values, vectors = side.spectrum(NAME)
    root = _raised(values, 0.5, 0.0)
    return Diagonal(root) if isinstance(side, Diagonal) else Spectral(root, vectors)


def _unseen(side: Factor) -> float:
    """The share of `tr S^{1/2}` that is unknown, at most: what is cut, and what may be rounding."""
    if isinstance(side, Diagonal):
        return 0.0
    values = side.spectrum(NAME)[0].detach()
    noise = _noise(values)
    kept = values > noise
    small = values <= RANK_TOLERANCE * torch.finfo(values.dtype).eps * values.abs().max()
    cut = (~kept).sum() * noise.double().sqrt()
    doubtful = cut + values[kept & small].double().sqrt().sum()
    return float(doubtful / (cut + values[kept].double().sqrt().sum()).clamp(min=1e-300))
