"""Layers measured side by side, each by one thread of Python.

If memory is slow, an eigendecomposition gains little from a second core (2304 rows: 1.4 s on one,
0.7 to 1.1 s on two), and most other work gains less. Two layers at once do gain.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from queue import SimpleQueue
from threading import Event
from types import TracebackType
from typing import Any

import torch

Rows = list[dict[str, Any]]
Work = Generator[None, None, Rows]

# Layers in work at once, at most: every one holds its own factors and their eigenvectors.
AT_ONCE = 4
# Multiplications from which on a layer waits for its matrices and not for Python, of which only
# one thread runs at a time.
HEAVY = 1e9


class Stopped(Exception):
    """The comparison has ended before this layer."""


class LayerPool:
    """`measure(name, stopped)` for every name, several at once where more than one is heavy.

    `measure` is a generator: it yields between its pieces of work and returns the rows, which are
    in `found` then. `costs` are multiplications by name. The most expensive layers come first, so
    that no thread is left with one when the others have finished. Cheap layers go between them,
    since two cheap ones would wait for each other. `order` is that order. Leaving the context early
    makes `stopped` set, and waits for what is running to notice.
    """

    def __init__(
        self,
        measure: Callable[[str, Event], Work],
        costs: Mapping[str, float],
        device: torch.device,
        alone: bool = False,
    ) -> None:
        self.measure, self.stopped = measure, Event()
        self.found: dict[str, Rows] = {}
        heavy = [name for name, cost in costs.items() if cost >= HEAVY]
        self.threads = torch.get_num_threads()
        # elsewhere the number of threads is one for the whole process
        possible = device.type == "cpu" and torch.backends.openmp.is_available() and not alone
        self.at_once = min(self.threads, AT_ONCE, len(heavy)) if possible else 1
        self.order = list(costs)
        if self.at_once > 1:
            heavy.sort(key=lambda name: -costs[name])
            light = [name for name in costs if costs[name] < HEAVY]
            first, rest = heavy[: self.at_once], heavy[self.at_once :]
            mixed = (name for pair in zip_longest(light, rest) for name in pair if name is not None)
            self.order = [*first, *mixed]
        self._pool: ThreadPoolExecutor | None = None
        # messages of a thread: None after a piece of work, or which layer ended and how
        self._said: SimpleQueue[dict[str, Exception | None] | None] = SimpleQueue()

    def __enter__(self) -> LayerPool:
        if self.at_once > 1:
            share = self.threads // self.at_once
            self._pool = ThreadPoolExecutor(self.at_once, "layer", torch.set_num_threads, (share,))
            for name in self.order:
                self._pool.submit(self._say, name)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            if error is not None:
                self.stopped.set()
            self._pool.shutdown(cancel_futures=error is not None)

    def steps(self) -> Iterator[None]:
        """One item after every piece of work, of whichever layer."""
        if self._pool is None:
            for name in self.order:
                yield from self._work(name)
            return
        ended: dict[str, Exception | None] = {}
        for name in self.order:
            # if two fail, the first in order is reported
            while name not in ended:
                said = self._said.get()
                if said is None:
                    yield
                else:
                    ended |= said
            error = ended[name]
            if error is not None:
                raise error

    def _work(self, name: str) -> Iterator[None]:
        self.found[name] = yield from self.measure(name, self.stopped)
        yield

    def _say(self, name: str) -> None:
        failed: Exception | None = None
        try:
            for _ in self._work(name):
                self._said.put(None)
        except Exception as error:
            failed = error
        self._said.put({name: failed})
