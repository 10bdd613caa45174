"""Eigenbasis alignment: how nearly an approximation's eigenvectors diagonalise the exact block."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fisherlab.blocks import Block, ColumnSum, DirectSum, Eigen, Outer, OuterSum
from fisherlab.blocks.numerics import check_dense, check_finite, over, svdvals
from fisherlab.metrics.entry import entered


@entered
def diagonalisation(X: Block, F: Block) -> Tensor:
    """`||diag(Q^T F Q)||^2 / ||F||^2` in [0, 1] for the eigenvectors `Q` of `X`.

    `Q` are Kronecker eigenvectors for KFAC, TKFAC and their corrected forms, the identity for a
    diagonal block, and the range of a low-rank block.

    Args:
        X: the approximation.
        F: the exact block, in the shape of `X`.

    Returns:
        0-d float64. 1: only the eigenvalues of `X` can be wrong. NaN if `F` has energy in a null
        space of `X`, or more than one eigenvalue in a space where those of `X` are equal: the value
        would depend on the eigensolver's choice of a basis there.

    Example:
        >>> import torch
        >>> from fisherlab import blocks, metrics
        >>> F = blocks.Dense(torch.tensor([[2.0, 1.0], [1.0, 2.0]]), (1, 2))
        >>> X = blocks.Diagonal(torch.tensor([[2.0, 2.0]]))
        >>> round(float(metrics.diagonalisation(X, F)), 3)
        0.8
    """
    norm = F.squared_norm()
    energy = X.diagonal_of(F).double().square().sum()
    if X.chosen(F) > torch.finfo(X.dtype).eps ** 0.5 * norm:
        return torch.full_like(energy, math.nan)
    return over(energy, norm, 1.0)


def _leading(F: Block, k: int) -> Tensor:
    """The k largest eigenvalues of a block that has some; NaN would compare as none."""
    values = F.leading_values(k)
    check_finite(values, repr(F), "leading eigenvectors")
    return values


def default_rank(F: Block, k: int = 10) -> int:
    """k, or the number of eigenvectors that `F` defines: eigenvalues above its rounding."""
    values = _leading(F, k) if k else torch.zeros(0, device="cpu")
    _check_beside(F)
    # beside negative ones of another size the largest is rounding
    if not len(values) or values[0] <= _noise(F) * F.squared_norm().sqrt():
        return 0
    return int((values > _noise(F) * values[0]).sum())


# Eigenvalues nearer to each other than this, relatively, count as equal.
EQUAL = 1e-4
# An eigenvalue above this many times its rounding has an eigenvector to two digits.
SURE = 10.0


def _defined(X: Block, F: Block, k: int) -> int:
    """A rank of `F`, lowered to its last gap; 0 where `F` or `X` defines no such subspace."""
    values = _leading(F, k + 1)
    while k and not _ends(values, k, _rounding(F)):
        k -= 1
    if not k:
        return 0
    share, rounding = values[k - 1] / values[0], _rounding(X)
    values = _leading(X, k + 1)
    _check_beside(X)
    if len(values) < k and X.eigenvalues()[len(values)] > rounding * X.eigenvalues()[0]:
        return 0  # the following lie beside the range, where they are all equal
    if len(values) < k or values[k - 1].abs() <= rounding * values[0]:
        # directions of F are missed, or the rounding of X hides whether they are
        return k if share > rounding else 0
    return k if _ends(values, k, rounding) else 0


def _ends(values: Tensor, k: int, rounding: float) -> bool:
    """Whether a gap behind the k-th of descending eigenvalues defines the leading k-subspace."""
    if len(values) <= k:
        return True
    gap = values[k - 1] - values[k]
    return bool(gap > EQUAL * values[k - 1].abs() and gap > rounding * values[0])


def _check_beside(block: Block) -> None:
    """Refuse a block whose largest eigenvalues have no vectors: they lie beside its range."""
    parts = block.parts if isinstance(block, DirectSum | ColumnSum) else (block,)
    if not any(map(_has_beside, parts)):
        return
    every, inside = block.eigenvalues(), block.leading_values(block.size)
    # a range of nothing is beside all
    first = inside if len(inside) else torch.zeros_like(every[:1])
    if bool((every[: len(first)] > first * (1 + 1e-6)).any()):
        raise ValueError(
            f"some of the largest eigenvalues of this {block!r} lie beside its range: nothing "
            "defines their vectors; pass blocks.Dense(block.dense(), block.shape)"
        )


def _has_beside(block: Block) -> bool:
    """Whether there are eigenvalues above 0 beside a range."""
    if isinstance(block, Outer | OuterSum):
        return bool(block.shift)
    return isinstance(block, Eigen) and not block.confined


def _noise(block: Block) -> float:
    """Share of the largest eigenvalue below which an eigenvector is an eigensolver's choice."""
    return max(1e-8, _rounding(block) / SURE)


