"""One self-contained HTML page of a run, or of several side by side.

A kind of run, named by `command` in its config.json, adds its part of the page with one function:

    @sections("compare")
    def of_compare(run: RunDir) -> Iterator[Section]: ...

(pages.py has those of comparisons and of training). A kind without one shows its tables and
pictures as they lie in its folder.
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

from fisherlab import plots, whole
from fisherlab.comparison import Comparison
from fisherlab.experiments.columns import MEANING
from fisherlab.experiments.rundir import FIGURES, REPORT, RunDir, RunDirError

ROWS = 400  # rows of a table on the page; the file has all


@dataclass(frozen=True)
class Table:
    """A table on the page; `meaning` are the sentences behind its column names."""

    frame: pd.DataFrame
    caption: str = ""
    meaning: dict[str, str] = field(default_factory=lambda: MEANING)


@dataclass(frozen=True)
class Picture:
    """A PNG file on the page, twice as fine as it is shown, and what it shows in words."""

    path: Path
    caption: str

    @property
    def width(self) -> int:
        """Pixels of the page that it fills: half of its own, as in print."""
        return int.from_bytes(self.path.read_bytes()[16:20], "big") // 2

    @property
    def data(self) -> str:
        """The picture itself, as an address."""
        return "data:image/png;base64," + base64.b64encode(self.path.read_bytes()).decode()


@dataclass(frozen=True)
class Section:
    """A heading with a few sentences, a picture, tables, and further pictures below it."""

    title: str
    text: Sequence[str] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    found: int = 0  # leading sentences that are the finding


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
    whole.sweep_parts(run.folder)
    whole.write(path, page([run]))
    return path


def write_side_by_side(runs: Sequence[RunDir], path: Path) -> Path:
    """One page of several runs."""
    whole.write(path, page(runs))
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
    environment.filters |= {"cell": cell, "key": sort_key, "base": base}
    title = parts[0][0] if len(runs) == 1 else f"{len(runs)} runs side by side"
    return environment.get_template("report.html.j2").render(title=title, parts=parts, rows=ROWS)


def picture(run: RunDir, name: str, figure: Figure, caption: str) -> Picture:
    """A figure as PNG and PDF in the folder of the run, and on the page."""
    png, _ = plots.save(figure, run.folder / FIGURES / name)
    return Picture(png, caption)


def few(names: Sequence[str], most: int = 4) -> str:
    """`a, b, c and 5 more`."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def base(column: str) -> str:
    """The name by which a column's meaning is known."""
    return column.split(":")[0].split(" @")[0].removesuffix(" known")


def cell(value: Any) -> str:
    """A value as the page shows it."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return "–" if value != value else f"{value:.3g}"
    if isinstance(value, bool) or not isinstance(value, int):
        return html.unescape(str(value))
    return f"{value:,}"


def sort_key(value: Any) -> str:
    """A value as the page sorts it."""
    return str(value) if not isinstance(value, float) or value == value else ""


def _title(run: RunDir) -> str:
    config, settings = run.config, run.config.get("settings", {})
    what, name = config.get("command", "run"), run.folder.name
    on = f"{settings.get('model')} on {settings.get('data')}"
    if what == "train":
        entries = [str(e.get("label")) for e in _listed(settings, "entries") if isinstance(e, dict)]
        return f"Training {on}: {few(entries)}"
    if what == "sweep":
        return f"Settings of {few(list(config.get('grid', {})))} for {on}"
    if what == "verify":
        words = [str(name).replace("_", " ") for name in _listed(settings, "names")]
        claims = few(words) if words else "all papers"
        return f"Claims of {claims}" + (f" on {settings['on']}" if settings.get("on") else "")
    if what == "bench":
        parts = sorted(path.stem for path in run.folder.glob("*.parquet"))
        return f"Time and memory on {settings.get('device')}" + (f": {few(parts)}" if parts else "")
    title = config.get("title")
    return f"Approximations of {title}" if what == "compare" and title else title or f"Run {name}"


def _listed(settings: dict[str, Any], key: str) -> list[Any]:
    found = settings.get(key)
    return found if isinstance(found, list) else []


def _sections(run: RunDir) -> Iterator[Section]:
    status = run.config.get("status", "complete")
    notes = list(run.config.get("notes", []))
    said = [f"This run is {status}: the page shows what was measured so far."]
    if status != "complete" and run.config.get("command") != "train":
        yield Section("Notes", [*said, *notes])
        notes = []
    yield from BUILDERS.get(run.config.get("command", ""), _as_it_lies)(run)
    if notes:
        yield Section("Notes", notes)


def _as_it_lies(run: RunDir) -> Iterator[Section]:
    reader = whole.opened(pd.read_csv)
    tables = [
        Table(whole.read(path, reader, "CSV file", RunDirError), path.stem)
        for path in sorted(run.folder.glob("*.csv"))
    ]
    yield Section("What was measured", tables=tables, pictures=_pictures(run))


def _pictures(run: RunDir) -> list[Picture]:
    paths = [*sorted(run.folder.glob("*.png")), *sorted((run.folder / FIGURES).glob("*.png"))]
    return [Picture(path, path.stem.replace("_", " ")) for path in paths]


def _made_with(run: RunDir) -> Section:
    """The command that reruns it: settings, data, versions."""
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
        several = ", ".join(map(_said, value)) if isinstance(value, list) else value
        yield f"{key}: {name}".rstrip(": "), "–" if several in (None, {}, "") else str(several)


def _said(value: Any) -> str:
    """One of several settings: `kfac`, and `a: kfac lr=0.1` where an entry says more."""
    if not isinstance(value, dict) or "name" not in value:
        return str(value)
    options = [f"{option}={chosen}" for option, chosen in value.get("options", {}).items()]
    name, label = value["name"], value.get("label", value["name"])
    return " ".join([*([f"{label}:"] if label != name else []), name, *options])


def _side_by_side(runs: Sequence[RunDir]) -> Section | None:
    """The leading errors of several comparisons in one table, one column per run."""
    columns = {}
    for run in runs:
        frame = run.table("comparison")
        if frame is not None and len(frame):
            summary = Comparison(frame).summary()
            for name in ("relative_error", "population_error", "direction_cosine"):
                for column in (name, f"{name} known"):
                    if column in summary:
                        columns[f"{column}: {run.folder.name}"] = summary[column]
    if not columns:
        return None
    frame = pd.DataFrame(columns).rename_axis("approximation").reset_index()
    text = ["The median over layers at the last step of each run."]
    return Section("Errors of every run", text, [Table(frame)])
