"""`fisherlab sweep`: a search for each optimizer, then the best settings at full length."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fisherlab.commands import options
from fisherlab.commands.common import (
    Code,
    CtrlC,
    UserError,
    file_name,
    leave,
    numbers,
    say,
    seeds_of,
    show,
)
from fisherlab.commands.train import Bars, pictures
from fisherlab.experiments import training
from fisherlab.experiments.space import grid
from fisherlab.experiments.study import shown
from fisherlab.experiments.sweep import sweep as search
from fisherlab.experiments.training.settings import check_known
from fisherlab.experiments.typed import TYPED

PATH = Path  # typer reads the annotation


def sweep(
    choices: Annotated[
        list[str],
        typer.Option(
            "--grid", help="OPTIMIZER.OPTION=VALUE,VALUE, or LOW..HIGH for tpe: kfac.lr=0.03,0.1."
        ),
    ],
    data: options.Data = "digits",
    model: options.Model = "mlp",
    optimizer: Annotated[str, typer.Option(help="Names separated by commas.")] = "kfac,sgd",
    sampler: Annotated[str, typer.Option(help="grid: every combination; tpe: Optuna's.")] = "grid",
    trials: options.Trials = None,
    storage: Annotated[
        str | None,
        typer.Option(help="Database that all workers share; by default an SQLite file in --out."),
    ] = None,
    epochs: Annotated[int, typer.Option(help="Epochs of each point.")] = 3,
    examples: Annotated[int | None, typer.Option(help="Training examples of each point.")] = None,
    validation: Annotated[int, typer.Option(help="Held-out training examples to choose by.")] = 500,
    final_epochs: Annotated[int, typer.Option(help="Epochs of the chosen points.")] = 10,
    final_examples: Annotated[
        int | None, typer.Option(help="Training examples of the chosen points; default all.")
    ] = None,
    seeds: options.Seeds = "3",
    batch_size: options.BatchSize = 128,
    schedule: options.Schedule = "constant",
    augment: options.Augment = None,
    carry: options.Carry = None,
    width: options.Width = 1.0,
    hidden: options.Hidden = None,
    depth: options.Depth = None,
    activation: options.Activation = "relu",
    batch_norm: options.BatchNorm = None,
    device: options.Device = "cpu",
    dtype: options.Dtype = "float32",
    out: Annotated[
        PATH | None, typer.Option("--out", "-o", help="Run folder; runs/sweep-DATA-MODEL.")
    ] = None,
) -> None:
    """Search settings on held-out training examples, then train the best and test them.

    The same command on the same folder goes on where it was stopped. With Optuna (pip install
    'fisherlab[sweep]') it may run several times at once, and on several machines with --storage.

    Examples:

        fisherlab sweep --optimizer kfac --grid kfac.lr=0.03,0.1
        fisherlab sweep --grid kfac.lr=0.03,0.1 --grid sgd.lr=0.05,0.1,0.2
        fisherlab sweep --sampler tpe --trials 20 --grid kfac.lr=0.001..1
    """
    check_known("sampler", sampler, ("grid", "tpe"))
    if (sampler == "tpe") != (trials is not None):
        raise UserError(f"--trials goes with --sampler tpe; got --sampler {sampler}, {trials}")
    if storage is not None and (told := TYPED.get()) is not None:
        told["options"]["storage"] = shown(storage)
    found = grid(choices, optimizer)
    settings = training.Settings(
        data=data,
        model=model,
        epochs=epochs,
        batch_size=batch_size,
        schedule=schedule,
        width=width,
        hidden=None if hidden is None else tuple(numbers("--hidden", hidden, int)),
        examples=examples,
        validation=validation,
        augment=options.augments(augment, data),
        carry=options.carries(carry, data, model),
        layers=depth,
        activation=activation,
        batch_norm=batch_norm,
        device=device,
        dtype=dtype,
    )
    final = {"epochs": final_epochs, "examples": final_examples, "seeds": seeds_of(seeds)}
    out = out or Path("runs") / file_name(f"sweep-{data}-{model}")
    with CtrlC() as interrupt:
        result = search(
            settings,
            optimizer,
            found,
            out,
            final=final,
            trials=trials,
            storage=storage,
            watch=Bars(interrupt),
        )
    if result.chosen:
        from fisherlab.experiments import pages, report  # noqa: F401  pages: what it shows
        from fisherlab.experiments.rundir import RunDir

        if result.final is not None:
            pictures(result.final, out / "final")
        page = report.write(RunDir(out))
        show(result.table, f"{result.metric.capitalize()}: held out, then on the test set",
             rest="sweep.json")  # fmt: skip
        for note in result.notes:
            say(note)
        typer.echo(f"everything tried is in {out}; report: {page}")
    if result.interrupted:
        raise KeyboardInterrupt(f"interrupted; the same command goes on from what is in {out}")
    if result.elsewhere:
        typer.echo(
            f"{result.elsewhere} points are with other workers, the last of which chooses; if one "
            "was killed, the same command takes its points over"
        )
        return
    if result.final is None or not result.final.succeeded:
        leave(Code.NOTHING, "no point came to its end")