def _rounding(block: Block) -> float:
    """Share of the largest eigenvalue below which one has no eigenvector to two digits."""
    part = block.parts[0] if isinstance(block, DirectSum) else block
    # an exact block knows its eigenvalues, relatively, from a Gram matrix in float64
    return 0.0 if isinstance(part, Outer) else SURE * torch.finfo(part.dtype).eps


def _products(X: Block, F: Block, k: int) -> Tensor:
    """`V_k^T Q_k`, `[k, k]` float64: eigenvectors of `F` down, of `X` across.

    Every form follows one rule. An eigenvector that a block does not define is a row or a column of
    zeros, even where an eigensolver would return some basis of the null space.
    """
    rows, columns = default_rank(F, k), default_rank(X, k)
    check_dense(k, torch.float64, F.device, "overlap matrix")
    products = torch.zeros(k, k, dtype=torch.float64, device=F.device)
    if not rows or not columns:
        return products
    factors = X.leading_factors(columns)
    if factors is not None:
        found = F.leading_products(rows, *(q.to(F.dtype) for q in factors))
    else:
        Q, V = (B.leading(r)[1].double().flatten(1) for B, r in ((X, columns), (F, rows)))
        found = V @ Q.mT
    products[:rows, :columns] = found.double()
    return products


@entered
def subspace_overlap(X: Block, F: Block, k: int = 10) -> Tensor:
    """`||Q_k^T V_k||_F^2 / k` in [0, 1] for the leading k eigenvectors of `X` and of `F`.

    Args:
        X: the approximation; directions that a smaller rank misses count as 0.
        F: the exact block, in the shape of `X`.
        k: number of eigenvectors, lowered to the rank of `F`, then to its last gap: a part of a
            space of equal eigenvalues (to 1e-4) is an eigensolver's choice.

    Returns:
        0-d float64. NaN where the leading eigenvalues of `F` are all equal, or `X` has no gap
        behind its k-th eigenvalue, or rounding hides its eigenvectors: see `spectral_gap`.

    Example:
        >>> import torch
        >>> from fisherlab import blocks, metrics
        >>> F = blocks.Diagonal(torch.tensor([[4.0, 2.0, 1.0]]))
        >>> X = blocks.Diagonal(torch.tensor([[4.0, 1.0, 2.0]]))
        >>> round(float(metrics.subspace_overlap(X, F, k=2)), 3)
        0.5
    """
    rank = default_rank(F, k)
    if not rank:
        return torch.ones((), dtype=torch.float64, device=F.device)
    k = _defined(X, F, rank)
    if not k:
        return torch.full((), math.nan, dtype=torch.float64, device=F.device)
    # vectors that are orthonormal up to rounding may seem to hold more than the whole
    return (_products(X, F, k).square().sum() / k).clamp(max=1)


@entered
def spectral_gap(F: Block, k: int = 10) -> Tensor:
    """`(lambda_k - lambda_{k+1}) / lambda_1`; near 0 the leading k-subspace is not defined.

    Args:
        F: a block.
        k: index of the eigenvalue, lowered to the rank of `F` as in `subspace_overlap`.

    Returns:
        0-d float64.

    Example:
        >>> import torch
        >>> from fisherlab import blocks, metrics
        >>> F = blocks.Diagonal(torch.tensor([[4.0, 3.0, 1.0]]))
        >>> round(float(metrics.spectral_gap(F, k=2)), 3)
        0.5
    """
    values = _leading(F, k + 1)
    k = default_rank(F, k)
    if k == 0:
        return torch.zeros((), dtype=torch.float64, device=F.device)
    # a block may have fewer vectors than eigenvalues: those beside its range are 0 or lower
    known = len(values) > k and bool(values[k] >= 0)
    following = values[k] if known else F.eigenvalues()[k : k + 1].sum()
    return (values[k - 1] - following) / values[0]


@entered
def principal_angles(X: Block, F: Block, k: int = 10) -> Tensor:
    """Angles between the leading k-subspaces of `X` and `F`.

    Args:
        X: the approximation; the angle to a direction that a smaller rank misses is `pi / 2`.
        F: the exact block, in the shape of `X`.
        k: number of eigenvectors, lowered as in `subspace_overlap`.

    Returns:
        `[k]` float64, radians, ascending; NaN where `subspace_overlap` is.

    Example:
        >>> import torch
        >>> from fisherlab import blocks, metrics
        >>> F = blocks.Diagonal(torch.tensor([[4.0, 2.0, 1.0]]))
        >>> X = blocks.Diagonal(torch.tensor([[4.0, 1.0, 2.0]]))
        >>> metrics.principal_angles(X, F, k=2).round(decimals=3).tolist()
        [0.0, 1.571]
    """
    rank = default_rank(F, k)
    k = _defined(X, F, rank)
    if rank and not k:
        return torch.full((rank,), math.nan, dtype=torch.float64, device=F.device)
    return svdvals(_products(X, F, k), "overlaps").clamp(max=1).arccos()


