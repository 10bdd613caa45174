"""`fisherlab report`: the HTML page of a run made anew, or of several side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fisherlab.commands import options
from fisherlab.commands.common import UserError, exists, told_of


def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders that hold runs.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The page of several runs; default report.html here."),
    ] = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Rebuild the report of a run, or make one report of several runs.

    Examples:

        fisherlab report runs/first
        fisherlab report runs/first runs/second --out both.html
    """
    # the page of each kind of run
    from fisherlab.experiments import pages, verification  # noqa: F401
    from fisherlab.experiments.report import write, write_side_by_side
    from fisherlab.experiments.reproduce import page  # noqa: F401
    from fisherlab.experiments.rundir import REPORT, RunDir

    runs = [RunDir(exists(folder)) for folder in folders]
    for run in runs:
        _ = run.config  # a folder without a run is refused before anything is made
    if len(runs) == 1 and out is None:
        with told_of(*folders):
            typer.echo(write(runs[0]))
        return
    path = out or Path(REPORT)
    if path.is_dir() or (path.exists() and not overwrite):
        raise UserError(f"{path} exists; pass --overwrite to replace it, or another --out")
    with told_of(*folders):
        typer.echo(write_side_by_side(runs, path))
