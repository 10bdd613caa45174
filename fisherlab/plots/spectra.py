"""Spectra of exact and approximate blocks: eigenvalues, cumulative trace, conditioning, rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from fisherlab.plots import theme
from fisherlab.plots.alignment import titled


@theme.themed
def eigenvalues(spectra: Mapping[str, Tensor], layer: str = "", floor: float = 1e-12) -> Figure:
    """Eigenvalues in descending order on log axes, the exact block's thick.

    Values below `floor` times the largest are not drawn: they are rounding, or zero.

    Args:
        spectra: eigenvalues `[N]` by name; "exact" is drawn thick.
        layer: name of the layer, for the title.
        floor: smallest drawn value, relative to the largest.

    Returns:
        The figure.
    """
    figure, (ax,) = theme.panels(1, height=3.0)
    draw_spectrum(ax, spectra, floor)
    theme.legend(figure, spectra)
    theme.title(figure, titled("Spectrum of the block and of its approximations", layer))
    return figure


def draw_spectrum(ax: Axes, spectra: Mapping[str, Tensor], floor: float = 1e-12) -> None:
    """The curves of `eigenvalues` in a panel of another picture."""
    descending = {}
    for name, values in spectra.items():
        values = torch.as_tensor(values, dtype=torch.float64, device="cpu")
        if not bool(values.isfinite().all()):
            raise ValueError(f"the spectrum of {name!r} has NaN or inf entries, which no axis has")
        descending[name] = values.sort(descending=True).values
    top = max(float(values[0]) for values in descending.values())
    looks = theme.looks(spectra)
    for name, values in descending.items():
        _curve(ax, name, looks[name], values[values > floor * top])
    theme.logarithmic(ax, "xy")
    ax.set(xlabel="index of the eigenvalue", ylabel="eigenvalue")


def _curve(ax: Axes, name: str, look: theme.Look, values: Tensor) -> None:
    """One descending curve, thinned to what a log axis can show."""
    if not len(values):
        return
    index = np.unique(np.geomspace(1, len(values), 400).astype(int))
    ax.plot(
        index, theme.array_of(values)[index - 1], **look.curve, lw=_width(name),
        markevery=0.12 if len(index) > 8 else 1,
        zorder=2.5 if name == "exact" else 2,
    )  # fmt: skip


def _width(name: str) -> float:
    return 2.2 if name == "exact" else 1.2


@theme.themed
def cumulative_trace(shares: Mapping[str, Tensor], layer: str = "") -> Figure:
    """Share of the trace in the k largest eigenvalues, as `metrics.cumulative_trace` returns it.

    Args:
        shares: `[N]` by name, from `metrics.cumulative_trace`.
        layer: name of the layer, for the title.

    Returns:
        The figure.
    """
    for name, values in shares.items():
        if bool((values.diff() < -1e-9).any()):
            raise ValueError(
                f"the shares of {name!r} fall with k, as eigenvalues do; pass "
                "metrics.cumulative_trace(block)"
            )
    figure, (ax,) = theme.panels(1, height=2.8)
    looks = theme.looks(shares)
    for name, values in shares.items():
        _curve(ax, name, looks[name], values)
    ax.set(xscale="log", xlabel="number of leading eigenvalues, $k$", ylim=(0, 1.03))
    ax.set_ylabel(r"$\sum_{j \leq k} \lambda_j \,/\, \mathrm{tr}$")
    theme.legend(figure, shares)
    theme.title(figure, titled("Trace in the leading eigenvalues", layer))
    return figure


@theme.themed
def condition_against_damping(
    dampings: Sequence[float], numbers: Mapping[str, Tensor], layer: str = ""
) -> Figure:
    """Condition number of `X + lambda I` over lambda, in units of `tr F / N`.

    Args:
        dampings: values of lambda relative to `tr F / N`.
        numbers: condition numbers `[len(dampings)]` by name.
        layer: name of the layer, for the title.

    Returns:
        The figure.
    """
    figure, (ax,) = theme.panels(1, height=2.8)
    for name, look in theme.looks(numbers).items():
        ax.plot(dampings, theme.array_of(numbers[name]), **look.curve, lw=_width(name))
    theme.logarithmic(ax, "xy")
    ax.set_xlabel(r"damping $\lambda$ in units of $\mathrm{tr}\,F / N$")
    ax.set_ylabel(r"$(\lambda_{\max} + \lambda) \,/\, (\lambda_{\min} + \lambda)$")
    theme.legend(figure, numbers)
    theme.title(figure, titled("Condition number against damping", layer))
    return figure


@theme.themed
def effective_rank(ranks: Mapping[str, Mapping[str, float]]) -> Figure:
    """`exp(entropy of the spectrum)` by layer: `ranks[approximation][layer]`.

    Args:
        ranks: `ranks[approximation][layer]`, from `metrics.effective_rank`.

    Returns:
        The figure.
    """
    figure, (ax,) = theme.panels(1, height=2.8)
    layers = list(next(iter(ranks.values())))
    for name, look in theme.looks(ranks).items():
        places = [ranks[name][layer] for layer in layers]
        ax.plot(places, **look.curve, lw=_width(name), alpha=0.9)
    ax.set_xticks(range(len(layers)), layers, rotation=theme.rotation(layers))
    theme.logarithmic(ax, "y")
    ax.set(xlabel="layer", ylabel="effective rank")
    theme.legend(figure, ranks)
    theme.title(figure, "Effective rank of the block and of its approximations")
    return figure
