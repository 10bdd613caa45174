"""Whether the products that a tape saw explain the gradients of the weights.

A random vector is sent back from the outputs: terms of the loss that are no terms of the model,
such as a penalty on the weights, are not in it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from fisherlab.extract.assemble import capture_of
from fisherlab.extract.backward import pulled_back
from fisherlab.extract.no_gradient import no_gradient_named
from fisherlab.extract.proof import gradient_error, not_a_product, tolerance
from fisherlab.extract.rows import UNTOLD, find_examples, in_order
from fisherlab.extract.tape import or_zero
from fisherlab.optim.coverage import Coverage
from fisherlab.optim.passes import Call, Pass
from fisherlab.optim.scale import OptimizerError
from fisherlab.optim.weight import Weight


class Proof:
    """Leaves out the layers whose gradient is not `sum g a^T` of their calls.

    A layer is asked once. A layer whose rows are in another order than the batch's is asked in
    every pass, since the rows are given back to their examples.

    Args:
        coverage: the matrices; those without a proof are left out of it, each with its reason.
    """

    def __init__(self, coverage: Coverage) -> None:
        self.coverage, self.weights = coverage, coverage.weights
        # layers that were proven, and those whose rows are not in the order of the examples
        self._proven: set[str] = set()
        self._coded: set[str] = set()

    @no_gradient_named(OptimizerError)
    def prove(self, current: Pass, output: Tensor) -> None:
        """Find layers without a proof, and give rows back to their examples.

        Args:
            current: the pass, with the calls of its layers.
            output: the model's output, with its graph.

        Raises:
            OptimizerError: a checkpoint that works within one backward pass only hides the graph.
        """
        n = len(output)
        fresh = current.calls.keys() - self._proven - self.coverage.left_out.keys()
        doubtful = [
            (name, call)
            for name, calls in current.calls.items()
            for call in calls
            if name in fresh or name in self._coded or call.shape[0] != n
        ]
        if doubtful:
            self._find_rows(current, output, doubtful)
        if fresh:
            self._find_products(current, output, fresh - current.lost.keys())
            whole = {n for n in fresh if not _frozen_bias(self.weights[n])}
            self._proven |= whole - current.untold.keys() - current.lost.keys()

    @no_gradient_named(OptimizerError)
    def count_positions(self, current: Pass, output: Tensor) -> None:
        """Give each example as many positions of the summed rows, or leave the layer out.

        Args:
            current: the pass, with the calls of its layers.
            output: the model's output, with its graph.

        Raises:
            OptimizerError: a checkpoint that works within one backward pass only hides the graph.
        """
        n = len(output)
        folded = [
            (name, call)
            for name, calls in current.calls.items()
            for call in calls
            if call.shape[0] != n and name not in self.coverage.left_out
        ]
        if not folded:
            return
        new: dict[str, str] = {}
        for name, call, why in _with_examples(output, folded):
            examples, call.examples = call.examples, None
            if why == UNTOLD:
                current.untold[name] = why
                continue
            if not why and examples is not None:
                counts = torch.bincount(examples[examples >= 0], minlength=n)
                whole = int(counts.min()) * n == len(examples) and len(call.shape) == 2
                why = "" if whole else "its examples have different numbers of rows"
                call.positions = len(examples) // n
            if why:
                new[name] = why
        current.lost |= new

    def _find_rows(self, current: Pass, output: Tensor, doubtful: list[tuple[str, Call]]) -> None:
        n = len(output)
        new: dict[str, str] = {}
        for name, call, why in _with_examples(output, doubtful):
            if why == UNTOLD:
                current.untold[name] = why
                continue
            same = call.shape[0] == n == len(call.raw_input)
            if why or (same and in_order(call, n)):
                # examples that interact, as under batch norm, keep the rows that they have
                call.examples = None
                if why and not same and name not in self.coverage.left_out:
                    new[name] = why
            else:
                self._coded.add(name)
        current.lost |= new

    def _find_products(self, current: Pass, output: Tensor, names: set[str]) -> None:
        generator = torch.Generator().manual_seed(0)
        vector = torch.randn(output.shape, generator=generator, device=generator.device).to(output)
        joined = {name: calls for name, calls in current.calls.items() if name in names}
        every = [call for calls in joined.values() for call in calls]
        weights = {name: _trained(self.weights[name]) for name in joined}
        leaves = [leaf for w in weights.values() for leaf in (w.weight, w.bias) if leaf is not None]
        if not every:
            return
        found = pulled_back(output, vector, [*edges(every), *leaves])
        rows = {
            id(call): output.new_zeros(call.shape) if g is None else g
            for call, g in zip(every, found[: len(every)], strict=True)
        }
        gradients = iter(found[len(every) :])
        new: dict[str, str] = {}
        for name, calls in joined.items():
            weight = weights[name]
            leaf = or_zero(next(gradients), weight.weight)
            bias = None if weight.bias is None else or_zero(next(gradients), weight.bias)
            parts, why = weight.pieces(calls, len(output))
            if why:
                new[name] = why
                continue
            layers = capture_of(name, "", parts, weight.form, lambda c: rows[id(c)])
            error = gradient_error(list(layers.values()), leaf, bias)
            if math.isnan(error):
                current.untold[name] = "the gradients of its batch have NaN, or overflow"
            elif error > max(tolerance(t) for c in calls for t in (c.raw_input, rows[id(c)])):
                others = self.coverage.others.get(name)
                extra = [f"it is used by {', '.join(sorted(others))} as well"] if others else []
                new[name] = not_a_product(error, *extra)
        current.lost |= new


def _frozen_bias(weight: Weight) -> bool:
    """Whether its bias was frozen since."""
    return weight.bias is not None and not weight.bias.requires_grad


def _trained(weight: Weight) -> Weight:
    """The matrix without a bias that has no gradient."""
    if not _frozen_bias(weight):
        return weight
    return replace(weight, bias=None, geometry=replace(weight.geometry, bias=False))


def _with_examples(
    output: Tensor, named: list[tuple[str, Call]]
) -> Iterator[tuple[str, Call, str]]:
    """Each call with the examples of its rows, which it then knows, or why it has none."""
    calls = [call for _, call in named]
    whys = find_examples(output, calls, edges(calls), [call.shape for call in calls])
    for (name, call), why in zip(named, whys, strict=True):
        yield name, call, why


def edges(calls: list[Call]) -> list[GradientEdge]:
    """The edges behind the outputs of calls, while they are kept."""
    return [cast(GradientEdge, call.edge) for call in calls]
