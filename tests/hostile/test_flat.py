"""Hundreds of captures and steps: memory stays flat, no hook is left."""

from __future__ import annotations

import gc

import psutil
import pytest
import torch
from torch import nn

import fisherlab as fl
from hostile.judge import HOOKS

TIMES = 300


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def memory() -> int:
    gc.collect()
    return psutil.Process().memory_info().rss


def hooks(net: nn.Module) -> int:
    return sum(len(getattr(module, name)) for module in net.modules() for name in HOOKS)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["capture", "kfac", "fngd", "tekfac"])
def test_memory_is_flat(kind: str) -> None:
    net, x, y = model(), torch.randn(64, 64), torch.arange(64) % 10
    criterion = nn.CrossEntropyLoss()
    optimizer = None if kind == "capture" else fl.optim.create(kind, net)

    def act() -> None:
        if optimizer is None:
            fl.capture(net, criterion, x, y)
            return
        optimizer.zero_grad()
        criterion(net(x), y).backward()
        optimizer.step()

    for _ in range(TIMES // 3):
        act()
    before = memory()
    for _ in range(TIMES):
        act()
    assert memory() < 1.02 * before
    if optimizer is not None:
        optimizer.remove()
    assert hooks(net) == 0
