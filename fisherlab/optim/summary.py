"""The lines of an optimizer's `summary()` on its damping."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fisherlab.blocks.numerics import eigh

if TYPE_CHECKING:
    import pandas as pd


def summary_row(name: str, size: int, damping: float, eigenvalues: Tensor) -> dict[str, Any]:
    """A layer's damping, relative to `tr F / N` too, and the share of eigenvalues above it.

    `eigenvalues` may leave out those that are zero.
    """
    mean = eigenvalues.sum().item() / size
    return {
        "layer": name,
        "n_parameters": size,
        "damping": damping,
        "damping_relative": damping / mean if mean > 0 else float("inf"),
        "eigenvalues_above_damping": (eigenvalues > damping).sum().item() / size,
    }


def last_steps(last: dict[str, tuple[int, float, list[Tensor]]], steps: int) -> pd.DataFrame:
    """`summary_row`s of exact blocks, from each layer's size, damping and Gram matrices `K / M`."""
    import pandas as pd

    rows = [
        summary_row(name, size, damping, torch.cat([eigh(K, name)[0] for K in grams]))
        for name, (size, damping, grams) in last.items()
    ]
    return pd.DataFrame(rows).assign(steps=steps)
