"""The command line. It registers the commands of `fisherlab.commands` and does nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

import fisherlab
from fisherlab.commands import (
    approximations,
    bench,
    compare,
    data,
    report,
    reproduce,
    rerun,
    support,
    sweep,
    train,
    verify,
)
from fisherlab.commands.common import guarded
from fisherlab.commands.config import from_file
from fisherlab.heap import keep_freed_memory

COMMANDS: list[Callable[..., None]] = [
    compare.compare,
    approximations.approximations,
    support.support,
    report.report,
    train.train,
    sweep.sweep,
    verify.verify,
    reproduce.reproduce,
    bench.bench,
]

app = typer.Typer(
    name="fisherlab",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in COMMANDS:
    app.command()(from_file(guarded(command)))
app.command()(guarded(rerun.rerun))
app.add_typer(data.app, name="data")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fisherlab {fisherlab.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """How good is an approximation of a layer's Fisher block, and what does it buy in training?"""


def main() -> None:
    """The entry point `fisherlab`; its process keeps freed memory for the next tensor."""
    keep_freed_memory()
    app()
