"""Hundreds of captures and steps: memory stays flat, no hook is left."""

from __future__ import annotations

import gc
import threading
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor, nn

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


def tensors() -> int:
    """How many tensors live in this process."""
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def act(optimizer: Any, net: nn.Module, x: Tensor, y: Tensor) -> None:
    """One step; without an optimizer one capture."""
    criterion = nn.CrossEntropyLoss()
    if optimizer is None:
        fl.capture(net, criterion, x, y)
        return

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = criterion(net(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["capture", "kfac", "fngd", "tekfac"])
def test_memory_is_flat(kind: str) -> None:
    net, x, y = model(), torch.randn(64, 64), torch.arange(64) % 10
    optimizer = None if kind == "capture" else fl.optim.create(kind, net)
    for _ in range(TIMES // 3):
        act(optimizer, net, x, y)
    before = memory()
    for _ in range(TIMES):
        act(optimizer, net, x, y)
    assert memory() < 1.02 * before
    if optimizer is not None:
        optimizer.remove()
    assert hooks(net) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", fl.optim.names())
def test_every_optimizer_keeps_as_many_tensors_and_threads(name: str) -> None:
    net = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4)).double()
    x, y = torch.randn(16, 8, dtype=torch.float64), torch.arange(16) % 4
    optimizer = fl.optim.create(name, net)
    # intervals are of 10 or 100 steps: the first of each has happened
    for _ in range(TIMES // 3 + 10):
        act(optimizer, net, x, y)
    before = tensors(), threading.active_count()
    for _ in range(TIMES):
        act(optimizer, net, x, y)
    assert (tensors(), threading.active_count()) == before
    if hasattr(optimizer, "remove"):
        optimizer.remove()
    assert hooks(net) == 0
