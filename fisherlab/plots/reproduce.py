"""A table or a figure of a paper drawn as the paper draws it, with ours and the paper's numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from fisherlab.plots import theme

LABELS = {
    "epoch": "epoch",
    "step": "step",
    "train_seconds": "seconds in steps",
    "train_loss": "training loss",
    "test_loss": "test loss",
    "accuracy": "test accuracy",
    "perplexity": "test perplexity",
    "bleu": "test BLEU",
    "seconds_per_step": "seconds per step",
    "seconds_per_epoch": "seconds per epoch",
    "seconds_to_target": "seconds to the target",
    "ratio_to_sgd": "seconds per step, SGD = 1",
    "log_train_loss": "ln of the training loss",
}
LOGARITHMIC = ("train_loss", "test_loss", "perplexity", "seconds_per_step")
THEIRS = "D"


@theme.themed
def reproduced(
    title: str,
    table: pd.DataFrame,
    rows: Mapping[str, pd.DataFrame],
    panels: Sequence[tuple[str, str]],
    quantity: str,
    stand_ins: Mapping[str, str] | None = None,
) -> Figure:
    """Curves (`panels` are pairs of columns) cell by cell, or points of `quantity` without panels.

    A line is the mean over seeds, its band their range; a hollow diamond is the paper's number. A
    panel whose x is "cell" has the cells along its axis.

    Args:
        title: the picture's title.
        table: one row per cell and arm, with the paper's number.
        rows: the measured rows by cell.
        panels: pairs of columns (x, y); none: points of `quantity`.
        quantity: the column of the points.
        stand_ins: what stands in for the paper's setting, by cell.

    Returns:
        The figure.
    """
    arms = list(dict.fromkeys(table["arm"]))
    across = [panel for panel in panels if panel[0] == "cell"]
    curves = [(cell, panel) for panel in panels if panel[0] != "cell" for cell in rows]
    marked = (stand_ins or {}).get
    if across:
        figure, axes = theme.panels(len(across), columns=2, height=2.6)
        for ax, (_, column) in zip(axes, across, strict=True):
            _along(ax, table, list(rows), column, arms)
    elif curves:
        columns = len(rows) if len(rows) in (1, 3) else 2
        figure, axes = theme.panels(len(curves), columns=columns, height=2.1)
        for ax, (cell, (x, y)) in zip(axes, curves, strict=True):
            _curve(ax, rows[cell], x, y, arms)
            _theirs(ax, table[table["cell"] == cell], x, y, quantity, rows[cell])
            ax.set_title(cell + ("*" if marked(cell) else ""))
    else:
        cells = list(rows)
        height = 0.7 + 0.22 * len(arms)
        figure, axes = theme.panels(len(cells), columns=3, height=height, sharey=True)
        for ax, cell in zip(axes, cells, strict=True):
            _points(ax, table[table["cell"] == cell], arms, quantity)
            ax.set_title(cell + ("*" if marked(cell) else ""))
    ended = table.groupby("arm")["ours"].count()
    gone = {arm: " (no result)" for arm in arms if not ended[arm]}
    _legend(figure, arms, gone, bool(table["paper"].notna().any()), bool(curves or across))
    theme.title(figure, title + (" (* a stand-in)" if any((stand_ins or {}).values()) else ""))
    return figure


def _curve(ax: Axes, frame: pd.DataFrame, x: str, y: str, arms: Sequence[str]) -> None:
    looks, ends = theme.looks(arms), {}
    for arm in arms:
        mine = frame[(frame["optimizer"] == arm)]
        mine = mine.dropna(subset=[y]).fillna({"train_seconds": 0.0})
        if mine.empty:
            continue
        grouped = mine.groupby("epoch")
        places, values = grouped[x].mean(), grouped[y]
        every = max(1, len(places) // 5)
        ax.plot(
            places,
            values.mean(),
            **looks[arm].curve,
            markevery=every,
            ms=3,
            lw=1.1,
        )
        ends[arm] = places.iloc[-1], values.mean().iloc[-1]
        ax.fill_between(places, values.min(), values.max(), color=looks[arm].colour, alpha=0.12)
    if y in LOGARITHMIC:
        ax.set_yscale("log")
    if x == "epoch":
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ax.set_xlabel(LABELS.get(x, x))
    ax.set_ylabel(LABELS.get(y, y))
    if x in ("epoch", "step"):  # where all end together
        theme.end_labels(ax, ends, looks)


def _theirs(
    ax: Axes, table: pd.DataFrame, x: str, y: str, quantity: str, frame: pd.DataFrame
) -> None:
    """The paper's last values at the right edge, where the panel shows that quantity."""
    if y != quantity or x != "epoch":
        return
    looks = theme.looks(list(table["arm"]))
    factor = 0.01 if quantity == "accuracy" else 1.0
    for row in table.dropna(subset=["paper"]).itertuples():
        edge = frame["epoch"].max()
        colour = looks[row.arm].colour
        ax.plot([edge], [factor * row.paper], THEIRS, mfc="none", color=colour, clip_on=False)


