"""Heat maps with one shared scale: what every picture of matrices is made of."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.image import AxesImage

from fisherlab.plots.theme import Picture, array_of, rotation

# One map for what has a sign, one for what has none; both read in grey and by the colour-blind.
SIGNED, POSITIVE = "RdBu_r", "viridis"


def multiples(
    count: int, columns: int, size: float, extra: float = 0.3
) -> tuple[Picture, list[Axes]]:
    """A figure of `count` square axes of `size` inches in rows of `columns`."""
    across = min(count, columns)
    down = -(-count // across)
    shape = (across * size + 0.9, down * (size + extra) + 0.5)
    figure = Picture(figsize=shape, layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).ravel().tolist()
    for spare in axes[count:]:
        spare.remove()
    return figure, axes[:count]


def heat(
    ax: Axes, matrix: object, low: float = 0, high: float = 1, cmap: str = POSITIVE
) -> AxesImage:
    """One matrix, every entry a pixel."""
    ax.grid(False)
    ax.tick_params(length=0)
    return ax.imshow(array_of(matrix), cmap, vmin=low, vmax=high, interpolation="nearest")


def name_axis(ax: Axes, names: Sequence[str], x: bool = True, y: bool = True) -> None:
    """Names along a matrix; where they would touch, every second, third, ... of them."""
    step = -(-len(names) // 34)
    size = 7 if len(names) <= 16 else 5.5
    ticks, shown = list(range(0, len(names), step)), list(names)[::step]
    if x:
        ax.set_xticks(ticks, shown, rotation=rotation(shown), fontsize=size)
    if y:
        ax.set_yticks(ticks, shown, fontsize=size)


def write_values(
    ax: Axes, matrix: object, low: float = 0, high: float = 1, cmap: str = POSITIVE
) -> None:
    """The numbers inside the cells, dark on light and light on dark, where there is room."""
    values = array_of(matrix)
    box = ax.get_position().size * ax.figure.get_size_inches()
    room = min(box[0] / values.shape[1], box[1] / values.shape[0] * 1.6)
    if room < 0.2:
        return
    shade = mpl.colormaps[cmap](np.clip((values - low) / (high - low), 0, 1))[..., :3]
    dark = shade @ [0.299, 0.587, 0.114] < 0.5
    for (row, column), value in np.ndenumerate(values):
        ax.text(
            column, row, "-" if np.isnan(value) else f"{value:z.2f}",
            ha="center", va="center", fontsize=min(7, 20 * room),
            color="white" if dark[row, column] else "black",
        )  # fmt: skip
