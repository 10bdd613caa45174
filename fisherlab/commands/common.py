"""Shared by commands: exit codes, errors without tracebacks, lists of names, progress, tables."""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, TypeVar

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tqdm import tqdm

from fisherlab.experiments.typed import TYPED
from fisherlab.extras import missing
from fisherlab.heap import is_out_of_memory
from fisherlab.names import unknown

if TYPE_CHECKING:  # a command that lists needs neither
    import pandas as pd

T = TypeVar("T")


class Code(IntEnum):
    """The meaning of a command's exit code."""

    DONE = 0  # rows may say refused or diverged, with the reason
    NOTHING = 1  # nothing succeeded, or a claim's verdict is not the recorded one
    MISTAKE = 2  # the user's: a message, no traceback
    BUG = 70  # ours: a short message, and a file with the traceback
    INTERRUPTED = 130  # by Ctrl-C; what was done so far is kept
    TERMINATED = 143  # by SIGTERM; the same


class UserError(ValueError):
    """A mistake of the user's, in words that name the thing, what it got and the next step."""


def guarded(command: Callable[..., Any]) -> Callable[..., Any]:
    """A command whose every way to end is an exit code and a message.

    The user's mistakes are the exceptions that this package defines, files that cannot be read or
    written, and too little memory. A command that keeps results when interrupted raises
    `KeyboardInterrupt` with a message that says where they are.
    """

    @wraps(command)
    def run(*args: Any, **options: Any) -> Any:
        told = TYPED.set({"command": command.__name__, "options": options})
        CtrlC.code = Code.INTERRUPTED
        try:
            with CtrlC():
                return command(*args, **options)
        except typer.Exit as end:
            if end.exit_code == Code.INTERRUPTED:
                raise typer.Exit(CtrlC.code) from None
            raise
        except typer.Abort:
            raise
        except KeyboardInterrupt as stop:
            leave(CtrlC.code, str(stop) or "interrupted")
        except BrokenPipeError:  # the reader of our output has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(Code.DONE) from None
        except Exception as error:
            if hasattr(error, "show"):  # typer's own usage errors
                raise
            mistake = _mistake(error)
            if mistake is None:
                leave(Code.BUG, _bug(error))
            leave(Code.MISTAKE, f"error: {mistake}")
        finally:
            TYPED.reset(told)

    return run


def leave(code: Code, message: str) -> NoReturn:
    """End the command with a message on standard error."""
    typer.echo(message, err=True)
    raise typer.Exit(code)


def _mistake(error: Exception) -> str | None:
    """The message for the user if the error is theirs, else None."""
    if isinstance(error, ModuleNotFoundError):
        error = missing(error)
    if type(error).__module__.split(".")[0] == "fisherlab":
        return str(error)
    if is_out_of_memory(error):
        return f"out of memory: {_line(error)}; take a smaller batch, model or --memory"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{error.strerror}, where output or a file is written; free some, or choose another"
    return None


def _bug(error: Exception) -> str:
    """The message of a bug, and where its traceback is: in a file, or below, if none can be."""
    text = f"fisherlab {' '.join(sys.argv[1:])}\n\n{traceback.format_exc()}"
    try:
        handle, where = tempfile.mkstemp(prefix="fisherlab-", suffix=".log")
        with os.fdopen(handle, "w", encoding="utf-8", errors="replace") as log:
            log.write(text)
    except OSError:
        where = f"this message:\n\n{text}"
    return (
        f"internal error: {type(error).__name__}: {_line(error)}\n"
        f"This is a bug of FisherLab. The traceback is in {where}"
    )


def _line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")


class Pressed(KeyboardInterrupt):
    """Ctrl-C, of a type of its own.

    Where the plain one leaves an `exec`, as of a dataclass that is being made, `python -m` ends by
    SIGINT whatever the exit code is.
    """


class CtrlC:
    """Ctrl-C that cannot get lost: `KeyboardInterrupt` at once, and again at the next `check`.

    Python drops an exception in a destructor or in the callback of a weak reference: the signal is
    sent once more. Other code may drop it without a word.
    SIGTERM, by which clusters and containers end a process, is Ctrl-C with an exit code of its own.
    """

    asked = False
    # the exit code for the signal that came last
    code: ClassVar[Code] = Code.INTERRUPTED

    def __enter__(self) -> CtrlC:
        main = threading.current_thread() is threading.main_thread()
        signals = (signal.SIGINT, signal.SIGTERM) if main else ()
        self._before = {number: signal.signal(number, self._raise) for number in signals}
        self._again: threading.Timer | None = None
        self._unraisable, sys.unraisablehook = sys.unraisablehook, self._dropped
        return self

    def __exit__(self, *_: object) -> None:
        sys.unraisablehook = self._unraisable
        if self._again is not None:
            self._again.cancel()
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _raise(self, number: int, _: object) -> NoReturn:
        self.asked = True
        CtrlC.code = Code.TERMINATED if number == signal.SIGTERM else Code.INTERRUPTED
        raise Pressed

    def _dropped(self, lost: Any) -> None:
        """Send the signal again, from outside of what dropped it."""
        if not isinstance(lost.exc_value, Pressed):
            self._unraisable(lost)
            return
        self._again = threading.Timer(0.01, os.kill, (os.getpid(), CtrlC.code - 128))
        self._again.daemon = True
        self._again.start()

    def check(self) -> None:
        """Raise it if it was pressed, and whoever got it went on."""
        if self.asked:
            self.asked = False
            raise Pressed


