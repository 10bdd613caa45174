"""Whether what was recorded adds up to the gradient that backward passes left in `.grad`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fisherlab.blocks.numerics import least_norm, normal
from fisherlab.extract.layer import LayerCapture
from fisherlab.extract.proof import projected_gradient
from fisherlab.optim.weight import Weight


class AdditiveLaw:
    """`sum_passes sum_{n,t} g a^T = .grad`, on a random vector `v` per layer.

    A hook reads `.grad v` when a backward pass has accumulated it, before a user clips it. A pass
    whose gradient was dropped (a skipped batch, an attack, the first half of a SAM step) is not in
    the sum.
    """

    def __init__(self, weights: Mapping[str, Weight], wanted: Callable[[], bool]) -> None:
        """`weights`: the matrix of each layer; more may join by `add`."""
        self._generator = torch.Generator().manual_seed(0)
        self.wanted = wanted
        self.weights: dict[str, Weight] = {}
        self.vectors: dict[str, Tensor] = {}
        # `.grad v` of the weight and of the bias: before the first recorded pass, and now
        self.base: dict[str, dict[str, Tensor]] = {}
        self.left: dict[str, dict[str, Tensor]] = {}
        self._handles: list[Any] = []
        for weight in weights.values():
            self.add(weight)

    def add(self, weight: Weight) -> None:
        """A matrix whose passes are to be told apart."""
        self.weights[weight.name] = weight
        v = normal(self._generator, weight.shape[1])
        self.vectors[weight.name] = v.to(weight.weight)
        for leaf in (weight.weight, weight.bias):
            if leaf is not None and leaf.requires_grad:
                kind = "bias" if leaf is weight.bias else "weight"
                hook = self._hook(weight.name, kind, self.wanted)
                self._handles.append(leaf.register_post_accumulate_grad_hook(hook))

    def _hook(self, name: str, kind: str, wanted: Callable[[], bool]) -> Callable[[Tensor], None]:
        def hook(leaf: Tensor) -> None:
            if wanted():
                self._read(self.left, name, kind, leaf)

        return hook

    def _read(self, into: dict[str, dict[str, Tensor]], name: str, kind: str, leaf: Tensor) -> None:
        weight = self.weights[name]
        # a layer of another shape is refused at the step, which names it
        if leaf.grad is None or (kind == "weight" and leaf.numel() % weight.geometry.in_features):
            return
        gradient, v = leaf.grad.detach(), self.vectors[name].to(leaf.grad)
        if kind == "bias":
            product = gradient * v[-1]
        else:
            product = weight.matrix(gradient) @ v[: weight.geometry.in_features]
        into.setdefault(name, {})[kind] = product

    def begin(self) -> None:
        """Note what `.grad` holds before the first recorded pass accumulates."""
        self.base.clear()
        for name, weight in self.weights.items():
            self._read(self.base, name, "weight", weight.weight)
            if weight.bias is not None:
                self._read(self.base, name, "bias", weight.bias)

    def remove(self) -> None:
        """Take the hooks off the parameters."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def clear(self) -> None:
        """Forget what the passes since the last step left."""
        self.base.clear()
        self.left.clear()

    def present(
        self, captures: Sequence[Mapping[str, LayerCapture]], factors: Sequence[float]
    ) -> list[int]:
        """The indices of the passes that `.grad` holds; all, if they explain it as well as some.

        Args:
            captures: by name, of each pass; gradients scaled by `factors`.
            factors: what turned each pass's `dL/ds` into the gradient of the per-example loss.
        """
        every, known = list(range(len(captures))), self._known(captures)
        if len(every) == 1 or not known:
            return every
        sums, total = self._sides(known, captures, factors)
        share = least_norm(sums, total, "the sums of the passes")
        kept = [k for k in every if float(share[k]) > 0.5]
        unexplained, rest = ((total - sums[:, part].sum(1)).norm() for part in (every, kept))
        # a penalty on the weights leaves a rest in both
        return kept if kept and float(rest) < 0.5 * float(unexplained) else every

    def rest(
        self, captures: Sequence[Mapping[str, LayerCapture]], factors: Sequence[float]
    ) -> float:
        """The part of `.grad v` that no weighted sum of the passes explains, 0 to 1."""
        known = self._known(captures)
        if not known:
            return 0.0
        sums, total = self._sides(known, captures, factors)
        share = least_norm(sums, total, "the sums of the passes")
        return float((total - sums @ share).norm() / total.norm().clamp(min=1e-300))

    def _known(self, captures: Sequence[Mapping[str, LayerCapture]]) -> list[str]:
        """The layers that were captured and left a gradient."""
        return [
            n for n in self.left if any(layer.name == n for c in captures for layer in c.values())
        ]

    def _sides(
        self,
        known: Sequence[str],
        captures: Sequence[Mapping[str, LayerCapture]],
        factors: Sequence[float],
    ) -> tuple[Tensor, Tensor]:
        """The addend of each pass to `.grad v`, a column each, and their sum."""
        rows, left = [], []
        for name in known:
            found = [self._of_pass(name, *pair) for pair in zip(captures, factors, strict=True)]
            o = max(len(term) for term in found)
            zero = torch.zeros(o, dtype=torch.float64, device=self.vectors[name].device)
            rows.append(torch.stack([term if len(term) else zero for term in found], 1))
            left.append(_sum(self.left[name], zero) - _sum(self.base.get(name, {}), zero))
        return torch.cat(rows), torch.cat(left)

    def _of_pass(self, name: str, captured: Mapping[str, LayerCapture], factor: float) -> Tensor:
        """`sum g (a . v)` `[o]` in the scale of `.grad`; empty if the layer took no part."""
        terms = []
        for layer in captured.values():
            rows = layer.raw_label_gradients
            if layer.name == name and rows is not None:
                v = self.vectors[name].to(rows[0])
                terms.append(projected_gradient(layer, v)[0])
                terms[-1] = terms[-1].double() * layer.gradient_scale / factor
        return torch.cat(terms) if terms else self.vectors[name].new_zeros(0).double()


def _sum(terms: Mapping[str, Tensor], zero: Tensor) -> Tensor:
    return sum((term.double() for term in terms.values()), zero)
