"""The step from given directions: their length, weight decay, momentum, the learning rate."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd

from fisherlab import doors
from fisherlab.approximations.damping import as_rule
from fisherlab.blocks.reads import numbers_of
from fisherlab.casting import as_cast

DECAY_PLACEMENTS = ("after", "before", "loss")

Directions = Mapping[nn.Parameter, Tensor]


def evaluated(closure: Callable[[], Tensor]) -> Tensor:
    """The loss that a closure of the training loop returns.

    Raises:
        TypeError: it is no function, or takes arguments.
    """
    doors.function(closure, "closure()", error=TypeError)
    with as_cast():
        return closure()


@dataclass(frozen=True)
class Clip:
    """How long a step may be: all directions together are multiplied by at most 1.

        min(1, sqrt(r kl / q), norm / |direction|),   q = sum lr^2 <direction, gradient>,
        r = min(1, (steps taken + 1) / warmup)

    `kl` guards against the step that curvature of few batches misjudges. Once `kl` is active, the
    step has length `sqrt(r kl)` in the metric of the blocks. A larger learning rate no longer
    lengthens it, and a schedule has no effect.

    Args:
        kl: bound of `q`, to second order twice the KL divergence of the step; None: none.
        norm: bound of the norm of all directions together; None: none.
        warmup: steps at the start over which `kl` grows to its value.

    Raises:
        ValueError: a bound is not positive, or `warmup` is no count of steps.
    """

    kl: float | None = None
    norm: float | None = None
    warmup: int = 0

    def __post_init__(self) -> None:
        """Refuse bounds that are none."""
        for name, field in (("kl_clip", "kl"), ("max_norm", "norm")):
            bound = getattr(self, field)
            if bound is None:
                continue
            if (found := doors.real(bound)) is None or not found > 0:
                raise ValueError(f"{name} must be positive or None, got {doors.said(bound)}")
            object.__setattr__(self, field, found)
        steps = doors.count(self.warmup, "warmup, which counts steps,", 0)
        object.__setattr__(self, "warmup", steps)

    @property
    def bounds(self) -> dict[str, float]:
        """The bounds that are set, by the name of the flat option."""
        bounds = {"max_norm": self.norm, "kl_clip": self.kl}
        return {name: bound for name, bound in bounds.items() if bound is not None}

    def factor(self, directions: Directions, change: Callable[[], Tensor], steps: int) -> float:
        """The factor on all directions.

        Args:
            directions: of all parameters that have one.
            change: computes `q`; called where `kl` is set.
            steps: how many were taken before.
        """
        wanted = []
        if self.norm is not None:
            wanted.append(torch.stack(torch._foreach_norm(list(directions.values()))).norm())
        if self.kl is not None:
            wanted.append(change())
        if not wanted:
            return 1.0
        found, factor = iter(numbers_of(wanted)), 1.0
        if self.norm is not None:
            factor = min(factor, self.norm / max(next(found), 1e-300))
        if self.kl is not None:
            bound = self.kl * min(1.0, (steps + 1) / max(1, self.warmup))
            factor = min(factor, math.sqrt(bound / max(abs(next(found)), 1e-300)))
        return factor


UNCLIPPED = Clip()


def group_options(
    *,
    lr: float,
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    weight_decay_placement: str = "after",
    decoupled: bool = False,
) -> dict[str, Any]:
    """The options of the step as those of a parameter group, numbers checked.

    Raises:
        ValueError: a number is out of its range.
    """
    numbers = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
    found = {name: doors.number(value, name, least=0.0) for name, value in numbers.items()}
    for name, value in {"nesterov": nesterov, "decoupled": decoupled}.items():
        doors.flag(value, name)
    if found["momentum"] >= 1:
        raise ValueError(f"momentum must be below 1, where velocity dies out; got {momentum!r}")
    if nesterov and not found["momentum"]:
        raise ValueError("Nesterov momentum needs momentum > 0")
    return {
        "lr": lr,
        "momentum": momentum,
        "nesterov": nesterov,
        "weight_decay": weight_decay,
        "weight_decay_placement": weight_decay_placement,
        "decoupled": decoupled,
    }


# what every group has; a schedule of learning rates or a loop may write there between two steps
STEP_OPTIONS = tuple(inspect.signature(group_options).parameters)


def check_group(group: Mapping[str, Any], damped: bool = True) -> None:
    """Refuse a parameter group with an option that no optimizer takes.

    Args:
        group: as a loop or a state left it.
        damped: whether its damping must be there; another option may stand for it.

    Raises:
        ValueError: an option is missing, or out of its range.
    """
    if missing := [name for name in STEP_OPTIONS if name not in group]:
        raise ValueError(
            f"a parameter group lacks {', '.join(missing)}; put it back, or make a new optimizer"
        )
    group_options(**{name: group[name] for name in STEP_OPTIONS})
    doors.choice(group["weight_decay_placement"], "weight_decay_placement", DECAY_PLACEMENTS)
    for name in ("statistics_every", "basis_every", "corrections_every"):
        if name in group and (group[name] is not None or name != "corrections_every"):
            doors.count(group[name], name)
    if group.get("damping") is not None:
        as_rule(group["damping"])
    elif damped and "damping" in group:
        raise ValueError("damping must be a number > 0 or a rule, got None")


def placed_before(group: Mapping[str, Any]) -> bool:
    """Whether the weight decay of a group is in the gradient that is preconditioned."""
    return group["weight_decay_placement"] != "after" and not group["decoupled"]


def decayed(p: Tensor, group: Mapping[str, Any]) -> Tensor:
    """`g + w W` where the group's weight decay is placed before; else `g`."""
    gradient = cast(Tensor, p.grad)
    if not (placed_before(group) and group["weight_decay"]):
        return gradient
    return gradient.add(p, alpha=float(group["weight_decay"]))


