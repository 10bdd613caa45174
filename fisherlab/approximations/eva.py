"""Eva: one Kronecker pair of vectors."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from fisherlab.approximations.base import Approximation
from fisherlab.approximations.means import Means
from fisherlab.blocks import Block
from fisherlab.blocks.low_rank import LowRank
from fisherlab.statistics import MeanGradient, MeanInput, Statistic


@dataclass(frozen=True)
class Eva(Approximation, name="eva"):
    """`F ~ (gbar gbar^T) (x) (abar abar^T)`.      FNGD fig. 2; Zhang et al. 2023.

    `abar = mean_{n,t} a`, `gbar = mean_n sum_t g` at the *observed* labels for every Fisher type:
    under mc the mean gradient has expectation 0, under exact its columns have no sign.

    Args:
        a: statistic of `abar` `[i]`.
        g: statistic of `gbar` `[o]`.
    """

    _: KW_ONLY
    a: Statistic = MeanInput()
    g: Statistic = MeanGradient()

    def block(self, mean: Means, shape: tuple[int, int]) -> Block:
        (g, g_energy), (a, a_energy) = direction(mean(self.g)), direction(mean(self.a))
        return LowRank(g[:, None], a[:, None], (g_energy * a_energy).reshape(1, 1))


def direction(vector: Tensor) -> tuple[Tensor, Tensor]:
    """The unit vector and the squared length; any unit vector for zero."""
    energy = vector.square().sum()
    some = torch.eye(1, len(vector), dtype=vector.dtype, device=vector.device)[0]
    return torch.where(energy == 0, some, vector / energy.sqrt()), energy
