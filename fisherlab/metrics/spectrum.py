"""Spectra: effective rank, condition number, cumulative trace."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from fisherlab.blocks import Block
from fisherlab.blocks.numerics import over
from fisherlab.metrics.entry import entered


class HasEigenvalues(Protocol):
    """Anything with eigenvalues: a block, or the Fisher of a network."""

    @property
    def size(self) -> int:
        """N, the side of the matrix."""
        ...

    def eigenvalues(self) -> Tensor:
        """The eigenvalues; those that are left out are 0."""
        ...


@entered
def effective_rank(F: Block) -> Tensor:
    """`exp(entropy of eigenvalues / tr F)`, between 1 and the rank.

    Args:
        F: a block.

    Returns:
        0-d float64; 0 if `F = 0`.

    Example:
        >>> import torch
        >>> from fisherlab import blocks, metrics
        >>> F = blocks.Diagonal(torch.tensor([[2.0, 2.0, 0.0]]))
        >>> round(float(metrics.effective_rank(F)), 3)
        2.0
    """
    values = F.eigenvalues().clamp(min=0)
    total = values.sum()
    if total == 0:
        return torch.zeros_like(total)
    p = values[values != 0] / total
    return (-(p * p.log()).sum()).exp()


@entered
def participation_ratio(F: Block) -> Tensor:
    """`(tr F)^2 / ||F||^2`, between 1 and the rank.

    Args:
        F: a block.

    Returns:
        0-d float64; 0 if `F = 0`.

    Example:
        >>> import torch
        >>> from fisherlab import blocks, metrics
        >>> F = blocks.Diagonal(torch.tensor([[3.0, 1.0]]))
        >>> round(float(metrics.participation_ratio(F)), 3)
        1.6
    """
    norm = F.squared_norm()
    return over(F.trace().square(), norm)


@entered
def condition_number(F: Block, damping: float) -> Tensor:
    """`(max + damping) / (min + damping)` of the eigenvalues.

    Args:
        F: a block.
        damping: lambda, absolute, on the scale of `F`.

    Returns:
        0-d float64.

    Example:
        >>> import torch
        >>> from fisherlab import blocks, metrics
        >>> F = blocks.Diagonal(torch.tensor([[3.0, 0.0]]))
        >>> round(float(metrics.condition_number(F, damping=1.0)), 3)
        4.0
    """
    values = F.eigenvalues().clamp(min=0)
    return (values[0] + damping) / (values[-1] + damping)


@entered
def condition_curve(F: Block, dampings: Sequence[float]) -> Tensor:
    """`condition_number` at each damping, from one spectrum.

    Args:
        F: a block.
        dampings: values of lambda, absolute, on the scale of `F`.

    Returns:
        `[len(dampings)]` float64.

    Example:
        >>> import torch
        >>> from fisherlab import blocks, metrics
        >>> F = blocks.Diagonal(torch.tensor([[3.0, 0.0]]))
        >>> metrics.condition_curve(F, [1.0, 3.0]).tolist()
        [4.0, 2.0]
    """
    values = F.eigenvalues().clamp(min=0)
    shifts = torch.as_tensor(dampings, dtype=torch.float64, device=values.device)
    return (values[0] + shifts) / (values[-1] + shifts)


@entered
def cumulative_trace(F: Block) -> Tensor:
    """Share of the trace in the k largest eigenvalues.

    Args:
        F: a block.

    Returns:
        `[N]` float64, for k = 1 .. N.

    Example:
        >>> import torch
        >>> from fisherlab import blocks, metrics
        >>> F = blocks.Diagonal(torch.tensor([[3.0, 1.0]]))
        >>> metrics.cumulative_trace(F).tolist()
        [0.75, 1.0]
    """
    values = F.eigenvalues().clamp(min=0)
    return values.cumsum(0) / values.sum().clamp(min=1e-300)


@entered
def spectral_density(F: HasEigenvalues, grid: Tensor, width: float) -> Tensor:
    """`(1/N) sum_k N(t; f_k, width^2)` at each `t`, over all N eigenvalues `f_k` of F.

    It is exact, where Lanczos quadrature estimates it (curvlinops, through
    `fl.adapters.as_curvlinops_operator`).

    Args:
        F: a block, or `fl.network.NetworkFisher`.
        grid: `[T]`, where the density is wanted.
        width: standard deviation of the normal density in place of each eigenvalue, positive.

    Returns:
        `[T]` float64, which integrates to 1.

    Example:
        >>> import torch
        >>> from fisherlab import blocks, metrics
        >>> F = blocks.Diagonal(torch.tensor([[2.0, 2.0, 0.0]]))
        >>> metrics.spectral_density(F, torch.tensor([0.0, 2.0]), 0.1).round(decimals=2).tolist()
        [1.33, 2.66]
    """
    values, at = F.eigenvalues().double(), grid.double()[:, None]

    def bumps(centres: Tensor) -> Tensor:
        return torch.exp(-(((at - centres) / width) ** 2) / 2).sum(1)

    zeros = F.size - len(values)
    total = bumps(values) + zeros * bumps(values.new_zeros(1))
    return total / (F.size * width * math.sqrt(2 * math.pi))
