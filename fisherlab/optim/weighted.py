"""Layers whose own backward returns a weighted gradient: what TENGraD, NGD-SMW and FNGD need.

`p.grad` exists after `backward()` and *is* the gradient that will be used: row n of a layer's input
is scaled by `M v_n` before the ordinary weight gradient is taken; what is propagated further back
does not depend on the input. The plain weight gradient is never computed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fisherlab.blocks.columns import Columns
from fisherlab.extract.geometry import Geometry
from fisherlab.extract.image import ImageColumns
from fisherlab.extract.isolation import is_isolated
from fisherlab.extract.layer import LayerCapture
from fisherlab.optim.recorder import uncompiled
from fisherlab.optim.scale import Loss, LossScale
from fisherlab.optim.weight import Weight

# the raw input and output gradient of each call of a layer in one pass
Calls = list[tuple[Tensor, Tensor]]
# rows(weight, calls, factor) -> [groups, n] weights, and the weighted gradient `[o, i]` itself
# where it is known with them; `factor` turns output gradients into those of the per-example loss
Rows = Callable[[Weight, Calls, float], tuple[Tensor, Tensor | None]]


@dataclass(eq=False)
class _Layer:
    """A layer in one forward of the model: how often it was called, and what came back."""

    weight: Weight
    rows: Rows
    loss: Loss
    reached: set[str]
    count: int = 0
    # of a layer called several times: they share one Gram matrix, so all must have arrived
    arrived: Calls = field(default_factory=list)

    def weighted(self) -> Tensor:
        """The weighted gradient `[o, i]` of the calls that one backward pass has brought."""
        calls, self.arrived = self.arrived, []
        factor = self.loss.factor
        rows, found = self.rows(self.weight, calls, factor)
        return combined(self.weight, calls, rows, factor) if found is None else found


class _Joined(torch.autograd.Function):
    """The parameters of a layer on their way to its calls; backwards, all calls have arrived."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, bias: Tensor | None, layer: _Layer
    ) -> tuple[Tensor, Tensor | None]:
        ctx.layer = layer
        pairs = [(p, p.detach()) for p in (weight, bias) if p is not None]
        ctx.mark_non_differentiable(*(alias for p, alias in pairs if not p.requires_grad))
        return pairs[0][1], None if bias is None else pairs[1][1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_weight: Tensor, grad_bias: Tensor | None) -> tuple:
        layer: _Layer = ctx.layer
        if layer.arrived:
            weight = layer.weight
            parts = weight.split(layer.weighted().to(weight.weight.dtype))
            grad_weight = parts[weight.weight]
            grad_bias = None if weight.bias is None else parts[weight.bias]
        return grad_weight, grad_bias, None


class _Weighted(torch.autograd.Function):
    """The layer itself forwards; backwards the weight's gradient has its rows weighted."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        layer: _Layer,
        output: list[Tensor],
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.layer = layer
        return output.pop()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, kernel = ctx.saved_tensors
        layer: _Layer = ctx.layer
        weight, needs = layer.weight, ctx.needs_input_grad[:3]
        layer.reached.add(weight.name)
        rows = found = None
        if layer.count > 1:
            layer.arrived.append((x, g))
        else:
            rows, found = layer.rows(weight, [(x, g)], layer.loss.factor)
        if rows is None or found is not None:
            # a bias that is another optimizer's keeps its plain gradient
            rows, needs = None, (needs[0], False, needs[2] and weight.bias is None)
        dtype = kernel.dtype
        grads = list(_gradients(weight, x.to(g.dtype), kernel.to(g.dtype), g, rows, needs))
        if found is not None:
            known = weight.split(found)
            grads[1] = known[weight.weight]
            if weight.bias is not None:
                grads[2] = known[weight.bias]
        grad_x, *others = grads
        return (grad_x, *(None if grad is None else grad.to(dtype) for grad in others), None, None)


def _gradients(
    owner: Weight,
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
    module, ours = owner.module, owner.bias is not None
    grad_bias = _bias_gradient(module, g, rows if ours else None) if needs[2] else None
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
        criterion: Callable | None = None,
    ) -> None:
        self.rows = rows
        # layers whose backward came through these hooks since the last step
        self.reached: set[str] = set()
        self._model = weakref.ref(model)
        # of the latest forward: each layer, with its parameters on their way to its calls
        self._layers: dict[str, tuple[_Layer, Tensor, Tensor | None]] = {}
        self.handles = [model.register_forward_pre_hook(uncompiled(self._begin))]
        for weight in weights.values():
            self.handles.append(
                weight.module.register_forward_hook(
                    uncompiled(self._hook(weight)), with_kwargs=True
                )
            )
        # after the layers' hooks, whose output it follows: the model may be a single layer
        self.scale = LossScale(model, criterion)

    def _begin(self, model: nn.Module, args: tuple) -> None:
        # a deep copy of the model carries these hooks along
        if model is self._model() and torch.is_grad_enabled() and not is_isolated():
            self._layers = {}
            self.scale.begin()

    def _hook(self, weight: Weight) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:
            # a capture's own pass is none of the training's
            if is_isolated() or not (torch.is_grad_enabled() and output.requires_grad):
                return None
            if module is not weight.module:
                return None
            if weight.name not in self._layers:
                layer = _Layer(weight, self.rows, self.scale.loss, self.reached)
                ours = _Joined.apply(weight.weight, weight.bias, layer)
                self._layers[weight.name] = layer, *ours
            layer, kernel, bias = self._layers[weight.name]
            layer.count += 1
            if weight.bias is None:
                bias = cast("Tensor | None", module.bias)
            x = args[0] if args else kwargs["input"]
            return _Weighted.apply(x, kernel, bias, layer, [output.detach()])

        return hook

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self._layers = {}
        self.scale.remove()


def combined(weight: Weight, calls: Calls, rows: Tensor, factor: float) -> Tensor:
    """`sum_n rows[n] dL/dW_n`, `[o, i]`: the per-example gradients of the loss itself, weighted."""
    return of_columns(columns_of(weight, calls, factor), rows) / factor


def of_columns(columns: list[Columns], rows: Tensor) -> Tensor:
    """`U rows` of every group, stacked as the weight `[o, i]`."""
    return torch.cat([each.combine(row[None]) for each, row in zip(columns, rows, strict=True)])


def columns_of(weight: Weight, calls: Calls, factor: float) -> list[Columns]:
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
