"""`Preconditioner`: natural gradients in `.grad`, in front of any optimizer."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fisherlab import doors
from fisherlab.approximations import Approximation, Running
from fisherlab.approximations.damping import LevenbergMarquardt, Rule, as_rule
from fisherlab.approximations.running import too_large
from fisherlab.blocks import Block
from fisherlab.blocks.factor import LARGEST_FACTOR
from fisherlab.blocks.reads import together
from fisherlab.casting import uncasting
from fisherlab.distributed import Ranks, answering, unwrapped
from fisherlab.extract import LayerCapture
from fisherlab.extract.select import Names
from fisherlab.optim.alike import Agreement, groups_of, options_of
from fisherlab.optim.attempt import Attempt, Kept, calling
from fisherlab.optim.coverage import Coverage, Covered, check_nonfinite, shown
from fisherlab.optim.curvature import Curvature
from fisherlab.optim.options import check_part
from fisherlab.optim.passes import delivered
from fisherlab.optim.recorder import Recorder, check_draw, check_fisher_type
from fisherlab.optim.scale import OptimizerError
from fisherlab.optim.schedule import USUAL, Schedule
from fisherlab.optim.state import FORMAT, check_form, check_state, generator_state, sealed
from fisherlab.optim.summary import summary_row
from fisherlab.optim.weight import Weight, has_gradient, undelivered
from fisherlab.telling import warn

if TYPE_CHECKING:
    import pandas as pd

Gradients = dict[str, Tensor]


class Preconditioner(Covered):
    """`G <- (F~ + lambda I)^{exponent} G` of every layer's gradient, for any approximation `F~`.

        preconditioner = fl.optim.Preconditioner(model, fl.KFAC(), damping=1e-2)
        optimizer = torch.optim.AdamW(model.parameters())

        optimizer.zero_grad()
        criterion(model(x), y).backward()
        preconditioner.step()
        optimizer.step()

    It records the loop's own passes, and `step()` puts the preconditioned gradient in the place of
    `.grad`. Create it before `torch.compile`. Parameters without a block (normalisation,
    embeddings) keep the plain gradient. On networks with batch norm in training mode `g = M dL/ds`
    holds cross-example terms, as in every hook-based K-FAC.

    Under DDP the sums are added by one `all_reduce` per layer, and eigendecompositions are shared
    out over the ranks. Methods without sums gather a layer's raw inputs and output gradients.

    Args:
        model: the model.
        approximation: an instance such as `fl.KFAC()`.
        damping: lambda, or a rule `dict[layer, Block] -> dict[layer, lambda]`.
        schedule: when statistics, bases and damped inverses are refreshed.
        params: parameters, or groups of them, which may have their own `damping`,
            `statistics_every`, `basis_every` and `corrections_every`; an optimizer passes its
            `Coverage`. None: all of the model.
        criterion: the very object that the loop calls; not needed for softmax cross entropy with
            one term per example, which is recognised.
        fisher_type: "empirical", "mc" (columns drawn from the model, on the graph of the loop's own
            forward) or "exact".
        mc_samples: draws per example.
        generator: draws the labels of "mc"; None: a fresh one seeded with 0.
        layers: names or patterns of the weights that may have a block; None: all trainable ones.
        skip: names or patterns of those that may not.
        largest_factor: rows of a Kronecker factor above which its diagonal is kept; a warning and
            `summary()` name it.
        graft: whether each layer's direction gets the length of its gradient.
        nonfinite: "raise" or "skip" a step whose gradient has NaN or inf.

    Raises:
        ValueError: an option is out of its range.
        TypeError: the approximation is none.
    """

    def __init__(
        self,
        model: nn.Module,
        approximation: Approximation,
        *,
        damping: float | Rule,
        schedule: Schedule = USUAL,
        params: Iterable[Any] | Coverage | None = None,
        criterion: Callable[..., Any] | None = None,
        fisher_type: str = "empirical",
        mc_samples: int = 1,
        generator: torch.Generator | None = None,
        layers: Names = None,
        skip: Names = None,
        largest_factor: int = LARGEST_FACTOR,
        graft: bool = False,
        nonfinite: str = "raise",
    ) -> None:
        if not isinstance(approximation, Approximation):
            raise TypeError(
                "approximation is an instance such as fl.KFAC(), got "
                f"{doors.said(approximation)}; by name: fl.optim.create(name, model)"
            )
        check_part("schedule", schedule)
        check_fisher_type(fisher_type)
        check_draw(criterion, mc_samples, generator)
        as_rule(damping)
        doors.count(largest_factor, "largest_factor, which counts rows,", 0)
        doors.flag(graft, "graft")
        check_nonfinite(nonfinite)
        self.ranks = Ranks.of(model)
        self.model = model = unwrapped(model)
        self.approximation, self.schedule = approximation, schedule
        self.largest_factor, self.graft, self.nonfinite = largest_factor, graft, nonfinite
        if not isinstance(params, Coverage):
            if self.ranks is not None:
                self.ranks.meet()
                self.ranks.check_model(model, buffers=False)
            params = Coverage(model, _groups(model, params), layers, skip)
            for group in params.groups:
                for key, value in {"damping": damping, **schedule.intervals}.items():
                    group.setdefault(key, value)
                if isinstance(group["damping"], LevenbergMarquardt):
                    raise ValueError(
                        "levenberg_marquardt compares the loss before and after a step, which a "
                        "preconditioner does not take; pass another rule, or take NaturalGradient"
                    )
        self.coverage = params
        # the mean gradient is the joint batch's already
        local = approximation.needs - {"gradient"}
        reduce = self.ranks.sum if self.ranks is not None and local else None
        make = partial(Running, approximation, schedule.decay, reduce, largest_factor, schedule.ema)
        self.curvature = Curvature(self.coverage, approximation, make, self.ranks)
        self.steps = 0
        self._agreement = Agreement()
        self._attempt = Attempt()
        # the captures of a step that may be taken back
        self._batch: dict[str, list[LayerCapture]] | None = None
        # a parameter of the last step, the gradient that it left there, and its version
        self._left: tuple[Tensor, Tensor, int] | None = None
        self._warn_of_diagonals()
        self.recorder: Recorder | None = None
        if local:
            self.recorder = Recorder(
                model,
                self.coverage,
                criterion=criterion,
                fisher_type=fisher_type,
                mc_samples=mc_samples,
                generator=generator,
                examples=schedule.examples,
                needs=approximation.needs,
                ranks=self.ranks,
            )
            self.recorder.wanted = True
        # the gradient is all that is needed; a first forward shows which weights are matrices
        self._hooks = self.recorder or shown(model, self.coverage)
        # the model may outlive it, and is then as it was
        weakref.finalize(self, self._hooks.remove)

    def remove(self) -> None:
        """Take the hooks off the model."""
        self._hooks.remove()

    # schedule -----------------------------------------------------------------------------------

    @property
    def over(self) -> bool:
        """Whether the schedule leaves the gradient of this step as it is."""
        return self.schedule.until is not None and self.steps >= self.schedule.until

    def _due(self, weight: Weight) -> set[str]:
        """The parts of a layer that are refreshed at this step."""
        if self.steps < self.schedule.warmup:
            return set(self.curvature.kinds)
        group = self.coverage.groups[weight.group]
        return {kind for kind in self.curvature.kinds if self.steps % group[f"{kind}_every"] == 0}

    def due(self) -> tuple[str, ...]:
        """Parts that the next step refreshes in any layer: `statistics`, `basis`, `corrections`."""
        if self.over:
            return ()
        found = set().union(*(self._due(weight) for weight in self.weights.values()))
        ends = ("curvature",) if self.schedule.until is not None else ()
        return (*ends, *(kind for kind in self.curvature.kinds if kind in found))

    # the step -----------------------------------------------------------------------------------

    @torch.no_grad()
    @uncasting
    def step(self) -> None:
        """Put the preconditioned gradient in the place of `.grad`, once per backward pass.

        Raises:
            OptimizerError: a step that cannot be taken; no gradient was changed.
        """
        with answering(self.ranks, "preconditioning"), calling(self.refused):
            self._step()

    def described(self) -> dict[str, str]:
        """The options, in words that all ranks must share."""
        return {**groups_of(self.coverage), **options_of(self, self.recorder)}

    def _step(self) -> None:
        self.coverage.check(self.model)
        self._agreement.check(self.ranks, self.described)
        if self._left is not None:
            p, gradient, version = self._left
            # zeroed and accumulated it would be two versions on
            changes = gradient._version - version if p.grad is gradient else 2
            if changes < 2 and bool(gradient.any()):
                raise OptimizerError(
                    "the gradient is, or was added to, one that is preconditioned already: call "
                    "zero_grad() and loss.backward() between two calls of step(); no gradient was "
                    "changed"
                )
        found = {name: weight.gradient() for name, weight in self.weights.items()}
        directions = self._attempt.take(
            lambda: self.coverage.finite(self.nonfinite),
            lambda: self.directions({name: g for name, g in found.items() if g is not None}),
            self.keep if self.ranks is None else None,
        )
        if directions is None:
            self.refused()
            self.forget()
            return
        for name, direction in directions.items():
            for p, d in self.weights[name].split(direction).items():
                if p.grad is not None:
                    p.grad.copy_(d)
                    self._left = p, p.grad, p.grad._version
        self.stepped()
        if self.steps == 1:
            self.coverage.warn_of_share()

    def directions(self, gradients: Gradients) -> Gradients:
        """Refresh what is due, and precondition the `[weight | bias]` gradients by name."""
        found = {}
        try:
            if not self.over:
                due = {name: self._due(self.weights[name]) for name in gradients}
                batch = self._captures(due, gradients) if self._batch is None else self._batch
                if together() is not None:
                    # a step that is taken back is computed again with the same captures
                    self._batch = batch
                self.curvature.refresh(due, batch)
                found = {n: self.precondition(n, gradient) for n, gradient in gradients.items()}
                self.coverage.check_directions(found)
            self.steps += 1
        finally:
            # a refused step is taken again with the next batch
            self._prepare()
        return found

    def refused(self) -> None:
        """A step was refused: the draws for it do not count."""
        if self.recorder is not None:
            self.recorder.refuse()

    def stepped(self) -> None:
        """A step was taken."""
        self.coverage.stepped()
        if self.recorder is not None:
            self.recorder.stepped()

    def keep(self) -> Kept:
        """The state before a step that is computed `Together`."""
        steps, curvature = self.steps, self.curvature.kept()
        wanted = self.recorder is not None and self.recorder.wanted

        def back() -> bool:
            self.steps = steps
            curvature()
            if self.recorder is not None:
                self.recorder.wanted = wanted
            return self._batch is not None

        def release() -> None:
            self._batch = None

        return Kept(back, release)

    def precondition(self, name: str, gradient: Tensor) -> Tensor:
        """A layer's gradient, preconditioned by what is known of the layer now."""
        direction = self.curvature.precondition(self.weights[name], gradient)
        if self.graft:
            direction = direction * (gradient.norm() / direction.norm().clamp(min=1e-30))
        return direction

    def forget(self) -> None:
        """Drop what was recorded since the last step."""
        if self.recorder is not None:
            self.recorder.clear()

    def _prepare(self) -> None:
        """Record the next passes if their step needs them."""
        self.forget()
        if self.recorder is not None:
            due = (self._due(weight) for weight in self.weights.values())
            # a first pass shows the weights that no module multiplies
            recorded = not self.weights or any(d & {"statistics", "corrections"} for d in due)
            self.recorder.wanted = recorded and not self.over

    @contextmanager
    def unrecorded(self) -> Iterator[None]:
        """Passes of the model inside leave nothing behind."""
        if self.recorder is None:
            yield
            return
        wanted, self.recorder.wanted = self.recorder.wanted, False
        try:
            yield
        finally:
            self.recorder.wanted = wanted

    def _captures(
        self, due: Mapping[str, set[str]], gradients: Gradients
    ) -> dict[str, list[LayerCapture]]:
        """The captures of this step's passes, for the layers that are due."""
        names = [name for name, what in due.items() if what & {"statistics", "corrections"}]
        weights = [self.weights[name] for name in names]
        if self.recorder is None:
            return {
                key: [_GradientOnly(key, rows)]  # type: ignore[list-item]
                for weight in weights
                for key, rows in zip(
                    weight.keys, gradients[weight.name].tensor_split(weight.groups), strict=True
                )
            }
        if not names:
            return {}
        passes = self.recorder.captures(f"step {self.steps} for {', '.join(names)}")
        found = {key: delivered(passes, key) for weight in weights for key in weight.keys}
        for weight in weights:
            missing = weight.name not in self.left_out and not found[weight.keys[0]]
            if missing and has_gradient(weight):
                raise OptimizerError(undelivered(weight.name))
        return found

    # inspection ---------------------------------------------------------------------------------

    def blocks(self) -> dict[str, Block]:
        """The current block of each layer: goes into `fl.compare(approximations=...)` as it is."""
        return self.curvature.blocks()

    def diagonal_factors(self, weight: Weight) -> str:
        """The layer's Kronecker factors of which the diagonal is kept: "output side (10000)"."""
        if not self.approximation.additive:
            return ""
        o, i = weight.shape
        large = too_large(self.approximation, (o // weight.groups, i), self.largest_factor)
        return ", ".join(f"{side} side ({rows})" for side, rows in large.values())

    def _warn_of_diagonals(self) -> None:
        found = {name: self.diagonal_factors(weight) for name, weight in self.weights.items()}
        layers = [f"{name!r}: {factors}" for name, factors in found.items() if factors]
        if layers:
            warn(
                f"Kronecker factors with more than largest_factor={self.largest_factor} rows are "
                f"replaced by their diagonals in layer {'; '.join(layers)}"
            )

    def summary(self) -> pd.DataFrame:
        """Per layer: damping, absolute and relative to `tr F / N`, and the eigenvalues above it.

        Where next to no eigenvalue exceeds the damping, the step is the gradient's direction.
        `beta`: the factor of the rule `trace` on the damped block of a fully-connected layer.
        `diagonal_factors`: the sides larger than `largest_factor`.
        """
        import pandas as pd

        curvature = self.curvature
        rows = [
            summary_row(n, F.size, curvature.dampings.get(n, math.nan), F.eigenvalues())
            | {"beta": curvature.beta(n)}
            | {"diagonal_factors": self.diagonal_factors(self.weights[n])}
            for n, F in self.blocks().items()
        ]
        return pd.DataFrame(rows).assign(steps=self.steps)

    # state --------------------------------------------------------------------------------------

    @property
    def method(self) -> str:
        """The name of the method to which a state belongs."""
        return f"Preconditioner({type(self.approximation).__name__})"

    def state_dict(self) -> dict[str, Any]:
        """Everything remembered, as nested dicts of tensors, numbers and strings."""
        state: dict[str, Any] = {"format": FORMAT, "method": self.method, "steps": self.steps}
        state |= {"weights": self.coverage.described(), **self.curvature.state_dict()}
        state["shares"] = [getattr(g["damping"], "share", None) for g in self.coverage.groups]
        if self.recorder is not None:
            state["generator"] = self.recorder.generator_state
        return sealed(state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state.

        Raises:
            ValueError: it is of another format, method or model; nothing was loaded.
        """
        self.reading(state)()

    def reading(self, state: dict[str, Any]) -> Callable[[], None]:
        """Check a state, and return what takes it over: a state is read whole or not at all."""
        check_state(state, "preconditioner", self.method)
        groups, shares, layers = self.coverage.groups, state.get("shares"), state.get("weights")
        if isinstance(shares, list) and len(shares) != len(groups):
            raise ValueError(
                f"this state has {len(shares)} parameter groups, and this preconditioner "
                f"has {len(groups)}; nothing was loaded"
            )
        if isinstance(layers, Mapping):
            self.coverage.check_layers(layers)
        check_form(state)
        weights = self.coverage.recognised(state["weights"])
        take_curvature = self.curvature.reading(state, weights)
        drawn = None if self.recorder is None else generator_state(state)

        def take() -> None:
            for weight in weights.values():
                if weight.name not in self.weights:
                    self.coverage.join(weight)
                    if self.recorder is not None:
                        self.recorder.add(weight)
            take_curvature()
            self.steps = state["steps"]
            for group, share in zip(self.coverage.groups, state["shares"], strict=True):
                if isinstance(group["damping"], LevenbergMarquardt):
                    group["damping"].share = share
            if self.recorder is not None and drawn is not None:
                self.recorder.generator.set_state(drawn)
            self.coverage.stepped()
            self._prepare()

        return take


class _GradientOnly:
    """The mean gradient of a step, for approximations that need nothing else."""

    def __init__(self, name: str, gradient: Tensor) -> None:
        self.name = name
        self.gradient, self.shape, self.examples = gradient, gradient.shape, 1.0
        self.term_scale, self.whole = 1.0, True


def _groups(model: nn.Module, params: Iterable[Any] | None) -> list[dict[str, Any]]:
    """Parameter groups of their own."""
    given = list(model.parameters() if params is None else params)
    every = given if given and isinstance(given[0], dict) else [{"params": given}]
    lists = [[g["params"]] if isinstance(g["params"], Tensor) else g["params"] for g in every]
    return [{**group, "params": list(ours)} for group, ours in zip(every, lists, strict=True)]
