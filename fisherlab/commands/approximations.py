"""`fisherlab approximations`: what is registered."""

from __future__ import annotations

import pandas as pd

from fisherlab.approximations import Approximation, get, names
from fisherlab.commands.common import show


def approximations() -> None:
    """List the registered approximations: the equation, its source, the exponent, what it needs."""
    show(table(), wrap=["equation", "source"])


def table() -> pd.DataFrame:
    """One row per registered approximation, read off the classes themselves."""
    return pd.DataFrame([row(get(name)) for name in names()])


def row(kind: type[Approximation]) -> dict[str, str]:
    """Name, equation, source, exponent and needs; a variant has the source of what it varies."""
    lines = [(base.__doc__ or "").splitlines()[0] for base in kind.__mro__ if base.__doc__]
    parts = [line.partition("      ") for line in lines]  # equation, six spaces, source
    return {
        "name": kind.name,
        "equation": parts[0][0].strip().rstrip(".").replace("`", ""),
        "source": next((source.strip() for _, _, source in parts if source), ""),
        "exponent": f"{kind.exponent:g}",
        "needs": ", ".join(sorted(kind().needs)).replace("_", " "),
    }
