"""The settings of a training run."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from fisherlab import datasets, doors, models, whole
from fisherlab.names import unknown

# Factor on the learning rate from the share of the epochs that is done.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "step": lambda done: 0.1 ** ((done >= 0.5) + (done >= 0.75)),
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
}
# Or factors of 0.1 at given shares: `steps(0.4,0.8)`.
AT_SHARES = re.compile(r"steps\((0?\.\d+(?:,0?\.\d+)*)\)")
# Half is refused, since curvature in it is noise.
DTYPES = {"float32": torch.float32, "float64": torch.float64}
DEVICES = ("cpu", "cuda", "mps")


class SettingsError(ValueError):
    """A setting that is the user's mistake."""


@dataclass(frozen=True)
class Entry:
    """One curve of the comparison: a label, the optimizer's name, and its options as typed."""

    label: str
    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key in ("label", "name"):
            doors.name(getattr(self, key), key, error=SettingsError)
        if not isinstance(self.options, Mapping):
            raise SettingsError(f"options must be a dict, got {doors.said(self.options)}")

    def epochs(self, otherwise: int) -> int:
        """Its own number of epochs; else that of the run."""
        own = self.options.get("epochs", otherwise)
        try:
            number = int(own)
        except (TypeError, ValueError):
            number = 0
        if number < 1:
            raise SettingsError(f"{self.label}.epochs is a whole number >= 1, got {own!r}")
        return number

    def __str__(self) -> str:
        given = ", ".join(f"{option}={value}" for option, value in self.options.items())
        return f"{self.label} ({given})" if given else self.label


