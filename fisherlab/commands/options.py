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
Depth = Annotated[int | None, typer.Option(help="Layers of an lstm or transformer.")]
BatchNorm = Annotated[
    bool | None, typer.Option(help="On in vgg and resnet by default; mlp and lstm can have it.")
]
Augment = Annotated[bool | None, typer.Option(help="Crop and flip images; by default on CIFAR.")]
Carry = Annotated[
    bool | None, typer.Option(help="Carry an lstm's state along the text; by default on ptb.")
]
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


def augments(given: bool | None, data: str) -> bool:
    """Whether images are cropped and flipped: CIFAR's are, if nothing is said."""
    from fisherlab.experiments.training.task import AUGMENTED

    return data in AUGMENTED if given is None else given


def carries(given: bool | None, data: str, model: str) -> bool:
    """Whether an LSTM's state goes along the text: on Penn Treebank, if nothing is said."""
    return (data, model) == ("ptb", "lstm") if given is None else given
