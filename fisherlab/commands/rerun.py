"""`fisherlab rerun`: a run again, from the options that its folder holds."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from fisherlab.commands import bench, compare, options, reproduce, sweep, train, verify
from fisherlab.commands.common import UserError, exists
from fisherlab.experiments.rundir import RunDir, versions
from fisherlab.experiments.typed import TYPED

PATH = Path  # typer reads the annotation
COMMANDS: dict[str, Callable[..., None]] = {
    "bench": bench.bench,
    "compare": compare.compare,
    "reproduce": reproduce.reproduce,
    "sweep": sweep.sweep,
    "train": train.train,
    "verify": verify.verify,
}


def rerun(
    folder: Annotated[PATH, typer.Argument(help="The folder of a run.")],
    out: Annotated[PATH | None, typer.Option("--out", "-o", help="Folder; FOLDER-rerun.")] = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Run again what a folder holds, with its options, into another folder.

    The options are those in its config.json. Rows are the same on the same machine and versions,
    times aside; other versions are named.

    Examples:

        fisherlab rerun runs/first
        fisherlab rerun runs/first --out runs/again
    """
    config = RunDir(exists(folder)).config
    there = config.get("versions", {})
    for name, now in versions().items():
        if there.get(name, now) != now:
            typer.echo(f"{name}: {now} here, {there[name]} in {folder}")
    out = out or folder.with_name(f"{folder.name}-rerun")
    typed = config.get("typed", {})
    name, told = str(typed.get("command")), typed.get("options")
    if name == config.get("command") and name in COMMANDS and isinstance(told, dict):
        given: dict[str, Any] = {**told, "out": out}
        # of the folder that was written into, not of the run
        given |= {"overwrite": overwrite} if "overwrite" in told else {}
        given |= {"resume": False} if "resume" in told else {}
        other = given.keys() - inspect.signature(COMMANDS[name]).parameters.keys()
        if other:
            raise UserError(
                f"{folder} is of another version: `fisherlab {name}` takes no "
                f"{', '.join(sorted(other))}"
            )
        TYPED.set({"command": name, "options": given})
        COMMANDS[name](**given)
    elif config.get("command") == "train":
        TYPED.set(None)
        train.trained(train.training.Settings.load(folder), out)
    else:
        raise UserError(
            f"{folder} was not written by the command line, so its options are unknown; "
            f"its config.json has the settings of `{config.get('command')}`"
        )
