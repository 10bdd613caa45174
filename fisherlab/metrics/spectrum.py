"""Spectra: effective rank, condition number, cumulative trace."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fisherlab.blocks import Block
from fisherlab.metrics.entry import entered


@entered
def effective_rank(F: Block) -> Tensor:
    """`exp(entropy of eigenvalues / tr F)`, between 1 and the rank; 0-d float64, 0 if `F = 0`."""
    values = F.eigenvalues().clamp(min=0)
    total = values.sum()
    if total == 0:
        return torch.zeros_like(total)
    p = values[values > 0] / total
    return (-(p * p.log()).sum()).exp()


@entered
def participation_ratio(F: Block) -> Tensor:
    """`(tr F)^2 / ||F||^2`, between 1 and the rank; 0-d float64, 0 for a zero block."""
    norm = F.squared_norm()
    return torch.where(
        norm > 0, F.trace().square() / norm.clamp(min=1e-300), torch.zeros_like(norm)
    )


@entered
def condition_number(F: Block, damping: float) -> Tensor:
    """`(max + damping) / (min + damping)` of the eigenvalues; 0-d float64."""
    values = F.eigenvalues().clamp(min=0)
    return (values[0] + damping) / (values[-1] + damping)


@entered
def condition_curve(F: Block, dampings: Sequence[float]) -> Tensor:
    """`condition_number` at each damping, `[len(dampings)]` float64, from one spectrum."""
    values = F.eigenvalues().clamp(min=0)
    shifts = torch.as_tensor(dampings, dtype=torch.float64, device=values.device)
    return (values[0] + shifts) / (values[-1] + shifts)


@entered
def cumulative_trace(F: Block) -> Tensor:
    """Share of the trace in the k largest eigenvalues, `[N]` float64."""
    values = F.eigenvalues().clamp(min=0)
    return values.cumsum(0) / values.sum().clamp(min=1e-300)
