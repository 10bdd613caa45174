"""One self-contained HTML page of a run, or of several side by side.

A kind of run, named by `command` in its config.json, adds its part of the page with one function:

    @sections("compare")
    def of_compare(run: RunDir) -> Iterator[Section]: ...

A kind without one shows its tables and pictures as they lie in its folder.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from matplotlib.figure import Figure

from fisherlab import plots
from fisherlab.comparison import Comparison
from fisherlab.experiments import checkpoint
from fisherlab.experiments.columns import MEANING
from fisherlab.experiments.rundir import FIGURES, REPORT, RunDir, RunDirError

ROWS = 400  # of a table on the page; the file has all


@dataclass(frozen=True)
class Table:
    """A table on the page; `meaning` are the sentences behind its column names."""

    frame: pd.DataFrame
    caption: str = ""
    meaning: dict[str, str] = field(default_factory=lambda: MEANING)


@dataclass(frozen=True)
class Picture:
    """A PNG file on the page, and what it shows in words."""

    path: Path
    caption: str

    @property
    def data(self) -> str:
        """The picture itself, as an address."""
        return "data:image/png;base64," + base64.b64encode(self.path.read_bytes()).decode()


@dataclass(frozen=True)
class Section:
    """A heading with a few sentences, tables and pictures below it."""

    title: str
    text: Sequence[str] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()


Builder = Callable[[RunDir], Iterator[Section]]
BUILDERS: dict[str, Builder] = {}


def sections(command: str) -> Callable[[Builder], Builder]:
    """Enter what a kind of run shows."""

    def enter(builder: Builder) -> Builder:
        BUILDERS[command] = builder
        return builder

    return enter


def write(run: RunDir) -> Path:
    """`report.html` in the folder of a run, its pictures made anew."""
    path = run.folder / REPORT
    checkpoint.write(path, page([run]))
    return path


def write_side_by_side(runs: Sequence[RunDir], path: Path) -> Path:
    """One page of several runs."""
    checkpoint.write(path, page(runs))
    return path


def page(runs: Sequence[RunDir]) -> str:
    """The HTML of one run or several."""
    parts = [(_title(run), [*_sections(run), _made_with(run)]) for run in runs]
    if len(runs) > 1:
        both = _side_by_side(runs)
        parts = [("Side by side", [both]), *parts] if both else parts
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fisherlab.experiments"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"cell": cell, "key": sort_key}
    title = parts[0][0] if len(runs) == 1 else f"{len(runs)} runs side by side"
    return environment.get_template("report.html.j2").render(title=title, parts=parts, rows=ROWS)


def picture(run: RunDir, name: str, figure: Figure, caption: str) -> Picture:
    """A figure as PNG and PDF in the folder of the run, and on the page."""
    png, _ = plots.save(figure, run.folder / FIGURES / name)
    return Picture(png, caption)


def cell(value: Any) -> str:
    """A value as the page shows it."""
    if isinstance(value, float):
        return "–" if value != value else f"{value:.4g}"
    if isinstance(value, bool) or not isinstance(value, int):
        return html.unescape(str(value))
    return f"{value:,}"


def sort_key(value: Any) -> str:
    """A value as the page sorts it."""
    return str(value) if not isinstance(value, float) or value == value else ""


def _title(run: RunDir) -> str:
    config = run.config
    return config.get("title") or f"{config.get('command', 'run')} in {run.folder.name}"


def _sections(run: RunDir) -> Iterator[Section]:
    status = run.config.get("status", "complete")
    notes = list(run.config.get("notes", []))
    if status != "complete" or notes:
        said = f"This run is {status}: the page shows what was measured so far."
        yield Section("Mind", ([said] if status != "complete" else []) + notes)
    yield from BUILDERS.get(run.config.get("command", ""), _as_it_lies)(run)


def _as_it_lies(run: RunDir) -> Iterator[Section]:
    tables = [Table(pd.read_csv(path), path.stem) for path in sorted(run.folder.glob("*.csv"))]
    pictures = [
        Picture(path, path.stem.replace("_", " "))
        for path in sorted((run.folder / FIGURES).glob("*.png"))
    ]
    yield Section("What was measured", tables=tables, pictures=pictures)


def _made_with(run: RunDir) -> Section:
    """What reruns it: settings, data, versions."""
    config = run.config
    rows = [
        (key, value)
        for key in ("settings", "data", "versions")
        for key, value in _flat(config, key)
    ]
    frame = pd.DataFrame(rows, columns=["what", "value"])
    text = [f"From {run.folder.name}/config.json, which has all of it."]
    return Section("Settings, data, versions", text, [Table(frame)])


def _flat(config: dict[str, Any], key: str) -> Iterator[tuple[str, str]]:
    inside = config.get(key, {})
    for name, value in inside.items() if isinstance(inside, dict) else [("", inside)]:
        several = ", ".join(map(str, value)) if isinstance(value, list) else value
        yield f"{key}: {name}".rstrip(": "), "–" if several in (None, {}, "") else str(several)


def _side_by_side(runs: Sequence[RunDir]) -> Section | None:
    """The leading errors of several comparisons in one table, one column per run."""
    columns = {}
    for run in runs:
        frame = run.table("comparison")
        if frame is not None and len(frame):
            summary = Comparison(frame).summary()
            for name in ("relative_error", "population_error", "direction_cosine"):
                if name in summary:
                    columns[f"{name}: {run.folder.name}"] = summary[name]
    if not columns:
        return None
    frame = pd.DataFrame(columns).rename_axis("approximation").reset_index()
    text = ["The median over layers at the last step of each run."]
    return Section("Errors of every run", text, [Table(frame)])


# comparisons -------------------------------------------------------------------------------------

PICTURES = {
    "error": "Error of every approximation over the layers, from input to output.",
    "trace_ratio": "Trace of every approximation over the trace of the exact block.",
    "direction": "Cosine between the damped step of every approximation and the exact one.",
    "training": "The error over training, layer by layer.",
    "cost": "Time to build a block and solve with it, against its error.",
}


@sections("compare")
def of_compare(run: RunDir) -> Iterator[Section]:
    """The summary, the pictures, the layers, and what the columns mean."""
    frame = run.table("comparison")
    if frame is None or not len(frame):
        raise RunDirError(f"{run.folder} holds a comparison without rows; run it again")
    table = Comparison(frame, run.config)
    summary = table.summary().reset_index()
    last = frame[frame["step"] == frame["step"].max()]
    yield Section(
        "Which approximation is nearest",
        [_what(frame, run.config), *([table.note] if table.note else [])],
        [Table(summary, "Median over layers and seeds at the last step, the nearest first.")],
    )
    shown = {name: text for name, text in PICTURES.items() if _drawable(name, frame)}
    yield Section(
        "Pictures",
        ["Each is also in the folder as PNG and PDF."],
        pictures=[picture(run, n, table.plot(n), text) for n, text in shown.items()],
    )
    columns = ["layer", "layer_type", "n_parameters", "approximation", table.leading]
    columns += [c for c in ("relative_error", "population_error") if c != table.leading]
    columns += ["population_error_se", "optimality_gap", "trace_ratio", "cosine", "diagonalisation"]
    columns += ["subspace_overlap", "build_seconds", "memory_bytes", "note"]
    by_layer = last.drop_duplicates(["layer", "approximation", "seed"])[columns]
    caption = "Every layer at the last step (first seed first); all rows are in comparison.csv."
    yield Section("Layer by layer", tables=[Table(by_layer.dropna(axis=1, how="all"), caption)])
    steps = ["layer", "approximation", "seed", "damping_relative", "placement", "direction_cosine"]
    steps += ["direction_error", "quadratic_decrease", "quadratic_decrease_scaled", "stein_loss"]
    steps += ["condition", "solve_seconds"]
    caption = "The damped natural gradient at the last step, per damping."
    yield Section("The damped step", tables=[Table(last[steps], caption)])
    meaning = pd.DataFrame(MEANING.items(), columns=["column", "meaning"])
    yield Section("What the columns mean", tables=[Table(meaning)])


def _drawable(name: str, frame: pd.DataFrame) -> bool:
    """Whether a picture has anything to show: one step is no training, one damping no curve."""
    alone = {"training": "step", "direction": "damping_relative"}
    return name not in alone or frame[alone[name]].nunique() > 1


def _what(frame: pd.DataFrame, config: dict[str, Any]) -> str:
    first, settings = frame.iloc[0], config.get("settings", {})
    steps = ", ".join(map(str, sorted(frame["step"].unique())))
    unseen = settings.get("reference")
    against = f" and, for the population error, {unseen} unseen ones" if unseen else ""
    return (
        f"Model {settings.get('model')} on {settings.get('data')}, measured at training steps "
        f"{steps}: {frame['layer'].nunique()} layers, "
        f"{frame['approximation'].nunique()} approximations, "
        f"seeds {', '.join(map(str, sorted(frame['seed'].unique())))}. "
        f"{first['fisher_type']} Fisher of {first['examples']} examples{against}, in "
        f"{first['dtype']}."
    )
