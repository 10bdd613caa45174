"""What a person sees in a figure: texts that touch, legends over data, titles that run out."""

from __future__ import annotations

from itertools import combinations

import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from fisherlab import comparison

NAMES = ["exact", "kfac", "tekfac", "my_own"]


def complaints(figure: Figure, dpi: int = 110) -> list[str]:
    """What is wrong with a figure at notebook size; an empty list if nothing is."""
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    found = []

    def box(artist: object) -> Bbox:
        return artist.get_window_extent(renderer)

    titles = [figure._suptitle] if figure._suptitle and figure.get_suptitle() else []
    panels = [ax for ax in figure.axes if ax.get_visible()]
    for ax in panels:
        for name, axis in (("x", ax.xaxis), ("y", ax.yaxis)):
            labels = [t for t in axis.get_ticklabels() if t.get_visible() and t.get_text()]
            inside = [t for t in labels if _near(box(t), box(ax), name)]
            for one, two in combinations(inside, 2):
                if _overlap(box(one), box(two)):
                    found.append(f"{name} tick labels {one.get_text()!r} and {two.get_text()!r}")
        titles += [ax.title] if ax.get_title() else []
    for one, two in combinations(titles, 2):
        if _overlap(box(one), box(two)):
            found.append(f"titles {one.get_text()!r} and {two.get_text()!r}")
    for legend in figure.legends:
        for ax in panels:
            if _overlap(box(legend), box(ax)):
                found.append(f"the legend covers panel {ax.get_title()!r}")
        for title in titles:
            if _overlap(box(legend), box(title)):
                found.append(f"the legend touches the title {title.get_text()!r}")
    for title in titles:
        if box(title).x0 < -1 or box(title).x1 > figure.bbox.width + 1:
            found.append(f"the title {title.get_text()!r} runs out of the figure")
    return found


def _near(label: Bbox, panel: Bbox, axis: str) -> bool:
    """Whether a tick label is one that is drawn: within the range of its axis."""
    if axis == "x":
        return panel.x0 - 1 <= (label.x0 + label.x1) / 2 <= panel.x1 + 1
    return panel.y0 - 1 <= (label.y0 + label.y1) / 2 <= panel.y1 + 1


def _overlap(one: Bbox, two: Bbox) -> bool:
    width = min(one.x1, two.x1) - max(one.x0, two.x0)
    height = min(one.y1, two.y1) - max(one.y0, two.y0)
    return width > 1 and height > 1


def frame(layers=3, seeds=1, steps=(0, 5), dampings=(0.01, 0.1)):
    """The frame of a comparison, its numbers made up."""
    rows = [
        {
            "layer": f"{layer}", "approximation": name, "seed": seed, "step": step,
            "damping_relative": damping, "relative_error": 0.0 if name == "exact" else 0.1 * k,
            "population_error": 0.2 + 0.1 * k, "trace_ratio": 1 - 0.1 * k,
            "diagonalisation": 1 - 0.2 * k,
            "direction_cosine": 1 - 0.2 * k * damping, "diagonal_share": 0.1,
            "build_seconds": 0.01 * (k + 1), "solve_seconds": 0.02,
        }
        for seed in range(seeds) for step in steps for layer in range(layers)
        for k, name in enumerate(NAMES) for damping in dampings
    ]  # fmt: skip
    return pd.DataFrame(rows).reindex(columns=comparison.COLUMNS)