@dataclass(frozen=True)
class Settings:
    """Everything that determines the rows of a run, timings aside.

    `examples` limits the training set, `test_examples` the test set; `validation` holds out so many
    training examples and tests on them instead, to choose settings by. `carry` cuts the examples,
    in their order, into `batch_size` streams, and carries the state of an lstm along each.
    `compare_every` counts epochs between measurements of the optimizers' blocks, on
    `compare_examples`. `batch_norm` None is the model's own.
    """

    data: str = "digits"
    model: str = "mlp"
    entries: tuple[Entry, ...] = (Entry("sgd", "sgd"),)
    epochs: int = 5
    batch_size: int = 128
    seeds: tuple[int, ...] = (0,)
    width: float = 1.0
    hidden: tuple[int, ...] | None = None
    layers: int | None = None
    activation: str = "relu"
    batch_norm: bool | None = None
    schedule: str = "constant"
    examples: int | None = None
    test_examples: int | None = None
    validation: int | None = None
    augment: bool = False
    carry: bool = False
    device: str = "cpu"
    dtype: str = "float32"
    compare_every: int | None = None
    compare_examples: int = 256

    def __post_init__(self) -> None:
        counts = ["epochs", "batch_size", "examples", "test_examples", "validation", "layers"]
        counts += ["compare_every", "compare_examples"]
        for name in counts:
            value = getattr(self, name)
            if value is None and self.__dataclass_fields__[name].default is None:
                continue
            if not doors.is_whole(value):
                raise SettingsError(f"{name} is a whole number, got {doors.said(value)}")
            if value < 1:
                raise SettingsError(f"{name} is at least 1, got {value}")
        self._check_types()
        for name in ("seeds", "hidden", "entries"):
            if isinstance(listed := getattr(self, name), list):
                object.__setattr__(self, name, tuple(listed))
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise SettingsError(f"seeds are different numbers, at least one; got {self.seeds}")
        schedule_of(self.schedule)
        check_known("dtype", self.dtype, DTYPES)
        _refused(lambda: datasets.check(self.data))
        _refused(lambda: models.check(self.model))
        check_device(self.device)
        labels = [entry.label for entry in self.entries]
        for label in labels:
            if labels.count(label) > 1:
                raise SettingsError(f"two optimizers are labelled {label!r}; name one NEW={label}")
            if not re.fullmatch(r"[\w.+-]+", label):
                raise SettingsError(f"a label is letters, digits, _ . + -; got {label!r}")

    def _check_types(self) -> None:
        """Refuse what is no word, flag, number or list where one is asked for."""
        for name in ("data", "model", "activation", "schedule", "device", "dtype"):
            doors.name(getattr(self, name), name, error=SettingsError)
        for name in ("augment", "carry"):
            doors.flag(getattr(self, name), name, error=SettingsError)
        if self.batch_norm is not None:
            doors.flag(self.batch_norm, "batch_norm", error=SettingsError)
        doors.number(self.width, "width", above=0.0, error=SettingsError)
        for seed in doors.listed(self.seeds, "seeds", error=SettingsError):
            # a run's generators take a million times its seed, in 64 bits
            if not doors.is_whole(seed) or abs(seed) >= 2**40:
                raise SettingsError(
                    f"each of seeds is a whole number below 2^40, got {doors.said(seed)}"
                )
        if self.hidden is not None:
            for features in doors.listed(self.hidden, "hidden", error=SettingsError):
                if not doors.is_whole(features) or features < 1:
                    got = doors.said(self.hidden)
                    raise SettingsError(f"hidden must hold positive widths, got {got}")
        for entry in doors.listed(self.entries, "entries", error=SettingsError):
            if not isinstance(entry, Entry):
                raise SettingsError(f"each of entries is an Entry, got {doors.said(entry)}")

    def to_json(self) -> dict[str, Any]:
        """As `config.json` holds them."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_json(cls, config: dict[str, Any]) -> Settings:
        """The settings that `to_json` wrote."""
        given = config.get("entries") if isinstance(config, Mapping) else None
        if not isinstance(given, list) or not all(isinstance(entry, dict) for entry in given):
            raise SettingsError(f"config must be what to_json wrote, got {doors.said(config)}")
        known = {k: v for k, v in config.items() if k in cls.__dataclass_fields__}
        known["entries"] = tuple(Entry(**entry) for entry in config["entries"])
        return cls(**known)

    @classmethod
    def load(cls, folder: Path) -> Settings:
        """The settings of a run folder."""
        path = doors.place(folder, "folder", error=SettingsError) / "config.json"
        try:
            config = whole.read_json(path, SettingsError)
        except OSError as error:
            raise SettingsError(f"{path} is not the config of a training run: {error!r}") from None
        if (command := config.get("command", "train")) != "train":
            raise SettingsError(
                f"{folder} holds a run of `fisherlab {command}`; give another folder"
            )
        return cls.found(config, path)

    @classmethod
    def found(cls, config: dict[str, Any], path: Path) -> Settings:
        """The settings in what a file holds.

        Raises:
            SettingsError: they are none; the message names the file.
        """
        try:
            return cls.from_json(config["settings"])
        except (LookupError, TypeError, ValueError) as error:
            raise SettingsError(
                f"{path} does not hold the settings of a training run ({error}); restore it, or "
                "give another folder"
            ) from None


def schedule_of(name: str) -> Callable[[float], float]:
    """The schedule of a name, or `steps(0.4,0.8)`: x 0.1 at 40 % and 80 % of the epochs."""
    if match := AT_SHARES.fullmatch(name):
        shares = [float(share) for share in match[1].split(",")]
        # an epoch's share is a quotient: 40 / 100 is not above the 0.4 that a user types
        return lambda done: 0.1 ** sum(done >= share - 1e-9 for share in shares)
    check_known("schedule", name, [*SCHEDULES, "steps(0.4,0.8)"])
    if name not in SCHEDULES:
        raise SettingsError(f"steps(...) takes shares of the epochs such as 0.4,0.8; got {name!r}")
    return SCHEDULES[name]


def check_known(kind: str, got: str, known: Iterable[str]) -> None:
    """Raise `SettingsError`, with the nearest, for a name that is not known."""
    known = list(known)
    if got not in known:
        raise SettingsError(unknown(kind, got, known))


def _refused(check: Callable[[], None]) -> None:
    try:
        check()
    except ValueError as error:
        raise SettingsError(str(error)) from None


def check_device(name: str) -> torch.device:
    """The device, if there is one of that name here; else `SettingsError` in one sentence."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        if name.partition(":")[0] not in DEVICES:  # torch would list twenty kinds
            raise SettingsError(f"unknown device {name!r}; take cpu, cuda, cuda:1 or mps") from None
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise SettingsError(f"device {name!r} cannot be used here: {reason}; take cpu") from None
    return device
