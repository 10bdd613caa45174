"""Layers whose own backward returns a weighted gradient: what TENGraD, NGD-SMW and FNGD need.

`p.grad` exists after `backward()` and *is* the gradient that will be used: row n of a layer's input
is scaled by `M v_n` before the ordinary weight gradient is taken; what is propagated further back
does not depend on the input. The plain weight gradient is never computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fisherlab.blocks.columns import Columns
from fisherlab.extract.image import ImageColumns
from fisherlab.extract.isolation import is_isolated
from fisherlab.extract.layer import Geometry, LayerCapture
from fisherlab.optim.recorder import uncompiled
from fisherlab.optim.weight import Weight

# rows(weight, raw input, raw output gradient) -> [groups, n] weights, None for the plain gradient;
# and the weighted gradient `[o, i]` itself, where it is known with them
Rows = Callable[[Weight, Tensor, Tensor], tuple[Tensor | None, Tensor | None]]


@dataclass
class _Layer:
    """One call's output on its way into the graph, and how its backward is to be weighted."""

    weight: Weight
    rows: Rows
    output: Tensor | None
    reached: set[str]
    calls: list[int] = field(default_factory=list)
    repeated: Callable[[Weight, Tensor, Tensor], None] | None = None


class _Weighted(torch.autograd.Function):
    """The layer itself forwards; backwards the weight's gradient has its rows weighted."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: _Layer) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.layer = layer
        output, layer.output = layer.output, None
        assert output is not None
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        layer: _Layer = ctx.layer
        layer.reached.add(layer.weight.name)
        if layer.calls[0] > 1 and layer.repeated is not None:
            # several calls share one Gram matrix, which exists only when all have arrived
            layer.repeated(layer.weight, x, g)
            rows = found = None
        else:
            rows, found = layer.rows(layer.weight, x, g)
        needs = ctx.needs_input_grad
        if found is not None:
            rows, needs = None, (needs[0], False, False)
        x, kernel = x.to(g.dtype), weight.to(g.dtype)
        grad_x, grad_weight, grad_bias = _gradients(layer.weight.module, x, kernel, g, rows, needs)
        if found is not None:
            known = layer.weight.split(found)
            grad_weight = known[layer.weight.weight]
            grad_bias = None if layer.weight.bias is None else known[layer.weight.bias]
        return (
            grad_x,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(weight.dtype),
            None,
        )


def _gradients(
    module: nn.Module,
    x: Tensor,
    kernel: Tensor,
    g: Tensor,
    rows: Tensor | None,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`(grad_x, grad_weight, grad_bias)` in one ordinary backward, of weighted inputs.

    The weight's gradient is bilinear in input and output gradient, and `grad_x` does not depend on
    the input: scaling that leaves what is propagated untouched.
    """
    grad_bias = _bias_gradient(module, g, rows) if needs[2] else None
    if not (needs[0] or needs[1]):
        return None, None, grad_bias
    if rows is not None and needs[1]:
        x = _scaled(x, rows.to(x.dtype))
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        grad_x = g @ kernel if needs[0] else None
        flat = g.reshape(-1, g.shape[-1])
        return grad_x, flat.mT @ x.reshape(-1, x.shape[-1]) if needs[1] else None, grad_bias
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        return *_by_autograd(module, x, kernel, g, needs), grad_bias
    zeros = [0] * len(module.stride)
    options = (module.stride, module.padding, module.dilation, False, zeros, module.groups)
    wanted = [needs[0], needs[1], False]
    backward = torch.ops.aten.convolution_backward
    return *backward(g, x, kernel, None, *options, wanted)[:2], grad_bias


def _scaled(x: Tensor, rows: Tensor) -> Tensor:
    """`x` `[n, ...]` with row n (of each group's channels) scaled by `rows` `[groups, n]`."""
    if len(rows) == 1:
        return x * rows.view(-1, *[1] * (x.ndim - 1))
    by_channel = rows.mT.repeat_interleave(x.shape[1] // len(rows), 1)
    return x * by_channel.view(*by_channel.shape, *[1] * (x.ndim - 2))


def _bias_gradient(module: nn.Module, g: Tensor, rows: Tensor | None) -> Tensor:
    """`sum_n rows[n] g[n]` over all positions, `[o]`."""
    channels = g.ndim - 1 if isinstance(module, nn.Linear) else 1
    if rows is None:
        return g.sum([k for k in range(g.ndim) if k != channels])
    if g.ndim > 2:
        g = g.sum([k for k in range(1, g.ndim) if k != channels])
    weighted = rows.to(g.dtype)[:, None] @ g.view(len(g), len(rows), -1).transpose(0, 1)
    return weighted.flatten()


def _by_autograd(
    module: nn.Conv1d | nn.Conv2d | nn.Conv3d,
    x: Tensor,
    kernel: Tensor,
    g: Tensor,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None]:
    """Paddings that are an operation of their own: the layer once more, under autograd."""
    with torch.enable_grad():
        free_x, free_kernel = x.detach().requires_grad_(), kernel.detach().requires_grad_()
        output: Tensor = module._conv_forward(free_x, free_kernel, None)
        grad_x, grad_kernel = torch.autograd.grad(output, (free_x, free_kernel), g)
    return grad_x if needs[0] else None, grad_kernel if needs[1] else None


class WeightedLayers:
    """Hooks that put `_Weighted` behind every layer of an optimizer."""

    def __init__(
        self,
        model: nn.Module,
        weights: dict[str, Weight],
        rows: Rows,
        repeated: Callable[[Weight, Tensor, Tensor], None] | None = None,
    ) -> None:
        self.rows, self.repeated = rows, repeated
        # layers whose backward came through these hooks since the last step
        self.reached: set[str] = set()
        self._calls: dict[str, list[int]] = {}
        self.handles = [model.register_forward_pre_hook(uncompiled(self._begin))]
        for weight in weights.values():
            self.handles.append(
                weight.module.register_forward_hook(
                    uncompiled(self._hook(weight)), with_kwargs=True
                )
            )

    def _begin(self, model: nn.Module, args: tuple) -> None:
        self._calls = {}

    def _hook(self, weight: Weight) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:
            # a capture's own pass is none of the training's
            if is_isolated() or not (torch.is_grad_enabled() and output.requires_grad):
                return None
            calls = self._calls.setdefault(weight.name, [0])
            calls[0] += 1
            layer = _Layer(weight, self.rows, output.detach(), self.reached, calls, self.repeated)
            x = args[0] if args else kwargs["input"]
            return _Weighted.apply(x, module.weight, module.bias, layer)

        return hook

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()


def columns_of(weight: Weight, calls: list[tuple[Tensor, Tensor]], factor: float) -> list[Columns]:
    """The columns of each group from the raw pairs of a layer's calls, gradients times `factor`."""
    found: list[Columns] = []
    for group in range(weight.groups):
        layer = LayerCapture(
            name=weight.name,
            layer_type=type(weight.module).__name__,
            geometry=Geometry.of(weight.module, weight.bias is not None, group),
            raw_inputs=tuple(_wide(x).to(_wide(g).dtype) for x, g in calls),
            raw_output_gradients=tuple(_wide(g)[None] for _, g in calls),
            raw_label_gradients=None,
            gradient_scale=factor,
        )
        found.append(ImageColumns.of(layer) or layer.columns)
    return found


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
