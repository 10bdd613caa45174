"""`fisherlab sweep`: a small grid for each optimizer, then the best settings at full length."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fisherlab.commands import options
from fisherlab.commands.common import Code, CtrlC, file_name, leave, numbers, say, seeds_of, show
from fisherlab.commands.train import Bars, pictures
from fisherlab.experiments import training
from fisherlab.experiments.sweep import grid, points
from fisherlab.experiments.sweep import sweep as search
from fisherlab.experiments.training.task import AUGMENTED

PATH = Path  # typer reads the annotation


def sweep(
    choices: Annotated[
        list[str], typer.Option("--grid", help="OPTIMIZER.OPTION=VALUE,VALUE: kfac.lr=0.03,0.1.")
    ],
    data: options.Data = "digits",
    model: options.Model = "mlp",
    optimizer: Annotated[str, typer.Option(help="Names separated by commas.")] = "kfac,sgd",
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
    width: options.Width = 1.0,
    hidden: options.Hidden = None,
    device: options.Device = "cpu",
    out: Annotated[
        PATH | None, typer.Option("--out", "-o", help="Run folder; runs/sweep-DATA-MODEL.")
    ] = None,
) -> None:
    """Search settings on held-out training examples, then train the best and test them.

    The same command on the same folder goes on where it was stopped.

    Examples:

        fisherlab sweep --optimizer kfac --grid kfac.lr=0.03,0.1
        fisherlab sweep --grid kfac.lr=0.03,0.1 --grid sgd.lr=0.05,0.1,0.2
    """
    found = grid(choices, optimizer)
    settings = training.Settings(
        data=data,
        model=model,
        entries=points(optimizer, found),
        epochs=epochs,
        batch_size=batch_size,
        schedule=schedule,
        width=width,
        hidden=None if hidden is None else tuple(numbers("--hidden", hidden, int)),
        examples=examples,
        validation=validation,
        augment=data in AUGMENTED,
        device=device,
    )
    final = {"epochs": final_epochs, "examples": final_examples, "seeds": seeds_of(seeds)}
    out = out or Path("runs") / file_name(f"sweep-{data}-{model}")
    with CtrlC() as interrupt:
        watch = Bars(interrupt)
        result = search(settings, optimizer, found, out, final=final, watch=watch)
    if result.chosen:
        from fisherlab.experiments import pages, report  # noqa: F401  pages: what it shows
        from fisherlab.experiments.rundir import RunDir

        if result.final is not None:
            pictures(result.final, out / "final")
        page = report.write(RunDir(out))
        metric = result.tried.metric.capitalize()
        show(result.table, f"{metric}: held out, then on the test set", rest="sweep.json")
        for note in result.notes:
            say(note)
        typer.echo(f"everything tried is in {out}; report: {page}")
    if result.interrupted:
        raise KeyboardInterrupt(f"interrupted; the same command goes on from what is in {out}")
    if result.final is None or not result.final.succeeded:
        leave(Code.NOTHING, "no point came to its end")
