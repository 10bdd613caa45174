"""One cell of the atlas: a model trained, and every approximation measured on unseen examples."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from fisherlab import approximations, metrics, whole
from fisherlab.approximations import Memo
from fisherlab.blocks import BlockError
from fisherlab.experiments.atlas.cells import STAGES, UNSEEN, Cell
from fisherlab.extract import Captures, LayerCapture, capture
from fisherlab.metrics.population import order

# Every cell measures these; others are added by name. Pairs are against the first.
BASE = "kfac"
FURTHER = ("kfac_reduce", "ekfac", "tkfac", "tekfac", "diagonal", "shampoo", "kronecker_optimal")
APPROXIMATIONS = (BASE, *FURTHER)
BATCH = 32


def wanted(names: Sequence[str] = ()) -> list[str]:
    """The approximations of the atlas and further ones by name.

    Raises:
        KeyError: a name is not registered; the message has the nearest.
    """
    for name in names:
        approximations.get(name)
    return list(dict.fromkeys([*APPROXIMATIONS, *names]))


def cell_file(folder: Path, cell: Cell, seed: int) -> Path:
    """Where the rows of a cell and a seed are."""
    return folder / f"{cell.name}-{cell.data}-seed{seed}.parquet"


def measured(cell: Cell, seed: int, names: Sequence[str]) -> Iterator[pd.DataFrame]:
    """The rows of each stage and setting of one cell, as soon as they are measured.

    `kfac_difference` is `(||X - E F||^2 - ||KFAC - E F||^2) / ||E F||^2`, paired by unseen example;
    negative: X is nearer.
    """
    x, y = cell.batches()
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(x), generator=generator)
    unseen, rest = rows[:UNSEEN], rows[UNSEEN:]
    facts = {"model": cell.name, "data": cell.data, "pooled": cell.pooled, "seed": seed}
    for stage, step, loss, model in trained(cell, seed, x[rest], y[rest], generator):
        for kind, size in cell.settings if stage == "end" else cell.settings[:1]:
            ours = rest[:size]
            draw = torch.Generator().manual_seed(seed)
            seen = _captured(model, x[ours], y[ours], kind, draw)
            others = _captured(model, x[unseen], y[unseen], kind, draw)
            more = {"stage": stage, "step": step, "loss": loss, "batch_size": size}
            found = [
                {**facts, **more, "fisher_type": kind, "layer": name, **row}
                for name in seen
                for row in layer_rows(seen[name], others[name], names, cell)
            ]
            yield pd.DataFrame(found)


def trained(
    cell: Cell, seed: int, x: Tensor, y: Tensor, generator: torch.Generator
) -> Iterator[tuple[str, int, float, nn.Module]]:
    """Stage, step, loss of the last steps, and the model, trained by AdamW, in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = cell.build().double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=cell.lr)
    criterion, losses = nn.CrossEntropyLoss(), [math.nan]
    stops = {round(share * cell.steps): stage for stage, share in STAGES.items()}
    for step in range(cell.steps + 1):
        if step in stops:
            model.eval()
            yield stops[step], step, sum(losses[-10:]) / len(losses[-10:]), model
            model.train()
        picked = torch.randint(len(x), (BATCH,), generator=generator)
        optimizer.zero_grad()
        loss = criterion(model(x[picked]), y[picked])
        loss.backward()
        optimizer.step()
        losses = [*losses[step == 0 :], float(loss.detach())]


def _captured(
    model: nn.Module, x: Tensor, y: Tensor, kind: str, generator: torch.Generator
) -> Captures:
    criterion = nn.CrossEntropyLoss()
    options: dict[str, Any] = {"fisher_type": kind, "kinds": ("map",)}
    return capture(model, criterion, x, y, generator=generator, **options)


def layer_rows(
    layer: LayerCapture, unseen: LayerCapture, names: Sequence[str], cell: Cell
) -> Iterator[dict[str, Any]]:
    """A row per approximation of one layer."""
    memo, reference = Memo([layer]), approximations.get("exact")()(unseen)
    exact = memo.block(approximations.get("exact")())
    base: metrics.PopulationEstimate | None = None
    for name in dict.fromkeys([BASE, *names]):
        facts = {
            "layer_type": layer.layer_type,
            "kind": kind_of(layer, cell),
            "positions": layer.positions,
            "n_parameters": exact.size,
            "approximation": name,
        }
        try:
            X = memo.block(approximations.get(name)())
            found = metrics.population_estimate(X, reference)
        except BlockError as error:
            yield {**facts, "note": str(error)}
            continue
        base = base or found
        paired = order(found.values, base.values, found.norms, torch.finfo(X.dtype).eps)
        yield {
            **facts,
            "relative_error": metrics.relative_error(X, exact).item(),
            "population_error": found.error.item(),
            "population_error_low": found.low.item(),
            "population_error_high": found.high.item(),
            "population_cosine": found.cosine.value,
            "population_cosine_low": found.cosine.low,
            "population_cosine_high": found.cosine.high,
            "population_trace_ratio": found.trace_ratio.value,
            "population_trace_ratio_low": found.trace_ratio.low,
            "population_trace_ratio_high": found.trace_ratio.high,
            "kfac_difference": paired.value,
            "kfac_difference_low": paired.low,
            "kfac_difference_high": paired.high,
            "against_kfac": paired.verdict,
            "note": found.reason,
        }


def kind_of(layer: LayerCapture, cell: Cell) -> str:
    """The kind of a layer: what it is part of, and over how many positions it is shared."""
    if layer.layer_type.startswith("Conv"):
        return "convolution"
    if "recurrent" in layer.name or (cell.name == "lstm" and ".input" in layer.name):
        return "recurrent"
    if layer.positions == 1:
        return "linear, one position"
    return "shared linear, pooled classifier" if cell.pooled else "shared linear, language model"


def kept(folder: Path, cell: Cell, seed: int, names: Sequence[str]) -> bool:
    """Measure a cell and write its file, unless the file has every approximation already.

    A file with fewer approximations is made anew with all of them, so that pairs share examples.
    """
    path, there = cell_file(folder, cell, seed), list[str]()
    if path.is_file():
        earlier = whole.read_table(path)
        if "approximation" not in earlier:
            raise whole.DamagedFile(f"{path} holds no rows of the atlas; move it away")
        there = list(earlier["approximation"].unique())
        if set(names) <= set(there):
            return False
    found = pd.concat(measured(cell, seed, [*names, *there]), ignore_index=True)
    numbers = found.select_dtypes("float64").columns
    found = found.astype(dict.fromkeys(numbers, "float32"))
    whole.write_table(path, found)
    return True
