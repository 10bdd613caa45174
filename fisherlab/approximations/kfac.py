"""KFAC, expand and reduce."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fisherlab.approximations.base import Approximation, Means
from fisherlab.approximations.damping import check_placement, place
from fisherlab.blocks import Block, BlockError, Kronecker
from fisherlab.blocks.contractions import second_moment
from fisherlab.extract import LayerCapture


@dataclass(frozen=True)
class KFAC(Approximation, name="kfac"):
    """`F ~ G (x) A`.      TEKFAC (2.4); Martens & Grosse 2015; KFC; Eschenhagen et al. 2023.

    expand:  `A = (1/(M T)) sum_{n,t} a a^T`,   `G = (1/M) sum_{m,n,t} g g^T`
    reduce:  `A = (1/M) sum_n abar abar^T`,  `abar = mean_t a`,
             `G = (1/M) sum_{m,n} ghat ghat^T`,  `ghat = sum_t g`

    `placement` of the damping: "tikhonov", "factored" (with `pi` None the trace rule, 1 as TEKFAC
    describes KFAC), "factorwise" or "eigenvalue".
    """

    weight_sharing: str = "expand"
    placement: str = "tikhonov"
    pi: float | None = None

    def __post_init__(self) -> None:
        check_placement(self.placement)
        if self.weight_sharing not in ("expand", "reduce"):
            raise BlockError(
                f"KFAC's weight_sharing is 'expand' or 'reduce', got {self.weight_sharing!r}"
            )

    def sums(self, layer: LayerCapture) -> dict[str, Tensor]:
        share = layer.column_share
        if self.weight_sharing == "reduce":
            a, g = layer.columns.a, layer.columns.g
            return {"A": share * second_moment(a.mean(1)), "G": second_moment(g.sum(2))}
        G = second_moment(layer.output_gradients)
        return {"A": layer.input_moment * (share / layer.positions), "G": G}

    def block(
        self, means: Means, basis: dict[str, Tensor], corrections: dict[str, Tensor]
    ) -> Block:
        return Kronecker(means["G"], means["A"])

    def damped(self, block: Block, damping: float) -> Block:
        return place(block, self.exponent, damping, self.placement, self.pi)


@dataclass(frozen=True)
class KFACReduce(KFAC, name="kfac_reduce"):
    """`F ~ G (x) A` of position means and sums: KFAC in the reduce setting."""

    weight_sharing: str = "reduce"
