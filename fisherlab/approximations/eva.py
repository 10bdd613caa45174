"""Eva: one Kronecker pair of vectors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fisherlab.approximations.base import Approximation, Means
from fisherlab.blocks import Block, Eigen
from fisherlab.blocks.numerics import BESIDE
from fisherlab.blocks.serialise import remembers
from fisherlab.extract import LayerCapture


@dataclass(frozen=True)
class Eva(Approximation, name="eva"):
    """`F ~ (gbar gbar^T) (x) (abar abar^T)`.      FNGD fig. 2; Zhang et al. 2023.

    `abar = mean_{n,t} a`, `gbar = mean_n sum_t g` at the *observed* labels for every Fisher type:
    under mc the mean gradient has expectation 0, under exact its columns have no sign.
    """

    needs = frozenset({"mean_input_sum", "label_gradient_sum"})

    def sums(self, layer: LayerCapture) -> dict[str, Tensor]:
        share = layer.column_share
        return {
            "a": share * layer.mean_input_sum,
            "g": share * layer.label_gradient_sum,
        }

    def block(
        self, means: Means, basis: dict[str, Tensor], corrections: dict[str, Tensor]
    ) -> Block:
        (g, g_energy), (a, a_energy) = _direction(means["g"]), _direction(means["a"])
        return LowRank(g[:, None], a[:, None], (g_energy * a_energy).reshape(1, 1))


@remembers("Q_G", "Q_A", "spectrum")
class LowRank(Eigen):
    """A matrix of few directions, however many examples it is made of."""

    def diagonal_of(self, other: Block) -> Tensor:
        # a direction without energy is anybody's
        energies = self.spectrum.double()
        sides = [energies.amax(side, keepdim=True) for side in (0, 1)]
        floor = (BESIDE * torch.finfo(self.dtype).eps) ** 2 * energies.max()
        here = (sides[0] > floor) & (sides[1] > floor)
        return super().diagonal_of(other).masked_fill(~here, 0)

    def formed_bytes(self) -> int:
        return self.memory_bytes()


def _direction(vector: Tensor) -> tuple[Tensor, Tensor]:
    """The unit vector and the squared length; any unit vector for zero."""
    energy = vector.square().sum()
    if energy == 0:
        return torch.eye(len(vector), dtype=vector.dtype, device=vector.device)[0], energy
    return vector / energy.sqrt(), energy
