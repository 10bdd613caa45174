"""Hundreds of captures and steps: memory stays flat, no tensor, thread, file or hook is left."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor, nn

import fisherlab as fl
from hostile.judge import HOOKS

TIMES = 300


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 20), nn.ReLU(), nn.Linear(20, 10))


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


def handles() -> tuple[int, int]:
    """Threads and open files of this process."""
    return threading.active_count(), psutil.Process().num_fds()


def started(kind: str, steps: int) -> tuple[nn.Module, Any, Callable[[], None]]:
    """A model after some steps, its optimizer, and what takes another step."""
    net, x, y = model(), torch.randn(32, 16), torch.arange(32) % 10
    optimizer = None if kind == "capture" else fl.optim.create(kind, net)
    for _ in range(steps):
        act(optimizer, net, x, y)
    return net, optimizer, lambda: act(optimizer, net, x, y)


KINDS = ["capture", *fl.optim.names()]


@pytest.mark.parametrize("kind", KINDS)
def test_no_tensor_stays(kind: str) -> None:
    _, _, again = started(kind, 5)
    before = tensors()
    for _ in range(40):
        again()
    # what waits for the next refresh differs by its phase; one tensor a step would be 40
    assert tensors() < before + 25


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_memory_and_handles_stay(kind: str) -> None:
    # intervals are of 10 or 100 steps: the first of each has happened
    net, optimizer, again = started(kind, TIMES // 3 + 10)
    before, held, alive = memory(), handles(), tensors()
    for _ in range(TIMES):
        again()
    grown, more = memory() / before - 1, tensors() - alive
    print(f"{kind}: memory grew by {grown:.2%}, tensors by {more}")
    assert grown < 0.02
    assert more < TIMES / 10
    assert handles() == held
    if hasattr(optimizer, "remove"):
        optimizer.remove()
    assert hooks(net) == 0
