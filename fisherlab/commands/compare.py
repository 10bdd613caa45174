"""`fisherlab compare`: how well every approximation matches the exact Fisher block."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import pandas as pd
import typer

from fisherlab import approximations, datasets, distributed, models
from fisherlab.commands.common import (
    Code,
    known,
    leave,
    numbers,
    once,
    progress,
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
SHOWN = 8  # layers that a terminal has room for
OVERVIEW = {  # columns of the summary, and what the terminal calls them
    "population_error": "unseen error",
    "trace_ratio": "trace ratio",
    "cosine": "cosine",
    "diagonalisation": "on the diagonal",
    "subspace_overlap": "top 10",
    "build_seconds": "build ms",
}


def compare(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the results.")],
    data: Annotated[str, typer.Option(help=f"One of {', '.join(datasets.names())}.")] = "digits",
    model: Annotated[str, typer.Option(help=f"One of {', '.join(models.names())}.")] = "mlp",
    names: Annotated[
        str,
        typer.Option(
            "--approximations", "-a", help=f"Comma list of {', '.join(approximations.names())}."
        ),
    ] = "all",
    fisher_type: Annotated[
        str | None,
        typer.Option(help="exact, mc or empirical; by default exact up to 20 outputs, else mc."),
    ] = None,
    mc_samples: Annotated[int, typer.Option(help="Labels drawn per example (mc).")] = 1,
    batch_size: Annotated[
        int | None, typer.Option(help="Examples measured on; by default up to 64.")
    ] = None,
    reference: Annotated[
        int | None,
        typer.Option(help="Unseen examples for the population error; 0 none; default up to 128."),
    ] = None,
    dampings: Annotated[
        str, typer.Option(help="Comma list, in units of each block's mean eigenvalue.")
    ] = "1e-3,1e-2,1e-1",
    layers: Annotated[str | None, typer.Option(help="Comma list of layers; default all.")] = None,
    epochs: Annotated[int, typer.Option(help="Epochs of training; 0 measures at the start.")] = 3,
    at: Annotated[
        str, typer.Option(help="Comma list of training steps, start, middle, end.")
    ] = "start,middle,end",
    optimizer: Annotated[str, typer.Option(help="What trains the model.")] = "sgd",
    lr: Annotated[float | None, typer.Option(help="Learning rate; the optimizer's own.")] = None,
    train_batch: Annotated[int, typer.Option(help="Examples per training step.")] = 64,
    seeds: Annotated[str, typer.Option(help="Comma list: 0,1,2 (`train` takes a count).")] = "0",
    hidden: Annotated[str | None, typer.Option(help="Widths of hidden layers (mlp).")] = None,
    width: Annotated[float, typer.Option(help="Multiplies every hidden width.")] = 1.0,
    activation: Annotated[str, typer.Option(help="relu, tanh, sigmoid, ...")] = "relu",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float64 or float32.")] = "float64",
    memory: Annotated[
        str | None, typer.Option(help="Bound on the columns of one layer, such as 800M.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a run that --out holds.")] = False,
) -> None:
    """Train a model and compare every approximation with the exact Fisher block of every layer.

    Prints a table and leaves config.json, comparison.csv, comparison.parquet, figures and a
    self-contained report.html in the folder. Ctrl-C keeps what was measured so far. Under torchrun
    (`torchrun --nproc-per-node 2 -m fisherlab compare ...`) the work is shared out over the ranks.
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
            layers=tuple(once(words(layers))) or None,
            fisher_type=fisher_type,
            mc_samples=mc_samples,
            batch_size=batch_size,
            reference=reference,
            dampings=tuple(once(numbers("--dampings", dampings, float))),
            epochs=epochs,
            at=tuple(once(words(at))),
            optimizer=optimizer,
            lr=lr,
            train_batch=train_batch,
            seeds=tuple(once(numbers("--seeds", seeds, int))),
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
    for said in filter(None, (table.about, table.note)):
        typer.echo(said)
    show(*by_layer(table))
    show(*overview(table))
    for line in refusals(table):
        typer.echo(line)
    typer.echo(f"report: {path}")
    for note in study.notes:
        typer.echo(note)


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
    title = f"{column.replace('_', ' ')} of every layer at step {frame['step'].max()}"
    return errors.loc[order].reset_index(), title


def refusals(table: Comparison) -> list[str]:
    """Of every approximation that was refused at all layers, the reason."""
    nothing = table.frame.groupby("approximation")["relative_error"].transform("count") == 0
    refused = table.frame[nothing & (table.frame["note"] != "")]
    first = refused.drop_duplicates("approximation")
    return [f"{row.approximation}: {row.note}" for row in first.itertuples()]


def overview(table: Comparison) -> tuple[pd.DataFrame, str]:
    """The rest of the summary, as printed."""
    summary = table.summary().reset_index()
    summary["build_seconds"] *= 1e3
    steps = {name: name.replace("direction_cosine", "step") for name in summary}
    steps = {name: step for name, step in steps.items() if step.startswith("step @")}
    wanted = {"approximation": "approximation"}
    for name, text in {**OVERVIEW, **steps}.items():
        wanted |= {name: text, f"{name} known": f"{text} known"}
    title = "medians over the layers (step: cosine of the damped step with the exact one)"
    shown = summary[[name for name in wanted if name in summary]]
    return shown.rename(columns=wanted), title
