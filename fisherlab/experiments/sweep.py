"""A small search: every optimizer at every point of its grid, then the best at full length."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby, product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fisherlab import whole
from fisherlab.experiments.rundir import RunDir, versions
from fisherlab.experiments.training import Entry, Results, Settings, SettingsError, Watch, train
from fisherlab.experiments.training import entries as parse

Grid = dict[str, dict[str, list[str]]]  # optimizer -> option -> the values to try


@dataclass
class Search:
    """The settings tried, the choice among them, and its result on the test set."""

    grid: Grid
    tried: Results
    chosen: tuple[Entry, ...]
    final: Results | None  # None: interrupted before

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ended it."""
        return self.final is None or self.final.interrupted

    @property
    def table(self) -> pd.DataFrame:
        """One row per optimizer: the chosen options, the validation metric, and the final one."""
        tried = self.tried.summary().set_index("optimizer")
        final = None if self.final is None else self.final.summary().set_index("optimizer")
        rows = []
        for entry in self.chosen:
            # the label of the grid point that became this entry
            point = next(e.label for e in self.tried.settings.entries if _same(e, entry))
            row = {
                "optimizer": entry.label,
                "options": ", ".join(f"{k}={v}" for k, v in entry.options.items()),
                "at_the_edge": ", ".join(self.edges(entry)),
                "points": sum(e.name == entry.name for e in self.tried.settings.entries),
                "validation": tried.loc[point, "final"],
            }
            if final is not None and "final" in final:
                columns = ["seeds", "final", "final_sd", "best", "train_loss", "ratio_to_sgd"]
                columns += ["clipped_share"]
                row |= final.loc[entry.label, columns].to_dict()
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
        rows, entries = self.tried.rows, self.tried.settings.entries
        found = []
        for _, points in groupby(entries, key=lambda entry: entry.name):
            runs: list[tuple[np.ndarray, list[Entry]]] = []
            for point in points:
                mine = rows[(rows["optimizer"] == point.label) & (rows["epoch"] > 0)]
                losses = mine[["train_loss", "test_loss"]].to_numpy()
                if len(losses) < point.epochs(self.tried.settings.epochs):
                    continue  # it did not come to its end
                for theirs, alike in runs:
                    # not bit for bit: lr cancels against the clip but for rounding
                    same = losses.shape == theirs.shape  # a seed of one may have diverged
                    if same and np.allclose(losses, theirs, rtol=1e-4):
                        alike.append(point)
                        break
                else:
                    runs.append((losses, [point]))
            found += [self._alike(alike) for _, alike in runs if len(alike) > 1]
        return found

    def _alike(self, points: list[Entry]) -> str:
        """`kfac: lr=0.03 and lr=0.1 gave the same run: ...`."""
        first = points[0].options
        moved = [o for o in first if len({point.options[o] for point in points}) > 1]
        said = [", ".join(f"{o}={point.options[o]}" for o in moved) for point in points]
        rows = self.tried.rows
        mine = rows[rows["optimizer"].isin([p.label for p in points]) & (rows["epoch"] > 0)]
        share = mine["clipped_share"].min() if "clipped_share" in mine else 0.0
        why = "the losses of every epoch agree to 4 digits"
        if share == 1:
            bound = "max_norm" if "max_norm" in first else "kl_clip"
            why = f"{bound} shortened every step; pass {bound}=none or search it"
        name = points[0].name
        return f"{name}: {', '.join(said[:-1])} and {said[-1]} gave the same run: {why}"

    def edges(self, entry: Entry) -> list[str]:
        """Options chosen at an end of their grid: a wider one may find better."""
        grid = self.grid.get(entry.label, {})
        ends = {option: (values[0], values[-1]) for option, values in grid.items()}
        return [o for o, values in ends.items() if entry.options[o] in values and len(grid[o]) > 2]


def grid(assignments: Sequence[str], wanted: str) -> Grid:
    """`kfac.lr=0.1,0.3` per optimizer and option; commas within parentheses separate nothing."""
    names = {entry.label for entry in parse(wanted)}
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
        values = (value.strip() for value in re.split(r",(?![^()]*\))", match[3]))
        found[match[1]][match[2]] = list(dict.fromkeys(values))  # a point twice is one run
    return found


def points(wanted: str, choices: Grid) -> tuple[Entry, ...]:
    """Every optimizer with every combination of its options, labelled `kfac-1`, `kfac-2`, ..."""
    found: list[Entry] = []
    for name in (entry.label for entry in parse(wanted)):
        options = choices[name]
        for k, values in enumerate(product(*options.values()), 1):
            label = f"{name}-{k}"
            given = [f"{label}.{o}={v}" for o, v in zip(options, values, strict=True)]
            found += parse(f"{label}={name}", given)
    return tuple(found)


def sweep(
    settings: Settings,
    wanted: str,
    choices: Grid,
    folder: Path,
    *,
    final: dict[str, Any],
    watch: Watch | None = None,
) -> Search:
    """Train every point on part of the training set, choose on held-out examples, train the best.

    `settings` are those of the search, its `validation` set; `final` the fields that are others for
    the chosen points (epochs, seeds, examples), which the test set measures. Resumes like `train`.
    """
    if settings.validation is None:
        raise SettingsError("a search chooses on held-out examples: give their number, validation")
    tried = train(
        replace(settings, entries=points(wanted, choices)), folder / "search", watch=watch
    )
    chosen = _best(tried)
    last = None
    if not tried.interrupted and chosen:
        full = replace(settings, entries=chosen, validation=None, **final)
        last = train(full, folder / "final", watch=watch)
    search = Search(choices, tried, chosen, last)
    if chosen:
        _write(search, folder)
    return search


def _best(tried: Results) -> tuple[Entry, ...]:
    """The point of each optimizer with the best validation metric at the end, the best first."""
    summary = tried.summary()
    if "final" not in summary:
        return ()
    by_label = {entry.label: entry for entry in tried.settings.entries}
    found: dict[str, Entry] = {}
    for label in summary["optimizer"][summary["final"].notna()]:
        entry = by_label[label]
        found.setdefault(entry.name, Entry(entry.name, entry.name, entry.options))
    return tuple(found.values())


def _same(point: Entry, entry: Entry) -> bool:
    return point.name == entry.name and point.options == entry.options


def _write(search: Search, folder: Path) -> None:
    """`sweep.md`, the table, and `sweep.json`: the same, what was tried, and on what."""
    content = {
        "search": search.tried.settings.to_json(),
        "grid": search.grid,
        "metric": search.tried.metric,
        "final": None if search.final is None else search.final.settings.to_json(),
        "table": search.table.to_dict("records"),
        "tried": search.tried.summary()[["optimizer", "final", "status"]].to_dict("records"),
        "notes": search.notes,
        "versions": versions(),
    }
    search_settings = content["search"]
    RunDir(folder).write_config(
        {
            "command": "sweep",
            "status": "interrupted" if search.interrupted else "complete",
            "settings": search_settings,
            "grid": search.grid,
        }
    )
    whole.write(folder / "sweep.json", json.dumps(content, indent=1) + "\n")
    whole.write(folder / "sweep.md", search.markdown())
