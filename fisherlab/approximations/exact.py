"""The block itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fisherlab.approximations.base import Approximation
from fisherlab.blocks import BlockError, Outer
from fisherlab.extract import LayerCapture


@dataclass(frozen=True)
class Exact(Approximation, name="exact"):
    """`F = (1/M) U U^T`, of the examples at hand.      FNGD (3), NGM (38).

    Matrix-free, at any size; its `power(-1, lambda)` is the Woodbury step of TENGraD, SMW-NGD and
    FNGD. It has no memory: the blocks of two batches together need the columns of both.
    """

    additive = False

    def of_batch(self, layers: tuple[LayerCapture, ...]) -> Outer:
        if len(layers) == 1 and layers[0].column_share == 1:
            columns = layers[0].columns
            return Outer(columns.a, columns.g, columns=columns)
        return Outer(*_joined(layers), core=1 / sum(layer.examples for layer in layers))

    def __call__(self, *layers: LayerCapture) -> Outer:
        """The block of the examples of all captures together."""
        if not layers:
            raise BlockError("Exact() needs at least one LayerCapture")
        return self.of_batch(layers)


def _joined(layers: tuple[LayerCapture, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """The columns of every capture side by side; missing positions or columns are zeros."""
    m = max(layer.columns_per_example for layer in layers)
    t = max(layer.positions for layer in layers)
    a = [F.pad(x, (0, 0, 0, t - x.shape[1])) for x in (layer.inputs for layer in layers)]
    gradients = (layer.output_gradients for layer in layers)
    g = [F.pad(x, (0, 0, 0, t - x.shape[2], 0, 0, 0, m - x.shape[0])) for x in gradients]
    return torch.cat(a), torch.cat(g, 1)
