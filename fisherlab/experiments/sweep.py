"""A search: optimizers at the points of their spaces, then the best of each at full length."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fisherlab import whole
from fisherlab.experiments import study
from fisherlab.experiments.rundir import RunDir, versions
from fisherlab.experiments.space import Grid, Point, Range, ends, entry_of, grid, points
from fisherlab.experiments.training import (
    Entry,
    Record,
    Results,
    Settings,
    SettingsError,
    Watch,
    train,
)
from fisherlab.experiments.training.divergence import Diverged
from fisherlab.experiments.training.task import HIGHER_IS_BETTER, Task

__all__ = ["Grid", "Point", "Range", "Search", "grid", "points", "sweep"]

# A point whose losses, training and held-out, are this many times the first one has diverged.
HOPELESS = 2.0


@dataclass
class Search:
    """The points tried, the choice among them, and its result on the test set."""

    settings: Settings
    grid: Grid
    metric: str
    tried: list[Point]
    chosen: tuple[Entry, ...] = ()
    final: Results | None = None  # None: interrupted before, or other workers are not done
    stopped: bool = False  # interrupted before the choice
    elsewhere: int = 0  # points that other workers have
    importance: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ended it."""
        return self.stopped or (self.final is not None and self.final.interrupted)

    @property
    def table(self) -> pd.DataFrame:
        """One row per optimizer: the chosen options, the validation metric, and the final one."""
        final = None if self.final is None else self.final.summary().set_index("optimizer")
        rows = []
        for entry in self.chosen:
            mine = [point for point in self.tried if point.name == entry.name]
            best = next(point for point in mine if point.options == entry.options)
            row = {
                "optimizer": entry.label,
                "options": best.said,
                "at_the_edge": ", ".join(self.edges(entry)),
                "points": len(mine),
                "validation": best.value,
            }
            if final is not None:  # without a metric where no seed came to its end
                columns = ["seeds", "final", "final_sd", "best", "train_loss", "ratio_to_sgd"]
                columns += ["clipped_share"]
                row |= final.reindex(columns=columns).loc[entry.label].to_dict()
            rows.append(row)
        return pd.DataFrame(rows)

    def markdown(self) -> str:
        """The table as Markdown, the metric as mean ± deviation over seeds."""
        lines = ["| optimizer | chosen of | options | at the edge of its grid | held out | test |"]
        lines.append("|---|---|---|---|---|---|")
        for row in self.table.itertuples():
            test = "-"
            if self.final is not None and row.seeds:
                spread = f" ± {row.final_sd:.4f} ({row.seeds:.0f} seeds)"
                test = f"{row.final:.4f}{spread if row.seeds > 1 else ' (1 seed)'}"
            cells = [row.optimizer, row.points, row.options, row.at_the_edge, row.validation, test]
            lines.append(f"| {' | '.join(map(str, cells))} |")
        notes = "".join(f"\n{note}.\n" for note in self.notes)
        return "\n".join(lines) + "\n" + notes

    @property
    def notes(self) -> list[str]:
        """Which points of a grid were one and the same run, and why: the choice says nothing."""
        found = []
        for _, mine in groupby(self.tried, key=lambda point: point.name):
            runs: list[list[Point]] = []
            for point in mine:
                if not point.losses:
                    continue  # it did not come to its end
                for alike in runs:
                    theirs = alike[0].losses
                    # not bit for bit: lr cancels against the clip but for rounding
                    same = len(theirs) == len(point.losses)  # a seed of one may have diverged
                    if same and np.allclose(point.losses, theirs, rtol=1e-4):
                        alike.append(point)
                        break
                else:
                    runs.append([point])
            found += [_alike(alike) for alike in runs if len(alike) > 1]
        return found

    def edges(self, entry: Entry) -> list[str]:
        """Options chosen at an end of their grid: a wider one may find better."""
        found = []
        for option, values in self.grid.get(entry.label, {}).items():
            mine = entry.options[option]
            if isinstance(values, Range):
                at = values.edge(float(mine))
            else:
                at = mine in (values[0], values[-1]) and len(values) > 2
            found += [option] if at else []
        return found

    @property
    def frame(self) -> pd.DataFrame:
        """One row per point: label, optimizer, options, metric, how it ended."""
        return pd.DataFrame(
            {
                "point": point.label,
                "optimizer": point.name,
                "options": point.said,
                "validation": point.value,
                "status": point.status,
                "note": point.note,
            }
            for point in self.tried
        )


