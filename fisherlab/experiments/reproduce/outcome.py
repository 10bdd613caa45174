"""Ours beside the paper's: the long table, the paper's own layout, and the verdict."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import pandas as pd
from scipy import stats

from fisherlab.experiments.reproduce.item import Item, Number, Order
from fisherlab.experiments.reproduce.quantities import QUANTITIES

REPRODUCED, DIFFERS, NOT, CANNOT = (
    "reproduced",
    "order differs",
    "not reproduced",
    "cannot be run here",
)
# Neither confirmed nor contradicted: one seed, or differences within their error.
UNDECIDED = "undecided"
# Of Welch's t between two arms (two-sided 95 %): two or three seeds make it wide.
LEVEL = 0.975
# Standard errors by which the paper's own numbers lie apart, and by which ours count as others.
SURE, FAR = 2.0, 3.0
# From where an order of methods says something, by the metric that a cell has: BLEU, the factor by
# which perplexity fell (counts of words alone reach 15 on Penn Treebank), the gain of accuracy.
TAUGHT = {"bleu": 5.0, "perplexity": 20.0, "accuracy": 0.15}
PAPER_REPEATS = {"tekfac": 3}


@dataclass(frozen=True)
class Outcome:
    """The outcome of an item: the long table, the verdict, and the reasons in one line."""

    table: pd.DataFrame
    verdict: str
    because: str


def measured(item: Item, rows: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """One row per cell and arm: ours with its deviation, the paper's, and their difference.

    `difference_se` is the difference over `sqrt(sd^2 / seeds + paper_sd^2 / paper_repeats)`: over
    our own standard error where the paper has no deviation, and empty where we have one seed.
    """
    quantity = QUANTITIES[item.quantity]
    found = []
    for cell, frame in rows.items():
        labels = dict.fromkeys([*frame["optimizer"], *frame.attrs.get("missing", {})])
        for arm in [label for label in labels if item.arms is None or label in item.arms]:
            mine = frame[frame["optimizer"] == arm]
            values = [quantity.of(r, frame) for _, r in mine.groupby("seed")]
            values = [value for value in values if not math.isnan(value)]
            known = item.reported.get(cell, {}).get(arm)
            found.append(_row(item, cell, arm, values, known, frame.attrs))
    return pd.DataFrame(found)


def _row(
    item: Item,
    cell: str,
    arm: str,
    values: list[float],
    known: Number | None,
    attrs: Mapping[Any, Any],
) -> dict[str, Any]:
    ours = pd.Series(values, dtype=float)
    n, mean, sd = len(ours), float(ours.mean()), float(ours.std())
    paper = known.mean if known else math.nan
    paper_sd = known.sd if known and known.sd is not None else math.nan
    theirs = 0.0 if math.isnan(paper_sd) else paper_sd**2 / PAPER_REPEATS.get(item.paper, 1)
    error = math.sqrt(sd**2 / max(n, 1) + theirs)
    return {
        "cell": cell,
        "arm": arm,
        "ours": mean,
        "ours_sd": sd,
        "seeds": n,
        "paper": paper,
        "paper_sd": paper_sd,
        "difference": mean - paper,
        "difference_se": (mean - paper) / error if error > 0 else math.nan,
        "lr": attrs.get("lr", {}).get(arm, math.nan),
        "note": attrs.get("missing", {}).get(arm, ""),
    }


def expected(item: Item, cells: list[str]) -> list[Order]:
    """The order of arms that the paper's numbers or its text claim, cell by cell."""
    higher = QUANTITIES[item.quantity].higher
    found = []
    for cell in cells:
        known = item.reported.get(cell, {})
        for one, two in combinations(known, 2):
            gap = known[one].mean - known[two].mean
            if gap and _apart(known[one], known[two], item.paper):
                better, worse = (one, two) if (gap > 0) == higher else (two, one)
                found.append(Order(better, worse, cell))
        found += [
            Order(order.better, order.worse, cell)
            for order in item.orders
            if order.cell in (None, cell)
        ]
    return found


def _apart(one: Number, two: Number, paper: str) -> bool:
    """Whether the paper's own deviations keep two of its numbers apart; so where it gives none."""
    if one.sd is None or two.sd is None:
        return True
    error = math.sqrt((one.sd**2 + two.sd**2) / PAPER_REPEATS.get(paper, 1))
    return abs(one.mean - two.mean) > SURE * error


def untaught(item: Item, rows: Mapping[str, pd.DataFrame]) -> list[str]:
    """The cells in which no method got far above the untrained net: an order there is noise."""
    if not QUANTITIES[item.quantity].learned:
        return []
    return [cell for cell, frame in rows.items() if not _taught(frame)]


