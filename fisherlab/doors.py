"""Typed doors: every argument is checked where it enters, by one function per kind of thing.

A door returns what it was given, or refuses it: the message names the argument, says what was
passed, and what to pass instead.
"""

from __future__ import annotations

import inspect
import math
import os
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_PLAIN = (Tensor, nn.Parameter)
_NUMBERS = (int, float, np.integer, np.floating)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
# A check of one argument by its name: the argument, as what it is taken for; None: as it is.
Door = Callable[[Any, str], Any]
# a decomposition of these exists on every device
_DTYPES = (torch.float32, torch.float64)
_DENSE = "convert it: to_dense() of a sparse one, dequantize() of a quantised one"


def said(value: object) -> str:
    """A value in a few words: `'abc' (str)`, `a torch.int64 tensor of shape (2, 3)`."""
    if isinstance(value, Tensor):
        if value.is_nested or nn.parameter.is_lazy(value):
            return "a nested tensor" if value.is_nested else f"a {type(value).__name__}"
        kind = "" if value.layout == torch.strided else f" {value.layout}"
        return f"a{kind} {value.dtype} tensor of shape {tuple(value.shape)}"
    try:
        text = reprlib.repr(value)
    except Exception:  # a user's own repr may fail
        text = "an object"
    wide = ", of more than 64 bits" if _is_wide(value) else ""
    return f"{text} ({type(value).__name__}{wide})"


def number(
    value: object,
    what: str,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    below: float = math.inf,
    most: float = math.inf,
    error: type[Exception] = ValueError,
) -> float:
    """A finite real number in an interval; a tensor of one element counts as one.

    Args:
        value: what was passed.
        what: its name.
        least: the smallest that is allowed.
        above: what it has to exceed.
        below: what it has to stay under.
        most: the largest that is allowed.
        error: the type of the refusal.
    """
    found = real(value)
    if (
        found is None
        or not math.isfinite(found)
        or not (least <= found <= most and found < below and (found > above or above == -math.inf))
    ):
        bounds = [
            f"{sign} {bound:g}"
            for sign, bound in ((">=", least), (">", above), ("<", below), ("<=", most))
            if math.isfinite(bound)
        ]
        wanted = " ".join(["must be a finite number", " and ".join(bounds)]).strip()
        raise error(f"{what} {wanted}, got {said(value)}")
    return found


def real(value: object) -> float | None:
    """The real number that a value is, a bool being none; None: it is none.

    Numbers are those that multiply a tensor: no fraction, no int of more than 64 bits.
    """
    if type(value) is float:
        return value
    if isinstance(value, Tensor):
        fits = (
            not value.is_nested
            and not nn.parameter.is_lazy(value)
            and value.numel() == 1
            and value.dtype != torch.bool
            and not (value.is_complex() or value.is_quantized or value.is_meta)
            and value.layout == torch.strided
        )
        return float(value) if fits else None
    if isinstance(value, bool) or not isinstance(value, _NUMBERS) or _is_wide(value):
        return None
    return float(value)


def _is_wide(value: object) -> bool:
    """Whether it is an int that no tensor can hold."""
    return isinstance(value, int) and not -(2**63) <= value < 2**63


def count(value: object, what: str, least: int = 1, *, error: type[Exception] = ValueError) -> int:
    """A whole number of things; a float that is whole counts as one."""
    found = real(value)
    if found is None or not math.isfinite(found) or found != int(found) or found < least:
        raise error(f"{what} must be a whole number >= {least}, got {said(value)}")
    return int(found)


def flag(value: object, what: str, *, error: type[Exception] = ValueError) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise error(f"{what} must be True or False, got {said(value)}")
    return value


def listed(value: object, what: str, *, error: type[Exception] = ValueError) -> Sequence[Any]:
    """A list of things, which may be a tuple; no string, no generator."""
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise error(f"{what} must be a list, got {said(value)}")
    return value


def items(value: object, what: str, *, error: type[Exception] = ValueError) -> list[Any]:
    """All of an iterable, such as names in a set or a generator; a string is one item."""
    if isinstance(value, str):
        return [value]
    try:
        return list(value)  # type: ignore[call-overload]
    except Exception as failed:  # an array without axes; an iterator of the user's that breaks off
        raise error(f"{what} cannot be iterated over ({failed}); got {said(value)}") from failed


def numbers(
    value: object, what: str, *, least: float = -math.inf, error: type[Exception] = ValueError
) -> list[float]:
    """A list, an array or a tensor of numbers in one axis, as floats; NaN only without a bound."""
    if isinstance(value, Tensor):
        plain = value.double() if is_index(value) else value
        value = tensor(plain, what, ndim=(1,), error=error).tolist()
    elif isinstance(value, np.ndarray) and value.ndim == 1:
        value = value.tolist()
    found = listed(value, what, error=error)
    if least > -math.inf:
        return [number(x, f"each of {what}", least=least, error=error) for x in found]
    reals = [real(x) for x in found]
    if None in reals:
        raise error(f"{what} must be numbers, got {said(found[reals.index(None)])} among them")
    return [x for x in reals if x is not None]


