"""Libraries that need not be installed."""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import Any

from fisherlab import doors
from fisherlab.names import unknown


class AdapterError(ImportError):
    """A library is missing, or it cannot make what was asked."""


# pip's name of each module
PACKAGES = {
    "asdl": "asdfghjkl",
    "backpack": "backpack-for-pytorch",
    "curvlinops": "curvlinops-for-pytorch",
    "nngeometry": "nngeometry",
    "safetensors": "safetensors",
}


def library(name: str) -> Any:
    """The module of a library.

    Raises:
        AdapterError: it is not installed; the message has pip's command.
    """
    try:
        with warnings.catch_warnings():
            # the library's own, of what it uses of torch
            warnings.simplefilter("ignore", DeprecationWarning)
            return import_module(name)
    except ImportError as error:
        raise AdapterError(
            f"{name} cannot be imported ({error}): pip install {PACKAGES[name.split('.')[0]]}"
        ) from error


def check_method(method: str, known: tuple[str, ...], name: str) -> None:
    """Refuse a method that a library does not have.

    Raises:
        ValueError: the method is unknown; the message has the nearest.
    """
    if not isinstance(method, str):
        raise ValueError(
            f"method of {name} must be one of {', '.join(known)}; got {doors.said(method)}"
        )
    if method not in known:
        raise ValueError(unknown(f"method of {name}", method, known))
