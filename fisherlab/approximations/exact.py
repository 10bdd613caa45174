"""The block itself."""

from __future__ import annotations

from dataclasses import dataclass

from fisherlab.approximations.base import Approximation
from fisherlab.blocks import BlockError, Outer
from fisherlab.blocks.columns import joined
from fisherlab.extract import LayerCapture
from fisherlab.extract.joint import one_sample


@dataclass(frozen=True)
class Exact(Approximation, name="exact"):
    """`F = (1/M) U U^T`, of the examples at hand.      FNGD (3), NGM (38).

    Matrix-free, at any size; its `power(-1, lambda)` is the Woodbury step of TENGraD, SMW-NGD and
    FNGD. It has no memory: the blocks of two batches together need the columns of both.
    """

    additive = False

    def of_batch(self, layers: tuple[LayerCapture, ...]) -> Outer:
        layers = one_sample(layers)
        if len(layers) == 1 and layers[0].whole:
            return Outer.over(layers[0].columns)
        of = joined([layer.columns for layer in layers])
        return Outer.over(of, 1 / sum(layer.examples for layer in layers))

    def __call__(self, *layers: LayerCapture) -> Outer:
        """The block of the examples of all captures together."""
        if not layers:
            raise BlockError("Exact() needs at least one LayerCapture")
        return self.of_batch(layers)
