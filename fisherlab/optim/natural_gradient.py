"""`NaturalGradient`: one optimizer for every registered approximation."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from fisherlab.approximations import Approximation, Running
from fisherlab.approximations.damping import LevenbergMarquardt, Rule, as_rule
from fisherlab.approximations.running import too_large
from fisherlab.blocks import Block, DirectSum, Kronecker, KroneckerSum, from_dict, to_dict
from fisherlab.blocks.coordinates import LARGEST_FACTOR
from fisherlab.blocks.numerics import all_finite
from fisherlab.distributed import unwrapped
from fisherlab.extract import LayerCapture
from fisherlab.extract.image import ImageColumns
from fisherlab.extract.joint import joined
from fisherlab.optim.adaptive import AdaptiveDamping
from fisherlab.optim.passes import delivered
from fisherlab.optim.recorder import Recorder, check_fisher_type
from fisherlab.optim.scale import OptimizerError
from fisherlab.optim.summary import summary_row
from fisherlab.optim.weight import Weight, has_gradient, undelivered


class NaturalGradient(AdaptiveDamping):
    """`W <- W - lr (F~ + lambda I)^{exponent} dW`, for any approximation `F~` of the Fisher blocks.

    `damping`: a number, or a rule `dict[layer, Block] -> dict[layer, lambda]`
    (`approximations.damping`). `fisher_type` "empirical", "mc" (columns drawn from the model, on
    the graph of the loop's own forward) or "exact". Statistics are refreshed every
    `statistics_every` steps (T_FIM), the basis and the damped inverse every `basis_every` (T_EIG,
    T_INV), corrected eigenvalues every `corrections_every` (T_RE; None: with the statistics), all
    at step 0, and all of them at each of the first `warmup` steps: an inverse made of one batch is
    wrong outside that batch's span, and the gradients of the next ones lie there.
    `statistics_examples` uses the first rows of a batch only. `graft` gives each layer's step the
    length of its gradient. Of a Kronecker factor with more than `largest_factor` rows (the output
    side of a word model's last layer) the diagonal is kept; a warning and `summary()` name it.

    `criterion` may be left out for softmax cross entropy with one term per example, which is
    recognised; otherwise pass the very object the loop calls. Parameters without a block
    (normalisation, embeddings) take the plain gradient. On networks with batch norm in training
    mode `g = M dL/ds` holds cross-example terms, as in every hook-based K-FAC.

    Create it before `torch.compile`. `p.grad` is read, never changed.

    Under DDP the sums are added by one `all_reduce` per layer and eigendecompositions are shared
    out over the ranks; methods without sums gather a layer's raw inputs and output gradients.
    """

    data_parallel = True

    joins_tied = True

    def __init__(
        self,
        model: nn.Module,
        approximation: Approximation,
        *,
        criterion: Callable | None = None,
        fisher_type: str = "empirical",
        params: Iterable[Any] | None = None,
        lr: float,
        damping: float | Rule,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        decoupled: bool = False,
        decay: float = 0.95,
        statistics_every: int = 10,
        basis_every: int = 100,
        corrections_every: int | None = None,
        warmup: int = 0,
        statistics_examples: int | None = None,
        largest_factor: int = LARGEST_FACTOR,
        mc_samples: int = 1,
        generator: torch.Generator | None = None,
        graft: bool = False,
        max_norm: float | None = None,
        kl_clip: float | None = None,
        nonfinite: str = "raise",
    ) -> None:
        if not isinstance(approximation, Approximation):
            raise TypeError(
                f"approximation is an instance such as fl.KFAC(), got {approximation!r}; by name: "
                "fl.optim.create(name, model)"
            )
        check_fisher_type(fisher_type)
        every = {"statistics_every": statistics_every, "basis_every": basis_every}
        every["corrections_every"] = corrections_every or statistics_every
        for name, value in every.items():
            if int(value) != value or value < 1:
                raise ValueError(f"{name} counts steps and is at least 1, got {value!r}")
        as_rule(damping)
        if int(warmup) != warmup or warmup < 0:
            raise ValueError(f"warmup counts steps and is at least 0, got {warmup!r}")
        if statistics_examples is not None and statistics_examples < 1:
            raise ValueError(f"statistics_examples is at least 1, got {statistics_examples}")
        if largest_factor < 0:
            raise ValueError(f"largest_factor counts rows, at least 0; got {largest_factor}")
        super().__init__(
            model,
            params,
            lr=lr,
            momentum=momentum,
            nesterov=nesterov,
            weight_decay=weight_decay,
            decoupled=decoupled,
            max_norm=max_norm,
            kl_clip=kl_clip,
            nonfinite=nonfinite,
            groups={"damping": damping, **every},
        )
        self.approximation, self.decay, self.graft = approximation, decay, graft
        self.model = model = unwrapped(model)
        # the mean gradient is the joint batch's already
        local = approximation.needs - {"gradient"}
        reduce = self.ranks.sum if self.ranks is not None and local else None
        self._owner = {key: w for w in self.weights.values() for key in w.keys}
        self._running = {
            key: Running(approximation, decay, reduce, largest_factor)
            if approximation.additive
            else None
            for key in self._owner
        }
        self.largest_factor, self.warmup = largest_factor, warmup
        self._warn_of_diagonals()
        self._blocks: dict[str, Block] = {}
        self._preconditioners: dict[str, Block] = {}
        self._lambdas: dict[str, float] = {}
        self._scale: dict[str, float] = {}
        self.recorder: Recorder | None = None
        if local:
            modules = {w.name: w.module for w in self.weights.values()}
            modules |= self._tied(model, modules)
            self.recorder = Recorder(
                model,
                modules,
                criterion=criterion,
                fisher_type=fisher_type,
                mc_samples=mc_samples,
                generator=generator,
                examples=statistics_examples,
                needs=approximation.needs,
                biased={name for name, w in self.weights.items() if w.bias is not None},
                ranks=self.ranks,
            )
            self.recorder.wanted = True
            self.hooked.append(self.recorder)

    def diagonal_factors(self, weight: Weight) -> str:
        """The layer's Kronecker factors of which the diagonal is kept: "output side (10000)"."""
        if not self.approximation.additive:
            return ""
        o, i = weight.weight.flatten(1).shape
        shape = o // weight.groups, i + (weight.bias is not None)
        large = too_large(self.approximation, shape, self.largest_factor)
        return ", ".join(f"{side} side ({rows})" for side, rows in large.values())

    def _warn_of_diagonals(self) -> None:
        found = {name: self.diagonal_factors(weight) for name, weight in self.weights.items()}
        layers = [f"{name!r}: {factors}" for name, factors in found.items() if factors]
        if layers:
            warnings.warn(
                f"Kronecker factors with more than largest_factor={self.largest_factor} rows are "
                f"replaced by their diagonals in layer {'; '.join(layers)}",
                stacklevel=3,
            )

    @staticmethod
    def _tied(model: nn.Module, modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
        weights = {id(m.weight) for m in modules.values()}
        known = {id(m) for m in modules.values()}
        return {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear)
            and id(module.weight) in weights
            and id(module) not in known
        }

    # the step -----------------------------------------------------------------------------------

    def _damped_blocks(self) -> dict[str, tuple[Block, float]]:
        return {name: (block, self._lambdas[name]) for name, block in self.blocks().items()}

    def _damp_again(self) -> None:
        self._damp(list(self._blocks))

    @contextmanager
    def _unrecorded(self) -> Iterator[None]:
        wanted = self.recorder is not None and self.recorder.wanted
        try:
            if self.recorder is not None:
                self.recorder.wanted = False
            yield
        finally:
            if self.recorder is not None:
                self.recorder.wanted = wanted

    def _due(self, weight: Weight, what: str, step: int | None = None) -> bool:
        step = self.steps if step is None else step
        return step < self.warmup or step % self.option(weight, what) == 0

    def _collects(self, weight: Weight, step: int | None = None) -> bool:
        due = self._due(weight, "statistics_every", step)
        return due or (self._corrected and self._due(weight, "corrections_every", step))

    def _directions(self) -> dict[nn.Parameter, Tensor]:
        gradients = {n: g for n, w in self.weights.items() if (g := w.gradient()) is not None}
        try:
            self._refresh(gradients)
            found = {
                name: self._precondition(self.weights[name], gradient)
                for name, gradient in gradients.items()
            }
        finally:
            self._prepare_next()
        return {
            p: d
            for name, matrix in self.combine(gradients, found).items()
            for p, d in self.weights[name].split(matrix).items()
        }

    def combine(
        self, gradients: dict[str, Tensor], directions: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The step of each layer from its gradient and its natural direction."""
        return directions

    def _discard(self) -> None:
        if self.recorder is not None:
            self.recorder.clear()

    def _prepare_next(self) -> None:
        if self.recorder is not None:
            self.recorder.clear()
            following = self.steps + 1
            self.recorder.wanted = any(self._collects(w, following) for w in self.weights.values())

    def _precondition(self, weight: Weight, gradient: Tensor) -> Tensor:
        parts = gradient.tensor_split(weight.groups)
        steps = [
            self._preconditioners[key] @ part if key in self._preconditioners else part
            for key, part in zip(weight.keys, parts, strict=True)
        ]
        direction = torch.cat(steps) * self._scale.get(weight.name, 1.0)
        if self.graft:
            direction = direction * (gradient.norm() / direction.norm().clamp(min=1e-30))
        return direction

    def _refresh(self, gradients: dict[str, Tensor]) -> None:
        """Statistics, basis, corrections and damped inverses that are due at this step."""
        present = [self.weights[name] for name in gradients]
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
        sides = {key: self._owner[key].weight.flatten(1).shape for key in keys}
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
            rule = as_rule(group["damping"])
            lambdas = rule(blocks) if blocks else {}
            expand = getattr(rule, "fully_connected_scale", None)
            for name, value in lambdas.items():
                self._lambdas[name] = float(value)
                if expand is not None and isinstance(self.weights[name].module, nn.Linear):
                    self._scale[name] = 1 / expand(lambdas)

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

    @staticmethod
    def _joined(blocks: dict[str, Block], weight: Weight) -> Block | None:
        parts = [blocks[key] for key in weight.keys if key in blocks]
        if len(parts) < len(weight.keys):
            return None
        return parts[0] if len(parts) == 1 else DirectSum(parts)

    # what a user looks at -----------------------------------------------------------------------

    def blocks(self) -> dict[str, Block]:
        """The current block of each layer: goes into `fl.compare(approximations=...)` as it is."""
        found = {n: self._joined(self._blocks, w) for n, w in self.weights.items()}
        return {name: block for name, block in found.items() if block is not None}

    def summary(self) -> pd.DataFrame:
        """Per layer: damping, absolute and relative to `tr F / N`, and the eigenvalues above it.

        Where next to no eigenvalue exceeds the damping, the step is the gradient's direction.
        `diagonal_factors`: the sides larger than `largest_factor`.
        """
        rows = [
            summary_row(name, block.size, self._lambdas.get(name, math.nan), block.eigenvalues())
            | {"diagonal_factors": self.diagonal_factors(self.weights[name])}
            for name, block in self.blocks().items()
        ]
        return pd.DataFrame(rows).assign(steps=self.steps)

    # state --------------------------------------------------------------------------------------

    @property
    def method(self) -> str:
        """What a state belongs to."""
        return f"{type(self).__name__}({type(self.approximation).__name__})"

    def __repr__(self) -> str:
        head, _, rest = super().__repr__().partition(" ")
        return f"{head} of {self.approximation!r} {rest}"

    def _extra_state(self) -> dict[str, Any]:
        extra: dict[str, Any] = {
            "running": {k: r.state_dict() for k, r in self._running.items() if r and r.sums},
            "blocks": {key: to_dict(block) for key, block in self._blocks.items()},
            "preconditioners": {key: to_dict(P) for key, P in self._preconditioners.items()},
            "lambdas": dict(self._lambdas),
            "scale": dict(self._scale),
            "shares": [getattr(group["damping"], "share", None) for group in self.param_groups],
        }
        if self.recorder is not None:
            extra["generator"] = self.recorder.generator.get_state()
        return extra

    def _load_extra_state(self, extra: dict[str, Any]) -> None:
        unknown = set(extra["running"]) - set(self._running)
        if unknown:
            raise ValueError(f"this state has layers that the model lacks: {sorted(unknown)}")
        for key, state in extra["running"].items():
            self._running[key].load_state_dict(state)
        self._blocks = {key: from_dict(state) for key, state in extra["blocks"].items()}
        loaded = extra["preconditioners"]
        self._preconditioners = {key: from_dict(state) for key, state in loaded.items()}
        self._lambdas, self._scale = dict(extra["lambdas"]), dict(extra["scale"])
        for group, share in zip(self.param_groups, extra["shares"], strict=True):
            if isinstance(group["damping"], LevenbergMarquardt):
                group["damping"].share = share
        if self.recorder is not None:
            self.recorder.generator.set_state(extra["generator"].cpu())
            self.recorder.wanted = any(self._collects(w) for w in self.weights.values())


def sharing(layer: LayerCapture) -> LayerCapture:
    """The capture with its per-example gradients made once, for its sums and its corrections."""
    columns = ImageColumns.of(layer) if isinstance(layer, LayerCapture) else None
    return layer if columns is None else replace(layer, shared={"columns": columns})


class _GradientOnly:
    """The mean gradient of a step, for approximations that need nothing else."""

    def __init__(self, gradient: Tensor) -> None:
        self.gradient, self.shape, self.examples = gradient, gradient.shape, 1.0
