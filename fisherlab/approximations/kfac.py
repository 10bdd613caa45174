"""KFAC, expand and reduce."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fisherlab.approximations.base import Approximation, Later, Means
from fisherlab.approximations.damping import check_placement, place
from fisherlab.blocks import Block, BlockError, Kronecker
from fisherlab.blocks.contractions import second_moment
from fisherlab.blocks.moment import Moment, within
from fisherlab.extract import LayerCapture


@dataclass(frozen=True)
class KFAC(Approximation, name="kfac"):
    """`F ~ G (x) A`.      TEKFAC (2.4); Martens & Grosse 2015; KFC; Eschenhagen et al. 2023.

    expand:  `A = (1/(M T)) sum_{n,t} a a^T`,   `G = (1/M) sum_{m,n,t} g g^T`
    reduce:  `A = (1/M) sum_n abar abar^T`,  `abar = mean_t a`,
             `G = (1/M) sum_{m,n} ghat ghat^T`,  `ghat = sum_t g`

    Means over positions are those over the `T_n` positions of each example that count: padding,
    without a gradient for any column, does not.

    `placement` of the damping: "tikhonov", "factored" (with `pi` None the trace rule, 1 as TEKFAC
    describes KFAC), "factorwise" or "eigenvalue".
    """

    sides: ClassVar[Mapping[str, str]] = {"G": "output", "A": "input"}
    weight_sharing: str = "expand"
    placement: str = "tikhonov"
    pi: float | None = None

    def __post_init__(self) -> None:
        check_placement(self.placement)
        if self.weight_sharing not in ("expand", "reduce"):
            raise BlockError(
                f"KFAC's weight_sharing is 'expand' or 'reduce', got {self.weight_sharing!r}"
            )

    def sums(self, layer: LayerCapture) -> Mapping[str, Tensor]:
        share = layer.column_share
        if self.weight_sharing == "reduce":
            a, g = layer.columns.a, layer.columns.g
            a = layer.weighed(a.mean(1), 1.0)
            return {"A": share * second_moment(a), "G": second_moment(g.sum(2))}
        return Later(
            A=lambda: layer.input_moment * (share / layer.positions),
            G=lambda: second_moment(layer.output_gradients),
        )

    def diagonals(self, layer: LayerCapture) -> Mapping[str, Tensor]:
        a, g = layer.columns.a, layer.columns.g
        if self.weight_sharing == "reduce":
            a, g, share = layer.weighed(a.mean(1), 1.0), g.sum(2), layer.column_share
        else:
            a = layer.weighed(a)
            share = layer.column_share / layer.positions
        return Later(
            A=lambda: share * a.square().flatten(0, -2).sum(0),
            G=lambda: g.square().flatten(0, -2).sum(0),
        )

    def moments(self, layer: LayerCapture) -> dict[str, Moment]:
        found: dict[str, Moment] = {}
        columns, reduce = layer.columns, self.weight_sharing == "reduce"
        scale = layer.column_share / (1 if reduce else layer.positions)

        def inputs(a: Tensor) -> Tensor:
            return layer.weighed(a.mean(1), 1.0) if reduce else layer.weighed(a)

        def outputs(g: Tensor) -> Tensor:
            return g.sum(2) if reduce else g

        if layer.few_inputs:
            found["A"] = Moment(
                inputs(columns.a), scale, within(lambda: columns.input_frame, inputs)
            )
        if layer.few_gradients:
            found["G"] = Moment(
                outputs(columns.g), 1.0, within(lambda: columns.output_frame, outputs)
            )
        return found

    def block(
        self, means: Means, basis: dict[str, Tensor], corrections: dict[str, Tensor]
    ) -> Block:
        return Kronecker(means.factor("G"), means.factor("A"))

    def damped(self, block: Block, damping: float) -> Block:
        return place(block, self.exponent, damping, self.placement, self.pi)


@dataclass(frozen=True)
class KFACReduce(KFAC, name="kfac_reduce"):
    """`F ~ G (x) A` of position means and sums: KFAC in the reduce setting."""

    weight_sharing: str = "reduce"
