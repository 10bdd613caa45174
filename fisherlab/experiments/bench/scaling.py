"""How time and memory grow: fitted exponents over parameters, batch size, positions and classes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from fisherlab import optim
from fisherlab.comparison import compare
from fisherlab.experiments.bench.compare import FIVE
from fisherlab.experiments.bench.machine import footprint
from fisherlab.experiments.bench.setting import Network, Setting, title
from fisherlab.experiments.bench.timing import Work, paired

METHODS = ("sgd", "ngd", "ngd_dense", "blockwise_ngd", "tengrad", "kfac", "compare")
LABELS = {
    "ngd": "exact NGD",
    "ngd_dense": "exact NGD, dense",
    "blockwise_ngd": "blockwise NGD, dense",
    "compare": "comparison",
}
DENSE = ("ngd_dense", "blockwise_ngd")


@dataclass(frozen=True)
class Fit:
    """`y ~ exp(intercept) x^exponent`, least squares in logarithms, with its standard error."""

    exponent: float
    error: float
    intercept: float


def fit(x: Sequence[float], y: Sequence[float]) -> Fit:
    """The power law through positive numbers; the standard error of two points is unknown (NaN)."""
    if len(x) != len(y) or len(set(x)) < 2:
        raise ValueError(f"a power law needs two sizes or more, got {list(x)}")
    if min(*x, *y) <= 0:
        raise ValueError("a power law needs positive numbers")
    u, v = np.log(np.asarray(x, float)), np.log(np.asarray(y, float))
    spread = u - u.mean()
    slope = float(spread @ v / (spread @ spread))
    rest = v - v.mean() - slope * spread
    free = len(u) - 2
    error = math.sqrt(rest @ rest / free / (spread @ spread)) if free else math.nan
    return Fit(slope, error, float(v.mean() - slope * u.mean()))


@dataclass(frozen=True)
class Axis:
    """One quantity that grows while the others stay: what builds the network of a size, and sizes.

    A dense block of N parameters takes N^3 operations: its sizes are smaller.
    """

    name: str
    build: Callable[[int, int], tuple[nn.Module, tuple[int, ...]]]
    sizes: tuple[int, ...]
    dense_sizes: tuple[int, ...]
    value: Callable[[nn.Module, int], float] = lambda model, size: size


def _wide(size: int, hidden: int) -> tuple[nn.Module, tuple[int, ...]]:
    return nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, 10)), (size,)


def _deep(size: int, hidden: int) -> tuple[nn.Module, tuple[int, ...]]:
    """Hidden layers of 20, as many as the size: NGM fig. 5."""
    layers = [part for _ in range(size) for part in (nn.Linear(20, 20), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(20, 10)), (20,)


def _small(size: int, hidden: int) -> tuple[nn.Module, tuple[int, ...]]:
    layers = nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 10)
    return nn.Sequential(*layers), (hidden,)


def _image(size: int, hidden: int) -> tuple[nn.Module, tuple[int, ...]]:
    side, channels = math.isqrt(size), hidden // 3
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)
    layers = nn.Conv2d(3, channels, 3, padding=1), nn.ReLU(), *head
    return nn.Sequential(*layers), (3, side, side)


def _many(size: int, hidden: int) -> tuple[nn.Module, tuple[int, ...]]:
    layers = nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, size)
    return nn.Sequential(*layers), (hidden,)


def _parameters(model: nn.Module, size: int) -> float:
    return sum(p.numel() for p in model.parameters())


AXES = (
    Axis("parameters", _wide, (64, 128, 256, 512, 1024), (12, 16, 24, 32, 44), _parameters),
    Axis("depth", _deep, (1, 2, 4, 8, 16), (1, 2, 3, 4, 6), _parameters),
    Axis("batch size", _small, (32, 64, 128, 256, 512), (32, 64, 128, 256, 512)),
    Axis("positions", _image, (64, 144, 256, 576, 1024), (64, 144, 256, 576, 1024)),
    Axis("classes", _many, (8, 16, 32, 64), (8, 16, 32, 64)),
)
QUICK = {
    "parameters": (4, 6, 8),
    "depth": (1, 2, 3),
    "batch size": (4, 8, 16),
    "positions": (16, 25, 36),
}
QUICK_CLASSES = (3, 4, 6)


def network(axis: Axis, size: int, setting: Setting) -> Network:
    """The network of one size, with its batch."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model, shape = axis.build(size, 6 if setting.quick else 24)
    examples = size if axis.name == "batch size" else 8 if setting.quick else 32
    classes = size if axis.name == "classes" else 10
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(examples, *shape, generator=generator).to(setting.device)
    y = torch.randint(classes, (examples,), generator=generator).to(setting.device)
    return Network(axis.name, model.to(setting.device), x, y)


def work(method: str, net: Network) -> Work:
    """A training step of an optimizer, every state refreshed, or a whole comparison."""
    if method == "compare":
        return lambda: compare(
            net.model, net.criterion, net.x, net.y, approximations=FIVE, fisher_type="exact"
        )
    options: dict[str, Any] = {"lr": 1e-6}
    if method == "kfac":
        options |= {"statistics_every": 1, "basis_every": 1}
    optimizer = optim.create(method, net.model, **options)

    def step() -> None:
        optimizer.zero_grad()
        net.criterion(net.model(net.x), net.y).backward()
        optimizer.step()

    return step


def run(
    setting: Setting, axes: Sequence[Axis] = AXES, methods: Sequence[str] = METHODS
) -> Iterator[dict[str, Any]]:
    """A record per method, axis and size, with the fitted exponents of the whole series on each.

    Operations and memory are counted, so their exponents do not depend on the machine; at small
    sizes the seconds are those of starting an operation.
    """
    for axis in axes:
        for method in methods:
            about = {"method": LABELS.get(method, method), "axis": axis.name}
            if not setting.takes(title(about)):
                continue
            series = [_point(axis, method, size, setting) for size in _sizes(axis, method, setting)]
            x = [point["value"] for point in series]
            fits = {
                key: fit(x, [max(point[key], 1e-12) for point in series])
                for key in ("seconds", "peak_bytes", "operations")
            }
            for point in series:
                for key, law in fits.items():
                    point[f"{key}_exponent"] = law.exponent
                    point[f"{key}_exponent_error"] = law.error
            yield from series


def _sizes(axis: Axis, method: str, setting: Setting) -> tuple[int, ...]:
    if setting.quick:
        return QUICK.get(axis.name, QUICK_CLASSES)
    return axis.dense_sizes if method in DENSE else axis.sizes


def _point(axis: Axis, method: str, size: int, setting: Setting) -> dict[str, Any]:
    net = network(axis, size, setting)
    value = axis.value(net.model, size)
    call = work(method, net)
    timing = paired(
        call,
        net.step,
        repeats=1 if setting.quick else setting.rounds,
        warm_up=0 if setting.quick else 1,
        device=setting.device,
        least=0.001 if setting.quick else 0.01,
    )
    count = footprint(call)
    return {
        "method": LABELS.get(method, method),
        "axis": axis.name,
        "size": size,
        "value": value,
        **timing.row(),
        "peak_bytes": count.peak,
        "operations": count.operations,
        "note": "",
    }
