"""`NaturalGradient`: one optimizer for every registered approximation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from fisherlab.approximations import Approximation
from fisherlab.approximations.damping import Rule, as_rule
from fisherlab.blocks import Block
from fisherlab.casting import uncasting
from fisherlab.distributed import answering
from fisherlab.optim.adaptive import adapting, second_look
from fisherlab.optim.attempt import Kept
from fisherlab.optim.base import CurvatureOptimizer
from fisherlab.optim.options import gathered
from fisherlab.optim.preconditioner import Preconditioner
from fisherlab.optim.schedule import USUAL, Schedule
from fisherlab.optim.step import UNCLIPPED, Clip, group_options

if TYPE_CHECKING:
    import pandas as pd


class NaturalGradient(CurvatureOptimizer):
    """`W <- W - lr (F~ + lambda I)^{exponent} dW`, for any approximation `F~` of the Fisher blocks.

    It is a `Preconditioner`, which makes the blocks, and a step. In the step `clip` bounds the
    directions before weight decay and momentum. `p.grad` is read, never changed.

    Args:
        model: the model.
        approximation: an instance such as `fl.KFAC()`.
        lr: learning rate.
        damping: lambda, or a rule `dict[layer, Block] -> dict[layer, lambda]`.
        schedule: when statistics, bases and damped inverses are refreshed.
        clip: how long a step may be.
        params: parameters, or groups of them with options of their own; None: all of the model.
        momentum: weight of the past velocity.
        weight_decay: `w`; where it goes is said by `weight_decay_placement` and `decoupled`.
        criterion: the very object that the loop calls; see `Preconditioner`.
        fisher_type: "empirical", "mc" or "exact".
        nonfinite: "raise" or "skip" a step whose gradient has NaN or inf.
        options: further ones of `Preconditioner` (`layers`, `skip`, `graft`, `generator`, ...) and
            of a group (`nesterov`, `weight_decay_placement`, `decoupled`), `control`, and fields of
            `schedule` and `clip` spelled flat, as `create` takes them: `statistics_every=1`,
            `kl_clip=1e-3`.

    Raises:
        ValueError: an option is out of its range.
        TypeError: an option is unknown, or the approximation is none.
    """

    data_parallel = True
    takers = (group_options, Preconditioner)
    parts: ClassVar[dict[str, Any]] = {"schedule": USUAL, "clip": UNCLIPPED}

    def __init__(
        self,
        model: nn.Module,
        approximation: Approximation,
        *,
        lr: float,
        damping: float | Rule,
        schedule: Schedule = USUAL,
        clip: Clip = UNCLIPPED,
        params: Iterable[Any] | None = None,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        criterion: Callable[..., Any] | None = None,
        fisher_type: str = "empirical",
        nonfinite: str = "raise",
        **options: Any,
    ) -> None:
        options = gathered({"schedule": schedule, "clip": clip, **options})
        schedule, clip = options.pop("schedule"), options.pop("clip")
        own = ("nesterov", "weight_decay_placement", "decoupled")
        step = {key: options.pop(key) for key in own if key in options}
        names = {key: options.pop(key, None) for key in ("layers", "skip")}
        control = options.pop("control", False)
        as_rule(damping)
        super().__init__(
            model,
            params,
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            clip=clip,
            nonfinite=nonfinite,
            groups={"damping": damping, **schedule.intervals},
            control=control,
            **names,
            **step,
        )
        self.preconditioner = Preconditioner(
            model,
            approximation,
            damping=damping,
            schedule=schedule,
            params=self.coverage,
            criterion=criterion,
            fisher_type=fisher_type,
            **options,
        )
        self._install(self.preconditioner)

    @property
    def approximation(self) -> Approximation:
        """The approximation that the blocks are made by."""
        return self.preconditioner.approximation

    def due(self) -> tuple[str, ...]:
        """Parts that the next step refreshes in any layer: `damping`, `statistics`, `basis` ..."""
        return (
            *(("damping",) if adapting(self.param_groups, self.steps) else ()),
            *self.preconditioner.due(),
        )

    @torch.no_grad()
    @uncasting
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """One step; with `levenberg_marquardt` damping, now and then a second look at the loss."""
        if adapting(self.param_groups, self.steps) and not self.preconditioner.over:
            with answering(self.ranks, "looking at the loss of a step"):
                return second_look(self.preconditioner, super().step, closure)
        return super().step(closure)

    def _described(self) -> dict[str, str]:
        return {**super()._described(), **self.preconditioner.described()}

    def _keep(self) -> Kept:
        return self.preconditioner.keep()

    def _directions(self) -> dict[nn.Parameter, Tensor]:
        gradients = {} if self.preconditioner.over else self.gradients()
        found = self.preconditioner.directions(gradients)
        steps = self.combine(gradients, found) if found else {}
        return {
            p: d for n, matrix in steps.items() for p, d in self.weights[n].split(matrix).items()
        }

    def combine(
        self, gradients: dict[str, Tensor], directions: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The step of each layer from its gradient and its natural direction."""
        return directions

    def _discard(self) -> None:
        self.preconditioner.forget()

    def _refused(self) -> None:
        self.preconditioner.refused()

    def _stepped(self) -> None:
        self.preconditioner.stepped()

    def blocks(self) -> dict[str, Block]:
        """The current block of each layer: goes into `fl.compare(approximations=...)` as it is."""
        return self.preconditioner.blocks()

    def summary(self) -> pd.DataFrame:
        """`Preconditioner.summary`: the damping of each layer, and the eigenvalues above it."""
        return self.preconditioner.summary()

    @property
    def method(self) -> str:
        """The name of the method to which a state belongs."""
        return f"{type(self).__name__}({type(self.approximation).__name__})"

    def __repr__(self) -> str:
        head, _, rest = super().__repr__().partition(" ")
        return f"{head} of {self.approximation!r} {rest}"

    def _extra_state(self) -> dict[str, Any]:
        return {"preconditioner": self.preconditioner.state_dict()}

    def _reading(self, extra: dict[str, Any]) -> Callable[[], None]:
        return self.preconditioner.reading(extra["preconditioner"])