def _alike(points: Sequence[Point]) -> str:
    """`kfac: lr=0.03 and lr=0.1 gave the same run: ...`."""
    first = points[0].options
    moved = [o for o in first if len({point.options[o] for point in points}) > 1]
    said = [", ".join(f"{o}={point.options[o]}" for o in moved) for point in points]
    why = "the losses of every epoch agree to 4 digits"
    if min(point.clipped for point in points) == 1:
        bound = "max_norm" if "max_norm" in first else "kl_clip"
        why = f"{bound} shortened every step; pass {bound}=none or search it"
    return f"{points[0].name}: {', '.join(said[:-1])} and {said[-1]} gave the same run: {why}"


class _Point(Watch):
    """One point under watch: a run that has diverged ends, and its metric is reported."""

    def __init__(
        self, watch: Watch, metric: str, report: Callable[[float, int], None] | None
    ) -> None:
        self.watch, self.metric, self.report = watch, metric, report

    def started(self, record: Record, done: int, steps: int) -> None:
        self.watch.started(record, done, steps)

    def stepped(self, loss: float) -> None:
        self.watch.stepped(loss)

    def ended(self, record: Record) -> None:
        self.watch.ended(record)

    def measured(self, record: Record) -> None:
        self.watch.measured(record)
        first, last = record.rows[0], record.rows[-1]
        if self.report is not None:
            self.report(last[self.metric], last["epoch"])
        bound = HOPELESS * first["test_loss"]
        if record.status != "done" and min(last["train_loss"], last["test_loss"]) > bound:
            raise Diverged(
                last["step"],
                "",
                f"training and held-out loss {last['train_loss']:.3g} and {last['test_loss']:.3g} "
                f"after epoch {last['epoch']}, {first['test_loss']:.3g} before the first step",
            )


def sweep(
    settings: Settings,
    wanted: str,
    choices: Grid,
    folder: Path,
    *,
    final: dict[str, Any],
    trials: int | None = None,
    storage: str | None = None,
    watch: Watch | None = None,
) -> Search:
    """Train every point on part of the training set, choose on held-out examples, train the best.

    With Optuna installed, the points are a study in a database, which any number of processes
    share; the one that trains the last point goes on to the choice. Without it, a grid is a loop.
    Resumes like `train`.

    Args:
        settings: those of the search, its `validation` set.
        wanted: the optimizers.
        choices: the space of each.
        folder: the run folder.
        final: the fields that are others for the chosen points (epochs, seeds, examples).
        trials: points of each optimizer, by TPE; None takes every point of the grid.
        storage: the address of the database; None is an SQLite file in the folder.
        watch: a listener.

    Returns:
        The search.

    Raises:
        SettingsError: a setting is the user's mistake, or the database cannot be used.
        RunDirError: the folder holds a run of another command.
    """
    watch = watch or Watch()
    planned = _planned(settings, wanted, choices, trials, storage)
    RunDir(folder).check_command("sweep")
    settings = replace(settings, entries=tuple(planned))
    try:  # before hours of search
        full = replace(settings, validation=None, **final)
    except SettingsError as error:
        raise SettingsError(f"of the chosen points: {error}") from None
    metric = Task(settings).metric
    search = Search(settings, choices, metric, [])
    watch.planned([Record(entry, seed) for entry in planned for seed in settings.seeds])

    def run(entry: Entry, report: Callable[[float, int], None] | None = None) -> Point:
        mine = replace(settings, entries=(entry,))
        watching = _Point(watch, metric, report)
        _write_config(search, folder, "running")  # no other command takes the folder meanwhile
        results = train(mine, folder / "search" / entry.label, watch=watching)
        if results.interrupted:
            raise KeyboardInterrupt
        return Point.of(results)

    try:
        if study.installed():
            _shared(search, run, folder, trials, storage)
        else:
            for entry in planned:
                search.tried.append(run(entry))
    except KeyboardInterrupt:
        search.stopped = True
    search.chosen = _best(search)
    if search.chosen and not (search.stopped or search.elsewhere):
        search.final = train(replace(full, entries=search.chosen), folder / "final", watch=watch)
    if search.tried:
        _write(search, folder)
    return search


