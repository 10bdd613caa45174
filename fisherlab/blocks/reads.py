"""Reads of a device by the host: a number at a time, or all that a step asks for together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

_LOCAL = threading.local()

Taker = Callable[[list[float]], None]


@contextmanager
def revocable() -> Iterator[None]:
    """Inside, nothing that may have to be put back is overwritten."""
    before, _LOCAL.revocable = is_revocable(), True
    try:
        yield
    finally:
        _LOCAL.revocable = before


def is_revocable() -> bool:
    """Whether what was there before may have to be put back."""
    return together() is not None or getattr(_LOCAL, "revocable", False)


class Unmet(Exception):
    """A condition did not hold, and what was computed since is void."""


class Together:
    """While it is entered, `holds` says yes at once, and the host looks later at all conditions.

    Each read waits for all the work that was sent to a device before. What is computed in the
    meantime counts only if every condition holds: `settle` says so, and the end of the block asks
    it. Whoever enters it must be able to take everything back, and to compute it again without.
    """

    def __init__(self) -> None:
        self._conditions: list[Tensor] = []
        self._wanted: list[tuple[Sequence[Tensor], Taker]] = []

    def __enter__(self) -> Together:
        self._before, _LOCAL.together = together(), self
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        _LOCAL.together = self._before
        if kind is None and self:
            self.settle([])

    def __bool__(self) -> bool:
        return bool(self._conditions or self._wanted)

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Inside, conditions are noted, and nothing is read at the end: `join` takes them over."""
        before, _LOCAL.together = together(), self
        try:
            yield
        finally:
            _LOCAL.together = before

    def join(self, other: Together) -> None:
        """Take over what another one has noted."""
        self._conditions += other._conditions
        self._wanted += other._wanted

    def expect(self, condition: Tensor) -> None:
        """Note a condition, a tensor of one truth."""
        self._conditions.append(condition.detach().reshape(()))

    def want(self, numbers: Sequence[Tensor], take: Taker) -> None:
        """Have numbers handed over with the next read."""
        self._wanted.append((numbers, take))

    def settle(self, tensors: Sequence[Tensor]) -> list[float]:
        """The numbers of tensors, with everything that was noted: one read.

        Raises:
            Unmet: a condition does not hold.
        """
        wanted, self._wanted = self._wanted, []
        conditions, self._conditions = self._conditions, []
        flat = [x for some, _ in [*wanted, (tensors, None)] for x in some]
        device = (conditions or flat)[0].device
        parts = [x.detach().flatten().to(device, torch.float64) for x in flat]
        if conditions:
            met = torch.stack([condition.to(device) for condition in conditions]).all()
            parts.append(met.reshape(1).to(torch.float64))
        found = torch.cat(parts).tolist()
        if conditions and not found.pop():
            raise Unmet
        start = 0
        for some, take in wanted:
            end = start + sum(x.numel() for x in some)
            take(found[start:end])
            start = end
        return found[start:]


def together() -> Together | None:
    """The collector of conditions that this thread has entered, or None."""
    return getattr(_LOCAL, "together", None)


def holds(condition: Tensor) -> bool:
    """Whether a condition, a tensor of one truth, holds; yes where it is looked at later."""
    waiting = together()
    if waiting is None:
        return bool(condition)
    waiting.expect(condition)
    return True


def numbers_of(tensors: Sequence[Tensor]) -> list[float]:
    """The numbers of some tensors, one after another, in one read."""
    waiting = together()
    return (Together() if waiting is None else waiting).settle(tensors)


def with_next_read(tensors: Sequence[Tensor], take: Taker) -> None:
    """Have the numbers of tensors handed over: now, or with the next read if some wait."""
    waiting = together()
    if waiting is None:
        take(numbers_of(tensors))
    else:
        waiting.want(tensors, take)