# Typed by the user ------------------------------------------------------------------------------


def known(kind: str, given: str, names: Iterable[str]) -> str:
    """The name, if it is one of `names`; else a `UserError` with the nearest."""
    names = list(names)
    if given not in names:
        raise UserError(unknown(kind, given, names))
    return given


def file_name(text: str) -> str:
    """The text as the name of a file: `folder:/a/b -> folder_a_b`."""
    return re.sub(r"[^\w.+-]+", "_", text).strip("_")


def words(text: str | None) -> list[str]:
    """`"a, b, b" -> ["a", "b", "b"]`: in order, repeats kept; `once` drops them."""
    return [word.strip() for word in (text or "").split(",") if word.strip()]


def once(items: Iterable[T]) -> list[T]:
    """Every item at its first place: for lists in which a second mention says nothing."""
    return list(dict.fromkeys(items))


def several(kind: str, text: str, names: Iterable[str]) -> list[str]:
    """A comma list of known names, at least one, each once; `all` is every one of them."""
    names = list(names)
    given = names if text.strip() == "all" else once(words(text))
    if not given:
        raise UserError(f"no {kind} given. Known: {', '.join(names)}")
    return [known(kind, word, names) for word in given]


def numbers(option: str, text: str, number: Callable[[str], T]) -> list[T]:
    """A comma list of numbers, at least one, repeats kept; `number` is `int` or `float`."""
    try:
        found = [number(word) for word in words(text)]
    except ValueError:
        found = []
    if not found:
        kind = "whole numbers" if number is int else "numbers"
        raise UserError(f"{option} takes {kind} separated by commas, got {text!r}")
    return found


# Above it a count was meant as a seed.
MOST_SEEDS = 100_000


def seeds_of(text: str, first: int = 0) -> tuple[int, ...]:
    """`--seeds 3` counts them from the first one, `--seeds 0,4,7` names them."""
    found = once(numbers("--seeds", text, int))
    if "," not in text:
        if not 1 <= found[0] <= MOST_SEEDS:
            raise UserError(
                f"--seeds is a count from 1 to {MOST_SEEDS:,}, or a list such as 0,4,7; got "
                f"{text!r}"
            )
        found = [*range(first, first + found[0])]
    if max(map(abs, found)) >= 2**40:  # generators take 64 bits, a run's a million times its seed
        raise UserError(f"a seed is a whole number below 2^40; got {max(found, key=abs)}")
    return tuple(found)


def size(text: str | None) -> int | None:
    """`"512M" -> 536870912`: a number of bytes with K, M, G or nothing behind it."""
    if text is None:
        return None
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    unit = units.get(text[-1:].upper(), 1)
    try:
        found = float(text[:-1] if unit > 1 else text) * unit
    except ValueError:
        found = 0
    if not 1 <= found < float("inf"):
        raise UserError(f"a size is a number of bytes such as 800M or 2G, got {text!r}")
    return int(found)


# Shown to the user ------------------------------------------------------------------------------


