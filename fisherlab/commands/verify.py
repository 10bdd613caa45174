"""`fisherlab verify`: the papers' theorems, tried by number."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from fisherlab.commands import options
from fisherlab.commands.common import Code, UserError, bar, leave, say, show

COLUMNS = ["claim", "verdict", "kind", "margin", "source", "trials", "seconds"]


def verify(
    names: Annotated[
        list[str] | None, typer.Argument(help="Claims or papers (tekfac, ngm, ...); default all.")
    ] = None,
    trials: options.Trials = None,
    seed: Annotated[int, typer.Option(help="Seed of the random cases.")] = 0,
    on: Annotated[
        str | None,
        typer.Option(metavar="DATASET:MODEL", help="A real network at several training steps."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for tables, page, counterexamples.")
    ] = None,
    overwrite: options.Overwrite = False,
    only_list: Annotated[
        bool, typer.Option("--list", help="Name the claims, try none of them.")
    ] = False,
) -> None:
    """Try the papers' claims on random cases, or on a real network.

    A claim is the paper's, an extension ours, a contrast what the paper itself denies.
    With --out: claims.json, claims.parquet, counterexamples, pictures and report.html.
    The exit code is 1 if a verdict contradicts the one on record; undecided contradicts none.

    Examples:

        fisherlab verify tekfac
        fisherlab verify tekfac_error_at_most_tkfac --trials 100 -o runs/t
        fisherlab verify tekfac --on digits:mlp
    """
    from fisherlab import claims
    from fisherlab.claims.table import chosen, tried
    from fisherlab.experiments import report, verification
    from fisherlab.experiments.rundir import RunDir

    if trials is not None and trials < 1:
        raise UserError(f"--trials is at least 1, got {trials}")
    wanted = chosen(names or None)
    if only_list:
        rows = [claims.get(name) for name in wanted]
        facts = [(c.name, c.statement, c.expected, c.kind, c.source) for c in rows]
        columns = ["claim", "statement", "on_record", "kind", "source"]
        show(pd.DataFrame(facts, columns=columns), wrap=("claim", "statement", "source"))
        return
    rundir = None if out is None else RunDir(out)
    settings = {"names": names or "all", "trials": trials, "seed": seed, "on": on}
    config = {"command": "verify", "settings": settings}
    if rundir is not None:
        rundir.check(overwrite, ("claims",))
    verdicts = tried(wanted, seed, trials, on)
    if rundir is not None:
        rundir.begin(config, ("claims",))
    found, status = [], "complete"
    with bar(len(wanted), "claims") as progress:
        try:
            for row, seen in verdicts:
                found.append((row, seen))
                progress.update(wanted.index(row["claim"]) + 1 - progress.n)
        except KeyboardInterrupt:
            status = "interrupted"
    table = claims.Verdicts(found, on or "")
    rest = "" if rundir is None else "claims.json"
    for paper, rows in table.frame.groupby("paper", sort=False):
        shown = rows[COLUMNS].copy()
        shown["verdict"] = [
            f"{row.verdict} (on record: {row.expected})"
            if row.claim in table.unexpected
            else row.verdict
            for row in rows.itertuples()
        ]
        show(shown, claims.PAPERS.get(paper, paper), 2, ("claim", "source"), rest)
    say(repr(table))
    if rundir is not None and len(table.frame):
        rundir.write_config({**config, "status": status})
        verification.write(rundir, table)
        typer.echo(f"report: {report.write(rundir)}")
    if status == "interrupted":
        leave(Code.INTERRUPTED, f"interrupted; {len(found)} of {len(wanted)} claims were tried")
    if not found:
        leave(Code.NOTHING, f"none of these claims can be asked of {on}")
    if table.unexpected:
        leave(Code.NOTHING, f"not the verdict on record: {', '.join(table.unexpected)}")
