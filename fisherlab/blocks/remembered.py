"""Cached properties that notice an in-place change of the tensors they were computed from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar, overload

from torch import Tensor

from fisherlab.blocks.work import made, used

T = TypeVar("T")


def remembered(*sources: str) -> Callable[[Callable[[Any], T]], Remembered[T]]:
    """`@remembered("G", "A")`: a cached property, made again once `G` or `A` was changed in place.

    Without names the sources are whatever `tensors()` yields.

    A decomposition kept beside a matrix that somebody updates with `mul_().add_()` is wrong without
    any error; this one is gone.
    """
    return lambda function: Remembered(function, sources)


class Remembered(Generic[T]):
    """The property that `@remembered` makes."""

    def __init__(self, function: Callable[[Any], T], sources: tuple[str, ...]) -> None:
        self.function, self.sources = function, sources
        self.__doc__ = function.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, block: None, owner: type) -> Remembered[T]: ...
    @overload
    def __get__(self, block: object, owner: type) -> T: ...
    def __get__(self, block: object | None, owner: type) -> Remembered[T] | T:
        if block is None:
            return self
        stamp = self._stamp(block)
        known = vars(block).setdefault("_remembered", {})
        if self.name not in known or known[self.name][0] != stamp:
            known[self.name] = (stamp, made(block, self.name, lambda: self.function(block)))
        else:
            used(block, self.name)
        return known[self.name][1]

    def _stamp(self, block: Any) -> tuple[Any, ...]:
        if not self.sources:
            return tuple(state_of(tensor) for tensor in block.tensors())
        return tuple(state_of(getattr(block, source)) for source in self.sources)

    def known(self, block: object) -> T | None:
        """What is remembered, without computing it."""
        known = vars(block).get("_remembered", {})
        if self.name not in known:
            return None
        stamp, value = known[self.name]
        return value if stamp == self._stamp(block) else None

    def remember(self, block: object, value: T) -> None:
        """Take a value that was found elsewhere."""
        vars(block).setdefault("_remembered", {})[self.name] = (self._stamp(block), value)

    def share(self, one: object, other: object) -> None:
        """Let `other`, made of the same sources, use what `one` remembers."""
        known = vars(one).get("_remembered", {})
        if self.name in known:
            vars(other).setdefault("_remembered", {})[self.name] = known[self.name]


def state_of(value: Any) -> Any:
    """What changes when `value`, a tensor, a block or a number, is replaced or changed in place."""
    if isinstance(value, Tensor):
        return id(value), 0 if value.is_inference() else value._version
    if hasattr(value, "tensors"):
        return id(value), tuple(state_of(tensor) for tensor in value.tensors())
    return value
