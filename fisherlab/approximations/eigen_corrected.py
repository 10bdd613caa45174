"""EKFAC and TEKFAC: the eigenbasis of a Kronecker product with the exact second moments in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fisherlab.approximations.base import Approximation, Means
from fisherlab.approximations.kfac import KFAC
from fisherlab.approximations.tkfac import TKFAC
from fisherlab.blocks import Block, Eigen, Kronecker
from fisherlab.blocks.contractions import left_moment, right_moment
from fisherlab.blocks.coordinates import Identity, identity
from fisherlab.extract import LayerCapture


@dataclass(frozen=True)
class EigenCorrected(Approximation):
    """`F ~ Q diag(Lambda) Q^T`, `Q = Q_G (x) Q_A` of `factors`, `Lambda = (1/M) sum_r (Q^T u_r)^2`.

    `Lambda` is the best diagonal in its basis (George et al. 2018). Corrections known in an old
    basis are carried over by `Lambda <- (Q_G'^T Q_G)^2 Lambda ((Q_A'^T Q_A)^2)^T`, entrywise
    squares, which keeps the trace; blending them as they stand mixes two bases.

    A thin basis is that of the batch it came from. What another batch has beside it counts as well,
    isotropic for each direction of the other side, so that the trace is kept whichever batch it is.
    """

    factors: Approximation

    @property
    def sides(self) -> Mapping[str, str]:  # type: ignore[override]
        return self.factors.sides

    @property
    def origin(self) -> Approximation:
        return self.factors

    def sums(self, layer: LayerCapture) -> Mapping[str, Tensor]:
        return self.factors.sums(layer)

    def basis(self, means: Means, previous: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        product = means.block(self.factors)
        assert isinstance(product, Kronecker), f"{self.factors} makes no Kronecker product"
        (l_G, Q_G), (l_A, Q_A) = product.spectra
        # a side in its own coordinates has no vectors to keep
        bases = {"Q_G": Q_G, "Q_A": Q_A}
        kept = {key: Q for key, Q in bases.items() if not isinstance(Q, Identity)}
        return {**kept, "l_G": l_G, "l_A": l_A}

    def corrections(self, layer: LayerCapture, basis: dict[str, Tensor]) -> dict[str, Tensor]:
        Q_G, Q_A = _bases(basis)
        spectrum = layer.columns.rotated_squares(Q_G, Q_A)
        found = {"spectrum": spectrum.to(layer.dtype)}
        thin = Q_A.shape[1] < len(Q_A) or Q_G.shape[1] < len(Q_G)
        return found | _outside(layer, Q_G, Q_A, spectrum) if thin else found

    def carry(
        self, corrections: dict[str, Tensor], old: dict[str, Tensor], new: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        pairs = zip(_bases(new), _bases(old), strict=True)
        R_G, R_A = ((to.mT @ since).square() for to, since in pairs)
        return {"spectrum": R_G @ corrections["spectrum"] @ R_A.mT}

    def block(
        self, means: Means, basis: dict[str, Tensor], corrections: dict[str, Tensor]
    ) -> Block:
        # before the first second sweep: the factors' own eigenvalues, which is the factors' block
        own = basis["l_G"].clamp(min=0)[:, None] * basis["l_A"].clamp(min=0)
        spectrum = corrections.get("spectrum", own)
        tails = {key: x.to(spectrum) for key, x in corrections.items() if key in TAILS and x.any()}
        block = Eigen(basis.get("Q_G"), basis.get("Q_A"), spectrum, **tails)
        return block.of_factors(basis["l_G"], basis["l_A"])


def _bases(basis: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    Q_G, Q_A = (basis[f"Q_{s}"] if f"Q_{s}" in basis else identity(basis[f"l_{s}"]) for s in "GA")
    return Q_G, Q_A


TAILS = ("tail_G", "tail_A", "tail")


def _outside(layer: LayerCapture, Q_G: Tensor, Q_A: Tensor, inside: Tensor) -> dict[str, Tensor]:
    """The energy beside a thin basis, per direction missing; 0 for the batch the basis is of."""
    missing_A, missing_G = len(Q_A) - Q_A.shape[1], len(Q_G) - Q_G.shape[1]
    rows, columns, within = inside.sum(1), inside.sum(0), inside.sum()
    total = layer.columns.energies.sum()
    rows_all, columns_all = rows, columns
    if total - within <= 1e3 * torch.finfo(layer.dtype).eps * total:
        rest = torch.zeros_like(total)
    else:
        a, g = layer.columns.a, layer.columns.g
        if missing_A:
            rows_all = ((left_moment(a, g) @ Q_G) * Q_G).sum(0, dtype=torch.float64)
        if missing_G:
            columns_all = ((right_moment(a, g) @ Q_A) * Q_A).sum(0, dtype=torch.float64)
        rest = total - rows_all.sum() - columns_all.sum() + within
    found: dict[str, Tensor] = {}
    if missing_A:
        found["tail_G"] = (rows_all - rows).clamp(min=0) / missing_A
    if missing_G:
        found["tail_A"] = (columns_all - columns).clamp(min=0) / missing_G
    if missing_A and missing_G:
        found["tail"] = rest.clamp(min=0) / (missing_A * missing_G)
    return found


@dataclass(frozen=True)
class EKFAC(EigenCorrected, name="ekfac"):
    """`F ~ (Q_G (x) Q_A) diag(Lambda) (Q_G (x) Q_A)^T` in KFAC's eigenbasis.      TEKFAC (2.7)."""

    factors: Approximation = KFAC()


@dataclass(frozen=True)
class TEKFAC(EigenCorrected, name="tekfac"):
    """`F ~ (Q_Psi (x) Q_Phi) diag(Theta) (..)^T` in TKFAC's eigenbasis.      TEKFAC (3.1)-(3.3)."""

    factors: Approximation = TKFAC()
