"""Gram correlation matrices (FNGD fig. 3), the layers they make alike, and FNGD's coefficients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from fisherlab.metrics import GramStudy
from fisherlab.plots import theme
from fisherlab.plots.matrices import SIGNED, heat, multiples, name_axis, write_values
from fisherlab.plots.theme import BLUE, ORANGE, array_of


@theme.themed
def gram_matrices(
    study: GramStudy | Mapping[Any, GramStudy],
    layers: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
) -> Figure:
    """`U^T U` scaled to unit diagonal, layer by layer on one colour scale, examples by class.

    Above each: the mean correlation within a class and between classes.

    Args:
        study: One study, or several by what tells them apart, `{"epoch 0": study}`: a row each.
        layers: The layers to draw; by default all.
        classes: The names of the classes.

    Returns:
        The figure.
    """
    studies = study if isinstance(study, Mapping) else {"": study}
    wanted = list(layers or next(iter(studies.values())).layers)
    several = len(studies) > 1
    many = len(wanted) > 8
    columns = len(wanted) if several else 7 if many else 4
    figure, axes = multiples(
        len(wanted) * len(studies), columns, 1.1 if many else 1.3 if several else 1.7
    )
    places = iter(axes)
    for when, one in studies.items():
        for name in wanted:
            ax, k = next(places), one.layers.index(name)
            image = heat(ax, one.correlations[k], -1, 1, SIGNED)
            _classes(ax, one.labels, classes, named=ax is axes[0] and not many)
            means = f"{one.within[k]:.2f} | {one.between[k]:.2f}"
            head = (f"{when}: {name}" if many else f"{when}, layer {name}") if several else name
            ax.set_title(f"{head}\n{means}", fontsize=6 if many else 8)
    bar = figure.colorbar(image, ax=axes, label="correlation", aspect=30, shrink=0.5 if many else 1)
    bar.outline.set_linewidth(0)
    subject = "Correlation of per-example gradients, by class"
    theme.title(figure, f"{subject}\n(above each: layer, mean within | between classes)")
    return figure


def _classes(ax: Axes, labels: Tensor, names: Sequence[str] | None, named: bool) -> None:
    """Lines between classes and, where there is room, their names at the middle of each."""
    values = array_of(labels)
    edges = np.flatnonzero(np.diff(values)) + 0.5
    for edge in edges:
        ax.axhline(edge, color="0.2", lw=0.3)
        ax.axvline(edge, color="0.2", lw=0.3)
    ax.set_xticks([])
    ax.set_yticks([])
    if named:
        middles = [(one + two) / 2 for one, two in pairwise([-0.5, *edges, len(values) - 0.5])]
        present = [names[int(c)] if names else str(int(c)) for c in np.unique(values)]
        shown: list[tuple[float, str]] = []
        for middle, name in zip(middles, present, strict=True):
            # a line of text is about a thirteenth of the panel
            if not shown or middle - shown[-1][0] > len(values) / 13:
                shown.append((middle, name))
        ax.set_yticks([place for place, _ in shown], [name for _, name in shown], fontsize=6)
        ax.set_ylabel("class")


@theme.themed
def gram_similarity(study: GramStudy) -> Figure:
    """Which layers' correlation matrices are alike; the title says whether adjacent ones are.

    Args:
        study: from `metrics.gram_study`.

    Returns:
        The figure.
    """
    figure, (ax,) = multiples(1, 1, 3.8)
    low = min(0.0, float(study.similarities.min()))
    image = heat(ax, study.similarities, low)
    name_axis(ax, study.layers)
    write_values(ax, study.similarities, low)
    figure.colorbar(image, ax=ax, label="cosine of the centred matrices", shrink=0.85)
    numbers = f"adjacent layers {study.adjacent:.2f}"
    if len(study.layers) > 2:  # two layers have no other pair
        numbers += f", other pairs {study.apart:.2f}"
    theme.title(figure, f"Similarity of the layers' Gram correlations\n{numbers}")
    return figure


@theme.themed
def gram_over_training(studies: Mapping[int, GramStudy]) -> Figure:
    """Correlation within and between classes, and similarity of layers, by training step.

    Args:
        studies: studies by training step.

    Returns:
        The figure.
    """
    figure, (left, right) = theme.panels(2, columns=2, height=2.6)
    rows = [
        {"step": step, "layer": name, "pairs": pairs, "correlation": float(value)}
        for step, study in studies.items()
        for pairs, values in (("one class", study.within), ("two classes", study.between))
        for name, value in zip(study.layers, values, strict=True)
    ]
    sns.lineplot(
        pd.DataFrame(rows), x="step", y="correlation", hue="pairs", style="pairs",
        palette=[BLUE, ORANGE], markers=["o", "s"], dashes=False, errorbar=("pi", 100),
        err_kws={"alpha": 0.15, "linewidth": 0}, ax=left,
    )  # fmt: skip
    left.set(title="correlation (line: mean, band: range over layers)", xlabel="training step")
    left.legend(title="two examples of", loc="best", frameon=False)
    for ax in (left, right):  # there is no half a step
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    for name, shape, colour in (("adjacent", "o", BLUE), ("apart", "s", ORANGE)):
        values = [float(getattr(study, name)) for study in studies.values()]
        right.plot(list(studies), values, marker=shape, color=colour, label=name)
    right.set(title="similarity of the layers' matrices", xlabel="training step", ylabel="cosine")
    right.set_ylim(top=1.02)
    right.legend(title="layers that are", frameon=False)
    theme.title(figure, "How the Gram correlations move while the network is trained")
    return figure


@theme.themed
def coefficients(
    study: GramStudy,
    losses: Tensor,
    layers: Sequence[str] | None = None,
    mislabelled: Tensor | None = None,
) -> Figure:
    """FNGD's weight `M v` of each example against its loss: who is weighted up.

    `losses`, and `mislabelled`, which marks changed labels, are in the order of the batch.

    Args:
        study: from `metrics.gram_study`.
        losses: `[M]` in the order of the batch.
        layers: the layers to draw; None: all.
        mislabelled: `[M]` booleans in the order of the batch, True for changed labels.

    Returns:
        The figure.
    """
    chosen = [study.layers.index(name) for name in (layers or study.layers)]
    figure, axes = theme.panels(len(chosen), columns=4, height=1.9, sharex=True, sharey=True)
    order, loss = array_of(study.order), array_of(losses)
    changed = np.zeros(len(loss), bool) if mislabelled is None else array_of(mislabelled)
    for what, given in (("losses", loss), ("mislabelled", changed)):
        if given.shape != order.shape:
            raise ValueError(f"{what} must be [{len(order)}], one per example, got {given.shape}")
    loss, wrong = loss[order], changed[order]
    kinds = [(~wrong, "o", BLUE, "label as given"), (wrong, "X", ORANGE, "label changed")]
    for ax, k in zip(axes, chosen, strict=True):
        weight = array_of(study.coefficients[k])
        for kind, shape, colour, name in kinds:
            ax.scatter(
                loss[kind],
                weight[kind],
                14,
                color=colour,
                marker=shape,
                lw=0,
                alpha=0.8,
                label=name,
            )
        ax.axhline(1, **theme.GUIDE)
        ax.set_title(f"layer {study.layers[k]}")
    figure.supxlabel("loss of the example [nats]", fontsize=8)
    figure.supylabel("$M v_n$ (SGD: 1)", fontsize=8)
    if wrong.any():
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower right", ncols=2)
    theme.title(figure, "FNGD's weight of each example, against its loss")
    return figure


@theme.themed
def coefficient_drift(frame: pd.DataFrame) -> Figure:
    """Loss from sharing: `||v - v~|| / ||v - mean v||` by epoch and layer, and what is left of it.

    `frame` has columns epoch, layer, drift, and the standard deviations of `M v`: `spread` of the
    batch's own coefficients, `shared_spread` of the shared ones.

    Args:
        frame: the columns epoch, layer, drift, spread and shared_spread.

    Returns:
        The figure.
    """
    figure, (left, right) = theme.panels(2, columns=2, height=2.6)
    sns.lineplot(frame, x="epoch", y="drift", hue="layer", marker="o", palette="viridis", ax=left)
    left.axhline(1, **theme.GUIDE)
    left.set(title="drift (1: one factor per layer does as well)", ylim=(0, None))
    left.set_ylabel(r"$\|v - \tilde v\| \,/\, \|v - \bar v\|$")
    left.legend(title="layer", frameon=False)
    for column, name, shape, colour in (
        ("spread", "of the batch", "o", BLUE),
        ("shared_spread", "shared", "s", ORANGE),
    ):
        sns.lineplot(
            frame, x="epoch", y=column, color=colour, marker=shape, label=name,
            errorbar=("pi", 100), err_kws={"alpha": 0.15, "linewidth": 0}, ax=right,
        )  # fmt: skip
    theme.logarithmic(right, "y")
    right.set(title="spread (band: range over layers)")
    right.set_ylabel("standard deviation of $M v$")
    right.legend(title="coefficients", frameon=False)
    epochs = sorted(frame["epoch"].unique())
    for ax in (left, right):
        ax.set_xticks(epochs[:: -(-len(epochs) // 10)])
    theme.title(figure, "FNGD's coefficients from epoch to epoch")
    return figure
