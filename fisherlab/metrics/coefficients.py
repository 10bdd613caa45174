"""FNGD's per-example coefficients: how the damped inverse of a block weighs the examples."""

from __future__ import annotations

import torch
from torch import Tensor

from fisherlab.blocks.numerics import cholesky, over
from fisherlab.metrics.entry import entered
from fisherlab.metrics.gram import HasGram


@entered
def example_coefficients(F: HasGram, alpha: float = 0.005) -> Tensor:
    """`M v = M lambda (M lambda I + K)^{-1} 1`, `lambda = alpha ||K||_F`.      FNGD (9), (14).

    SGD gives each example the weight 1. An example is weighted down if its gradient resembles many
    others.

    Args:
        F: a capture or exact block of the empirical Fisher: one column per example.
        alpha: the damping relative to the norm of the Gram matrix `K`.

    Returns:
        `[M]` float64.
    """
    K = F.gram().double()
    M = len(K)
    damping = alpha * K.norm()
    ones = torch.ones(M, 1, dtype=torch.float64, device=K.device)
    if damping == 0:
        return ones[:, 0]
    kernel = K + M * damping * torch.eye(M, dtype=torch.float64, device=K.device)
    root = cholesky(kernel, "damped Gram matrix")
    return M * damping * torch.cholesky_solve(ones, root)[:, 0]


@entered
def coefficient_drift(coefficients: Tensor, shared: Tensor) -> Tensor:
    """`||v - v~|| / ||v - mean v||`: the loss from sharing `v~`, relative to what `v` knows.

    Args:
        coefficients: `v` `[M]` of the current batch.
        shared: `v~` `[M]`, the shared coefficients.

    Returns:
        0-d float64. 0: the shared coefficients equal the current ones. 1: they are no better than
        one factor for the whole layer.
    """
    if coefficients.shape != shared.shape:
        raise ValueError(
            f"coefficients and shared must be of the same examples, got {len(coefficients)} and "
            f"{len(shared)}"
        )
    v, kept = coefficients.double(), shared.double()
    spread = (v - v.mean()).norm()
    error = (v - kept).norm()
    return torch.where(spread == 0, error, over(error, spread))
