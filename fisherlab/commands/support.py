"""`fisherlab support`: what can be done with a model, layer by layer, before a long run."""

from __future__ import annotations

from typing import Annotated

import pandas as pd
import torch
import typer

from fisherlab import datasets, models
from fisherlab.commands import options
from fisherlab.commands.common import say, show
from fisherlab.experiments.training.task import misfit
from fisherlab.extract import support as supported


def support(
    model: options.Model,
    data: options.Data = "digits",
    compare_examples: Annotated[
        int, typer.Option(min=1, help="Examples that blocks are measured on.")
    ] = 32,
    width: options.Width = 1.0,
) -> None:
    """Say for every layer of a model whether it has an exact block.

    The table has the reason where it has none, what `compare` does, and what the block costs.

    Examples:

        fisherlab support --model resnet20 --data cifar10
        fisherlab --import my.py support --model my_net
    """
    dataset = datasets.load(data)
    card = dataset.card
    net = models.create(
        model, num_classes=card.num_outputs, input_size=card.input_shape, width=width
    )
    net.eval()  # as `fisherlab compare` measures it
    x = dataset.train.tensors[0][:compare_examples]
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
    frame = frame.drop(columns=["gram_multiplications"])
    empty = [c for c in ("reason", "diagonal_factors") if not frame[c].any()]
    frame = frame.drop(columns=empty)
    wanted = ["layer", "layer_type", "compare", "status", "reason", "n_parameters", "shape"]
    frame = frame[[*(c for c in wanted if c in frame), *(c for c in frame if c not in wanted)]]
    show(frame, f"{model} on {data}, {len(x)} examples", wrap=["reason"])
    say(said)


def _compared(net: torch.nn.Module, frame: pd.DataFrame) -> str:
    """The treatment of the model by `fisherlab compare`, in a sentence."""
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
