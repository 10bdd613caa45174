"""The cost of a whole comparison, in seconds and GiB."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import pandas as pd
import torch

from fisherlab.comparison import compare
from fisherlab.experiments.bench.setting import OURS, Setting, title
from fisherlab.experiments.bench.timing import peak_growth
from fisherlab.experiments.training.cost import finished

FIVE = ("kfac", "ekfac", "tkfac", "tekfac", "diagonal")
SEVEN = (*FIVE, "eva", "shampoo")
BEST = (*SEVEN, "kronecker_optimal")


@dataclass(frozen=True)
class Case:
    """One comparison; the reach is in seconds and in GiB, on 2 CPU cores."""

    network: str
    methods: Sequence[str]
    fisher_type: str = "empirical"
    dtype: torch.dtype = torch.float32
    seconds: float | None = None
    gib: float | None = None

    @property
    def title(self) -> str:
        """The name of this row in the table."""
        what = f"compare, {len(self.methods)} approximations"
        return what + (", float64" if self.dtype == torch.float64 else "")

    @property
    def about(self) -> dict[str, str]:
        """The network, work and library of this row."""
        kind = self.fisher_type
        return {"network": self.network, "work": self.title, "fisher_type": kind, "by": OURS}


CASES = (
    Case("lenet", FIVE),
    Case("mlp", FIVE),
    Case("resnet20", FIVE, "exact"),
    Case("resnet18", FIVE, seconds=50.0, gib=4.0),
    Case("resnet18", SEVEN, seconds=50.0, gib=4.0),
    Case("resnet18", SEVEN, dtype=torch.float64, seconds=120.0),
    Case("resnet18", BEST, seconds=130.0, gib=4.0),
)
QUICK = (Case("lenet", FIVE), Case("lenet", FIVE, dtype=torch.float64))


def run(setting: Setting) -> Iterator[dict[str, Any]]:
    """The records of this part; no other library compares without dense blocks.

    A float64 case also says how far the float32 relative errors of the same case are from its own.
    """
    errors: dict[tuple[str, int], pd.Series] = {}
    for case in QUICK if setting.quick else CASES:
        if not setting.takes(title(case.about), case.seconds or 0.0):
            continue
        frame, record = _measured(case, setting)
        key = case.network, len(case.methods)
        error = frame.drop_duplicates(["layer", "approximation"]).set_index(
            ["layer", "approximation"]
        )["relative_error"]
        if case.dtype == torch.float64 and key in errors:
            difference = (error - errors[key]).abs().max()
            record["note"] = f"float32 relative errors within {difference:.1e}"
            record["float32_difference"] = float(difference)
        errors.setdefault(key, error)
        yield record


def _measured(case: Case, setting: Setting) -> tuple[pd.DataFrame, dict[str, Any]]:
    network = setting.network(case.network, case.dtype)
    found: list[pd.DataFrame] = []
    clock: list[float] = []

    def work() -> None:
        start = time.perf_counter()
        table = compare(
            network.model,
            network.criterion,
            network.x,
            network.y,
            approximations=case.methods,
            fisher_type=case.fisher_type,
        )
        finished(setting.device)
        clock.append(time.perf_counter() - start)
        found.append(table.frame)

    def step() -> float:
        start = time.perf_counter()
        network.step()
        finished(setting.device)
        return time.perf_counter() - start

    step()
    steps = [step() for _ in range(3)]
    growth = peak_growth(work, setting.device)
    # calls of minutes are measured once, with ordinary steps before and after
    while clock[0] < 5 and len(clock) < setting.rounds and not setting.late:
        work()
    steps += [step() for _ in range(3)]
    seconds, reach = median(clock), None if setting.quick else case.seconds
    ratios = [s / median(steps) for s in clock]
    record = {
        **case.about,
        "examples": setting.examples,
        "ratio": median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
        "seconds": seconds,
        "reference_seconds": median(steps),
        "reach_seconds": reach,
        "of_reach": None if reach is None else seconds / reach,
        "peak_bytes": growth,
        "reach_bytes": None if case.gib is None or setting.quick else case.gib * 2**30,
        "note": "",
    }
    return found[0], record
