"""The cost of a training step relative to SGD's, each row held to the intervals it states.

Two training runs on models of equal architecture and the same batches alternate in slices of five
steps, one of SGD and one of the other optimizer, so that whatever else the machine does falls on
both; the ratio is that of their sums, the median over repeats. SGD against itself is measured the
same way and printed beside: it shows the noise. Slices and not single steps: memory that an
optimizer holds until its step is asked of the system anew by its next pass, and steps in strict
turn hide that (an SNGD that kept its gradients: 18,000 page faults a step in slices against SGD's
14,000, equal in turn).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from fisherlab import models, optim
from fisherlab.approximations import Approximation
from fisherlab.blocks import Block
from fisherlab.experiments.bench.setting import OURS, Setting, title
from fisherlab.optim.fngd import FNGD
from fisherlab.optim.natural_gradient import NaturalGradient

# a run under way, without the refreshes of its first steps
INTERVALS: dict[str, Any] = {"statistics_every": 10, "basis_every": 100, "warmup": 0}
EVERY_STEP: dict[str, Any] = {"statistics_every": 1, "basis_every": 1}
FEW: dict[str, Any] = {"statistics_examples": 32}
STATED = ("statistics_every", "basis_every", "statistics_examples")


@dataclass(frozen=True)
class Row:
    """One optimizer under stated intervals; `target` is the ratio to reach, if one was set."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    target: float | None = None
    label: str = ""

    @property
    def title(self) -> str:
        """The name of this row in the table."""
        return self.label or self.name


RESNET_ROWS = (
    Row("sgd", label="sgd (itself)"),
    Row("kfac", INTERVALS, 1.20),
    Row("kfac", INTERVALS | FEW, 1.06, "kfac, 32 examples"),
    Row("tkfac", INTERVALS, 1.20),
    Row("tkfac", INTERVALS | FEW, 1.06, "tkfac, 32 examples"),
    Row("ekfac", INTERVALS, 1.40),
    Row("ekfac", INTERVALS | FEW, 1.12, "ekfac, 32 examples"),
    Row("tekfac", INTERVALS, 1.40),
    Row("tekfac", INTERVALS | FEW, 1.12, "tekfac, 32 examples"),
    Row("eva", EVERY_STEP, 1.10),
    Row("eva", INTERVALS | {"basis_every": 10}, 1.01, "eva, T1 = 10"),
    Row("ifang", EVERY_STEP | {"total_steps": 10_000}, 1.10),
    Row("shampoo", INTERVALS, 1.02),
    Row("sngd", INTERVALS, 1.08),
    Row("fngd", {"coefficient_steps": 1}, 1.04, "fngd, second phase"),
    Row("tengrad", {}, 2.0),
)
MLP_ROWS = (
    Row("sgd", label="sgd (itself)"),
    Row("fngd", {"coefficient_steps": 1}, 1.04, "fngd, second phase"),
    Row("tengrad", {}, 1.5),
)


class Run:
    """One training run: a model, an optimizer, and its batches."""

    def __init__(self, build: Callable[[], nn.Module], row: Row, batches: list[Any]) -> None:
        self.model, self.batches = build(), batches
        self.optimizer = optim.create(row.name, self.model, **row.options)
        self.criterion = nn.CrossEntropyLoss()
        self.count = 0

    def step(self) -> None:
        """Zero, forward, backward, step."""
        x, y = self.batches[self.count % len(self.batches)]
        self.optimizer.zero_grad()
        self.criterion(self.model(x), y).backward()
        self.optimizer.step()
        self.count += 1

    def seconds(self, steps: int) -> float:
        """The time of some steps."""
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
        return time.perf_counter() - start


