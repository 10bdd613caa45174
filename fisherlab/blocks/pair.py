"""A product of two factors of few rows, whose damped inverse is known in their eigenvectors."""

from __future__ import annotations

import torch
from torch import Tensor

from fisherlab.blocks.eigen import Eigen
from fisherlab.blocks.numerics import BlockError, check_damping
from fisherlab.blocks.serialise import remembers


@remembers("Q_G", "Q_A", "g_energies", "a_energies")
class Pair(Eigen):
    """`Q_G diag(g) Q_G^T (x) Q_A diag(a) Q_A^T`, which remembers `g` and `a` apart."""

    def __init__(self, Q_G: Tensor, Q_A: Tensor, g: Tensor, a: Tensor) -> None:
        super().__init__(Q_G, Q_A, torch.outer(g, a))
        self.g_energies, self.a_energies = g, a

    def factorwise_inverse(self, damping: float, name: str) -> Eigen:
        """`(G + damping I)^{-1} (x) (A + damping I)^{-1}`.

        Raises:
            BlockError: no damping, without which the factors have no inverse.
        """
        damping = check_damping(damping)
        if damping == 0:
            raise BlockError(
                f"{name}'s factors have rank {len(self.g_energies)} at most, so their inverse "
                "needs damping > 0"
            )
        along_G, along_A = damping + self.g_energies, damping + self.a_energies
        return Eigen(
            self.Q_G,
            self.Q_A,
            torch.outer(along_G, along_A).reciprocal(),
            (damping * along_G).reciprocal(),
            (damping * along_A).reciprocal(),
            self.spectrum.new_tensor(damping**-2),
        )
