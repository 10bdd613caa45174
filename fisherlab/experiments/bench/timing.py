"""Paired, interleaved ratios: two calls alternate in one process, so the machine falls on both."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median, quantiles

import psutil
import torch

from fisherlab.experiments.training.cost import PeakMemory, finished
from fisherlab.heap import return_freed_memory

Work = Callable[[], object]
# A sample of the reference lasts at least this long: shorter ones measure the clock.
LEAST = 0.02


@dataclass(frozen=True)
class Timing:
    """Seconds of pairs of calls, of a work and of its reference, one after the other.

    `ratio` is the median over pairs, `lowest` and `highest` the quartiles. `cpu_ratio` is that of
    processor time: other processes move it less, waiting threads move it more.
    """

    work: list[float]
    reference: list[float]
    cpu_work: list[float]
    cpu_reference: list[float]

    @property
    def ratios(self) -> list[float]:
        """The ratio of each pair."""
        return [w / r for w, r in zip(self.work, self.reference, strict=True)]

    @property
    def ratio(self) -> float:
        return median(self.ratios)

    @property
    def cpu_ratio(self) -> float:
        pairs = zip(self.cpu_work, self.cpu_reference, strict=True)
        return median(w / max(r, 1e-9) for w, r in pairs)

    @property
    def spread(self) -> tuple[float, float]:
        """The quartiles of the ratios; the extremes of fewer than four."""
        if len(self.ratios) < 4:
            return min(self.ratios), max(self.ratios)
        low, _, high = quantiles(self.ratios, n=4)
        return low, high

    @property
    def seconds(self) -> float:
        """The median of the work."""
        return median(self.work)

    def row(self) -> dict[str, float]:
        """The columns of this timing in the table."""
        low, high = self.spread
        return {
            "ratio": self.ratio,
            "lowest": low,
            "highest": high,
            "cpu_ratio": self.cpu_ratio,
            "seconds": self.seconds,
            "reference_seconds": median(self.reference),
        }


def paired(
    work: Work,
    reference: Work,
    *,
    repeats: int = 7,
    warm_up: int = 1,
    device: torch.device | None = None,
    least: float = LEAST,
) -> Timing:
    """The work and its reference in turn, `repeats` times; who goes first alternates.

    A sample of the reference is the mean of as many calls as last `least` seconds, one of the work
    likewise. The garbage collector rests meanwhile.
    """
    if repeats < 1:
        raise ValueError(f"repeats is at least 1, got {repeats}")
    device = device or torch.device("cpu")
    ours: list[tuple[float, float]] = []
    theirs: list[tuple[float, float]] = []
    sides = [
        (call, max(1, math.ceil(least / _warm(call, warm_up, device))), into)
        for call, into in ((reference, theirs), (work, ours))
    ]
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for repeat in range(repeats):
            # a machine that slows down or speeds up favours neither
            for call, times, into in sides if repeat % 2 == 0 else reversed(sides):
                into.append(_sample(call, times, device))
    finally:
        if collecting:
            gc.enable()
    return Timing(
        [wall for wall, _ in ours],
        [wall for wall, _ in theirs],
        [cpu for _, cpu in ours],
        [cpu for _, cpu in theirs],
    )


def _warm(call: Work, times: int, device: torch.device) -> float:
    """Seconds of the last of `times + 1` calls; the first ones are slower."""
    for _ in range(times):
        call()
    return max(_sample(call, 1, device)[0], 1e-9)


def _sample(call: Work, times: int, device: torch.device) -> tuple[float, float]:
    """Wall and processor seconds of one call, the mean of `times`."""
    finished(device)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(times):
        call()
    finished(device)
    return (time.perf_counter() - wall) / times, (time.process_time() - cpu) / times


def peak_growth(work: Work, device: torch.device) -> int | None:
    """Bytes by which a call raises the memory held, at its peak; None where that is not known."""
    gc.collect()
    return_freed_memory()  # memory left by earlier calls would not count
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
    else:
        before = psutil.Process().memory_info().rss
    watch = PeakMemory(device)
    work()
    peak = watch.bytes()
    return None if peak is None else max(0, peak - before)
