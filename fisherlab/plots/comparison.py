"""Pictures of a comparison: error and trace per layer, direction over damping, training, cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fisherlab.plots import theme
from fisherlab.plots.matrices import heat, name_axis, write_values

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
MANY = 8  # layers beyond which lines cross too often to be read
TOP = 2.0  # an error of 1 is that of no block at all
EQUAL = 1e-6  # relative, of two methods that are one here
ERRORS = ("relative_error", "population_error")
ZERO = 1e-9  # below it an error is rounding, which a log axis would blow up


@theme.themed
def error(
    table: Any,
    column: str | None = None,
    *,
    layers: Sequence[str] | None = None,
    labels: Mapping[str, str] | None = None,
    palette: Mapping[str, str] | None = None,
    size: tuple[float, float] | None = None,
    ax: Axes | None = None,
) -> Figure:
    """The error of every approximation over the layers, one panel per training step measured.

    Beyond eight layers the panels are heat maps, layer x method. Methods with equal errors are one
    line, "kfac = kfac_reduce". An error above 2 is an arrow at the edge, its value in the legend.

    Args:
        table: A `Comparison`, or its frame.
        column: The error; default: the one that the table leads with.
        layers: The layers to draw, in this order; default: all.
        labels: Shown names of methods, `{"kfac": "K-FAC"}`; they keep their looks.
        palette: Colours of methods, by name.
        size: Width and height of the figure in inches.
        ax: Axes of your own to draw the last step into.

    Returns:
        The figure; if `ax` is given, the figure of `ax`.

    Raises:
        ValueError: `layers` names a layer that the table does not have.
    """
    column = column or leading(table)
    frame = _of_layers(once(theme.frame_of(table)), layers)
    frame = frame[frame[column] > ZERO]
    block = "block of unseen examples" if column == "population_error" else "exact Fisher block"
    subject = f"How far each approximation is from the {block}, by layer"
    if ax is None and frame["layer"].nunique() > MANY:
        return _heat_maps(_merged(frame, column, labels)[0], column, subject, known(table), size)
    figure = _over_layers(frame, column, known(table), labels, palette, size, ax)
    if ax is None:
        theme.title(figure, subject)
    return figure


@theme.themed
def trace_ratio(table: Any) -> Figure:
    """The trace of every approximation over that of the exact block; 1 keeps the trace.

    Args:
        table: a `Comparison`, or its frame.

    Returns:
        The figure.
    """
    frame = once(theme.frame_of(table))
    frame = frame[(frame["trace_ratio"] > ZERO) & (frame["approximation"] != "exact")]
    figure = _over_layers(frame, "trace_ratio", known(table))
    for ax in figure.axes:
        ax.axhline(1.0, **theme.GUIDE)
    theme.title(figure, "How much of the exact block's trace each approximation keeps")
    return figure


@theme.themed
def direction(table: Any, layers: Sequence[str] | None = None) -> Figure:
    """Cosine between the damped natural gradients over the damping; one panel per layer.

    Args:
        table: a `Comparison`, or its frame.
        layers: the layers to draw, in this order; None: all.

    Returns:
        The figure.
    """
    frame = theme.frame_of(table)
    frame = frame[(frame["step"] == frame["step"].max()) & (frame["approximation"] != "exact")]
    figure = _per_layer(frame, "damping_relative", "direction_cosine", layers, known(table))
    for ax in figure.axes:
        ax.set_xscale("log")
        ax.axhline(1.0, **theme.GUIDE)
    theme.title(figure, "Whether the damped step points where the exact one does")
    return figure


@theme.themed
def training(table: Any, column: str | None = None, layers: Sequence[str] | None = None) -> Figure:
    """The error over the training step; one panel per layer.

    Args:
        table: a `Comparison`, or its frame.
        column: the error; None: the one that the table leads with.
        layers: the layers to draw, in this order; None: all.

    Returns:
        The figure.
    """
    column = column or leading(table)
    frame = once(theme.frame_of(table))
    figure = _per_layer(frame[frame[column] > ZERO], "step", column, layers, known(table))
    for ax in figure.axes:
        ax.set_yscale("log")
    theme.title(figure, "How the error moves while the network is trained")
    return figure


@theme.themed
def cost(table: Any, column: str | None = None) -> Figure:
    """Error against the time to build the block and solve with it; one point per layer.

    Args:
        table: a `Comparison`, or its frame.
        column: the error; None: the one that the table leads with.

    Returns:
        The figure.
    """
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
    theme.title(figure, "Cost of an approximation, and its error (one point per layer)")
    return figure


def leading(table: Any) -> str:
    """The error that deserves to be read first, as the comparison says; in a frame, in sample."""
    return getattr(table, "leading", "relative_error")


def label(column: str) -> str:
    """The axis label of this column."""
    return LABELS.get(column, column.replace("_", " "))


def once(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per layer, approximation, seed and step: the first damping's."""
    return frame.drop_duplicates(["layer", "approximation", "seed", "step"])


