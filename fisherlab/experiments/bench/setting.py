"""The networks and the batch of the bench, a row of its table, and the loop that fills it."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fisherlab import models
from fisherlab.experiments.bench.machine import Machine, footprint, limits
from fisherlab.experiments.bench.timing import Timing, Work, paired

OURS = "fisherlab"
IMAGE = (3, 32, 32)


@dataclass(frozen=True)
class Network:
    """A model with its batch; `step` is the ordinary forward and backward that everything costs."""

    name: str
    model: nn.Module
    x: Tensor
    y: Tensor
    criterion: nn.Module = field(default_factory=nn.CrossEntropyLoss)

    def step(self) -> None:
        """One forward and backward."""
        self.model.zero_grad()
        self.criterion(self.model(self.x), self.y).backward()

    @cached_property
    def gradients(self) -> dict[str, Tensor]:
        """The gradient of each layer, `[o, i]`, the bias as last column: what gets multiplied."""
        self.step()
        found = {}
        for name, module in self.model.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d) and module.weight.grad is not None:
                columns = [module.weight.grad.flatten(1)]
                if module.bias is not None:
                    assert module.bias.grad is not None
                    columns.append(module.bias.grad[:, None])
                found[name] = torch.cat(columns, 1)
        return found


@dataclass
class Setting:
    """Where and how long is measured; `quick` is a small batch of small models, to try it out."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    quick: bool = False
    peers: bool = True
    repeats: int | None = None
    progress: Callable[[str], None] = lambda title: None
    # rows that were measured before, by their titles, and those that there was no time for
    done: set[str] = field(default_factory=set)
    left: list[str] = field(default_factory=list)
    # when the part at hand has to end, by `time.monotonic`
    until: float = math.inf
    _begun: float | None = None
    _slowest: float = 0.0

    def part(self, until: float) -> None:
        """Begin a part, which has to end by then."""
        self.until, self._begun, self._slowest = until, None, 0.0

    def takes(self, title: str, seconds: float = 0.0) -> bool:
        """Whether a row is to be measured: it is not done, and would end in time.

        It is expected to take as long as the slowest row before it, and at least `seconds`. Without
        given seconds nothing is known about the first row of a part: it is measured.
        """
        now = time.monotonic()
        if self._begun is not None:
            self._slowest = max(self._slowest, now - self._begun)
        if title in self.done:
            return False
        expected = max(self._slowest, seconds)
        if expected and now + expected > self.until:
            self.left.append(title)
            return False
        self._begun = now
        self.progress(title)
        return True

    @property
    def late(self) -> bool:
        """Whether the part at hand should have ended."""
        return time.monotonic() > self.until

    @property
    def rounds(self) -> int:
        """Pairs per row."""
        return self.repeats or (2 if self.quick else 7)

    @property
    def examples(self) -> int:
        """M."""
        return 8 if self.quick else 128

    @cached_property
    def machine(self) -> Machine:
        """The rates of this machine in this run."""
        return Machine.measured(self.device, 128 if self.quick else 1024)

    def network(self, name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Network:
        """A model by name on 3 x 32 x 32 noise with random labels, narrow if quick."""
        if name == "mlp":
            options.setdefault("hidden", (512, 512))
        shape = (3, 8, 8) if self.quick else IMAGE
        width = 0.125 if self.quick else 1.0
        model = models.create(name, input_size=shape, width=width, **options)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.examples, *shape, generator=generator).to(self.device, dtype)
        y = torch.randint(10, (self.examples,), generator=generator).to(self.device)
        return Network(name, model.to(self.device, dtype).eval(), x, y)


@dataclass(frozen=True)
class Row:
    """One thing measured: a work on a network, done by this library or by a peer.

    `reach` is the ratio to reach on 2 CPU cores at full size, where one was set.
    """

    work: str
    network: Network
    run: Work
    fisher_type: str = ""
    by: str = OURS
    reach: float | None = None
    count: bool = True

    @property
    def title(self) -> str:
        """The unique name of a row."""
        return title(vars(self) | {"network": self.network.name})


def title(record: Mapping[str, Any]) -> str:
    """The name of a record: the measurement, its subject, and the library."""
    if "axis" in record:
        return f"{record['method']} against {record['axis']}"
    kind = f", {record['fisher_type']}" if record.get("fisher_type") else ""
    return f"{record['network']}: {record['work']}{kind} ({record['by']})"


def measured(rows: Iterable[Row], setting: Setting) -> Iterator[dict[str, Any]]:
    """A record per row: its ratio to one forward and backward, the spread, and what limits it.

    A peer that fails is a record with the reason: the table goes on.
    """
    for row in rows:
        if not setting.takes(row.title):
            continue
        record: dict[str, Any] = {
            "network": row.network.name,
            "work": row.work,
            "fisher_type": row.fisher_type,
            "by": row.by,
            "examples": setting.examples,
            "reach": None if setting.quick else row.reach,
        }
        try:
            timing = _timed(row, setting)
        except Exception as error:
            if row.by == OURS:
                raise
            yield {**record, "note": f"{type(error).__name__}: {str(error)[:200]}"}
            continue
        record |= timing.row()
        if record["reach"]:
            record["of_reach"] = record["ratio"] / record["reach"]
        if row.count and row.by == OURS:
            record |= limits(footprint(row.run), setting.machine, timing.seconds)
        yield {**record, "note": ""}


def _timed(row: Row, setting: Setting) -> Timing:
    with warnings.catch_warnings():
        if row.by != OURS:
            # deprecations of other libraries are not this table's matter
            warnings.simplefilter("ignore")
        return paired(row.run, row.network.step, repeats=setting.rounds, device=setting.device)
