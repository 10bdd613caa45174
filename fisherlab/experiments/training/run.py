"""One optimizer with one seed: its steps, its rows, and the state that a resumed run needs."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from fisherlab import comparison, doors, optim
from fisherlab.approximations.damping import LevenbergMarquardt
from fisherlab.experiments.training.cost import (
    PARTS,
    TURNS,
    Clock,
    PeakMemory,
    SGDReference,
    due,
    finished,
    tensor_bytes,
)
from fisherlab.experiments.training.divergence import EXPLODED, Diverged, blame, weight_norms
from fisherlab.experiments.training.entries import make
from fisherlab.experiments.training.record import Record
from fisherlab.experiments.training.settings import schedule_of
from fisherlab.experiments.training.task import Task
from fisherlab.models.sequence import carry_on, forget

WINDOWS = 20  # points of the loss curve per epoch


class Run:
    """One optimizer with one seed, epoch by epoch; its rows go into the record."""

    def __init__(self, task: Task, record: Record) -> None:
        self.task, self.record = task, record
        settings = task.settings
        self.model, self.criterion = task.model(record.seed).train(), task.criterion()
        self.start = weight_norms(self.model)
        self.epochs = record.entry.epochs(settings.epochs)
        self.optimizer = make(
            record.entry,
            self.model,
            self.criterion,
            steps_per_epoch=task.steps_per_epoch,
            epochs=self.epochs,
        )
        schedule = schedule_of(settings.schedule)
        self.scheduler = LambdaLR(self.optimizer, lambda epoch: schedule(epoch / self.epochs))
        # these compare the loss before and after the step, on the same batch
        rules = [group.get("damping") for group in self.optimizer.param_groups]
        adapts = any(isinstance(rule, LevenbergMarquardt) for rule in rules)
        self.looks_twice = isinstance(self.optimizer, optim.KBFGSOptimizer) or adapts
        self.epoch = self.steps = 0
        self.seconds = self.cpu_seconds = 0.0
        self.clock, self.cpu = Clock(), Clock()
        self.split: dict[str, float] = {}
        self.first_loss: float | None = None

    # state ----------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Everything, as dicts of tensors, numbers and strings."""
        return {
            "epoch": self.epoch,
            "steps": self.steps,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "first_loss": self.first_loss,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "clock": self.clock.state(),
            "cpu": self.cpu.state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a state, bit for bit.

        Raises:
            ValueError: it is damaged; so do others, of torch's own checks.
        """
        self.epoch, self.steps = (doors.count(state[name], name, 0) for name in ("epoch", "steps"))
        self.seconds = doors.number(state["seconds"], "seconds")
        first = state["first_loss"]
        self.first_loss = None if first is None else doors.number(first, "first_loss")
        for name in ("model", "optimizer", "scheduler"):
            getattr(self, name).load_state_dict(state[name])
        # an earlier version did not count the processor's seconds, of which the first are lost
        self.cpu_seconds = state.get("cpu_seconds", math.nan)
        for name in ("clock", "cpu"):
            if name in state:
                getattr(self, name).load(state[name])

    # epochs ---------------------------------------------------------------------------------------

    def before(self) -> None:
        """Measure the model before the first step."""
        found = self.task.evaluate(self.model, translate=False)
        self.record.rows.append({**self._identity(), "train_loss": math.nan, **found})

    def train_epoch(self, reference: SGDReference, stepped: Callable[[float], None]) -> None:
        """Train one epoch with SGD timed between its steps, and evaluate."""
        task, memory = self.task, PeakMemory(self.task.x.device)
        # seed of a model's own draws, such as dropout; each epoch starts its own stream
        torch.manual_seed(1_000_003 * self.record.seed + self.epoch)
        every = max(1, task.steps_per_epoch // WINDOWS)
        every_turn = max(1, task.steps_per_epoch // TURNS)
        losses: list[float] = []
        clipped, steps = getattr(self.optimizer, "clipped", math.nan), self.steps
        reference.begin()
        if task.settings.carry:
            forget(self.model)
        for indices, x, y in task.batches(self.record.seed, self.epoch):
            kind = due(self.optimizer)
            start, worked = time.perf_counter(), time.process_time()
            losses.append(self.step(indices, x, y))
            spent, worked = time.perf_counter() - start, time.process_time() - worked
            self.seconds += spent
            self.cpu_seconds += worked
            self.clock.add(spent, kind, self.split)
            self.cpu.add(worked, kind)
            stepped(losses[-1])
            if len(losses) % every_turn == 0:
                reference.turn(x, y)
            if len(losses) % every == 0:
                self._point(len(losses), sum(losses[-every:]) / every)
        peak, state = memory.bytes(), tensor_bytes(self.optimizer.state_dict())
        lr = float(self.optimizer.param_groups[0]["lr"])
        with warnings.catch_warnings():
            # a skipped step is the optimizer's business, not the schedule's
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler", UserWarning)
            self.scheduler.step()
        shortened = getattr(self.optimizer, "clipped", math.nan) - clipped
        self.clock.reference += reference.timed
        self.cpu.reference += reference.worked
        self.epoch += 1
        self.record.rows.append(
            {
                **self._identity(),
                "lr": lr,
                "train_loss": sum(losses) / len(losses),
                **task.evaluate(self.model),
                "clipped_share": shortened / (self.steps - steps),
                "seconds_per_step": self.clock.seconds_per_step(),
                **{f"{part}_seconds": self.clock.part(part) for part in PARTS},
                "refresh_seconds": self.clock.refresh_seconds(),
                "timed_steps": self.clock.steps,
                "sgd_seconds_per_step": self.clock.sgd_seconds_per_step(),
                "ratio_to_sgd": self.clock.ratio(),
                "train_seconds": self.seconds,
                **self._of_processor(),
                "peak_memory_bytes": math.nan if peak is None else float(peak),
                "state_bytes": state,
                "covered_share": getattr(self.optimizer, "covered_share", math.nan),
                "fisher_type": self._fisher_type(),
            }
        )

    def _of_processor(self) -> dict[str, float]:
        """The columns of the processor's seconds; empty where a GPU does the work."""
        found = {
            "cpu_seconds_per_step": self.cpu.seconds_per_step(),
            "cpu_ratio_to_sgd": self.cpu.ratio(),
            "train_cpu_seconds": self.cpu_seconds,
        }
        return found if self.task.x.device.type == "cpu" else dict.fromkeys(found, math.nan)

    def _fisher_type(self) -> str:
        """The labels behind the optimizer's gradients; "" where no recorded gradient is used."""
        preconditioner = getattr(self.optimizer, "preconditioner", None)
        if preconditioner is None or preconditioner.recorder is None:
            return ""
        needs = preconditioner.recorder.needs
        return needs.fisher_type if needs.gradients else ""

    def step(self, indices: Tensor, x: Tensor, y: Tensor) -> float:
        """One step on one batch; returns its loss, before the step."""
        optimizer = self.optimizer
        if isinstance(optimizer, optim.FNGD):
            optimizer.set_batch(indices)

        began, split = time.perf_counter(), {}

        def passed(part: str) -> None:
            nonlocal began
            finished(x.device)
            now = time.perf_counter()
            split[part], began = now - began, now

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.criterion(self.model(x), y)
            passed("forward")
            loss.backward()
            passed("backward")
            return loss

        step: Any = optimizer.step  # torch's types know closures that return a float
        loss = self._checked(step(closure) if self.looks_twice else closure(), x)
        if not self.looks_twice:
            step()
            passed("update")
        finished(x.device)
        # two looks at one batch are within the step
        self.split = {} if self.looks_twice else split
        self.steps += 1
        if self.task.settings.carry:
            carry_on(self.model)
        return loss

    def _checked(self, loss: Tensor, x: Tensor) -> float:
        value = loss.item()
        if self.first_loss is None:
            self.first_loss = value
        if not math.isfinite(value) or value > EXPLODED * max(self.first_loss, 1e-3):
            layer, why = blame(self.model, self.start, x)
            raise Diverged(self.steps, layer, f"the loss is {value:.3g}; {why}")
        return value

    def compare(self) -> None:
        """Measure the optimizer's current blocks against the exact ones, at the same weights."""
        if not hasattr(self.optimizer, "blocks"):
            return
        blocks = self.optimizer.blocks()
        model = self.task.model(self.record.seed).eval()  # without the optimizer's hooks
        model.load_state_dict(self.model.state_dict())
        n = self.task.settings.compare_examples
        table = comparison.compare(
            model,
            self.task.criterion(),
            self.task.x[:n],
            self.task.y[:n],
            approximations={self.record.entry.label: blocks},
        )
        self.record.comparisons += table.frame.assign(**self._identity()).to_dict("records")

    def _point(self, done: int, loss: float) -> None:
        epoch = self.epoch + done / self.task.steps_per_epoch
        point = {"epoch": epoch, "train_loss": loss, "train_seconds": self.seconds}
        self.record.curve.append({**self._identity(), **point})

    def _identity(self) -> dict[str, Any]:
        entry = self.record.entry
        return {
            "optimizer": entry.label,
            "method": entry.name,
            "seed": self.record.seed,
            "epoch": self.epoch,
            "step": self.steps,
        }
