"""Pictures of training: loss and metric against steps and against time, what a step buys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from fisherlab.plots import theme

LABELS = {
    "step": "steps",
    "train_seconds": "seconds in steps",
    "train_loss": "training loss",
    "test_loss": "test loss",
    "accuracy": "test accuracy",
    "rmse": "test RMSE",
    "perplexity": "test perplexity",
    "bleu": "test BLEU",
    "ratio_to_sgd": "seconds per step, SGD = 1",
}
LOGARITHMIC = ("train_loss", "test_loss", "perplexity", "rmse")
COUNTS = ("accuracy", "bleu")  # the other metrics are functions of the test loss
AT_MOST = 9  # curves in colour; more cannot be told apart
OTHERS = "#b5b5b5"  # darker than the grid


@theme.themed
def training_curves(
    rows: pd.DataFrame, curve: pd.DataFrame, metric: str, best: Sequence[str] = ()
) -> Figure:
    """Training loss, a metric and the test loss against steps (left) and against time (right).

    A line is the mean over seeds, its band their range. The first of `best` (of all, in the order
    of `rows`, if not given) and SGD have their own colours, the rest are grey. A run of one point
    is its marker; a loss measured once, before anything differs, has no panels.

    Args:
        rows: one row per optimizer, seed and measured step, with the metric and the test loss.
        curve: the training loss, one row per optimizer, seed and measured step.
        metric: the column of the metric.
        best: optimizers in their own colours; none: all, in the order of `rows`.

    Returns:
        The figure.
    """
    present = list(dict.fromkeys([*best, *rows["optimizer"]]))
    names = present[:AT_MOST]
    names += [name for name in present[AT_MOST:] if name == "sgd"]  # the reference of all
    measured = [(curve, "train_loss"), (rows, metric)]
    if metric in COUNTS and "test_loss" in rows:
        measured.append((rows, "test_loss"))
    if curve["step"].nunique() < 2:  # the loss before the first step, which is one for all
        measured = measured[1:]
    figure, axes = theme.panels(2 * len(measured), columns=2, height=2.2)
    for row, (table, column) in enumerate(measured):
        for ax, x in zip(axes[2 * row : 2 * row + 2], ("step", "train_seconds"), strict=True):
            _lines(ax, table, x, column, names)
    theme.legend(figure, names, "optimizer")
    others = len(present) - len(names)
    theme.title(
        figure,
        "Training against steps and against time" + (f"; {others} more in grey" if others else ""),
    )
    return figure


def _lines(ax: Axes, table: pd.DataFrame, x: str, column: str, names: Sequence[str]) -> None:
    table = table.dropna(subset=[column]).fillna({"train_seconds": 0.0})
    if x == "train_seconds":
        ends = table.groupby("optimizer")[x].max()
        if ends.max() > 10 * ends.min():  # on a linear axis the fast ones would be one line
            ax.set_xscale("log")
            table = table[table[x] > 0]
    looks, ends = theme.looks(names), {}
    for name, mine in table.groupby("optimizer", sort=False):
        # seeds take the same steps, and not quite the same time; a line of one point is nothing
        grouped = mine.groupby("step")
        places, values = grouped[x].mean(), grouped[column]
        known = name in names
        grey = {"color": OTHERS, "marker": "." if len(places) == 1 else None}
        ax.plot(
            places,
            values.mean(),
            **(looks[name].curve if known else grey),
            markevery=max(1, len(places) // 6),
            lw=1.2 if known else 0.7,
            zorder=3 if known else 1,
        )
        if known:
            ends[name] = places.iloc[-1], values.mean().iloc[-1]
        if known and mine["seed"].nunique() > 1:
            colour = looks[name].colour
            ax.fill_between(places, values.min(), values.max(), color=colour, alpha=0.15, lw=0)
    if column in LOGARITHMIC:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())
    _leave_out_explosions(ax, table[column])
    if x == "step":
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ax.set_xlabel(LABELS[x])
    ax.set_ylabel(LABELS.get(column, column))
    if x == "step":  # where all end together
        theme.end_labels(ax, ends, looks)


def _leave_out_explosions(ax: Axes, values: pd.Series) -> None:
    """No axis for the sake of a run that diverges: at most 3 times what most start from."""
    if len(values) and values.max() > 3 * (bound := values.quantile(0.9)) > 0:
        ax.set_ylim(top=3 * bound)


@theme.themed
def training_cost(summary: pd.DataFrame, metric: str) -> Figure:
    """The final result of each optimizer, next to the cost of a step; the best on top.

    Without the second where no optimizer took enough steps to be timed.

    Args:
        summary: one row per optimizer, with its final metric and the ratio of its step to SGD's.
        metric: the name of the metric.

    Returns:
        The figure.
    """
    known = summary.dropna(subset=["final"])
    places = range(len(known) - 1, -1, -1)
    timed = bool(known["ratio_to_sgd"].notna().any())
    figure, (reached, *paid) = theme.panels(
        1 + timed, columns=2, height=0.8 + 0.16 * len(known), sharey=True
    )
    looks = theme.looks(known["optimizer"])
    for place, row in zip(places, known.itertuples(), strict=True):
        look: dict[str, Any] = {**looks[row.optimizer].line, "ls": ""}
        reached.errorbar(row.final, place, xerr=row.final_sd, elinewidth=0.8, **look)
        for ax in paid:
            ax.plot([row.ratio_to_sgd], [place], **look)
    reached.set_yticks(list(places), list(known["optimizer"]))
    reached.set_ylim(-0.6, len(known) - 0.4)
    reached.set_xlabel(f"{LABELS.get(metric, metric)} at the end")
    if metric in LOGARITHMIC:
        reached.set_xscale("log")
    for ax in paid:
        ax.set_xscale("log")
        ax.axvline(1.0, **theme.GUIDE)
        ax.set_xlabel(LABELS["ratio_to_sgd"])
    cost = ", and what its steps cost" if timed else "; too few steps to time"
    theme.title(figure, f"What an optimizer reaches{cost}")
    return figure
