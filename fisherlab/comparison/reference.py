"""The reference for every approximation of a layer: the exact block, gradient, steps."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fisherlab.blocks import Block, DirectSum, Eigen, Outer, contractions
from fisherlab.blocks.basis import Coordinates, Space, matrix_of
from fisherlab.blocks.direct_sum import parts_of
from fisherlab.blocks.numerics import ENTRY_EPS, RESIDUAL_EPS, dot, is_coarse, is_rounding, normal
from fisherlab.comparison.table import OVERFLOW, STEP_ROUNDING, noted
from fisherlab.metrics.direction import Step

# What a row says of a step.
STEPS = ("direction_cosine", "direction_error", "quadratic_decrease", "quadratic_decrease_scaled")
# The share of the exact step that rounding may make before a row says so.
STEP_BELOW_ROUNDING = 0.01
# The roundings of a gradient, and of the eigenvectors that it is taken to, in eps of its length.
ROUNDED = 8.0

# Up to this many eps of the gradient, times the root of its entries, a part of it is rounding.
ROUNDING_OF_FEW = 8.0
# An inverse this near to 1 / damping is that of an eigenvalue zero.
AT_ZERO = 1e-6


@dataclass(frozen=True)
class RotatedGradient:
    """A gradient in one Kronecker eigenbasis."""

    block: Eigen  # has the basis, and keeps it alive
    rotated: Tensor
    rest: Tensor | None  # what lies beside it; None where that is the rounding of its entries
    seconds: float

    @classmethod
    def of(cls, block: Eigen, gradient: Tensor) -> RotatedGradient:
        """The gradient in the basis of a block, full or thin."""
        start = time.perf_counter()
        rotated = block.in_bases(gradient)
        rest = _beside(block, gradient) if block.thin else None
        return cls(block, rotated, rest, time.perf_counter() - start)

    def product(self, P: Eigen, damping: float) -> Tensor:
        """`P g`. If the part of `g` where `P` is 1 / damping is rounding, it counts as zero."""
        spectrum, left = P.spectrum.to(P.dtype), self.left_out(P, damping)
        product = P.from_bases(spectrum * (self.rotated if left is None else self.rotated - left))
        # apart, since 1 / damping would amplify the rounding of a product with both
        return product if self.rest is None else product + P @ self.rest

    def left_out(self, P: Eigen, damping: float) -> Tensor | None:
        """The part of `g` where `P` is 1 / damping, in the basis; None if more than rounding."""
        rotated = self.rotated
        left = rotated.masked_fill(P.spectrum.to(P.dtype) * damping < 0.5, 0)
        # the rounding of few numbers is small: more than it is the gradient's own, in raw units
        share = min(1.0, ROUNDING_OF_FEW * math.sqrt(rotated.numel()) / RESIDUAL_EPS)
        square = share**2 * dot(rotated, rotated)
        return left if is_rounding(dot(left, left), square, rotated.dtype) else None

    def share_at_zero(self, P: Eigen, damping: float) -> float:
        """The share of `P g`, rounding included, in directions where the block is zero."""
        step = P.spectrum.double() * self.rotated.double()
        inside = step.masked_fill(P.spectrum.double() * damping < 1 - AT_ZERO, 0)
        return float(inside.norm() / step.norm().clamp(min=1e-300))


def _beside(block: Eigen, V: Tensor) -> Tensor | None:
    """`V - Q_G Q_G^T V Q_A Q_A^T` where it is more than the rounding of its entry; else None.

    It is taken in float64: parameters of inputs in small units have a small rounding.
    """
    Q_G, Q_A = (Q if isinstance(Q, Coordinates) else matrix_of(Q) for Q in (block.Q_G, block.Q_A))
    G, A = Q_G.double(), Q_A.double()
    inside = G.mT @ (V.double() @ A)
    rest = (G @ inside @ A.mT).neg_().add_(V)
    if is_rounding(dot(rest, rest), dot(V, V), V.dtype):
        G, A = (Q if isinstance(Q, Coordinates) else Q.abs() for Q in (Q_G, Q_A))
        size = (G @ inside.abs().to(V) @ A.mT).add_(V.abs())
        rest.masked_fill_(rest.abs() <= ENTRY_EPS * torch.finfo(V.dtype).eps * size, 0)
    return rest.to(V) if rest.any() else None


def _basis_of(P: Eigen, gradient: Tensor) -> tuple[Any, ...]:
    """What a part of the gradient in the basis of a block is known by."""
    return id(P.Q_G), id(P.Q_A), gradient.storage_offset()


class ExactReference:
    """The exact block, its gradient and its natural-gradient steps."""

    def __init__(self, F: Outer | DirectSum, gradient: Tensor) -> None:
        self.F, self.given = F, gradient.to(F.dtype)
        self._steps: dict[float, Tensor] = {}
        self._bases: dict[Any, RotatedGradient] = {}
        self._added: list[tuple[dict[str, Any], Tensor, float]] = []
        # the square length of what the gradient has beside the space of all blocks here
        self.beside = 0.0
        self._doubted: dict[float, float] = {}

    @cached_property
    def gradient(self) -> Tensor:
        """`g`, for both steps without the rounding that the exact one leaves out."""
        return self.F.without_rounding(self.given)

    def inside(self) -> InsideReference | None:
        """The same in a space that holds all columns, if it has clearly fewer dimensions."""
        space = self.F.columns.space if isinstance(self.F, Outer) else None
        F = None if space is None else self.F.restricted_to(space)
        if not isinstance(F, Outer) or space is None:
            return None
        # before any method, whose seconds they would count for
        _ = F.energies(), F.columns.gram_eigen, F.squared_norm()
        return InsideReference(self, F, space)

    def product(self, P: Block, damping: float, X: Block | None = None) -> tuple[Tensor, float]:
        """`P g` for an inverse with some damping, that of `X` if given, and the seconds of it.

        Blocks in one Kronecker eigenbasis share what it makes of the gradient, half of the work;
        its time counts for each of them.
        """
        if not isinstance(P, DirectSum):
            return self._product(P, self.gradient, damping, X)
        own = X.parts if isinstance(X, DirectSum) else [None] * len(P.parts)
        rows = zip(P.parts, P.split(self.gradient), own, strict=True)
        products = [self._product(part, g, damping, x) for part, g, x in rows]
        return torch.cat([one for one, _ in products]), sum(seconds for _, seconds in products)

    def _product(
        self, P: Block, gradient: Tensor, damping: float, X: Block | None
    ) -> tuple[Tensor, float]:
        start, shared = time.perf_counter(), 0.0
        if isinstance(P, Eigen):
            key = _basis_of(P, gradient)
            if key not in self._bases:
                self._bases[key] = RotatedGradient.of(P, gradient)
                start = time.perf_counter()
            shared = self._bases[key].seconds
            result = self._bases[key].product(P, damping)
        else:
            result = P @ gradient if X is None else self._solved(X, gradient, damping)
        return result, time.perf_counter() - start + shared

    def _solved(self, X: Block, gradient: Tensor, damping: float) -> Tensor:
        """`(X + damping I)^{-1} g`."""
        return X.solve(gradient, damping)

    def share_at_zero(self, P: Block, damping: float) -> float:
        """The share of a product that was made, where its block is zero; 0 where not known."""
        if not isinstance(P, Eigen):
            return 0.0
        known = self._bases.get(_basis_of(P, self.gradient))
        return 0.0 if known is None else known.share_at_zero(P, damping)

    def share_left_out(self, product: Tensor, P: Block, damping: float) -> float:
        """`||d|| / (damping ||P g||)`, `d` what counts as rounding of `g` where `X` is 0.

        In the smallest eigenvalues of inputs in raw units it may be real. 0 in float64.
        """
        if not isinstance(P, Eigen) or not is_coarse(self.F.dtype):
            return 0.0
        known = self._bases.get(_basis_of(P, self.gradient))
        left = None if known is None else known.left_out(P, damping)
        if left is None:
            return 0.0
        return float(left.double().norm() / damping / product.double().norm().clamp(min=1e-300))

    def hidden_share(self, product: Tensor, P: Block, rounding: float, damping: float) -> float:
        """`eps lambda_1 ||P P g|| / ||P g||`: how far the rounding of `X` turns its step.

        A rounding `D` of `X` moves `P g` by `P D P g` to first order, and `D` has about eps of the
        largest eigenvalue. Of 7,663 rows measured in both precisions one that moved by 2 % did so
        by 5 times this, the others by 3 times at most.

        Args:
            product: `P g`.
            P: `(X + damping I)^{-1}`.
            rounding: `eps lambda_1` of `X`.
            damping: the damping.

        Returns:
            The share, or a bound of it that is below 1 %; 0 in float64.
        """
        if rounding / damping < STEP_BELOW_ROUNDING:
            return rounding / damping
        moved = (P @ product.to(P.dtype)).double().norm()
        return float(rounding * moved / product.double().norm().clamp(min=1e-300))

    def rounding_of_eigenvalues(self, X: Block) -> float:
        """`eps lambda_1`, how far a decomposition of `X` rounds its eigenvalues; 0 in float64."""
        if not is_coarse(self.F.dtype) or not len(values := X.leading_values(1)):
            return 0.0
        return torch.finfo(self.F.dtype).eps * float(values[0])

    def rounding_of(self, product: Tensor, P: Block, largest: float) -> float:
        """The share of `P g` that is rounding of `g`: `||P d|| / ||P g||`, `d` drawn by entry.

        Args:
            product: `P g`.
            P: an inverse with some damping.
            largest: no eigenvalue of `P` is above it; infinite where none is known.

        Returns:
            The share, or a bound of it below `STEP_BELOW_ROUNDING`; 0 in float64.
        """
        g, eps = self.gradient, torch.finfo(self.F.dtype).eps
        if not is_coarse(self.F.dtype):
            return 0.0  # as for the exact step
        length = product.double().norm().clamp(min=1e-300)
        bound = float(ROUNDED * eps * g.double().norm() / length * largest)
        if bound < STEP_BELOW_ROUNDING:
            return bound
        drawn = normal(torch.Generator().manual_seed(0), *g.shape).to(g)
        d = ROUNDED * eps * drawn * self._rounded_entries()
        return float((P @ d.to(P.dtype)).double().norm() / length)

    def _rounded_entries(self) -> Tensor:
        """The size of each entry's rounding, in eps: that of the entry itself."""
        return self.gradient

    def add(self, row: dict[str, Any], ours: Tensor, damping: float) -> None:
        """A step whose worth is still missing in its row."""
        self._added.append((row, ours, damping))
        if sum(d.nbytes for _, d, _ in self._added) > contractions.WORKSPACE // 4:
            self.complete()

    def complete(self) -> None:
        """Fill in what the added steps are worth, in one pass over the gradients for all of them.

        As formed gradients, their products with b steps cost m n o i (t + b).
        """
        if not self._added:
            return
        quadratics = self.F.quadratic(torch.stack([ours for _, ours, _ in self._added]))
        doubts = self._doubts(sorted({damping for *_, damping in self._added}))
        for (row, ours, damping), quadratic in zip(self._added, quadratics, strict=True):
            if self.gradient.any() and ours.abs().amax() < torch.finfo(ours.dtype).tiny:
                # below the range, a step has no direction
                row |= dict.fromkeys(STEPS, math.nan) | {"note": noted(row.get("note"), OVERFLOW)}
                continue
            step = Step.of(ours, self.step(damping), self.gradient, quadratic, damping, self.beside)
            numbers = (step.cosine, step.error, step.decrease, step.decrease_scaled)
            row |= {name: number.item() for name, number in zip(STEPS, numbers, strict=True)}
            if doubts[damping] > STEP_BELOW_ROUNDING:
                doubt = f"up to {min(doubts[damping], 1.0):.1%} of the exact step {STEP_ROUNDING}"
                row["note"] = noted(row.get("note"), doubt)
        self._added.clear()

    def _doubts(self, dampings: list[float]) -> dict[float, float]:
        """The share of each step that may be rounding, found once for each damping."""
        if new := [damping for damping in dampings if damping not in self._doubted]:
            self._doubted |= self._found_doubts(new)
        return self._doubted

    def _found_doubts(self, dampings: list[float]) -> dict[float, float]:
        parts = parts_of(self.F)
        pieces = self.given.split([part.shape[0] for part in parts])
        shares = [
            part.rounding_of_solves(g, dampings)
            for part, g in zip(parts, pieces, strict=True)
            if isinstance(part, Outer)
        ]
        return {
            damping: max((share[k] for share in shares), default=0.0)
            for k, damping in enumerate(dampings)
        }

    def step(self, damping: float) -> Tensor:
        """`-(F + damping I)^{-1} g`, which every approximation is compared with."""
        if damping not in self._steps:
            self._steps[damping] = -self.F.solve(self.gradient, damping)
        return self._steps[damping]


