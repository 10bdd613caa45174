"""Figures without training runs: schedules, Gram matrices, the split of a step's time."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from fisherlab import datasets, models, optim, plots
from fisherlab.experiments.reproduce.outcome import NOT, REPRODUCED, SECONDS, UNDECIDED, Outcome
from fisherlab.extract import capture
from fisherlab.metrics import gram_study
from fisherlab.optim.ang import CURVES

STRATEGIES = {"strategy1": "concave", "strategy2": "linear", "strategy3": "convex"}
POINTS = 51
# FNGD, figure 3: the batch, the steps before it, and the size of a step's batch.
BATCH, STEPS, STEP_BATCH = 128, 8, 32


def blending_schedules(stem: Path, scale: str) -> Outcome:
    """ANG fig. 2: lambda over the run for the three strategies."""
    curves = {
        label: [float(CURVES[shape](k / (POINTS - 1))) for k in range(POINTS)]
        for label, shape in STRATEGIES.items()
    }
    plots.save(plots.drawn_schedules(curves, "Three strategies for λ (ANG fig. 2)"), stem)
    middle = {label: values[POINTS // 2] for label, values in curves.items()}
    table = pd.DataFrame(
        [{"arm": label, "lambda_at_half": value} for label, value in middle.items()]
    )
    because = "the paper gives no formulas: concave, linear and convex curves of ours"
    return Outcome(table, UNDECIDED, because)


def gram_matrices(stem: Path, scale: str) -> Outcome:
    """FNGD fig. 3: the correlation matrices of the first two layers and the last two."""
    data = datasets.load("cifar10")
    x, y = data.train.tensors
    generator = torch.Generator().manual_seed(0)
    width = {"minutes": 0.5, "hours": 1.0, "paper": 1.0}[scale]
    model = models.create(
        "resnet32", input_size=data.card.input_shape, width=width, generator=generator
    )
    order = torch.randperm(len(y), generator=generator)
    held, rest = order[:BATCH], order[BATCH:]
    sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    criterion = nn.CrossEntropyLoss()
    for step in range(STEPS):
        batch = rest[step * STEP_BATCH :][:STEP_BATCH]
        sgd.zero_grad()
        criterion(model(x[batch]), y[batch]).backward()
        sgd.step()
    model.eval()
    # the paper's layers: a normalisation sees the examples as its convolution does
    layers = capture(model, criterion, x[held], y[held], fisher_type="empirical", kinds=("map",))
    study = gram_study(layers, y[held])
    names = study.layers
    plots.save(plots.gram_matrices(study, [names[0], names[1], names[-2], names[-1]]), stem)
    S = study.similarities
    rows = {
        "first two layers": S[0, 1],
        "last two layers": S[-2, -1],
        "first and last layer": S[0, -1],
        "adjacent layers, mean": study.adjacent,
        "other pairs, mean": study.apart,
    }
    table = pd.DataFrame(
        [{"arm": name, "similarity": float(value)} for name, value in rows.items()]
    )
    alike = min(S[0, 1], S[-2, -1]) > S[0, -1] and study.adjacent > study.apart
    because = "adjacent layers are more alike than the first and the last; a sixth of CIFAR-10"
    return Outcome(table, f"{REPRODUCED if alike else NOT} on a stand-in", because)


def time_split(stem: Path, scale: str) -> Outcome:
    """FNGD fig. 9: the processor's seconds of forward pass, backward pass and step, by method."""
    width = {"minutes": 0.25, "hours": 1.0, "paper": 1.0}[scale]
    rows = []
    for name in ("resnet32", "transformer"):
        make, x, y, criterion = _network(name, width)
        for method in ("sgd", "adamw", "fngd"):
            spent = _split(method, make(), x, y, criterion)
            rows.append({"cell": name, "arm": method, **spent})
    table = pd.DataFrame(rows)
    plots.save(plots.time_split(table, "Seconds of a step, by its parts (FNGD fig. 9)"), stem)
    wide = table.set_index(["cell", "arm"])
    ratios = ", ".join(
        f"{wide.loc[(c, 'fngd'), 'backward'] / wide.loc[(c, 'sgd'), 'backward']:.2f} on {c}"
        for c in ("resnet32", "transformer")
    )
    because = f"FNGD's backward pass over SGD's, below 1 in the paper: {ratios}; {SECONDS[True]}"
    return Outcome(table, UNDECIDED, f"{because}; scale {scale}")


def _network(name: str, width: float) -> tuple[Callable[[], nn.Module], Tensor, Tensor, nn.Module]:
    """A function that makes a network anew, a batch for it, and its criterion."""
    translation = name == "transformer"
    data = datasets.load("multi30k" if translation else "cifar10")
    ignored = data.card.ignore_index
    criterion = nn.CrossEntropyLoss(ignore_index=-100 if ignored is None else ignored)
    x, y = (tensor[: 16 if translation else 128] for tensor in data.train.tensors)
    options: dict[str, Any] = {"layers": 1} if translation else {}
    shape, outputs = data.card.input_shape, data.card.num_outputs

    def make() -> nn.Module:
        return models.create(name, num_classes=outputs, input_size=shape, width=width, **options)

    return make, x, y, criterion


def _split(
    method: str, model: nn.Module, x: Tensor, y: Tensor, criterion: nn.Module, steps: int = 6
) -> dict[str, float]:
    """Medians of the processor's seconds after the first three steps; FNGD in its second phase."""
    ours = {"coefficient_steps": 2, "criterion": criterion}
    options: dict[str, Any] = ours if method == "fngd" else {}
    optimizer = optim.create(method, model, lr=1e-6, **options)
    spent: dict[str, list[float]] = {"forward": [], "backward": [], "step": []}
    for step in range(steps + 3):
        optimizer.zero_grad()
        marks = [time.process_time()]
        loss = criterion(model(x), y)
        marks.append(time.process_time())
        loss.backward()
        marks.append(time.process_time())
        optimizer.step()
        marks.append(time.process_time())
        if step > 2:
            for part, (start, end) in zip(spent, pairwise(marks), strict=True):
                spent[part].append(end - start)
    return {part: median(values) for part, values in spent.items()}