def is_index(value: Tensor) -> bool:
    """Whether a tensor holds whole numbers; flags are none."""
    return is_strided(value) and value.dtype in _INTEGERS


def is_strided(value: Tensor) -> bool:
    """Whether a tensor holds its entries one by one: no lazy, nested or sparse one does."""
    lazy = nn.parameter.is_lazy(value)
    return not (lazy or value.is_nested) and value.layout == torch.strided


def is_whole(value: object) -> bool:
    """Whether it is an int of Python, and no flag."""
    return isinstance(value, int) and not isinstance(value, bool)


def instance(value: object, what: str, kind: type | tuple[type, ...], wanted: str) -> Any:
    """An object of a class; `wanted` says which one, and how it is made."""
    if not isinstance(value, kind):
        raise TypeError(f"{what} must be {wanted}, got {said(value)}")
    return value


def optional(door: Door) -> Door:
    """A door that lets None pass."""
    return lambda value, what: None if value is None else door(value, what)


def passed(
    checks: Iterable[tuple[int, str, Door]], args: Sequence[Any], named: Mapping[str, Any]
) -> tuple[list[Any], dict[str, Any], dict[str, Any]]:
    """Arguments through their doors; what a door returns takes the argument's place.

    Args:
        checks: position, name and door of each argument that has one.
        args: the positional arguments of a call.
        named: its other ones.

    Returns:
        Both, as the function gets them, and the checked ones by name.
    """
    given, options, found = list(args), dict(named), {}
    for position, name, door in checks:
        holder: Any = given if position < len(given) else options
        if holder is options and name not in options:
            continue
        key: Any = position if holder is given else name
        taken = door(holder[key], name)
        if taken is not None:
            holder[key] = taken
        found[name] = holder[key]
    return given, options, found


def choice(
    value: object, what: str, known: Iterable[str], *, error: type[Exception] = ValueError
) -> str:
    """One of some names."""
    known = list(known)
    if not isinstance(value, str):
        raise error(f"{what} must be one of {', '.join(known)}; got {said(value)}")
    if value not in known:
        raise error(f"unknown {what} {value!r}; one of {', '.join(known)}")
    return value


def name(value: object, what: str, *, error: type[Exception] = ValueError) -> str:
    """A name, which is a string."""
    if not isinstance(value, str):
        raise error(f"{what} must be a name, a string; got {said(value)}")
    return value


def place(value: object, what: str, *, error: type[Exception] = ValueError) -> Path:
    """A file or a folder, as a string or a path."""
    if isinstance(value, str | Path):
        with suppress(UnicodeEncodeError):
            if b"\0" not in os.fsencode(value):
                return Path(value)
    raise error(f"{what} must be a path, got {said(value)}")


def tensor(
    value: object,
    what: str,
    *,
    ndim: tuple[int, ...] = (),
    full: bool = False,
    error: type[Exception] = ValueError,
) -> Tensor:
    """A dense tensor of real float32 or float64 numbers.

    Args:
        value: what was passed.
        what: its name.
        ndim: how many axes it may have; empty: any number.
        full: whether it has to have entries.
        error: the type of the refusal.
    """
    if not isinstance(value, Tensor):
        raise error(f"{what} must be a tensor, got {said(value)}; pass torch.as_tensor(...)")
    if nn.parameter.is_lazy(value):
        raise error(f"{what} is not initialised: a lazy module takes its shape from a first batch")
    if not is_strided(value) or value.is_quantized:
        raise error(f"{what} must be a dense tensor, got {said(value)}; {_DENSE}")
    if value.dtype not in _DTYPES:
        raise error(
            f"{what} must hold real numbers in float32 or float64, got {said(value)}; convert it"
        )
    if type(value) in _PLAIN and value.is_meta:
        raise error(f"{what} is on the device 'meta', which holds no numbers; give it some")
    if ndim and value.ndim not in ndim:
        axes = " or ".join(map(str, ndim))
        raise error(f"{what} must have {axes} axes, got {said(value)}")
    if full and not value.numel():
        raise error(f"{what} must have entries, got {said(value)}")
    return value


def module(value: object, what: str = "the model") -> nn.Module:
    """A network, not its class."""
    if not isinstance(value, nn.Module):
        raise TypeError(f"{what} is a torch.nn.Module, got {type(value).__name__}")
    return value


def function(value: object, call: str, *, error: type[Exception] = ValueError) -> Any:
    """Something that can be called in a stated way.

    Args:
        value: what was passed.
        call: its name and its arguments, such as `forward(model, x)`.
        error: the type of the refusal.
    """
    what, _, names = call.removesuffix(")").partition("(")
    if not callable(value):
        raise error(f"{what} must be callable, as {call}; got {said(value)}")
    try:
        inspect.signature(value).bind(*filter(None, names.split(", ")))
    except TypeError:
        raise error(f"{what} is called as {call}, which {said(value)} does not take") from None
    except ValueError:  # no signature is known
        pass
    return value
