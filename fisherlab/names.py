"""Things by name: registries, and what to say of a name that is not known."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

T = TypeVar("T")


def nearest(given: object, known: Iterable[str], otherwise: Iterable[str] = ()) -> str:
    """Up to three known names that look like the given one; `otherwise` where none does."""
    return ", ".join(difflib.get_close_matches(str(given), list(known), 3) or otherwise)


def unknown(kind: str, given: object, known: Iterable[str]) -> str:
    """The message for a name that is not among the known: what may be meant, and what there is."""
    known = list(known)
    near = difflib.get_close_matches(str(given), known, 3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else "."
    return f"unknown {kind} {given!r}{hint} Known: {', '.join(known)}"


class Registry(dict[str, T]):
    """Things by name, in the order in which they were registered.

    Args:
        what: The names as text for messages: "data set".
        error: The type of the errors.
    """

    def __init__(self, what: str, error: type[ValueError]) -> None:
        super().__init__()
        self.what, self.error = what, error

    def __copy__(self) -> Registry[T]:
        other: Registry[T] = Registry(self.what, self.error)
        other.update(self)
        return other

    def add(self, name: str, thing: T, same: bool = False) -> None:
        """Enter a thing; `same` says that it is the one of that name, made anew."""
        if name in self and not same:
            raise self.error(f"a {self.what} named {name!r} exists already: {self[name]}")
        self[name] = thing

    def add_class(self, name: str, kind: type) -> None:
        """Enter a class; one of the same qualified name is the same, defined anew in a notebook."""
        known = getattr(self.get(name), "__qualname__", None)
        self.add(name, kind, known == kind.__qualname__)  # type: ignore[arg-type]

    def enter(self, name: str) -> Callable[[T], T]:
        """A decorator that enters what it stands above, and gives it back."""

        def entered(thing: T) -> T:
            self.add(name, thing)
            return thing

        return entered

    def named(self, name: str) -> T:
        """The thing of a name; an unknown one is refused with the nearest names."""
        if not isinstance(name, str) or name not in self:
            raise self.error(unknown(self.what, name, sorted(self)))
        return self[name]


def executed(path: Path) -> ModuleType:
    """The module of a file, run now; workers, pickles and dataclasses find it by its name.

    Raises:
        ImportError: there is no such file.
    """
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ImportError(f"no such file: {path}")
    found = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = found
    spec.loader.exec_module(found)
    return found


def imported(place: str) -> Any:
    """The object behind `module:name` or `file.py:name`; modules of the working folder are found.

    Raises:
        ImportError: there is no such module, or the name is missing from it.
    """
    module, _, name = place.rpartition(":")
    if not module.strip() or not name or "\0" in place:
        raise ImportError(f"{place!r} names no function of a module")
    if module.endswith(".py"):
        found = executed(Path(module))
    else:
        with _working_folder():
            found = importlib.import_module(module)
    if not callable(getattr(found, name, None)):
        raise ImportError(f"{module} has no function {name!r}")
    return getattr(found, name)


@contextmanager
def _working_folder() -> Iterator[None]:
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)
