"""`fisherlab --import my.py`: models, data sets, losses and methods of the user's own."""

from __future__ import annotations

import sys
import traceback
from importlib import import_module
from pathlib import Path

from fisherlab.names import executed

OPTION = "--import"


def taken(words: list[str]) -> tuple[list[str], list[str]]:
    """The files that `--import` names, wherever it stands, and the other words.

    Raises:
        ValueError: `--import` is the last word.
    """
    files: list[str] = []
    rest: list[str] = []
    waiting = iter(words)
    for word in waiting:
        if word == "--":
            rest += [word, *waiting]
        elif word == OPTION:
            file = next(waiting, None)
            if file is None:
                raise ValueError(f"{OPTION} takes a file or a module, such as {OPTION} my.py")
            files.append(file)
        elif word.startswith(f"{OPTION}="):
            files.append(word.removeprefix(f"{OPTION}="))
        else:
            rest.append(word)
    return files, rest


def bring(name: str) -> None:
    """Import a file, or a module by its dotted name; what it registers is known by name from here.

    Raises:
        ValueError: There is no such file, or it fails; the message names the line.
    """
    path = Path(name)
    here = str(path.resolve().parent if path.suffix == ".py" else Path.cwd())
    if here not in sys.path:  # its siblings can be imported, as by `python my.py`
        sys.path.insert(0, here)
    try:
        if path.suffix != ".py":
            import_module(name)
            return
        if not path.is_file():
            raise ValueError(f"{OPTION} {name}: there is no such file")
        executed(path)
    except Exception as error:
        if str(error).startswith(OPTION):
            raise
        last = traceback.extract_tb(error.__traceback__)[-1]
        line = (
            "" if last.filename.startswith("<") else f", {Path(last.filename).name}:{last.lineno}"
        )
        raise ValueError(f"{OPTION} {name}{line}: {type(error).__name__}: {error}") from error
