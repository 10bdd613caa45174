"""Eigenbasis alignment: overlaps of eigenspaces, principal angles, mass off the diagonal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from fisherlab.metrics import GroupedOverlap
from fisherlab.plots import theme
from fisherlab.plots.matrices import heat, multiples, name_axis, write_values


@theme.themed
def eigenbasis_overlap(overlaps: Mapping[str, GroupedOverlap], layer: str = "") -> Figure:
    """`|<v_i, q_j>|` of leading eigenvectors: the exact block's down, an approximation's across.

    A diagonal of ones is agreement, also in the order. Equal eigenvalues are one row or column.

    Args:
        overlaps: overlaps by name, from `metrics.grouped_overlap`.
        layer: name of the layer, for the title.

    Returns:
        The figure.
    """
    figure, axes = multiples(len(overlaps), 4, 1.6)
    for ax, (name, overlap) in zip(axes, overlaps.items(), strict=True):
        image = heat(ax, overlap.matrix)
        ax.set_title(name)
        ax.set_xticks(range(len(overlap.sizes)), _ranks(overlap.sizes), rotation=90, fontsize=5.5)
        rows = _ranks(overlap.exact_sizes)
        ax.set_yticks(range(len(rows)), rows, fontsize=5.5)
    figure.supxlabel("eigenvector $q_j$ of the approximation", fontsize=8)
    figure.supylabel("eigenvector $v_i$ of $F$", fontsize=8)
    figure.colorbar(image, ax=axes, label=r"$|\langle v_i, q_j\rangle|$", aspect=25)
    theme.title(figure, titled("Leading eigenvectors, exact against approximate", layer))
    return figure


def _ranks(sizes: list[int]) -> list[str]:
    """`1`, `2-4`, ...: which eigenvectors a group holds."""
    ends = np.cumsum(sizes)
    return [f"{e}" if n == 1 else f"{e - n + 1}-{e}" for e, n in zip(ends, sizes, strict=True)]


def titled(subject: str, layer: str) -> str:
    """A title that names the layer, where there is one to name."""
    return f"{subject}: layer {layer}" if layer else subject


@theme.themed
def principal_angles(angles: Mapping[str, Tensor], layer: str = "") -> Figure:
    """Angles between the leading k-subspaces of `F` and of each approximation, in degrees.

    Args:
        angles: `[k]` radians by name, from `metrics.principal_angles`.
        layer: name of the layer, for the title.

    Returns:
        The figure.
    """
    figure, (ax,) = theme.panels(1, height=2.8)
    for name, look in theme.looks(angles).items():
        degrees = np.rad2deg(theme.array_of(angles[name]))
        ax.plot(np.arange(1, len(degrees) + 1), degrees, **look.curve)
    ax.set(xlabel="angle, ascending", ylabel="principal angle [degrees]")
    ax.set(ylim=(-3, 93), yticks=[0, 30, 60, 90])
    ax.set_xticks(range(1, max(len(values) for values in angles.values()) + 1))
    last = {n: (len(v), float(np.rad2deg(float(v[-1])))) for n, v in angles.items() if len(v)}
    theme.end_labels(ax, last)
    theme.legend(figure, angles)
    theme.title(
        figure, titled("Angles between the leading eigenspaces, exact and approximate", layer)
    )
    return figure


@theme.themed
def off_diagonal_mass(table: Any) -> Figure:
    """Share of `||F||^2` that no eigenvalues in a basis can express, approximation by layer.

    Args:
        table: a `Comparison`, or its frame.

    Returns:
        The figure.
    """
    frame = theme.frame_of(table)
    last = frame[frame["step"] == frame["step"].max()].dropna(subset=["diagonalisation"])
    once = last.drop_duplicates(["layer", "approximation"])
    mass = 1 - once.pivot(index="approximation", columns="layer", values="diagonalisation")
    mass = mass[list(dict.fromkeys(once["layer"]))]
    mass = mass.loc[mass.median(axis=1).sort_values().index]
    width = min(theme.FULL, 0.45 * mass.shape[1] + 2.6)
    figure, (ax,) = theme.panels(1, width=width, height=0.24 * len(mass) + 1.2)
    image = heat(ax, mass)
    ax.set_aspect("auto")
    name_axis(ax, list(mass.columns), y=False)
    ax.set_yticks(range(len(mass)), mass.index)
    write_values(ax, mass)
    ax.set_xlabel("layer")
    share = r"$1 - \|\mathrm{diag}(Q^\top F Q)\|^2 / \|F\|^2$"
    figure.colorbar(image, ax=ax, label=share, aspect=15)
    theme.title(figure, "Mass off the diagonal in each eigenbasis")
    return figure
