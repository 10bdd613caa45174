"""`fisherlab reproduce`: a paper's tables and figures, ours beside the paper's numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from fisherlab.commands.common import CtrlC, show
from fisherlab.commands.train import Bars
from fisherlab.experiments import reproduce as papers

PATH = Path  # typer reads the annotation


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
    papers.check_scale(scale)
    chosen = papers.items(paper, item)
    if listed:
        show(_listing(chosen), wrap=("title", "runs"))
        return
    total = sum(papers.cost(one, scale, control) for one in chosen)
    typer.echo(
        f"{len(chosen)} items, about {papers.in_words(total)} on one core at most: "
        "items of one experiment share its runs, and what is done is not done again"
    )
    with CtrlC() as interrupt:
        try:
            found = papers.reproduce(
                paper,
                item,
                scale=scale,
                out=out,
                control=control,
                jobs=jobs,
                listener=Terminal(interrupt),
            )
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"interrupted; the same command goes on from what is in {out}"
            ) from None
    show(found[["paper", "item", "verdict", "because"]], wrap=("verdict", "because"))
    typer.echo(f"tables, pictures and report.html are in {out}")


def _listing(chosen: list[papers.Item]) -> pd.DataFrame:
    """The list of items: kind, title, costs, and whether it runs."""
    rows = []
    for one in chosen:
        costs = {
            f"scale {s}": papers.in_words(papers.cost(one, s)) if one.runnable else "–"
            for s in papers.SCALES
        }
        said = "yes" if one.runnable else papers.announcement(one, "minutes")
        stands = one.experiment and any(cell.stand_in for cell in one.experiment.cells)
        said = "on a stand-in" if one.runnable and stands else said
        rows.append(
            {"paper": one.paper, "item": one.key, "title": one.title, **costs, "runs": said}
        )
    return pd.DataFrame(rows)


class Terminal(papers.Listener):
    """A line per item, a bar per run."""

    def __init__(self, interrupt: CtrlC) -> None:
        self.interrupt = interrupt

    def item(self, item: papers.Item, said: str) -> None:
        typer.echo(f"{item.name}: {item.title}; {said}")

    def ended(self, item: papers.Item, found: papers.Outcome) -> None:
        typer.echo(f"{item.name}: {found.verdict}. {found.because}".rstrip(". "))

    def worked(self, plan: papers.Planned, status: str, left: int) -> None:
        labels = ", ".join(arm.label for arm in plan.arms)
        typer.echo(f"{plan.settings.data}, {plan.folder} ({labels}): {status}; {left} folders left")

    def watch(self, plan: papers.Planned) -> Bars:
        return Bars(self.interrupt)
