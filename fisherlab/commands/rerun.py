"""`fisherlab rerun`: a run again, from the options that its folder holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fisherlab.commands import config, options, train
from fisherlab.commands.common import UserError, exists
from fisherlab.experiments.rundir import CONFIG, RunDir, versions
from fisherlab.experiments.typed import TYPED

PATH = Path  # typer reads the annotation
COMMANDS = ("bench", "compare", "reproduce", "sweep", "train", "verify")


def rerun(
    context: typer.Context,
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
    there = RunDir(exists(folder)).config
    known = there.get("versions", {})
    for what, now in versions().items():
        if known.get(what, now) != now:
            typer.echo(f"{what}: {now} here, {known[what]} in {folder}")
    out = out or folder.with_name(f"{folder.name}-rerun")
    name = there.get("command")
    if name in COMMANDS and there.get("typed", {}).get("command") == name:
        words = ["--config", str(folder / CONFIG), "--out", str(out)]
        made = context.find_root().command.get_command(context, name)  # type: ignore[attr-defined]
        if overwrite and not any(config.OVERWRITE in one.opts for one in made.params):
            raise UserError(_goes_on(name, out))
        words += [config.OVERWRITE] * overwrite
        if code := made.main(words, f"fisherlab {name}", standalone_mode=False):
            raise typer.Exit(code)
    elif name == "train":
        if overwrite:
            raise UserError(_goes_on(name, out))
        TYPED.set(None)
        train.trained(train.training.Settings.load(folder), out)
    else:
        raise UserError(
            f"{folder} was not written by the command line, so its options are unknown; "
            f"its config.json has the settings of `{name}`"
        )


def _goes_on(name: str, out: PATH) -> str:
    """Why a command has no `--overwrite`."""
    return (
        f"`{name}` goes on with what it finds in {out} and replaces nothing: leave --overwrite "
        "out, or name another --out"
    )
