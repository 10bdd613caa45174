"""`fisherlab support`: what can be done with a model, layer by layer, before a long run."""

from __future__ import annotations

from typing import Annotated

import pandas as pd
import torch
import typer

from fisherlab import datasets, models
from fisherlab.commands.common import show
from fisherlab.experiments.training.task import misfit
from fisherlab.extract import support as supported


def support(
    model: Annotated[str, typer.Option(help=f"One of {', '.join(models.names())}.")],
    data: Annotated[str, typer.Option(help=f"One of {', '.join(datasets.names())}.")] = "digits",
    examples: Annotated[int, typer.Option(min=1, help="Examples in the batch.")] = 32,
    width: Annotated[float, typer.Option(help="Multiplies every hidden width.")] = 1.0,
) -> None:
    """Say for every layer of a model whether it has an exact block, why not, and what it costs."""
    dataset = datasets.load(data)
    card = dataset.card
    net = models.create(
        model, num_classes=card.num_outputs, input_size=card.input_shape, width=width
    )
    net.eval()  # as `fisherlab compare` measures it
    x = dataset.train.tensors[0][:examples]
    try:
        frame = supported(net, x)
    except (RuntimeError, IndexError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise misfit(model, data, x, error) from None
    for column in ("capture_bytes", "dense_bytes"):
        frame[column] = frame[column].map(_bytes)
    said = _compared(net, frame)
    frame["shape"] = [shape if isinstance(shape, tuple) else "-" for shape in frame["shape"]]
    frame = frame.drop(columns=["gram_multiplications", "compare"])
    empty = [c for c in ("reason", "diagonal_factors") if not frame[c].any()]
    frame = frame.drop(columns=empty)
    show(frame, f"{model} on {data}, {len(x)} examples", wrap=["reason"])
    typer.echo(said)


def _compared(net: torch.nn.Module, frame: pd.DataFrame) -> str:
    """What `fisherlab compare` does with the model, in a sentence."""
    measured = frame[frame["compare"] != "skipped"]
    if not len(measured):
        return "compare refuses this model: no layer has a block"
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    covered = int(measured["n_parameters"].sum())
    return (
        f"compare measures {len(measured)} of {len(frame)} layers, {covered:,} of {trained:,} "
        f"trainable parameters ({covered / trained:.0%}), in evaluation mode; Fisher type by "
        f"default: {measured['compare'].iloc[0]}"
    )


def _bytes(count: float) -> str:
    """`2048 -> "2.0 KiB"`; nothing for no number."""
    if count != count:
        return "-"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:,.3g} TiB"
