"""What to say of a name that is not known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(given: object, known: Iterable[str], otherwise: Iterable[str] = ()) -> str:
    """Up to three known names that look like the given one; `otherwise` where none does."""
    return ", ".join(difflib.get_close_matches(str(given), list(known), 3) or otherwise)


def unknown(kind: str, given: object, known: Iterable[str]) -> str:
    """The message for a name that is not among the known: what may be meant, and what there is."""
    known = list(known)
    near = difflib.get_close_matches(str(given), known, 3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else "."
    return f"unknown {kind} {given!r}{hint} Known: {', '.join(known)}"
