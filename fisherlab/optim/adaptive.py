"""Levenberg-Marquardt: a second look at the loss says how well the blocks predicted a step."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from fisherlab.approximations.damping import LevenbergMarquardt
from fisherlab.blocks import Block
from fisherlab.extract.isolation import buffers_kept
from fisherlab.optim.base import CurvatureOptimizer
from fisherlab.optim.scale import OptimizerError


class AdaptiveDamping(CurvatureOptimizer):
    """Adapts the damping of groups whose rule is `levenberg_marquardt`."""

    @abstractmethod
    def _damped_blocks(self) -> dict[str, tuple[Block, float, float]]:
        """The current block of each layer, its lambda, and the factor beta on both."""

    @abstractmethod
    def _damp_again(self) -> None:
        """Take the damping that the rules now say."""

    @abstractmethod
    def _unrecorded(self) -> AbstractContextManager[None]:
        """Passes of the model inside leave nothing behind."""

    def _adapting(self) -> list[LevenbergMarquardt]:
        """The rules that look twice at the loss of this step."""
        rules = [group["damping"] for group in self.param_groups]
        found = [rule for rule in rules if isinstance(rule, LevenbergMarquardt)]
        return [rule for rule in found if self.steps % rule.every == 0]

    def due(self) -> tuple[str, ...]:
        """`damping` where the next step adapts it."""
        return (*super().due(), *(("damping",) if self._adapting() else ()))

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """One step; with `levenberg_marquardt` damping, now and then a second look at the loss."""
        adapting = self._adapting()
        if not adapting:
            return super().step(closure)
        if closure is None:
            raise OptimizerError(
                "levenberg_marquardt compares the loss before and after a step on the same batch: "
                "call step(closure), with a closure that zeroes the gradients, computes the loss, "
                "calls backward() and returns the loss"
            )
        params = [p for group in self.param_groups for p in group["params"]]
        before, count = {p: p.clone() for p in params}, self.steps
        loss = super().step(closure)
        if self.steps > count and loss is not None:
            predicted = self._predicted_change({p: p - before[p] for p in params})
            with self._unrecorded(), unmoved(self.model), torch.enable_grad():
                change = closure().item() - loss.item()
            if self.ranks is not None:
                change = self.ranks.total(change) / self.ranks.size
            for rule in adapting:
                rule.adapt(change / predicted if predicted < 0 else -math.inf)
            self._damp_again()
        return loss

    def _predicted_change(self, moved: dict[nn.Parameter, Tensor]) -> float:
        """`<g, d> + 1/2 <d, beta (F~ + lambda I) d>` of the step just taken."""
        value = sum((d * p.grad).sum().item() for p, d in moved.items() if p.grad is not None)
        for name, (block, damping, beta) in self._damped_blocks().items():
            d = self.weights[name].joined(moved)
            value += 0.5 * beta * block.quadratic(d).item()
            value += 0.5 * beta * damping * d.square().sum().item()
        return value


@contextmanager
def unmoved(model: nn.Module) -> Iterator[None]:
    """Buffers (batch-norm statistics) and the global random streams are afterwards as before.

    `torch.optim` counts no such second pass: an evaluation of the loss must not train.
    """
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    forked = [index for index in devices if index is not None]
    with buffers_kept(model), torch.random.fork_rng(devices=forked):
        yield
