"""Autocast is for a user's model: FisherLab's own arithmetic leaves it, wherever it is called."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, TypeVar, cast

import torch

Function = TypeVar("Function", bound=Callable[..., Any])

# Kinds of devices whose autocast a caller may have entered; and those that FisherLab left.
_CASTING = ("cpu", "cuda", "mps", "xpu")
_CAST: ContextVar[tuple[str, ...]] = ContextVar("cast", default=())


@contextmanager
def uncast() -> Iterator[None]:
    """Autocast off: FisherLab's own arithmetic is in the dtypes of its tensors."""
    kinds = tuple(kind for kind in _CASTING if torch.is_autocast_enabled(kind))
    token = _CAST.set(kinds or _CAST.get())
    try:
        with _autocast(kinds, False):
            yield
    finally:
        _CAST.reset(token)


def uncasting(function: Function) -> Function:
    """The function with autocast off; outside autocast it costs a tenth of a microsecond."""

    @wraps(function)
    def left(*args: Any, **named: Any) -> Any:
        if not torch._C._is_any_autocast_enabled():
            return function(*args, **named)
        with uncast():
            return function(*args, **named)

    return cast(Function, left)


def as_cast() -> AbstractContextManager[None]:
    """Autocast as the caller has it, for his own functions inside `uncast`."""
    return _autocast(_CAST.get(), True)


@contextmanager
def _autocast(kinds: tuple[str, ...], on: bool) -> Iterator[None]:
    before = {kind: torch.is_autocast_enabled(kind) for kind in kinds}
    try:
        for kind in kinds:
            torch.set_autocast_enabled(kind, on)
        yield
    finally:
        for kind, was in before.items():
            torch.set_autocast_enabled(kind, was)
