"""EKFAC and TEKFAC: the eigenbasis of a Kronecker product with the exact second moments in it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fisherlab.approximations.base import Approximation, Means
from fisherlab.approximations.kfac import KFAC
from fisherlab.approximations.tkfac import TKFAC
from fisherlab.blocks import Block, Eigen, Kronecker
from fisherlab.blocks.contractions import left_moment
from fisherlab.blocks.numerics import spectral
from fisherlab.extract import LayerCapture


@dataclass(frozen=True)
class EigenCorrected(Approximation):
    """`F ~ Q diag(Lambda) Q^T`, `Q = Q_G (x) Q_A` of `factors`, `Lambda = (1/M) sum_r (Q^T u_r)^2`.

    `Lambda` is the best diagonal in its basis (George et al. 2018). Corrections known in an old
    basis are carried over by `Lambda <- (Q_G'^T Q_G)^2 Lambda ((Q_A'^T Q_A)^2)^T`, entrywise
    squares, which keeps the trace; blending them as they stand mixes two bases.

    A thin input basis is that of the batch it came from. What another batch has beside it counts
    as well, isotropic for each output direction, so that the trace is kept whichever batch it is.
    """

    factors: Approximation

    @property
    def origin(self) -> Approximation:
        return self.factors

    def sums(self, layer: LayerCapture) -> dict[str, Tensor]:
        return self.factors.sums(layer)

    def basis(self, means: Means, previous: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        product = means.block(self.factors)
        assert isinstance(product, Kronecker), f"{self.factors} makes no Kronecker product"
        l_G, Q_G = spectral(product.G, "output factor G")
        l_A, Q_A = spectral(product.A, "input factor A")
        return {"Q_G": Q_G, "Q_A": Q_A, "l_G": l_G, "l_A": l_A}

    def corrections(self, layer: LayerCapture, basis: dict[str, Tensor]) -> dict[str, Tensor]:
        Q_G, Q_A = basis["Q_G"], basis["Q_A"]
        spectrum = layer.columns.rotated_squares(Q_G, Q_A)
        found = {"spectrum": spectrum.to(layer.dtype)}
        missing = len(Q_A) - Q_A.shape[1]
        if missing:
            found["rest"] = _outside(layer, Q_G, spectrum) / missing
        return found

    def carry(
        self, corrections: dict[str, Tensor], old: dict[str, Tensor], new: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        R_G = (new["Q_G"].mT @ old["Q_G"]).square()
        R_A = (new["Q_A"].mT @ old["Q_A"]).square()
        return {"spectrum": R_G @ corrections["spectrum"] @ R_A.mT}

    def block(
        self, means: Means, basis: dict[str, Tensor], corrections: dict[str, Tensor]
    ) -> Block:
        # before the first second sweep: the factors' own eigenvalues, which is the factors' block
        own = basis["l_G"].clamp(min=0)[:, None] * basis["l_A"].clamp(min=0)
        spectrum, rest = corrections.get("spectrum", own), corrections.get("rest")
        tail = None if rest is None or not rest.any() else rest.to(spectrum)
        return Eigen(basis["Q_G"], basis["Q_A"], spectrum, tail_G=tail)


def _outside(layer: LayerCapture, Q_G: Tensor, inside: Tensor) -> Tensor:
    """The energy of each output direction beside a thin input basis; 0 for the batch it is of."""
    total = layer.columns.energies.sum()
    if total - inside.sum() <= 1e3 * torch.finfo(layer.dtype).eps * total:
        return inside.new_zeros(len(inside))
    left = left_moment(layer.columns.a, layer.columns.g)
    energies = ((left @ Q_G) * Q_G).sum(0, dtype=torch.float64)
    return (energies - inside.sum(1)).clamp(min=0)


@dataclass(frozen=True)
class EKFAC(EigenCorrected, name="ekfac"):
    """`F ~ (Q_G (x) Q_A) diag(Lambda) (Q_G (x) Q_A)^T` in KFAC's eigenbasis.      TEKFAC (2.7)."""

    factors: Approximation = KFAC()


@dataclass(frozen=True)
class TEKFAC(EigenCorrected, name="tekfac"):
    """`F ~ (Q_Psi (x) Q_Phi) diag(Theta) (..)^T` in TKFAC's eigenbasis.      TEKFAC (3.1)-(3.3)."""

    factors: Approximation = TKFAC()
