"""How far a block is from the Hessian, and which part of it is the model's residual."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fisherlab.blocks import Block, Dense
from fisherlab.blocks.numerics import over
from fisherlab.metrics.entry import entered


@dataclass(frozen=True)
class HessianSplit:
    """`F - H = (F - G) + (G - H)`, all over `||H||`; 0-d float64.

    Args:
        error: `||F - H||`.
        gap: `||F - G||`, what separates the approximation from the Gauss-Newton matrix `G`.
        residual: `||G - H||`, the curvature of the model that the loss's gradient weighs.
        cosine: between the two parts; `error^2 = gap^2 + residual^2 + 2 cosine gap residual`.
    """

    error: Tensor
    gap: Tensor
    residual: Tensor
    cosine: Tensor


@entered
def hessian_split(F: Block, G: Block, H: Block) -> HessianSplit:
    """The error of a block against the Hessian, split at the Gauss-Newton matrix.

    Args:
        F: an approximation, or the empirical block.
        G: the block of `fisher_type="exact"`, `J^T H_f J`.
        H: the Hessian's block.

    Returns:
        The parts over `||H||` and their cosine, 0-d float64.

    Raises:
        BlockTooLarge: the matrices are past the memory budget.
    """
    f, g, h = ((X.matrix if isinstance(X, Dense) else X.dense()).double() for X in (F, G, H))
    gap, residual = f - g, g - h
    size = h.norm()
    product = over((gap * residual).sum(), gap.norm() * residual.norm())
    return HessianSplit(
        torch.linalg.norm(f - h) / size, gap.norm() / size, residual.norm() / size, product
    )
