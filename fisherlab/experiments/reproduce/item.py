"""The parts of a paper's table or figure, as values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fisherlab.optim.presets import As

SCALES = ("minutes", "hours", "paper")


@dataclass(frozen=True)
class Arm:
    """One method of an experiment.

    `lr` is used at scale minutes, and at every scale where `grid` is empty. `options` go beyond
    the preset. `epochs` replaces the experiment's, as where second-order methods get half of them.
    `batch_norm` None is the model's own. `switch_epoch` is where truncated K-FAC turns into SGD.
    `cells` are those that have the arm. `control_of` is the arm whose step lengths this one has.
    An arm `apart` has a run folder of its own, so that folders without it stay what they are.
    """

    label: str
    name: str
    lr: As
    options: Mapping[str, As] = field(default_factory=dict)
    grid: tuple[float, ...] = ()
    epochs: As | None = None
    switch_epoch: As | None = None
    batch_norm: bool | None = None
    preset: str = "paper"
    cells: tuple[str, ...] | None = None
    control_of: str = ""
    apart: bool = False


@dataclass(frozen=True)
class Cell:
    """One combination of data and model; `settings` replaces the experiment's.

    `stand_in` says what is run in the place of the paper's data or model; "" where it is those.
    """

    name: str
    data: As
    model: As
    settings: Mapping[str, As] = field(default_factory=dict)
    stand_in: str = ""


@dataclass(frozen=True)
class Size:
    """The part of an experiment that a scale takes; None is all, or as the paper has it."""

    epochs: int | None = None
    examples: int | None = None
    test_examples: int | None = None
    width: float = 1.0
    layers: int | None = None
    seeds: int | None = None
    cells: tuple[str, ...] | None = None
    arms: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Experiment:
    """Arms trained on cells: what several tables and figures may be read off.

    `settings` are fields of `training.Settings`, and `repeats`.
    """

    paper: str
    key: str
    cells: tuple[Cell, ...]
    arms: tuple[Arm, ...]
    settings: Mapping[str, As]
    sizes: Mapping[str, Size]

    def setting(self, cell: Cell, name: str) -> As | None:
        """One setting of one cell."""
        return cell.settings.get(name, self.settings.get(name))

    def chosen(
        self, scale: str, only: tuple[str, ...] | None = None
    ) -> tuple[tuple[Cell, ...], tuple[Arm, ...]]:
        """The cells and the arms of a scale; `only` these cells."""
        size = self.sizes[scale]
        cells = [c for c in self.cells if size.cells is None or c.name in size.cells]
        cells = [c for c in cells if only is None or c.name in only]
        arms = [a for a in self.arms if size.arms is None or a.label in size.arms]
        return tuple(cells), tuple(arms)


@dataclass(frozen=True)
class Number:
    """A number of the paper: mean, and the standard deviation of its repeats where given."""

    mean: float
    sd: float | None = None


@dataclass(frozen=True)
class Order:
    """A claim of the paper's text: `better` is better than `worse`, in one cell or in all."""

    better: str
    worse: str
    cell: str | None = None


@dataclass(frozen=True)
class Drawing:
    """A drawing without arms: the function makes `item.png` and returns a table and a verdict.

    `seconds` is what it costs.
    """

    function: Callable[[Path, str], Any]
    seconds: float


@dataclass(frozen=True)
class Item:
    """One table or figure of a paper.

    `quantity` is a name of `quantities.QUANTITIES`. `reported` is `{cell: {arm: Number}}`.
    `panels` are the pairs of columns of a figure: x and y. An item without an experiment and a
    drawing is an illustration, or cannot be run (`why`).
    """

    paper: str
    key: str
    title: str
    experiment: Experiment | None = None
    quantity: str = "accuracy"
    panels: tuple[tuple[str, str], ...] = ()
    reported: Mapping[str, Mapping[str, Number]] = field(default_factory=dict)
    orders: tuple[Order, ...] = ()
    arms: tuple[str, ...] | None = None
    cells: tuple[str, ...] | None = None
    drawing: Drawing | None = None
    why: str = ""
    illustration: bool = False
    note: str = ""

    @property
    def kind(self) -> str:
        """`table` or `figure`."""
        return "table" if self.key.startswith("table") else "figure"

    @property
    def runnable(self) -> bool:
        """Whether anything can be measured."""
        return self.experiment is not None or self.drawing is not None

    @property
    def name(self) -> str:
        """`"ngm table1"`."""
        return f"{self.paper} {self.key}"
