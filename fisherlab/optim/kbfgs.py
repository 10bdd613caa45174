"""K-BFGS as an optimizer: a second pass on the same batch after each step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from fisherlab import doors
from fisherlab.approximations.kbfgs import KBFGS
from fisherlab.blocks import FromInverse, Kronecker
from fisherlab.blocks.contractions import second_moment
from fisherlab.blocks.numerics import cholesky, sum_of
from fisherlab.casting import uncasting
from fisherlab.optim.attempt import Kept, calling, whole
from fisherlab.optim.curvature import Part
from fisherlab.optim.natural_gradient import NaturalGradient
from fisherlab.optim.options import gathered
from fisherlab.optim.passes import delivered
from fisherlab.optim.scale import OptimizerError
from fisherlab.optim.schedule import Schedule
from fisherlab.optim.step import UNCLIPPED, check_group, evaluated
from fisherlab.optim.weight import undelivered


class KBFGSOptimizer(NaturalGradient):
    """`W <- W - lr H_g m H_a`, `m` the EMA (`gradient_decay`) of the gradient.  Goldfarb 2020.

    `step(closure)` needs a closure that zeroes the gradients, computes the loss on the *same* batch
    and calls `backward()`. It runs before the step and once more after it, for the pair
    `s = change of the mean pre-activation`, `y = change of its gradient`.

    Args:
        model: the model.
        approximation: `fl.KBFGS(...)`; None: one with `damping`.
        lr: learning rate.
        damping: lambda, absolute; used if `approximation` is None.
        gradient_decay: weight of the past in `m`.
        options: further arguments of `NaturalGradient`.
    """

    data_parallel = False
    parts: ClassVar[dict[str, Any]] = {
        "schedule": Schedule(statistics=1, basis=1, decay=0.9),
        "clip": UNCLIPPED,
    }

    def __init__(
        self,
        model: nn.Module,
        approximation: KBFGS | None = None,
        *,
        lr: float,
        damping: float = 0.3,
        gradient_decay: float = 0.9,
        **options: Any,
    ) -> None:
        options = {"momentum": 0.0, **gathered({**self.parts, **options})}
        for name, steps in options["schedule"].intervals.items():
            if steps != 1:
                raise ValueError(f"K-BFGS updates at every step; {name} cannot be changed")
        approximation = approximation or KBFGS(damping=damping)
        doors.number(gradient_decay, "gradient_decay", least=0.0, below=1.0)
        self.root = approximation.damping**0.5
        super().__init__(model, approximation, lr=lr, damping=approximation.damping, **options)
        self.gradient_decay = gradient_decay
        self._mean_gradient: dict[str, Tensor] = {}

    @torch.no_grad()
    @uncasting
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor:  # type: ignore[override]
        """One step and one BFGS update; the closure runs twice, on the same batch."""
        if closure is None:
            raise OptimizerError(
                "K-BFGS needs step(closure): it evaluates the same batch again after the step"
            )
        with calling(self._refused):
            return self._evaluated(closure)

    def _evaluated(self, closure: Callable[[], Tensor]) -> Tensor:
        for group in self.param_groups:
            check_group(group)
        self.coverage.check(self.model)
        self.preconditioner.forget()
        with torch.enable_grad():
            loss = evaluated(closure)
        if not self.coverage.finite(self.nonfinite):
            self.preconditioner.forget()
            return loss
        whole(lambda: self._move(closure), self._kept())
        self._stepped()
        self.steps += 1
        self.preconditioner.steps += 1
        return loss

    def _kept(self) -> Kept:
        """The state before a step that its second evaluation may refuse."""
        curvature, clipped = self.preconditioner.curvature.kept(), self.clipped
        mean = dict(self._mean_gradient)
        before = {p: p.clone() for p in self.coverage.where() if p.grad is not None}
        velocities: dict[Any, dict[str, Any]] = {
            p: {key: buffer.clone() for key, buffer in self.state[p].items()}
            for p in before
            if p in self.state
        }

        def back() -> bool:
            curvature()
            self.clipped, self._mean_gradient = clipped, mean
            for p, value in before.items():
                p.copy_(value)
                self.state.pop(p, None)
            self.state.update(velocities)
            self.preconditioner.forget()
            return False  # the batch has to be evaluated anew

        return Kept(back, lambda: None)

    def _move(self, closure: Callable[[], Tensor]) -> None:
        """The step, and the update of the blocks by what it changed."""
        before = self._captures()
        gradients = self.gradients()
        parts = {
            name: self.preconditioner.curvature.parts_of(self.weights[name]) for name in gradients
        }
        for name in gradients:
            for part in parts[name]:
                self._start(part, delivered(before, part.key))
        directions = {
            p: d
            for name in gradients
            for p, d in self.weights[name].split(self._step_of(name, gradients[name])).items()
        }
        self._apply(self._clipped(directions))
        with torch.enable_grad():
            evaluated(closure)
        after = self._captures()
        for part in (part for name in gradients for part in parts[name]):
            _learn(part, delivered(before, part.key), delivered(after, part.key))

    def _captures(self) -> list[dict[Any, Any]]:
        recorder = self.preconditioner.recorder
        assert recorder is not None
        found = recorder.captures()
        recorder.clear()
        return found

    def _start(self, part: Part, layers: Sequence[Any]) -> None:
        """`H_g = I` and `H_a = (A + sqrt(lambda) I)^{-1}` of the first batch."""
        name = part.weight.name
        if name in self.left_out:
            return
        if not layers:
            raise OptimizerError(undelivered(name))
        if part.inverse is not None:
            return
        rows = sum(layer.inputs.shape[0] * layer.positions for layer in layers)
        A = sum_of([second_moment(layer.inputs) for layer in layers]) / rows
        eye = torch.eye(len(A), dtype=A.dtype, device=A.device)
        H_a = torch.cholesky_inverse(cholesky(A + self.root * eye, "damped input factor"))
        H_g = torch.eye(layers[0].shape[0], dtype=A.dtype, device=A.device)
        part.inverse = Kronecker(H_g, H_a)
        part.block = FromInverse(part.inverse)
        self.preconditioner.curvature.dampings[name] = self.root**2

    def _step_of(self, name: str, gradient: Tensor) -> Tensor:
        mean = self._mean_gradient.get(name)
        beta = self.gradient_decay
        mean = gradient.clone() if mean is None else beta * mean + (1 - beta) * gradient
        self._mean_gradient[name] = mean
        return self.preconditioner.precondition(name, mean)

    def _extra_state(self) -> dict[str, Any]:
        return {**super()._extra_state(), "mean_gradient": dict(self._mean_gradient)}

    def _reading(self, extra: dict[str, Any]) -> Callable[[], None]:
        take_blocks = super()._reading(extra)

        def take() -> None:
            take_blocks()
            self._mean_gradient = {
                name: mean.to(self.weights[name].weight.device)
                for name, mean in extra["mean_gradient"].items()
            }

        return take


def _learn(part: Part, before: list[Any], after: list[Any]) -> None:
    running = part.running
    pairs = [replace(one, after=two) for one, two in zip(before, after, strict=True)]
    if running is None or not pairs:
        return
    running.update(*pairs)
    if not running.basis:
        # the first update starts from the inverses that took the first step
        start = cast(Kronecker, part.inverse)
        running.basis = {"H_a": start.A, "H_g": start.G}
    running.refresh_basis()
    part.block = running.block()
    part.inverse = part.block.power(-1, 0.0)
