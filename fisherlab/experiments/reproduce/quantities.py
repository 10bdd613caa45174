"""The numbers that the papers' tables hold, read off the rows of one run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd

# Share of the least final accuracy of all arms: the target where the paper's own is out of reach.
TARGET = 0.98


@dataclass(frozen=True)
class Quantity:
    """A number per arm and seed; `of` takes the rows of one run and those of its whole cell.

    `learned`: whether an untrained net has a bad one; seconds per step are what they are.
    """

    label: str
    higher: bool
    of: Callable[[pd.DataFrame, pd.DataFrame], float]
    digits: int = 2
    learned: bool = True


def _last(column: str, factor: float = 1.0) -> Callable[[pd.DataFrame, pd.DataFrame], float]:
    def read(rows: pd.DataFrame, cell: pd.DataFrame) -> float:
        return factor * float(rows[column].iloc[-1]) if column in rows else math.nan

    return read


def _log_loss(rows: pd.DataFrame, cell: pd.DataFrame) -> float:
    loss = float(rows["train_loss"].iloc[-1])
    return math.log(loss) if loss > 0 else math.nan


def _per_epoch(rows: pd.DataFrame, cell: pd.DataFrame) -> float:
    steps = rows["step"].iloc[-1] / max(1, rows["epoch"].iloc[-1])
    return float(rows["seconds_per_step"].iloc[-1] * steps)


def target(cell: pd.DataFrame) -> float:
    """The accuracy that every arm of a cell reaches, less a little."""
    return TARGET * float(cell.groupby(["optimizer", "seed"])["accuracy"].max().min())


def _to_target(column: str) -> Callable[[pd.DataFrame, pd.DataFrame], float]:
    def read(rows: pd.DataFrame, cell: pd.DataFrame) -> float:
        there = rows[rows["accuracy"] >= target(cell)]
        return float(there[column].iloc[0]) if len(there) else math.nan

    return read


QUANTITIES = {
    "accuracy": Quantity("test accuracy, %", True, _last("accuracy", 100.0)),
    "train_loss": Quantity("training loss", False, _last("train_loss"), 4),
    "log_train_loss": Quantity("ln of the training loss", False, _log_loss, 3),
    "perplexity": Quantity("test perplexity", False, _last("perplexity")),
    "bleu": Quantity("test BLEU", True, _last("bleu")),
    "seconds_per_epoch": Quantity("seconds per epoch", False, _per_epoch, 3, learned=False),
    "seconds_per_step": Quantity(
        "seconds per step", False, _last("seconds_per_step"), 5, learned=False
    ),
    "ratio_to_sgd": Quantity(
        "seconds per step, SGD = 1", False, _last("ratio_to_sgd"), learned=False
    ),
    "seconds_to_target": Quantity("seconds to the target", False, _to_target("train_seconds")),
}
