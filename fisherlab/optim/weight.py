"""The trainable matrix of one layer, as an optimizer sees it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from fisherlab.extract import select
from fisherlab.extract.assemble import Form, Piece, pieces
from fisherlab.extract.geometry import CONVOLUTIONS, TRANSPOSED, Geometry
from fisherlab.extract.tape import Call, Use


@dataclass(frozen=True)
class Weight:
    """The trainable matrix of one layer: its parameters, and the group that the weight is in.

    `geometry` says how the parameters make `[o, i]`; the groups of a convolution are slices of the
    rows.
    """

    name: str
    module: nn.Module
    weight: nn.Parameter
    bias: nn.Parameter | None
    group: int
    geometry: Geometry
    local: str = "weight"

    @property
    def groups(self) -> int:
        """Groups of a convolution, which are slices of the rows."""
        return self.geometry.groups

    @property
    def is_linear(self) -> bool:
        """Whether it is no convolution."""
        return self.geometry.conv is None and self.geometry.transposed is None

    @property
    def shape(self) -> tuple[int, int]:
        """`(o, i)` of the matrix of all groups, the bias included."""
        return (
            self.groups * self.geometry.out_features,
            self.geometry.in_features + self.geometry.bias,
        )

    @property
    def size(self) -> int:
        """Parameters of the matrix."""
        return self.weight.numel() + (0 if self.bias is None else self.bias.numel())

    @property
    def keys(self) -> list[str]:
        """The names of its captures: one per group."""
        k = self.groups
        return [f"{self.name}:{j}" for j in range(k)] if k > 1 else [self.name]

    @property
    def form(self) -> Form:
        """The form of its captures."""
        return Form(self.geometry, self.bias)

    def pieces(self, calls: Iterable[Call], n: int) -> tuple[list[Piece], str]:
        """The calls of a batch of `n` in the form of the weight, or why they have none."""
        try:
            return [piece for call in calls for piece in pieces(call, self.form, n)], ""
        except ValueError as error:
            return [], str(error)

    def is_in(self, model: nn.Module) -> bool:
        """Whether the model still has the layer, and the layer this weight."""
        # a parametrized layer keeps its weight elsewhere
        if self.module._parameters.get(self.local, self.weight) is not self.weight:
            return False
        at: Any = model
        path = self.name if self.local == "weight" else self.name.rpartition(".")[0]
        for part in path.split(".") if path else ():
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

    def matrix(self, tensor: Tensor) -> Tensor:
        """A tensor of the weight's shape as `[o, i]`, all groups one below the other."""
        if not self.geometry.flipped:
            return tensor.reshape(-1, self.geometry.in_features)
        i, o = self.geometry.in_features, self.geometry.out_features
        return tensor.reshape(self.groups, i, o).mT.reshape(-1, i)

    def joined(self, tensors: dict[nn.Parameter, Tensor]) -> Tensor:
        """One tensor per parameter as the matrix `[weight | bias]`, `[o, i]`."""
        matrix = self.matrix(tensors[self.weight])
        if self.bias is None:
            return matrix
        return torch.cat([matrix, tensors[self.bias][:, None]], 1)

    def split(self, matrix: Tensor) -> dict[nn.Parameter, Tensor]:
        """The matrix as one tensor per parameter."""
        weight = matrix if self.bias is None else matrix[:, :-1]
        if self.geometry.flipped:
            i = self.geometry.in_features
            weight = weight.reshape(self.groups, -1, i).mT
        found = {self.weight: weight.reshape(self.weight.shape)}
        if self.bias is not None:
            found[self.bias] = matrix[:, -1].contiguous()
        return found

    @classmethod
    def known(cls, owner: select.Weight, where: dict[nn.Parameter, int]) -> Weight | None:
        """The matrix of a module that torch itself calls; None where only a call will tell."""
        parameter, module = owner.tensor, owner.module
        if not isinstance(parameter, nn.Parameter) or isinstance(parameter, UninitializedParameter):
            return None
        bias: Any = None
        if owner.local == "weight" and isinstance(module, (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)):
            geometry = Geometry.of(module, True)
            bias = module.bias if geometry.bias else None
        elif owner.local == "in_proj_weight" and isinstance(module, nn.MultiheadAttention):
            geometry, bias = Geometry(parameter.shape[1], len(parameter), True), module.in_proj_bias
        else:
            return None
        bias = bias if isinstance(bias, nn.Parameter) and bias.requires_grad else None
        bias = bias if bias in where else None
        geometry = replace(geometry, bias=bias is not None)
        return cls(owner.name, module, parameter, bias, where[parameter], geometry, owner.local)

    @classmethod
    def used(cls, owner: select.Weight, use: Use, where: dict[nn.Parameter, int]) -> Weight | None:
        """The matrix that a call shows; None for a parameter without a group."""
        parameter, bias = owner.tensor, use.bias
        if not isinstance(parameter, nn.Parameter) or parameter not in where:
            return None
        if not isinstance(bias, nn.Parameter) or bias not in where:
            bias = None
        geometry = replace(use.geometry, bias=bias is not None, start=0, width=None, adds=True)
        return cls(
            owner.name, owner.module, parameter, bias, where[parameter], geometry, owner.local
        )

    def fits(self, use: Use) -> bool:
        """Whether a call multiplies the weight in this role."""
        one, other = self.geometry, use.geometry
        return use.kind == "map" and (
            one.in_features,
            one.out_features,
            one.groups,
            one.flipped,
        ) == (other.in_features, other.out_features, other.groups, other.flipped)


def has_gradient(weight: Weight) -> bool:
    """Whether a layer took part: `zero_grad(set_to_none=False)` leaves zeros where not."""
    gradient = weight.weight.grad
    return gradient is not None and bool((gradient != 0).any())


def undelivered(name: str) -> str:
    """The message for a layer with a gradient that no hook saw."""
    return (
        f"layer {name!r} has a gradient but delivered nothing; no parameter was changed. Usual "
        "causes: the optimizer was made after this forward pass; the model was compiled before "
        "the optimizer was made; the loop calls "
        "model.forward or a part of the model; the layer runs inside activation checkpointing"
    )
