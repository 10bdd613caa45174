"""What a step costs: seconds beside SGD's in the same minute of the same process, and memory."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fisherlab import optim

WARM_UP = 2
ENOUGH = 5.0  # seconds


class SGDReference:
    """SGD with momentum on a model of its own, timed right after each epoch of a method.

    The machine's speed drifts and other processes come and go: a ratio to SGD measured in another
    minute says little.
    """

    def __init__(self, model: nn.Module, criterion: nn.Module) -> None:
        self.model, self.criterion = model, criterion
        # timing does not need progress, and must not diverge
        self.optimizer = optim.create("sgd", model, lr=1e-6)

    def seconds_per_step(self, batches: Iterable[tuple[Tensor, Tensor, Tensor]]) -> float:
        """The mean over batches, the first two left out; after 5 seconds that is enough."""
        seconds = []
        for _, x, y in batches:
            start = time.perf_counter()
            self.optimizer.zero_grad()
            loss = self.criterion(self.model(x), y)
            loss.backward()
            self.optimizer.step()
            finished(x.device)
            seconds.append(time.perf_counter() - start)
            if sum(seconds) > ENOUGH and len(seconds) > WARM_UP:
                break
        timed = seconds[WARM_UP:] or seconds
        return sum(timed) / len(timed)


def finished(device: torch.device) -> None:
    """Wait for a GPU; nothing elsewhere."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class PeakMemory:
    """The most memory held since it was made: the allocator's on a GPU, the process's on Linux.

    None where neither is known. The process holds the data, torch and what earlier runs left with
    the allocator: compare it with SGD's in the same table.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            with suppress(OSError):  # elsewhere the mark of the whole process is what there is
                Path("/proc/self/clear_refs").write_text("5")

    def bytes(self) -> int | None:
        """The peak so far."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        with suppress(OSError):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM"):
                    return int(line.split()[1]) * 1024
        return None


def tensor_bytes(state: Any) -> int:
    """The bytes of all tensors in nested dicts and lists: what an optimizer remembers."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, dict):
        return sum(tensor_bytes(item) for item in state.values())
    if isinstance(state, list | tuple):
        return sum(tensor_bytes(item) for item in state)
    return 0
