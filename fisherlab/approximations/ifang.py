"""IFANG: Eva's vectors with the damping inside the factors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fisherlab.approximations.base import Means
from fisherlab.approximations.eva import Eva
from fisherlab.blocks import Block, Eigen
from fisherlab.blocks.numerics import BlockError, check_damping


@dataclass(frozen=True)
class IFANG(Eva, name="ifang"):
    """`(lambda I + g~ g~^T)^{-1} (x) (lambda I + a~ a~^T)^{-1}` preconditions.  ANG (11)-(14).

    Alg. 1: all rows of a batch reduced to their mean, so that the inverse needs no
    more than a scalar. Undamped it is Eva's block.
    """

    @property
    def placement(self) -> str:
        return "factorwise"

    def block(
        self, means: Means, basis: dict[str, Tensor], corrections: dict[str, Tensor]
    ) -> Block:
        block = super().block(means, basis, corrections)
        assert isinstance(block, Eigen)
        return _Pair(block, means["g"], means["a"])

    def damped(self, block: Block, damping: float) -> Block:
        damping = check_damping(damping)
        assert isinstance(block, _Pair)
        if damping == 0:
            raise BlockError("IFANG's factors have rank one, so their inverse needs damping > 0")
        along_G = damping + block.g_energy
        along_A = damping + block.a_energy
        return Eigen(
            block.Q_G,
            block.Q_A,
            (1 / (along_G * along_A)).reshape(1, 1),
            (1 / (along_G * damping)).reshape(1),
            (1 / (along_A * damping)).reshape(1),
            torch.ones_like(along_G) / damping**2,
        )


class _Pair(Eigen):
    """Eva's block that remembers the lengths of its two vectors apart."""

    def __init__(self, block: Eigen, g: Tensor, a: Tensor) -> None:
        super().__init__(block.Q_G, block.Q_A, block.spectrum)
        self.g_energy, self.a_energy = g.square().sum(), a.square().sum()
