"""`fisherlab approximations`: what is registered."""

from __future__ import annotations

import re

import pandas as pd

from fisherlab.approximations import Approximation, get, names
from fisherlab.commands.common import show


def approximations() -> None:
    """List the registered approximations with equation and source.

    Examples:

        fisherlab approximations
        fisherlab --import my.py approximations
    """
    show(table(), wrap=["equation", "source", "needs"])


def table() -> pd.DataFrame:
    """One row per registered approximation, read off the classes themselves."""
    return pd.DataFrame([row(get(name)) for name in names()])


def row(kind: type[Approximation]) -> dict[str, str]:
    """Name, equation, source, exponent and needs; a variant has the source of what it varies."""
    lines = [base.__doc__.splitlines()[0] for base in kind.__mro__ if base.__doc__]
    parts = [re.split(r"\.\s{2,}", line, maxsplit=1) for line in lines]  # equation.  source.
    source = next((part[1] for part in parts if len(part) > 1), "")
    return {
        "name": kind.name,
        "equation": " ".join(parts[0][0].rstrip(".").replace("`", "").split()),
        "source": source.strip().rstrip("."),
        "exponent": f"{kind.exponent:g}",
        "needs": ", ".join(sorted(kind().needs)).replace("_", " "),
    }
