"""TKFAC: the Kronecker product that keeps the trace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fisherlab import statistics as of
from fisherlab.approximations.base import BY_OPTION, Approximation
from fisherlab.approximations.damping import PLAIN, check_placement, place, place_each
from fisherlab.approximations.means import Means
from fisherlab.blocks import Block, Kronecker
from fisherlab.statistics import Statistic

PARTIAL = {"left": of.LeftMoment(), "right": of.RightMoment(), "trace": of.Energy()}
EXPAND = {"left": of.LeftProduct(), "right": of.RightProduct(), "trace": of.EnergyProduct()}


@dataclass(frozen=True)
class TKFAC(Approximation, name="tkfac"):
    """`F ~ sigma Psi (x) Phi`, unit-trace factors.      TEKFAC (2.8)-(2.10); Gao et al. 2020.

    partial:  `sigma = tr F`,  `Psi = sum D D^T / sum ||D||^2`,  `Phi = sum D^T D / sum ||D||^2`
    expand:   the paper's literal form, with `Lambda_n = sum_t a a^T`, `Gamma_n = sum_{m,t} g g^T`:
              `sigma = (1/(M T)) sum_n tr Lambda_n tr Gamma_n`,
              `Phi = sum_n tr(Gamma_n) Lambda_n / sum_n tr Lambda_n tr Gamma_n`, `Psi` likewise

    The two are one for T = 1. Partial traces keep the trace for every T; the literal form keeps it
    under the paper's independence assumptions only. Means run over the unnormalised sums.

    Args:
        weight_sharing: "partial" or "expand".
        placement: where the damping goes: "tikhonov", "factored", "factorwise" or "eigenvalue".
        pi: for "factored", where `sqrt(sigma) Phi` gets `pi sqrt(lambda)` and `sqrt(sigma) Psi`
            gets `sqrt(lambda) / pi`; None: the trace rule.
        left: statistic of `Psi` `[o, o]`; default: given by `weight_sharing`.
        right: statistic of `Phi` `[i, i]`; default: given by `weight_sharing`.
        trace: statistic of `sigma`; default: given by `weight_sharing`.

    Raises:
        BlockError: an option is unknown.
    """

    weight_sharing: str = "partial"
    placement: str = "tikhonov"
    # with sigma split evenly over the factors; Gao et al. 2020 damp with pi = 1
    pi: float | None = 1.0
    left: Statistic = BY_OPTION
    right: Statistic = BY_OPTION
    trace: Statistic = BY_OPTION

    def __post_init__(self) -> None:
        check_placement(self.placement, self.pi)
        self._choose("weight_sharing", {"partial": PARTIAL, "expand": EXPAND})

    def block(self, mean: Means, shape: tuple[int, int]) -> Block:
        root = mean(self.trace).sqrt()
        left, right = mean.factor(self.left), mean.factor(self.right)
        scale = torch.where(root > 0, 1 / root, torch.zeros_like(root)).to(left.dtype)
        return Kronecker(left.scaled(scale), right.scaled(scale))

    @property
    def tikhonov(self) -> bool:
        return type(self).damped is TKFAC.damped and self.placement in PLAIN

    def damped(self, block: Block, damping: float) -> Block:
        return place(block, self.exponent, damping, self.placement, self.pi)

    def damped_each(self, blocks: Sequence[Block], dampings: Sequence[float]) -> list[Block]:
        if type(self).damped is not TKFAC.damped:
            return super().damped_each(blocks, dampings)
        return place_each(blocks, self.exponent, dampings, self.placement, self.pi)


@dataclass(frozen=True)
class TKFACExpand(TKFAC, name="tkfac_expand"):
    """`F ~ sigma Psi (x) Phi` with the paper's literal sums over positions."""

    weight_sharing: str = "expand"
