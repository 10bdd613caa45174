"""The run behind `fisherlab reproduce`, and its list."""

from __future__ import annotations

from pathlib import Path

import typer

from fisherlab.commands.common import CtrlC, show
from fisherlab.commands.train import Bars
from fisherlab.experiments import reproduce as papers


def chosen(paper: str | None, item: str | None, scale: str) -> list[papers.Item]:
    """The items of these names.

    Raises:
        ReproduceError: a paper, an item or a scale is unknown.
    """
    papers.check_scale(scale)
    return papers.items(paper, item)


def run(
    paper: str | None, item: str | None, scale: str, out: Path, control: bool, jobs: int
) -> None:
    """Run what is chosen, with a line per item and a bar per run, and show the verdicts."""
    wanted = chosen(paper, item, scale)
    total = sum(papers.cost(one, scale, control) for one in wanted)
    typer.echo(
        f"{len(wanted)} items, about {papers.in_words(total)} on one core at most: "
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


def listing(wanted: list[papers.Item]) -> list[dict[str, str]]:
    """A row per item, as in `reproduce.json`: paper, key, title, costs, and whether it runs."""
    rows = []
    for one in wanted:
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
    return rows


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
