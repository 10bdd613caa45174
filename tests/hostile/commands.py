"""The command line: every option of every command with what people type by mistake."""

from __future__ import annotations

import functools
import os
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from typer.testing import CliRunner

from fisherlab import cli
from hostile.judge import Case

WORDS = ("", " ", "nan", "-1", "0", "1e400", "x,", ",", "a=b", "<b>", "ü\n", "None", "[1]", "1.5")
PLACES = ("/nowhere/x", "/dev/null", "a" * 300, "\0", "/proc/1", "")
FILES = (*PLACES, "{file}", "{folder}", "{binary}")
CONTENTS = (
    *("", "{}", "[]", "{", "null", "\0", "a = 1", "a" * 9999),
    *('{"typed": 3}', '{"typed": {"command": 3}}', '{"command": "train"}', '{"command": []}'),
    *('{"typed": {"command": "compare", "options": 3}}', '{"settings": []}', '{"title": 3}'),
    *('{"command": "compare", "settings": 3}', '{"command": "sweep"}'),
    *('{"command": "verify", "notes": 3}', '{"command": "train", "settings": {"entries": 3}}'),
)
# what a short run of each command needs beside the option that is tried
BASE: dict[str, list[str]] = {
    "compare": "--data digits --model mlp --epochs 0 --at start --compare-examples 8".split()
    + "--approximations diagonal --layers nothing*".split(),
    "train": "--data digits --model mlp --optimizer nothing --epochs 1".split(),
    "verify": ["nothing"],
    "report": ["/nowhere/run"],
    "reproduce": ["nothing"],
    "bench": ["nothing"],
    "atlas": ["--models", "nothing"],
    "rerun": ["/nowhere/run"],
}


@functools.cache
def commands() -> dict[tuple[str, ...], Any]:
    """Every command of the line with its parameters, by the words that name it."""
    made = {name: cli.command(name) for name in cli.COMMANDS}
    found: dict[tuple[str, ...], Any] = {}
    for name, command in made.items():
        inside = getattr(command, "commands", None)
        found |= (
            {(name, word): one for word, one in inside.items()} if inside else {(name,): command}
        )
    return found


def parameters(command: Any) -> list[Any]:
    """The options and arguments of a command."""
    context = command.make_context("x", [], resilient_parsing=True)
    return list(command.get_params(context))


def typed(draw: random.Random) -> Case:
    """One option or argument with junk."""
    path = draw.choice(sorted(commands()))
    command = commands()[path]
    # `typeless` leaves the parameters to the context
    parameter = draw.choice(parameters(command))
    option = getattr(parameter, "opts", [parameter.name])[0]
    of_files = parameter.name in ("out", "folder", "folders", "config", "page", "run", "root")
    value = draw.choice(FILES if of_files or draw.random() < 0.2 else WORDS)
    words = [*path, *BASE.get(path[0], [])]
    if getattr(parameter, "is_flag", False):
        words += [option, "junk"]
    elif option.startswith("-"):
        words += [option, value]
    else:
        words.append(value)
    return Case(" ".join(words)[:150].replace("\0", "?"), lambda: ended(words), checked)


def files(draw: random.Random) -> Case:
    """A damaged or foreign file where a command takes one."""
    content = draw.choice(CONTENTS)
    which = draw.choice(["report", "rerun", "train --config", "compare --config", "train --out"])
    suffix = draw.choice([".json", ".toml", ""])

    def call() -> object:
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder) / ("config.json" if "config" not in which else f"c{suffix}")
            place.write_text(content)
            target = place if "config" in which else folder
            words = which.split()
            more = BASE[words[0]] if len(words) > 1 else []
            return ended([words[0], *more, *words[1:], str(target)])

    return Case(f"{which} with {content[:30]!r}{suffix}", call, checked)


def ended(words: list[str]) -> tuple[int, str]:
    """The exit code and the output of a command, run where nothing of the user's is."""
    before, temporary = Path.cwd(), tempfile.tempdir
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        tempfile.tempdir = folder
        try:
            (Path(folder) / "file").write_text("no table")
            (Path(folder) / "binary").write_bytes(bytes(range(256)))
            given = [word.format(file="file", folder=".", binary="binary") for word in words]
            state = random.getstate()
            with torch.random.fork_rng():  # a command's process is its own
                result = CliRunner().invoke(cli.app, given)
            random.setstate(state)
            text = result.output
            for log in Path(folder).glob("fisherlab-*.log"):
                text += log.read_text()
            left = sorted(p.name for p in Path(folder).rglob("*.part"))
        finally:
            os.chdir(before)
            tempfile.tempdir = temporary
    error = result.exception
    if error is not None and not isinstance(error, SystemExit):
        return 70, f"{type(error).__name__}: {error}"
    return result.exit_code, text + "".join(f"left {name}" for name in left)


def checked(found: Any) -> str:
    code, output = found
    if code not in (0, 1, 2):
        return f"exit code {code}: {output[-500:]}"
    if "Traceback" in output or "left ." in output:
        return output[-300:]
    return "" if code != 2 or len(output) > 20 else "no message"


def case(seed: int) -> Case:
    draw = random.Random(seed)
    kinds: list[Callable[[random.Random], Case]] = [typed, typed, typed, files]
    return draw.choice(kinds)(draw)
