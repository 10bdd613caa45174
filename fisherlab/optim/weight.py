"""The trainable matrix of one layer, as an optimizer sees it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Weight:
    """The trainable matrix of one layer: its parameters, and the group that the weight is in."""

    name: str
    module: nn.Module
    weight: nn.Parameter
    bias: nn.Parameter | None
    group: int

    @property
    def groups(self) -> int:
        """Groups of a convolution, which are slices of the rows."""
        return getattr(self.module, "groups", 1)

    @property
    def size(self) -> int:
        """Parameters of the matrix."""
        return self.weight.numel() + (0 if self.bias is None else self.bias.numel())

    @property
    def keys(self) -> list[str]:
        """The names of its captures: one per group."""
        k = self.groups
        return [f"{self.name}:{j}" for j in range(k)] if k > 1 else [self.name]

    def is_in(self, model: nn.Module) -> bool:
        """Whether the model still has the layer, and the layer this weight."""
        # a parametrized layer keeps its weight elsewhere
        if self.module._parameters.get("weight", self.weight) is not self.weight:
            return False
        at: Any = model
        for part in self.name.split(".") if self.name else ():
            at = at._modules.get(part) if at is not None else None
        return at is self.module or any(module is self.module for module in model.modules())

    def gradient(self) -> Tensor | None:
        """`[weight | bias]` of `.grad`, `[o, i]`; None where there is none."""
        if self.weight.grad is None:
            return None
        found = {self.weight: self.weight.grad}
        if self.bias is not None:
            bias = self.bias.grad
            found[self.bias] = torch.zeros_like(self.bias) if bias is None else bias
        return self.joined(found)

    def joined(self, tensors: dict[nn.Parameter, Tensor]) -> Tensor:
        """One tensor per parameter as the matrix `[weight | bias]`, `[o, i]`."""
        matrix = tensors[self.weight].flatten(1)
        if self.bias is None:
            return matrix
        return torch.cat([matrix, tensors[self.bias][:, None]], 1)

    def split(self, matrix: Tensor) -> dict[nn.Parameter, Tensor]:
        """The matrix as one tensor per parameter."""
        if self.bias is None:
            return {self.weight: matrix.reshape(self.weight.shape)}
        return {
            self.weight: matrix[:, :-1].reshape(self.weight.shape),
            self.bias: matrix[:, -1].contiguous(),
        }


def has_gradient(weight: Weight) -> bool:
    """Whether a layer took part: `zero_grad(set_to_none=False)` leaves zeros where not."""
    gradient = weight.weight.grad
    return gradient is not None and bool((gradient != 0).any())


def undelivered(name: str) -> str:
    """What to look for when a layer has a gradient that no hook saw."""
    return (
        f"layer {name!r} has a gradient but delivered nothing; no parameter was changed. Usual "
        "causes: the optimizer was made after this forward pass; the model was compiled before "
        "the optimizer was made; the loop calls "
        "model.forward or a part of the model; the layer runs inside activation checkpointing"
    )
