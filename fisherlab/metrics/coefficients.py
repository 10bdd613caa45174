"""FNGD's per-example coefficients: how the damped inverse of a block weighs the examples."""

from __future__ import annotations

import torch
from torch import Tensor

from fisherlab.blocks.numerics import cholesky
from fisherlab.metrics.entry import entered
from fisherlab.metrics.gram import HasGram


@entered
def example_coefficients(F: HasGram, alpha: float = 0.005) -> Tensor:
    """`M v = M lambda (M lambda I + K)^{-1} 1`, `lambda = alpha ||K||_F`, `[M]` float64.

    FNGD (9), (14). 1 is the weight that SGD gives an example; an example whose gradient many others
    share is weighted down. `F` is of the empirical Fisher: one column per example.
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
    """`||v - v~|| / ||v - mean v||`, 0-d float64: what sharing `v~` loses of what `v` knows.

    0: the shared coefficients are today's; 1: no better than one factor for the whole layer.
    """
    if coefficients.shape != shared.shape:
        raise ValueError(
            f"coefficients and shared must be of the same examples, got {len(coefficients)} and "
            f"{len(shared)}"
        )
    v, kept = coefficients.double(), shared.double()
    spread = (v - v.mean()).norm()
    error = (v - kept).norm()
    return torch.where(spread > 0, error / spread.clamp(min=1e-300), error)
