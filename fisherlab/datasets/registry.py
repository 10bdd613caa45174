"""The registry of data sets, and `load`."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch.utils.data import TensorDataset

from fisherlab import doors
from fisherlab.datasets.card import Card, DatasetError
from fisherlab.datasets.files import data_folder, verified
from fisherlab.extras import named
from fisherlab.names import Registry


@dataclass(frozen=True)
class Dataset:
    """A data set in memory: inputs float32 (tokens int64), labels int64 `[n]`, targets `[n, 1]`."""

    train: TensorDataset
    test: TensorDataset
    card: Card
    valid: TensorDataset | None = None  # where the source has one
    vocabulary: tuple[str, ...] = ()  # the word of every token
    references: tuple[str, ...] = ()  # a translation's test targets, in all their words
    # A regression target is `target_mean + target_std * y` in the units of the source.
    target_mean: float = 0.0
    target_std: float = 1.0

    def __repr__(self) -> str:
        parts = {"train": self.train, "valid": self.valid, "test": self.test}
        sizes = ", ".join(f"{len(part):,} {name}" for name, part in parts.items() if part)
        shape = " x ".join(map(str, self.card.input_shape))
        classes = self.card.num_classes
        kind = "regression" if classes is None else f"{classes:,} classes"
        return f"Dataset({self.card.name!r}: {sizes} examples of {shape}, {kind})"


Loader = Callable[[Card, dict[str, Path]], Dataset]
_REGISTRY: Registry[tuple[Card, Loader]] = Registry("data set", DatasetError)


def register(card: Card) -> Callable[[Loader], Loader]:
    """Enter a loader under its card's name; it gets the card and `{path: verified file}`.

    Args:
        card: the card, with the files that the loader reads.

    Returns:
        A decorator that gives the loader back.
    """

    def enter(loader: Loader) -> Loader:
        _REGISTRY.add(card.name, (card, loader))
        return loader

    return enter


# How `scheme:rest` is read: a function of the whole name and of what follows the colon.
Scheme = Callable[[str, str], Dataset]
_SCHEMES: Registry[Scheme] = Registry("kind of data", DatasetError)


def scheme(name: str) -> Callable[[Scheme], Scheme]:
    """Enter a function for data sets named `name:...`; "" is for every other name with a colon."""
    return _SCHEMES.enter(name)


def check(name: str) -> None:
    """Refuse a name that is neither registered nor a user's own data.

    Args:
        name: a name of `names()`, or one with a colon.

    Raises:
        DatasetError: the name is unknown.
    """
    if ":" not in doors.name(name, "name", error=DatasetError):
        _REGISTRY.named(name)


def names() -> list[str]:
    """The registered names, sorted.

    Returns:
        Names for `load`, `card` and `fetch`.

    Example:
        >>> import fisherlab as fl
        >>> "digits" in fl.datasets.names()
        True
    """
    return sorted(_REGISTRY)


def card(name: str) -> Card:
    """The card of a data set, which need not be installed.

    Args:
        name: a name of `names()`.

    Returns:
        Its title, licence, files and shapes.

    Raises:
        DatasetError: the name is unknown.

    Example:
        >>> import fisherlab as fl
        >>> fl.datasets.card("digits").num_classes
        10
    """
    doors.name(name, "name", error=DatasetError)
    return load(name).card if ":" in name else _REGISTRY.named(name)[0]


def load(name: str, *, root: str | Path | None = None) -> Dataset:
    """Read a data set; deterministic, offline, and the global random state stays as it was.

    Args:
        name: a name of `names()`; or with a colon a user's own data: `folder:PATH`,
            `module:function`, `file.py:function`.
        root: the folder with one folder per data set; None: `$FISHERLAB_DATA`, else the downloads
            of `fisherlab data fetch`. Bundled data sets need none.

    Returns:
        Inputs `[n, ...]` and labels `[n]` of training and test, and the card.

    Raises:
        DatasetError: the name is unknown, a file is missing, or its sha256 is not the card's.
        MissingPackage: a package that reads it is not installed.
    """
    with named(), _python_stream_kept():
        if ":" in doors.name(name, "name", error=DatasetError):
            kind, _, rest = name.partition(":")
            return _SCHEMES[kind if kind in _SCHEMES else ""](name, rest)
        card, loader = _REGISTRY.named(name)
        folder = data_folder(root) if card.files else Path()
        return loader(card, verified(card, folder))


@contextmanager
def _python_stream_kept() -> Iterator[None]:
    """Python's random stream is afterwards as before: some packages draw when they are imported."""
    state = random.getstate()
    try:
        yield
    finally:
        random.setstate(state)
