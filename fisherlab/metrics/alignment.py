"""Eigenbasis alignment: how nearly an approximation's eigenvectors diagonalise the exact block."""

from __future__ import annotations

import torch
from torch import Tensor

from fisherlab.blocks import Block


def diagonalisation(X: Block, F: Block) -> Tensor:
    """`||diag(Q^T F Q)||^2 / ||F||^2` in [0, 1] for the eigenvectors `Q` of `X`; 0-d float64.

    Kronecker eigenvectors for KFAC, TKFAC and their corrected forms, the identity for a diagonal; of
    a low-rank form those of its range. 1 means that only the eigenvalues of `X` can be wrong.
    """
    norm = F.squared_norm()
    energy = X.diagonal_of(F).double().square().sum()
    return torch.where(norm > 0, energy / norm.clamp(min=1e-300), torch.ones_like(norm))


def _bases(X: Block, F: Block, k: int) -> tuple[Tensor, Tensor]:
    (_, one), (_, two) = X.leading(k), F.leading(k)
    k = min(len(one), len(two))
    return one[:k].double().flatten(1), two[:k].double().flatten(1)


def default_rank(F: Block, k: int = 10) -> int:
    """k, or the rank of `F` where it is smaller."""
    values, _ = F.leading(k)
    return max(1, int((values > 1e-12 * values[0].clamp(min=1e-300)).sum())) if len(values) else 0


def subspace_overlap(X: Block, F: Block, k: int = 10) -> Tensor:
    """`||Q_k^T V_k||_F^2 / k` in [0, 1], the leading k eigenvectors of `X` and of `F`; 0-d float64.

    k is lowered to the rank of `F`; an `X` of smaller rank misses the rest. Undefined where the
    k-th gap closes: see `spectral_gap`.
    """
    k = default_rank(F, k)
    if k == 0:
        return torch.ones((), dtype=torch.float64, device=F.device)
    Q, V = _bases(X, F, k)
    return (Q @ V.mT).square().sum() / k


def spectral_gap(F: Block, k: int = 10) -> Tensor:
    """`(lambda_k - lambda_{k+1}) / lambda_1`; near 0 the leading k-subspace is not defined."""
    values, _ = F.leading(k + 1)
    if len(values) == 0 or values[0] == 0:
        return torch.zeros((), dtype=torch.float64, device=F.device)
    k = min(k, len(values))
    following = values[k] if len(values) > k else torch.zeros_like(values[0])
    return (values[k - 1] - following) / values[0]


def principal_angles(X: Block, F: Block, k: int = 10) -> Tensor:
    """Angles between the leading k-subspaces of `X` and `F`, radians, ascending, `[k]` float64."""
    Q, V = _bases(X, F, default_rank(F, k))
    return torch.linalg.svdvals(Q @ V.mT).clamp(max=1).arccos()


def overlap_matrix(X: Block, F: Block, k: int = 10) -> Tensor:
    """`|<v_i, q_j>|`, `[k, k]` float64: leading eigenvectors of `F` down, of `X` across."""
    Q, V = _bases(X, F, k)
    return (V @ Q.mT).abs()
