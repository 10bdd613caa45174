"""Proof of a capture: rows belong to examples, and captured products are autograd's gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from fisherlab.extract.geometry import Geometry
from fisherlab.extract.layer import LayerCapture
from fisherlab.extract.record import Call

CHECKS = ("full", "gradient", "off")
# Relative to the sum of the lengths of what is added. Half precision and TF32 round this coarsely.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-4}
COARSE = 5e-2
# Weights of the loss terms are powers of two, which scale a backward pass without rounding.
EXPONENTS = 8


def unproven(
    outputs: Tensor,
    labels: Tensor,
    captured: Mapping[str, LayerCapture],
    calls: Mapping[str, Sequence[Call]],
    modules: Mapping[str, nn.Module],
    check: str,
) -> dict[str, str]:
    """Layers whose capture is not what autograd says, with the reason.

    One more backward pass sends every example's loss gradient with its own weight `w_n`, a power of
    two. For a right capture, the following hold:

        rows:       `g_w[n, t] = w_n g[n, t]`, so row n depends on the loss of example n only
        gradients:  `sum_{n,t} g_w a^T = dL_w/dW`, bias included

    The gradients are compared on a random vector `v`: `sum g (a . v)` against `(dL_w/dW) v`, which
    takes O(n t (i + o)) instead of O(n t i o).

    Args:
        outputs: the model's outputs `[n, ...]`, with their graph.
        labels: the gradient of the summed per-example loss at `outputs`.
        captured: captures by name; the groups of a convolution are one each.
        calls: the recorded calls of each weight's owner, in the order of the captures.
        modules: the module that owns each weight.
        check: "full" for both laws, "gradient" for the second.

    Returns:
        `{module name: reason}` of the captures that break a law; empty where all hold.
    """
    generator = torch.Generator().manual_seed(0)
    n = outputs.shape[0]
    exponents = torch.randint(-EXPONENTS // 2, EXPONENTS // 2, (n,), generator=generator)
    weights = (2.0**exponents).to(outputs)
    names = [name for name, found in calls.items() if found]
    sources: list[Any] = [call.edge for name in names for call in calls[name]]
    leaves = [leaf for name in names for leaf in _leaves(modules[name])]
    with torch.enable_grad():
        weighted = labels * weights.view(-1, *[1] * (labels.ndim - 1))
        product = (outputs * weighted).sum()
    found = torch.autograd.grad(product, [*sources, *leaves], retain_graph=True, allow_unused=True)
    arrived = iter(found[: len(sources)])
    gradients = iter(found[len(sources) :])
    failures: dict[str, str] = {}
    for name in names:
        module = modules[name]
        rows = [or_zero(next(arrived), call.label_gradient) for call in calls[name]]
        leaf_gradients = [or_zero(next(gradients), leaf) for leaf in _leaves(module)]
        parts = [layer for layer in captured.values() if layer.name == name]
        if check == "full" and not _rows_belong(calls[name], rows, weights):
            failures[name] = (
                "its rows are not one example each: examples interact (batch statistics, a graph, "
                "a mean over the batch), or the first axis of its input is not the example"
            )
            continue
        error = max(
            gradient_error(part.geometry, part.raw_inputs, rows, leaf_gradients, generator)
            for part in parts
        )
        if error > _tolerance(calls[name]):
            failures[name] = not_a_product(error)
    return failures


def not_a_product(error: float) -> str:
    """Why a layer has no block whose gradient is another one than its calls make."""
    return (
        "the gradient of its weight and bias is not the sum of g a^T over its calls (off by "
        f"{error:.1e} of the terms): they are changed before use, or used elsewhere too, or a hook "
        "changes the layer's output"
    )


def _leaves(module: nn.Module) -> list[Tensor]:
    """The weight and, if it has a block, the bias."""
    weight, bias = cast(Tensor, module.weight), cast("Tensor | None", module.bias)
    return [weight] if bias is None or not bias.requires_grad else [weight, bias]


def or_zero(gradient: Tensor | None, target: Tensor) -> Tensor:
    """A gradient in the dtype of its target; zeros where none arrived."""
    return torch.zeros_like(target) if gradient is None else gradient.to(target.dtype)


def _tolerance(calls: Sequence[Call]) -> float:
    tensors = [tensor for call in calls for tensor in (call.raw_input, call.output)]
    return max(tolerance(tensor) for tensor in tensors)


def tolerance(tensor: Tensor) -> float:
    """The rounding that a sum may keep, relative to the lengths of its terms."""
    tf32 = tensor.is_cuda and tensor.dtype == torch.float32
    return COARSE if tf32 else TOLERANCE.get(tensor.dtype, COARSE)


def _rows_belong(calls: Sequence[Call], rows: Sequence[Tensor], weights: Tensor) -> bool:
    """Whether every row's gradient is that of its example times the example's weight."""
    bound = _tolerance(calls)
    for call, row in zip(calls, rows, strict=True):
        g = call.label_gradient
        expected = g * weights.to(g).view(-1, *[1] * (g.ndim - 1))
        if (row - expected).norm() > bound * expected.norm():
            return False
    return True


def gradient_error(
    geometry: Geometry,
    raw_inputs: Sequence[Tensor],
    rows: Sequence[Tensor],
    leaves: Sequence[Tensor],
    generator: torch.Generator,
) -> float:
    """`|sum g (a . v) - (dL/dW) v|` over the sum of `|g| |a . v|`, on a random `v`.

    Args:
        geometry: of the layer, or of one group of a convolution.
        raw_inputs: the input of every call.
        rows: the gradient at the output of every call.
        leaves: the gradients of the weight and, if it is in the block, of the bias.
        generator: draws `v`.
    """
    i, o = geometry.in_features + geometry.bias, geometry.out_features
    v = torch.randn(i, generator=generator, dtype=torch.float64).to(rows[0])
    expected = leaves[0].flatten(1).to(v) @ v[: geometry.in_features]
    if geometry.bias:
        expected = expected + leaves[1].to(v) * v[-1]
    total, size = projected_gradient(geometry, raw_inputs, rows, v)
    error = float((total - expected[geometry.group * o : (geometry.group + 1) * o]).norm())
    # without any captured gradient, the whole gradient of the weight is unexplained
    return error / size if size else (float("inf") if error else 0.0)


def projected_gradient(
    geometry: Geometry, raw_inputs: Sequence[Tensor], rows: Sequence[Tensor], v: Tensor
) -> tuple[Tensor, float]:
    """`sum_{n,t} g (a . v)` `[o]` over all calls, and the sum of `|g| |a . v|`."""
    total, size = v.new_zeros(geometry.out_features), 0.0
    for raw, row in zip(raw_inputs, rows, strict=True):
        products, g = geometry.project(raw.to(v), v), geometry.outputs(row)
        total = total + torch.einsum("nt,nto->o", products, g)
        size += float((products.abs() * g.norm(dim=2)).sum())
    return total, size
