"""`python -m fisherlab`, and `torchrun -m fisherlab`."""

import io
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

from fisherlab.extras import named


def main() -> None:
    """The entry point `fisherlab`."""
    # a shell may have closed them: `fisherlab ... >&-`
    sys.stdout = sys.stdout or Path(os.devnull).open("w", encoding="utf-8")
    sys.stderr = sys.stderr or Path(os.devnull).open("w", encoding="utf-8")
    if isinstance(sys.stdout, io.TextIOWrapper):  # a locale may lack × and ─, a name be no text
        sys.stdout.reconfigure(errors="replace")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end)
    try:
        with named():
            from fisherlab.cli import main as run
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error}")
    run()


def _end(number: int, _: object) -> NoReturn:
    """End a process that has begun nothing yet: an import could swallow an exception."""
    os.write(2, b"interrupted\n")
    os._exit(128 + number)


if __name__ == "__main__":
    main()
