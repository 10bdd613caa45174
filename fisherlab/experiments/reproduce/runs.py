"""An item run, resumed or read: training, the learning rates chosen before it, its files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from fisherlab import doors, plots, whole
from fisherlab.experiments import training
from fisherlab.experiments.reproduce import outcome, page, workers
from fisherlab.experiments.reproduce.catalogue import ITEMS, items
from fisherlab.experiments.reproduce.item import SCALES, Experiment, Item
from fisherlab.experiments.reproduce.outcome import CANNOT, Outcome
from fisherlab.experiments.reproduce.plan import (
    Planned,
    ReproduceError,
    check_scale,
    cost,
    in_words,
    planned,
    searches,
    settings_of,
)
from fisherlab.experiments.rundir import RunDir
from fisherlab.experiments.training.results import Results

# Sentences for the tables.
CONTROLS = "Arms named `_control` are SGD with the step lengths of the arm, layer by layer; ours"
EQUAL_TIME = (
    "Every arm at the seconds of the fastest for all epochs, on the line between two epochs"
)


class Listener:
    """A listener for a caller that waits; every method may be overridden."""

    def item(self, item: Item, said: str) -> None:
        """An item begins; `said` is what it will cost, or why it cannot be run."""

    def ended(self, item: Item, found: Outcome) -> None:
        """An item has its verdict."""

    def watch(self, plan: Planned) -> training.Watch:
        """Who listens to the training runs of a folder."""
        return training.Watch()

    def worked(self, plan: Planned, status: str, left: int) -> None:
        """A worker has ended with a folder, and this many are left."""


def reproduce(
    paper: str | None = None,
    item: str | None = None,
    *,
    scale: str = "minutes",
    out: str | Path = "runs/reproduce",
    control: bool = False,
    jobs: int = 1,
    listener: Listener | None = None,
) -> pd.DataFrame:
    """Run tables and figures of the papers, and set ours beside the papers' numbers.

    The folder `out/SCALE` has run folders by paper and experiment, which several items share. An
    interrupted call goes on from them. Each item has a table (csv, Parquet, Markdown) and a
    picture; `out/report.html` has all items run so far.

    Args:
        paper: `ang`, `tekfac`, `sngd`, `fngd` or `ngm`; all five without it.
        item: One table or figure, such as `table1` or `fig3`; all of the paper without it.
        scale: `minutes`, `hours`, or `paper`, which has the paper's sizes.
        out: The folder of all results.
        control: Beside every preconditioner: SGD with its step lengths, layer by layer. The
            controls stand in the tables and enter no verdict.
        jobs: Above 1: so many processes of one thread each train first; tables, pictures and the
            page follow from this process. `watch` of the listener then hears little.
        listener: Who hears of items and runs as they begin and end.

    Returns:
        One row per item: verdict, reason, estimated and spent seconds.

    Raises:
        ReproduceError: The paper, the item or the scale is unknown; `jobs` is below 1.
        SettingsError: A folder holds runs of other settings.
        RunDirError: The folder holds a run of another command.
    """
    check_scale(scale)
    jobs = doors.count(jobs, "jobs", error=ReproduceError)
    out, listener = doors.place(out, "out", error=ReproduceError), listener or Listener()
    chosen = items(paper, item)
    RunDir(out).check_command("reproduce")
    if jobs > 1:
        _train_beforehand(chosen, scale, out, control, jobs, listener)
    found = []
    for one in chosen:
        listener.item(one, announcement(one, scale, control))
        result = _run(one, scale, out, listener, control)
        found.append(_written(one, scale, out, result, control))
        listener.ended(one, result)
        page.write(out)
    return pd.DataFrame(found)


def announcement(item: Item, scale: str, control: bool = False) -> str:
    """The expected cost of an item, or why it is not run."""
    if not item.runnable:
        return f"not an experiment: {item.why}" if item.illustration else f"{CANNOT}: {item.why}"
    spent = in_words(cost(item, scale, control))
    return f"about {spent} on one core, less what is done already"


def verdicts(out: Path) -> Iterator[dict[str, Any]]:
    """The verdict of every item in a folder of results, and of every item that is not there."""
    for item in ITEMS:
        found = [out / scale / item.paper / f"{item.key}.json" for scale in SCALES]
        there = [whole.read_json(path) for path in found if path.is_file()]
        verdict = "not run yet" if item.runnable else announcement(item, SCALES[0])
        yield from there or [{"paper": item.paper, "item": item.key, "verdict": verdict}]


def _train_beforehand(
    chosen: Sequence[Item], scale: str, out: Path, control: bool, jobs: int, listener: Listener
) -> None:
    """Every run folder of the items, first those in which learning rates are chosen."""
    trainings: dict[Path, Planned] = {}

    def take(experiment: Experiment, plans: Iterable[Planned]) -> None:
        trainings.update({_home(experiment, scale, out) / p.folder: p for p in plans})

    def train() -> None:
        workers.train_all([(p, folder) for folder, p in trainings.items()], jobs, listener.worked)
        trainings.clear()

    trained = [(one, one.experiment) for one in chosen if one.experiment is not None]
    for one, experiment in trained:
        take(experiment, (p for p, _ in searches(experiment, scale, one.cells, control)))
    train()
    for one, experiment in trained:
        rates = _rates(experiment, scale, out, listener, one.cells, control)
        take(experiment, planned(experiment, scale, rates, one.cells, control))
    train()


def _home(experiment: Experiment, scale: str, out: Path) -> Path:
    """The folder of all runs of an experiment."""
    return out / scale / experiment.paper / experiment.key


def _run(item: Item, scale: str, out: Path, listener: Listener, control: bool) -> Outcome:
    if item.drawing is not None:
        return item.drawing.function(_stem(item, scale, out), scale)
    if item.experiment is None:
        verdict = f"not an experiment: {item.why}" if item.illustration else f"{CANNOT}: {item.why}"
        return Outcome(pd.DataFrame(), verdict, "")
    rows = trained(item.experiment, scale, out, listener, item.cells, control)
    if not rows:
        return Outcome(pd.DataFrame(), f"{CANNOT}: scale {scale} leaves its cells out", "")
    table = outcome.measured(item, rows)
    used = [cell for cell in item.experiment.cells if cell.name in rows]
    figure = plots.reproduced(
        item.title, table, rows, item.panels, item.quantity, {c.name: c.stand_in for c in used}
    )
    plots.save(figure, _stem(item, scale, out))
    stand_ins = [c.stand_in for c in used if c.stand_in]
    short = outcome.untaught(item, rows)
    return outcome.judged(item, table, scale, stand_ins, short, outcome.clock(rows))


def trained(
    experiment: Experiment,
    scale: str,
    out: Path,
    listener: Listener,
    only: tuple[str, ...] | None = None,
    control: bool = False,
) -> dict[str, pd.DataFrame]:
    """The rows of every cell.

    `attrs` has the arms without a result, the learning rates, and the controls with their arms.
    """
    folder = _home(experiment, scale, out)
    rates = _rates(experiment, scale, out, listener, only, control)
    found: dict[str, list[Results]] = {}
    beside: dict[str, str] = {}
    for plan in planned(experiment, scale, rates, only, control):
        results = training.train(plan.settings, folder / plan.folder, watch=listener.watch(plan))
        if results.interrupted:
            raise KeyboardInterrupt
        found.setdefault(plan.cell.name, []).append(results)
        beside |= {arm.label: arm.control_of for arm in plan.arms if arm.control_of}
    rows = {cell: _joined(results) for cell, results in found.items()}
    for frame in rows.values():
        frame.attrs["controls"] = beside
    return rows


def _joined(results: Sequence[Results]) -> pd.DataFrame:
    frame = pd.concat([r.rows for r in results], ignore_index=True)
    records = [record for r in results for record in r.records]
    done = {(r.entry.label, r.seed) for r in records if r.status == "done"}
    keep = [key in done for key in zip(frame["optimizer"], frame["seed"], strict=True)]
    frame = frame[keep].reset_index(drop=True)
    missing = {r.entry.label: f"{r.status}: {r.note}" for r in records if r.status != "done"}
    rates = {r.entry.label: r.entry.options.get("lr", math.nan) for r in records}
    frame.attrs = {"missing": missing, "lr": rates}
    return frame


def _rates(
    experiment: Experiment,
    scale: str,
    out: Path,
    listener: Listener,
    only: tuple[str, ...] | None,
    control: bool,
) -> dict[tuple[str, str], float]:
    """The learning rates chosen on held-out examples, with the same budget for every arm."""
    folder, rates = _home(experiment, scale, out), {}
    for plan, arm in searches(experiment, scale, only, control):
        results = training.train(plan.settings, folder / plan.folder, watch=listener.watch(plan))
        if results.interrupted:
            raise KeyboardInterrupt
        best = results.summary()
        known = best.dropna(subset=["final"]) if "final" in best else best[:0]
        if len(known):
            label = str(known["optimizer"].iloc[0])
            rates[plan.cell.name, arm.label] = float(label.removeprefix("lr"))
    return rates


# Files --------------------------------------------------------------------------------------------


def _stem(item: Item, scale: str, out: Path) -> Path:
    stem = out / scale / item.paper / item.key
    stem.parent.mkdir(parents=True, exist_ok=True)
    return stem


def _written(item: Item, scale: str, out: Path, found: Outcome, control: bool) -> dict[str, Any]:
    """The item's files, and its row among all items."""
    stem = _stem(item, scale, out)
    row = {
        "paper": item.paper,
        "item": item.key,
        "scale": scale,
        "title": item.title,
        "verdict": found.verdict,
        "because": found.because,
        "at_equal_time": found.at_equal_time,
        "estimated_seconds": round(cost(item, scale, control), 1),
    }
    if len(found.table):
        RunDir(stem.parent).write_table(stem.name, found.table)
    whole.write(stem.with_suffix(".md"), markdown(item, scale, found))
    whole.write(stem.with_suffix(".json"), json.dumps(row, indent=2) + "\n")
    return row


