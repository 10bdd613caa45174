"""The page of the atlas, from its rows alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import binom

from fisherlab import whole
from fisherlab.experiments.atlas.cells import CELLS, STAGES, UNSEEN
from fisherlab.experiments.atlas.measure import BASE

ENDS = ["population_error_low", "population_error_high"]
UNIT = ["model", "data", "seed"]
VALUE = "kfac_difference"
# networks from which the sign test has an interval of 95 %
ENOUGH = 6
FIRST_BATCH = 64
HEAD = f"""# Atlas: which approximation is nearest

Each number compares an approximation X, made of one batch, with the population's block `E F`, which
{UNSEEN} unseen examples tell, paired with KFAC's on the same layer and the same examples:

    difference = (||X - E F||^2 - ||KFAC - E F||^2) / ||E F||^2    (below 0: X is nearer)

It is known without a root, so that no approximation is left out because it is too near.

A number is the median over trained networks (model, data, seed) of each network's median over
layers, which share the network. From {ENOUGH} networks on its interval is the exact 95 % one, by
the sign test; of n fewer it is their range, which holds the median with probability `1 - 2^(1-n)`.
**Networks are few and small: no interval speaks of larger ones.**

`fisherlab atlas` measures the rows in `data/results/atlas/`, and goes on where it was stopped.
`fisherlab --import my.py atlas -a NAME` adds an approximation of your own.
`fisherlab atlas --page docs/atlas.md` writes this page.
"""


def load(folder: Path) -> pd.DataFrame:
    """All rows of a folder.

    Raises:
        FileNotFoundError: the folder holds none.
    """
    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no rows; `fisherlab atlas` measures them")
    return pd.concat([whole.read_table(path) for path in files], ignore_index=True)


def median_interval(rows: pd.DataFrame, column: str = VALUE) -> tuple[float, float, float, int]:
    """The median over the networks' medians, its interval by the sign test, and their number."""
    medians = np.sort(rows.groupby(UNIT)[column].median().dropna().to_numpy(float))
    if not len(medians):
        return math.nan, math.nan, math.nan, 0
    # below ENOUGH networks the interval of 95 % is wider than their range
    outside = max(int(binom.ppf(0.025, len(medians), 0.5)) - 1, 0)
    middle = float(np.median(medians))
    return middle, float(medians[outside]), float(medians[-1 - outside]), len(medians)


def markdown(rows: pd.DataFrame) -> str:
    """The page as Markdown."""
    parts = [HEAD, *_what(rows), *_finding(rows), *_nearest(rows)]
    parts += _axis(rows, "fisher_type", "Fisher type", rows["batch_size"] == FIRST_BATCH)
    parts += _axis(rows, "batch_size", "batch size", rows["fisher_type"] == "mc")
    return "\n".join(parts) + "\n"


def _what(rows: pd.DataFrame) -> Iterator[str]:
    yield "## What was measured\n"
    lines = []
    for cell in CELLS:
        here = rows[(rows["model"] == cell.name) & (rows["data"] == cell.data)]
        if len(here):
            final = here[here["stage"] == "end"]["loss"].median()
            lines.append(
                [
                    cell.name,
                    cell.data,
                    str(here["layer"].nunique()),
                    f"{cell.steps}",
                    f"{final:.2f}",
                    ", ".join(map(str, sorted(here["seed"].unique()))),
                ]
            )
    yield from _table(["model", "data", "layers", "steps", "last loss", "seeds"], lines)
    missing = [f"{c.name} on {c.data}" for c in CELLS if not _has(rows, c.name, c.data)]
    if missing:
        yield f"\nNot measured yet: {', '.join(missing)}.\n"
    without = rows[VALUE].isna().mean()
    stages = ", ".join(f"{name} ({share:.0%} of the steps)" for name, share in STAGES.items())
    yield (
        f"\n{len(rows):,} rows. Stages: {stages}. {without:.0%} of the differences are not known "
        "from so few unseen examples and count nowhere.\n"
    )


def _has(rows: pd.DataFrame, model: str, data: str) -> bool:
    return bool(((rows["model"] == model) & (rows["data"] == data)).any())


def _nearest(rows: pd.DataFrame) -> Iterator[str]:
    yield "## The nearest, by kind of layer and stage\n"
    yield (
        f"Monte Carlo Fisher, {FIRST_BATCH} examples. The nearest has the smallest median. Others "
        f"are resolved from it by {ENOUGH} networks or more, where the interval of the difference "
        "is above 0.\n"
    )
    main = rows[(rows["fisher_type"] == "mc") & (rows["batch_size"] == FIRST_BATCH)]
    lines = []
    for (kind, stage), group in _ordered(main):
        lines.append([kind, stage, *_verdict(group)])
    head = [
        "layers",
        "stage",
        "nearest",
        "difference and interval",
        "networks",
        "not resolved from it",
    ]
    yield from _table(head, lines)
    yield "\n## Difference from KFAC of every approximation\n"
    for kind, group in main.groupby("kind"):
        yield f"\n### {kind}\n"
        yield from _table(
            ["approximation", *STAGES],
            [
                [str(name), *(_number(part[part["stage"] == stage]) for stage in STAGES)]
                for name, part in group[group["approximation"] != BASE].groupby("approximation")
            ],
        )


