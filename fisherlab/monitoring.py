"""`Monitor`: what a plain training loop's preconditioner is worth, every so many steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from fisherlab import doors, metrics
from fisherlab.approximations.exact import Exact
from fisherlab.auditing import evaluated
from fisherlab.blocks import Block, DirectSum
from fisherlab.blocks.direct_sum import layer_block
from fisherlab.distributed import unwrapped
from fisherlab.extract import capture
from fisherlab.extract.fisher import FISHER_TYPES
from fisherlab.optim.preconditioner import Preconditioner
from fisherlab.optim.readings import read

# A function that takes the numbers of a step, by names such as "1/AdamW square/direction_cosine".
Log = Callable[[Mapping[str, float], int], None]


class Monitor:
    """`tr F`, effective rank, direction cosine, age and clipped share, of every layer with a block.

        monitor = fl.Monitor(optimizer, model, criterion, every=100)
        for x, y in loader:
            ...
            optimizer.step()
            monitor(x, y)
        monitor.frame

    Every `every`-th call captures the first `examples` of the batch. It logs per layer `trace` and
    `effective_rank` of the exact block `F`, and per reading `X` of the optimizer's state, as
    `fl.audit` reads it:

    * `direction_cosine`: between `(X + l I)^{-1} g` and `(F + l I)^{-1} g`, with
      `l = damping tr X / N` and `damping tr F / N`, so that no scale of `X` counts;
    * `cosine`: between `X` and `F`;
    * `stale_cosine`: between the `X` of the last look and the `F` of this one.

    With the defaults the looks took 0.7 to 2.5 % of the time of an MLP and of LeNet on MNIST, with
    AdamW, SOAP and KFAC; `share_of_time` says it of a run.

    `clipped_share` is the share of all steps that a FisherLab optimizer's `clip` has shortened. The
    training is as it was, as in `fl.audit`.

    Args:
        optimizer: an optimizer that `fl.audit` reads.
        model: the model.
        criterion: the loss.
        every: calls from one look to the next.
        log: a function of the numbers by name and of the step; None: they are only kept.
        examples: the most that a look captures.
        damping: the share of the mean eigenvalue that is added to both blocks.
        fisher_type: of `F`; None: the default of `capture`.
        loss_scale: "mean" or "sum" of a loss inside the model, as in `capture`; `criterion` is then
            None.

    Raises:
        ValueError, TypeError: an argument is not what its name says.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer | Preconditioner,
        model: nn.Module,
        criterion: Callable[..., Any] | None,
        *,
        every: int = 500,
        log: Log | None = None,
        examples: int = 32,
        damping: float = 0.1,
        fisher_type: str | None = None,
        loss_scale: str | None = None,
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer | Preconditioner):
            raise TypeError(
                f"optimizer must be one that fl.audit reads, got {doors.said(optimizer)}"
            )
        if criterion is not None:
            doors.function(criterion, "criterion(outputs, y)")
        if log is not None:
            doors.function(log, "log(values, step)")
        if fisher_type is not None:
            doors.choice(fisher_type, "fisher_type", FISHER_TYPES)
        every, examples = doors.count(every, "every"), doors.count(examples, "examples")
        damping = doors.number(damping, "damping", above=0.0)
        self.optimizer, self.model, self.criterion = optimizer, unwrapped(model), criterion
        self.every, self.log, self.examples = every, log, examples
        self.damping, self.fisher_type, self.loss_scale = damping, fisher_type, loss_scale
        self.steps = 0
        self.rows: list[dict[str, float]] = []
        self._last: dict[tuple[str, str], Block] = {}
        self._started, self._spent = 0.0, 0.0

    @property
    def frame(self) -> pd.DataFrame:
        """Everything logged, one row per look."""
        return pd.DataFrame(self.rows)

    @property
    def share_of_time(self) -> float:
        """The share of the time since the first call that the looks took."""
        passed = time.perf_counter() - self._started
        return self._spent / passed if self._started else 0.0

    def __call__(self, x: Tensor | Mapping[str, Any], y: Tensor | None = None) -> None:
        """To be called after each `optimizer.step()`, with its batch.

        Args:
            x: a tensor `[n, ...]`, or a dict of the model's arguments.
            y: the labels; None if a dict holds them, as in `capture`.
        """
        parts = x.values() if isinstance(x, Mapping) else (x,)
        for batch, what in (*((part, "x") for part in parts), *(() if y is None else ((y, "y"),))):
            if not isinstance(batch, Tensor) or not batch.ndim:
                raise ValueError(f"{what} must be a tensor of a batch, got {doors.said(batch)}")
        start = time.perf_counter()
        self._started = self._started or start
        self.steps += 1
        if self.steps % self.every:
            return
        n = self.examples
        few = {k: v[:n] for k, v in x.items()} if isinstance(x, Mapping) else x[:n]
        values = self._look(few, None if y is None else y[:n])
        self.rows.append({"step": self.steps, **values})
        if self.log is not None:
            self.log(values, self.steps)
        self._spent += time.perf_counter() - start

    def _look(self, x: object, y: Tensor | None) -> dict[str, float]:
        blocks = read(self.optimizer, self.model).blocks
        with evaluated(self.model):
            captures = capture(
                self.model,
                self.criterion,
                x,
                y,
                fisher_type=self.fisher_type,
                loss_scale=self.loss_scale,
                kinds=("map",),
            )
        groups: dict[str, list[Any]] = {}
        for layer in captures.values():
            groups.setdefault(layer.name, []).append(layer)
        values: dict[str, float] = {}
        clipped, steps = (getattr(self.optimizer, key, None) for key in ("clipped", "steps"))
        if clipped is not None and steps:
            values["clipped_share"] = clipped / steps
        for name, parts in groups.items():
            F = layer_block([Exact()(part) for part in parts])
            gradient = torch.cat([part.gradient for part in parts])
            values[f"{name}/trace"] = float(F.trace())
            values[f"{name}/effective_rank"] = float(metrics.effective_rank(F))
            step = self._step(F, gradient)
            for reading, found in blocks.items():
                X = found.get(name)
                if X is None or X.shape != F.shape:
                    continue
                at = f"{name}/{reading}"
                values[f"{at}/cosine"] = float(metrics.cosine(X, F))
                values[f"{at}/direction_cosine"] = _cosine(self._step(X, gradient), step)
                if (old := self._last.get((name, reading))) is not None:
                    values[f"{at}/stale_cosine"] = float(metrics.cosine(old, F))
                self._last[name, reading] = X
        return values

    def _step(self, X: Block | DirectSum, gradient: Tensor) -> Tensor:
        damping = self.damping * float(X.trace()) / X.size
        return X.solve(gradient, damping) if damping > 0 else gradient


def _cosine(one: Tensor, other: Tensor) -> float:
    lengths = one.double().norm() * other.double().norm()
    return float((one.double() * other.double()).sum() / lengths.clamp(min=1e-300))


def to_tensorboard(writer: Any) -> Log:
    """A log into a `torch.utils.tensorboard.SummaryWriter`; W&B's is `wandb.log(values, step)`."""

    def log(values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return log
