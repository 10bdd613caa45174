"""Eigenbasis alignment: how nearly an approximation's eigenvectors diagonalise the exact block."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fisherlab.blocks import Block


def diagonalisation(X: Block, F: Block) -> Tensor:
    """`||diag(Q^T F Q)||^2 / ||F||^2` in [0, 1] for the eigenvectors `Q` of `X`; 0-d float64.

    Kronecker eigenvectors for KFAC, TKFAC and their corrected forms, the identity for a diagonal;
    of a low-rank form those of its range. 1 means that only the eigenvalues of `X` can be wrong.
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
    values = F.leading_values(k)
    return max(1, int((values > 1e-12 * values[0].clamp(min=1e-300)).sum())) if len(values) else 0


def subspace_overlap(X: Block, F: Block, k: int = 10) -> Tensor:
    """`||Q_k^T V_k||_F^2 / k` in [0, 1], the leading k eigenvectors of `X` and of `F`; 0-d float64.

    k is lowered to the rank of `F`; an `X` of smaller rank misses the rest. Undefined where the
    k-th gap closes: see `spectral_gap`.
    """
    k = default_rank(F, k)
    if k == 0:
        return torch.ones((), dtype=torch.float64, device=F.device)
    factors = X.leading_factors(k)
    if factors is None:
        Q, V = _bases(X, F, k)
        products = Q @ V.mT
    else:
        products = F.leading_products(k, *factors)
    return products.double().square().sum() / k


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


def off_diagonal_mass(X: Block, F: Block) -> Tensor:
    """`1 - ||diag(Q^T F Q)||^2 / ||F||^2`: what no eigenvalues in the basis of `X` can express."""
    return 1 - diagonalisation(X, F)


@dataclass(frozen=True)
class GroupedOverlap:
    """Overlaps of eigenspaces, which are defined where single eigenvectors are not."""

    matrix: Tensor  # [I, J] in [0, 1]
    exact_values: Tensor  # [I], the mean eigenvalue of each group of F
    values: Tensor  # [J], of X
    exact_sizes: list[int]
    sizes: list[int]


def eigenvalue_groups(values: Tensor, rtol: float = 1e-3) -> list[slice]:
    """Runs of descending eigenvalues whose neighbours differ by less than `rtol`, relatively.

    Within a run the eigenvectors are any orthonormal basis of one space: LAPACK's choice, not the
    matrix's.
    """
    if not len(values):
        return []
    gaps = (values[:-1] - values[1:]) > rtol * values[:-1].abs().clamp(min=1e-300)
    starts = [0, *(int(s) + 1 for s in gaps.nonzero()[:, 0]), len(values)]
    return [slice(one, two) for one, two in pairwise(starts)]


def grouped_overlap(X: Block, F: Block, k: int = 10, rtol: float = 1e-3) -> GroupedOverlap:
    """`||V_I^T Q_J||_F / sqrt(min(|I|, |J|))` of the leading eigenspaces of `F` (down) and `X`.

    Groups of equal eigenvalues count as one space, whole: the result does not depend on the basis
    that an eigensolver picks in it. 1: the smaller space lies in the larger. Of single eigenvectors
    it is `|<v_i, q_j>|`.
    """
    # twice as many as asked for, so that the group which the k-th belongs to comes whole
    (x_values, Q), (f_values, V) = X.leading(2 * k), F.leading(2 * k)
    Q, V = Q.double().flatten(1), V.double().flatten(1)
    rows = [s for s in eigenvalue_groups(f_values, rtol) if s.start < k]
    columns = [s for s in eigenvalue_groups(x_values, rtol) if s.start < k]
    squares = (V @ Q.mT).square()
    sizes = [[s.stop - s.start for s in groups] for groups in (rows, columns)]
    matrix = torch.stack(
        [
            torch.stack(
                [squares[r, c].sum() / min(m, n) for c, n in zip(columns, sizes[1], strict=True)]
            )
            for r, m in zip(rows, sizes[0], strict=True)
        ]
    )
    return GroupedOverlap(
        matrix.sqrt().clamp(max=1),
        torch.stack([f_values[s].double().mean() for s in rows]),
        torch.stack([x_values[s].double().mean() for s in columns]),
        *sizes,
    )
