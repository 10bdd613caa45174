"""Levenberg-Marquardt: a second look at the loss says how well the blocks predicted a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fisherlab.approximations.damping import LevenbergMarquardt
from fisherlab.extract.isolation import buffers_kept
from fisherlab.optim.preconditioner import Preconditioner
from fisherlab.optim.scale import OptimizerError
from fisherlab.optim.step import evaluated

Closure = Callable[[], Tensor]


def adapting(groups: list[dict[str, Any]], steps: int) -> list[LevenbergMarquardt]:
    """The rules of parameter groups that look twice at the loss of the step after `steps`."""
    rules = [group["damping"] for group in groups]
    found = [rule for rule in rules if isinstance(rule, LevenbergMarquardt)]
    return [rule for rule in found if steps % rule.every == 0]


def second_look(
    preconditioner: Preconditioner,
    step: Callable[[Closure], Tensor | None],
    closure: Closure | None,
) -> Tensor | None:
    """Take a step, evaluate its loss once more, and adapt the damping to the ratio.

    Args:
        preconditioner: whose groups have the rules.
        step: takes the step.
        closure: computes the loss and its gradients.

    Raises:
        OptimizerError: there is no closure.
    """
    if closure is None:
        raise OptimizerError(
            "levenberg_marquardt compares the loss before and after a step on the same batch: "
            "call step(closure), with a closure that zeroes the gradients, computes the loss, "
            "calls backward() and returns the loss"
        )
    coverage, count = preconditioner.coverage, preconditioner.steps
    rules = adapting(coverage.groups, count)
    before = {p: p.clone() for p in coverage.where()}
    loss = step(closure)
    if preconditioner.steps == count or loss is None:
        return loss
    predicted = _predicted_change(preconditioner, {p: p - before[p] for p in before})
    with preconditioner.unrecorded(), unmoved(preconditioner.model), torch.enable_grad():
        change = evaluated(closure).item() - loss.item()
    if (ranks := preconditioner.ranks) is not None:
        change = ranks.total(change) / ranks.size
    for rule in rules:
        rule.adapt(change / predicted if predicted < 0 else -math.inf)
    preconditioner.curvature.damp()
    return loss


def _predicted_change(preconditioner: Preconditioner, moved: dict[nn.Parameter, Tensor]) -> float:
    """`<g, d> + 1/2 <d, beta (F~ + lambda I) d>` of the step just taken."""
    value = sum((d * p.grad).sum().item() for p, d in moved.items() if p.grad is not None)
    curvature = preconditioner.curvature
    for name, block in curvature.blocks().items():
        d, half = preconditioner.weights[name].joined(moved), 0.5 * curvature.beta(name)
        value += half * block.quadratic(d).item()
        value += half * curvature.dampings[name] * d.square().sum().item()
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
