"""TKFAC: the Kronecker product that keeps the trace."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fisherlab.approximations.base import Approximation, Later, Means
from fisherlab.approximations.damping import check_placement, place
from fisherlab.blocks import Block, BlockError, Kronecker, contractions
from fisherlab.blocks.moment import Moment, scaled
from fisherlab.extract import LayerCapture


@dataclass(frozen=True)
class TKFAC(Approximation, name="tkfac"):
    """`F ~ sigma Psi (x) Phi`, unit-trace factors.      TEKFAC (2.8)-(2.10); Gao et al. 2020.

    partial:  `sigma = tr F`,  `Psi = sum D D^T / sum ||D||^2`,  `Phi = sum D^T D / sum ||D||^2`
    expand:   the paper's literal form, with `Lambda_n = sum_t a a^T`, `Gamma_n = sum_{m,t} g g^T`:
              `sigma = (1/(M T)) sum_n tr Lambda_n tr Gamma_n`,
              `Phi = sum_n tr(Gamma_n) Lambda_n / sum_n tr Lambda_n tr Gamma_n`, `Psi` likewise

    The two are one for T = 1. Partial traces keep the trace for every T; the literal form keeps it
    under the paper's independence assumptions only. Means run over the unnormalised sums.
    """

    sides: ClassVar[Mapping[str, str]] = {"left": "output", "right": "input"}
    weight_sharing: str = "partial"
    placement: str = "tikhonov"
    # with sigma split evenly over the factors; Gao et al. 2020 damp with pi = 1
    pi: float | None = 1.0

    def __post_init__(self) -> None:
        check_placement(self.placement)
        if self.weight_sharing not in ("partial", "expand"):
            raise BlockError(
                f"TKFAC's weight_sharing is 'partial' or 'expand', got {self.weight_sharing!r}"
            )

    def sums(self, layer: LayerCapture) -> Mapping[str, Tensor]:
        columns = layer.columns
        if self.weight_sharing == "partial":
            return Later(
                left=lambda: columns.left,
                right=lambda: columns.right,
                trace=lambda: columns.trace,
            )
        t = layer.positions
        a, g, inputs, outputs = _weighted(layer)
        return Later(
            left=lambda: contractions.second_moment(g) / t,
            right=lambda: contractions.second_moment(a) / t,
            trace=lambda: (inputs.double() * outputs.double()).sum() / t,
        )

    def diagonals(self, layer: LayerCapture) -> Mapping[str, Tensor]:
        columns = layer.columns
        if self.weight_sharing == "partial":
            return Later(left=lambda: columns.squares.sum(1), right=lambda: columns.squares.sum(0))
        t = layer.positions
        a, g, _, _ = _weighted(layer)
        return Later(
            left=lambda: g.square().sum((0, 1, 2)) / t, right=lambda: a.square().sum((0, 1)) / t
        )

    def moments(self, layer: LayerCapture) -> dict[str, Moment]:
        # D = g^T a, so that sum D D^T = g^T (a a^T) g and sum D^T D = a^T (sum_m g g^T) a
        found: dict[str, Moment] = {}
        columns = layer.columns
        partial = self.weight_sharing == "partial"
        scale = 1.0 if partial else 1 / layer.positions

        def left(g: Tensor) -> Tensor:
            if partial:
                return columns.input_products @ g
            return layer.weighed(columns.a).square().sum((1, 2))[:, None, None] * g

        def right(a: Tensor) -> Tensor:
            if partial:
                return columns.gradient_products @ a
            weights = columns.g.square().sum((0, 2, 3))[:, None, None]
            return layer.weighed(weights * a, 1.0)

        if layer.few_gradients:
            found["left"] = Moment(columns.g, scale, lambda: columns.output_frame, left)
        if layer.few_inputs:
            found["right"] = Moment(columns.a, scale, lambda: columns.input_frame, right)
        return found

    def block(
        self, means: Means, basis: dict[str, Tensor], corrections: dict[str, Tensor]
    ) -> Block:
        root = means["trace"].sqrt()
        scale = torch.where(root > 0, 1 / root, torch.zeros_like(root)).to(
            means.factor("left").dtype
        )
        return Kronecker(*(scaled(means.factor(key), scale) for key in ("left", "right")))

    def damped(self, block: Block, damping: float) -> Block:
        return place(block, self.exponent, damping, self.placement, self.pi)


def _weighted(layer: LayerCapture) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`a` and `g` of each example times the other's length, and the squared lengths of both."""
    a, g = layer.weighed(layer.columns.a), layer.columns.g
    inputs, outputs = a.square().sum((1, 2)), g.square().sum((0, 2, 3))
    return (
        a * outputs.sqrt()[:, None, None],
        g * inputs.sqrt()[:, None, None],
        inputs,
        outputs,
    )


@dataclass(frozen=True)
class TKFACExpand(TKFAC, name="tkfac_expand"):
    """`F ~ sigma Psi (x) Phi` with the paper's literal sums over positions."""

    weight_sharing: str = "expand"
