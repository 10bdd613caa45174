"""Pictures of a comparison: error and trace per layer, direction over damping, training, cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fisherlab.plots import theme

LABELS = {
    "relative_error": r"relative error $\|X - F\| \,/\, \|F\|$",
    "population_error": "error against unseen examples",
    "trace_ratio": r"trace ratio $\mathrm{tr}\,X \,/\, \mathrm{tr}\,F$",
    "cosine": r"cosine $\langle X, F\rangle \,/\, \|X\|\|F\|$",
    "direction_cosine": "cosine of the damped step\nwith the exact one",
    "damping_relative": r"damping $\lambda$ in units of $\mathrm{tr}\,F / N$",
    "layer": "layer",
    "step": "training step",
    "seconds": "seconds to build, decompose and solve, each method alone",
    "diagonalisation": "share of $F$ on the diagonal",
    "subspace_overlap": "overlap of leading eigenspaces",
}
ZERO = 1e-9  # below it an error is rounding, which a log axis would blow up


@theme.themed
def error(table: Any, column: str | None = None) -> Figure:
    """The error of every approximation over the layers, one panel per training step measured."""
    column = column or leading(table)
    frame = once(theme.frame_of(table))
    frame = frame[frame[column] > ZERO]
    figure = _over_layers(frame, column, "log")
    block = "block of unseen examples" if column == "population_error" else "exact Fisher block"
    theme.title(figure, f"How far each approximation is from the {block}, by layer")
    return figure


@theme.themed
def trace_ratio(table: Any) -> Figure:
    """The trace of every approximation over that of the exact block; 1 keeps the trace."""
    frame = once(theme.frame_of(table))
    frame = frame[(frame["trace_ratio"] > ZERO) & (frame["approximation"] != "exact")]
    figure = _over_layers(frame, "trace_ratio", "log")
    for ax in figure.axes:
        ax.axhline(1.0, **theme.GUIDE)
    theme.title(figure, "How much of the exact block's trace each approximation keeps")
    return figure


@theme.themed
def direction(table: Any, layers: Sequence[str] | None = None) -> Figure:
    """Cosine between the damped natural gradients over the damping; one panel per layer."""
    frame = theme.frame_of(table)
    frame = frame[(frame["step"] == frame["step"].max()) & (frame["approximation"] != "exact")]
    figure = _per_layer(frame, "damping_relative", "direction_cosine", layers)
    for ax in figure.axes:
        ax.set_xscale("log")
        ax.axhline(1.0, **theme.GUIDE)
    theme.title(figure, "Whether the damped step points where the exact one does")
    return figure


@theme.themed
def training(table: Any, column: str | None = None, layers: Sequence[str] | None = None) -> Figure:
    """The error over the training step; one panel per layer."""
    column = column or leading(table)
    frame = once(theme.frame_of(table))
    figure = _per_layer(frame[frame[column] > ZERO], "step", column, layers)
    for ax in figure.axes:
        ax.set_yscale("log")
    theme.title(figure, "How the error moves while the network is trained")
    return figure


@theme.themed
def cost(table: Any, column: str | None = None) -> Figure:
    """Error against the time to build the block and solve with it; one point per layer."""
    column = column or leading(table)
    frame = once(theme.frame_of(table))
    frame = frame[(frame["step"] == frame["step"].max()) & (frame[column] > ZERO)]
    spent = frame.reindex(columns=["build_seconds", "decompose_seconds", "solve_seconds"])
    frame = frame.assign(seconds=spent.sum(axis=1, min_count=1))
    names = ranked(frame, column)
    figure, (ax,) = theme.panels(1, height=3.0)
    look = theme.styles(names)
    del look["dashes"]
    sns.scatterplot(
        frame, x="seconds", y=column, hue="approximation", style="approximation",
        ax=ax, legend=False, s=28, alpha=0.85, linewidth=0.3, **look,
    )  # fmt: skip
    ax.set(xscale="log", yscale="log", xlabel=LABELS["seconds"], ylabel=label(column))
    theme.legend(figure, names, lines=False)
    theme.title(figure, "What an approximation costs and how near it comes (one point per layer)")
    return figure


def leading(table: Any) -> str:
    """The error that deserves to be read first, as the comparison says; in a frame, in sample."""
    return getattr(table, "leading", "relative_error")


def label(column: str) -> str:
    """What an axis of this column says."""
    return LABELS.get(column, column.replace("_", " "))


def once(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per layer, approximation, seed and step: the first damping's."""
    return frame.drop_duplicates(["layer", "approximation", "seed", "step"])


def ranked(frame: pd.DataFrame, column: str) -> list[str]:
    """The approximations that have a value, the smallest median first."""
    return frame.groupby("approximation")[column].median().dropna().sort_values().index.tolist()


def _over_layers(frame: pd.DataFrame, column: str, scale: str) -> Figure:
    steps = sorted(frame["step"].unique())
    names = ranked(frame, column)
    columns = 3 if frame["layer"].nunique() <= 8 else 1
    height = 2.9 + theme.room(frame["layer"].unique())
    figure, axes = theme.panels(len(steps) or 1, columns=columns, height=height, sharey=True)
    for ax, step in zip(axes, steps, strict=False):
        _lines(frame[frame["step"] == step], "layer", column, names, ax)
        ax.set(yscale=scale, title=f"step {step}", xlabel="layer", ylabel=label(column))
        ax.label_outer()
        layers = frame["layer"].unique()
        ax.set_xticks(range(len(layers)), layers, rotation=theme.rotation(layers))
    theme.legend(figure, names)
    return figure


def _per_layer(frame: pd.DataFrame, x: str, column: str, layers: Sequence[str] | None) -> Figure:
    layers = list(layers or frame["layer"].unique())
    names = ranked(frame, column)[:: -1 if column == "direction_cosine" else 1]  # the best first
    figure, axes = theme.panels(len(layers) or 1, columns=4, height=1.9, sharex=True, sharey=True)
    for ax, layer in zip(axes, layers, strict=False):
        _lines(frame[frame["layer"] == layer], x, column, names, ax)
        ax.set(title=f"layer {layer}", xlabel="", ylabel="")
    figure.supxlabel(label(x), fontsize=8)
    figure.supylabel(label(column), fontsize=8, ha="left", multialignment="center")
    theme.legend(figure, names)
    return figure


def _lines(frame: pd.DataFrame, x: str, column: str, names: list[str], ax: Axes) -> None:
    """Lines with markers over `x`; several seeds are a mean and a band of their range."""
    sns.lineplot(
        frame, x=x, y=column, hue="approximation", style="approximation", sort=x != "layer",
        errorbar=("pi", 100) if frame["seed"].nunique() > 1 else None,
        err_kws={"alpha": 0.15, "linewidth": 0}, ax=ax, legend=False, markeredgewidth=0.3,
        alpha=0.9, **theme.styles(names),
    )  # fmt: skip
