"""What a training step costs beside SGD's, each row held to the intervals it states."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from fisherlab import models
from fisherlab.experiments import bench_optim
from fisherlab.experiments.bench.setting import OURS, Setting

STATED = ("statistics_every", "basis_every", "statistics_examples")


def run(setting: Setting) -> list[dict[str, Any]]:
    """The records of this part: ratios to SGD with momentum on ResNet-20 and on an MLP.

    Raises `AssertionError` where a state of an optimizer changed more or less often than its row
    states: a row cannot be fast by computing less than it says.
    """
    cases: list[tuple[str, Callable[[], nn.Module], tuple[int, ...], tuple[Any, ...]]]
    if setting.quick:
        cases = [("mlp", _tiny, (16,), bench_optim.RESNET_ROWS)]
        size, options = 8, {"steps": 10, "repeats": 1}
    else:
        cases = [
            ("resnet20", bench_optim.resnet20, (3, 32, 32), bench_optim.RESNET_ROWS),
            ("mlp", bench_optim.mlp, (784,), bench_optim.MLP_ROWS),
        ]
        size, options = 128, {"steps": 100, "repeats": setting.repeats or 3}
    records = []
    for network, build, shape, rows in cases:
        batches = [
            (x.to(setting.device), y.to(setting.device))
            for x, y in bench_optim.random_batches(shape, size)
        ]
        found = bench_optim.measure(
            partial(_placed, build, setting),
            batches,
            rows,
            progress=partial(_titled, network, setting),
            **options,
        )
        records += [_record(network, size, row, setting) for row in found]
    return records


def _placed(build: Callable[[], nn.Module], setting: Setting) -> nn.Module:
    return build().to(setting.device)


def _titled(network: str, setting: Setting, title: str) -> None:
    setting.progress(f"{network}: {title}")


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
