"""KL-Shampoo: the fixed point of the Kullback-Leibler divergence, followed batch by batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fisherlab import doors
from fisherlab.approximations.recursive import BatchProducts, Recursive, trace_kept
from fisherlab.blocks import BlockError
from fisherlab.blocks.numerics import cholesky


@dataclass(frozen=True)
class KLShampoo(Recursive, name="kl_shampoo"):
    """`G <- p G + (q/i) (1/M) sum D A^{-1} D^T`, `A` likewise from the old `G`.    Lin et al. 2025.

        A <- p A + (q/o) (1/M) sum D^T G^{-1} D,   p + q = 1

    Both factors step at once; at rest on one block they are `KLOptimal`'s. The first batch takes a
    step with `p = 0` from TKFAC's product, which is exact where F is a Kronecker product; the
    authors' code starts at `L / i` and `R / o`, whose product is on no scale of F. It applies the
    power -1/2, as the optimizer does.

    Args:
        statistics: "per_example", or "gradient" as the optimizer has them.
        ridge: share of a factor's mean eigenvalue that its inverse adds to it, positive.

    Raises:
        BlockError: an option is unknown or out of its range.
    """

    ridge: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        doors.number(self.ridge, "ridge of KLShampoo", above=0.0, error=BlockError)

    def start(self, F: BatchProducts) -> tuple[Tensor, Tensor]:
        return self.step(F, *trace_kept(F), 0.0)

    def step(self, F: BatchProducts, G: Tensor, A: Tensor, past: float) -> tuple[Tensor, Tensor]:
        o, i = F.shape
        left, right = F(self._inverse(G, "G"), self._inverse(A, "A"))
        return past * G + (1 - past) / i * left, past * A + (1 - past) / o * right

    def _inverse(self, S: Tensor, name: str) -> Tensor:
        """`(S + ridge tr(S) / d I)^{-1}`; 0 of a factor that is 0."""
        ridge = self.ridge * S.trace() / len(S)
        if not ridge > 0:
            return torch.zeros_like(S)
        eye = torch.eye(len(S), dtype=S.dtype, device=S.device)
        return torch.cholesky_inverse(cholesky(S + ridge * eye, f"KL-Shampoo's factor {name}"))
