"""The order of two approximations of a layer, paired by unseen example."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd
import torch

from fisherlab.metrics.population import FURTHER, NEARER, SAME, order

# Keys of a measured row: `||X||^2 - 2 <F_n, X>` of each unseen example, and what tells `||E F||^2`.
VALUES, NORMS = "unseen_values", "unseen_norms"
KEY = ["layer", "layer_type", "fisher_type", "seed", "step"]
COLUMNS = [*KEY, "approximation", "dtype", VALUES, NORMS]
ORDER = [*KEY, "approximation", "against", "difference", "low", "high", "verdict"]


def unseen_values(rows: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """The rows' values of unseen examples, once per layer and approximation."""
    kept = {
        (row["layer"], row["approximation"]): {name: row[name] for name in COLUMNS}
        for row in rows
        if row.get(VALUES)
    }
    return pd.DataFrame(list(kept.values()), columns=COLUMNS)


def paired(unseen: pd.DataFrame, pairs: Sequence[tuple[str, str]]) -> pd.DataFrame:
    """The orders of pairs of approximations, wherever both were measured."""
    rows = []
    for key, group in unseen.groupby(KEY, sort=False):
        known = {row["approximation"]: row for row in group.to_dict("records")}
        facts = dict(zip(KEY, key, strict=True))
        for first, second in pairs:
            if first in known and second in known:
                found = _order(known[first], known[second])
                rows.append({**facts, "approximation": first, "against": second, **found})
    return pd.DataFrame(rows, columns=ORDER)


def _order(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    x, y, norms = (
        torch.tensor(list(values), dtype=torch.float64, device="cpu")
        for values in (first[VALUES], second[VALUES], first[NORMS])
    )
    eps = torch.finfo(getattr(torch, first["dtype"])).eps
    found = order(x, y, norms, eps)
    ends = {"low": found.low, "high": found.high}
    return {"difference": found.value, **ends, "verdict": found.verdict}


def order_counts(orders: pd.DataFrame, step: int) -> pd.Series:
    """The order of each approximation to the nearest one, over the layers of a step."""
    texts = {}
    orders = orders[orders["step"] == step]
    for name, rows in orders.groupby("approximation"):
        counts = rows["verdict"].value_counts()
        resolved = sum(int(counts.get(verdict, 0)) for verdict in (NEARER, FURTHER, SAME))
        parts = [f"{counts[v]} {v}" for v in (FURTHER, NEARER, SAME) if counts.get(v, 0)]
        left = len(rows) - resolved
        parts += [f"{left} not resolved" if parts else "not resolved"] if left else []
        texts[str(name)] = ", ".join(parts)
    texts |= {str(name): "nearest" for name in orders["against"].unique()}
    return pd.Series(texts, name="order", dtype=object)
