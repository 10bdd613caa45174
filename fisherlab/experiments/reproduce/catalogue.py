"""All tables and figures of the five papers, in the papers' order."""

from __future__ import annotations

import re

from fisherlab import doors
from fisherlab.experiments.reproduce import ang, fngd, ngm, sngd, tekfac
from fisherlab.experiments.reproduce.item import Item
from fisherlab.experiments.reproduce.plan import ReproduceError
from fisherlab.names import unknown

PAPERS = {module.PAPER: module for module in (ang, tekfac, sngd, fngd, ngm)}
ITEMS: tuple[Item, ...] = tuple(item for module in PAPERS.values() for item in module.ITEMS)


def items(paper: str | None = None, key: str | None = None) -> list[Item]:
    """All items, those of a paper, or one; `ReproduceError` for a name that is not there."""
    for name, what in ((paper, "paper"), (key, "item")):
        if name is not None:
            doors.name(name, what, error=ReproduceError)
    if paper is not None and paper not in PAPERS:
        raise ReproduceError(unknown("paper", paper, list(PAPERS)))
    found = [item for item in ITEMS if paper in (None, item.paper)]
    if key is None:
        return found
    keys = [item.key for item in found]
    if _plain(key) not in keys:
        raise ReproduceError(unknown(f"item of {paper}", key, keys))
    return [item for item in found if item.key == _plain(key)]


def numbered(kind: str) -> int:
    """How many tables or figures there are; parts of one (`fig2`, `fig2b`) count once."""
    mine = [item for item in ITEMS if item.kind == kind]
    return len({(item.paper, re.sub(r"[a-z]$", "", item.key)) for item in mine})


def _plain(key: str) -> str:
    """`Table 1`, `table-1`, `figure 3` and `fig. 3` as `table1` and `fig3`."""
    return re.sub(r"[\s.\-_]", "", key.lower()).replace("figure", "fig")
