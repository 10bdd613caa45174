"""Checks of what a picture is made of, by the annotation of each argument, before it is drawn."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial, wraps
from typing import ParamSpec, TypeVar

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from fisherlab import doors
from fisherlab.comparison import Comparison
from fisherlab.doors import Door
from fisherlab.metrics import Convergence, ErrorSplit, GramStudy, GroupedOverlap

P = ParamSpec("P")
T = TypeVar("T")


def entered(draw: Callable[P, T]) -> Callable[P, T]:
    """A picture whose arguments are checked; a column that a frame lacks is named."""
    parameters = inspect.signature(draw).parameters
    kinds = {**KINDS, "Any": _verdicts if draw.__module__.endswith("claims") else _table}
    checks = [
        (position, name, door)
        for position, (name, parameter) in enumerate(parameters.items())
        if (door := NAMES.get(name) or kinds.get(str(parameter.annotation)))
    ]

    @wraps(draw)
    def checked(*args: P.args, **named: P.kwargs) -> T:
        given, options, _ = doors.passed(checks, args, named)
        try:
            return draw(*given, **options)
        except KeyError as error:
            lost = f"{error.args[0]!s:.80}" if error.args else "?"
            raise ValueError(
                f"{draw.__name__} finds no {lost} in what it draws: pass the columns, layers and "
                "names that its help names"
            ) from error

    return checked


def _table(value: object, what: str) -> None:
    frame = value.frame if isinstance(value, Comparison) else value
    if not isinstance(frame, pd.DataFrame):
        raise TypeError(f"{what} must be a Comparison or its frame, got {doors.said(value)}")
    missing = [name for name in ("layer", "approximation") if name not in frame]
    if missing or not len(frame):
        raise ValueError(
            f"{what} must have rows of a comparison; it has {len(frame)} rows, and lacks "
            f"{', '.join(missing) or 'no column'}"
        )


def _verdicts(value: object, what: str) -> None:
    if not isinstance(getattr(value, "trials", None), Mapping):
        raise TypeError(f"{what} must be what fl.claims.verify returns, got {doors.said(value)}")


def _frame(value: object, what: str) -> None:
    if not isinstance(value, pd.DataFrame) or not len(value):
        raise TypeError(f"{what} must be a DataFrame with rows, got {doors.said(value)}")


def _text(value: object, what: str) -> None:
    doors.name(value, what)


def _texts(value: object, what: str) -> None:
    for item in doors.listed(value, what):
        doors.name(item, f"each of {what}")


def _counts(value: object, what: str) -> None:
    for item in doors.listed(value, what):
        doors.count(item, f"each of {what}", 0)


def _number(value: object, what: str) -> None:
    doors.number(value, what)


def _numbers(value: object, what: str) -> None:
    if not doors.numbers(value, what):
        raise ValueError(f"{what} must have a number, got {doors.said(value)}")


def _values(value: object, what: str) -> None:
    """Numbers in any shape: a tensor of real numbers, or an array."""
    if isinstance(value, Tensor):
        unheld = type(value) is Tensor and value.is_meta
        if unheld or not doors.is_strided(value) or value.is_quantized or value.is_complex():
            raise TypeError(f"{what} must be numbers, got {doors.said(value)}")
    elif not isinstance(value, np.ndarray) or value.dtype.kind not in "fiub":
        doors.numbers(value, what)
        return
    if not value.ndim or 0 in value.shape:
        raise ValueError(f"{what} must have entries, got {doors.said(value)}")


def _vector(value: object, what: str) -> None:
    _values(value, what)
    if getattr(value, "ndim", 1) != 1:
        raise ValueError(f"{what} must have one axis, got {doors.said(value)}")


def _matrix(value: object, what: str) -> None:
    _values(value, what)
    if getattr(value, "ndim", 2) != 2:
        raise ValueError(f"{what} must be a matrix, got {doors.said(value)}")


def _logs(value: object, what: str) -> None:
    doors.choice(value, what, ("", "x", "y", "xy"))


def _of(kind: type, wanted: str) -> Door:
    def door(value: object, what: str) -> None:
        doors.instance(value, what, kind, wanted)

    return door


def _each(door: Door, key: type = object) -> Door:
    """A dict, at least one entry, each of whose values passes a door."""

    def checked(value: object, what: str) -> None:
        if not isinstance(value, Mapping) or not value:
            raise TypeError(f"{what} must be a dict with entries, got {doors.said(value)}")
        for name, item in value.items():
            if not isinstance(name, key):
                raise TypeError(f"each key of {what} must be a {key.__name__}, got {name!r:.40}")
            door(item, f"{what}[{name!r}]")

    return checked


def _either(one: Door, other: Door, kind: type) -> Door:
    return lambda value, what: (one if isinstance(value, kind) else other)(value, what)


def _size(value: object, what: str) -> None:
    if len(doors.listed(value, what)) != 2:
        raise ValueError(f"{what} must be (width, height), got {doors.said(value)}")
    for side in doors.listed(value, what):
        doors.number(side, f"each of {what}", above=0.0, most=200.0)


_study = _of(GramStudy, "a GramStudy, as fl.metrics.gram_study makes")
KINDS: dict[str, Door] = {
    "pd.DataFrame": _frame,
    "str": _text,
    "str | None": doors.optional(_text),
    "float": _number,
    "Sequence[float]": _numbers,
    "Sequence[int]": _counts,
    "Sequence[str]": _texts,
    "Sequence[str] | None": doors.optional(_texts),
    "Mapping[str, str] | None": doors.optional(_each(_text)),
    "tuple[float, float] | None": doors.optional(_size),
    "Axes | None": doors.optional(_of(Axes, "the Axes of a figure")),
    "Figure": _of(Figure, "a figure"),
    "Tensor": _values,
    "Tensor | None": doors.optional(_values),
    "Mapping[str, Tensor]": _each(_values, str),
    "Mapping[str, Sequence[float]]": _each(_numbers, str),
    "Mapping[str, Mapping[str, float]]": _each(_each(_number, str), str),
    "Mapping[str, Convergence]": _each(_of(Convergence, "a Convergence"), str),
    "Mapping[str, ErrorSplit]": _each(_of(ErrorSplit, "an ErrorSplit"), str),
    "Mapping[str, GroupedOverlap]": _each(_of(GroupedOverlap, "a GroupedOverlap"), str),
    "Mapping[tuple[str, str], float]": _each(_number, tuple),
    "GramStudy": _study,
    "Mapping[int, GramStudy]": _each(_study),
    "GramStudy | Mapping[Any, GramStudy]": _either(_study, _each(_study), GramStudy),
    "str | Path": doors.place,
}
# by name, where an annotation says too little
NAMES: dict[str, Door] = {
    "blocks": _each(_matrix, str),
    "spectra": _each(_vector, str),
    "angles": _each(_vector, str),
    "floor": partial(doors.number, above=0.0),
    "log": _logs,
}
