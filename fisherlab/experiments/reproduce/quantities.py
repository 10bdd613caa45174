"""The numbers that the papers' tables hold, read off the rows of one run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd

# A column of a clock, and of the same seconds as the processor counted them.
PROCESSOR = {
    "seconds_per_step": "cpu_seconds_per_step",
    "ratio_to_sgd": "cpu_ratio_to_sgd",
    "train_seconds": "train_cpu_seconds",
}
# Share of the least final accuracy of all arms: the target where the paper's own is out of reach.
TARGET = 0.98


@dataclass(frozen=True)
class Quantity:
    """A number per arm and seed; `of` takes the rows of one run and those of its whole cell.

    `learned`: whether an untrained net has a bad one; seconds per step are what they are. `timed`:
    whether it counts seconds.
    """

    label: str
    higher: bool
    of: Callable[[pd.DataFrame, pd.DataFrame], float]
    digits: int = 2
    learned: bool = True
    timed: bool = False


def by_processor(cell: pd.DataFrame) -> bool:
    """Whether the processor's seconds are known of every epoch of a cell."""
    name = PROCESSOR["train_seconds"]
    return name in cell and bool(cell.loc[cell["epoch"] > 0, name].notna().all())


def seconds(cell: pd.DataFrame, name: str) -> str:
    """The column of the processor's seconds where all arms have them, else that of the clock."""
    return PROCESSOR[name] if by_processor(cell) else name


def _last(column: str, factor: float = 1.0) -> Callable[[pd.DataFrame, pd.DataFrame], float]:
    def read(rows: pd.DataFrame, cell: pd.DataFrame) -> float:
        return factor * float(rows[column].iloc[-1]) if column in rows else math.nan

    return read


def _log_loss(rows: pd.DataFrame, cell: pd.DataFrame) -> float:
    loss = float(rows["train_loss"].iloc[-1])
    return math.log(loss) if loss > 0 else math.nan


def _spent(name: str) -> Callable[[pd.DataFrame, pd.DataFrame], float]:
    def read(rows: pd.DataFrame, cell: pd.DataFrame) -> float:
        return _last(seconds(cell, name))(rows, cell)

    return read


def _per_epoch(rows: pd.DataFrame, cell: pd.DataFrame) -> float:
    steps = rows["step"].iloc[-1] / max(1, rows["epoch"].iloc[-1])
    return _spent("seconds_per_step")(rows, cell) * float(steps)


def target(cell: pd.DataFrame) -> float:
    """The accuracy that every arm of a cell reaches, less a little."""
    return TARGET * float(cell.groupby(["optimizer", "seed"])["accuracy"].max().min())


def _to_target(rows: pd.DataFrame, cell: pd.DataFrame) -> float:
    there = rows[rows["accuracy"] >= target(cell)]
    return float(there[seconds(cell, "train_seconds")].iloc[0]) if len(there) else math.nan


QUANTITIES = {
    "accuracy": Quantity("test accuracy, %", True, _last("accuracy", 100.0)),
    "train_loss": Quantity("training loss", False, _last("train_loss"), 4),
    "log_train_loss": Quantity("ln of the training loss", False, _log_loss, 3),
    "perplexity": Quantity("test perplexity", False, _last("perplexity")),
    "bleu": Quantity("test BLEU", True, _last("bleu")),
    "seconds_per_epoch": Quantity(
        "seconds per epoch", False, _per_epoch, 3, learned=False, timed=True
    ),
    "seconds_per_step": Quantity(
        "seconds per step", False, _spent("seconds_per_step"), 5, learned=False, timed=True
    ),
    "ratio_to_sgd": Quantity(
        "seconds per step, SGD = 1", False, _spent("ratio_to_sgd"), learned=False, timed=True
    ),
    "seconds_to_target": Quantity("seconds to the target", False, _to_target, timed=True),
}
