"""The cost of a step: seconds beside SGD's in the same minute of the same process, and memory."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from fisherlab import optim

# The first steps of a process, and of the reference in each of its turns, that are not timed.
WARM_UP = 2
TURNS, TURN = 5, 4  # times per epoch that the reference takes so many steps
ENOUGH = 5.0  # seconds of reference per epoch
PARTS = ("forward", "backward", "update")  # the parts of a step
REFRESHES = {"basis", "roots", "coefficients"}  # due where an inverse is made anew
FEWEST = 8  # timed steps from which a ratio says something


class Clock:
    """The seconds of a run's steps, by what was due at them, and of the reference's between them.

    `s = sum_k n_k / n median_k`: what is due at a step decides its kind k, and the rare kinds that
    refresh the curvature count by their share. The reference has one kind, hence its median: both
    sides are the same statistic, and SGD against itself is about 1.
    """

    def __init__(self) -> None:
        self.cold = WARM_UP
        self.warming = list[float]()  # the first steps of a process
        self.timed: dict[str, list[float]] = {}
        self.reference = list[float]()
        self.split: dict[str, list[float]] = {}

    def add(self, seconds: float, due: str = "", split: Mapping[str, float] | None = None) -> None:
        """Count a step, with what was due at it, and the seconds of its parts."""
        (self.warming if self.cold else self.timed.setdefault(due, [])).append(seconds)
        for part, spent in ({} if self.cold or split is None else split).items():
            self.split.setdefault(part, []).append(spent)
        self.cold = max(0, self.cold - 1)

    @property
    def steps(self) -> int:
        """How many steps were timed."""
        return sum(map(len, self.timed.values()))

    def seconds_per_step(self) -> float:
        """The medians of the kinds, each by its share of the timed steps."""
        kinds = list(self.timed.values()) or [self.warming]
        return sum(len(kind) * median(kind) for kind in kinds) / sum(map(len, kinds))

    def refresh_seconds(self) -> float:
        """The median over the steps at which an inverse was made anew; NaN where none was."""
        kinds = [spent for due, spent in self.timed.items() if REFRESHES & set(due.split("+"))]
        found = [seconds for spent in kinds for seconds in spent]
        return median(found) if found else math.nan

    def part(self, name: str) -> float:
        """Seconds per step of one part: the mean, of which the parts of a step add up."""
        found = self.split.get(name, [])
        return sum(found) / len(found) if found else math.nan

    def sgd_seconds_per_step(self) -> float:
        """The median of the reference."""
        return median(self.reference)

    def ratio(self) -> float:
        """The seconds of a step, SGD = 1; NaN before a step is timed."""
        known = self.steps and self.reference
        return self.seconds_per_step() / self.sgd_seconds_per_step() if known else math.nan

    def state(self) -> dict[str, Any]:
        """The timings, as lists of numbers."""
        return {"timed": self.timed, "reference": self.reference, "split": self.split}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what was timed; the first steps of this process are cold again."""
        self.timed, self.reference = _numbers(state["timed"]), list(map(float, state["reference"]))
        self.split = _numbers(state.get("split", {}))  # not in a checkpoint of an earlier version


def _numbers(lists: Mapping[str, list[float]]) -> dict[str, list[float]]:
    return {name: list(map(float, found)) for name, found in lists.items()}


def due(optimizer: torch.optim.Optimizer) -> str:
    """The extra work of an optimizer at the next step, in words; "" for torch's own."""
    return "+".join(getattr(optimizer, "due", tuple)())


class SGDReference:
    """SGD with momentum on a model of its own, timed between the steps of a method.

    The machine's speed drifts and other processes come and go: a ratio to SGD measured in another
    minute says little.
    """

    def __init__(self, model: nn.Module, criterion: nn.Module) -> None:
        self.model, self.criterion = model, criterion
        # timing does not need progress, and must not diverge
        self.optimizer = optim.create("sgd", model, lr=1e-6)
        self.begin()

    def begin(self) -> None:
        """Forget the epoch before."""
        self.spent, self.timed, self.worked = 0.0, list[float](), list[float]()

    def turn(self, x: Tensor, y: Tensor) -> None:
        """A few steps on a batch, the method's own random draws left alone."""
        kind = x.device.type
        devices = [] if kind == "cpu" else [x.device]
        with torch.random.fork_rng(devices, device_type="cuda" if kind == "cpu" else kind):
            for k in range(TURN):
                if self.timed and self.spent > ENOUGH:
                    return
                seconds, worked = self._step(x, y)
                self.spent += seconds
                if k >= WARM_UP:
                    self.timed.append(seconds)
                    self.worked.append(worked)

    def seconds_per_step(self) -> float:
        """The median over the timed steps of the epoch."""
        return median(self.timed)

    def _step(self, x: Tensor, y: Tensor) -> tuple[float, float]:
        start, worked = time.perf_counter(), time.process_time()
        self.optimizer.zero_grad()
        loss = self.criterion(self.model(x), y)
        loss.backward()
        self.optimizer.step()
        loss.item()  # as the method's loop does
        finished(x.device)
        return time.perf_counter() - start, time.process_time() - worked


def finished(device: torch.device) -> None:
    """Wait for a GPU; nothing elsewhere."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class PeakMemory:
    """The most memory held since it was made: the allocator's on a GPU, the process's on Linux.

    None where neither is known. The process holds the data, torch and what earlier runs left with
    the allocator: compare it with SGD's in the same table.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            with suppress(OSError):  # elsewhere the mark of the whole process is what there is
                Path("/proc/self/clear_refs").write_text("5")

    def bytes(self) -> int | None:
        """The peak so far."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        with suppress(OSError):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM"):
                    return int(line.split()[1]) * 1024
        return None


def tensor_bytes(state: Any) -> int:
    """The bytes of all tensors in nested dicts and lists: what an optimizer remembers."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, dict):
        return sum(tensor_bytes(item) for item in state.values())
    if isinstance(state, list | tuple):
        return sum(tensor_bytes(item) for item in state)
    return 0
