"""`fisherlab train`: every optimizer on the same model, batches and clock."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

from fisherlab import whole
from fisherlab.commands import options
from fisherlab.commands.common import (
    Code,
    CtrlC,
    bar,
    file_name,
    leave,
    numbers,
    say,
    seeds_of,
    show,
)
from fisherlab.experiments import training

PATH = Path  # typer reads the annotation
GROUPS = {  # --help puts these together
    "Network and data": "data model examples test_examples augment carry width hidden depth"
    " activation batch_norm device dtype",
    "Training": "optimizer epochs seeds seed lr assign control batch_size schedule",
    "Blocks against the exact ones": "compare_every compare_examples",
}
# Share of shortened steps above which the learning rate says little.
OFTEN = 0.5


def train(
    data: options.Data = "digits",
    model: options.Model = "mlp",
    optimizer: Annotated[
        str, typer.Option(help="Names separated by commas, LABEL=NAME to run one twice, or all.")
    ] = "kfac,tekfac,fngd,sgd",
    epochs: Annotated[int, typer.Option(help="Passes over the training set.")] = 5,
    seeds: options.Seeds = "1",
    seed: options.Seed = 0,
    lr: options.LearningRate = None,
    assign: Annotated[
        list[str] | None,
        typer.Option("--set", help="OPTIMIZER.OPTION=VALUE: kfac.damping='relative(0.01)'."),
    ] = None,
    control: Annotated[
        bool, typer.Option("--control", help="Beside each: SGD with its per-layer step lengths.")
    ] = False,
    batch_size: options.BatchSize = 128,
    examples: Annotated[int | None, typer.Option(help="Train on this many examples.")] = None,
    test_examples: Annotated[int | None, typer.Option(help="Test on this many.")] = None,
    schedule: options.Schedule = "constant",
    augment: options.Augment = None,
    carry: options.Carry = None,
    width: options.Width = 1.0,
    hidden: options.Hidden = None,
    depth: options.Depth = None,
    activation: options.Activation = "relu",
    batch_norm: options.BatchNorm = None,
    compare_every: Annotated[
        int | None,
        typer.Option(help="Epochs between measurements of the blocks against the exact ones."),
    ] = None,
    compare_examples: Annotated[
        int, typer.Option(help="Examples that blocks are measured on.")
    ] = 256,
    target: Annotated[
        float | None, typer.Option(help="Also tell when each first has this metric.")
    ] = None,
    device: options.Device = "cpu",
    dtype: options.Dtype = "float32",
    out: Annotated[
        PATH | None, typer.Option("--out", "-o", help="Run folder; runs/train-DATA-MODEL.")
    ] = None,
) -> None:
    """Train a model with several optimizers, and compare them.

    Leaves a table, curves against steps and against time, checkpoints and report.html.

    The same command on the same folder goes on where it was stopped, or shows the results. With
    more --epochs it trains further, unless a schedule was planned for the earlier number.

    Examples:

        fisherlab train --optimizer kfac,tekfac,sgd --epochs 5 --seeds 3
        fisherlab train --optimizer a=kfac,b=kfac --set b.weight_sharing=reduce
        fisherlab --import my.py train --model my_net --optimizer kfac,adam
    """
    common = {} if lr is None else {"lr": lr}
    settings = training.Settings(
        data=data,
        model=model,
        entries=training.entries(optimizer, assign or (), control=control, common=common),
        epochs=epochs,
        batch_size=batch_size,
        seeds=seeds_of(seeds, seed),
        width=width,
        hidden=None if hidden is None else tuple(numbers("--hidden", hidden, int)),
        layers=depth,
        activation=activation,
        batch_norm=batch_norm,
        schedule=schedule,
        examples=examples,
        test_examples=test_examples,
        augment=options.augments(augment, data),
        carry=options.carries(carry, data, model),
        device=device,
        dtype=dtype,
        compare_every=compare_every,
        compare_examples=compare_examples,
    )
    trained(settings, out or Path("runs") / file_name(f"train-{data}-{model}"), target)


def trained(settings: training.Settings, out: Path, target: float | None = None) -> None:
    """Train, draw, and say what came of it."""
    with CtrlC() as interrupt:
        results = training.train(settings, out, watch=Bars(interrupt))
    pictures(results, out)
    _say(results, out, target)


class Bars(training.Watch):
    """A bar per run on a terminal, a line per finished run everywhere."""

    def __init__(self, interrupt: CtrlC) -> None:
        self.interrupt = interrupt
        self.done = self.total = 0
        self.bar: Any = None

    def planned(self, records: Sequence[training.Record]) -> None:
        self.done, self.total = 0, len(records)

    def started(self, record: training.Record, done: int, steps: int) -> None:
        self.bar = bar(steps, f"{self._name(record)} ({self.done + 1}/{self.total})")
        self.bar.update(done)

    def stepped(self, loss: float) -> None:
        self.interrupt.check()
        self.bar.set_postfix(loss=f"{loss:.3g}", refresh=False)
        self.bar.update(1)

    def ended(self, record: training.Record) -> None:
        self.interrupt.check()
        if self.bar is not None:
            self.bar.close()
        self.done += 1
        said = record.status if record.status == "done" else f"{record.status}: {record.note}"
        typer.echo(f"[{self.done}/{self.total}] {self._name(record)}: {said}", err=True)

    def _name(self, record: training.Record) -> str:
        return f"{record.entry.label}, seed {record.seed}"


def pictures(results: training.Results, out: Path) -> None:
    """The pictures, and the page with them, as soon as there is a result."""
    summary = results.summary()
    if "final" not in summary:
        return
    from fisherlab import plots
    from fisherlab.experiments import pages, report  # noqa: F401  pages: what it shows
    from fisherlab.experiments.rundir import RunDir

    best = list(summary["optimizer"][summary["final"].notna()])
    rows, curve = results.rows, results.curve
    plots.save(plots.training_curves(rows, curve, results.metric, best), out / "curves")
    plots.save(plots.training_cost(summary, results.metric), out / "cost")
    if len(results.comparisons):
        plots.save(plots.training(results.comparisons), out / "comparisons")
    report.write(RunDir(out))


def _say(results: training.Results, out: Path, target: float | None = None) -> None:
    """The table, where everything lies, and the exit code."""
    summary = results.summary()
    for line in _shortened(summary, results.settings.entries):
        say(line)
    say(_trained(results))
    if results.covered:
        say(results.covered)
    show(_readable(summary), f"{results.metric.capitalize()} on the test set", rest="summary.csv")
    if target is not None and "final" in summary:
        show(results.reaching(target), f"To a {results.metric} of {target:g} on the test set")
    if results.untimed:
        say(results.untimed)
    for row in summary[summary["note"] != ""].itertuples():
        say(f"{row.optimizer} ({row.status}): {row.note}")
    typer.echo(f"rows, curves, checkpoints, pictures and report.html are in {out}")
    if results.interrupted:
        raise KeyboardInterrupt(f"interrupted; the same command goes on from what is in {out}")
    log = out / "failures.log"
    log.unlink(missing_ok=True)  # from an earlier attempt
    if results.failures:
        whole.write(log, "\n".join(record.traceback for record in results.failures))
        leave(Code.BUG, f"a method failed in a way that is a bug of FisherLab; see {log}")
    if not results.succeeded:
        leave(Code.NOTHING, "no optimizer came to its end")


def _trained(results: training.Results) -> str:
    """The setting in which every row was trained."""
    of, card = results.settings, results.card
    seeds, epochs = len(of.seeds), of.epochs
    return (
        f"{of.model} on {card.name}: {epochs} epoch{'s' * (epochs != 1)} of "
        f"{results.steps_per_epoch:,} steps with {results.batch_size} of {results.examples:,} "
        f"training examples, {seeds} seed{'s' * (seeds != 1)}, {of.dtype}."
    )


def _readable(summary: pd.DataFrame) -> pd.DataFrame:
    """The summary as people read it."""
    table = pd.DataFrame({"optimizer": summary["optimizer"]})
    if (summary["status"] != "done").any():
        table["status"] = summary["status"]
    if "final" in summary:
        for name in ("final", "best"):
            table[name] = [
                _spread(mean, sd)
                for mean, sd in zip(summary[name], summary[f"{name}_sd"], strict=True)
            ]
        table["at equal time"] = summary["at_equal_time"]
        table["train loss"] = summary["train_loss"]
        table["clipped"] = [_share(share) for share in summary["clipped_share"]]
        table["×SGD"] = summary["ratio_to_sgd"]
        table["s/step"] = summary["seconds_per_step"]
        table["peak MB"] = summary["peak_memory_bytes"] / 1e6
        table["state MB"] = summary["state_bytes"] / 1e6
        table["s/epoch"] = summary["seconds_per_epoch"]
        table["SGD's s/step"] = summary["sgd_seconds_per_step"]
    return table


def _shortened(summary: pd.DataFrame, entries: Sequence[training.Entry]) -> list[str]:
    """A line per optimizer whose steps a bound shortened more often than not."""
    if "clipped_share" not in summary:
        return []
    bounds = {entry.label: training.bounds(entry) for entry in entries}
    lines = []
    for row in summary[summary["clipped_share"] > OFTEN].itertuples():
        mine, share = bounds[row.optimizer], _share(row.clipped_share)
        said = f"{row.optimizer}: {' or '.join(sorted(mine))} shortened {share} of the steps"
        if "kl_clip" in mine:
            said = (
                f"{row.optimizer}: the learning rate had no effect: {said.partition(': ')[2]}, and "
                "one that kl_clip shortens is as long at any larger lr, whatever --schedule says; "
                f"--set {row.optimizer}.kl_clip=none frees it"
            )
        lines.append(said)
    return lines


def _share(share: float) -> str:
    """`12 %`; a dash for an optimizer that has no bound."""
    if math.isnan(share):
        return "-"
    return f"{share:.0%}".replace("%", " %")


def _spread(mean: float, sd: float) -> str:
    if math.isnan(mean):
        return "-"
    return f"{mean:.4g}" if math.isnan(sd) else f"{mean:.4g} ± {sd:.1g}"