def ranked(frame: pd.DataFrame, column: str) -> list[str]:
    """The approximations that have a value, the smallest median first."""
    return frame.groupby("approximation")[column].median().dropna().sort_values().index.tolist()


def known(table: Any) -> dict[str, str]:
    """A name for each layer, `{"0": "Conv2d 3->16 3x3"}`, where the table says so."""
    return dict(getattr(table, "config", {}).get("layers") or {})


def _named(layers: Sequence[str], described: Mapping[str, str], gap: str) -> list[str]:
    """Layers as a reader knows them: the name, and what it is."""
    return [f"{layer}{gap}{described[layer]}" if layer in described else layer for layer in layers]


def _of_layers(frame: pd.DataFrame, layers: Sequence[str] | None) -> pd.DataFrame:
    if layers is None:
        return frame
    there = list(frame["layer"].unique())
    missing = [layer for layer in layers if layer not in there]
    if missing:
        raise ValueError(f"the table has no layer {missing[0]!r}; it has {', '.join(there)}")
    place = {layer: k for k, layer in enumerate(layers)}
    chosen = frame[frame["layer"].isin(place)]
    return chosen.sort_values("layer", key=lambda column: column.map(place), kind="stable")


def _merged(
    frame: pd.DataFrame, column: str, labels: Mapping[str, str] | None = None
) -> tuple[pd.DataFrame, dict[str, str]]:
    """Methods of equal values under one name, and the first method of each name."""
    wide = frame.pivot_table(
        index=["step", "layer", "seed"], columns="approximation", values=column
    )
    groups: list[list[str]] = []
    for name in dict.fromkeys(frame["approximation"]):
        mine = wide[name].to_numpy()
        for group in groups:
            if np.allclose(wide[group[0]].to_numpy(), mine, rtol=EQUAL, atol=0, equal_nan=True):
                group.append(name)
                break
        else:
            groups.append([name])
    called = {name: (labels or {}).get(name, name) for group in groups for name in group}
    joined = {group[0]: " = ".join(called[name] for name in group) for group in groups}
    kept = frame[frame["approximation"].isin(joined)]
    renamed = kept.assign(approximation=kept["approximation"].map(joined))
    return renamed, {shown: name for name, shown in joined.items()}


def heading(step: int, steps: Sequence[int]) -> str:
    """`step 50`; nothing where the only step is 0, which is also that of a table without one."""
    return "" if list(steps) == [0] else f"step {step}"


def _over_layers(
    frame: pd.DataFrame,
    column: str,
    described: Mapping[str, str],
    labels: Mapping[str, str] | None = None,
    palette: Mapping[str, str] | None = None,
    size: tuple[float, float] | None = None,
    ax: Axes | None = None,
) -> Figure:
    frame, first = _merged(frame, column, labels)
    steps = sorted(frame["step"].unique())
    names = ranked(frame, column)
    looks = theme.looks(first[name] for name in names)
    found = {name: looks[first[name]] for name in names}
    for name, colour in (palette or {}).items():
        found |= {n: found[n]._replace(colour=colour) for n in names if name in (n, first[n])}
    layers = list(frame["layer"].unique())
    if ax is None:
        columns = 3 if len(layers) <= MANY else 1
        height = 2.9 + theme.room(layers)
        figure, axes = theme.panels(len(steps) or 1, columns=columns, height=height, sharey=True)
    else:
        axes, steps = [ax], steps[-1:]
        whole: Any = ax.figure
        figure = whole
    most = TOP if column in ERRORS else frame[column].max()
    cut = frame.assign(**{column: frame[column].clip(upper=most)})
    for place, step in zip(axes, steps, strict=False):
        _lines(cut[cut["step"] == step], "layer", column, names, place, found)
        theme.logarithmic(place, "y")
        place.set(title=heading(step, steps), xlabel="layer", ylabel=label(column))
        if ax is None:
            place.label_outer()
        _arrows(place, frame[frame["step"] == step], column, layers, most, found)
        wide = 1.0 if size is None else size[0] / theme.FULL
        # for two lines under a tick
        room = ax is None and len(layers) * min(len(steps), 3) <= 5 * wide
        texts = _named(layers, described, "\n" if room else "  ")
        turned = 0 if room and described else theme.rotation(texts)
        place.set_xticks(range(len(layers)), texts, rotation=turned)
    beyond = frame[frame[column] > most].groupby("approximation")[column].max()
    far = {name: f"{name} (to {value:.3g})" for name, value in beyond.items()}
    if ax is None:
        theme.legend(figure, names, found=found, labels=far)
    else:
        handles = [Line2D([], [], **found[n].curve, label=far.get(n, n)) for n in names]
        ax.legend(handles=handles, frameon=False)
    if size is not None:
        figure.set_size_inches(*size)
    return figure


