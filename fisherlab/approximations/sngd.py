"""SNGD's local Fisher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fisherlab.approximations.base import Approximation, Means
from fisherlab.blocks import Block, Kronecker
from fisherlab.extract import LayerCapture


@dataclass(frozen=True)
class SNGD(Approximation, name="sngd"):
    """`F ~ I (x) nu A`,  `A = E[a a^T]`,  `nu = E f'(s)` of the activation fed.      SNGD (12).

    It has no output gradients in it, so it is not on the scale of `F`: read its cosine and its
    scaled error only.
    """

    needs = frozenset({"inputs", "outputs"})
    sides: ClassVar[Mapping[str, str]] = {"A": "input"}

    def sums(self, layer: LayerCapture) -> dict[str, Tensor]:
        A = layer.input_moment * (layer.column_share / layer.positions)
        one = torch.ones((), dtype=A.dtype, device=A.device)
        return {
            "A": A,
            "slope": layer.activation_slope * layer.examples,
            "identity": one * layer.examples * layer.shape[0],
        }

    def diagonals(self, layer: LayerCapture) -> dict[str, Tensor]:
        share = layer.column_share / layer.positions
        return {"A": share * layer.inputs.square().sum((0, 1))}

    def block(
        self, means: Means, basis: dict[str, Tensor], corrections: dict[str, Tensor]
    ) -> Block:
        A = means["A"]
        size = int(means["identity"].round().item())
        return Kronecker(torch.ones(size, dtype=A.dtype, device=A.device), means["slope"].to(A) * A)
