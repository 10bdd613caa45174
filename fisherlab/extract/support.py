"""`support`: what FisherLab can do with a model, layer by layer, before running anything long."""

from __future__ import annotations

import math
import time

import pandas as pd
import torch
from torch import Tensor, nn

from fisherlab.blocks.coordinates import LARGEST_FACTOR
from fisherlab.distributed import unwrapped
from fisherlab.extract.api import _forward
from fisherlab.extract.fisher import EXACT_UP_TO, exact_columns
from fisherlab.extract.isolation import isolated
from fisherlab.extract.layer import CaptureError
from fisherlab.extract.record import Record, recording
from fisherlab.extract.select import Choice, check_model, choices, select


def support(model: nn.Module, x: object) -> pd.DataFrame:
    """One row per module with parameters: its status, the reason, and what its block would cost.

    Columns: layer, layer_type, n_parameters, status ("exact", "tied", "plain gradient"), backend,
    reason, compare (what `compare` does with it by default: the Fisher type it takes for a
    criterion of known likelihood, or why it refuses the model as it stands), shape (o, i),
    positions, capture_bytes (raw input and one column of output gradients), gram_multiplications
    (of the Gram matrix with one column per example), estimated_seconds (those at the rate of this
    machine), dense_bytes (of the block nobody should form), diagonal_factors (the Kronecker factors
    too large for an optimizer, which keeps their diagonals).
    """
    model = unwrapped(model)
    try:
        check_model(model)
        refused = ""
    except CaptureError as error:
        refused = f"refused: {error}"
    with isolated(model, x):
        found = choices(model)
        modules = select(model, [c.name for c in found if c.status == "exact"])
        model.eval()
        with recording(modules, model) as record:
            outputs = _forward(model, x)
        many = exact_columns(outputs) > EXACT_UP_TO
        kind = f"mc, 1 draw (more than {EXACT_UP_TO} outputs)" if many else "exact"
        rate = _multiplications_per_second(x)
        return pd.DataFrame([_row(choice, record, rate, refused or kind) for choice in found])


def _row(choice: Choice, record: Record, rate: float, compared: str) -> dict[str, object]:
    parameters = list(choice.module.parameters(recurse=False))
    row: dict[str, object] = {
        "layer": choice.name,
        "layer_type": type(choice.module).__name__,
        "n_parameters": sum(p.numel() for p in parameters),
        "status": choice.status,
        "backend": "",
        "reason": choice.reason,
        "compare": compared if compared.startswith("refused") else "skipped",
    }
    if choice.status == "tied":
        return row | {"compare": compared}
    if choice.status != "exact":
        return row
    calls = record.calls.get(choice.name)
    if not calls:
        return row | {"status": "plain gradient", "reason": "not called"}
    row["compare"] = compared
    return row | {"backend": "hooks", **_costs(choice.module, calls, rate)}


def _costs(module: nn.Module, calls: list, rate: float) -> dict[str, object]:
    o, *rest = (int(length) for length in module.weight.shape)
    i = math.prod(rest) + (module.bias is not None)
    n = calls[0].raw_input.shape[0]
    t = sum(call.output.numel() // (n * o) for call in calls)
    size = calls[0].raw_input.element_size()
    pairs = (n * t) ** 2 * (o + i + 1)
    operations = min(pairs, n * t * o * i + n * n * o * i)
    return {
        "shape": (o, i),
        "positions": t,
        "capture_bytes": sum(c.raw_input.numel() + c.output.numel() for c in calls) * size,
        "gram_multiplications": operations,
        "estimated_seconds": operations / rate,
        "dense_bytes": (o * i) ** 2 * size,
        "diagonal_factors": ", ".join(
            f"{side} side ({rows})"
            for side, rows in (("output", o), ("input", i))
            if rows > LARGEST_FACTOR
        ),
    }


def _multiplications_per_second(x: object) -> float:
    """The rate of a 512 x 512 matrix product here and now."""
    device = x.device if isinstance(x, Tensor) else torch.device("cpu")
    probe = torch.ones(512, 512, device=device)
    probe @ probe
    start = time.perf_counter()
    for _ in range(4):
        result = probe @ probe
    result.sum().item()
    return 4 * 512**3 / (time.perf_counter() - start)
