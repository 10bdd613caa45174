"""SNGD's local Fisher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fisherlab.approximations.base import Approximation, Later, Means
from fisherlab.approximations.kfac import KFAC
from fisherlab.blocks import Block, BlockError, Kronecker
from fisherlab.blocks.moment import Moment, scaled
from fisherlab.extract import LayerCapture


@dataclass(frozen=True)
class SNGD(Approximation, name="sngd"):
    """`F ~ I (x) nu A`,  `A = E[a a^T]`,  `nu = E f'(s)` of the activation fed.      SNGD (12).

    It has no output gradients in it, so it is not on the scale of `F`: read its cosine and its
    scaled error only. A layer that feeds no element-wise function has no `nu` and no block: it is a
    row of NaN in a comparison, and takes its plain gradient in an optimizer, which says so.
    """

    needs = frozenset({"inputs", "activation_slope"})
    sides: ClassVar[Mapping[str, str]] = {"A": "input"}

    def sums(self, layer: LayerCapture) -> Mapping[str, Tensor]:
        if layer.without_slope:
            raise BlockError(layer.without_slope)
        one = torch.ones((), dtype=layer.dtype, device=layer.device)
        return Later(
            A=lambda: layer.input_moment * (layer.column_share / layer.positions),
            slope=lambda: layer.activation_slope * layer.examples,
            identity=lambda: one * layer.examples * layer.shape[0],
        )

    def moments(self, layer: LayerCapture) -> dict[str, Moment]:
        return {key: S for key, S in KFAC().moments(layer).items() if key == "A"}

    def diagonals(self, layer: LayerCapture) -> dict[str, Tensor]:
        share = layer.column_share / layer.positions
        return {"A": share * layer.weighed(layer.inputs).square().sum((0, 1))}

    def block(
        self, means: Means, basis: dict[str, Tensor], corrections: dict[str, Tensor]
    ) -> Block:
        A = means.factor("A")
        size = int(means["identity"].round().item())
        identity = torch.ones(size, dtype=A.dtype, device=A.device)
        return Kronecker(identity, scaled(A, means["slope"].to(identity)))
