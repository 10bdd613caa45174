"""`fisherlab compare`: how well every approximation matches the exact Fisher block."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import pandas as pd
import typer

from fisherlab import approximations, distributed
from fisherlab.commands import options
from fisherlab.commands.common import (
    Code,
    known,
    leave,
    numbers,
    once,
    progress,
    say,
    seeds_of,
    several,
    show,
    size,
    words,
)
from fisherlab.comparison import Comparison
from fisherlab.extract.fisher import FISHER_TYPES

if TYPE_CHECKING:
    from fisherlab.experiments.measure import Study
    from fisherlab.experiments.rundir import RunDir

TABLE = "comparison"
GROUPS = {  # the groups of --help
    "What is measured": "data model names assign layers fisher_type mc_samples dtype device memory",
    "On which examples": "compare_examples reference dampings",
    "Training": "epochs at optimizer lr batch_size seeds seed hidden width activation",
}
SHOWN = 6  # layers that a terminal has room for
OVERVIEW = ["population_error", "order", "trace_ratio", "cosine"]  # the most telling first
DETAILS = ["subspace_overlap", "diagonalisation", "build_seconds"]


def compare(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the results.")],
    data: options.Data = "digits",
    model: options.Model = "mlp",
    names: Annotated[
        str,
        typer.Option(
            "--approximations", "-a", help=f"Comma list of {', '.join(approximations.names())}."
        ),
    ] = "all",
    assign: Annotated[
        list[str] | None,
        typer.Option("--set", help="METHOD.OPTION=VALUE: kfac.weight_sharing=reduce."),
    ] = None,
    fisher_type: Annotated[
        str | None,
        typer.Option(help="exact, mc or empirical; by default exact up to 20 outputs, else mc."),
    ] = None,
    mc_samples: Annotated[int, typer.Option(help="Labels drawn per example (mc).")] = 1,
    compare_examples: Annotated[
        int | None,
        typer.Option(help="Examples that blocks are measured on.", show_default="up to 64"),
    ] = None,
    reference: Annotated[
        int | None,
        typer.Option(help="Unseen examples for the population error; 0: none."),
    ] = None,
    dampings: Annotated[
        str, typer.Option(help="Comma list, in units of each block's mean eigenvalue.")
    ] = "1e-3,1e-2,1e-1",
    layers: Annotated[str | None, typer.Option(help="Comma list of layers; default all.")] = None,
    epochs: Annotated[int, typer.Option(help="Epochs of training; 0 measures at the start.")] = 3,
    at: Annotated[
        str, typer.Option(help="Training steps, start, middle, end.")
    ] = "start,middle,end",
    optimizer: Annotated[str, typer.Option(help="What trains the model.")] = "sgd",
    lr: options.LearningRate = None,
    batch_size: options.BatchSize = 64,
    seeds: options.Seeds = "1",
    seed: options.Seed = 0,
    hidden: options.Hidden = None,
    width: options.Width = 1.0,
    activation: options.Activation = "relu",
    device: options.Device = "cpu",
    dtype: options.Dtype = "float64",
    memory: Annotated[
        str | None, typer.Option(help="Bound on the columns of one layer: 800M.")
    ] = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Train a model and compare every approximation with the exact Fisher block.

    Prints a table and leaves config.json, comparison.csv, comparison.parquet, figures and a
    self-contained report.html in the folder. Ctrl-C keeps what was measured so far. Under torchrun
    (`torchrun --nproc-per-node 2 -m fisherlab compare ...`) the work is shared out over the ranks.

    Examples:

        fisherlab compare -o runs/first
        fisherlab compare --model lenet --data mnist -a kfac,tekfac -o runs/b
        fisherlab compare --set kfac.weight_sharing=reduce --seeds 3 -o runs/c
        fisherlab --import my.py compare --model my_net -o runs/mine
    """
    chosen = (
        None if names == "all" else tuple(several("approximation", names, approximations.names()))
    )
    if fisher_type is not None:
        known("--fisher-type", fisher_type, FISHER_TYPES)
    from fisherlab.experiments import measure
    from fisherlab.experiments.rundir import RunDir

    ranks = distributed.start()
    first = ranks is None or ranks.index == 0  # the one that writes and speaks
    rundir = RunDir(out)
    if first:
        rundir.check(overwrite, (TABLE,))
    study = measure.Study(
        measure.Settings(
            data=data,
            model=model,
            approximations=chosen,
            assign=tuple(assign or ()),
            layers=tuple(once(words(layers))) or None,
            fisher_type=fisher_type,
            mc_samples=mc_samples,
            batch_size=compare_examples,
            reference=reference,
            dampings=tuple(once(numbers("--dampings", dampings, float))),
            epochs=epochs,
            at=tuple(once(words(at))),
            optimizer=optimizer,
            lr=lr,
            train_batch=batch_size,
            seeds=seeds_of(seeds, seed),
            hidden=tuple(numbers("--hidden", hidden, int)) if hidden else None,
            width=width,
            activation=activation,
            device=device,
            dtype=dtype,
            memory=size(memory),
        )
    )
    if first:
        rundir.begin(study.config, (TABLE,))
    table = _measured(study, rundir, first)
    if first:
        _say(table, study, rundir)