class InsideReference(ExactReference):
    """The reference in coordinates of a space that holds all columns.

    The exact step is that of the whole: coordinates are sums of entries, each with the rounding of
    all. What a gradient at labels without a column has in their complement, both steps divide by
    the damping.
    """

    def __init__(self, whole: ExactReference, F: Outer, space: Space) -> None:
        super().__init__(F, space.coordinates(whole.given))
        self.outer, self.space = whole, space
        if space.G is not None:
            rest = whole.given - space.lifted(self.given)
            square = dot(rest, rest)
            if not is_rounding(square, dot(whole.given, whole.given), whole.given.dtype):
                self.beside = square.item()

    def _solved(self, X: Block, gradient: Tensor, damping: float) -> Tensor:
        if X is not self.F:
            return super()._solved(X, gradient, damping)
        return self.space.coordinates(self.outer.F.solve(self.outer.gradient, damping))

    def step(self, damping: float) -> Tensor:
        if damping not in self._steps:
            self._steps[damping] = self.space.coordinates(self.outer.step(damping))
        return self._steps[damping]

    def _found_doubts(self, dampings: list[float]) -> dict[float, float]:
        own, outer = super()._found_doubts(dampings), self.outer._doubts(dampings)
        return {damping: max(own[damping], outer[damping]) for damping in dampings}

    def _rounded_entries(self) -> Tensor:
        # coordinates are sums of entries: each has the rounding of all
        square = self.gradient.double().square().mean()
        return square.sqrt().to(self.gradient).expand_as(self.gradient)
