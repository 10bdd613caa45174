"""`support`: what FisherLab can do with a model, layer by layer, before running anything long."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fisherlab import doors
from fisherlab.blocks.factor import LARGEST_FACTOR
from fisherlab.distributed import unwrapped
from fisherlab.extract.api import Forward, call, check_forward
from fisherlab.extract.collect import NO_GRAPH
from fisherlab.extract.fisher import EXACT_UP_TO, exact_columns
from fisherlab.extract.geometry import CaptureError
from fisherlab.extract.isolation import isolated
from fisherlab.extract.outputs import output_of
from fisherlab.extract.select import (
    Weight,
    check_initialised,
    check_inputs,
    check_model,
    on_tape,
    weights_of,
)
from fisherlab.extract.tape import Tape, Use

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = [
    *("layer", "layer_type", "n_parameters", "status", "backend", "reason", "compare", "shape"),
    *("positions", "capture_bytes", "gram_multiplications", "estimated_seconds", "dense_bytes"),
    "diagonal_factors",
]


def support(model: nn.Module, x: object, *, forward: Forward | None = None) -> pd.DataFrame:
    """One row per weight: its status, the reason, and the cost of its block.

    Args:
        model: the model; it comes back untouched.
        x: one batch, as in `capture`.
        forward: `forward(model, x)` calls the model and may return anything; None: `model(x)`.

    Returns:
        A frame with the columns

        - layer, layer_type, n_parameters, backend, reason;
        - status: "exact", "tied" or "plain gradient";
        - compare: the Fisher type that `compare` takes by default for a criterion of known
          likelihood, or why it refuses the model as it stands;
        - shape `(o, i)` and positions;
        - capture_bytes: raw input and one backpropagated vector per example;
        - gram_multiplications: of the Gram matrix with one column per example;
        - estimated_seconds: the same at the rate of this machine;
        - dense_bytes: of the dense block, which is never formed;
        - diagonal_factors: the Kronecker factors too large for an optimizer, which keeps their
          diagonals.

    Raises:
        CaptureError: the model has uninitialised parameters, or the batch holds no tensor.

    Example:
        >>> import torch, fisherlab as fl
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        >>> table = fl.support(model, torch.randn(16, 4))
        >>> table[["layer", "status", "n_parameters"]].values.tolist()
        [['0', 'exact', 40], ['2', 'exact', 27]]
    """
    import pandas as pd

    model = unwrapped(model)
    check_forward(forward)
    check_inputs(x)
    check_initialised(model)
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
        with suppress(NotImplementedError):  # an exported program has one mode alone
            model.eval()
        tape = Tape(on_tape(weights), note)
        with tape:
            outputs = output_of(call(model, x, forward))
        examples, many = 0, False
        if isinstance(outputs, Tensor) and doors.is_strided(outputs) and outputs.ndim:
            examples, many = len(outputs), exact_columns(outputs) > EXACT_UP_TO
        elif not refused:
            refused = "refused: not one dense tensor of outputs; pass forward="
        kind = f"mc, 1 draw (more than {EXACT_UP_TO} outputs)" if many else "exact"
        rate = _multiplications_per_second(x)
        biases = {id(used.use.bias) for found in uses.values() for used in found}
        rows = []
        for name, weight in weights.items():
            if id(weight.tensor) in biases:
                continue
            row = _row(weight, uses.get(name, []), _reason(weight, tape), rate, examples)
            measured = row["status"] == "exact" and uses[name][0].use.kind == "map"
            rows.append(row | {"compare": refused or (kind if measured else "skipped")})
            reason = f"shares its weight with {name!r}"
            rows += [
                rows[-1] | {"layer": alias, "status": "tied", "reason": reason, "n_parameters": 0}
                for alias in weight.aliases
                if alias not in weights
            ]
        return pd.DataFrame(rows, columns=COLUMNS)


@dataclass(frozen=True)
class Used:
    """One use of a weight, and the sizes of its tensors."""

    use: Use
    outputs: int
    inputs: int
    rows: int
    itemsize: int


def _reason(weight: Weight, tape: Tape) -> str:
    """Why a weight has no block whatever its products are, or ""."""
    others = ", ".join(sorted(tape.others.get(weight.name, ())))
    if not weight.tensor.requires_grad:
        return "its weight is frozen"
    if weight.unfit:
        return weight.unfit
    if weight.name in tape.without_graph:
        return NO_GRAPH
    return f"it is used by {others}" if others else ""


def _row(
    weight: Weight, uses: list[Used], reason: str, rate: float, examples: int
) -> dict[str, object]:
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
    if reason or not uses:
        return row | {"reason": reason or "not called"}
    costs = _costs(uses, bias is not None, rate, examples)
    if weight.parameters:
        row["reason"] = "its weight is computed; optimizers take the parameters' plain gradient"
    return row | {"status": "exact", "backend": "hooks", **costs}


def _costs(uses: list[Used], bias: bool, rate: float, examples: int) -> dict[str, object]:
    geometry = uses[0].use.geometry
    o, i = geometry.out_features * geometry.groups, geometry.in_features + bias
    n, size = uses[0].rows, uses[0].itemsize
    width = geometry.width or o
    rows = sum(used.outputs for used in uses) // width
    # inside an attention the first axis may be the positions: the model's outputs tell n
    if examples and rows % examples == 0:
        n = examples
    t = max(1, rows // n)
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
            f"{side} side ({length})"
            for side, length in (("output", o), ("input", i))
            if length > LARGEST_FACTOR
        ),
    }


def _multiplications_per_second(x: object) -> float:
    """The rate of a 512 x 512 matrix product here and now."""
    device = x.device if isinstance(x, Tensor) and not x.is_meta else torch.device("cpu")
    probe = torch.ones(512, 512, device=device)
    probe @ probe
    start = time.perf_counter()
    for _ in range(4):
        result = probe @ probe
    result.sum().item()
    return 4 * 512**3 / (time.perf_counter() - start)
