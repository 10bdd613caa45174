"""`support`: what FisherLab can do with a model, layer by layer, before running anything long."""

from __future__ import annotations

import time
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor, nn

from fisherlab.blocks.coordinates import LARGEST_FACTOR
from fisherlab.distributed import unwrapped
from fisherlab.extract.api import _forward
from fisherlab.extract.fisher import EXACT_UP_TO, exact_columns
from fisherlab.extract.geometry import CaptureError
from fisherlab.extract.isolation import isolated
from fisherlab.extract.select import Weight, check_model, weights_of
from fisherlab.extract.tape import Tape, Use


def support(model: nn.Module, x: object) -> pd.DataFrame:
    """One row per weight: its status, the reason, and what its block would cost.

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
    uses: dict[str, list[Used]] = {}

    def note(use: Use, output: Tensor) -> Tensor:
        uses.setdefault(use.name, []).append(
            Used(use, output.numel(), use.product.x.numel(), len(output), output.element_size())
        )
        return output

    with isolated(model, x), nn.utils.parametrize.cached():
        weights = weights_of(model)
        model.eval()
        tape = Tape({name: weight.tensor for name, weight in weights.items()}, note)
        with tape:
            outputs = _forward(model, x)
        many = exact_columns(outputs) > EXACT_UP_TO
        kind = f"mc, 1 draw (more than {EXACT_UP_TO} outputs)" if many else "exact"
        rate = _multiplications_per_second(x)
        biases = {id(used.use.bias) for found in uses.values() for used in found}
        rows = []
        for name, weight in weights.items():
            if id(weight.tensor) in biases:
                continue
            row = _row(weight, uses.get(name, []), tape.others.get(name, set()), rate)
            measured = row["status"] == "exact" and uses[name][0].use.kind == "map"
            rows.append(row | {"compare": refused or (kind if measured else "skipped")})
            reason = f"shares its weight with {name!r}"
            rows += [
                rows[-1] | {"layer": alias, "status": "tied", "reason": reason, "n_parameters": 0}
                for alias in weight.aliases
                if alias not in weights
            ]
        return pd.DataFrame(rows)


@dataclass(frozen=True)
class Used:
    """One use of a weight, and the sizes of its tensors."""

    use: Use
    outputs: int
    inputs: int
    examples: int
    itemsize: int


def _row(weight: Weight, uses: list[Used], others: set[str], rate: float) -> dict[str, object]:
    bias = next((used.use.bias for used in uses if used.use.bias is not None), None)
    row: dict[str, object] = {
        "layer": weight.name,
        "layer_type": type(weight.module).__name__,
        "n_parameters": weight.tensor.numel() + (0 if bias is None else bias.numel()),
        "status": "plain gradient",
        "backend": "",
        "reason": "",
        "compare": "",
    }
    if not weight.tensor.requires_grad:
        return row | {"reason": "its weight is frozen"}
    if others or not uses:
        names = ", ".join(sorted(others))
        return row | {"reason": f"it is used by {names}" if others else "not called"}
    return row | {"status": "exact", "backend": "hooks", **_costs(uses, bias is not None, rate)}


def _costs(uses: list[Used], bias: bool, rate: float) -> dict[str, object]:
    geometry = uses[0].use.geometry
    o, i = geometry.out_features * geometry.groups, geometry.in_features + bias
    n, size = uses[0].examples, uses[0].itemsize
    width = geometry.width or o
    t = max(1, sum(used.outputs for used in uses) // (n * width))
    pairs = (n * t) ** 2 * (o + i + 1)
    operations = min(pairs, n * t * o * i + n * n * o * i)
    return {
        "shape": (o, i),
        "positions": t,
        "capture_bytes": sum(used.inputs + used.outputs for used in uses) * size,
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
