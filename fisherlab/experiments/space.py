"""A search space: the values or the range of every option, and a point's measurements."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from fisherlab.experiments.training import Entry, Results, SettingsError
from fisherlab.experiments.training import entries as parse

NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
RANGE = re.compile(rf"({NUMBER})\.\.({NUMBER})")
AT_THE_EDGE = 0.05  # share of a range: a choice so near an end may be better beyond it


@dataclass(frozen=True)
class Range:
    """`low..high`: whole numbers where both are; logarithmic where both are above 0."""

    low: float
    high: float

    @property
    def whole(self) -> bool:
        """Whether its values are whole numbers."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def logarithmic(self) -> bool:
        """Whether equal ratios are equally likely."""
        return self.low > 0

    def edge(self, value: float) -> bool:
        """Whether a value lies at one of its ends."""
        scale = math.log if self.logarithmic else float
        share = (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low))
        return not AT_THE_EDGE < share < 1 - AT_THE_EDGE

    def __str__(self) -> str:
        return f"{self.low}..{self.high}"


Space = dict[str, list[str] | Range]  # option -> the values to try, or their range
Grid = dict[str, Space]  # optimizer -> its space


@dataclass(frozen=True)
class Point:
    """One setting tried: how it ended, its metric, and the losses of its epochs.

    `losses` are pairs of training and held-out loss, empty unless it came to its end; `clipped` is
    the least share of an epoch's steps that a bound shortened.
    """

    label: str
    name: str
    options: Mapping[str, str]
    status: str
    note: str = ""
    value: float | None = None
    losses: Sequence[Sequence[float]] = field(default=(), repr=False)
    clipped: float = 0.0

    @property
    def said(self) -> str:
        """`lr=0.1, damping=0.01`."""
        return ", ".join(f"{option}={value}" for option, value in self.options.items())

    @classmethod
    def of(cls, results: Results) -> Point:
        """The point of a run of one optimizer; its metric is the mean over seeds."""
        (entry,) = results.settings.entries
        summary, rows = results.summary().iloc[0], results.rows
        end = summary.get("final", math.nan)
        found: dict[str, Any] = {"note": summary["note"]}
        if end == end:
            epochs = rows[rows["epoch"] > 0]
            found["value"] = float(end)
            found["losses"] = epochs[["train_loss", "test_loss"]].to_numpy().tolist()
            share = epochs["clipped_share"].astype(float).min()
            found["clipped"] = float(share) if share == share else 0.0
        return cls(entry.label, entry.name, entry.options, summary["status"], **found)


def grid(assignments: Sequence[str], wanted: str) -> Grid:
    """`kfac.lr=0.1,0.3` or `kfac.lr=0.01..1` per optimizer and option.

    Commas within parentheses separate nothing.
    """
    names = [entry.label for entry in parse(wanted)]
    found: Grid = {name: {} for name in names}
    for text in assignments:
        match = re.fullmatch(r"(\w+)\.(\w+)=(.+)", text)
        if not match or match[1] not in names:
            known = ", ".join(sorted(names))
            raise SettingsError(
                f"--grid takes OPTIMIZER.OPTION=VALUE,VALUE of {known}; got {text!r}"
            )
        if match[2] in found[match[1]]:
            raise SettingsError(
                f"--grid names {match[1]}.{match[2]} twice; give all its values in one list"
            )
        found[match[1]][match[2]] = _values(match[3])
    return found


def _values(text: str) -> list[str] | Range:
    if match := RANGE.fullmatch(text.strip()):
        low, high = (int(end) if re.fullmatch(r"[+-]?\d+", end) else float(end)
                     for end in match.groups())  # fmt: skip
        if not low < high:
            raise SettingsError(f"a range is LOW..HIGH, the lower end first; got {text!r}")
        return Range(low, high)
    values = (value.strip() for value in re.split(r",(?![^()]*\))", text))
    return list(dict.fromkeys(values))  # a point twice is one run


def points(wanted: str, choices: Grid) -> tuple[Entry, ...]:
    """Every optimizer with every combination of its options, labelled `kfac-1`, `kfac-2`, ..."""
    found: list[Entry] = []
    for name in (entry.label for entry in parse(wanted)):
        lists: dict[str, list[str]] = {}
        for option, values in choices[name].items():
            if isinstance(values, Range):
                raise SettingsError(
                    f"{name}.{option}={values} is a range, and a grid takes values: list them, "
                    "or pass --sampler tpe"
                )
            lists[option] = values
        for k, point in enumerate(product(*lists.values()), 1):
            found += entry_of(f"{name}-{k}", name, dict(zip(lists, point, strict=True)))
    return tuple(found)


def ends(name: str, space: Space) -> tuple[Entry, ...]:
    """The entries at both ends of every range and at every value, for a check before the start."""
    found: list[Entry] = []
    for option, values in space.items():
        tried = [values.low, values.high] if isinstance(values, Range) else values
        for value in tried:
            found += entry_of(f"{name}-{len(found) + 1}", name, {option: f"{value}"})
    return tuple(found) or entry_of(f"{name}-1", name, {})


def entry_of(label: str, name: str, options: Mapping[str, str]) -> tuple[Entry, ...]:
    """The checked entry of a point."""
    return parse(f"{label}={name}", [f"{label}.{o}={value}" for o, value in options.items()])
