"""Options that several commands have: one name, one meaning."""

from __future__ import annotations

from typing import Annotated

import typer

from fisherlab import datasets, models

Data = Annotated[
    str,
    typer.Option(
        help=f"One of {', '.join(datasets.names())}; folder:PATH[@SIDE]; module:function."
    ),
]
Model = Annotated[
    str,
    typer.Option(
        help=f"One of {', '.join(models.names())}; module:function; timm:NAME; hf:FOLDER."
    ),
]
Width = Annotated[float, typer.Option(help="Multiplies every hidden width.")]
Hidden = Annotated[str | None, typer.Option(help="Widths of the hidden layers of an mlp: 80,80.")]
Activation = Annotated[str, typer.Option(help="relu, tanh, sigmoid, ...")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps.")]
Dtype = Annotated[str, typer.Option(help="float32 or float64.")]
BatchSize = Annotated[int, typer.Option(help="Examples per training step.")]
LearningRate = Annotated[
    float | None, typer.Option(help="Learning rate; by default the optimizer's own.")
]
Seeds = Annotated[str, typer.Option(help="How many, or a list such as 0,4,7.")]
Seed = Annotated[int, typer.Option(help="The first seed.")]
Schedule = Annotated[
    str, typer.Option(help="constant, cosine, step (x 0.1 at 50 % and 75 %) or steps(0.4,0.8).")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
Trials = Annotated[
    int | None,
    typer.Option(
        help="How many to try: cases of a claim (default its own number), points of an optimizer."
    ),
]
