"""The blocks of all layers over time: what is due is refreshed, and damped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fisherlab.approximations import Approximation, Running
from fisherlab.approximations.damping import expansion
from fisherlab.approximations.means import Means
from fisherlab.blocks import Block, DirectSum, Kronecker, KroneckerSum, from_dict, to_dict
from fisherlab.blocks.factor import decompose
from fisherlab.blocks.numerics import STACKED, all_finite
from fisherlab.blocks.reads import numbers_of, with_next_read
from fisherlab.distributed import Ranks
from fisherlab.extract import LayerCapture
from fisherlab.extract.image import sharing
from fisherlab.extract.joint import joined
from fisherlab.optim.coverage import Coverage
from fisherlab.optim.scale import OptimizerError
from fisherlab.optim.state import placed
from fisherlab.optim.weight import Weight

# Parts that may be due at a step, in this order; `f"{kind}_every"` is the interval.
KINDS = ("statistics", "basis", "corrections")


@dataclass(eq=False)
class Part:
    """The curvature of a layer's matrix, or of one group of a convolution."""

    key: str
    weight: Weight
    # None where the block is of the batch at hand
    running: Running | None
    block: Block | None = None
    # the block, damped and to the power of the method
    inverse: Block | None = None

    def correct(self, layers: list[LayerCapture], due: set[str]) -> None:
        """Add a batch to the corrections, where they are due or there are none."""
        if self.running is None or not self.running.basis or not layers:
            return
        if "corrections" in due or not self.running.corrections:
            self.running.correct(*layers)

    def changes(self, due: set[str]) -> bool:
        """Whether the damped inverse is made anew."""
        if self.running is None:
            return self.block is not None and "statistics" in due
        return bool(self.running.sums) and (
            self.inverse is None or "basis" in due or "corrections" in due
        )


