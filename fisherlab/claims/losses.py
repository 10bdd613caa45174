"""Natural steps under cross entropy and under squared error, on the same examples (NGM 4)."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from fisherlab.claims.base import EXTENSION, REFUTED, Case, Usually
from fisherlab.claims.instances import (
    ACTIVATIONS,
    criterion_of,
    integer,
    layer_names,
    log_uniform,
    network_case,
)
from fisherlab.claims.steps import scores_of, solve, stepped

# Gradient steps before the network is looked at, and their learning rate.
STEPS, RATE = 20, 0.5
# Powers of two by which a direction is scaled in the search for the best step along it.
LENGTHS = range(-14, 12)
FITTED = 1e-9  # a loss below it is as good as zero


class Losses(Usually):
    """A claim about one network, trained under either loss from the same weights and examples.

    The labels are classes; under squared error the targets are their unit vectors.
    """

    kind = EXTENSION
    scale = 1.0
    free: ClassVar[tuple[str, ...]] = ("x",)

    def draw(self, generator: torch.Generator, size: float) -> Case:
        options = {"examples": (4, 10), "positions": 1, "criteria": ("cross_entropy",)}
        case = network_case(generator, size, **options)  # type: ignore[arg-type]
        steps, classes = integer(generator, 0, STEPS), len(case["weights"][-1])
        y = torch.randint(classes, (len(case["x"]),), generator=generator)
        found = {"x": case["x"], "y": y, "damping": log_uniform(generator, 1e-3, 0.1)}
        found |= {"activation": case["activation"], "criterion": "cross_entropy"}
        for name in "cross_entropy", "squared_error":
            found[f"weights_{name}"] = case["weights"]
            found[f"weights_{name}"] = _descended(under(found, name), steps)
        return found


def under(case: Case, criterion: str) -> Case:
    """The case of one of the two losses."""
    one_hot = criterion == "squared_error"
    weights: list[Tensor] = case[f"weights_{criterion}"]
    y = nn.functional.one_hot(case["y"], len(weights[-1])).double() if one_hot else case["y"]
    return {**case, "weights": weights, "criterion": criterion, "y": y, "layer": 0}


def _descended(case: Case, steps: int) -> list[Tensor]:
    """The weights after so many gradient steps."""
    weights = [W.clone().requires_grad_() for W in case["weights"]]
    for _ in range(steps):
        slopes = torch.autograd.grad(_loss(case, weights), weights)
        moved = [W - RATE * g for W, g in zip(weights, slopes, strict=True)]
        weights = [W.detach().requires_grad_() for W in moved]
    return [W.detach() for W in weights]


def _loss(case: Case, weights: list[Tensor]) -> Tensor:
    x, last = case["x"], len(weights) - 1
    for k, W in enumerate(weights):
        x = x @ W[:, :-1].mT + W[:, -1]
        x = x if k == last else ACTIVATIONS[case["activation"]]()(x)
    return criterion_of(case, "mean")(x, case["y"])


def _natural(case: Case) -> tuple[Tensor, Tensor]:
    """The damped natural step and the gradient, from the dense rows of `U`."""
    U = scores_of(case, layer_names(case))
    return solve(U, case["damping"], -U.mean(0)), -U.mean(0)


class Lengthened(Losses, name="cross_entropy_lengthens_the_natural_step"):
    """Under cross entropy the natural step is usually longer, relative to the gradient."""

    source = "NGM 4.3"
    expected = REFUTED
    latex = (
        r"P(\|(F + \beta I)^{-1} g\| / \|g\|_{\mathrm{squared}} \le "
        r"\|(F + \beta I)^{-1} g\| / \|g\|_{\mathrm{CE}}) > 1/2"
    )
    sides = ("squared error", "cross entropy")

    def left(self, case: Case) -> float:
        return _longer(*stepped(under(case, "squared_error")))

    def right(self, case: Case) -> float:
        return _longer(*_natural(under(case, "cross_entropy")))


def _longer(step: Tensor, gradient: Tensor) -> float:
    return (step.norm() / gradient.norm().clamp(min=1e-300)).item()


class Gained(Losses, name="natural_step_gains_more_under_squared_error"):
    """The best step along the natural direction usually gains more on SGD's under squared error."""

    source = "NGM 4.2, table 1"
    expected = REFUTED
    latex = (
        r"P(\ln\tfrac{\min_t L(w - t g)}{\min_t L(w - t d)}_{\mathrm{CE}} \le "
        r"\ln\tfrac{\min_t L(w - t g)}{\min_t L(w - t d)}_{\mathrm{squared}}) > 1/2"
    )
    sides = ("cross entropy", "squared error")

    def left(self, case: Case) -> float:
        mine = under(case, "cross_entropy")
        return _gain(mine, *stepped(mine))

    def right(self, case: Case) -> float:
        mine = under(case, "squared_error")
        return _gain(mine, *_natural(mine))


def _gain(case: Case, step: Tensor, gradient: Tensor) -> float:
    return math.log(_best(case, gradient) / _best(case, step))


@torch.no_grad()
def _best(case: Case, direction: Tensor) -> float:
    """The least loss along a direction, over steps whose lengths double."""
    weights: list[Tensor] = case["weights"]
    parts = direction.split([W.numel() for W in weights])
    losses = [_loss(case, weights)]
    for power in LENGTHS:
        moved = [W - 2.0**power * d.view_as(W) for W, d in zip(weights, parts, strict=True)]
        losses.append(_loss(case, moved))
    return max(FITTED, torch.stack(losses).nan_to_num(nan=math.inf).min().item())
