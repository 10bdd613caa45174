"""`NaturalGradient`: one optimizer for every registered approximation."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any, cast

import pandas as pd
import torch
from torch import Tensor, nn

from fisherlab.approximations import Approximation, Running
from fisherlab.approximations.damping import LevenbergMarquardt, Rule, as_rule
from fisherlab.approximations.running import too_large
from fisherlab.blocks import Block, from_dict, to_dict
from fisherlab.blocks.coordinates import LARGEST_FACTOR
from fisherlab.distributed import unwrapped
from fisherlab.extract.geometry import Convolution, Geometry
from fisherlab.extract.select import Names
from fisherlab.optim.coverage import shown
from fisherlab.optim.recorder import Recorder, check_fisher_type
from fisherlab.optim.running_blocks import RunningBlocks
from fisherlab.optim.summary import summary_row
from fisherlab.optim.watch import Watch
from fisherlab.optim.weight import Weight


class NaturalGradient(RunningBlocks):
    """`W <- W - lr (F~ + lambda I)^{exponent} dW`, for any approximation `F~` of the Fisher blocks.

    `damping`: a number, or a rule `dict[layer, Block] -> dict[layer, lambda]`
    (`approximations.damping`). `fisher_type` "empirical", "mc" (columns drawn from the model, on
    the graph of the loop's own forward) or "exact". Statistics are refreshed every
    `statistics_every` steps (T_FIM), the basis and the damped inverse every `basis_every` (T_EIG,
    T_INV), corrected eigenvalues every `corrections_every` (T_RE; None: with the statistics), all
    at step 0, and all of them at each of the first `warmup` steps, while `kl_clip` grows to its
    value: an inverse made of one batch is wrong outside that batch's span, where the gradients of
    the next ones lie.
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
        weight_decay_placement: str = "after",
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
        layers: Names = None,
        skip: Names = None,
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
            weight_decay_placement=weight_decay_placement,
            decoupled=decoupled,
            max_norm=max_norm,
            kl_clip=kl_clip,
            warmup=warmup,
            nonfinite=nonfinite,
            layers=layers,
            skip=skip,
            groups={"damping": damping, **every},
        )
        self.approximation, self.decay, self.graft = approximation, decay, graft
        self.model = model = unwrapped(model)
        # the mean gradient is the joint batch's already
        local = approximation.needs - {"gradient"}
        reduce = self.ranks.sum if self.ranks is not None and local else None
        self._make = partial(Running, approximation, decay, reduce, largest_factor)
        self._owner: dict[str, Weight] = {}
        self._running: dict[str, Running | None] = {}
        for weight in self.weights.values():
            self._make_room(weight)
        self.largest_factor = largest_factor
        self._warn_of_diagonals()
        self._blocks: dict[str, Block] = {}
        self._preconditioners: dict[str, Block] = {}
        self._lambdas: dict[str, float] = {}
        self._scale: dict[str, float] = {}
        self.recorder: Recorder | None = None
        self.watch: Watch
        if local:
            self.recorder = Recorder(
                model,
                self.coverage,
                criterion=criterion,
                fisher_type=fisher_type,
                mc_samples=mc_samples,
                generator=generator,
                examples=statistics_examples,
                needs=approximation.needs,
                ranks=self.ranks,
            )
            self.recorder.wanted = True
            self.hooked.append(self.recorder)
            self.watch = self.recorder.watch
        else:
            # the gradient is all that is needed; a first forward shows which weights are matrices
            self.watch = shown(model, self.coverage)
            self.hooked.append(self.watch)

    def diagonal_factors(self, weight: Weight) -> str:
        """The layer's Kronecker factors of which the diagonal is kept: "output side (10000)"."""
        if not self.approximation.additive:
            return ""
        o, i = weight.shape
        shape = o // weight.groups, i
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

    # the step -----------------------------------------------------------------------------------

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

    def _directions(self) -> dict[nn.Parameter, Tensor]:
        gradients = self.gradients()
        following = self.steps
        try:
            self._refresh(gradients)
            found = {
                name: self._precondition(self.weights[name], gradient)
                for name, gradient in gradients.items()
            }
            following += 1
        finally:
            # a refused step is taken again with the next batch
            self._prepare(following)
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

    def _prepare(self, following: int) -> None:
        if self.recorder is not None:
            self.recorder.clear()
            self.recorder.wanted = any(self._collects(w, following) for w in self.weights.values())

    def _precondition(self, weight: Weight, gradient: Tensor) -> Tensor:
        parts = gradient.tensor_split(weight.groups)
        steps = [
            self._preconditioners[key] @ part if key in self._preconditioners else part
            for key, part in zip(weight.keys, parts, strict=True)
        ]
        direction = torch.cat(steps) if len(steps) > 1 else steps[0]
        if (scale := self._scale.get(weight.name, 1.0)) != 1.0:
            direction = direction * scale
        if self.graft:
            direction = direction * (gradient.norm() / direction.norm().clamp(min=1e-30))
        return direction

    # what a user looks at -----------------------------------------------------------------------

    def summary(self) -> pd.DataFrame:
        """Per layer: damping, absolute and relative to `tr F / N`, and the eigenvalues above it.

        Where next to no eigenvalue exceeds the damping, the step is the gradient's direction.
        `beta`: the factor of the rule `trace` on the damped block of a fully-connected layer.
        `diagonal_factors`: the sides larger than `largest_factor`.
        """
        rows = [
            summary_row(name, block.size, self._lambdas.get(name, math.nan), block.eigenvalues())
            | {"beta": self.beta(name)}
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
            "weights": {
                name: (asdict(w.geometry), self._name_of(w.bias))
                for name, w in self.weights.items()
            },
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

    def _name_of(self, bias: nn.Parameter | None) -> str | None:
        owners = self.coverage.owners.values()
        return (
            next((o.name for o in owners if o.tensor is bias), None) if bias is not None else None
        )

    def _restore_weights(self, known: Mapping[str, tuple[dict[str, Any], str | None]]) -> None:
        """Matrices that a call had shown before the state was saved."""
        where = self.coverage.where()
        for name in (
            name for name in known if name not in self.weights and name in self.coverage.owners
        ):
            owner, (shape, bias) = self.coverage.owners[name], known[name]
            for kind in ("conv", "transposed"):
                if shape[kind] is not None:
                    shape = shape | {kind: Convolution(**shape[kind])}
            parameter = cast(nn.Parameter, owner.tensor)
            leaf = None if bias is None else cast(nn.Parameter, self.coverage.owners[bias].tensor)
            if parameter in where:
                geometry = Geometry(**shape)
                weight = Weight(
                    name, owner.module, parameter, leaf, where[parameter], geometry, owner.local
                )
                self.coverage.join(weight)
                self._make_room(weight)
                if self.recorder is not None:
                    self.recorder.add(weight)

    def _load_extra_state(self, extra: dict[str, Any]) -> None:
        self._restore_weights(extra.get("weights", {}))
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
