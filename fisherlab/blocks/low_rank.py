"""Matrices of few directions, and the product of two factors of few rows with its inverse."""

from __future__ import annotations

import torch
from torch import Tensor

from fisherlab import doors
from fisherlab.blocks.base import Block
from fisherlab.blocks.eigen import Complement, Eigen
from fisherlab.blocks.numerics import RESIDUAL_EPS, BlockError, check_damping, check_fits, is_none
from fisherlab.blocks.serialise import remembers


@remembers("Q_G", "Q_A", "spectrum")
class LowRank(Eigen):
    """A matrix of few directions, however many examples it is made of."""

    def diagonal_of(self, other: Block) -> Tensor:
        # a direction without energy is anybody's
        energies = self.spectrum.double()
        sides = [energies.amax(side, keepdim=True) for side in (0, 1)]
        floor = (RESIDUAL_EPS * torch.finfo(self.dtype).eps) ** 2 * energies.max()
        here = (sides[0] > floor) & (sides[1] > floor)
        return super().diagonal_of(other).masked_fill(~here, 0)

    def formed_bytes(self) -> int:
        return self.memory_bytes()


@remembers("Q_G", "Q_A", "g_energies", "a_energies")
class Pair(LowRank):
    """`Q_G diag(g) Q_G^T (x) Q_A diag(a) Q_A^T`, which remembers `g` and `a` apart."""

    def __init__(self, Q_G: Tensor, Q_A: Tensor, g: Tensor, a: Tensor) -> None:
        for energies, what in ((g, "g"), (a, "a")):
            doors.tensor(energies, what, ndim=(1,), error=BlockError)
        super().__init__(Q_G, Q_A, torch.outer(g, a))
        self.g_energies, self.a_energies = g, a

    def factorwise_inverse(self, damping: float, name: str) -> Eigen:
        """`(G + damping I)^{-1} (x) (A + damping I)^{-1}`.

        Raises:
            BlockError: no damping, without which the factors have no inverse.
        """
        damping = check_damping(damping)
        if is_none(damping):
            raise BlockError(
                f"{name}'s factors have rank {len(self.g_energies)} at most, so their inverse "
                "needs damping > 0"
            )
        check_fits(damping, -2, self.dtype, name)
        along_G, along_A = damping + self.g_energies, damping + self.a_energies
        complement = Complement.of(
            (damping * along_G).reciprocal(),
            (damping * along_A).reciprocal(),
            torch.as_tensor(damping**-2, dtype=self.dtype, device=self.device),
            self.complement.missing,
        )
        return Eigen.within(self, torch.outer(along_G, along_A).reciprocal(), complement)
