"""An item run, resumed or read: training, the learning rates chosen before it, its files."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from fisherlab import plots, whole
from fisherlab.experiments import training
from fisherlab.experiments.reproduce import outcome, page
from fisherlab.experiments.reproduce.catalogue import items
from fisherlab.experiments.reproduce.item import Experiment, Item
from fisherlab.experiments.reproduce.outcome import CANNOT, Outcome
from fisherlab.experiments.reproduce.plan import (
    Planned,
    check_scale,
    cost,
    in_words,
    planned,
    searches,
    settings_of,
)
from fisherlab.experiments.rundir import RunDir
from fisherlab.experiments.training.results import Results


class Listener:
    """A listener for a caller that waits; every method may be overridden."""

    def item(self, item: Item, said: str) -> None:
        """An item begins; `said` is what it will cost, or why it cannot be run."""

    def ended(self, item: Item, found: Outcome) -> None:
        """An item has its verdict."""

    def watch(self, plan: Planned) -> training.Watch:
        """Who listens to the training runs of a folder."""
        return training.Watch()


def reproduce(
    paper: str | None = None,
    item: str | None = None,
    *,
    scale: str = "minutes",
    out: str | Path = "runs/reproduce",
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
        listener: Who hears of items and runs as they begin and end.

    Returns:
        One row per item: verdict, reason, estimated and spent seconds.

    Raises:
        ReproduceError: The paper, the item or the scale is unknown.
    """
    check_scale(scale)
    out, listener = Path(out), listener or Listener()
    found = []
    for one in items(paper, item):
        listener.item(one, announcement(one, scale))
        result = _run(one, scale, out, listener)
        found.append(_written(one, scale, out, result))
        listener.ended(one, result)
        page.write(out)
    return pd.DataFrame(found)


def announcement(item: Item, scale: str) -> str:
    """The expected cost of an item, or why it is not run."""
    if not item.runnable:
        return f"not an experiment: {item.why}" if item.illustration else f"{CANNOT}: {item.why}"
    return f"about {in_words(cost(item, scale))} on one core, less what is done already"


def _run(item: Item, scale: str, out: Path, listener: Listener) -> Outcome:
    if item.drawing is not None:
        return item.drawing.function(_stem(item, scale, out), scale)
    if item.experiment is None:
        verdict = f"not an experiment: {item.why}" if item.illustration else f"{CANNOT}: {item.why}"
        return Outcome(pd.DataFrame(), verdict, "")
    rows = trained(item.experiment, scale, out, listener, item.cells)
    if not rows:
        return Outcome(pd.DataFrame(), f"{CANNOT}: scale {scale} leaves its cells out", "")
    table = outcome.measured(item, rows)
    used = [cell for cell in item.experiment.cells if cell.name in rows]
    figure = plots.reproduced(
        item.title, table, rows, item.panels, item.quantity, {c.name: c.stand_in for c in used}
    )
    plots.save(figure, _stem(item, scale, out))
    short = outcome.untaught(item, rows)
    return outcome.judged(item, table, scale, [c.stand_in for c in used if c.stand_in], short)


def trained(
    experiment: Experiment,
    scale: str,
    out: Path,
    listener: Listener,
    only: tuple[str, ...] | None = None,
) -> dict[str, pd.DataFrame]:
    """The rows of every cell; `attrs` has the arms without a result and the learning rates."""
    folder = out / scale / experiment.paper / experiment.key
    rates = _rates(experiment, scale, folder, listener, only)
    found: dict[str, list[Results]] = {}
    for plan in planned(experiment, scale, rates, only):
        results = training.train(plan.settings, folder / plan.folder, watch=listener.watch(plan))
        if results.interrupted:
            raise KeyboardInterrupt
        found.setdefault(plan.cell.name, []).append(results)
    return {cell: _joined(results) for cell, results in found.items()}


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
    folder: Path,
    listener: Listener,
    only: tuple[str, ...] | None,
) -> dict[tuple[str, str], float]:
    """The learning rates chosen on held-out examples, with the same budget for every arm."""
    rates = {}
    for plan, arm in searches(experiment, scale, only):
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


def _written(item: Item, scale: str, out: Path, found: Outcome) -> dict[str, Any]:
    """The item's files, and its row among all items."""
    stem = _stem(item, scale, out)
    row = {
        "paper": item.paper,
        "item": item.key,
        "scale": scale,
        "title": item.title,
        "verdict": found.verdict,
        "because": found.because,
        "estimated_seconds": round(cost(item, scale), 1),
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
        lines += ["", markdown_table(outcome.laid_out(item, found.table)), "", "## Settings", ""]
        lines += [markdown_table(settings_of(item, scale))]
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
