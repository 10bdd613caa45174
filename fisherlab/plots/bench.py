"""Pictures of `fisherlab bench`: ratios with their reach, and how time and memory grow."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from fisherlab.plots import theme

OURS, PEER, REACH = theme.BLUE, "#BBBBBB", theme.ORANGE
MARKERS = "osD^vPX"
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")


@theme.themed
def ratios(frame: pd.DataFrame, heading: str) -> theme.Picture:
    """Every row as a multiple of its reference, on a logarithmic axis, with quartiles.

    This library in blue, others in grey; the orange line is the ratio to reach.
    """
    frame = frame[frame["ratio"].notna()].iloc[::-1]
    figure, (ax,) = theme.panels(1, height=0.3 + 0.17 * len(frame))
    places = np.arange(len(frame))
    colours = [OURS if by == "fisherlab" else PEER for by in frame["by"]]
    low, high = frame["ratio"] - frame["lowest"], frame["highest"] - frame["ratio"]
    # from the reference, 1: a logarithmic axis has no other beginning
    ax.barh(places, frame["ratio"] - 1, left=1, color=colours, height=0.7)
    ax.errorbar(
        frame["ratio"],
        places,
        xerr=[low.clip(0), high.clip(0)],
        fmt="none",
        ecolor="#444444",
        elinewidth=0.8,
    )
    if "reach" in frame:
        for place, reach in zip(places, frame["reach"], strict=True):
            if reach == reach and reach is not None:
                ax.plot([reach, reach], [place - 0.45, place + 0.45], color=REACH, lw=1.6)
    ax.set_yticks(places, [_label(row) for _, row in frame.iterrows()])
    ax.set_ylim(-0.7, len(frame) - 0.3)
    ax.set(xscale="log", xlabel="multiple of the reference (orange: to reach)")
    ax.grid(axis="y", visible=False)
    theme.title(figure, heading)
    return figure


def _label(row: pd.Series) -> str:
    parts = [f"{row['network']}: {row['work']}", row["fisher_type"]]
    parts += [] if row["by"] == "fisherlab" else [f"({row['by']})"]
    return " ".join(part for part in parts if part)


@theme.themed
def scaling(frame: pd.DataFrame) -> theme.Picture:
    """Seconds above, bytes below, against each quantity; the exponents stand in the legends."""
    axes = list(dict.fromkeys(frame["axis"]))
    figure, panels = theme.panels(2 * len(axes), columns=len(axes), height=2.6)
    for row, (column, label) in enumerate((("seconds", "seconds"), ("peak_bytes", "bytes held"))):
        for ax, name in zip(panels[row * len(axes) :], axes, strict=False):
            _grown(ax, frame[frame["axis"] == name], column)
            ax.set(xlabel=name, ylabel=label if name == axes[0] else "")
    theme.title(figure, "How time and memory grow")
    return figure


def _grown(ax: Axes, frame: pd.DataFrame, column: str) -> None:
    for k, (method, series) in enumerate(frame.groupby("method", sort=False)):
        exponent = series[f"{column}_exponent"].iloc[0]
        ax.loglog(
            series["value"],
            series[column],
            color=COLOURS[k % len(COLOURS)],
            marker=MARKERS[k % len(MARKERS)],
            label=f"{method}  {exponent:.2f}",
        )
    ax.legend(
        frameon=False, fontsize=5.5, loc="lower center", bbox_to_anchor=(0.5, 1.0), handlelength=1.2
    )
