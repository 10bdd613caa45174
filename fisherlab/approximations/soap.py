"""SOAP's preconditioner: Shampoo's eigenbasis with the exact second moments in it."""

from __future__ import annotations

from dataclasses import dataclass

from fisherlab.approximations.base import Approximation
from fisherlab.approximations.eigen_corrected import EigenCorrected
from fisherlab.approximations.means import Sums
from fisherlab.approximations.shampoo import Shampoo
from fisherlab.blocks import Block
from fisherlab.blocks.energies import bases, gradient_energies
from fisherlab.extract import LayerCapture
from fisherlab.statistics import COLUMNS


@dataclass(frozen=True)
class SOAP(EigenCorrected, name="soap"):
    """`F ~ (Q_L (x) Q_R) diag(V) (Q_L (x) Q_R)^T`, Shampoo's eigenbasis.      Vyas et al. 2024.

    `L = (1/M) sum D D^T`, `R = (1/M) sum D^T D`,  `V = (1/M) sum (Q_L^T D Q_R)^2` entrywise.

    With per-example gradients it is TEKFAC with partial traces: the factors of TKFAC are multiples
    of `L` and `R`. `SOAP(Shampoo(statistics="gradient"))` has the moments of the mean gradient `D`
    of each batch at the observed labels, as the optimizer does; its `V` is `(Q_L^T D Q_R)^2`. It
    applies the power -1/2.
    """

    exponent = -0.5
    factors: Approximation = Shampoo()

    @property
    def of_gradient(self) -> bool:
        """Whether the moments are those of a batch's mean gradient."""
        return "gradient" in self.factors.needs

    @property
    def needs(self) -> frozenset[str]:
        return self.factors.needs | (frozenset() if self.of_gradient else COLUMNS)

    def corrections(self, layer: LayerCapture, basis: Sums) -> Sums:
        if not self.of_gradient:
            return super().corrections(layer, basis)
        return gradient_energies(layer.gradient, layer.examples, *bases(basis))

    def damped(self, block: Block, damping: float) -> Block:
        return block.power(self.exponent, damping)
