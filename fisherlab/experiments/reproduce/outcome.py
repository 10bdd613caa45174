"""Ours beside the paper's: the long table, the paper's own layout, and the verdict."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from fisherlab.experiments.reproduce.item import Item, Number, Order
from fisherlab.experiments.reproduce.quantities import QUANTITIES, Quantity, by_processor, seconds

REPRODUCED, DIFFERS, NOT, CANNOT = (
    "reproduced",
    "order differs",
    "not reproduced",
    "cannot be run here",
)
# Neither confirmed nor contradicted: one seed, or differences within their error.
UNDECIDED = "undecided"
# Level of Welch's t between two arms (two-sided 95 %): two or three seeds make it wide.
LEVEL = 0.975
# Standard errors by which the paper's own numbers lie apart, and by which ours count as others.
SURE, FAR = 2.0, 3.0
# From where an order of methods says something, by the metric that a cell has: BLEU, the factor by
# which perplexity fell (counts of words alone reach 15 on Penn Treebank), the gain of accuracy.
TAUGHT = {"bleu": 5.0, "perplexity": 20.0, "accuracy": 0.15}
PAPER_REPEATS = {"tekfac": 3}
# Where a verdict compares seconds, by whether the processor counted them.
SECONDS = {
    True: "seconds of the processor, in one process",
    False: "one clock measured the seconds, and whatever else the machine did is in them",
}


@dataclass(frozen=True)
class Outcome:
    """The outcome of an item: the long table, the verdict, and the reasons in one line.

    `at_equal_time` is the verdict on the same orders after the seconds of the fastest arm, with its
    reasons; "" where there is none.
    """

    table: pd.DataFrame
    verdict: str
    because: str
    at_equal_time: str = ""


def measured(item: Item, rows: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """One row per cell and arm: ours with its deviation, the paper's, and their difference.

    `difference_se` is the difference over `sqrt(sd^2 / seeds + paper_sd^2 / paper_repeats)`: over
    our own standard error where the paper has no deviation, and empty where we have one seed.
    `at_equal_time` is ours at the seconds that the fastest arm took for all of its epochs.
    A control follows its arm, and changes no number of another.
    """
    quantity = QUANTITIES[item.quantity]
    found = []
    for cell, frame in rows.items():
        controls = frame.attrs.get("controls", {})
        asked = without_controls(frame)
        time, budget = seconds(frame, "train_seconds"), _budget(asked, item)
        labels = dict.fromkeys([*frame["optimizer"], *frame.attrs.get("missing", {})])
        for arm in [k for k in labels if item.arms is None or controls.get(k, k) in item.arms]:
            runs = [r for _, r in frame[frame["optimizer"] == arm].groupby("seed")]
            values = [quantity.of(r, asked) for r in runs]
            values = [value for value in values if not math.isnan(value)]
            known = item.reported.get(cell, {}).get(arm)
            row = _row(item, cell, arm, values, known, frame.attrs)
            equal = pd.Series(dtype=float)
            if quantity.learned and not quantity.timed and budget == budget:
                equal = pd.Series([_at(budget, r, time, quantity, asked) for r in runs])
            mine = [float(r[time].iloc[-1]) for r in runs] if time in frame else []
            found.append(
                row
                | {
                    "seconds": sum(mine) / len(mine) if mine else math.nan,
                    "at_equal_time": equal.mean(skipna=False) if len(equal) else math.nan,
                    "at_equal_time_sd": equal.std(skipna=False) if len(equal) else math.nan,
                    "control_of": controls.get(arm, ""),
                }
            )
    return pd.DataFrame(found)


def clock(rows: Mapping[str, pd.DataFrame]) -> str:
    """The words on how the seconds of an item were measured."""
    return SECONDS[all(by_processor(frame) for frame in rows.values())]


def _at(
    budget: float, rows: pd.DataFrame, time: str, quantity: Quantity, cell: pd.DataFrame
) -> float:
    """The quantity of a run after so many seconds: on the line between the epochs around them."""
    seconds = rows[time].fillna(0.0).to_numpy(float)
    values = np.array([quantity.of(rows[: k + 1], cell) for k in range(len(rows))])
    known = ~np.isnan(values)  # no training loss is known before the first epoch
    if not known.any() or budget < seconds[known][0]:
        return math.nan
    return float(np.interp(budget, seconds[known], values[known]))


def without_controls(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of the paper's own arms."""
    return frame[~frame["optimizer"].isin(frame.attrs.get("controls", {}))]