def predicted_kl(groups: list[dict[str, Any]], directions: Directions) -> Tensor:
    """`sum lr^2 <direction, gradient>`, 0-d."""
    products = [
        lr * lr * torch.dot(directions[p].flatten(), decayed(p, group).flatten())
        for group in groups
        for lr in [float(group["lr"])]
        for p in group["params"]
        if p in directions
    ]
    return torch.stack(products).sum()


def take_step(
    groups: list[dict[str, Any]],
    state: MutableMapping[Any, dict[str, Any]],
    directions: Directions,
) -> None:
    """Move every parameter that has a gradient, by its direction where it has one.

    Args:
        groups: parameter groups with `group_options`.
        state: by parameter, where the momentum buffers are kept.
        directions: by parameter; the others take their gradients.
    """
    for group in groups:
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            continue
        steps = [directions[p] if p in directions else decayed(p, group) for p in params]
        # a tensor of one element is a number as well
        lr, decay, momentum = (float(group[key]) for key in ("lr", "weight_decay", "momentum"))
        if group["decoupled"] and decay:
            torch._foreach_mul_(params, 1 - lr * decay)
        buffers = [state[p].get("momentum_buffer") for p in params]
        fused = _laid_out_alike(params, steps, buffers)
        sgd(
            params,
            steps,
            buffers,
            weight_decay=0.0 if group["decoupled"] or placed_before(group) else decay,
            momentum=momentum,
            lr=lr,
            dampening=0.0,
            nesterov=group["nesterov"],
            maximize=False,
            foreach=not fused,
            fused=fused,
        )
        if momentum:
            for p, buffer in zip(params, buffers, strict=True):
                state[p]["momentum_buffer"] = buffer


def _laid_out_alike(
    params: list[nn.Parameter], steps: list[Tensor], buffers: list[Tensor | None]
) -> bool:
    """Whether torch's fused SGD, which goes over the bare memory of all three, may be used."""
    known = {buffer is not None for buffer in buffers}
    return len(known) == 1 and all(
        p.dtype == step.dtype
        and p.stride() == step.stride()
        and (buffer is None or buffer.stride() == p.stride())
        for p, step, buffer in zip(params, steps, buffers, strict=True)
    )
