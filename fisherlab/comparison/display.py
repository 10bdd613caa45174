"""Display in a notebook and by `print`: five columns first, all of them on demand."""

from __future__ import annotations

import html
import math
from math import prod

import pandas as pd

from fisherlab.extract import LayerCapture

ERRORS = ("relative_error", "population_error")  # 0 is best; of the others 1
FIRST = (*ERRORS, "trace_ratio", "cosine", "direction_cosine")
ORDER = "order"  # in words
# A value within this share of its column's best is as good.
EQUAL = 1e-6
LIGHT, DARK = (247, 251, 255), (8, 69, 148)
STYLE = """<style scoped>
.fl-table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.fl-table th, .fl-table td { padding: .15em .7em; text-align: right; }
.fl-table tbody th { text-align: left; font-weight: normal; }
</style>"""


def described(layer: LayerCapture) -> str:
    """A layer as a reader knows it: `Conv2d 16->32 3x3`."""
    geometry = layer.geometry
    conv = geometry.conv or geometry.transposed
    if geometry.transposed is not None or conv is None:
        into = geometry.in_features
    else:
        into = geometry.in_features // prod(conv.kernel) * geometry.groups
    text = f"{layer.layer_type} {into}->{geometry.out_features * geometry.groups}"
    return text if conv is None else f"{text} {'x'.join(map(str, conv.kernel))}"


def first_columns(summary: pd.DataFrame) -> list[str]:
    """Five columns that are read first, the leading error in front."""
    measures = [name for name in summary if not name.endswith(" known")]
    errors = [name for name in measures if name in ERRORS]
    others = [n for n in measures if n == ORDER or (n in FIRST and n not in ERRORS)]
    steps = [name for name in measures if name.startswith("direction_cosine")]
    return [*errors, *others, *steps[len(steps) // 2 :][:1]]


def best(name: str, values: pd.Series) -> list[bool]:
    """Which values of a column are the best: the least for errors, else the nearest to 1."""
    if name == ORDER:
        return [value == "nearest" for value in values]
    apart = values if "error" in name or "seconds" in name or "gap" in name else (values - 1).abs()
    apart = apart.where(apart.index != "exact")  # the reference of all
    return [bool(far <= apart.min() + EQUAL) for far in apart]


def table_html(caption: str, summary: pd.DataFrame) -> str:
    """The first columns as a table with a caption, and all of them behind a click."""
    first = first_columns(summary)
    shown = _rows(summary, first)
    every = _rows(summary, [name for name in summary if not name.endswith(" known")])
    more = f"<details><summary>all columns</summary>{every}</details>"
    return f"{STYLE}<p>{caption}</p>{shown}{more}"


def _rows(summary: pd.DataFrame, columns: list[str]) -> str:
    heads = "".join(f"<th>{html.escape(_title(name))}</th>" for name in columns)
    bold = {name: best(name, summary[name]) for name in columns}
    lines = []
    for k, name in enumerate(summary.index):
        cells = [_cell(summary, column, k, bold[column][k]) for column in columns]
        lines.append(f"<tr><th>{html.escape(str(name))}</th>{''.join(cells)}</tr>")
    return (
        f'<table class="fl-table"><thead><tr><th></th>{heads}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table>"
    )


def _title(name: str) -> str:
    return name.replace(" @ ", " @").replace("_", " ")


def _cell(summary: pd.DataFrame, column: str, row: int, bold: bool) -> str:
    if column == ORDER:
        text = html.escape(str(summary[column].iloc[row]))
        return f"<td>{f'<b>{text}</b>' if bold else text}</td>"
    value = float(summary[column].iloc[row])
    text = "–" if math.isnan(value) else f"{value:.3g}"
    if bold:
        text = f"<b>{text}</b>"
    known = f"{column} known"
    if known in summary and "0 of" not in (count := str(summary[known].iloc[row])):
        whole, _, every = count.partition(" of ")
        text += f" <small>({count})</small>" if whole != every else ""
    style = f' style="{shade(value)}"' if column in ERRORS and not math.isnan(value) else ""
    return f"<td{style}>{text}</td>"


def shade(error: float) -> str:
    """The colour of an error: white at 0, dark at 1 and above, which is no better than nothing."""
    share = min(max(error, 0.0), 1.0)
    mixed = (round(a + share * (b - a)) for a, b in zip(LIGHT, DARK, strict=True))
    ink = "#fff" if share > 0.72 else "#000"  # where both have a contrast of 4.5
    return f"background:rgb({','.join(map(str, mixed))});color:{ink}"
