"""The whole Fisher matrix at a glance, and the three Fisher types on one block."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor

from fisherlab.metrics import Convergence, GramStudy
from fisherlab.plots import theme
from fisherlab.plots.matrices import SIGNED, heat, multiples, name_axis, write_values
from fisherlab.plots.theme import BLUE, ORANGE, array_of


@theme.themed
def layer_masses(study: GramStudy) -> Figure:
    """`||F_ij||_F` between every two layers, and the same without the layers' scales.

    The title gives the share of `||F||^2` that a block-diagonal approximation drops.

    Args:
        study: from `metrics.gram_study`.

    Returns:
        The figure.
    """
    masses = array_of(study.masses)
    figure, (left, right) = multiples(2, 2, 3.2, 0)
    positive = masses[masses > 0]
    low, high = (positive.min(), positive.max()) if len(positive) else (0.1, 1.0)
    left.grid(False)
    image = left.imshow(np.maximum(masses, low), norm=LogNorm(low, high * 1.001), cmap="magma")
    name_axis(left, study.layers)
    figure.colorbar(image, ax=left, label=r"$\|F_{ij}\|_F$", shrink=0.7)
    left.set_title("mass of each block")
    relative = study.relative_masses
    image = heat(right, relative)
    name_axis(right, study.layers, y=False)
    right.set_yticks([])
    write_values(right, relative)
    figure.colorbar(image, ax=right, label=r"$\|F_{ij}\|^2 / \|F_{ii}\|\|F_{jj}\|$", shrink=0.7)
    right.set_title("relative to its two layers")
    dropped = f"{float(study.dropped):.0%} of its mass lies between layers"
    theme.title(figure, f"The Fisher matrix, layer by layer: {dropped}")
    return figure


FEW = 12  # layers whose names fit beside a small matrix


@theme.themed
def dropped_over_training(studies: Mapping[int, GramStudy]) -> Figure:
    """The layer-by-layer matrix at each step, and the share that block-diagonal drops.

    Args:
        studies: studies by training step.

    Returns:
        The figure.
    """
    figure, axes = multiples(len(studies), 5, 1.4)
    for ax, (step, study) in zip(axes, studies.items(), strict=True):
        image = heat(ax, study.relative_masses)
        ax.set_xticks([])
        ax.set_yticks([])
        ax.set_title(f"step {step}: {float(study.dropped):.0%} dropped")
    names = next(iter(studies.values())).layers
    if len(names) <= FEW:
        axes[0].set_yticks(range(len(names)), names)
    axes[0].set_ylabel("layer")
    figure.colorbar(image, ax=axes, label=r"$\|F_{ij}\|^2 / \|F_{ii}\|\|F_{jj}\|$", aspect=20)
    theme.title(figure, "Blocks between layers while the network is trained")
    return figure


@theme.themed
def fisher_types(
    blocks: Mapping[str, Tensor], distances: Mapping[tuple[str, str], float]
) -> Figure:
    """One block by each Fisher type, or a corner of it, and their distances.

    `blocks` are matrices by type; `distances[one, two] = ||F_one - F_two|| / ||F_two||`.

    Args:
        blocks: matrices `[N, N]` by Fisher type.
        distances: `distances[one, two] = ||F_one - F_two|| / ||F_two||`.

    Returns:
        The figure.
    """
    names = list(blocks)
    figure, axes = multiples(len(names) + 1, 4, 1.9)
    reach = max(float(np.quantile(np.abs(array_of(b)), 0.99)) for b in blocks.values())
    for ax, (name, block) in zip(axes, blocks.items(), strict=False):
        image = heat(ax, block, -reach, reach, SIGNED)
        ax.set_xticks([])
        ax.set_yticks([])
        ax.set_title(name)
    figure.colorbar(image, ax=axes[-2], label="entry of $F$", shrink=0.8)
    table = np.array([[distances.get((one, two), 0.0) for two in names] for one in names])
    heat(axes[-1], table, 0, max(1.0, table.max()))
    write_values(axes[-1], table, 0, max(1.0, table.max()))
    name_axis(axes[-1], names)
    axes[-1].set_title(r"$\|F_{row} - F_{col}\| \,/\, \|F_{col}\|$")
    theme.title(figure, "One block, three Fisher types")
    return figure


@theme.themed
def mc_convergence(curves: Mapping[str, Convergence]) -> Figure:
    """Distance of the Monte-Carlo Fisher from the exact one over the draws, with `c / sqrt(s)`.

    Args:
        curves: curves by name, from `metrics.mc_convergence`.

    Returns:
        The figure.
    """
    figure, axes = theme.panels(len(curves), columns=4, height=2.1, sharex=True, sharey=True)
    for ax, (name, curve) in zip(axes, curves.items(), strict=True):
        draws = np.arange(1, len(curve.errors) + 1)
        ax.plot(draws, array_of(curve.errors), color=BLUE, marker="o", ms=2.5, label="measured")
        ax.plot(draws, array_of(curve.expected), color=ORANGE, ls="--", label=r"$c / \sqrt{s}$")
        ax.set_title(f"{name}: c = {float(curve.one_draw):.2f}")
    # the axes are shared
    theme.logarithmic(max(axes, key=lambda ax: -ax.dataLim.minposy), "xy")
    axes[0].legend(frameon=False, loc="lower left")
    figure.supxlabel("draws per example, $s$", fontsize=8)
    figure.supylabel(r"$\|F_s - F\| \,/\, \|F\|$", fontsize=8)
    theme.title(figure, "Monte-Carlo draws until the exact Fisher block")
    return figure
