"""Proof of a capture: rows belong to examples, and captured products are autograd's gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from fisherlab.blocks.numerics import normal
from fisherlab.extract.backward import pulled_back
from fisherlab.extract.layer import LayerCapture
from fisherlab.extract.rows import as_rows
from fisherlab.extract.tape import Recorded, or_zero

CHECKS = ("full", "gradient", "off")
# Relative to the sum of the lengths of what is added. Half precision and TF32 round this coarsely.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-4}
COARSE = 5e-2
# Weights of the loss terms are powers of two, which scale a backward pass without rounding.
EXPONENTS = 8


class Weighted:
    """One more backward pass, in which the loss term of example n has the weight `w_n`.

    Args:
        outputs: the model's outputs `[n, ...]`, with their graph.
        labels: the gradient of the summed per-example loss there.
        calls: those whose rows are asked for.
        alone: whether no other vector is sent back than the labels. Else an example whose labels
            send nothing back would prove nothing, and random vectors take their place.
    """

    def __init__(
        self, outputs: Tensor, labels: Tensor, calls: Sequence[Recorded], alone: bool = True
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        n = len(outputs)
        exponents = torch.randint(
            -EXPONENTS // 2, EXPONENTS // 2, (n,), generator=generator, device=generator.device
        )
        self.weights = (2.0**exponents).to(outputs)
        edges = [call.edge for call in calls]
        plain = [call.label_gradient for call in calls]

        def arrived(vector: Tensor) -> list[Tensor]:
            found = pulled_back(outputs, vector, edges)
            return [or_zero(g, like) for g, like in zip(found, plain, strict=True)]

        if not alone and calls and not bool(labels.reshape(len(labels), -1).any(1).all()):
            labels = normal(generator, *labels.shape).to(labels)
            plain = arrived(labels)
        weighted = arrived(labels * self.weights.view(-1, *[1] * (labels.ndim - 1)))
        names = [id(call) for call in calls]
        self.rows = dict(zip(names, zip(weighted, plain, strict=True), strict=True))

    def belong(self, call: Recorded) -> bool:
        """Whether each row of a call depends on its example alone: `g_w[n, t] = w_n g[n, t]`."""
        row, g = self.rows[id(call)]
        weights = self.weights.to(g)
        if call.examples is not None:
            row, g = as_rows(call, row), as_rows(call, g)
            weights = weights[call.examples]
        elif len(g) != len(weights):
            return False
        expected = g * weights.view(-1, *[1] * (g.ndim - 1))
        bound = call_tolerance(call)
        return bool((row - expected).norm() <= bound * expected.norm())


def gradient_error(
    parts: Sequence[LayerCapture],
    leaf: Tensor,
    bias: Tensor | None,
) -> float:
    """`|sum g (a . v) - (dL/dW) v|` over the sum of `|g| |a . v|`, on a random `v`.

    It takes O(n t (i + o)) instead of the O(n t i o) of the gradients themselves.

    Args:
        parts: captures of the weight, one per group, whose label gradients are those of `leaf`.
        leaf: the gradient of the weight.
        bias: the gradient of the bias; None where the block has none.

    Returns:
        The error; NaN where the numbers have NaN, or overflow, and prove nothing.
    """
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for part in parts:
        geometry = part.geometry
        i, o = geometry.in_features, geometry.out_features
        width = i + (bias is not None)
        v = normal(generator, width).to(part.raw_inputs[0])
        expected = geometry.matrix(leaf).to(v) @ v[:i]
        if bias is not None:
            rows = bias.reshape(-1)[geometry.group * o : (geometry.group + 1) * o]
            expected = expected + rows.to(v) * v[-1]
        total, size = projected_gradient(part, v)
        error = float((total - expected).norm())
        if not math.isfinite(error + size):
            return math.nan
        # without any captured gradient, the whole gradient of the weight is unexplained
        worst = max(worst, error / size if size else (float("inf") if error else 0.0))
    return worst


def projected_gradient(layer: LayerCapture, v: Tensor) -> tuple[Tensor, float]:
    """`sum_{n,t} g (a . v)` `[o]` over all calls at the labels, and the sum of `|g| |a . v|`."""
    total, size = v.new_zeros(layer.shape[0]), 0.0
    rows = cast(tuple[Tensor, ...], layer.raw_label_gradients)
    for (geometry, raw), row in zip(layer.calls(layer.raw_inputs), rows, strict=True):
        products, g = geometry.project(raw.to(v), v), geometry.outputs(row)
        total = total + (g.mT @ products[..., None]).sum(0)[:, 0]
        size += float((products.abs() * _lengths(g)).sum())
    return total, size


def _lengths(g: Tensor) -> Tensor:
    """`|g[n, t]|`; a norm over an axis that is not the fastest in memory takes thrice the time."""
    return g.norm(dim=2) if g.stride(2) == 1 else g.mT.square().sum(1).sqrt()


def not_a_product(
    error: float,
    why: str = "they are changed before use, or used elsewhere too",
) -> str:
    """Why a layer has no block whose gradient is another one than its calls make."""
    return (
        "the gradient of its weight and bias is not the sum of g a^T over its calls (off by "
        f"{error:.1e} of the terms): {why}"
    )


def call_tolerance(call: Recorded) -> float:
    """The tolerance of a call's input, weight and output; an embedding's numbers are exact."""
    tensors = [t for t in (call.raw_input, call.output) if t.is_floating_point()]
    cast = 0.0 if call.dtype is None else TOLERANCE.get(call.dtype, COARSE)
    return max([cast, *(tolerance(tensor) for tensor in tensors)])


def tolerance(tensor: Tensor) -> float:
    """The rounding that a sum may keep, relative to the lengths of its terms."""
    tf32 = tensor.is_cuda and tensor.dtype == torch.float32
    return COARSE if tf32 else TOLERANCE.get(tensor.dtype, COARSE)
