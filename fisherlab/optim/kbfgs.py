"""K-BFGS as an optimizer: a second pass on the same batch after each step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from fisherlab.approximations.kbfgs import KBFGS
from fisherlab.blocks import FromInverse, Kronecker
from fisherlab.blocks.contractions import second_moment
from fisherlab.blocks.numerics import sum_of
from fisherlab.optim.natural_gradient import NaturalGradient
from fisherlab.optim.passes import delivered
from fisherlab.optim.scale import OptimizerError
from fisherlab.optim.weight import undelivered


class KBFGSOptimizer(NaturalGradient):
    """`W <- W - lr H_g m H_a`, `m` the EMA (`gradient_decay`) of the gradient.  Goldfarb 2020.

    `step(closure)` needs a closure that zeroes the gradients, computes the loss on the *same* batch
    and calls `backward()`: it is run before the step and once more after it, for the pair
    `s = change of the mean pre-activation`, `y = change of its gradient`.
    """

    data_parallel = False

    def __init__(
        self,
        model: nn.Module,
        approximation: KBFGS | None = None,
        *,
        lr: float,
        damping: float = 0.3,
        decay: float = 0.9,
        gradient_decay: float = 0.9,
        **options: Any,
    ) -> None:
        for name in ("statistics_every", "basis_every", "corrections_every"):
            if options.pop(name, 1) not in (1, None):
                raise ValueError(f"K-BFGS updates at every step; {name} cannot be changed")
        approximation = approximation or KBFGS(damping=damping)
        self.root = approximation.damping**0.5
        options.setdefault("momentum", 0.0)
        super().__init__(
            model,
            approximation,
            lr=lr,
            damping=approximation.damping,
            decay=decay,
            statistics_every=1,
            basis_every=1,
            **options,
        )
        self.gradient_decay = gradient_decay
        self._mean_gradient: dict[str, Tensor] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor:  # type: ignore[override]
        """One step and one BFGS update; the closure runs twice, on the same batch."""
        if closure is None:
            raise OptimizerError(
                "K-BFGS needs step(closure): it evaluates the same batch again after the step"
            )
        assert self.recorder is not None
        self.recorder.clear()
        with torch.enable_grad():
            loss = closure()
        if not self.coverage.finite(self.nonfinite):
            self.recorder.clear()
            return loss
        before = self.recorder.captures()
        self.recorder.clear()
        gradients = self.gradients()
        self._start(gradients, before)
        directions = {
            p: d
            for name in gradients
            for p, d in self.weights[name].split(self._step_of(name, gradients[name])).items()
        }
        self._apply(self._clipped(directions))
        with torch.enable_grad():
            closure()
        after = self.recorder.captures()
        self.recorder.clear()
        for name in gradients:
            for key in self.weights[name].keys:
                self._learn(key, delivered(before, key), delivered(after, key))
        self.steps += 1
        return loss

    def _start(self, gradients: dict[str, Tensor], before: list[dict]) -> None:
        """`H_g = I` and `H_a = (A + sqrt(lambda) I)^{-1}` of the first batch."""
        for name in gradients:
            for key in self.weights[name].keys:
                layers = delivered(before, key)
                if name in self.left_out:
                    continue
                if not layers:
                    raise OptimizerError(undelivered(name))
                if key not in self._owner:
                    self._make_room(self.weights[name])
                if key in self._preconditioners:
                    continue
                rows = sum(layer.inputs.shape[0] * layer.positions for layer in layers)
                A = sum_of([second_moment(layer.inputs) for layer in layers]) / rows
                eye = torch.eye(len(A), dtype=A.dtype, device=A.device)
                H_a = torch.cholesky_inverse(torch.linalg.cholesky(A + self.root * eye))
                H_g = torch.eye(layers[0].shape[0], dtype=A.dtype, device=A.device)
                self._preconditioners[key] = Kronecker(H_g, H_a)
                self._blocks[key] = FromInverse(self._preconditioners[key])
                self._lambdas[name] = self.root**2

    def _step_of(self, name: str, gradient: Tensor) -> Tensor:
        mean = self._mean_gradient.get(name)
        beta = self.gradient_decay
        mean = gradient.clone() if mean is None else beta * mean + (1 - beta) * gradient
        self._mean_gradient[name] = mean
        return self._precondition(self.weights[name], mean)

    def _learn(self, key: str, before: list, after: list) -> None:
        running = self._running[key]
        pairs = [replace(one, after=two) for one, two in zip(before, after, strict=True)]
        if running is None or not pairs:
            return
        running.update(*pairs)
        if not running.basis:
            # the first update starts from the inverses that took the first step
            start = cast(Kronecker, self._preconditioners[key])
            running.basis = {"H_a": start.A, "H_g": start.G}
        running.refresh_basis()
        self._blocks[key] = running.block()
        self._preconditioners[key] = self._blocks[key].power(-1, 0.0)

    def _extra_state(self) -> dict[str, Any]:
        return {**super()._extra_state(), "mean_gradient": dict(self._mean_gradient)}

    def _load_extra_state(self, extra: dict[str, Any]) -> None:
        self._mean_gradient = dict(extra.pop("mean_gradient"))
        super()._load_extra_state(extra)