def _measured(study: Study, rundir: RunDir, first: bool) -> Comparison:
    """The table of the study, written while it grows by the rank that is `first`."""

    def keep(table: Comparison) -> None:
        if not first:
            return
        rundir.write_table(TABLE, table.frame)
        if study.grams:
            rundir.write_grams(study.grams)

    try:
        return study.run(
            keep, lambda title: lambda names: progress(names, title) if first else names
        )
    except KeyboardInterrupt:
        if not first:
            raise
        rundir.write_config({**study.config, "status": "interrupted"})
        kept = rundir.table(TABLE)
        if kept is None or not len(kept):
            leave(Code.INTERRUPTED, "interrupted before anything was measured")
        path = _report(rundir)
        leave(Code.INTERRUPTED, f"interrupted; {len(kept)} rows were measured: {path}")


def _say(table: Comparison, study: Study, rundir: RunDir) -> None:
    """Print the tables and write the page."""
    rundir.write_config({**study.config, "status": "complete"})
    if table.frame["relative_error"].isna().all():
        for line in refusals(table):
            typer.echo(line)
        leave(Code.NOTHING, "nothing could be measured, so there is no report")
    path = _report(rundir)
    for said in filter(None, (*table.about.split("\n"), table.note)):
        say(said)
    rest = f"{TABLE}.csv"
    show(*by_layer(table), rest=rest)
    show(*overview(table), rest=rest)
    for line in [*refusals(table), *study.notes]:
        say(line)
    typer.echo(f"report: {path}")


def _report(rundir: RunDir) -> Path:
    from fisherlab.experiments import pages, report  # noqa: F401  pages: what it shows

    return report.write(rundir)


def by_layer(table: Comparison) -> tuple[pd.DataFrame, str]:
    """The leading error of every layer at the last step, as printed; many layers as their range."""
    frame, column = table.frame, table.leading
    last = frame[frame["step"] == frame["step"].max()]
    last = last.drop_duplicates(["layer", "approximation", "seed"])
    layers = list(last["layer"].unique())
    errors = last.pivot_table(index="approximation", columns="layer", values=column)
    # a layer or a method without a number keeps its place; what was refused is said elsewhere
    measured = last[last["relative_error"].notna()].groupby("approximation")[column]
    errors = errors.reindex(index=measured.size().index, columns=layers)
    known, every = measured.count(), measured.size()
    order = errors.median(axis=1).sort_values().index
    if len(layers) > SHOWN:
        parts = {"best layer": errors.min(1), "median": errors.median(1), "worst": errors.max(1)}
        worst = errors.fillna(-1).idxmax(axis=1).where(errors.notna().any(axis=1), "-")
        errors = pd.DataFrame(parts | {"worst is": worst})
    if (known < every).any():
        errors["known"] = known.astype(str) + " of " + every.astype(str)
    title = f"{column.replace('_', ' ').capitalize()} of each layer at step {frame['step'].max()}"
    return errors.loc[order].reset_index(), title


def refusals(table: Comparison) -> list[str]:
    """The reason for every approximation that was refused at all layers."""
    nothing = table.frame.groupby("approximation")["relative_error"].transform("count") == 0
    refused = table.frame[nothing & (table.frame["note"] != "")]
    first = refused.drop_duplicates("approximation")
    return [f"{row.approximation}: {row.note}" for row in first.itertuples()]


def overview(table: Comparison) -> tuple[pd.DataFrame, str]:
    """The rest of the summary, as printed."""
    summary = table.summary().reset_index()
    steps = [
        name for name in summary if name.startswith("direction_cosine") and "known" not in name
    ]
    wanted = ["approximation", *OVERVIEW, *steps[-1:], *DETAILS, *steps[:-1]]
    # the count of what is known stands beside its median, so that a narrow terminal has both
    wanted = [column for name in wanted for column in (name, f"{name} known")]
    title = f"Medians over {_layers(table)}: 1 is exact, of an error 0"
    return summary[[name for name in wanted if name in summary]], title


def _layers(table: Comparison) -> str:
    count = table.frame["layer"].nunique()
    return f"{count} layers" if count > 1 else "the only layer"