@entered
def overlap_matrix(X: Block, F: Block, k: int = 10) -> Tensor:
    """`|<v_i, q_j>|`: leading eigenvectors of `F` down, of `X` across.

    Args:
        X: the approximation.
        F: the exact block, in the shape of `X`.
        k: number of eigenvectors.

    Returns:
        `[k, k]` float64. A row or column is zero if the rank of its block is smaller than its
        index.
    """
    return _products(X, F, k).abs().clamp(max=1)


@entered
def off_diagonal_mass(X: Block, F: Block) -> Tensor:
    """`1 - ||diag(Q^T F Q)||^2 / ||F||^2`: the share that no eigenvalues in `X`'s basis express.

    Args:
        X: the approximation, with eigenvectors `Q`.
        F: the exact block, in the shape of `X`.

    Returns:
        0-d float64 in [0, 1]; NaN as in `diagonalisation`.
    """
    return (1 - diagonalisation(X, F)).clamp(min=0)


@dataclass(frozen=True)
class GroupedOverlap:
    """Overlaps of eigenspaces, which are defined where single eigenvectors are not."""

    matrix: Tensor  # [I, J] in [0, 1]
    exact_values: Tensor  # [I], the mean eigenvalue of each group of F
    values: Tensor  # [J], of X
    exact_sizes: list[int]
    sizes: list[int]


@entered
def eigenvalue_groups(values: Tensor, rtol: float = 1e-3) -> list[slice]:
    """Runs of descending eigenvalues whose neighbours differ by less than `rtol`, relatively.

    Within a run the eigenvectors are any orthonormal basis of one space. LAPACK chooses it, not the
    matrix.

    Args:
        values: `[N]`, descending.
        rtol: the largest relative difference of neighbours in a run.

    Returns:
        The runs as slices of `values`.

    Example:
        >>> import torch
        >>> from fisherlab import metrics
        >>> metrics.alignment.eigenvalue_groups(torch.tensor([2.0, 2.0, 1.0]))
        [slice(0, 2, None), slice(2, 3, None)]
    """
    if not len(values):
        return []
    check_finite(values, "values", "groups")
    gaps = (values[:-1] - values[1:]) > rtol * values[:-1].abs().clamp(min=1e-300)
    starts = [0, *(int(s) + 1 for s in gaps.nonzero()[:, 0]), len(values)]
    return [slice(one, two) for one, two in pairwise(starts)]


@entered
def grouped_overlap(X: Block, F: Block, k: int = 10, rtol: float = 1e-3) -> GroupedOverlap:
    """`||V_I^T Q_J||_F / sqrt(min(|I|, |J|))` of the leading eigenspaces of `F` (down) and `X`.

    Groups of equal eigenvalues count as one whole space, so the result does not depend on the
    eigensolver's basis. The null space of either block is no group. For single eigenvectors it is
    `|<v_i, q_j>|`.

    Args:
        X: the approximation.
        F: the exact block, in the shape of `X`.
        k: number of leading eigenvectors.
        rtol: the largest relative difference of neighbours in a group.

    Returns:
        The overlaps; 1: the smaller space lies in the larger.
    """
    (x_values, columns), (f_values, rows) = (_groups(B, k, rtol) for B in (X, F))
    sizes = [[s.stop - s.start for s in groups] for groups in (rows, columns)]
    matrix = torch.zeros(len(rows), len(columns), dtype=torch.float64, device=F.device)
    if rows and columns:
        squares = _products(X, F, max(len(x_values), len(f_values))).square()
        for i, r in enumerate(rows):
            for j, c in enumerate(columns):
                matrix[i, j] = squares[r, c].sum() / min(sizes[0][i], sizes[1][j])
    return GroupedOverlap(
        matrix.sqrt().clamp(max=1),
        _group_means(f_values, rows),
        _group_means(x_values, columns),
        *sizes,
    )


def _group_means(values: Tensor, groups: list[slice]) -> Tensor:
    return torch.stack([values[s].mean() for s in groups]) if groups else values[:0]


def _groups(block: Block, k: int, rtol: float) -> tuple[Tensor, list[slice]]:
    """Leading eigenvalues and the groups of them that start before the k-th, each whole."""
    asked = 2 * k
    while True:
        values = block.leading_values(asked)[: default_rank(block, asked)]
        groups = [s for s in eigenvalue_groups(values, rtol) if s.start < k]
        # the last group may go on beyond what was asked for
        if len(values) < asked or not groups or groups[-1].stop < asked:
            stop = groups[-1].stop if groups else 0
            return values[:stop], groups
        asked *= 2
