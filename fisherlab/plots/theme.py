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

from fisherlab import doors, whole
from fisherlab.plots.entry import entered

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

FEW = 5  # lines that have names at their ends; fewer are told apart by the legend
SMALL = 6.0  # points of those names

# A line to compare with.
GUIDE: dict[str, Any] = {"color": "#444444", "lw": 0.8, "ls": "--", "zorder": 0}
# The two hues of pictures that compare no approximations.
BLUE, ORANGE = "#0072B2", "#D55E00"

# Colours differ in CIELAB for deuteranopes and protanopes, too. Any two differ by at least 8.9,
# methods by 12.7, methods of one dash by 20. Contrast on white is at least 3. Markers separate
# the rest.
# A user's name has a look of its own letters, if that is free.
LOOKS = {
    "exact": ("#000000", "o", "-"),
    "kfac": ("#245FAB", "o", "-"),
    "kfac_reduce": ("#421187", "s", ":"),
    "ekfac": ("#119A93", "D", "--"),
    "tkfac": ("#FF5608", "o", "-"),
    "tkfac_expand": ("#FC163F", "s", ":"),
    "tekfac": ("#5E234F", "D", "--"),
    "shampoo": ("#7344FE", "^", "-"),
    "soap": ("#138FFF", "v", "--"),
    "kronecker_optimal": ("#0300FA", "v", "-."),
    "kl_optimal": ("#3A6387", "p", "-."),
    "kl_shampoo": ("#088FAE", ">", ":"),
    "dykaf": ("#2346AF", "<", "--"),
    "nystrom": ("#7B62D6", "h", "-."),
    "kronecker_sum": ("#F239FA", "P", ":"),
    "diagonal": ("#600A70", "X", "-"),
    "mini_block": ("#1A0FD7", "p", "--"),
    "eva": ("#690C01", "<", "-"),
    "ifang": ("#57A27A", ">", "-."),
    "sngd": ("#210CA1", "h", "-."),
    "kbfgs": ("#A30C72", "d", ":"),
    # Fisher types that stand where an approximation does
    "mc": ("#3A3B92", "o", "-"),
    "empirical": ("#F73C56", "s", "--"),
    "sgd": ("#4F6056", "s", "-"),
    "sgdm": ("#3F9CCC", "P", "--"),
    "adam": ("#039449", "^", "-"),
    "adamw": ("#670335", "v", "-."),
    "radam": ("#5D76C2", "<", "-."),
    "muon": ("#5624FF", ">", ":"),
    "ngd": ("#039FAB", "o", "-"),
    "ngd_dense": ("#218455", "s", "--"),
    "blockwise_ngd": ("#F80E25", "D", "-."),
    "tengrad": ("#8C0427", "^", "--"),
    "ngd_smw": ("#4E4C6A", "v", "-"),
    "fngd": ("#80600C", "P", "-"),
    "fngd_control": ("#7D767A", "X", ":"),
    "ang": ("#2454CB", "p", "--"),
    "truncated_kfac": ("#0A35D7", "X", "-."),
}
SPARE = (
    "#9018C4", "#395035", "#1B2EA3", "#5A1057", "#CD6791", "#A60640",
    "#125B94", "#CB1E02", "#3778AB", "#7F421B", "#9B9360", "#8F792D",
)  # fmt: skip
MARKERS = "osD^vPXph<>d"
# Strokes and gaps in widths of the line; none: unbroken.
DASHES = {"-": (), "--": (4, 1.5), ":": (1, 1.3), "-.": (5, 1.3, 1, 1.3)}


class Look(NamedTuple):
    """How a curve is drawn."""

    colour: str
    marker: str
    dash: str

    @property
    def line(self) -> dict[str, Any]:
        """Options of matplotlib's functions, for points."""
        return {"color": self.colour, "marker": self.marker}

    @property
    def curve(self) -> dict[str, Any]:
        """Options of matplotlib's functions, for lines."""
        return {**self.line, "ls": (0, DASHES[self.dash]) if DASHES[self.dash] else "-"}


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
        dash = list(DASHES)[second % len(DASHES)]
        choices = [Look(c, m, dash) for m in _from(MARKERS, second) for c in _from(SPARE, first)]
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
    return look(doors.name(name, "name")).colour


