"""Errors over everything: facets, the cost-error plane, batch size, causes, age."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fisherlab.metrics import ErrorSplit
from fisherlab.plots import comparison, theme
from fisherlab.plots.theme import BLUE

UNITS = {
    "examples": "batch size [examples]",
    "depth": "depth [hidden layers]",
    "width": "width [units]",
    "fisher_type": "Fisher type",
    "build_seconds": "time to build the block alone [s]",
    "decompose_seconds": "time to decompose the block alone [s]",
    "memory_bytes": "memory of the block as kept [bytes]",
    "formed_bytes": "memory of the block, matrices formed [bytes]",
    "seconds": "time in steps [s]",
    "evidence": "log evidence [nats]",
    "rank": "rank correlation",
    "precision": r"prior precision $\tau$",
    "smooth": "training loss, mean of 10 batches [nats]",
    "loss": "training loss [nats]",
}


def label(column: str) -> str:
    """The axis label of this column, with its unit."""
    return UNITS.get(column, comparison.label(column))


@theme.themed
def error_facets(
    table: Any, over: str = "layer", measure: str = "relative_error", facet: str | None = None
) -> Figure:
    """A measure over layer, depth, width, batch size, Fisher type or step; a line per method.

    A line is the median over what is left (layers, seeds), its band the middle half. `facet` names
    a column that gives one panel per value. A median of fewer numbers than rows has both beside it.
    An error above 2 is out of the panel, the largest in the legend.

    Args:
        table: a `Comparison`, or its frame.
        over: the column of the horizontal axis.
        measure: the column to draw.
        facet: a column with one panel per value; None: one panel.

    Returns:
        The figure.
    """
    frame = theme.frame_of(table)
    groups = [("", frame)] if facet is None else list(frame.groupby(facet, sort=False))
    names = comparison.ranked(frame, measure)
    numeric = pd.api.types.is_numeric_dtype(frame[over])
    across = 3 if numeric or frame[over].nunique() <= 8 else 1
    height = 2.3 + (0 if numeric else theme.room(map(str, frame[over].unique())))
    figure, axes = theme.panels(len(groups), columns=across, height=height, sharey=True)
    drawn = frame[measure].dropna()
    above = measure in comparison.ERRORS and len(drawn) > 0 and drawn.max() > comparison.TOP
    for ax, (value, part) in zip(axes, groups, strict=True):
        sns.lineplot(
            part, x=over, y=measure, hue="approximation", style="approximation", legend=False,
            sort=numeric, estimator="median", errorbar=("pi", 50), markeredgewidth=0.3,
            err_kws={"alpha": 0.12, "linewidth": 0}, ax=ax, **theme.styles(names),
        )  # fmt: skip
        _count(ax, part, over, measure)
        ax.set(xlabel=label(over), ylabel=label(measure))
        ax.label_outer()
        _ticks(ax, part[over], numeric)
        if above:  # an error of 1 is that of no block at all
            ax.set_ylim(-0.03 * comparison.TOP, comparison.TOP)
        if facet is not None:
            ax.set_title(f"{facet.replace('_', ' ')} {value}")
        elif numeric:
            _ends(ax, part, over, measure)
    most = frame.groupby("approximation")[measure].max()
    theme.legend(
        figure,
        names,
        labels={n: f"{n} (to {m:.3g})" for n, m in most.items() if above and m > comparison.TOP},
    )
    named = label(measure).replace("\n", " ")
    theme.title(figure, f"{named[0].upper()}{named[1:]}, over {over.replace('_', ' ')}")
    return figure


@theme.themed
def lines(
    frame: pd.DataFrame, x: str, y: str, by: str = "approximation", log: str = "", title: str = ""
) -> Figure:
    """Any column over any other, one line per method in its own look; `log` names the log axes.

    Args:
        frame: one row per point.
        x: the column of the horizontal axis.
        y: the column of the vertical axis.
        by: the column with one line per value.
        log: the log axes: "", "x", "y" or "xy".
        title: the picture's title.

    Returns:
        The figure.
    """
    figure, (ax,) = theme.panels(1, height=2.8)
    names = list(dict.fromkeys(frame[by]))
    for name, look in theme.looks(names).items():
        rows = frame[frame[by] == name].sort_values(x)
        ax.plot(rows[x], rows[y], **look.curve, markevery=0.1)
    ax.set(xlabel=label(x), ylabel=label(y))
    theme.logarithmic(ax, log)
    _ends(ax, frame, x, y, by)
    theme.legend(figure, names, by)
    subject = title or f"{label(y)} over {label(x)}".replace("\n", " ")
    theme.title(figure, subject[0].upper() + subject[1:])
    return figure


def _ends(ax: Axes, frame: pd.DataFrame, x: str, y: str, by: str = "approximation") -> None:
    """The name of each line at its end, the median of its last place."""
    medians = frame.groupby([by, x])[y].median().dropna().reset_index()
    last = medians.sort_values(x).groupby(by).last()
    theme.end_labels(ax, {str(n): (row[x], row[y]) for n, row in last.iterrows()})


def _count(ax: Axes, frame: pd.DataFrame, over: str, measure: str) -> None:
    """Beside each median that some rows have no number for: how many have one, of how many."""
    for (name, place), values in frame.groupby(["approximation", over], sort=False)[measure]:
        if 0 < values.count() < len(values):
            ax.annotate(
                f"{values.count()}/{len(values)}", (place, values.median()), xytext=(3, 2),
                textcoords="offset points", fontsize=6, color=theme.colour(str(name)),
            )  # fmt: skip


def _ticks(ax: Axes, values: pd.Series, numeric: bool) -> None:
    """Powers of something as they are on a log axis; names that do not touch."""
    kinds = list(dict.fromkeys(values))
    if not numeric:
        ax.tick_params(axis="x", rotation=theme.rotation(map(str, kinds)))
    elif min(kinds) > 0 and max(kinds) >= 8 * min(kinds):
        ax.set_xscale("log")
        if len(kinds) <= 7:
            ax.set_xticks(sorted(kinds), [f"{kind:g}" for kind in sorted(kinds)])
            ax.minorticks_off()
    elif len(kinds) <= 7 and np.diff(sorted(kinds)).min(initial=1) > 0.12 * np.ptp(kinds):
        ax.set_xticks(sorted(kinds))


@theme.themed
def pareto(
    points: pd.DataFrame,
    front: Sequence[int],
    cost: str = "build_seconds",
    measure: str = "relative_error",
) -> Figure:
    """Cost against error, one point per approximation; a line joins the undominated points.

    Args:
        points: one row per approximation.
        front: indices of rows, from `metrics.pareto_front`.
        cost: the column of the cost.
        measure: the column of the error.

    Returns:
        The figure.
    """
    figure, (ax,) = theme.panels(1, height=3.2)
    best = points.iloc[list(front)]
    ax.step(best[cost], best[measure], where="post", color="0.55", lw=1, zorder=1)
    looks = theme.looks(points["approximation"])
    for index, row in points.reset_index(drop=True).iterrows():
        on = index in front
        ax.scatter(
            row[cost], row[measure], 42 if on else 24, **looks[row["approximation"]].line,
            edgecolor="black", lw=0.9 if on else 0, zorder=3 if on else 2,
        )  # fmt: skip
    if (points[cost] > 0).all():
        ax.set_xscale("log")
    ax.set(xlabel=label(cost), ylabel=label(measure))
    theme.legend(figure, points["approximation"], lines=False)
    theme.title(figure, "Cost against error (outlined: nothing is cheaper and better)")
    return figure


@theme.themed
def in_sample_against_population(table: Any) -> Figure:
    """Both errors over batch size: full lines in sample, dashed on examples not seen.

    A median of fewer numbers than layers has both beside it, such as 2/3.

    Args:
        table: a `Comparison`, or its frame.

    Returns:
        The figure.
    """
    frame = theme.frame_of(table)
    key = ("layer", "approximation", "seed", "step", "examples")
    frame = frame.drop_duplicates([column for column in key if column in frame])
    ranks = (comparison.ranked(frame, c) for c in ("population_error", "relative_error"))
    names = list(dict.fromkeys(name for rank in ranks for name in rank))
    figure, (ax,) = theme.panels(1, height=3.0)
    medians = frame.groupby(["approximation", "examples"]).median(numeric_only=True)
    for name, look in theme.looks(names).items():
        rows = medians.loc[name]
        for column, dash in (("relative_error", "-"), ("population_error", "--")):
            ax.plot(rows.index, rows[column], ls=dash, **look.line)
    for column in ("relative_error", "population_error"):
        _count(ax, frame, "examples", column)
    _ticks(ax, frame["examples"], numeric=True)
    ax.set(xlabel=label("examples"), ylabel=r"$\|X - F\| \,/\, \|F\|$, median over layers")
    _ends(ax, frame, "examples", "population_error")
    theme.legend(figure, names)
    kinds = [("in sample", "-"), ("on unseen examples", "--")]
    handles = [Line2D([], [], color="black", ls=dash, label=kind) for kind, dash in kinds]
    figure.legend(handles=handles, loc="outside right lower", frameon=False)
    theme.title(figure, "How much a small batch flatters: error in sample and on unseen examples")
    return figure


@theme.themed
def why_bad(splits: Mapping[str, ErrorSplit]) -> Figure:
    """KFAC's squared error by layer: dependence of a and g, positions, batch noise.

    Args:
        splits: splits by layer, from `metrics.kfac_error_split`.

    Returns:
        The figure.
    """
    figure, (ax,) = theme.panels(1, height=2.8)
    places = np.arange(len(splits))
    above, below = np.zeros(len(splits)), np.zeros(len(splits))
    for part, text, colour, hatch in (
        ("dependence", "dependence\nof $a$ and $g$", BLUE, ""),
        ("positions", "correlation\nof positions", "#E69F00", "///"),
        ("noise", "batch noise", "#BBBBBB", "..."),
    ):
        values = np.array([float(getattr(split, part)) for split in splits.values()])
        bottom = np.where(values >= 0, above, below)
        ax.bar(
            places, values, 0.7, bottom, color=colour, hatch=hatch, edgecolor="white", label=text
        )
        above, below = above + values.clip(min=0), below + values.clip(max=0)
    total = [float(split.total) for split in splits.values()]
    ax.plot(places, total, ls="", marker="_", ms=12, mew=1.6, color="black", label="total")
    ax.axhline(0, color="black", lw=0.6)
    names = list(splits)
    many = len(names) > 8 or max(map(len, names)) > 6
    ax.set_xticks(places, names, rotation=90 if many else 0)
    ax.grid(False, axis="x")
    ax.set(xlabel="layer", ylabel=r"$\|F - G \otimes A\|^2 \,/\, \|F\|^2$")
    figure.legend(loc="outside right upper", frameon=False)
    theme.title(figure, "Why KFAC misses each layer's block")
    return figure


@theme.themed
def staleness(frame: pd.DataFrame) -> Figure:
    """Error of a preconditioner's block over the steps since it was made.

    `frame` has columns age, approximation, layer and relative_error.

    Args:
        frame: the columns age, approximation, layer and relative_error.

    Returns:
        The figure.
    """
    names = comparison.ranked(frame, "relative_error")
    figure, (ax,) = theme.panels(1, height=2.8)
    sns.lineplot(
        frame, x="age", y="relative_error", hue="approximation", style="approximation",
        estimator="median", errorbar=("pi", 50), err_kws={"alpha": 0.12, "linewidth": 0},
        legend=False, ax=ax, **theme.styles(names),
    )  # fmt: skip
    ax.set(xlabel="age of the block [training steps]", ylabel=label("relative_error"))
    _ends(ax, frame, "age", "relative_error")
    theme.legend(figure, names)
    theme.title(figure, "How a preconditioner ages (line: median over layers, band: half of them)")
    return figure
