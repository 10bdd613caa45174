"""`--config FILE`: the options of a command in a file, TOML or the config.json of a run."""

from __future__ import annotations

import inspect
import json
import tomllib
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from fisherlab.names import unknown

NAME = "config"
OVERWRITE = "--overwrite"
# In a config.json these are of the folder that it lies in, not of the run.
OF_FOLDER = ("overwrite", "resume")


def from_file(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command with an option `--config`, whose file has the options that are not typed."""
    option = Annotated[
        Path | None,
        typer.Option(
            "--config",
            callback=_read,
            is_eager=True,
            help="Options in a file: TOML, or the config.json of a run; typed ones win.",
        ),
    ]

    @wraps(command)
    def run(**options: Any) -> Any:
        options.pop(NAME)
        return command(**options)

    mine = inspect.signature(command, eval_str=True)
    extra = inspect.Parameter(NAME, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=option)
    every = [p.replace(kind=p.KEYWORD_ONLY) for p in mine.parameters.values()] + [extra]
    run.__signature__ = mine.replace(parameters=every)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in every}
    return run


def _read(context: typer.Context, path: Path | None) -> Path | None:
    """Make the options of the file the defaults of the command."""
    if path is not None:
        try:
            given = _parsed(path)
            command = given.pop("command", context.command.name)
            if command != context.command.name:
                raise ValueError(f"it is of `fisherlab {command}`, not of {context.command.name}")
            context.default_map = _defaults(context, given)
        except (OSError, ValueError) as error:
            raise typer.BadParameter(f"{path}: {error}") from None
    return path


def _parsed(path: Path) -> dict[str, Any]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".toml":
        return tomllib.loads(text)
    content = json.loads(text)
    typed = content.get("typed") if isinstance(content, dict) else None
    if not isinstance(typed, dict) or not isinstance(typed.get("options"), dict):
        raise ValueError(
            "it is no TOML file (name.toml), and no config.json of a run of the command line"
        )
    told = {name: value for name, value in typed["options"].items() if name not in OF_FOLDER}
    return {"command": typed.get("command"), **told}


def _defaults(context: typer.Context, given: Mapping[str, Any]) -> dict[str, Any]:
    """`{parameter: value}` of options by their names, with `-` or `_`, or by the parameters'."""
    places: dict[str, Any] = {}
    for parameter in context.command.params:
        words = [*parameter.opts, *parameter.secondary_opts, parameter.name or ""]
        places |= {word.lstrip("-").replace("-", "_"): parameter for word in words}
    for name in (NAME, "help", "h", "o"):
        places.pop(name, None)
    found = {}
    for name, value in given.items():
        if (key := name.replace("-", "_")) not in places:
            raise ValueError(unknown("option", name, list(places)))
        parameter = places[key]
        assert parameter.name is not None
        if value is not None:
            found[parameter.name] = _value(name, value, parameter)
    return found


def _value(name: str, value: Any, parameter: Any) -> Any:
    """Give the words that a user would type: several, a flag, or one word."""
    if getattr(parameter, "is_flag", False):
        if not isinstance(value, bool):  # no door of the library, which imports torch
            got = f"{value!r} ({type(value).__name__})"
            raise ValueError(f"{name} must be True or False, got {got}")
        return value
    if isinstance(value, Mapping):
        value = list(_assignments(value))
    if getattr(parameter, "multiple", False) or parameter.nargs == -1:
        return [str(item) for item in (value if isinstance(value, list) else [value])]
    return _word(value)


def _word(value: Any) -> str:
    """One word, commas between items."""
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _assignments(table: Mapping[str, Any], head: str = "") -> Iterator[str]:
    """`kfac.lr=0.1` of a table `{"kfac": {"lr": 0.1}}`."""
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from _assignments(value, f"{head}{name}.")
        else:
            yield f"{head}{name}={_word(value)}"
