"""Typed doors: every argument is checked where it enters, by one function per kind of thing.

A door returns what it was given, or refuses it: the message names the argument, says what was
passed, and what to pass instead.
"""

from __future__ import annotations

import inspect
import math
import reprlib
from collections.abc import Iterable
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (Tensor, nn.Parameter)
# a decomposition of these exists on every device
_DTYPES = (torch.float32, torch.float64)


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
    return f"{text} ({type(value).__name__})"


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
    """The real number that a value is, a bool being none; None: it is none."""
    if isinstance(value, Tensor):
        fits = (
            not value.is_nested
            and value.numel() == 1
            and value.dtype != torch.bool
            and not (value.is_complex() or value.is_quantized or value.is_meta)
            and value.layout == torch.strided
        )
        return float(value) if fits else None
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


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
    if not isinstance(value, str | Path) or "\0" in str(value):
        raise error(f"{what} must be a path, got {said(value)}")
    return Path(value)


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
    if value.is_nested or value.layout != torch.strided or value.is_quantized:
        raise error(f"{what} must be a dense tensor, got {said(value)}; pass {what}.to_dense()")
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
