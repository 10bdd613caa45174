"""Shampoo as an approximation of the block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fisherlab import doors
from fisherlab import statistics as of
from fisherlab.approximations.base import BY_OPTION, Approximation
from fisherlab.approximations.damping import check_own
from fisherlab.approximations.means import Means
from fisherlab.approximations.tkfac import PARTIAL
from fisherlab.blocks import Block, BlockError, Kronecker
from fisherlab.blocks.factor import Factor
from fisherlab.blocks.numerics import check_damping
from fisherlab.blocks.roots import Rooted, Sided, moment_root
from fisherlab.statistics import Statistic

PER_EXAMPLE = {key: PARTIAL[key] for key in ("left", "right")}
GRADIENT = {"left": of.GradientLeft(), "right": of.GradientRight()}


@dataclass(frozen=True)
class Shampoo(Approximation, name="shampoo"):
    """`F ~ L^{1/2} (x) R^{1/2}`,  `L = (1/M) sum D D^T`, `R = (1/M) sum D^T D`.  Gupta et al. 2018.

    With `statistics="gradient"` it applies the power -1/2,
    `(L + lambda)^{-1/4} V (R + lambda)^{-1/4}`, with the damping inside `L` and `R`, as the
    optimizer does.

    Args:
        form: "root", or "squared": `L (x) R / tr L` (Morwani et al. 2024), which is TKFAC with
            partial traces.
        statistics: "per_example": second moments of per-example gradients. "gradient": second
            moments of a batch's mean gradient at the observed labels, as the optimizer does.
        left: statistic of `L` `[o, o]`; default: given by `statistics`.
        right: statistic of `R` `[i, i]`; default: given by `statistics`.

    Raises:
        BlockError: an option is unknown.
    """

    exponent = -0.5
    placement = "factorwise"
    form: str = "root"
    statistics: str = "per_example"
    left: Statistic = BY_OPTION
    right: Statistic = BY_OPTION

    def __post_init__(self) -> None:
        if not isinstance(self.form, str) or self.form not in ("root", "squared"):
            got = doors.said(self.form)
            raise BlockError(f"Shampoo's form is 'root' or 'squared', got {got}")
        self._choose("statistics", {"per_example": PER_EXAMPLE, "gradient": GRADIENT})

    def block(self, mean: Means, shape: tuple[int, int]) -> Block:
        L, R = mean.factor(self.left), mean.factor(self.right)
        if self.form == "root":
            return Rooted(L, R, moment_root(L), moment_root(R))
        scale = L.trace().rsqrt().nan_to_num(posinf=0).to(L.dtype)
        return Sided(L, R, L.scaled(scale), R.scaled(scale))

    def decomposed(self, mean: Means) -> Sequence[Factor]:
        return mean.factor(self.left), mean.factor(self.right)

    def damped(self, block: Block, damping: float) -> Block:
        block = check_own(block, Sided, "Shampoo")
        root = self.form == "root"
        left, right = block.of_moments(self.exponent / (2 if root else 1), check_damping(damping))
        return Kronecker(
            left if root else left.scaled(block.L.trace().sqrt().to(left.dtype)), right
        )