class Counter:
    """How often each state of an optimizer changed, to hold a row to its stated intervals."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.counts: dict[str, int] = {}
        if isinstance(optimizer, NaturalGradient):
            parts = optimizer.preconditioner.curvature.parts
            for part in parts.values():
                if part.running is not None:
                    for method in ("update", "refresh_basis", "correct"):
                        self._count(part.running, method)
            self.layers = len(parts)
            self._count_damped(optimizer.approximation)
        elif isinstance(optimizer, FNGD):
            self.layers = len(optimizer.weights)
            self._count(optimizer, "solve")

    def _add(self, name: str, number: int = 1) -> None:
        self.counts[name] = self.counts.get(name, 0) + number

    def _count(self, owner: object, method: str) -> None:
        inner = getattr(owner, method)

        def counted(*args: Any, **options: Any) -> Any:
            self._add(method)
            return inner(*args, **options)

        setattr(owner, method, counted)

    def _count_damped(self, approximation: Approximation) -> None:
        inner = approximation.damped_each

        def counted(blocks: Sequence[Block], dampings: Sequence[float]) -> list[Block]:
            self._add("damped", len(blocks))
            return inner(blocks, dampings)

        object.__setattr__(approximation, "damped_each", counted)  # which is frozen

    def per_layer(self) -> dict[str, float]:
        """The changes of each state, over the layers."""
        return {name: count / self.layers for name, count in self.counts.items()}


def expected_changes(row: Row, steps: int) -> dict[str, float]:
    """How often each state must have changed in `steps` steps from the first."""
    if row.name == "fngd":
        return {"solve": 0}  # the first phase lies before the measurement
    if "statistics_every" not in row.options or row.name == "shampoo":
        return {}
    statistics = -(-steps // row.options["statistics_every"])
    basis = -(-steps // row.options["basis_every"])
    if row.name in ("ekfac", "tekfac"):
        return {
            "update": statistics,
            "refresh_basis": basis,
            "correct": statistics,
            "damped": statistics,
        }
    return {"update": statistics, "damped": basis}


def measure(
    build: Callable[[], nn.Module],
    batches: list[tuple[Tensor, Tensor]],
    rows: tuple[Row, ...],
    *,
    steps: int = 100,
    repeats: int = 3,
    takes: Callable[[str, float], bool] = lambda title, seconds: True,
    late: Callable[[], bool] = lambda: False,
) -> Iterator[dict[str, Any]]:
    """One dict per row: the ratio to SGD, its spread, the intervals, and how often states changed.

    Each repeat is `steps` steps of the optimizer in slices that alternate with slices of SGD. A row
    that `takes` refuses is left out; none is repeated once it is `late`.
    Raises `AssertionError` where a state changed more or less often than the row says.
    """
    # at least one repeat: SGD beside something that is no faster
    seconds_of_sgd = 2 * steps * Run(build, Row("sgd"), batches).seconds(1)
    for row in rows:
        if not takes(row.title, seconds_of_sgd):
            continue
        ratios: list[float] = []
        seconds: list[float] = []
        while len(ratios) < repeats and not (ratios and late()):
            sgd, other = Run(build, Row("sgd"), batches), Run(build, row, batches)
            if row.name == "fngd":
                other.seconds(row.options["coefficient_steps"])
            counter = Counter(other.optimizer)
            pairs = [(sgd.seconds(5), other.seconds(5)) for _ in range(steps // 5)]
            ratios.append(sum(b for _, b in pairs) / sum(a for a, _ in pairs))
            seconds.append(sum(b for _, b in pairs) / steps)
            check_changes(row, counter, steps)
        yield {
            "optimizer": row.title,
            "ratio": median(ratios),
            "lowest": min(ratios),
            "highest": max(ratios),
            "target": row.target,
            "seconds_per_step": median(seconds),
            **{key: row.options.get(key) for key in (*INTERVALS, *FEW)},
            "threads": torch.get_num_threads(),
        }


def check_changes(row: Row, counter: Counter, steps: int) -> None:
    """Hold a row to its stated intervals."""
    expected, got = expected_changes(row, steps), counter.per_layer()
    wrong = {key: got.get(key, 0) for key, count in expected.items() if got.get(key, 0) != count}
    assert not wrong, f"{row.title} states {expected} changes per layer, got {got}"


def resnet20() -> nn.Module:
    """ResNet-20 on 3 x 32 x 32."""
    return models.create("resnet20", input_size=(3, 32, 32))


def mlp() -> nn.Module:
    """784-512-512-10."""
    return models.create("mlp", input_size=784, hidden=(512, 512))


def random_batches(shape: tuple[int, ...], size: int = 128, count: int = 8) -> list[Any]:
    """Noise and labels: what a step costs does not depend on them."""
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(size, *shape, generator=generator),
            torch.randint(0, 10, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def run(setting: Setting) -> Iterator[dict[str, Any]]:
    """The records of this part: ratios to SGD with momentum on ResNet-20 and on an MLP.

    Raises `AssertionError` where a state of an optimizer changed more or less often than its row
    states: a row cannot be fast by computing less than it says.
    """
    cases: list[tuple[str, Callable[[], nn.Module], tuple[int, ...], tuple[Row, ...]]]
    if setting.quick:
        cases = [("mlp", _tiny, (16,), RESNET_ROWS)]
        size, options = 8, {"steps": 10, "repeats": 1}
    else:
        cases = [
            ("resnet20", resnet20, (3, 32, 32), RESNET_ROWS),
            ("mlp", mlp, (784,), MLP_ROWS),
        ]
        size, options = 128, {"steps": 100, "repeats": setting.repeats or 3}
    for network, build, shape, rows in cases:
        batches = [
            (x.to(setting.device), y.to(setting.device)) for x, y in random_batches(shape, size)
        ]
        found = measure(
            partial(_placed, build, setting),
            batches,
            rows,
            takes=partial(_takes, network, setting),
            late=lambda: setting.late,
            **options,
        )
        yield from (_record(network, size, row, setting) for row in found)


def _placed(build: Callable[[], nn.Module], setting: Setting) -> nn.Module:
    return build().to(setting.device)


def _takes(network: str, setting: Setting, work: str, seconds: float) -> bool:
    return setting.takes(title({"network": network, "work": work, "by": OURS}), seconds)


def _tiny() -> nn.Module:
    return models.create("mlp", input_size=16, hidden=(16,))


def _record(network: str, size: int, row: dict[str, Any], setting: Setting) -> dict[str, Any]:
    reach = None if setting.quick else row["target"]
    return {
        "network": network,
        "work": row["optimizer"],
        "fisher_type": "",
        "by": OURS,
        "examples": size,
        "reach": reach,
        "ratio": row["ratio"],
        "lowest": row["lowest"],
        "highest": row["highest"],
        "of_reach": row["ratio"] / reach if reach else None,
        "seconds": row["seconds_per_step"],
        **{key: row.get(key) for key in STATED},
        "note": "",
    }