@contextmanager
def loading(what: str) -> Iterator[None]:
    """A line on a terminal while modules are imported, which takes seconds; then it is gone."""
    shown = sys.stderr.isatty()
    if shown:
        print(f"loading {what}", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def progress(items: Iterable[T], description: str = "", total: int | None = None) -> Iterable[T]:
    """A bar on a terminal's standard error, nothing elsewhere."""
    return tqdm(items, desc=description, total=total, leave=False, disable=None, file=sys.stderr)


def bar(total: int, description: str = "") -> Any:
    """A progress bar to `update(1)` and close, or use in a `with`."""
    return tqdm(total=total, desc=description, leave=False, disable=None, file=sys.stderr)


NARROW, WRAPPED = 16, 36  # least and most columns of a cell that may take several lines
STYLES = {"refuted": "red", "holds": "green", "undecided": "yellow", "diverged": "red"}


def show(
    frame: pd.DataFrame,
    title: str = "",
    digits: int = 3,
    wrap: Sequence[str] = (),
    rest: str = "",
) -> None:
    """A frame as a table that fits the terminal; a file gets all of it.

    Args:
        frame: Its columns in the order of their importance: the last ones give way.
        title: Stands above the table.
        digits: Significant digits of a number.
        wrap: Columns whose cells may take several lines; no cell is ever cut.
        rest: The file that has every column, named where some gave way.
    """
    cells = {
        str(name): [_cell(value, digits) for value in frame.iloc[:, k]]
        for k, name in enumerate(frame.columns)
    }
    console = Console() if sys.stdout.isatty() else Console(width=10_000, color_system=None)
    whole = {name: _width(name, column) for name, column in cells.items()}
    least = {n: min(w, NARROW) if n in wrap else w for n, w in whole.items()}
    if not sys.stdout.isatty():  # a word is broken on a terminal only: a file is searched for it
        least |= {n: max(least[n], *map(_longest, cells[n])) for n in wrap if cells.get(n)}
    shown = _fitting(least, console.width)
    room = console.width - sum(least[name] + 2 for name in shown)
    widths: dict[str, int] = {}
    for name in shown:
        more = max(0, min(whole[name], WRAPPED) - least[name]) if name in wrap else 0
        widths[name] = least[name] + min(more, max(0, room))
        room -= widths[name] - least[name]
    if sys.stdout.isatty() and wrap and room > 0:  # the last text takes what is left
        last = [name for name in shown if name in wrap][-1:]
        widths |= {name: min(whole[name], widths[name] + room) for name in last}
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for name in shown:
        numeric = frame[name].dtype.kind in "biufc"
        table.add_column(
            escape(_heading(name)), justify="right" if numeric else "left", no_wrap=True
        )
    for row in range(len(frame)):
        table.add_row(*(_styled(_lines(cells[name][row], widths[name])) for name in shown))
    console.print(f"\n[bold]{escape(title)}[/]" if title else "")
    console.print(table)
    left = [" ".join(_heading(name).split()) for name in cells if name not in shown]
    if left:
        where = f"; {rest} has all columns" if rest else "; a wider terminal shows them"
        say(f"no room for {', '.join(left)}{where}")


def say(text: str) -> None:
    """A sentence, broken between words where the terminal ends."""
    if sys.stdout.isatty():
        Console(highlight=False, markup=False, emoji=False).print(text)
    else:
        typer.echo(text)


def _fitting(widths: dict[str, int], room: int) -> list[str]:
    """The leading columns that have room together, the first in any case."""
    shown = list(widths)
    while len(shown) > 1 and sum(widths[name] + 2 for name in shown) > room:
        shown.pop()
    return shown


def _width(name: str, column: Sequence[str]) -> int:
    return max(map(len, [*_heading(name).split("\n"), *column]))


def _longest(text: str) -> int:
    return max(map(len, text.split()), default=0)


def _lines(text: str, width: int) -> str:
    """The text in lines of at most `width`: broken between words, in a long name after a `_`."""
    lines = [""]
    for word in re.findall(r"\S+?(?:_|(?=\s)|$)|\s+", text) if len(text) > width else [text]:
        if len(lines[-1]) + len(word) > width and lines[-1]:
            lines.append("")
        lines[-1] += word if lines[-1] else word.lstrip()
    return "\n".join(line.rstrip() for line in lines)


def _styled(text: str) -> str:
    style = STYLES.get(text.split(" ")[0])
    return f"[{style}]{escape(text)}[/]" if style else escape(text)


def _heading(name: str) -> str:
    """A column's name on as many lines as it has words."""
    return name.replace(" @ ", " @").replace("_", " ").replace(" ", "\n")


def _cell(value: Any, digits: int) -> str:
    if isinstance(value, float):
        if value.is_integer() and 1000 <= abs(value) < 1e6:  # a count, in a column with gaps
            return f"{value:,.0f}"
        return "-" if value != value else f"{value:.{digits}g}"
    return "-" if value is None else f"{value:,}" if type(value) is int else str(value)


@contextmanager
def told_of(*folders: Path) -> Iterator[None]:
    """Name the folders of whose files a page is made: one may lack what another version wrote.

    Raises:
        UserError: with what the page failed at.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        if _mistake(error) is not None:
            raise
        raise UserError(
            f"{', '.join(map(str, folders))}: no page can be made of what is there "
            f"({type(error).__name__}: {_line(error)}); a file is damaged, or of another version: "
            "run it again"
        ) from error


def exists(folder: Path) -> Path:
    """A folder that is there."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; name one that `fisherlab` wrote")
    return folder
