"""Layers whose own backward returns a weighted gradient: what TENGraD, NGD-SMW and FNGD need.

`p.grad` exists after `backward()` and *is* the gradient that will be used: row n of a layer's input
is scaled by `M v_n` before the ordinary weight gradient is taken. The gradient sent further back
does not depend on the input. The plain weight gradient is never computed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, get_gradient_edge

from fisherlab.blocks import contractions
from fisherlab.blocks.columns import Columns
from fisherlab.extract.backward import widened
from fisherlab.extract.geometry import Convolution
from fisherlab.extract.image import ImageColumns
from fisherlab.extract.isolation import in_own_pass, own_pass
from fisherlab.extract.layer import LayerCapture
from fisherlab.extract.no_gradient import no_gradient_named
from fisherlab.extract.rows import UNTOLD, find_examples, in_order
from fisherlab.extract.tape import Call, Use
from fisherlab.optim.coverage import Coverage
from fisherlab.optim.scale import Loss, LossScale, OptimizerError
from fisherlab.optim.watch import Watch
from fisherlab.optim.weight import Weight

# the raw input and output gradient of each call of a layer in one pass
Calls = list[tuple[Tensor, Tensor]]
# rows(weight, calls, factor) -> [groups, n] weights, and the weighted gradient `[o, i]` itself
# where it is known with them; `factor` turns output gradients into those of the per-example loss
Rows = Callable[[Weight, Calls, float], tuple[Tensor, Tensor | None]]


@dataclass
class _State:
    """The parts that all layers of an optimizer share."""

    # leaves layers out for good, each with its reason
    leave_out: Callable[[dict[str, str]], None]
    # layers whose backward came through since the last step
    reached: set[str] = field(default_factory=set)


@dataclass(eq=False)
class _Layer:
    """A layer in one forward of the model: how often it was called, and what came back."""

    weight: Weight
    rows: Rows
    loss: Loss
    state: _State
    count: int = 0
    # whether the weight keeps its plain gradient; because this batch tells nothing of its rows
    plain: bool = False
    untold: bool = False
    # why it has no block, as this pass shows
    lost: str = ""
    # whether inputs are kept by hand: what no hook of a module computes again, checkpointing would
    # miss among the saved tensors
    kept: bool = False
    # the examples of the batch, and where they are in the rows of the input
    examples: int = 0
    layout: str = ""
    # calls of a layer called several times: they share one Gram matrix, so all must have arrived
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
    def backward(ctx: Any, grad_weight: Tensor, grad_bias: Tensor | None) -> tuple[Any, ...]:
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
        ctx.layer, ctx.kept = layer, None
        if layer.kept:
            ctx.kept, ctx.version = (x, weight), x._version
        else:
            ctx.save_for_backward(x, weight)
        return output.pop()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, kernel = ctx.kept or ctx.saved_tensors
        layer: _Layer = ctx.layer
        if ctx.kept and x._version != ctx.version:
            raise OptimizerError(
                f"the input of layer {layer.weight.name!r} was modified in place; make that "
                "operation out of place"
            )
        given = x.shape
        own = layer.loss.is_own()  # it asks for the examples of rows, or proves a product
        if g.ndim < 2:
            if not (layer.plain or own):
                raise OptimizerError(
                    f"layer {layer.weight.name!r} received one row {tuple(given)} without an axis "
                    "of examples: call it on the batch, [n, features]; no parameter was changed"
                )
            x, g = x[None], g[None]
        moved = layer.examples and len(x) != layer.examples
        if moved and not (layer.layout or layer.plain):
            raise OptimizerError(
                f"layer {layer.weight.name!r} received {len(x)} rows in a batch of "
                f"{layer.examples}: the first axis must be the example; no parameter was changed"
            )
        if layer.layout:
            x, g = _examples_first(x, layer), _examples_first(g, layer)
        weight, needs = layer.weight, ctx.needs_input_grad[:3]
        if not own and not layer.untold:
            layer.state.reached.add(weight.name)
            if layer.lost:
                layer.state.leave_out({weight.name: layer.lost})
        rows = found = None
        if layer.plain or own:
            grads = list(_gradients(weight, x.to(g.dtype), kernel.to(g.dtype), g, None, needs))
            grads[0] = _as_given(grads[0], layer, given)
            return *(None if grad is None else grad.to(kernel.dtype) for grad in grads), None, None
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
        grad_x = _as_given(grad_x, layer, given)
        return (grad_x, *(None if grad is None else grad.to(dtype) for grad in others), None, None)


# Layouts: the positions of an example are rows one after another, or all examples of a position
# are; `[n t, i]` and `[t n, i]` or `[t, n, i]`.
FOLDED, TURNED = "folded", "turned"


def _examples_first(rows: Tensor, layer: _Layer) -> Tensor:
    """An input or a gradient as `[n, t, features]`."""
    if layer.layout == TURNED:
        return rows.reshape(-1, layer.examples, rows.shape[-1]).transpose(0, 1)
    return rows.reshape(layer.examples, -1, rows.shape[-1])


def _as_given(grad: Tensor | None, layer: _Layer, shape: torch.Size) -> Tensor | None:
    """The gradient of the input in the input's own layout."""
    if grad is None:
        return None
    return (grad.transpose(0, 1) if layer.layout == TURNED else grad).reshape(shape)


