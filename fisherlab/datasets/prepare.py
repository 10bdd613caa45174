"""Loaders share splits by a local generator, and scales read off the training set alone."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from fisherlab.datasets.card import Card
from fisherlab.datasets.registry import Dataset

SEED = 0
TEST_SHARE = 0.2
SPLIT = "ours: shuffled with seed 0, 80 % to train and 20 % to test"
STRATIFIED = SPLIT + ", of every class (rounded in favour of train)"


def as_dataset(card: Card, features: np.ndarray, targets: np.ndarray) -> Dataset:
    """Shuffle, split and standardise a table: `features [n, i]`, labels or numbers `[n]`.

    A NaN is a gap in the measurements: it gets the training mean of its column.
    """
    x, y = torch.tensor(features).double(), torch.tensor(targets)
    if card.task == "classification":
        y = y.long()
        train, test = split(len(x), y)
        x = standardise(x, train)
        return Dataset(TensorDataset(x[train], y[train]), TensorDataset(x[test], y[test]), card)
    y = y.double()[:, None]
    train, test = split(len(x))
    x = standardise(x, train)
    mean, std = location_and_scale(y[train])
    y = ((y - mean) / std).float()
    return Dataset(
        TensorDataset(x[train], y[train]),
        TensorDataset(x[test], y[test]),
        card,
        target_mean=mean.item(),
        target_std=std.item(),
    )


def split(n: int, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Indices of train and test, shuffled; the same for the same data, whatever was drawn before.

    With `labels [n]` every class is split by itself, so that a class of two rows is in train.
    """
    order = torch.randperm(n, generator=torch.Generator().manual_seed(SEED))
    if labels is None:
        groups = [order]
    else:
        groups = [order[labels[order] == label] for label in labels.unique()]
    held_out = torch.zeros(n, dtype=torch.bool)
    for group in groups:
        held_out[group[: int(TEST_SHARE * len(group))]] = True
    return order[~held_out[order]], order[held_out[order]]


def standardise(x: Tensor, train: Tensor) -> Tensor:
    """Columns of `x [n, i]` with mean 0 and deviation 1 on the rows `train`; NaN becomes 0."""
    mean, std = location_and_scale(x[train])
    return ((x - mean) / std).nan_to_num(nan=0.0).float()


def location_and_scale(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of every column of `x [n, i]`, NaN left out; 1 for a constant column."""
    mean = x.nanmean(0)
    std = (x - mean).square().nanmean(0).sqrt()
    # A constant column is constant up to the rounding of its mean.
    constant = std <= 1e-12 * mean.abs().clamp(min=1.0)
    return mean, torch.where(constant, 1.0, std)
