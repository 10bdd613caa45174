"""One theme: print sizes, colours the colour-blind tell apart, one look per approximation."""

from __future__ import annotations

import hashlib
import html
import io
import math
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogFormatterSciNotation
from torch import Tensor

from fisherlab import whole

P = ParamSpec("P")
T = TypeVar("T", bound=Figure)


class Picture(Figure):
    """A figure that shows itself: as PNG in a notebook, as HTML wherever that is asked for.

    It needs no pyplot, so nothing is drawn twice, nothing has to be closed, no backend is chosen.
    """

    def png(self, dpi: float = 110) -> bytes:
        """The picture as it stands in a notebook."""
        buffer = io.BytesIO()
        with mpl.rc_context(STYLE):
            self.savefig(buffer, format="png", dpi=dpi)
        return buffer.getvalue()

    def _ipython_display_(self) -> None:
        from IPython.display import display

        image = {"image/png": b64encode(self.png()).decode(), "text/plain": self.title}
        display(image, raw=True)

    def _repr_html_(self) -> str:
        data, title = b64encode(self.png()).decode(), html.escape(self.title, quote=True)
        return f'<img style="max-width:100%" alt="{title}" src="data:image/png;base64,{data}">'

    @property
    def title(self) -> str:
        """The picture's subject in one line."""
        return self.get_suptitle().replace("\n", ", ")


FULL, COLUMN = 6.9, 3.35  # inches: the text width of two columns, and of one
DPI = 200
STYLE = {
    **sns.axes_style("whitegrid"),
    **sns.plotting_context("paper"),
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.title_fontsize": 7,
    "figure.titlesize": 9,
    "figure.dpi": 110,
    "savefig.dpi": DPI,
    "axes.linewidth": 0.6,
    "grid.linewidth": 0.4,
    "grid.color": "#dddddd",
    "axes.edgecolor": "#444444",
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "patch.linewidth": 0.4,
    "pdf.fonttype": 42,  # letters stay letters
    "svg.fonttype": "none",
    "mathtext.fontset": "dejavusans",
}

# A line to compare with.
GUIDE: dict[str, Any] = {"color": "#444444", "lw": 0.8, "ls": "--", "zorder": 0}
# The two hues of pictures that compare no approximations.
BLUE, ORANGE = "#0072B2", "#D55E00"

# Any two differ by at least 8.5 in CIELAB, seen by deuteranopes and protanopes too, and most by a
# marker; each has a contrast of at least 3 on white. A family shares a hue where that leaves room.
# A name that is not here, a user's, gets a look from its own letters, if no other in the picture
# has taken it.
LOOKS = {
    "exact": ("#000000", "o"),
    "kfac": ("#005BA8", "o"),
    "kfac_reduce": ("#756593", "s"),
    "ekfac": ("#0000FC", "D"),
    "tkfac": ("#EF4700", "o"),
    "tkfac_expand": ("#592200", "s"),
    "tekfac": ("#3E6636", "D"),
    "shampoo": ("#13A681", "^"),
    "soap": ("#0C42CE", "D"),
    "kronecker_optimal": ("#312189", "v"),
    "kl_optimal": ("#000692", "v"),
    "kl_shampoo": ("#0B0346", ">"),
    "dykaf": ("#0F0429", "<"),
    "nystrom": ("#410A65", "h"),
    "kronecker_sum": ("#8978CD", "P"),
    "diagonal": ("#CC78AB", "X"),
    "mini_block": ("#8C1F59", "p"),
    "eva": ("#9C973A", "<"),
    "ifang": ("#9D8F4A", ">"),
    "sngd": ("#67746C", "h"),
    "kbfgs": ("#5D29ED", "d"),
    # Fisher types that stand where an approximation does
    "mc": ("#0061D7", "o"),
    "empirical": ("#BD4162", "s"),
    "sgd": ("#009394", "s"),
    "adam": ("#6D0030", "^"),
    "adamw": ("#5267C8", "v"),
    "radam": ("#704C6B", "<"),
    "muon": ("#976B38", ">"),
    "ngd": ("#C93113", "o"),
    "ngd_dense": ("#D47B66", "s"),
    "blockwise_ngd": ("#A61D0B", "D"),
    "tengrad": ("#CD7B7B", "^"),
    "ngd_smw": ("#511F4E", "v"),
    "fngd": ("#3E4C8C", "P"),
    "fngd_control": ("#586150", "X"),
    "ang": ("#004540", "p"),
    "truncated_kfac": ("#4870A8", "X"),
}
SPARE = (
    "#819C18", "#E250FF", "#008CFF", "#AA6656", "#C376C1", "#AC0225",
    "#242924", "#6200B9", "#8D43FF", "#1F41AB", "#408B17", "#8B047A",
)  # fmt: skip
MARKERS = "osD^vPXph<>d"


class Look(NamedTuple):
    """How a curve is drawn."""

    colour: str
    marker: str

    @property
    def line(self) -> dict[str, Any]:
        """Options of matplotlib's functions."""
        return {"color": self.colour, "marker": self.marker}