def _layout(call: Call, n: int) -> str | None:
    """The layout of a linear map's rows; None where it is another one."""
    examples, x = call.examples, call.raw_input
    if examples is None or not (call.geometry.conv is None and call.geometry.transposed is None):
        return None
    if x.ndim == 2 and in_order(call, n):
        return FOLDED
    if (x.ndim == 2 and len(x) % n) or (x.ndim != 2 and x.shape[1:-1] != (n,)):
        return None
    own = torch.arange(n, device=examples.device).repeat(len(examples) // n)
    return TURNED if bool(((examples == own) | (examples < 0)).all()) else None


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
    ours, conv = owner.bias is not None, owner.geometry.conv
    grad_bias = _bias_gradient(owner, g, rows if ours else None) if needs[2] else None
    if not (needs[0] or needs[1]):
        return None, None, grad_bias
    if rows is not None and needs[1]:
        x = _scaled(x, rows.to(x.dtype))
    if conv is None:
        flipped = owner.geometry.flipped
        grad_x = g @ (kernel.mT if flipped else kernel) if needs[0] else None
        if not needs[1]:
            return grad_x, None, grad_bias
        flat, inputs = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
        return grad_x, inputs.mT @ flat if flipped else flat.mT @ inputs, grad_bias
    before, after = conv.padding[::2], conv.padding[1::2]
    if conv.mode != "constant" or before != after:
        return *_by_autograd(owner, x, kernel, g, needs), grad_bias
    zeros = [0] * len(conv.stride)
    padding = list(reversed(before))
    options = (conv.stride, padding, conv.dilation, False, zeros, owner.groups)
    wanted = [needs[0], needs[1], False]
    backward = torch.ops.aten.convolution_backward
    return *backward(g, x, kernel, None, *options, wanted)[:2], grad_bias


def _scaled(x: Tensor, rows: Tensor) -> Tensor:
    """`x` `[n, ...]` with row n (of each group's channels) scaled by `rows` `[groups, n]`."""
    if len(rows) == 1:
        return x * rows.view(-1, *[1] * (x.ndim - 1))
    by_channel = rows.mT.repeat_interleave(x.shape[1] // len(rows), 1)
    return x * by_channel.view(*by_channel.shape, *[1] * (x.ndim - 2))


def _bias_gradient(owner: Weight, g: Tensor, rows: Tensor | None) -> Tensor:
    """`sum_n rows[n] g[n]` over all positions, `[o]`."""
    channels = g.ndim - 1 if owner.is_linear else 1
    if rows is None:
        return g.sum([k for k in range(g.ndim) if k != channels])
    if g.ndim > 2:
        g = g.sum([k for k in range(1, g.ndim) if k != channels])
    weighted = rows.to(g.dtype)[:, None] @ g.view(len(g), len(rows), -1).transpose(0, 1)
    return weighted.flatten()


def _by_autograd(
    owner: Weight, x: Tensor, kernel: Tensor, g: Tensor, needs: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """Paddings that are an operation of their own: the convolution once more, under autograd."""
    conv = cast(Convolution, owner.geometry.conv)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[len(conv.kernel) - 1]
    with torch.enable_grad():
        free_x, free_kernel = x.detach().requires_grad_(), kernel.detach().requires_grad_()
        output = convolve(
            conv.padded(free_x), free_kernel, None, conv.stride, 0, conv.dilation, owner.groups
        )
        grad_x, grad_kernel = torch.autograd.grad(output, (free_x, free_kernel), g)
    return grad_x if needs[0] else None, grad_kernel if needs[1] else None


class WeightedLayers:
    """Puts `_Weighted` behind every product of an optimizer's weights.

    Rows must be the examples. The first forward pass asks autograd. A layer keeps its plain
    gradient if its rows are in another order, or if its weight has another use.
    """

    def __init__(
        self,
        model: nn.Module,
        coverage: Coverage,
        rows: Rows,
        criterion: Callable[..., Any] | None = None,
        ended: Callable[[int], None] | None = None,
    ) -> None:
        self.coverage, self.weights, self.rows = coverage, coverage.weights, rows
        # told the examples of each backward pass when its last layer is through
        self.ended = ended
        self.state = _State(coverage.leave_out)
        # layers whose rows were proven to be examples, or their positions one after another
        self._proven: set[str] = set()
        self._layouts: dict[str, str] = {}
        # each layer of the latest forward, with its parameters on their way to its calls
        self._layers: dict[str, tuple[_Layer, Tensor, Tensor | None]] = {}
        self._asked: list[tuple[str, Call, GradientEdge]] = []
        self.watch = Watch(
            *(model, self.weights, lambda: True, self._begin, self._record, self._end),
            replaces=True,
        )
        self.coverage.weighs.setdefault(model, weakref.WeakSet()).add(self)
        coverage.watch = self.watch
        self.scale = LossScale(criterion, lambda: in_own_pass(self.watch.model()), self.weights)

    def _begin(self) -> None:
        self._layers, self._asked = {}, []
        self.scale.begin()

    def _record(self, use: Use, output: Tensor) -> Tensor:
        if not use.product.x.numel():
            return output
        weight, others = self.weights.get(use.name), self.watch.tape.others
        if weight is None and use.name not in others and use.kind == "map":
            weight = self.coverage.adopt(use)
        if weight is not None and weight.bias is not None and not weight.bias.requires_grad:
            # frozen since: this pass leaves the gradient of the weight alone
            weight = replace(weight, bias=None)
        fits = weight is not None and weight.fits(use) and use.geometry.width is None and use.plain
        if weight is None or not fits or not (weight.bias is None or weight.bias is use.bias):
            others.setdefault(use.name, set()).add(use.function)
            return output
        if use.name in self.coverage.left_out:
            return output
        # the call's geometry: an image may have its border already
        weight = replace(weight, geometry=replace(use.geometry, bias=weight.bias is not None))
        if (
            use.name in self._layers
            and self._layers[use.name][0].weight.geometry != weight.geometry
        ):
            others.setdefault(use.name, set()).add(f"{use.function} in another way")
            return output
        if use.name not in self._layers:
            kept = use.name not in self.watch.hooked
            layer = _Layer(weight, self.rows, self.scale.loss, self.state, kept=kept)
            ours = _Joined.apply(weight.weight, weight.bias, layer)
            self._layers[use.name] = layer, *ours
        layer, kernel, bias = self._layers[use.name]
        layer.count += 1
        if weight.bias is None:
            bias = use.product.bias
        weighted = _Weighted.apply(use.product.x, kernel, bias, layer, [output.detach()])
        if use.name not in self._proven:
            x = use.product.x.detach()
            call = Call(use.geometry, use.bias, x, tuple(weight.weight.shape), output.detach())
            self._asked.append((use.name, call, get_gradient_edge(weighted)))
        return weighted

    def _end(self, output: Tensor | None) -> None:
        self.scale.end(output, self.watch.loss)
        for name, functions in self.watch.tape.others.items():
            if name in self.weights and name not in self.coverage.left_out:
                self._say(name, f"it is used by {', '.join(sorted(functions))} as well")
        if output is None:
            self._layers, self._asked = {}, []
            return
        n = len(output)
        if self.ended is not None:
            output.register_hook(partial(self._begun, self.ended, n))
        if self._asked:
            self._find_rows(output)
        for name, (layer, *_) in self._layers.items():
            layer.examples, layer.layout = n, self._layouts.get(name, "")

    def _begun(self, ended: Callable[[int], None], n: int, gradient: Tensor) -> None:
        """A backward pass begins; DDP, whose callback is queued later, waits after `ended`."""
        if in_own_pass(self.watch.model()):
            return
        if not n:  # before DDP sends what the others do not
            ended(n)
        engine = cast(Any, torch.autograd.Variable)._execution_engine
        engine.queue_callback(partial(ended, n))

    @no_gradient_named(OptimizerError)
    def _find_rows(self, output: Tensor) -> None:
        n, asked = len(output), self._asked
        calls, edges = [call for _, call, _ in asked], [edge for *_, edge in asked]
        self._asked = []
        shapes = [cast(Tensor, call.output).shape for call in calls]
        with own_pass(self.watch.model()):
            whys = find_examples(output, calls, edges, shapes)
        for (name, call, _), why in zip(asked, whys, strict=True):
            if why == UNTOLD:
                layer = self._layers[name][0]
                layer.plain = layer.untold = True
                continue
            same = len(cast(Tensor, call.output)) == n == len(call.raw_input)
            if same and (why or in_order(call, n)):
                continue
            layout = None if why else _layout(call, n)
            if layout is None or self._layouts.setdefault(name, layout) != layout:
                self._say(name, why or "its rows are not in the order of the examples")
        names = {name for name, *_ in asked}
        self._proven |= {n for n in names if not (x := self._layers[n][0]).untold and not x.lost}

    def _say(self, name: str, reason: str) -> None:
        """Leave a layer out of this pass, and for good with its backward pass."""
        if name not in self._layers:
            self.coverage.leave_out({name: reason})
            return
        layer = self._layers[name][0]
        layer.plain, layer.lost = True, layer.lost or reason

    def remove(self) -> None:
        """Take the hooks off the model."""
        self.watch.remove()
        model = self.watch.model()
        if model is not None:
            self.coverage.weighs[model].discard(self)
        self._layers, self._asked = {}, []
        self.scale.remove()


def combined(weight: Weight, calls: Calls, rows: Tensor, factor: float) -> Tensor:
    """`sum_n rows[n] dL/dW_n`, `[o, i]`: the per-example gradients of the loss itself, weighted."""
    return of_columns(columns_of(weight, calls, factor), rows) / factor


def of_columns(columns: list[Columns], rows: Tensor) -> Tensor:
    """`U rows` of every group, stacked as the weight `[o, i]`."""
    return torch.cat([each.combine(row[None]) for each, row in zip(columns, rows, strict=True)])


def of_each_example(columns: list[Columns], rows: Tensor) -> Tensor:
    """`U rows` as `of_columns`, from the gradient of every example, all of them formed."""
    parts = []
    for each, row in zip(columns, rows, strict=True):
        known = each.formed is not None
        D = each.matrices if known else contractions.per_example(each.a, each.g)[0]
        parts.append(torch.tensordot(row.to(D.dtype), D, 1))
    return torch.cat(parts)


def columns_of(weight: Weight, calls: Calls, factor: float) -> list[Columns]:
    """The columns of each group from the raw pairs of a layer's calls, gradients times `factor`."""
    found: list[Columns] = []
    for group in range(weight.groups):
        layer = LayerCapture(
            name=weight.name,
            layer_type=type(weight.module).__name__,
            geometry=replace(weight.geometry, group=group),
            raw_inputs=tuple(widened(x).to(widened(g).dtype) for x, g in calls),
            raw_output_gradients=tuple(widened(g)[None] for _, g in calls),
            raw_label_gradients=None,
            gradient_scale=factor,
        )
        found.append(ImageColumns.of(layer) or layer.columns)
    return found
