"""The finding of a run, in a sentence or two: the first lines of its page."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from fisherlab.comparison import Comparison

# Two methods whose errors differ by less than this share are one here.
EQUAL = 1e-6


def nearest(table: Comparison) -> list[str]:
    """The nearest method per layer at the last step: in sample, and on held-out examples."""
    frame = table.frame[table.frame["step"] == table.frame["step"].max()]
    frame = frame[frame["approximation"] != "exact"]
    frame = frame.drop_duplicates(["layer", "approximation", "seed"])
    found = [
        _nearest(frame, column, where)
        for column, where in (
            ("relative_error", "On the batch itself"),
            ("population_error", "On held-out examples"),
        )
    ]
    return [sentence for sentence in found if sentence]


def _nearest(frame: pd.DataFrame, column: str, where: str) -> str:
    wide = frame.pivot_table(index="layer", columns="approximation", values=column)
    wide = wide.dropna(how="all")
    if not wide.size:
        return ""
    least = wide.min(axis=1)
    wins = wide.le(least * (1 + EQUAL), axis=0).sum().sort_values(ascending=False, kind="stable")
    name, count = str(wins.index[0]), int(wins.iloc[0])
    every = len(wide)
    split = every > 1 and 2 * count <= every
    if split:
        name = str(wide.median().idxmin())
    alike = [
        str(other)
        for other in wide
        if np.allclose(wide[other], wide[name], rtol=EQUAL, atol=0, equal_nan=True)
    ]
    several = len(alike) > 1
    if split:
        text = f"{where}, no method is nearest in most of the {every} layers; {series(alike)} "
        text += f"{'have' if several else 'has'} the least median error, {wide[name].median():.3g}"
    else:
        layers = "the only layer" if every == 1 else f"{count} of {every} layers"
        text = f"{where}, {series(alike)} {'are' if several else 'is'} nearest in {layers}"
        text += f", with a median error of {wide[name].median():.3g}"
    mine = frame[(frame["approximation"] == name) & frame[column].notna()]
    low, high = (f"{column}_{end}" for end in ("low", "high"))
    if low in mine and mine[low].notna().all() and np.isfinite(mine[high]).all():
        ends = mine[low].median(), mine[high].median()
        text += f" (95 % intervals: {ends[0]:.3g} to {ends[1]:.3g}"
        medians = wide.median().drop(alike)
        inside = [str(m) for m in medians[medians.between(*ends)].sort_values().index]
        text += f", which hold {series(inside[:3])} as well)" if inside else ")"
    return f"{text}."


def series(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def best_optimizer(summary: pd.DataFrame, metric: str) -> list[str]:
    """Which optimizer has the best metric at the end, and what a step of it costs."""
    known = summary.dropna(subset=["final"]) if "final" in summary else summary.head(0)
    if not len(known):
        return ["No optimizer came to its end."]
    first = known.iloc[0]
    spread = f" ± {first['final_sd']:.1g}" if first["final_sd"] == first["final_sd"] else ""
    text = f"{first['optimizer']} ends best, with {metric} {first['final']:.4g}{spread}"
    if len(known) > 1:
        second = known.iloc[1]
        text += f"; next is {second['optimizer']} with {second['final']:.4g}"
        apart, noise = abs(first["final"] - second["final"]), first["final_sd"] + second["final_sd"]
        if noise != noise:
            text += ", from one seed each"
        elif apart <= noise:
            text += ", within the spread of the seeds"
    found = [f"{text}."]
    if first["ratio_to_sgd"] == first["ratio_to_sgd"]:
        found.append(f"Its step takes {first['ratio_to_sgd']:.3g} times as long as SGD's.")
    return found
