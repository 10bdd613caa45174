"""Cases of a real network on real data, at several steps of its training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fisherlab import datasets, models
from fisherlab.claims.base import Case, ClaimError
from fisherlab.claims.instances import PROBES, criterion_of, normal
from fisherlab.extract import capture

STEPS = (0, 20, 100)
EXAMPLES = 32
BATCH = 64
# Layers with more weights are left out: the dense sides would not fit.
LARGEST = 50_000


def real_cases(on: str, seed: int = 0, steps: tuple[int, ...] = STEPS) -> Iterator[Case]:
    """A case per step, layer and Fisher type of `dataset:model`, trained by SGD with momentum.

    The network is in float64 and, where it is looked at, in evaluation mode. Raises `ClaimError`
    for anything but one label, or one row of numbers, per example.
    """
    name, _, model_name = on.partition(":")
    if not name or not model_name:
        raise ClaimError(f"on is DATASET:MODEL, such as digits:mlp; got {on!r}")
    data = datasets.load(name)
    x, y = data.train.tensors
    if not x.is_floating_point() or (y.ndim > 1 and data.card.num_classes):
        raise ClaimError(f"{name!r} has no single label per example: the claims are about those")
    options: dict[str, Any] = {
        "num_classes": data.card.num_outputs,
        "input_size": tuple(data.card.input_shape),
    }
    generator = torch.Generator().manual_seed(seed)
    model = models.create(model_name, **options, generator=generator).double()
    criterion = "cross_entropy" if data.card.num_classes else "squared_error"
    base: Case = {"model": model_name, "options": options, "criterion": criterion, "on": on}
    rows = torch.randperm(len(x), generator=generator)
    base |= {"x": x[rows[:EXAMPLES]].double(), "y": _labels(y[rows[:EXAMPLES]])}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    done = 0
    for step in steps:
        while done < step:
            picked = torch.randint(len(x), (BATCH,), generator=generator)
            optimizer.zero_grad()
            loss = criterion_of(base, "mean")(model(x[picked].double()), _labels(y[picked]))
            loss.backward()
            optimizer.step()
            done += 1
        yield from _layers(model, {**base, "step": step}, generator)


def _labels(y: Tensor) -> Tensor:
    return y.double() if y.is_floating_point() else y


def _layers(model: nn.Module, base: Case, generator: torch.Generator) -> Iterator[Case]:
    model.eval()
    state = {key: value.detach().clone() for key, value in model.state_dict().items()}
    for kind in ("exact", "empirical"):
        arguments = (model, criterion_of(base), base["x"], base["y"])
        for name, layer in capture(*arguments, fisher_type=kind, kinds=("map",)).items():
            o, i = layer.shape
            if o * i > LARGEST or ":" in name:
                continue
            mean = layer.output_gradients.square().sum() * layer.inputs.square().sum()
            yield {
                **base,
                "state": state,
                "layer": name,
                "fisher_type": kind,
                "a": layer.inputs,
                "g": layer.output_gradients,
                # a hundredth of the mean eigenvalue, or so
                "damping": max(1e-2 * mean.item() / (EXAMPLES**2 * o * i), 1e-8),
                "V": normal(generator, PROBES, o, i),
            }
    model.train()