def looks(names: Iterable[Any]) -> dict[Any, Look]:
    """The look of each name in one picture; no two names share one.

    A known name has the same look in every picture. A user's name has the colour of its own
    letters, or the next free one. Colours repeat only if there are more such names than `SPARE`.
    """
    names = list(names)
    found = {name: Look(*LOOKS[name]) for name in names if name in LOOKS}
    colours, markers = Counter[str](), Counter[str]()
    for name in sorted(set(names) - set(found), key=str):  # whatever the order in the picture
        first, second, *_ = hashlib.sha256(str(name).encode()).digest()
        choices = [Look(c, m) for m in _from(MARKERS, second) for c in _from(SPARE, first)]
        free = [look for look in choices if look not in found.values()] or choices
        found[name] = min(free, key=lambda look: (colours[look.colour], markers[look.marker]))
        colours[found[name].colour] += 1
        markers[found[name].marker] += 1
    return found


def _from(items: Sequence[str], start: int) -> list[str]:
    start %= len(items)
    return [*items[start:], *items[:start]]


def look(name: str) -> Look:
    """The look of a name that is the only user's name in its picture."""
    return looks([name])[name]


def colour(name: str) -> str:
    """The colour of a name that is the only user's name in its picture.

    Args:
        name: the name.

    Returns:
        A colour of matplotlib, such as "#0072b2".
    """
    return look(name).colour


def styles(names: Iterable[str], found: Mapping[str, Look] | None = None) -> dict[str, Any]:
    """`hue` options of seaborn's functions, so that each name has its own look."""
    names = list(names)
    found = found or looks(names)
    return {
        "hue_order": names,
        "palette": {name: look.colour for name, look in found.items()},
        "style_order": names,
        "markers": {name: look.marker for name, look in found.items()},
        "dashes": False,
    }


def themed(draw: Callable[P, T]) -> Callable[P, T]:
    """A function whose figure is made in the theme, whatever the user's own settings are."""

    @wraps(draw)
    def inside(*args: P.args, **options: P.kwargs) -> T:
        with mpl.rc_context(STYLE):
            figure = draw(*args, **options)
            for axis in (axis for ax in figure.axes for axis in (ax.xaxis, ax.yaxis)):
                if isinstance(axis.get_major_formatter(), LogFormatterSciNotation):
                    axis.set_major_formatter(Decimals())
                    axis.set_minor_formatter(Decimals())
            return figure

    return inside


class Decimals(LogFormatterSciNotation):
    """Labels of a logarithmic axis: 0.4 and not 4 x 10^-1 where it shows few powers of ten."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        label = super().__call__(x, pos)
        low, high = sorted(self.axis.get_view_interval())
        return f"{x:g}" if label and 1e-3 <= low and high <= min(1e4, 50 * low) else label


def panels(
    count: int, *, columns: int = 4, width: float = FULL, height: float = 2.0, **options: Any
) -> tuple[Picture, list[Axes]]:
    """A figure of `count` panels, `height` inches each, in rows of `columns`."""
    across = min(count, columns)
    down = math.ceil(count / across)
    figure = Picture(figsize=(width, height * down + 0.4), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False, **options).flatten().tolist()
    for spare in axes[count:]:
        spare.remove()
    for above in axes[max(0, count - across) : count]:  # the last panel of every column
        above.tick_params(labelbottom=True)
    return figure, axes[:count]


def rotation(names: Iterable[str]) -> int:
    """Rotation of names along an axis, in degrees: upright where there are many or long ones."""
    lengths = [len(name) for name in names]
    return 90 if len(lengths) > 8 or max(lengths) > 6 else 0


def room(names: Iterable[str]) -> float:
    """Inches that long names along an axis need beyond the height of a panel."""
    names = list(names)
    if not names or not rotation(names):
        return 0.0
    return max(0.0, 0.055 * max(map(len, names)) - 0.4)


def title(figure: Figure, text: str) -> None:
    """The picture's subject, at its upper left, clear of the legend: call it after `legend`."""
    written = figure.suptitle(text, x=0.01, ha="left")
    left = written.get_window_extent().x0
    widths = [legend.get_window_extent().width for legend in figure.legends]
    room = figure.bbox.width - max(widths, default=0.0) - 2 * left
    share = room / written.get_window_extent().width
    if 0 < share < 1:  # names of the user's own may be long
        written.set_fontsize(share * written.get_fontsize())


def legend(
    figure: Figure,
    names: Iterable[str],
    title: str = "",
    lines: bool = True,
    found: Mapping[str, Look] | None = None,
    labels: Mapping[str, str] | None = None,
) -> None:
    """One legend for all panels, outside on the right: it never covers data."""
    names, labels = list(names), labels or {}
    found = found or looks(names)
    handles = [
        Line2D([], [], **found[name].line, ls="-" if lines else "", label=labels.get(name, name))
        for name in names
    ]
    figure.legend(handles=handles, title=title, loc="outside right upper", frameon=False)


def save(figure: Figure, stem: str | Path) -> list[Path]:
    """Write `stem.png` and, for print, `stem.pdf`; returns both paths.

    Args:
        figure: the figure.
        stem: the path without its ending.

    Returns:
        Both paths.
    """
    stem = Path(stem)
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_name(stem.name + suffix) for suffix in (".png", ".pdf")]
    with mpl.rc_context(STYLE):
        whole.write(paths[0], lambda stream: figure.savefig(stream, format="png", dpi=DPI))
        # the layout that was found for the first holds for the second
        figure.set_layout_engine("none")
        dated = {"CreationDate": None}
        whole.write(paths[1], lambda stream: figure.savefig(stream, format="pdf", metadata=dated))
    return paths


def array_of(values: Any) -> np.ndarray:
    """The numbers of a tensor, on whatever device, or of anything else."""
    return np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values)


def frame_of(table: Any) -> pd.DataFrame:
    """The frame of a `Comparison`, or a frame itself."""
    return getattr(table, "frame", table)
