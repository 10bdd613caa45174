"""Pictures of a search: the metric over the values of every option, and what each explains."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fisherlab.plots import theme


@theme.themed
def search_slices(tried: pd.DataFrame, metric: str) -> Figure:
    """The held-out metric over each option, a panel per optimizer and option, a dot per point.

    A cross at the lower edge is a point without a result.

    Args:
        tried: one row per point: `optimizer`, `value`, and `options`, a mapping.
        metric: the metric's name.

    Returns:
        The figure.
    """
    panels = [
        (name, option)
        for name, mine in tried.groupby("optimizer", sort=False)
        for option in _moved(mine)
    ]
    figure, axes = theme.panels(max(1, len(panels)), columns=3, height=2.1, sharey=True)
    looks = theme.looks(list(dict.fromkeys(tried["optimizer"])))
    for ax, (name, option) in zip(axes, panels, strict=False):
        _slice(ax, tried[tried["optimizer"] == name], option, looks[name].colour)
        ax.set_title(name)
        ax.set_xlabel(option)
    for ax in axes[::3]:
        ax.set_ylabel(f"held-out {metric}")
    values = tried["value"].astype(float)
    if values.min() > 0 and values.max() > 10 * values.min():
        axes[0].set_yscale("log")
    theme.title(figure, "Every point, option by option (x: no result)")
    return figure


def _moved(mine: pd.DataFrame) -> list[str]:
    """The options that have more than one value."""
    every = list(mine["options"])
    return [o for o in every[0] if len({options[o] for options in every}) > 1]


def _slice(ax: Axes, mine: pd.DataFrame, option: str, colour: str) -> None:
    words = [options[option] for options in mine["options"]]
    numbers = pd.to_numeric(pd.Series(words), errors="coerce")
    if numbers.notna().all():
        places = numbers
        if numbers.min() > 0 and numbers.max() >= 10 * numbers.min():
            ax.set_xscale("log")
    else:
        order = list(dict.fromkeys(words))
        places = pd.Series([order.index(word) for word in words])
        ax.set_xticks(range(len(order)), order, rotation=theme.rotation(order))
    values = mine["value"].astype(float).reset_index(drop=True)
    gone = values.isna()
    ax.plot(places[~gone], values[~gone], "o", color=colour, alpha=0.7)
    low = [0.04] * int(gone.sum())
    ax.plot(places[gone], low, "x", color="0.3", transform=ax.get_xaxis_transform())


@theme.themed
def search_importance(shares: Mapping[str, Mapping[str, float]]) -> Figure:
    """The share of the held-out metric's variance that each option explains: a bar per option.

    Args:
        shares: by optimizer and option, summing to 1 for each optimizer.

    Returns:
        The figure.
    """
    most = max(len(found) for found in shares.values())
    figure, axes = theme.panels(len(shares), columns=3, height=0.9 + 0.22 * most)
    looks = theme.looks(list(shares))
    for ax, (name, found) in zip(axes, shares.items(), strict=True):
        options = sorted(found, key=found.__getitem__)
        ax.barh(options, [found[option] for option in options], color=looks[name].colour)
        ax.set_xlim(0, 1)
        ax.set_title(name)
        ax.set_xlabel("share of the variance")
        ax.grid(False, axis="y")
    theme.title(figure, "What each option explains of the metric")
    return figure