def styles(names: Iterable[str], found: Mapping[str, Look] | None = None) -> dict[str, Any]:
    """`hue` options of seaborn's functions, so that each name has its own look."""
    names = list(names)
    found = found or looks(names)
    return {
        "hue_order": names,
        "palette": {name: look.colour for name, look in found.items()},
        "style_order": names,
        "markers": {name: look.marker for name, look in found.items()},
        "dashes": {name: DASHES[look.dash] or "" for name, look in found.items()},
    }


def themed(draw: Callable[P, T]) -> Callable[P, T]:
    """A function whose figure is made in the theme, whatever the user's own settings are."""

    drawn = entered(draw)

    @wraps(draw)
    def inside(*args: P.args, **options: P.kwargs) -> T:
        with mpl.rc_context(STYLE):
            figure = drawn(*args, **options)
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


def logarithmic(ax: Axes, axes: str) -> None:
    """Logarithmic "x", "y" or "xy" of what is drawn; an axis of zeros alone stays linear."""
    for axis in axes:
        if math.isfinite(getattr(ax.dataLim, f"minpos{axis}")):
            ax.set(**{f"{axis}scale": "log"})


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
    gap = 0.12 * figure.dpi if widths else 0.0
    room = figure.bbox.width - max(widths, default=0.0) - 2 * left - gap
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
    handles = []
    for name in names:
        options = found[name].curve if lines else {**found[name].line, "ls": ""}
        handles.append(Line2D([], [], **options, label=folded(labels.get(name, name))))
    made = figure.legend(
        handles=handles, title=title, loc="outside right upper", frameon=False, handlelength=2.6
    )
    needed = made.get_window_extent().height / figure.dpi + 0.15
    if needed > figure.get_figheight():
        figure.set_figheight(needed)


def folded(text: str, most: int = 26) -> str:
    """Equal methods, `a = b = c`, on as many lines as a legend has room for."""
    rows = [""]
    for name in text.split(" = "):
        longer = f"{rows[-1]} = {name}" if rows[-1] else name
        rows = [*rows[:-1], longer] if len(longer) <= most else [*rows, f"= {name}"]
    return "\n".join(filter(None, rows))


def end_labels(
    ax: Axes, ends: Mapping[str, tuple[float, float]], found: Mapping[str, Look] | None = None
) -> None:
    """The name of each line to the right of its end, none over another; few lines need none.

    Args:
        ax: the panel, its scales and limits final.
        ends: the right end of each line, `(x, y)`, by name.
        found: the look of each name.
    """
    (left, right), (bottom, top) = sorted(ax.get_xlim()), sorted(ax.get_ylim())
    inside = {n: e for n, e in ends.items() if left <= e[0] <= right and bottom <= e[1] <= top}
    if len(inside) < FEW:
        return
    found = found or looks(inside)
    width, height = ax.get_position().size * ax.figure.get_size_inches()  # inches
    apart = 1.2 * SMALL / 72 / height
    heights = {n: (ax.transScale + ax.transLimits).transform(e)[1] for n, e in inside.items()}
    names = sorted(inside, key=lambda name: heights[name])
    places: list[float] = []
    for name in names:
        places.append(max(heights[name], places[-1] + apart) if places else heights[name])
    highest = 1.0 + apart
    for k in reversed(range(len(places))):  # down again, where that ran out of the panel
        highest = places[k] = min(places[k], highest)
        highest -= apart
    if max(abs(place - heights[n]) for n, place in zip(names, places, strict=True)) > 1 / 3:
        return  # lines of one end, whose names would be a knot
    for name, place in zip(names, places, strict=True):
        ax.annotate(
            name, inside[name], (1 + 9 / 72 / width, place), textcoords="axes fraction",
            color=found[name].colour, fontsize=SMALL, va="center", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "lw": 0.4, "color": found[name].colour, "shrinkB": 0},
        )  # fmt: skip


def save(figure: Figure, stem: str | Path) -> list[Path]:
    """Write `stem.png` and, for print, `stem.pdf`; returns both paths.

    Args:
        figure: the figure.
        stem: the path without its ending.

    Returns:
        Both paths.
    """
    doors.instance(figure, "figure", Figure, "a figure of matplotlib")
    stem = doors.place(stem, "stem")
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
