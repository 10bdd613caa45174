"""Packages that may be missing, and pip's line for each.

Captures, comparisons and optimizers need torch, numpy, scipy and pandas.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

# The module, and what pip installs for it.
PACKAGES = {
    "IPython": "fisherlab[notebooks]",
    "PIL": "fisherlab[data]",
    "backpack": "fisherlab[backpack]",
    "curvlinops": "fisherlab[curvlinops]",
    "ipywidgets": "fisherlab[notebooks]",
    "jinja2": "fisherlab[cli]",
    "lightning": "lightning",
    "kronfluence": "fisherlab[kronfluence]",
    "matplotlib": "fisherlab[plots]",
    "nngeometry": "fisherlab[nngeometry]",
    "opacus": "fisherlab[peers]",
    "optuna": "fisherlab[sweep]",
    "pooch": "fisherlab[data]",
    "psutil": "fisherlab[cli]",
    "pyarrow": "fisherlab[cli]",
    "rich": "fisherlab[cli]",
    "safetensors": "fisherlab[data]",
    "sacrebleu": "fisherlab[data]",
    "seaborn": "fisherlab[plots]",
    "sklearn": "fisherlab[data]",
    "sqlalchemy": "fisherlab[sweep]",
    "tqdm": "fisherlab[cli]",
    "transformers": "transformers",
    "typer": "fisherlab[cli]",
}


class MissingPackage(ModuleNotFoundError):
    """A package that is not installed; the message has pip's line."""


def missing(error: ModuleNotFoundError) -> ModuleNotFoundError:
    """The error with pip's line, for a package that this one uses; else as it is."""
    name = (error.name or "").partition(".")[0]
    if name not in PACKAGES or isinstance(error, MissingPackage):
        return error
    return MissingPackage(
        f"{name} is not installed: pip install '{PACKAGES[name]}'", name=error.name
    )


@contextmanager
def named() -> Iterator[None]:
    """Name pip's line in an import that fails.

    Raises:
        MissingPackage: a package of `PACKAGES` is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise missing(error) from None
