"""`fisherlab atlas`: which approximation is nearest for which layer and which stage."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fisherlab import whole
from fisherlab.commands import options
from fisherlab.commands.common import UserError, progress, seeds_of, told_of, words

PATH = Path  # typer reads the annotation


def atlas(
    folder: Annotated[PATH, typer.Option("--out", "-o", help="Folder of the rows.")] = Path(
        "data/results/atlas"
    ),
    names: Annotated[
        str, typer.Option("--approximations", "-a", help="Comma list of further approximations.")
    ] = "",
    only: Annotated[
        str, typer.Option("--models", help="Comma list such as mlp,token-mnist; default all.")
    ] = "",
    seeds: options.Seeds = "2",
    page: Annotated[
        PATH | None, typer.Option(help="Write the page of the rows that are there, and stop.")
    ] = None,
) -> None:
    """Measure which approximation is nearest, by layer, model, stage and Fisher type.

    Every number is of unseen examples. A Parquet file per model and seed is written as soon as it
    is measured, so that the same command goes on where it was stopped. The page is made of the
    files alone.

    Examples:

        fisherlab atlas --models mlp --seeds 1 -o runs/atlas
        fisherlab --import my.py atlas -a mine
        fisherlab atlas --page docs/atlas.md
    """
    from fisherlab.experiments import atlas as experiment

    if page is not None:
        try:
            rows = experiment.load(folder)
        except FileNotFoundError as error:
            raise UserError(str(error)) from None
        with told_of(folder):
            text = experiment.markdown(rows)
        whole.write(page, text)
        typer.echo(f"page: {page}")
        return
    try:
        cells, wanted = experiment.named(words(only)), experiment.wanted(words(names))
    except (ValueError, KeyError) as error:
        raise UserError(str(error)) from None
    pairs = [(cell, seed) for seed in seeds_of(seeds) for cell in cells]
    for cell, seed in progress(pairs, "models"):
        if experiment.kept(folder, cell, seed, wanted):
            typer.echo(f"{cell.name} on {cell.data}, seed {seed}")
    typer.echo(f"rows: {folder}; fisherlab atlas --page FILE writes their page")