def _planned(
    settings: Settings, wanted: str, choices: Grid, trials: int | None, storage: str | None
) -> list[Entry]:
    """The points to come, for a progress bar; wrong settings and values are refused here."""
    if settings.validation is None:
        raise SettingsError("a search chooses on held-out examples: give their number, validation")
    if trials is None and storage is None:
        return list(points(wanted, choices))
    if not study.installed():
        what = "--sampler tpe" if trials else "--storage"
        raise SettingsError(f"{what} needs Optuna, which is not installed: {study.HINT}")
    if trials is None:
        return list(points(wanted, choices))
    if trials < 1:
        raise SettingsError(f"--trials is at least 1, got {trials}")
    for name, space in choices.items():
        ends(name, space)
    few = {name: len(study.every(space)) for name, space in choices.items()
           if study.exhausted(space, trials)}  # fmt: skip
    return [Entry(f"{n}-{k + 1}", n) for n in choices for k in range(few.get(n, trials))]


def _shared(
    search: Search, run: study.Train, folder: Path, trials: int | None, storage: str | None
) -> None:
    """The points of every optimizer by the studies, which other workers may share."""
    settings = search.settings.to_json()
    del settings["entries"]
    url = study.url_of(folder, storage)
    studies = [
        study.Study(
            url,
            name,
            space,
            settings,
            higher_is_better=search.metric in HIGHER_IS_BETTER,
            trials=trials,
        )
        for name, space in search.grid.items()
    ]
    try:
        for one in studies:
            one.run(run)
    finally:
        search.tried = [point for one in studies for point in one.points]
        search.elsewhere = sum(one.elsewhere for one in studies)
    search.importance = {one.name: found for one in studies if (found := one.importance())}


def _best(search: Search) -> tuple[Entry, ...]:
    """The point of each optimizer with the best validation metric at the end, the best first."""
    sign = -1 if search.metric in HIGHER_IS_BETTER else 1
    ended = [(sign * point.value, point) for point in search.tried if point.value is not None]
    found: dict[str, Entry] = {}
    for _, point in sorted(ended, key=lambda pair: pair[0]):
        if point.name not in found:
            (found[point.name],) = entry_of(point.name, point.name, point.options)
    return tuple(found.values())


def _write(search: Search, folder: Path) -> None:
    """`sweep.md`, the table, and `sweep.json`: the same, what was tried, and on what."""
    content = {
        "search": search.settings.to_json(),
        "grid": _asked(search),
        "metric": search.metric,
        "final": None if search.final is None else search.final.settings.to_json(),
        "table": search.table.to_dict("records"),
        "tried": [asdict(point) for point in search.tried],
        "importance": search.importance,
        "notes": search.notes,
        "versions": versions(),
    }
    status = "running elsewhere" if search.elsewhere else "complete"
    _write_config(search, folder, "interrupted" if search.interrupted else status)
    whole.write(folder / "sweep.json", json.dumps(content, indent=1) + "\n")
    whole.write(folder / "sweep.md", search.markdown())


def _write_config(search: Search, folder: Path, status: str) -> None:
    told = {"settings": search.settings.to_json(), "grid": _asked(search)}
    RunDir(folder).write_config({"command": "sweep", "status": status, **told})


def _asked(search: Search) -> dict[str, dict[str, Any]]:
    """The spaces as JSON."""
    return {
        name: {o: str(v) if isinstance(v, Range) else v for o, v in space.items()}
        for name, space in search.grid.items()
    }
