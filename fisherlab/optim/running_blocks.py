"""The blocks of an optimizer's layers over time: what is due at a step is refreshed and damped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from fisherlab.approximations import Approximation, Running
from fisherlab.approximations.damping import as_rule, expansion
from fisherlab.blocks import Block, DirectSum, Kronecker, KroneckerSum, from_dict, to_dict
from fisherlab.blocks.numerics import all_finite
from fisherlab.extract import LayerCapture
from fisherlab.extract.image import sharing
from fisherlab.extract.joint import joined
from fisherlab.optim.adaptive import AdaptiveDamping
from fisherlab.optim.passes import delivered
from fisherlab.optim.recorder import Recorder
from fisherlab.optim.scale import OptimizerError
from fisherlab.optim.weight import Weight, has_gradient, undelivered


class RunningBlocks(AdaptiveDamping):
    """Statistics, bases, corrections and damped inverses, each with its own interval."""

    approximation: Approximation
    recorder: Recorder | None
    _make: Callable[[], Running]
    warmup: int
    # per layer, or per group of a convolution; None where the block is of the batch at hand
    _running: dict[str, Running | None]
    _owner: dict[str, Weight]
    _blocks: dict[str, Block]
    _preconditioners: dict[str, Block]
    # per layer
    _lambdas: dict[str, float]
    _scale: dict[str, float]

    def _make_room(self, weight: Weight) -> None:
        for key in weight.keys:
            self._owner[key] = weight
            self._running[key] = self._make() if self.approximation.additive else None

    def _due(self, weight: Weight, what: str, step: int | None = None) -> bool:
        step = self.steps if step is None else step
        return step < self.warmup or step % self.option(weight, what) == 0

    def due(self) -> tuple[str, ...]:
        """What the next step refreshes of any layer: `statistics`, `basis`, `corrections`."""
        kinds = ("statistics", "basis", *(("corrections",) if self._corrected else ()))
        found = [k for k in kinds if any(self._due(w, f"{k}_every") for w in self.weights.values())]
        return (*super().due(), *found)

    def _collects(self, weight: Weight, step: int | None = None) -> bool:
        due = self._due(weight, "statistics_every", step)
        return due or (self._corrected and self._due(weight, "corrections_every", step))

    def _refresh(self, gradients: dict[str, Tensor]) -> None:
        """Statistics, basis, corrections and damped inverses that are due at this step."""
        present = [self.weights[name] for name in gradients]
        for weight in present:
            if weight.keys[0] not in self._owner:
                self._make_room(weight)
        due = [weight for weight in present if self._collects(weight)]
        captures = self._captures(due, gradients)
        layers = [(weight, key, captures.get(key, [])) for weight in present for key in weight.keys]
        waiting = []
        for weight, key, captured in layers:
            batch = [sharing(layer) for layer in captured]
            self._add_batch(weight, key, batch)
            if self._basis_due(weight, key):
                waiting.append((weight, key, captured))
            else:
                # at once, while the layer's gradients are at hand
                self._correct(weight, key, batch)
        self._refresh_bases([key for _, key, _ in waiting])
        for weight, key, captured in waiting:
            self._correct(weight, key, [sharing(layer) for layer in captured])
        # in one order on all ranks
        changed = [key for weight, key, _ in layers if self._changes(weight, key)]
        for key in changed:
            running = self._running[key]
            if running is not None:
                self._blocks[key] = running.block()
        if changed:
            self._damp(changed)

    def _captures(
        self, due: Sequence[Weight], gradients: dict[str, Tensor]
    ) -> dict[str, list[LayerCapture]]:
        if self.recorder is None:
            return {
                key: [_GradientOnly(part)]  # type: ignore[list-item]
                for weight in due
                for key, part in zip(
                    weight.keys, gradients[weight.name].tensor_split(weight.groups), strict=True
                )
            }
        if not due:
            return {}
        passes = self.recorder.captures()
        self._check_ranks(self.recorder.factors)
        found = {key: delivered(passes, key) for weight in due for key in weight.keys}
        for weight in due:
            layers = found[weight.keys[0]]
            if weight.name in self.left_out:
                continue
            if not layers and has_gradient(weight):
                raise OptimizerError(undelivered(weight.name))
        return found

    def _add_batch(self, weight: Weight, key: str, layers: list[LayerCapture]) -> None:
        running = self._running[key]
        if not layers:
            return
        if running is None:
            if self.ranks is not None:
                layers = [joined(layer, self.ranks) for layer in layers]
            if not all(all_finite(g) for each in layers for g in each.raw_output_gradients or ()):
                raise OptimizerError(
                    f"the gradient at the output of layer {weight.name!r} has NaN or inf entries; "
                    "no parameter was changed"
                )
            self._blocks[key] = self.approximation(*layers)
        elif self._due(weight, "statistics_every") or not running.sums:
            running.update(*layers)

    def _basis_due(self, weight: Weight, key: str) -> bool:
        running = self._running[key]
        if running is None or not running.sums or not self._has_basis:
            return False
        return self._due(weight, "basis_every") or not running.basis

    def _refresh_bases(self, keys: Sequence[str]) -> None:
        """New bases, each made by one rank."""
        found = self._shared_out(keys, lambda key: self._running[key].new_basis())
        for key, basis in found.items():
            self._running[key].refresh_basis(basis)

    def _shared_out(self, keys: Sequence[str], make: Callable[[str], Any]) -> dict[str, Any]:
        """`make(key)` of every key: a nest of tensors, made by one rank and sent to the others."""
        if self.ranks is None:
            return {key: make(key) for key in keys}
        sides = {key: self._owner[key].shape for key in keys}
        owners = self.ranks.owners({key: float(o**3 + i**3) for key, (o, i) in sides.items()})
        mine = {key: make(key) for key in keys if owners[key] == self.ranks.index}
        return {key: self.ranks.broadcast(mine.get(key), owners[key]) for key in keys}

    def _correct(self, weight: Weight, key: str, layers: list[LayerCapture]) -> None:
        running = self._running[key]
        if running is None or not running.basis or not self._corrected:
            return
        if layers and (self._due(weight, "corrections_every") or not running.corrections):
            running.correct(*layers)

    def _changes(self, weight: Weight, key: str) -> bool:
        """Whether the damped inverse of a layer is recomputed at this step."""
        running = self._running[key]
        if running is None:
            return key in self._blocks and self._due(weight, "statistics_every")
        if not running.sums:
            return False
        if key not in self._preconditioners or self._due(weight, "basis_every"):
            return True
        return self._corrected and self._due(weight, "corrections_every")

    @property
    def _has_basis(self) -> bool:
        return type(self.approximation).basis is not Approximation.basis

    @property
    def _corrected(self) -> bool:
        return type(self.approximation).corrections is not Approximation.corrections

    def _damp(self, keys: Sequence[str]) -> None:
        for k, group in enumerate(self.param_groups):
            names = [w.name for w in self.weights.values() if w.group == k]
            joined = {n: self._joined(self._blocks, self.weights[n]) for n in names}
            blocks = {n: b for n, b in joined.items() if b is not None}
            lambdas = as_rule(group["damping"])(blocks) if blocks else {}
            self._lambdas |= {name: float(value) for name, value in lambdas.items()}
        # beta is of all layers, whichever group they are in
        self._scale = {
            name: 1 / expand(self._lambdas)
            for name, weight in self.weights.items()
            if weight.is_linear and name in self._lambdas
            if (expand := expansion(self.option(weight, "damping"))) is not None
        }

        def damped(key: str) -> Block:
            name = self._owner[key].name
            return self.approximation.damped(self._blocks[key], self._lambdas[name])

        # elsewhere the eigenvectors are known, or there is no matrix to invert
        dear = [key for key in keys if isinstance(self._blocks[key], Kronecker | KroneckerSum)]
        if self.ranks is None:
            dear = []
        states = self._shared_out(dear, lambda key: to_dict(damped(key)))
        self._preconditioners |= {
            key: from_dict(states[key]) if key in states else damped(key) for key in keys
        }

    def blocks(self) -> dict[str, Block]:
        """The current block of each layer: goes into `fl.compare(approximations=...)` as it is."""
        found = {n: self._joined(self._blocks, w) for n, w in self.weights.items()}
        return {name: block for name, block in found.items() if block is not None}

    @staticmethod
    def _joined(blocks: dict[str, Block], weight: Weight) -> Block | None:
        parts = [blocks[key] for key in weight.keys if key in blocks]
        if len(parts) < len(weight.keys):
            return None
        return parts[0] if len(parts) == 1 else DirectSum(parts)

    def beta(self, name: str) -> float:
        """The factor on a fully-connected layer's damped block; 1 without the rule `trace`."""
        return 1 / self._scale.get(name, 1.0)

    def _damped_blocks(self) -> dict[str, tuple[Block, float, float]]:
        return {n: (F, self._lambdas[n], self.beta(n)) for n, F in self.blocks().items()}

    def _damp_again(self) -> None:
        self._damp(list(self._blocks))


class _GradientOnly:
    """The mean gradient of a step, for approximations that need nothing else."""

    def __init__(self, gradient: Tensor) -> None:
        self.gradient, self.shape, self.examples = gradient, gradient.shape, 1.0
        self.term_scale, self.whole = 1.0, True