def _arrows(
    ax: Axes,
    frame: pd.DataFrame,
    column: str,
    layers: list[str],
    most: float,
    found: Mapping[str, theme.Look],
) -> None:
    """An arrow upwards at the edge for every value beyond it."""
    for row in frame[frame[column] > most].drop_duplicates(["layer", "approximation"]).itertuples():
        ax.annotate(
            "", (layers.index(row.layer), most), xytext=(0, -9), textcoords="offset points",
            arrowprops={"arrowstyle": "->", "color": found[row.approximation].colour},
        )  # fmt: skip


def _heat_maps(
    frame: pd.DataFrame,
    column: str,
    subject: str,
    described: Mapping[str, str],
    size: tuple[float, float] | None,
) -> Figure:
    """Layer x method, the first, the middle and the last step; 1 and more is the darkest."""
    every = sorted(frame["step"].unique())
    steps = sorted({every[0], every[len(every) // 2], every[-1]}) if len(every) > 3 else every
    names, layers = ranked(frame, column), list(frame["layer"].unique())
    across = max(1, min(len(steps), 2 if described else 3))
    height = 1.0 + 0.17 * len(layers)
    figure, axes = theme.panels(len(steps), columns=across, height=height)
    if size is not None:
        figure.set_size_inches(*size)
    texts = _named(layers, described, "  ")
    image = None
    for k, (ax, step) in enumerate(zip(axes, steps, strict=True)):
        mine = frame[frame["step"] == step]
        wide = mine.pivot_table(index="layer", columns="approximation", values=column)
        values = wide.reindex(index=layers, columns=names).to_numpy()
        image = heat(ax, values, 0, 1, "Blues")
        ax.set_aspect("auto")
        name_axis(ax, names, y=False)
        name_axis(ax, texts if k % across == 0 else [""] * len(texts), x=False)
        write_values(ax, values, 0, 1, "Blues")
        ax.set_title(heading(step, steps))
    if image is not None:
        figure.colorbar(image, ax=axes, label=label(column), extend="max", shrink=0.6)
    theme.title(figure, subject)
    return figure


def _per_layer(
    frame: pd.DataFrame,
    x: str,
    column: str,
    layers: Sequence[str] | None,
    described: Mapping[str, str],
) -> Figure:
    layers = list(layers or frame["layer"].unique())
    names = ranked(frame, column)[:: -1 if column == "direction_cosine" else 1]  # the best first
    figure, axes = theme.panels(len(layers) or 1, columns=4, height=1.9, sharex=True, sharey=True)
    for ax, layer in zip(axes, layers, strict=False):
        _lines(frame[frame["layer"] == layer], x, column, names, ax)
        ax.set(title="\n".join(_named([layer], described, "\n")), xlabel="", ylabel="")
        if not described:
            ax.set_title(f"layer {layer}")
    figure.supxlabel(label(x), fontsize=8)
    figure.supylabel(label(column), fontsize=8, ha="left", multialignment="center")
    theme.legend(figure, names)
    return figure


def _lines(
    frame: pd.DataFrame,
    x: str,
    column: str,
    names: list[str],
    ax: Axes,
    found: Mapping[str, theme.Look] | None = None,
) -> None:
    """Lines with markers over `x`; several seeds are a mean and a band of their range."""
    sns.lineplot(
        frame, x=x, y=column, hue="approximation", style="approximation", sort=x != "layer",
        errorbar=("pi", 100) if frame["seed"].nunique() > 1 else None,
        err_kws={"alpha": 0.15, "linewidth": 0}, ax=ax, legend=False, markeredgewidth=0.3,
        alpha=0.9, **theme.styles(names, found),
    )  # fmt: skip