def _ordered(rows: pd.DataFrame) -> Iterator[tuple[tuple[str, str], pd.DataFrame]]:
    for kind, group in rows.groupby("kind"):
        for stage in STAGES:
            part = group[group["stage"] == stage]
            if part[VALUE].notna().any():
                yield (str(kind), stage), part


def _verdict(group: pd.DataFrame) -> list[str]:
    medians = {str(n): median_interval(part)[0] for n, part in group.groupby("approximation")}
    known = {name: value for name, value in medians.items() if value == value}
    best = min(known, key=lambda name: known[name])
    wide = group.pivot_table(index=[*UNIT, "layer"], columns="approximation", values=VALUE)
    open_ = []
    for name in known:
        if name == best:
            continue
        difference = (wide[name] - wide[best]).rename(VALUE).reset_index()
        _, low, _, count = median_interval(difference)
        if not low > 0 or count < ENOUGH:
            open_.append(name)
    found = group[group["approximation"] == best]
    return [best, _number(found), str(median_interval(found)[3]), ", ".join(open_) or "none"]


def _number(rows: pd.DataFrame) -> str:
    value, low, high, count = median_interval(rows)
    if count < 2:
        return f"{value:+.2f}, one network" if count else "–"
    return f"{value:+.2f} ({low:+.2f} to {high:+.2f})"


def _axis(rows: pd.DataFrame, column: str, title: str, which: pd.Series) -> Iterator[str]:
    yield f"\n## By {title}\n"
    yield f"Difference from KFAC at the end of training, all kinds of layers, by {title}.\n"
    part = rows[which & (rows["approximation"] != BASE) & (rows["stage"] == "end")]
    values = sorted(part[column].unique())
    lines = [
        [str(name), *(_number(group[group[column] == value]) for value in values)]
        for name, group in part.groupby("approximation")
    ]
    yield from _table(["approximation", *map(str, values)], lines)


def _finding(rows: pd.DataFrame) -> Iterator[str]:
    """TKFAC against KFAC on pooled transformer classifiers, on unseen examples."""
    main = rows[(rows["kind"] == "shared linear, pooled classifier")]
    main = main[(main["fisher_type"] == "mc") & (main["batch_size"] == FIRST_BATCH)]
    if not len(main):
        return
    yield "## TKFAC and KFAC on pooled transformer classifiers\n"
    yield (
        "KFAC takes inputs and gradients of positions as independent; TKFAC's partial traces keep "
        "each `a_t` with its own `g_t`.\nSo A is weighed by `|g_t|^2`, which a class token needs, "
        "and summed over positions, which mean pooling needs: there `kfac_reduce` gains as well.\n"
    )
    lines = []
    for (model, data, stage), group in main.groupby(["model", "data", "stage"]):
        tkfac = group[group["approximation"] == "tkfac"]
        counts = tkfac["against_kfac"].value_counts()
        errors = group.groupby("approximation")[ENDS].median()
        lines.append(
            [
                f"{model} on {data}",
                str(stage),
                _error(errors, "kfac"),
                _error(errors, "tkfac"),
                _number(tkfac),
                *(str(counts.get(v, 0)) for v in ("nearer", "not resolved", "further")),
                str(tkfac["seed"].nunique()),
            ]
        )
    lines.sort(key=lambda line: (line[0], list(STAGES).index(line[1])))
    yield (
        "Layers are nearer, not resolved or further by the 95 % interval of their own unseen "
        "examples.\n"
    )
    head = ["network", "stage", "KFAC's error", "TKFAC's error", "difference and interval"]
    head += ["layers nearer", "not resolved", "further", "seeds"]
    yield from _table(head, lines)
    yield ""
    for stage in STAGES:
        for name in ("tkfac", "tekfac", "ekfac", "kfac_reduce"):
            part = main[(main["stage"] == stage) & (main["approximation"] == name)]
            _, low, high, count = median_interval(part)
            resolved = count >= ENOUGH and low * high > 0
            verdict = "resolved" if resolved else "not resolved"
            yield (
                f"* {stage}, {name}, over {count} pooled networks: difference {_number(part)}, "
                f"order to KFAC {verdict}"
            )
    yield (
        "\nThe networks have one attention block of 12 features and at most 28 positions; the "
        "intervals are over their seeds and data, and speak of no larger network.\n"
    )


def _error(errors: pd.DataFrame, name: str) -> str:
    low, high = errors.loc[name]
    return f"{low:.2f} to {high:.2f}"


def _table(head: list[str], lines: list[list[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"| {' | '.join('---' for _ in head)} |"
    yield from (f"| {' | '.join(line)} |" for line in lines)
