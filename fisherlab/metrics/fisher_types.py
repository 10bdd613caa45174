"""Monte-Carlo against the exact Fisher of the same batch: how the distance falls with the draws."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fisherlab.blocks import BlockError, Outer
from fisherlab.metrics.entry import entered


@dataclass(frozen=True)
class Convergence:
    """Distances after 1 .. S draws, and the law they follow."""

    errors: Tensor  # ||F_s - F|| / ||F||, [S], of the first s draws
    expected: Tensor  # c / sqrt(s), [S]

    @property
    def one_draw(self) -> Tensor:
        """`c`, the root-mean-square distance of one draw: `c^2` draws per unit of squared error."""
        return self.expected[0]


@entered
def mc_convergence(mc: Outer, exact: Outer) -> Convergence:
    """`||F_s - F|| / ||F||` for the first s of S draws of one capture, and `c / sqrt(s)`.

    `F_s = (1/s) sum_{r <= s} F^(r)`; all S distances come from one Gram matrix. `c^2` is the mean
    of `||F^(r) - F||^2 / ||F||^2` over the draws, which are unbiased and independent.

    Args:
        mc: the exact block of an "mc" capture with S draws per example.
        exact: the block of an "exact" capture of the same batch.

    Returns:
        Distances and their law, `[S]` each.
    """
    draws, n = mc.g.shape[:2]
    if exact.shape != mc.shape or exact.g.shape[1] != n:
        raise BlockError(
            f"the blocks are of {n} and {exact.g.shape[1]} examples and of shapes {mc.shape} and "
            f"{exact.shape}: capture the same batch and layer twice"
        )
    # a capture of S draws carries 1/sqrt(S) inside each column: one draw alone is S times as large
    scale = draws * mc.core
    K = mc.gram().view(draws, n, draws, n)
    pairs = scale**2 * K.square().sum((1, 3))
    products = scale * exact.column_quadratics(mc.a, mc.g).sum(1)
    norm = exact.squared_norm()
    s = torch.arange(1, draws + 1, dtype=torch.float64, device=K.device)
    inside = pairs.cumsum(0).cumsum(1).diagonal() / s.square()
    squared = (inside - 2 * products.cumsum(0) / s + norm).clamp(min=0) / norm
    single = (pairs.diagonal() - 2 * products + norm).mean().clamp(min=0) / norm
    return Convergence(squared.sqrt(), (single / s).sqrt())
