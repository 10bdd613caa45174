"""`support`: what FisherLab can do with a model, layer by layer, before running anything long."""

from __future__ import annotations

import math
import time

import pandas as pd
import torch
from torch import Tensor, nn

from fisherlab.blocks.coordinates import LARGEST_FACTOR
from fisherlab.distributed import unwrapped
from fisherlab.extract.api import _forward, _isolated
from fisherlab.extract.record import recording
from fisherlab.extract.select import choices, select


def support(model: nn.Module, x: object) -> pd.DataFrame:
    """One row per module with parameters: its status, the reason, and what its block would cost.

    Columns: layer, layer_type, n_parameters, status ("exact", "tied", "plain gradient"), backend,
    reason, shape (o, i), positions, capture_bytes (raw input and one column of output gradients),
    gram_multiplications (of the Gram matrix with one column per example), estimated_seconds (those
    at the rate of this machine), dense_bytes (of the block nobody should form), diagonal_factors
    (the Kronecker factors too large for an optimizer, which keeps their diagonals).
    """
    model = unwrapped(model)
    modules = select(model, [c.name for c in choices(model) if c.status == "exact"])
    training = model.training
    try:
        model.eval()
        with _isolated(x), recording(modules, model) as record:
            _forward(model, x)
    finally:
        model.train(training)
    rate = _multiplications_per_second(x)
    rows = []
    for choice in choices(model):
        parameters = list(choice.module.parameters(recurse=False))
        row = {
            "layer": choice.name,
            "layer_type": type(choice.module).__name__,
            "n_parameters": sum(p.numel() for p in parameters),
            "status": choice.status,
            "backend": "",
            "reason": choice.reason,
        }
        if choice.status == "exact":
            calls = record.calls.get(choice.name)
            row |= (
                {"status": "plain gradient", "reason": "not called"}
                if not calls
                else {
                    "backend": "hooks",
                    **_costs(choice.module, calls, rate),
                }
            )
        rows.append(row)
    return pd.DataFrame(rows)


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