def _points(ax: Axes, table: pd.DataFrame, arms: Sequence[str], quantity: str) -> None:
    looks = theme.looks(arms)
    places = {arm: len(arms) - 1 - k for k, arm in enumerate(arms)}
    for row in table.itertuples():
        look = looks[row.arm]
        sd = row.ours_sd if row.ours_sd == row.ours_sd else None
        ax.errorbar(row.ours, places[row.arm], xerr=sd, fmt=look.marker, color=look.colour)
        if row.paper == row.paper:
            error = row.paper_sd if row.paper_sd == row.paper_sd else None
            ax.errorbar(
                row.paper,
                places[row.arm] - 0.25,
                xerr=error,
                fmt=THEIRS,
                mfc="none",
                color=look.colour,
            )
    ax.set_yticks(list(places.values()), list(places))
    ax.set_ylim(-0.6, len(arms) - 0.4)
    ax.set_xlabel(LABELS.get(quantity, quantity) + (", %" if quantity == "accuracy" else ""))


def _along(
    ax: Axes, table: pd.DataFrame, cells: Sequence[str], column: str, arms: Sequence[str]
) -> None:
    """One line per arm over the cells."""
    looks = theme.looks(arms)
    for arm in arms:
        mine = table[table["arm"] == arm].set_index("cell")["ours"].reindex(cells)
        ax.plot(range(len(cells)), mine, **looks[arm].curve)
    if column in LOGARITHMIC:
        ax.set_yscale("log")
    ax.set_xticks(range(len(cells)), [cell.rpartition("-")[2] for cell in cells])
    ax.set_xlabel(cells[0].rpartition("-")[0].replace("_", " ") if cells else "")
    ax.set_ylabel(LABELS.get(column, column))


def _legend(
    figure: Figure, arms: Sequence[str], gone: Mapping[str, str], theirs: bool, lines: bool
) -> None:
    looks = theme.looks(arms)
    handles = []
    for arm in arms:
        options = looks[arm].curve if lines else {**looks[arm].line, "ls": ""}
        handles.append(Line2D([], [], **options, label=arm + gone.get(arm, "")))
    if theirs:
        handles.append(Line2D([], [], marker=THEIRS, mfc="none", color="0.3", ls="", label="paper"))
    figure.legend(handles=handles, loc="outside right upper", frameon=False, handlelength=2.6)


@theme.themed
def drawn_schedules(curves: Mapping[str, Sequence[float]], title: str) -> Figure:
    """Schedules over a run from 0 to 1, one line each.

    Args:
        curves: values over a run from 0 to 1, by name.
        title: the picture's title.

    Returns:
        The figure.
    """
    figure, (ax,) = theme.panels(1, columns=1, width=theme.COLUMN + 1.2, height=2.2)
    looks = theme.looks(list(curves))
    for name, values in curves.items():
        places = [k / (len(values) - 1) for k in range(len(values))]
        ax.plot(places, values, **looks[name].curve, markevery=10)
    ax.set_xlabel("share of the run")
    ax.set_ylabel("λ (1: SGD's direction)")
    theme.legend(figure, list(curves))
    theme.title(figure, title)
    return figure


PARTS = {"forward": theme.BLUE, "backward": theme.ORANGE, "step": "#999999"}


@theme.themed
def time_split(table: pd.DataFrame, title: str) -> Figure:
    """A bar per method, stacked of the parts of a step; a panel per network.

    Args:
        table: one row per network (`cell`) and method (`arm`), the parts of a step in seconds.
        title: the picture's title.

    Returns:
        The figure.
    """
    cells = list(dict.fromkeys(table["cell"]))
    figure, axes = theme.panels(len(cells), columns=2, height=2.2)
    for ax, cell in zip(axes, cells, strict=True):
        mine = table[table["cell"] == cell].reset_index(drop=True)
        below = 0.0 * mine["forward"]
        for part, colour in PARTS.items():
            ax.bar(mine["arm"], mine[part], bottom=below, color=colour, width=0.6)
            below = below + mine[part]
        ax.set_title(cell)
        ax.set_ylabel("seconds per step")
        ax.grid(False, axis="x")
    handles = [Line2D([], [], color=c, lw=6, label=part) for part, c in PARTS.items()]
    figure.legend(handles=handles, loc="outside right upper", frameon=False)
    theme.title(figure, title)
    return figure
