"""How far an approximate block is from the exact one, in the Frobenius norm and in the trace."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from fisherlab.blocks import Block, DirectSum
from fisherlab.blocks.numerics import over
from fisherlab.metrics.entry import entered

# Below this relative error the three-term formula has lost too many digits to cancellation: its
# squares are right to about 1e-6 in float32, so that an error of 0.01 was off by 0.4 %.
CANCELLATION = {torch.float64: 1e-4, torch.float32: 3e-2}
# Multiplications that recomputing the difference row by row may cost.
RECOMPUTE_BUDGET = 5e11


class Pair:
    """Two blocks, with their inner product found once for all that is made of it."""

    def __init__(self, X: Block, F: Block) -> None:
        self.X, self.F, self.same = X, F, same(X, F)

    @cached_property
    def product(self) -> Tensor:
        """`<X, F>`."""
        return self.norm if self.same else self.F.inner(self.X)

    @cached_property
    def norm(self) -> Tensor:
        """`||F||^2`."""
        return self.F.squared_norm()

    @cached_property
    def own_norm(self) -> Tensor:
        """`||X||^2`."""
        return self.norm if self.same else self.X.squared_norm()

    @property
    def relative_error(self) -> Tensor:
        """`relative_error(X, F)`."""
        if self.same:
            return torch.zeros_like(self.norm)
        squared = self.own_norm - 2 * self.product + self.norm
        if self.norm == 0:
            return torch.where(squared > 0, torch.inf, 0 * squared)
        if _cancelled(squared / self.norm, self.X, self.F):
            squared = _difference(self.X, self.F)
        return (squared.clamp(min=0) / self.norm).sqrt()

    @property
    def cosine(self) -> Tensor:
        """`cosine(X, F)`."""
        # the root of each: their product may pass the range
        size = self.own_norm.sqrt() * self.norm.sqrt()
        return over(self.product, size)

    @property
    def scaled_error(self) -> Tensor:
        """`scaled_error(X, F)`."""
        if self.same:
            return over(0 * self.norm, self.norm, 1.0)
        squared = 1 - self.cosine.square()
        if _cancelled(squared, self.X, self.F):
            squared = _difference(self.X, self.F, self.product / self.own_norm) / self.norm
        return squared.clamp(min=0).sqrt()


@entered
def relative_error(X: Block, F: Block) -> Tensor:
    """`||X - F|| / ||F||`, from `||X||^2 - 2 <X, F> + ||F||^2`.

    A result below 1e-4 (1e-2 for float32 blocks) is recomputed row by row from the difference
    itself, where that is affordable. Elsewhere its noise is about 1e-8 in float64.

    Args:
        X: the approximation.
        F: the exact block, in the shape of `X`.

    Returns:
        0-d float64. If `F` is zero: 0 for a zero `X`, else inf.

    Example:
        >>> import torch
        >>> from fisherlab import blocks, metrics
        >>> F = blocks.Diagonal(torch.tensor([[4.0, 3.0]]))
        >>> X = blocks.Diagonal(torch.tensor([[4.0, 0.0]]))
        >>> round(float(metrics.relative_error(X, F)), 3)
        0.6
    """
    return Pair(X, F).relative_error


def same(X: Block, F: Block) -> bool:
    """Whether they are one block, or direct sums of the same."""
    if isinstance(X, DirectSum) and X.parted_as(F):
        return all(x is f for x, f in zip(X.parts, F.parts, strict=True))
    return X is F


def _cancelled(share: Tensor, X: Block, F: Block) -> bool:
    if share >= CANCELLATION.get(F.dtype, 3e-2) ** 2:
        return False
    # a row of F costs two passes over its columns, one of X at most o i (o + i)
    columns = getattr(F, "num_columns", F.size)
    return F.size**2 * (2 * columns + sum(X.shape)) <= RECOMPUTE_BUDGET


def _difference(X: Block, F: Block, scale: Tensor | float = 1.0) -> Tensor:
    """`||scale X - F||^2`, row by row."""
    total = torch.zeros((), dtype=torch.float64, device=F.device)
    for (_, one), (_, two) in zip(X.rows(), F.rows(), strict=True):
        total += (scale * one.double() - two.double()).square().sum()
    return total


@entered
def absolute_error(X: Block, F: Block) -> Tensor:
    """`||X - F||_F`.

    Args:
        X: the approximation.
        F: the exact block, in the shape of `X`.

    Returns:
        0-d float64, on the scale of `F`.

    Example:
        >>> import torch
        >>> from fisherlab import blocks, metrics
        >>> F = blocks.Diagonal(torch.tensor([[4.0, 1.0]]))
        >>> X = blocks.Diagonal(torch.tensor([[1.0, 1.0]]))
        >>> round(float(metrics.absolute_error(X, F)), 3)
        3.0
    """
    norm = F.squared_norm()
    return X.squared_norm().sqrt() if norm == 0 else relative_error(X, F) * norm.sqrt()


@entered
def trace_ratio(X: Block, F: Block) -> Tensor:
    """`tr X / tr F`.

    Args:
        X: the approximation.
        F: the exact block, in the shape of `X`.

    Returns:
        0-d float64; 1 if both traces are zero.

    Example:
        >>> import torch
        >>> from fisherlab import blocks, metrics
        >>> F = blocks.Diagonal(torch.tensor([[3.0, 1.0]]))
        >>> X = blocks.Diagonal(torch.tensor([[1.0, 1.0]]))
        >>> float(metrics.trace_ratio(X, F))
        0.5
    """
    ours, exact = X.trace(), F.trace()
    return torch.ones_like(ours) if ours == 0 and exact == 0 else ours / exact


@entered
def cosine(X: Block, F: Block) -> Tensor:
    """`<X, F> / (||X|| ||F||)`.

    Args:
        X: the approximation.
        F: the exact block, in the shape of `X`.

    Returns:
        0-d float64; 0 if a block is zero.

    Example:
        >>> import torch
        >>> from fisherlab import blocks, metrics
        >>> F = blocks.Diagonal(torch.tensor([[4.0, 3.0]]))
        >>> X = blocks.Diagonal(torch.tensor([[4.0, 0.0]]))
        >>> round(float(metrics.cosine(X, F)), 3)
        0.8
    """
    return Pair(X, F).cosine


@entered
def scaled_error(X: Block, F: Block) -> Tensor:
    """`min_c ||c X - F|| / ||F|| = sqrt(1 - cosine^2)`: the error that no scalar repairs.

    It is recomputed from the difference where `relative_error` would be.

    Args:
        X: the approximation.
        F: the exact block, in the shape of `X`.

    Returns:
        0-d float64.

    Example:
        >>> import torch
        >>> from fisherlab import blocks, metrics
        >>> F = blocks.Diagonal(torch.tensor([[4.0, 3.0]]))
        >>> X = blocks.Diagonal(torch.tensor([[40.0, 0.0]]))
        >>> round(float(metrics.scaled_error(X, F)), 3)
        0.6
    """
    return Pair(X, F).scaled_error
