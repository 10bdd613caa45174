"""EKFAC and TEKFAC: the eigenbasis of a Kronecker product with the exact second moments in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fisherlab.approximations.base import Approximation
from fisherlab.approximations.kfac import KFAC
from fisherlab.approximations.means import Means, Sums
from fisherlab.approximations.tkfac import TKFAC
from fisherlab.blocks import Block, Kronecker
from fisherlab.blocks.energies import bases, basis_of, carried, corrected, energies
from fisherlab.blocks.factor import Factor
from fisherlab.extract import LayerCapture
from fisherlab.statistics import COLUMNS


@dataclass(frozen=True)
class EigenCorrected(Approximation):
    """`F ~ Q diag(Lambda) Q^T`, `Q = Q_G (x) Q_A` of `factors`, `Lambda = (1/M) sum_r (Q^T u_r)^2`.

    `Lambda` is the best diagonal in its basis (George et al. 2018). Corrections known in an old
    basis are carried over by `Lambda <- (Q_G'^T Q_G)^2 Lambda ((Q_A'^T Q_A)^2)^T`, entrywise
    squares, which keeps the trace; blending them as they stand mixes two bases.

    A thin basis spans the batch it came from. Gradients of later batches outside this basis are
    kept as a complement, isotropic for each direction of the other side, so the trace is preserved.

    Args:
        factors: the approximation whose Kronecker eigenbasis is corrected, such as `fl.KFAC()`.
    """

    factors: Approximation

    @property
    def needs(self) -> frozenset[str]:
        return self.factors.needs | COLUMNS

    def basis(self, mean: Means, previous: Sums | None = None) -> Sums:
        return basis_of(mean.block(self.factors))

    def decomposed(self, mean: Means) -> Sequence[Factor]:
        product = mean.block(self.factors)
        return product.factors if isinstance(product, Kronecker) else ()

    def corrections(self, layer: LayerCapture, basis: Sums) -> Sums:
        return energies(layer.columns, *bases(basis))

    def carry(self, corrections: Sums, old: Sums, new: Sums) -> Sums:
        return {"spectrum": carried(corrections["spectrum"], old, new)}

    def block(self, mean: Means, shape: tuple[int, int]) -> Block:
        return corrected(mean.basis, mean.corrections)


@dataclass(frozen=True)
class EKFAC(EigenCorrected, name="ekfac"):
    """`F ~ (Q_G (x) Q_A) diag(Lambda) (Q_G (x) Q_A)^T` in KFAC's eigenbasis.      TEKFAC (2.7)."""

    factors: Approximation = KFAC()


@dataclass(frozen=True)
class TEKFAC(EigenCorrected, name="tekfac"):
    """`F ~ (Q_Psi (x) Q_Phi) diag(Theta) (..)^T` in TKFAC's eigenbasis.      TEKFAC (3.1)-(3.3)."""

    factors: Approximation = TKFAC()