def markdown(item: Item, scale: str, found: Outcome) -> str:
    """The item as a page of Markdown."""
    lines = [f"# {item.paper} {item.key}: {item.title}", "", f"**{found.verdict}**"]
    lines[-1] += f" ({found.because})." if found.because else "."
    if item.note:
        lines += ["", item.note]
    if len(found.table) and item.experiment is not None:
        size = item.experiment.sizes[scale]
        used = {k: v for k, v in vars(size).items() if v is not None and (k, v) != ("width", 1.0)}
        lines += ["", f"Scale {scale}: {used or 'the sizes of the paper'}."]
        for cell in item.experiment.chosen(scale, item.cells)[0]:
            if cell.stand_in:
                lines += ["", f"{cell.name}: a stand-in: {cell.stand_in}."]
        lines += ["", markdown_table(outcome.laid_out(item, found.table))]
        if found.table["control_of"].any():
            lines += ["", f"{CONTROLS}."]
        if outcome.has_equal_time(found.table):
            lines += ["", "## At equal time", "", f"{EQUAL_TIME}.", ""]
            lines += [f"**{found.at_equal_time}.**", ""] if found.at_equal_time else []
            lines += [markdown_table(outcome.laid_out(item, found.table, "at_equal_time"))]
        lines += ["", "## Settings", "", markdown_table(settings_of(item, scale))]
    elif len(found.table):
        lines += ["", markdown_table(found.table.round(4))]
    return "\n".join(lines) + "\n"


def markdown_table(frame: pd.DataFrame) -> str:
    """A frame as a table of Markdown."""
    rows = [list(map(str, frame.columns)), ["---"] * len(frame.columns)]
    rows += [
        [str(value).replace("|", "/") for value in row] for row in frame.itertuples(index=False)
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
