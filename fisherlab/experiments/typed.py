"""The command and options that the user typed, for the files of a run; imports no package."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

# The command and all options of the command line; None in a program.
TYPED: ContextVar[dict[str, Any] | None] = ContextVar("typed", default=None)