class Curvature:
    """Statistics, bases, corrections, blocks and damped inverses of the layers of a model.

    Args:
        coverage: the matrices; the groups of its parameters have `damping` and the intervals.
        approximation: of every layer's block.
        make: the running means of one layer.
        ranks: the processes that hold the other shards of a batch, if any.
    """

    def __init__(
        self,
        coverage: Coverage,
        approximation: Approximation,
        make: Callable[[], Running],
        ranks: Ranks | None,
    ) -> None:
        self.coverage, self.approximation, self.ranks = coverage, approximation, ranks
        self._make = make
        self.has_basis = type(approximation).basis is not Approximation.basis
        corrected = type(approximation).corrections is not Approximation.corrections
        self.kinds = KINDS if corrected else KINDS[:2]
        self.parts: dict[str, Part] = {}
        for weight in coverage.weights.values():
            self.parts_of(weight)
        # per layer: lambda, and 1 / beta
        self.dampings: dict[str, float] = {}
        self._scale: dict[str, float] = {}

    def parts_of(self, weight: Weight) -> list[Part]:
        """The parts of a layer, in the order of its rows."""
        for key in weight.keys:
            if key not in self.parts:
                self.parts[key] = Part(key, weight, self._fresh())
        return [self.parts[key] for key in weight.keys]

    def _fresh(self) -> Running | None:
        remembers = self.approximation.additive or self.approximation.recursive
        return self._make() if remembers else None

    def refresh(
        self, due: Mapping[str, set[str]], captures: Mapping[str, list[LayerCapture]]
    ) -> None:
        """Statistics, basis, corrections and damped inverses that are due.

        Args:
            due: by name of the layers that took part, which of `KINDS` are due.
            captures: by key, those of the batch; none where nothing was recorded.

        Raises:
            OptimizerError: a gradient has NaN or inf.
        """
        weights = self.coverage.weights
        parts = [(part, what) for n, what in due.items() for part in self.parts_of(weights[n])]
        waiting = []
        for part, what in parts:
            batch = [sharing(layer) for layer in captures.get(part.key, [])]
            self._add(part, batch, what)
            if self._lacks_basis(part, what):
                waiting.append((part, what))
            else:
                # at once, while the layer's gradients are at hand
                part.correct(batch, what)
        self._refresh_bases([part for part, _ in waiting])
        for part, what in waiting:
            part.correct([sharing(layer) for layer in captures.get(part.key, [])], what)
        # in one order on all ranks
        changed = [part for part, what in parts if part.changes(what)]
        corrected = type(self.approximation).corrections is not Approximation.corrections
        means = {} if corrected else self._decomposed(changed)
        for part in changed:
            if part.running is not None:
                part.block = part.running.block(means.get(part.key))
        del means
        if changed:
            self.damp(changed)

    def _add(self, part: Part, layers: list[LayerCapture], due: set[str]) -> None:
        if not layers:
            return
        if part.running is None:
            if self.ranks is not None:
                layers = [joined(layer, self.ranks) for layer in layers]
            if not all(all_finite(g) for each in layers for g in each.raw_output_gradients or ()):
                raise OptimizerError(
                    f"the gradient at the output of layer {part.weight.name!r} has NaN or inf "
                    "entries; no parameter was changed"
                )
            part.block = self.approximation(*layers)
        elif "statistics" in due or not part.running.sums:
            part.running.update(*layers)

    def _lacks_basis(self, part: Part, due: set[str]) -> bool:
        if part.running is None or not part.running.sums or not self.has_basis:
            return False
        return "basis" in due or not part.running.basis

    def _refresh_bases(self, parts: Sequence[Part]) -> None:
        """New bases, each made by one rank."""
        running = {part.key: part.running for part in parts if part.running is not None}
        means = self._decomposed(parts)
        found = self._shared_out(list(running), lambda key: running[key].new_basis(means.get(key)))
        for key, basis in found.items():
            running[key].refresh_basis(basis)

    def _decomposed(self, parts: Iterable[Part]) -> dict[str, Means]:
        """The means of small layers, whose factors of one shape are decomposed together."""
        if self.ranks is not None:
            return {}
        small = [p for p in parts if p.running and max(p.weight.shape) <= STACKED]
        means = {part.key: part.running.means for part in small if part.running}
        decompose(F for each in means.values() for F in self.approximation.decomposed(each))
        return means

    def _shared_out(self, keys: Sequence[str], make: Callable[[str], Any]) -> dict[str, Any]:
        """`make(key)` of every key: a nest of tensors, made by one rank and sent to the others."""
        if self.ranks is None:
            return {key: make(key) for key in keys}
        sides = {key: self.parts[key].weight.shape for key in keys}
        owners = self.ranks.owners({key: float(o**3 + i**3) for key, (o, i) in sides.items()})
        with self.ranks.together("making a basis or an inverse"):
            mine = {key: make(key) for key in keys if owners[key] == self.ranks.index}
        return {key: self.ranks.broadcast(mine.get(key), owners[key]) for key in keys}

    def damp(self, parts: Iterable[Part] | None = None) -> None:
        """New damped inverses, of the lambdas that the rules now say; None: of all blocks."""
        chosen = self.parts.values() if parts is None else parts
        known = {part.key: part.block for part in chosen if part.block is not None}
        self._set_dampings()
        # beta is of all layers, whichever group they are in
        self._scale = {
            name: 1 / expand(self.dampings)
            for name, weight in self.coverage.weights.items()
            if weight.is_linear and name in self.dampings
            if (expand := expansion(self.coverage.option(weight, "damping"))) is not None
        }

        lambdas = {key: self.dampings[self.parts[key].weight.name] for key in known}
        if self.ranks is None:
            every = self.approximation.damped_each(list(known.values()), list(lambdas.values()))
            for key, inverse in zip(known, every, strict=True):
                self.parts[key].inverse = inverse
            return

        def damped(key: str) -> Block:
            return self.approximation.damped(known[key], lambdas[key])

        # elsewhere the eigenvectors are known, or there is no matrix to invert
        expensive = [key for key, F in known.items() if isinstance(F, Kronecker | KroneckerSum)]
        states = self._shared_out(expensive, lambda key: to_dict(damped(key)))
        for key in known:
            self.parts[key].inverse = from_dict(states[key]) if key in states else damped(key)

    def _set_dampings(self) -> None:
        """The lambdas that the rules say; as numbers once the host has looked at them."""
        found: dict[str, Any] = self.coverage.dampings(self.blocks())
        self.dampings |= found
        later = {name: x for name, x in found.items() if isinstance(x, Tensor)}

        def take(numbers: list[float]) -> None:
            self.dampings |= zip(later, numbers, strict=True)

        if not later:
            return
        beta = any(expansion(group["damping"]) is not None for group in self.coverage.groups)
        if beta or not self.approximation.additive:
            take(numbers_of(list(later.values())))
        else:
            with_next_read(list(later.values()), take)

    def kept(self) -> Callable[[], None]:
        """A call that takes back everything computed from now on, where it is revocable."""
        every = [part for w in self.coverage.weights.values() for part in self.parts_of(w)]
        parts = [(part, part.block, part.inverse) for part in every]
        running = [part.running.kept() for part in every if part.running is not None]
        dampings, scale = dict(self.dampings), dict(self._scale)

        def back() -> None:
            self.dampings, self._scale = dict(dampings), dict(scale)
            for part, block, inverse in parts:
                part.block, part.inverse = block, inverse
            for means_back in running:
                means_back()

        return back

    def blocks(self) -> dict[str, Block]:
        """The current block of each layer."""
        found: dict[str, Block] = {}
        for name, weight in self.coverage.weights.items():
            blocks = [part.block for part in self.parts_of(weight) if part.block is not None]
            if len(blocks) == weight.groups:
                found[name] = blocks[0] if len(blocks) == 1 else DirectSum(blocks)
        return found

    def beta(self, name: str) -> float:
        """The factor on a fully-connected layer's damped block; 1 without the rule `trace`."""
        return 1 / self._scale.get(name, 1.0)

    def precondition(self, weight: Weight, gradient: Tensor) -> Tensor:
        """A layer's gradient times its damped inverse; as it is where there is none."""
        rows = gradient.tensor_split(weight.groups)
        steps = [
            row if part.inverse is None else part.inverse @ row
            for part, row in zip(self.parts_of(weight), rows, strict=True)
        ]
        direction = torch.cat(steps) if len(steps) > 1 else steps[0]
        scale = self._scale.get(weight.name, 1.0)
        return direction if scale == 1.0 else direction * scale

    # state --------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything remembered, as nested dicts of tensors, numbers and strings."""
        parts = self.parts.items()
        return {
            "running": {
                k: p.running.state_dict() for k, p in parts if p.running and p.running.sums
            },
            "blocks": {k: to_dict(p.block) for k, p in parts if p.block is not None},
            "inverses": {k: to_dict(p.inverse) for k, p in parts if p.inverse is not None},
            "dampings": dict(self.dampings),
            "scale": dict(self._scale),
        }

    def reading(
        self, state: Mapping[str, Any], weights: Mapping[str, Weight]
    ) -> Callable[..., Any]:
        """Check a state, and return what takes it over.

        Args:
            state: what `state_dict` returned.
            weights: the matrices that it is of.

        Raises:
            ValueError: it has other layers, or is of another version.
        """
        device = {key: of.weight.device for of in weights.values() for key in of.keys}
        kinds = ("running", "blocks", "inverses")
        unknown = {key for kind in kinds for key in state[kind]} - device.keys()
        if unknown:
            raise ValueError(f"this state has layers that the model lacks: {sorted(unknown)}")
        # a state may have been read on another device
        there = {k: {n: placed(x, device[n]) for n, x in state[k].items()} for k in kinds}
        running = {key: self._make() for key in there["running"]}
        for key, means in running.items():
            means.load_state_dict(there["running"][key])
        blocks = {key: from_dict(block) for key, block in there["blocks"].items()}
        inverses = {key: from_dict(block) for key, block in there["inverses"].items()}
        dtypes = {key: of.weight.dtype for of in weights.values() for key in of.keys}
        for key, block in [*blocks.items(), *inverses.items()]:
            if block.dtype != dtypes[key]:
                raise ValueError(
                    f"this state has a block of {block.dtype} for layer {key!r}, whose weight is "
                    f"{dtypes[key]}; cast the model to it, or make a new optimizer; nothing was "
                    "loaded"
                )

        def take() -> None:
            for weight in weights.values():
                for part in self.parts_of(weight):
                    part.running = running.get(part.key) or self._fresh()
                    part.block, part.inverse = blocks.get(part.key), inverses.get(part.key)
            self.dampings, self._scale = dict(state["dampings"]), dict(state["scale"])

        return take
