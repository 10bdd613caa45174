"""How far an approximate block is from the exact one, in the Frobenius norm and in the trace."""

from __future__ import annotations

import torch
from torch import Tensor

from fisherlab.blocks import Block

# Below this relative error the three-term formula has lost half its digits to cancellation.
CANCELLATION = 1e-4
# Multiplications that recomputing the difference row by row may cost.
RECOMPUTE_BUDGET = 5e11


def relative_error(X: Block, F: Block) -> Tensor:
    """`||X - F|| / ||F||`, from `||X||^2 - 2 <X, F> + ||F||^2`; 0-d float64.

    A result below 1e-4 is recomputed from the difference itself, row by row, where that is
    affordable; elsewhere its noise is about 1e-8 in float64. A zero `F` gives 0 for a zero `X`,
    else inf.
    """
    norm = F.squared_norm()
    squared = X.squared_norm() - 2 * F.inner(X) + norm
    if squared < CANCELLATION**2 * norm and _affordable(X, F):
        squared = _difference(X, F)
    if norm == 0:
        return torch.where(squared > 0, torch.inf, 0.0).to(torch.float64)
    return (squared.clamp(min=0) / norm).sqrt()


def _affordable(X: Block, F: Block) -> bool:
    # a row of F costs two passes over its columns, one of X at most o i (o + i)
    columns = getattr(F, "columns", F.size)
    return F.size**2 * (2 * columns + sum(X.shape)) <= RECOMPUTE_BUDGET


def _difference(X: Block, F: Block) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, device=F.device)
    for (_, one), (_, two) in zip(X.rows(), F.rows(), strict=True):
        total += (one.double() - two.double()).square().sum()
    return total


def absolute_error(X: Block, F: Block) -> Tensor:
    """`||X - F||_F`, 0-d float64."""
    norm = F.squared_norm()
    return relative_error(X, F) * norm.sqrt() if norm > 0 else X.squared_norm().sqrt()


def trace_ratio(X: Block, F: Block) -> Tensor:
    """`tr X / tr F`, 0-d float64; 1 where both are zero."""
    ours, exact = X.trace(), F.trace()
    return torch.ones_like(ours) if ours == 0 and exact == 0 else ours / exact


def cosine(X: Block, F: Block) -> Tensor:
    """`<X, F> / (||X|| ||F||)`, 0-d float64; 0 where a block is zero."""
    product = F.inner(X)
    size = (X.squared_norm() * F.squared_norm()).sqrt()
    return torch.where(size > 0, product / size.clamp(min=1e-300), torch.zeros_like(size))


def scaled_error(X: Block, F: Block) -> Tensor:
    """`min_c ||c X - F|| / ||F|| = sqrt(1 - cosine^2)`: what no scalar can repair."""
    return (1 - cosine(X, F).square()).clamp(min=0).sqrt()
