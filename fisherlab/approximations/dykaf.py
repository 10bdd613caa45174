"""DyKAF: the Kronecker product nearest in the Frobenius norm, followed by projector splitting."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fisherlab.approximations.recursive import BatchProducts, Recursive
from fisherlab.blocks.numerics import length_of


@dataclass(frozen=True)
class DyKAF(Recursive, name="dykaf"):
    """`p s G (x) A + q F` on Kronecker products, by one split step.    Yudin et al. 2025.

    With `||G|| = ||A|| = 1` and the scale `s`, `p + q = 1`:

        K = p s G + (q/M) sum D A D^T,   G' = K / ||K||
        L = p s A + (q/M) sum D^T G D,   A' = L / ||L||
        s' = p s <G, G'> <A, A'> + (q/M) sum <G' (x) A', vec D vec D^T>

    It is the integrator of a matrix of rank one, the rearranged block, which both sides enter at
    once, as in the authors' code. One batch takes a step with `p = 0` from the identity: partial
    traces at the scale of the least Frobenius error. Steps on one block end in its
    `KroneckerOptimal`. It applies the power -1/2, as the optimizer does.

    Args:
        statistics: "per_example", or "gradient" as the optimizer has them.

    Raises:
        BlockError: an option is unknown.
    """

    def start(self, F: BatchProducts) -> tuple[Tensor, Tensor]:
        G, A = (torch.eye(d, dtype=F.dtype, device=F.device) for d in F.shape)
        return self.step(F, G, A, 0.0)

    def step(self, F: BatchProducts, G: Tensor, A: Tensor, past: float) -> tuple[Tensor, Tensor]:
        (G, of_G), (A, of_A) = _unit(G), _unit(A)
        left, right = F(G, A)
        (G_new, _), (A_new, _) = (
            _unit(past * of_G * of_A * old + (1 - past) * new)
            for old, new in ((G, left), (A, right))
        )
        kept = of_G * of_A * (G * G_new).sum() * (A * A_new).sum()
        scale = (past * kept + (1 - past) * F.inner(G_new, A_new)).clamp(min=0).sqrt()
        return scale * G_new, scale * A_new


def _unit(S: Tensor) -> tuple[Tensor, Tensor]:
    """`S / ||S||` and `||S||`; 0 stays 0."""
    length = length_of(S).to(S.dtype)
    return S * torch.where(length > 0, 1 / length, 0).to(S), length