def _budget(frame: pd.DataFrame, item: Item) -> float:
    """The seconds of the fastest of an item's arms for all of its epochs, in its slowest seed."""
    time = seconds(frame, "train_seconds")
    if time not in frame or not len(frame):
        return math.nan
    mine = frame if item.arms is None else frame[frame["optimizer"].isin(item.arms)]
    return float(mine.groupby("optimizer")[time].max().min())


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
    return [cell for cell, frame in rows.items() if not _taught(without_controls(frame))]


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
    clock: str = "",
) -> Outcome:
    """The verdict on an item from its long table; orders in the cells of `short` are not asked.

    `clock` says how the seconds were measured that a verdict compares.
    """
    quantity = QUANTITIES[item.quantity]
    cells = list(dict.fromkeys(table["cell"]))
    orders = expected(item, [cell for cell in cells if cell not in short])
    asked = _verdict(table, orders, quantity.higher)
    if set(cells) <= set(short):
        asked = UNDECIDED, "too short to judge: no method learned enough"
    verdict, because = asked
    far = table["difference_se"].abs() > FAR
    if verdict == REPRODUCED and scale == "paper":
        because += f"; {int(far.sum())} numbers differ by over {FAR:g} s.e."
    if short and not set(cells) <= set(short):
        because += f"; too short to judge: {', '.join(short)}"
    because += f"; {clock}" if quantity.timed and clock else ""
    because += "" if scale == "paper" else f"; scale {scale}"
    verdict += " on a stand-in" if stand_ins else ""
    return Outcome(table, verdict, because, _at_equal_time(table, orders, quantity.higher, clock))


def _at_equal_time(table: pd.DataFrame, orders: list[Order], higher: bool, clock: str) -> str:
    """The verdict on the same orders after equal seconds; "" where there is none."""
    if not orders or not has_equal_time(table):
        return ""
    equal = table.assign(ours=table["at_equal_time"], ours_sd=table["at_equal_time_sd"])
    verdict, because = _verdict(equal, orders, higher)
    return f"{verdict}: {because}" + (f"; {clock}" if clock else "")


def _verdict(table: pd.DataFrame, orders: list[Order], higher: bool) -> tuple[str, str]:
    """The verdict on the orders of arms, and the reason."""
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
    if not signs:
        return UNDECIDED, "the paper claims no order among the arms run here"
    if agree == len(signs):
        return REPRODUCED, f"the order of all {agree} pairs is the paper's"
    verdict = NOT if against and against >= agree else DIFFERS if against else UNDECIDED
    return verdict, _pairs(agree, against, len(signs), leaning)


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


def laid_out(item: Item, table: pd.DataFrame, value: str = "ours") -> pd.DataFrame:
    """The paper's own layout: a row per arm, a column per cell, `ours +- sd (the paper's)`.

    `value` "at_equal_time" is ours after the seconds of the fastest arm, without the paper's.
    """
    digits = QUANTITIES[item.quantity].digits
    wide: dict[str, dict[str, str]] = {}
    for row in table.to_dict("records"):
        said = _spread(row[value], row[f"{value}_sd"], digits)
        theirs = _theirs(row) if value == "ours" else ""
        wide.setdefault(str(row["arm"]), {})[str(row["cell"])] = f"{said}{theirs}"
    frame = pd.DataFrame(wide).T.rename_axis("method").reset_index()
    return frame.fillna("–")


def has_equal_time(table: pd.DataFrame) -> bool:
    """Whether a table knows what its arms had after equal seconds."""
    return "at_equal_time" in table and bool(table["at_equal_time"].notna().any())


def _spread(mean: float, sd: float, digits: int) -> str:
    said = "–" if math.isnan(mean) else f"{mean:.{digits}f}"
    return said if math.isnan(sd) else f"{said} ± {sd:.{digits}f}"


def _theirs(row: Mapping[Any, Any]) -> str:
    """` (paper 90 ± 0.1; -2.0 s.e.)`; "" where the paper has no number."""
    paper, sd, apart = row["paper"], row["paper_sd"], row["difference_se"]
    if math.isnan(paper):
        return ""
    said = f"{paper:g}" + ("" if math.isnan(sd) else f" ± {sd:g}")
    return f" (paper {said}" + ("" if math.isnan(apart) else f"; {apart:+.1f} s.e.") + ")"
