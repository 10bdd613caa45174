"""One page over all items run so far."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from fisherlab import whole
from fisherlab.experiments import report
from fisherlab.experiments.report import Picture, Section, Table, sections
from fisherlab.experiments.reproduce import outcome
from fisherlab.experiments.reproduce.catalogue import items
from fisherlab.experiments.reproduce.item import SCALES
from fisherlab.experiments.reproduce.plan import settings_of
from fisherlab.experiments.rundir import RunDir, RunDirError

MEANING = {
    "ours": "mean over the seeds",
    "paper": "the number of the paper",
    "difference_se": "the difference in standard errors; empty where one is unknown",
    "lr": "the learning rate used",
    "seconds": "in steps, mean over the seeds; of the processor where all arms have them",
    "at_equal_time": "ours at the seconds of the fastest arm, on the line between two epochs",
    "control_of": "the arm whose step lengths this one has; it enters no verdict",
}


def write(out: Path) -> Path:
    """`report.html` over everything in the folder."""
    run = RunDir(out)
    run.write_config({"command": "reproduce", "title": "Tables and figures of the five papers"})
    frame = pd.DataFrame(list(_rows(out)))
    if len(frame):
        run.write_table("verdicts", frame)
    return report.write(run)


def _rows(out: Path) -> Iterator[dict[str, Any]]:
    for scale in SCALES:
        for item in items():
            path = out / scale / item.paper / f"{item.key}.json"
            if path.is_file():
                yield whole.read_json(path, RunDirError)


@sections("reproduce")
def of_reproduction(run: RunDir) -> Iterator[Section]:
    """The verdicts, then every item with its table, its picture and its settings."""
    rows = list(_rows(run.folder))
    yield Section(
        "Verdicts",
        [
            "“reproduced”: the order of every pair of methods that the paper orders is found here "
            "(Welch's t over the seeds, 95 %). “undecided”: none is contradicted, some are open."
        ],
        [Table(pd.DataFrame(rows), "One row per table or figure.", {})],
    )
    for row in rows:
        (item,) = items(row["paper"], row["item"])
        folder, scale = run.folder / row["scale"] / row["paper"], row["scale"]
        table = RunDir(folder).table(item.key)
        if table is None:
            continue
        shown, text = [], [f"{row['verdict']}. {row['because']}.", item.note]
        if item.experiment is not None:
            cells = item.experiment.chosen(scale, item.cells)[0]
            text += [f"{c.name}: a stand-in: {c.stand_in}." for c in cells if c.stand_in]
            shown.append(Table(outcome.laid_out(item, table), "Ours, and the paper's.", {}))
            if outcome.has_equal_time(table):
                text += [f"At equal time: {said}." if (said := row.get("at_equal_time")) else ""]
                equal = outcome.laid_out(item, table, "at_equal_time")
                shown.append(Table(equal, "At the seconds of the fastest arm.", {}))
        shown.append(Table(table, "Every number.", MEANING))
        if item.experiment is not None:
            shown.append(Table(settings_of(item, scale), "Every setting, and who says so.", {}))
        picture = folder / f"{item.key}.png"
        yield Section(
            f"{item.paper} {item.key}, scale {scale}: {item.title}",
            [line for line in text if line],
            shown,
            [Picture(picture, item.title)] if picture.is_file() else [],
        )
