"""The networks and the batch of the bench, a row of its table, and the loop that fills it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
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


def measured(rows: Iterable[Row], setting: Setting) -> list[dict[str, Any]]:
    """A record per row: its ratio to one forward and backward, the spread, and what limits it.

    A peer that fails is a record with the reason: the table goes on.
    """
    records = []
    for row in rows:
        setting.progress(f"{row.network.name}: {row.work} ({row.by})")
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
            records.append({**record, "note": f"{type(error).__name__}: {str(error)[:200]}"})
            continue
        record |= timing.row()
        if record["reach"]:
            record["of_reach"] = record["ratio"] / record["reach"]
        if row.count and row.by == OURS:
            record |= limits(footprint(row.run), setting.machine, timing.seconds)
        records.append({**record, "note": ""})
    return records


def _timed(row: Row, setting: Setting) -> Timing:
    with warnings.catch_warnings():
        if row.by != OURS:
            # what other libraries deprecate is not this table's matter
            warnings.simplefilter("ignore")
        return paired(row.run, row.network.step, repeats=setting.rounds, device=setting.device)
