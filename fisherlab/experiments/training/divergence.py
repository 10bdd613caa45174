"""When a run is past saving, and which layer is to blame."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

# A loss this many times the first one is not coming back.
EXPLODED = 1e4


class Diverged(Exception):
    """A loss that is not finite or far above the first, at a step; "" is no layer to name."""

    def __init__(self, step: int, layer: str, why: str) -> None:
        super().__init__(f"step {step}{f', layer {layer!r}' if layer else ''}: {why}")
        self.step, self.layer = step, layer


def weight_norms(model: nn.Module) -> dict[str, float]:
    """`||W||` of every layer's own parameters, all together."""
    return {name: _norm(module) for name, module in _owners(model)}


@torch.no_grad()
def blame(model: nn.Module, start: dict[str, float], x: Tensor) -> tuple[str, str]:
    """The layer to name for a divergence, and what is wrong with it.

    The first layer with parameters or gradients that are not finite. Otherwise the first with an
    output on `x` that is not finite. Otherwise the one with weights that grew most since `start`.
    """
    for name, module in _owners(model):
        if not all(torch.isfinite(tensor).all() for tensor in _tensors(module)):
            return name, "its weights or gradients are not finite"
    names: list[str] = []

    def look(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor) and not torch.isfinite(output).all():
                names.append(name)

        return hook

    handles = [m.register_forward_hook(look(n)) for n, m in _owners(model)]
    try:
        model(x)
    finally:
        for handle in handles:
            handle.remove()
    if names:
        return names[0], "its output is not finite"
    growth = {
        name: norm / max(start.get(name, norm), 1e-30) for name, norm in weight_norms(model).items()
    }
    layer = max(growth, key=growth.__getitem__)
    return layer, f"its weights have grown {growth[layer]:.3g} fold, more than any other's"


def finite(model: nn.Module) -> bool:
    """Whether all weights and gradients are."""
    owned = [tensor for _, module in _owners(model) for tensor in _tensors(module)]
    return all(bool(torch.isfinite(tensor).all()) for tensor in owned)


def _owners(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that have parameters of their own."""
    for name, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            yield name, module


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    for p in module.parameters(recurse=False):
        yield p.detach()
        if p.grad is not None:
            yield p.grad


def _norm(module: nn.Module) -> float:
    squares = [p.detach().double().square().sum() for p in module.parameters(recurse=False)]
    return float(torch.stack(squares).sum().sqrt())
