"""Shampoo as an approximation of the block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fisherlab.approximations.base import Approximation, Means
from fisherlab.approximations.tkfac import TKFAC
from fisherlab.blocks import Block, BlockError, Kronecker
from fisherlab.blocks.kronecker import Factor
from fisherlab.blocks.moment import Decomposed, Moment
from fisherlab.blocks.numerics import (
    RANK_TOLERANCE,
    check_damping,
    spectral,
    spectrum_power,
    trace_of,
)
from fisherlab.blocks.serialise import remembers
from fisherlab.extract import LayerCapture

NAME = "Shampoo's second moment"


@dataclass(frozen=True)
class Shampoo(Approximation, name="shampoo"):
    """`F ~ L^{1/2} (x) R^{1/2}`,  `L = (1/M) sum D D^T`, `R = (1/M) sum D^T D`.  Gupta et al. 2018.

    form="squared": `L (x) R / tr L` (Morwani et al. 2024), which is TKFAC with partial traces.
    statistics="per_example" takes the second moments of per-example gradients;
    statistics="gradient" those of the mean gradient of a batch at the observed labels, as the
    optimizer does. That applies the power -1/2: `(L + lambda)^{-1/4} V (R + lambda)^{-1/4}`,
    the damping inside `L` and `R`.
    """

    exponent = -0.5
    sides: ClassVar[Mapping[str, str]] = {"left": "output", "right": "input"}
    form: str = "root"
    statistics: str = "per_example"

    def __post_init__(self) -> None:
        if self.form not in ("root", "squared"):
            raise BlockError(f"Shampoo's form is 'root' or 'squared', got {self.form!r}")
        if self.statistics not in ("per_example", "gradient"):
            raise BlockError(
                f"Shampoo's statistics are 'per_example' or 'gradient', got {self.statistics!r}"
            )

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        per_example = frozenset({"inputs", "output_gradients"})
        return per_example if self.statistics == "per_example" else frozenset({"gradient"})

    def moments(self, layer: LayerCapture) -> dict[str, Moment]:
        return TKFAC().moments(layer) if self.statistics == "per_example" else {}

    @property
    def origin(self) -> Approximation:
        return TKFAC() if self.statistics == "per_example" else self

    @property
    def placement(self) -> str:
        return "factorwise"

    def sums(self, layer: LayerCapture) -> Mapping[str, Tensor]:
        if self.statistics == "gradient":
            D, count = layer.gradient, layer.examples
            return {"left": count * D @ D.mT, "right": count * D.mT @ D}
        return TKFAC().sums(layer)

    def diagonals(self, layer: LayerCapture) -> Mapping[str, Tensor]:
        if self.statistics == "gradient":
            D2, count = layer.gradient.square(), layer.examples
            return {"left": count * D2.sum(1), "right": count * D2.sum(0)}
        return TKFAC().diagonals(layer)

    def block(
        self, means: Means, basis: dict[str, Tensor], corrections: dict[str, Tensor]
    ) -> Block:
        if self.form == "squared":
            trace = _trace(means["left"])
            scale = torch.where(trace > 0, trace.rsqrt(), torch.zeros_like(trace))
            left, right = means["left"], means["right"]
            return _Sided(left, right, left * scale, right * scale)
        L, R = means.factor("left"), means.factor("right")
        return _Rooted(L, R, _root(L), _root(R))

    def damped(self, block: Block, damping: float) -> Block:
        damping = check_damping(damping)
        assert isinstance(block, _Sided)
        exponent = self.exponent / 2 if self.form == "root" else self.exponent
        L, R = block.moments
        scale = 1.0 if self.form == "root" else _trace(L).sqrt()
        return Kronecker(scale * _power(L, exponent, damping), _power(R, exponent, damping))


@remembers("L", "R", "G", "A")
class _Sided(Kronecker):
    """Shampoo's product with the second moments it was made of."""

    def __init__(self, L: Tensor | Moment, R: Tensor | Moment, G: Factor, A: Factor) -> None:
        super().__init__(G, A)
        self.L, self.R = L, R

    @property
    def moments(self) -> Iterator[Tensor]:
        """`L` and `R`, formed."""
        return (S if isinstance(S, Tensor) else S.formed() for S in (self.L, self.R))

    def saved(self, name: str) -> Tensor:
        if name in ("G", "A"):
            return super().saved(name)
        moment = getattr(self, name)
        return moment if isinstance(moment, Tensor) else moment.formed()


@remembers("L", "R", "G", "A")
class _Rooted(_Sided):
    """`L^{1/2} (x) R^{1/2}`."""

    def squared_norm(self) -> Tensor:
        # tr L tr R, which needs no root: those of small eigenvalues are lost in float32
        left, right = (_trace(S) if isinstance(S, Tensor) else S.trace() for S in (self.L, self.R))
        return left.double() * right.double()

    @property
    def unseen(self) -> float:
        left, right = (_unseen(side) for side in (self.L, self.R))
        return 1 - (1 - left) * (1 - right)

    def within(self, V: Tensor) -> Block | None:
        near = super().within(V)
        if not isinstance(near, Kronecker):
            return near
        return _Rooted(self.L, self.R, near._G, near._A)


def _trace(side: Tensor) -> Tensor:
    return trace_of(side) if side.ndim == 2 else side.sum(dtype=torch.float64)


def _noise(values: Tensor) -> Tensor:
    """What an eigenvalue may be by rounding alone.

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


def _root(side: Tensor | Moment) -> Tensor | Decomposed:
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
