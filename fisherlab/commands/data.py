"""`fisherlab data`: which data sets there are, and how to get one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from fisherlab import datasets
from fisherlab.commands.common import say, show
from fisherlab.datasets.files import VARIABLE, data_folder


def list_() -> None:
    """List every data set, what it is, and whether it is here.

    Examples:

        fisherlab data list
    """
    cards = [datasets.card(name) for name in datasets.names()]
    rows = [
        {
            "name": card.name,
            "title": card.title,
            "here": _here(card),
            "classes": "regression" if card.num_classes is None else f"{card.num_classes:,}",
            "example": " x ".join(map(str, card.input_shape)),
            "licence": card.licence,
        }
        for card in cards
    ]
    show(pd.DataFrame(rows), wrap=["title", "licence"])
    say(f"files are looked for in {data_folder()} ({VARIABLE} names another folder)")


def fetch(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(datasets.names())}.")],
    root: Annotated[Path | None, typer.Option(help="Folder of data sets.")] = None,
) -> None:
    """Download the files of a data set; each is kept only with the checksum of its card.

    Examples:

        fisherlab data fetch mnist --root data
    """
    paths = datasets.fetch(name, root)
    if not paths:
        typer.echo(f"{name} comes with the package: nothing to fetch")
    for path in paths:
        typer.echo(path)


COMMANDS = (list_, fetch)


def _here(card: datasets.Card) -> str:
    if not card.files:
        return "bundled"
    folder = data_folder()
    return "yes" if all((folder / file.path).is_file() for file in card.files) else "no"
