"""Proof of a capture: rows belong to examples, and captured products are autograd's gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from fisherlab.extract.backward import pulled_back
from fisherlab.extract.layer import LayerCapture
from fisherlab.extract.rows import as_rows
from fisherlab.extract.tape import Call, Recorded

CHECKS = ("full", "gradient", "off")
# Relative to the sum of the lengths of what is added. Half precision and TF32 round this coarsely.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-4}
COARSE = 5e-2
# Weights of the loss terms are powers of two, which scale a backward pass without rounding.
EXPONENTS = 8


@dataclass
class Weighted:
    """One more backward pass, in which the loss term of example n has the weight `w_n`.

    `rows` are the gradients at the outputs of the calls, `leaves` those of the parameters by id.
    """

    weights: Tensor
    rows: dict[int, Tensor]
    leaves: dict[int, Tensor]

    @classmethod
    def of(
        cls,
        outputs: Tensor,
        labels: Tensor,
        n: int,
        calls: Sequence[Recorded],
        leaves: Sequence[Tensor],
    ) -> Weighted:
        """Send every example's loss gradient with its own weight, a power of two.

        Args:
            outputs: the model's outputs `[n, ...]`, with their graph; of a loss all weigh 1.
            labels: the gradient of the summed per-example loss at `outputs`.
            n: the number of examples.
            calls: the recorded calls.
            leaves: weights and biases.
        """
        generator = torch.Generator().manual_seed(0)
        exponents = torch.randint(-EXPONENTS // 2, EXPONENTS // 2, (n,), generator=generator)
        weights = (2.0**exponents).to(outputs) if outputs.ndim else outputs.new_ones(n)
        weighted = labels * weights.view(-1, *[1] * (labels.ndim - 1)) if labels.ndim else labels
        found = pulled_back(outputs, weighted, [*(call.edge for call in calls), *leaves])
        arrived = found[: len(calls)]
        rows = [or_zero(g, c.label_gradient) for g, c in zip(arrived, calls, strict=True)]
        gradients = [or_zero(g, p) for g, p in zip(found[len(calls) :], leaves, strict=True)]
        return cls(
            weights,
            {id(c): g for c, g in zip(calls, rows, strict=True)},
            {id(p): g for p, g in zip(leaves, gradients, strict=True)},
        )

    def arrived(self, call: Call) -> Tensor:
        """The gradient at the output of a call."""
        return self.rows[id(call)]

    def belong(self, call: Recorded) -> bool:
        """Whether each row of a call depends on its example alone: `g_w[n, t] = w_n g[n, t]`."""
        row, g = self.rows[id(call)], call.label_gradient
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
    """
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for part in parts:
        geometry = part.geometry
        i, o = geometry.in_features, geometry.out_features
        width = i + (bias is not None)
        v = torch.randn(width, generator=generator, dtype=torch.float64)
        v = v.to(part.raw_inputs[0])
        expected = geometry.matrix(leaf).to(v) @ v[:i]
        if bias is not None:
            rows = bias.reshape(-1)[geometry.group * o : (geometry.group + 1) * o]
            expected = expected + rows.to(v) * v[-1]
        total, size = projected_gradient(part, v)
        error = float((total - expected).norm())
        # without any captured gradient, the whole gradient of the weight is unexplained
        worst = max(worst, error / size if size else (float("inf") if error else 0.0))
    return worst


def projected_gradient(layer: LayerCapture, v: Tensor) -> tuple[Tensor, float]:
    """`sum_{n,t} g (a . v)` `[o]` over all calls at the labels, and the sum of `|g| |a . v|`."""
    total, size = v.new_zeros(layer.shape[0]), 0.0
    rows = cast(tuple[Tensor, ...], layer.raw_label_gradients)
    for (geometry, raw), row in zip(layer.calls(layer.raw_inputs), rows, strict=True):
        products, g = geometry.project(raw.to(v), v), geometry.outputs(row)
        total = total + torch.einsum("nt,nto->o", products, g)
        size += float((products.abs() * g.norm(dim=2)).sum())
    return total, size


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
    return max(cast, *(tolerance(tensor) for tensor in tensors))


def or_zero(gradient: Tensor | None, target: Tensor) -> Tensor:
    """A dense gradient in the dtype of its target; zeros where none arrived."""
    if gradient is None:
        return torch.zeros_like(target)
    return (gradient.to_dense() if gradient.is_sparse else gradient).to(target.dtype)


def tolerance(tensor: Tensor) -> float:
    """The rounding that a sum may keep, relative to the lengths of its terms."""
    tf32 = tensor.is_cuda and tensor.dtype == torch.float32
    return COARSE if tf32 else TOLERANCE.get(tensor.dtype, COARSE)
