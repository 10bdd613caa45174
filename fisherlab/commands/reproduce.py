"""`fisherlab reproduce`: a paper's tables and figures, ours beside the paper's numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from fisherlab.commands.common import loading, show

PATH = Path  # typer reads the annotation
# `--list` prints these lines of all items, and so imports no torch.
LISTING = Path(__file__).with_name("reproduce.json")


def reproduce(
    paper: Annotated[
        str | None, typer.Argument(help="ang, tekfac, sngd, fngd or ngm; all five without it.")
    ] = None,
    item: Annotated[
        str | None, typer.Argument(help="table1, fig3, ...; all of the paper without it.")
    ] = None,
    scale: Annotated[
        str, typer.Option(help="minutes, hours, or paper: the paper's own sizes.")
    ] = "minutes",
    out: Annotated[PATH, typer.Option("--out", "-o", help="Folder of all results.")] = Path(
        "runs/reproduce"
    ),
    control: Annotated[
        bool, typer.Option("--control", help="Beside each: SGD with its per-layer step lengths.")
    ] = False,
    jobs: Annotated[
        int, typer.Option("--jobs", "-j", help="Processes of one thread that train.")
    ] = 1,
    listed: Annotated[
        bool, typer.Option("--list", help="Name the items and their costs, and run nothing.")
    ] = False,
) -> None:
    """Reproduce tables and figures of the five papers, beside the papers' numbers.

    The same command goes on where it was stopped. Items of one experiment share its runs. At scale
    minutes everything is small and no learning rate is chosen; verdicts say so.

    Examples:

        fisherlab reproduce --list
        fisherlab reproduce ngm table1
        fisherlab reproduce sngd --scale hours --out results
        fisherlab reproduce tekfac table3 --control --jobs 2
    """
    rows = _listed(paper, item, scale) if listed else []
    if not rows:
        with loading("reproduce"):
            from fisherlab.commands import reproducing

        chosen = reproducing.chosen(paper, item, scale)
        if not listed:
            reproducing.run(paper, item, scale, out, control, jobs)
            return
        rows = reproducing.listing(chosen)
    show(pd.DataFrame(rows), wrap=("title", "runs"))


def _listed(paper: str | None, item: str | None, scale: str) -> list[dict[str, str]]:
    """The rows of these names as they are written in `LISTING`; none where a name is another."""
    rows: list[dict[str, str]] = json.loads(LISTING.read_text(encoding="utf-8"))
    return [
        row
        for row in rows
        if paper in (None, row["paper"]) and item in (None, row["item"]) and f"scale {scale}" in row
    ]


if __name__ == "__main__":  # write the list anew
    from fisherlab.commands.reproducing import chosen, listing

    text = json.dumps(listing(chosen(None, None, "minutes")), indent=1, ensure_ascii=False)
    LISTING.write_text(f"{text}\n", encoding="utf-8")