def _taught(frame: pd.DataFrame) -> bool:
    """Whether a method of a cell learned something, by its own metric; yes where it has none."""
    found = [metric for metric in TAUGHT if metric in frame and frame[metric].notna().any()]
    if not found:
        return True
    values = frame.dropna(subset=found[:1]).groupby(["optimizer", "seed"])[found[0]]
    change, metric = TAUGHT[found[0]], found[0]
    if metric == "perplexity":
        gains = frame["perplexity"].iloc[0] / values.last()
    else:
        gains = values.last() - (values.first() if metric == "accuracy" else 0.0)
    return bool(gains.groupby("optimizer").mean().max() >= change)


def judged(
    item: Item,
    table: pd.DataFrame,
    scale: str,
    stand_ins: list[str],
    short: Collection[str] = (),
) -> Outcome:
    """The verdict on an item from its long table; orders in the cells of `short` are not asked."""
    cells = list(dict.fromkeys(table["cell"]))
    orders = expected(item, [cell for cell in cells if cell not in short])
    higher = QUANTITIES[item.quantity].higher
    rows = {(row.cell, row.arm): row for row in table.itertuples()}
    signs = []
    for order in orders:
        better = rows.get((order.cell, order.better))
        worse = rows.get((order.cell, order.worse))
        if better is not None and worse is not None:
            signs.append(_sign(better, worse, higher))
    agree = sum(sure and sign > 0 for sign, sure in signs)
    against = sum(sure and sign < 0 for sign, sure in signs)
    leaning = sum(sign > 0 for sign, _ in signs)
    far = table["difference_se"].abs() > FAR
    numbers = "" if scale != "paper" else f"; {int(far.sum())} numbers differ by over {FAR:g} s.e."
    if set(cells) <= set(short):
        verdict, because = UNDECIDED, "too short to judge: no method learned enough"
    elif not signs:
        verdict, because = UNDECIDED, "the paper claims no order among the arms run here"
    elif against and against >= agree:
        verdict, because = NOT, _pairs(agree, against, len(signs), leaning)
    elif against:
        verdict, because = DIFFERS, _pairs(agree, against, len(signs), leaning)
    elif agree == len(signs):
        verdict, because = REPRODUCED, f"the order of all {agree} pairs is the paper's{numbers}"
    else:
        verdict, because = UNDECIDED, _pairs(agree, against, len(signs), leaning)
    if short and not set(cells) <= set(short):
        because += f"; too short to judge: {', '.join(short)}"
    verdict += " on a stand-in" if stand_ins else ""
    return Outcome(table, verdict, because + ("" if scale == "paper" else f"; scale {scale}"))


def _pairs(agree: int, against: int, total: int, leaning: int) -> str:
    return (
        f"of {total} pairs that the paper orders, {agree} are so here (Welch's t, 95 %), "
        f"{against} are the other way round; the means alone agree in {leaning}"
    )


def _sign(better: Any, worse: Any, higher: bool) -> tuple[float, bool]:
    """`(+1 agreed, -1 against, 0 unknown; sure or not)`."""
    if better.note or worse.note:  # a seed of it diverged: the others say too little
        return 0.0, False
    gap = (better.ours - worse.ours) * (1 if higher else -1)
    if math.isnan(gap):
        return 0.0, False
    parts = [row.ours_sd**2 / max(1, row.seeds) for row in (better, worse)]
    if not sum(parts) > 0:  # one seed, or none
        return math.copysign(1.0, gap), False
    below = sum(p**2 / (r.seeds - 1) for p, r in zip(parts, (better, worse), strict=True))
    quantile = float(stats.t.ppf(LEVEL, sum(parts) ** 2 / below))
    return math.copysign(1.0, gap), abs(gap) > quantile * math.sqrt(sum(parts))


def laid_out(item: Item, table: pd.DataFrame) -> pd.DataFrame:
    """The paper's own layout: a row per arm, a column per cell, `ours +- sd (the paper's)`."""
    digits = QUANTITIES[item.quantity].digits
    wide: dict[str, dict[str, str]] = {}
    for row in table.itertuples():
        wide.setdefault(str(row.arm), {})[str(row.cell)] = _written(row, digits)
    frame = pd.DataFrame(wide).T.rename_axis("method").reset_index()
    return frame.fillna("–")


def _written(row: Any, digits: int) -> str:
    ours = "–" if math.isnan(row.ours) else f"{row.ours:.{digits}f}"
    if row.ours_sd == row.ours_sd:
        ours += f" ± {row.ours_sd:.{digits}f}"
    if row.paper != row.paper:
        return ours
    theirs = f"{row.paper:g}" + (f" ± {row.paper_sd:g}" if row.paper_sd == row.paper_sd else "")
    apart = f"; {row.difference_se:+.1f} s.e." if row.difference_se == row.difference_se else ""
    return f"{ours} (paper {theirs}{apart})"
