"""The command line: a command is imported when it is called, so that the others cost nothing."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import fisherlab
from fisherlab.commands import own
from fisherlab.commands.help import Command, typeless
from fisherlab.heap import keep_freed_memory

# The first sentence of each command's own help.
COMMANDS = {
    "compare": "Train a model and compare every approximation with the exact Fisher block.",
    "train": "Train a model with several optimizers, and compare them.",
    "sweep": "Search settings on held-out training examples, then train the best and test them.",
    "verify": "Try the papers' claims on random cases, or on a real network.",
    "reproduce": "Reproduce tables and figures of the five papers, beside the papers' numbers.",
    "atlas": "Measure which approximation is nearest, by layer, model, stage and Fisher type.",
    "bench": "Measure time and memory in pairs, each call beside an ordinary step.",
    "rerun": "Run again what a folder holds, with its options, into another folder.",
    "report": "Rebuild the report of a run, or make one report of several runs.",
    "support": "Say for every layer of a model whether it has an exact block.",
    "approximations": "List the registered approximations with equation and source.",
    "data": "List data sets, or fetch one.",
}


class Group(TyperGroup):
    """Several commands."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Every option."""
        return typeless(super().get_params(ctx))


class Commands(Group):
    """The commands by name; `--help` shows them without importing any."""

    listing = False

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.commands = dict.fromkeys(COMMANDS)  # type: ignore[assignment]  # what typos are near to

    def list_commands(self, ctx: Any) -> list[str]:
        """Every name, in the order of `COMMANDS`."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of a name; while help is written, only what help says of it."""
        if cmd_name not in COMMANDS:
            return None
        if self.listing:
            return TyperGroup(name=cmd_name, help=COMMANDS[cmd_name])
        return command(cmd_name)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help of the program."""
        self.listing = True
        try:
            super().format_help(ctx, formatter)
        finally:
            self.listing = False

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Import the user's own files first, wherever `--import` stands: help names theirs too."""
        try:
            files, args = own.taken(args)
            for file in files:
                own.bring(file)
        except ValueError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from None
        return super().parse_args(ctx, args)


def command(name: str) -> Any:
    """The command of a name, made of the function or the group in its module."""
    from fisherlab.commands.common import guarded, loading
    from fisherlab.commands.config import from_file

    with loading(name):
        module = import_module(f"fisherlab.commands.{name}")
    group = module.COMMANDS if name == "data" else None
    made = typer.Typer(cls=Group, add_completion=False, no_args_is_help=group is not None)
    for function in group or [getattr(module, name)]:
        run = guarded(function)
        run = run if group or name == "rerun" else from_file(run)
        made.command(function.__name__.strip("_"), cls=Command)(run)
    if group:
        made.callback(help=COMMANDS[name])(lambda: None)
    found = typer.main.get_command(made)
    found.name = name
    return found


app = typer.Typer(
    name="fisherlab",
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fisherlab {fisherlab.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
    imported: Annotated[
        list[str] | None,
        typer.Option(own.OPTION, metavar="FILE", help="Your models, data and methods: my.py."),
    ] = None,
) -> None:
    """How good is an approximation of a layer's Fisher block, and what does it buy in training?

    Examples:

        fisherlab compare --data digits --model mlp --out runs/first
        fisherlab train --optimizer kfac,tekfac,sgd --epochs 5
        fisherlab --import my.py support --model my_net
        fisherlab COMMAND --help
    """


def main() -> None:
    """The entry point `fisherlab`; its process keeps freed memory for the next tensor."""
    keep_freed_memory()
    try:
        app()
    except OSError as error:  # of a help text; commands name their own
        sys.exit(f"error: the output cannot be written: {error.strerror}")
