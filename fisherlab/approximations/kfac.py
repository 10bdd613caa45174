"""KFAC, expand and reduce."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fisherlab.approximations.base import BY_OPTION, Approximation
from fisherlab.approximations.damping import PLAIN, check_placement, place, place_each
from fisherlab.approximations.means import Means
from fisherlab.blocks import Block, Kronecker
from fisherlab.statistics import (
    InputMoment,
    OutputMoment,
    ReducedInput,
    ReducedOutput,
    Statistic,
)

EXPAND = {"A": InputMoment(), "G": OutputMoment()}
REDUCE = {"A": ReducedInput(), "G": ReducedOutput()}


@dataclass(frozen=True)
class KFAC(Approximation, name="kfac"):
    """`F ~ G (x) A`.      TEKFAC (2.4); Martens & Grosse 2015; KFC; Eschenhagen et al. 2023.

    expand:  `A = (1/(M T)) sum_{n,t} a a^T`,   `G = (1/M) sum_{m,n,t} g g^T`
    reduce:  `A = (1/M) sum_n abar abar^T`,  `abar = mean_t a`,
             `G = (1/M) sum_{m,n} ghat ghat^T`,  `ghat = sum_t g`

    Means run over the `T_n` positions of each example that count. Padding, which has no gradient
    for any column, does not count.

    Args:
        weight_sharing: "expand" or "reduce".
        placement: where the damping goes: "tikhonov", "factored", "factorwise" or "eigenvalue".
        pi: for "factored", where `A` gets `pi sqrt(lambda)` and `G` gets `sqrt(lambda) / pi`; None:
            the trace rule; TEKFAC describes KFAC with 1.
        A: statistic of the input factor `[i, i]`; default: given by `weight_sharing`.
        G: statistic of the output factor `[o, o]`; default: given by `weight_sharing`.

    Raises:
        BlockError: an option is unknown.

    Example:
        >>> import torch, fisherlab as fl
        >>> model, x = torch.nn.Linear(4, 3), torch.ones(8, 4)
        >>> layer = fl.capture(model, torch.nn.MSELoss(), x, torch.zeros(8, 3))["linear"]
        >>> fl.KFAC()(layer).A.shape
        torch.Size([5, 5])
    """

    weight_sharing: str = "expand"
    placement: str = "tikhonov"
    pi: float | None = None
    A: Statistic = BY_OPTION
    G: Statistic = BY_OPTION

    def __post_init__(self) -> None:
        check_placement(self.placement, self.pi)
        self._choose("weight_sharing", {"expand": EXPAND, "reduce": REDUCE})

    def block(self, mean: Means, shape: tuple[int, int]) -> Block:
        return Kronecker(mean.factor(self.G), mean.factor(self.A))

    @property
    def tikhonov(self) -> bool:
        return type(self).damped is KFAC.damped and self.placement in PLAIN

    def damped(self, block: Block, damping: float) -> Block:
        return place(block, self.exponent, damping, self.placement, self.pi)

    def damped_each(self, blocks: Sequence[Block], dampings: Sequence[float]) -> list[Block]:
        if type(self).damped is not KFAC.damped:
            return super().damped_each(blocks, dampings)
        return place_each(blocks, self.exponent, dampings, self.placement, self.pi)


@dataclass(frozen=True)
class KFACReduce(KFAC, name="kfac_reduce"):
    """`F ~ G (x) A` of position means and sums: KFAC in the reduce setting."""

    weight_sharing: str = "reduce"
