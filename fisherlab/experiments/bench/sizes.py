"""Cost of a comparison at the sizes that people train: GPT-2 small and ResNet-50."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import nn

from fisherlab import models
from fisherlab.comparison import compare
from fisherlab.experiments.bench.setting import OURS, Network, Setting, title
from fisherlab.experiments.bench.timing import peak_growth
from fisherlab.experiments.training.cost import PeakMemory, finished
from fisherlab.models.own import check_library

METHODS = ("kfac", "ekfac", "tkfac", "tekfac", "diagonal")


@dataclass(frozen=True)
class Case:
    """A model at random weights, by the name that `models.create` takes, and its batch.

    `size` is the shape of one example: an image, or `(t,)` tokens of `classes` words. The reach is
    in wall seconds and GiB on 2 CPU cores.
    """

    network: str
    size: tuple[int, ...]
    examples: int
    classes: int
    fisher_type: str
    layers_at_once: int
    seconds: float | None = None
    gib: float | None = None
    # seconds to expect on a machine with other work
    expected: float = 0.0

    @property
    def tokens(self) -> bool:
        """Whether an example is a sequence of words."""
        return len(self.size) == 1

    @property
    def about(self) -> dict[str, str]:
        """The subject of its row."""
        batch = "x".join(map(str, self.size)) + (" tokens" if self.tokens else "")
        work = f"compare, {len(METHODS)} approximations, {self.examples} of {batch}"
        return {
            "network": self.network,
            "work": work,
            "fisher_type": self.fisher_type,
            "by": OURS,
        }

    def made(self, device: torch.device) -> Network:
        """The model and its batch of noise, both of seed 0.

        Raises:
            ModelError: the library that builds the model does not import.
        """
        model = models.create(self.network, num_classes=self.classes, input_size=self.size)
        generator = torch.Generator().manual_seed(0)
        if self.tokens:
            x, y = torch.randint(self.classes, (2, self.examples, *self.size), generator=generator)
        else:
            x = torch.randn(self.examples, *self.size, generator=generator)
            y = torch.randint(self.classes, (self.examples,), generator=generator)
        return Network(self.network, model.to(device).eval(), x.to(device), y.to(device))


CASES = (
    Case("hf:gpt2", (128,), 8, 50257, "mc", 13, seconds=240.0, gib=10.0, expected=900.0),
    Case("timm:resnet50", (3, 224, 224), 16, 1000, "empirical", 9, 360.0, 12.0, 900.0),
)
QUICK = (
    Case("lstm", (8,), 2, 50, "mc", 4),
    Case("lenet", (3, 16, 16), 2, 10, "empirical", 8),
)


def check() -> None:
    """Refuse to begin where a library that builds a model does not import.

    Raises:
        ModelError: it names the library.
    """
    for case in CASES:
        check_library(case.network)


def run(setting: Setting) -> Iterator[dict[str, Any]]:
    """The records of this part, one per case; every weight that has a block is in it.

    Raises:
        ModelError: a library that builds a model does not import.
    """
    for case in QUICK if setting.quick else CASES:
        if setting.takes(title(case.about), case.expected):
            yield _measured(case, setting)


def _measured(case: Case, setting: Setting) -> dict[str, Any]:
    network = case.made(setting.device)
    steps = [_timed(network.step, setting.device) for _ in range(3)]
    network.model.zero_grad()
    spent: list[tuple[float, float]] = []
    blocks: list[int] = []
    watch = PeakMemory(setting.device)

    def work() -> None:
        table = None

        def measured() -> None:
            nonlocal table
            table = compare(
                network.model,
                network.criterion,
                network.x,
                network.y,
                approximations=METHODS,
                fisher_type=case.fisher_type,
                layers=weighed(network.model),
                layers_at_once=case.layers_at_once,
            )

        spent.append(_timed(measured, setting.device))
        assert table is not None
        blocks.extend((table.frame["layer"].nunique(), table.config["parameters"]["covered"]))

    growth = peak_growth(work, setting.device)
    (seconds, processor), (step, step_processor) = (
        spent[0],
        (median(wall for wall, _ in steps), median(cpu for _, cpu in steps)),
    )
    reach = None if setting.quick else case.seconds
    return {
        **case.about,
        "examples": case.examples,
        "parameters": sum(p.numel() for p in network.model.parameters()),
        "covered": blocks[1],
        "blocks": blocks[0],
        "ratio": processor / step_processor,
        "lowest": processor / max(cpu for _, cpu in steps),
        "highest": processor / min(cpu for _, cpu in steps),
        "seconds": seconds,
        "cpu_seconds": processor,
        "reference_seconds": step,
        "reference_cpu_seconds": step_processor,
        "reach_seconds": reach,
        "of_reach": None if reach is None else seconds / reach,
        "peak_bytes": growth,
        "process_bytes": watch.bytes(),
        "reach_bytes": None if case.gib is None or setting.quick else case.gib * 2**30,
        "note": "",
    }


def weighed(model: nn.Module) -> list[str]:
    """The modules that own a weight: maps, embeddings, norms."""
    return [name for name, module in model.named_modules() if "weight" in module._parameters]


def _timed(act: Any, device: torch.device) -> tuple[float, float]:
    """Wall and processor seconds of one call."""
    wall, processor = time.perf_counter(), time.process_time()
    act()
    finished(device)
    return time.perf_counter() - wall, time.process_time() - processor
