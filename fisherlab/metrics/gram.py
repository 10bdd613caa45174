"""Gram matrices of per-example gradients: correlations, classes, layers (FNGD fig. 3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fisherlab import doors
from fisherlab.blocks import Block, DirectSum, Outer
from fisherlab.blocks.columns import Columns
from fisherlab.blocks.numerics import over
from fisherlab.metrics.entry import entered


class HasGram(Protocol):
    """Anything with a Gram matrix: an exact block, a direct sum of them, a layer capture."""

    def gram(self) -> Tensor:
        """`U^T U`, `[R, R]`."""
        ...


class HasColumns(Protocol):
    """Anything with per-example gradients, such as a layer capture."""

    @property
    def columns(self) -> Columns:
        """The per-example gradients."""
        ...


@entered
def gram_correlation(F: HasGram) -> Tensor:
    """`U^T U` scaled to unit diagonal.      FNGD fig. 3.

    A column with zero gradient has row 0 and diagonal 1; `zero_gradients` counts them.

    Args:
        F: a capture or an exact block with `R` columns.

    Returns:
        `[R, R]` float64.

    Example:
        >>> import torch
        >>> from fisherlab import blocks, metrics
        >>> a, g = torch.tensor([[[1.0, 0.0]], [[1.0, 1.0]]]), torch.ones(1, 2, 1, 1)
        >>> metrics.gram_correlation(blocks.Outer(a, g)).round(decimals=3).tolist()
        [[1.0, 0.707], [0.707, 1.0]]
    """
    K = F.gram().double()
    norms = K.diagonal().clamp(min=0).sqrt()
    scale = over(torch.ones_like(norms), norms)
    correlation = (K * scale[:, None] * scale).clamp(-1, 1)
    return correlation.fill_diagonal_(1)


@entered
def zero_gradients(F: HasGram) -> int:
    """The number of columns of `U` that are zero.

    Args:
        F: a capture or an exact block.

    Returns:
        A count of columns.
    """
    return int((F.gram().diagonal() == 0).sum())


@entered
def class_means(correlation: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean correlation of distinct examples within a class and between classes.

    Args:
        correlation: `[M, M]`, from `gram_correlation`.
        labels: `[M]`, the class of each example.

    Returns:
        Two 0-d float64 tensors: within, between.

    Example:
        >>> import torch
        >>> from fisherlab import metrics
        >>> K = torch.tensor([[1.0, 0.8, 0.1], [0.8, 1.0, 0.3], [0.1, 0.3, 1.0]])
        >>> within, between = metrics.class_means(K, torch.tensor([0, 0, 1]))
        >>> round(float(within), 3), round(float(between), 3)
        (0.8, 0.2)
    """
    if len(labels) != len(correlation):
        raise ValueError(
            f"labels must be those of the {len(correlation)} examples, got {len(labels)}"
        )
    same = labels[:, None] == labels
    distinct = ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    return _mean(correlation[same & distinct]), _mean(correlation[~same])


def _mean(values: Tensor) -> Tensor:
    return values.double().mean()


@entered
def similarity(one: Tensor, two: Tensor) -> Tensor:
    """Cosine of the centred off-diagonal entries of two correlation matrices.

    Args:
        one: `[M, M]`, of one layer.
        two: `[M, M]`, of another layer on the same examples.

    Returns:
        0-d float64.
    """
    if one.shape != two.shape:
        raise ValueError(f"one and two must have one size, got {len(one)} and {len(two)}")
    keep = ~torch.eye(len(one), dtype=torch.bool, device=one.device)
    a, b = (x[keep].double() - _mean(x[keep]) for x in (one, two))
    return over((a * b).sum(), a.norm() * b.norm())


def diagonal_share(F: Outer | DirectSum | HasColumns) -> Tensor:
    """`sum_n ||F_n||^2 / sum_{n,k} <F_n, F_k>` of the examples' own blocks: the batch's noise.

    It does not depend on the root of the Hessian that the columns are. It is computed in tiles of
    examples, for any number of them.

    Args:
        F: a capture, or an exact block.

    Returns:
        0-d float64.
    """
    parts = F.parts if isinstance(F, DirectSum) else (F,)
    sums = [_columns(part).pair_sums for part in parts]
    own = torch.stack([own.sum() for _, own in sums]).sum()
    total = torch.stack([rows.sum() for rows, _ in sums]).sum()
    return over(own, total, 1.0)


def _columns(F: Any) -> Columns:
    columns = getattr(F, "columns", None)
    if isinstance(columns, Columns) and (isinstance(F, Outer) or not isinstance(F, Block)):
        return columns
    raise TypeError(f"F must be an exact block or a capture, got {doors.said(F)}")


@entered
def similarity_matrix(correlations: Sequence[Tensor]) -> Tensor:
    """`similarity` between every two correlation matrices.

    Args:
        correlations: L matrices `[M, M]` on the same examples.

    Returns:
        `[L, L]` float64.
    """
    keep = ~torch.eye(len(correlations[0]), dtype=torch.bool, device=correlations[0].device)
    rows = torch.stack([x.double()[keep] for x in correlations])
    rows = rows - rows.mean(1, keepdim=True)
    rows = over(rows, rows.norm(dim=1, keepdim=True))
    return rows @ rows.mT


@entered
def adjacent_similarity(similarities: Tensor) -> tuple[Tensor, Tensor]:
    """Mean similarity of adjacent layers, and of all other pairs.

    Args:
        similarities: `[L, L]`, from `similarity_matrix`.

    Returns:
        Two 0-d float64 tensors: adjacent, other; the latter is NaN for two layers.
    """
    distance = torch.arange(len(similarities), device=similarities.device)
    distance = (distance[:, None] - distance).abs()
    return _mean(similarities[distance == 1]), _mean(similarities[distance > 1])


@entered
def by_class(labels: Tensor) -> Tensor:
    """The order that groups the examples by class; within a class the order stays.

    Args:
        labels: `[M]`, the class of each example.

    Returns:
        `[M]` indices into the batch.

    Example:
        >>> import torch
        >>> from fisherlab import metrics
        >>> metrics.by_class(torch.tensor([1, 0, 1, 0])).tolist()
        [1, 3, 0, 2]
    """
    return labels.argsort(stable=True)
