"""Gram matrices of per-example gradients: correlations, classes, layers (FNGD fig. 3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fisherlab import doors
from fisherlab.blocks import Block, DirectSum, Outer
from fisherlab.blocks.columns import Columns
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
    """`U^T U` scaled to unit diagonal, `[R, R]` float64.      FNGD fig. 3.

    A column with zero gradient has row 0 and diagonal 1; `zero_gradients` counts them.
    """
    K = F.gram().double()
    norms = K.diagonal().clamp(min=0).sqrt()
    scale = torch.where(norms > 0, 1 / norms, torch.zeros_like(norms))
    correlation = (K * scale[:, None] * scale).clamp(-1, 1)
    return correlation.fill_diagonal_(1)


@entered
def zero_gradients(F: HasGram) -> int:
    """How many columns of `U` are zero."""
    return int((F.gram().diagonal() == 0).sum())


@entered
def class_means(correlation: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean correlation of distinct examples within a class and between classes, float64."""
    if len(labels) != len(correlation):
        raise ValueError(
            f"labels must be those of the {len(correlation)} examples, got {len(labels)}"
        )
    same = labels[:, None] == labels
    distinct = ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    return correlation[same & distinct].mean(), correlation[~same].mean()


@entered
def similarity(one: Tensor, two: Tensor) -> Tensor:
    """Cosine of the centred off-diagonal entries of two correlation matrices; 0-d float64."""
    if one.shape != two.shape:
        raise ValueError(f"one and two must have one size, got {len(one)} and {len(two)}")
    keep = ~torch.eye(len(one), dtype=torch.bool, device=one.device)
    a, b = (x[keep] - x[keep].mean() for x in (one, two))
    return (a * b).sum() / (a.norm() * b.norm()).clamp(min=1e-300)


def diagonal_share(F: Outer | DirectSum | HasColumns) -> Tensor:
    """`sum_n ||F_n||^2 / sum_{n,k} <F_n, F_k>` of the examples' own blocks: the batch's noise.

    Whatever root of the Hessian the columns are. In tiles of examples, at any number of them.
    """
    parts = F.parts if isinstance(F, DirectSum) else (F,)
    sums = [_columns(part).pair_sums for part in parts]
    own = torch.stack([own.sum() for _, own in sums]).sum()
    total = torch.stack([rows.sum() for rows, _ in sums]).sum()
    return torch.where(total > 0, own / total, torch.ones_like(total))


def _columns(F: Any) -> Columns:
    columns = getattr(F, "columns", None)
    if isinstance(columns, Columns) and (isinstance(F, Outer) or not isinstance(F, Block)):
        return columns
    raise TypeError(f"F must be an exact block or a capture, got {doors.said(F)}")


@entered
def similarity_matrix(correlations: Sequence[Tensor]) -> Tensor:
    """`similarity` between every two correlation matrices, `[L, L]` float64."""
    keep = ~torch.eye(len(correlations[0]), dtype=torch.bool, device=correlations[0].device)
    rows = torch.stack([x.double()[keep] for x in correlations])
    rows = rows - rows.mean(1, keepdim=True)
    rows = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-300)
    return rows @ rows.mT


@entered
def adjacent_similarity(similarities: Tensor) -> tuple[Tensor, Tensor]:
    """Mean similarity of adjacent layers, and of all other pairs (NaN for two layers); float64."""
    distance = torch.arange(len(similarities), device=similarities.device)
    distance = (distance[:, None] - distance).abs()
    return similarities[distance == 1].mean(), similarities[distance > 1].mean()


@entered
def by_class(labels: Tensor) -> Tensor:
    """The order that puts examples of one class side by side, as given within a class."""
    return labels.argsort(stable=True)
