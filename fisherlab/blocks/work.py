"""The cost of a method alone, where methods share work: each piece counts for all users."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, overload

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

_LOCAL = threading.local()


@dataclass(eq=False)
class Piece:
    """Some work: its own seconds, and the pieces that it uses, made by whomever."""

    seconds: float = 0.0
    inside: float = 0.0
    parts: set[Piece] = field(default_factory=set)

    def closure(self) -> set[Piece]:
        """It and all that it uses."""
        found, waiting = {self}, [self]
        while waiting:
            fresh = waiting.pop().parts - found
            found |= fresh
            waiting += fresh
        return found


def seconds_of(pieces: Iterable[Piece]) -> float:
    """The seconds of pieces together, each once."""
    return sum(piece.seconds for piece in pieces)


class Ledger:
    """The pieces made in this thread while it is entered, by the cache that holds each.

    A cache is known by its `id`, and by what it holds: one that takes the place of another makes
    its piece anew, or holds what was made elsewhere.
    """

    def __init__(self) -> None:
        self.open: list[Piece] = []
        self.pieces: dict[tuple[int, Hashable], tuple[Piece, Callable[[], Any]]] = {}

    def __enter__(self) -> Ledger:
        self.before = getattr(_LOCAL, "ledger", None)
        _LOCAL.ledger = self
        return self

    def __exit__(self, *error: object) -> None:
        _LOCAL.ledger = self.before

    @contextmanager
    def piece(self) -> Iterator[Piece]:
        """The work inside, without that of pieces made in it."""
        piece, start = Piece(), time.perf_counter()
        self.open.append(piece)
        try:
            yield piece
        finally:
            self.open.pop()
            spent = time.perf_counter() - start
            piece.seconds = spent - piece.inside
            if self.open:
                self.open[-1].inside += spent
                self.open[-1].parts.add(piece)


def _first(found: Any) -> Any:
    """The kept value, or the first part of a tuple."""
    while isinstance(found, tuple) and found:
        found = found[0]
    return found


def _weakly(kept: Any) -> Callable[[], Any]:
    """A reference that keeps no tensor and no block alive; a strong one to what has none."""
    try:
        return weakref.ref(kept)
    except TypeError:
        return lambda: kept


def once(cache: MutableMapping[K, V], key: K, make: Callable[[], V]) -> V:
    """`cache[key]`, made when it is first asked for; its cost belongs to whoever takes it."""
    found = cache.get(key)
    ledger: Ledger | None = getattr(_LOCAL, "ledger", None)
    if found is not None:
        if ledger is not None and ledger.open:
            piece, held = ledger.pieces.get((id(cache), key), (None, None))
            if piece is not None and held is not None and held() is _first(found):
                ledger.open[-1].parts.add(piece)
        return found
    if ledger is None:
        found = make()
    else:
        with ledger.piece() as piece:
            found = make()
        ledger.pieces[id(cache), key] = piece, _weakly(_first(found))
    cache[key] = found
    return found


class cached(Generic[V]):
    """`functools.cached_property` of an immutable value, whose cost counts for all users."""

    def __init__(self, function: Callable[[Any], V]) -> None:
        self.function, self.__doc__ = function, function.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self.key = f"_cached {name}"

    @overload
    def __get__(self, value: None, owner: type) -> cached[V]: ...
    @overload
    def __get__(self, value: object, owner: type) -> V: ...
    def __get__(self, value: object | None, owner: type) -> cached[V] | V:
        if value is None:
            return self
        kept = vars(value)
        if getattr(_LOCAL, "ledger", None) is None and self.key in kept:
            return kept[self.key][0]
        # in a tuple, for None may be what was found
        return once(kept, self.key, lambda: (self.function(value),))[0]

    def known(self, value: object) -> V | None:
        """The kept value, without computing it."""
        return vars(value).get(self.key, (None,))[0]
