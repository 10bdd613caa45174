"""Errors against the batch size, in sample and on the examples of a whole data set."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from fisherlab import approximations as registry
from fisherlab import metrics
from fisherlab.approximations import Approximation, Memo
from fisherlab.approximations.exact import Exact
from fisherlab.blocks import Block, BlockError
from fisherlab.blocks.direct_sum import layer_block
from fisherlab.comparison import default_fisher_type
from fisherlab.comparison.measurement import population_columns
from fisherlab.extract import Captures, LayerCapture
from fisherlab.extract.api import Forward, split_batches
from fisherlab.extract.memory import captures_in_parts, check_memory

SIZES = (8, 16, 32, 64, 128)
NAMES = ("kfac", "ekfac", "tkfac", "tekfac", "diagonal")


def error_curve(
    model: nn.Module,
    criterion: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    *,
    reference: object = None,
    sizes: Sequence[int] = SIZES,
    approximations: Iterable[str | Approximation] = NAMES,
    repeats: int = 3,
    fisher_type: str | None = None,
    generator: torch.Generator | None = None,
    memory: int | None = None,
    layers: Iterable[str] | None = None,
    forward: Forward | None = None,
) -> pd.DataFrame:
    """`||X_n - F_n|| / ||F_n||` and `||X_n - E F|| / ||E F||` of batches of n examples, n growing.

    Each approximation is built of `repeats` batches per size, drawn from `x, y` without
    replacement. `reference` holds the population's examples: `(x, y)` or a loader over a whole data
    set. None: a random half of `x, y` is put aside for it. Only the reference's captures are kept,
    one layer of them at a time in the weight-sharing form, and no Gram matrix of them is.

    One row per layer, approximation, size (`examples`) and `seed`, as
    `fl.plots.in_sample_against_population` draws it.
    """
    generator = generator or torch.Generator().manual_seed(0)
    makers = _makers(approximations)
    order = torch.randperm(len(y), generator=generator)
    if reference is None:
        aside, order = order[: len(y) // 2], order[len(y) // 2 :]
        reference = (x[aside], y[aside])
    sizes = sorted(set(sizes))
    if not sizes or sizes[0] < 1 or sizes[-1] > len(order):
        raise ValueError(
            f"sizes run from 1 to the {len(order)} examples that batches are drawn from, got "
            f"{sizes}; pass fewer, or `reference=` to draw from all of x"
        )
    kind = fisher_type or default_fisher_type(model, criterion, x[:1], forward)
    options: dict[str, Any] = {"fisher_type": kind, "layers": layers, "forward": forward}
    options["generator"] = generator

    def captured(batches: Iterable[tuple[object, Tensor]]) -> list[Captures]:
        parts = [captures_in_parts(model, criterion, *batch, **options) for batch in batches]
        return [part for batch in parts for part in batch]

    population = captured(split_batches(reference))
    check_memory(population[0], memory)
    drawn: dict[tuple[int, int], list[Captures]] = {}
    for seed in range(repeats):
        for size in sizes:
            chosen = order[torch.randperm(len(order), generator=generator)[:size]]
            drawn[size, seed] = captured([(x[chosen], y[chosen])])
    rows: list[dict[str, Any]] = []
    for name in dict.fromkeys(layer.name for layer in population[0].values()):
        keys = [key for key, layer in population[0].items() if layer.name == name]
        F = layer_block([Exact()(*(part[key] for part in population)) for key in keys])
        whole = {
            "layer": name,
            "layer_type": population[0][keys[0]].layer_type,
            "n_parameters": F.size,
            "fisher_type": kind,
            "reference_examples": sum(len(part.labels) for part in population),
            "diagonal_share": metrics.diagonal_share(F).item(),
        }
        for (size, seed), parts in drawn.items():
            batch = [[part[key] for part in parts] for key in keys]
            for row in _errors(batch, makers, F, memory):
                rows.append({**whole, "examples": size, "seed": seed, **row})
    return pd.DataFrame(rows)


def _errors(
    batch: list[list[LayerCapture]],
    makers: dict[str, Approximation],
    population: Block,
    memory: int | None,
) -> Iterator[dict[str, Any]]:
    memos = [Memo(parts, memory) for parts in batch]
    F = layer_block([memo.block(Exact()) for memo in memos])
    for name, maker in makers.items():
        row: dict[str, Any] = {"approximation": name, "relative_error": math.nan}
        row |= {**population_columns(F, None)[0], "note": ""}
        try:
            X = layer_block([memo.block(maker) for memo in memos])
            found, reason = population_columns(X, population)
            row["relative_error"] = metrics.relative_error(X, F).item()
            row |= {**found, "note": reason}
        except BlockError as refusal:
            row["note"] = str(refusal)
        yield row


def _makers(approximations: Iterable[str | Approximation]) -> dict[str, Approximation]:
    found = [registry.get(a)() if isinstance(a, str) else a for a in approximations]
    return {maker.name or repr(maker): maker for maker in found}
