"""The cells of the atlas: which model is trained on which data, and what is measured of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fisherlab import datasets, models
from fisherlab.models.attention import CausalModel, Classifier
from fisherlab.names import unknown

# Shares of the training steps at which a model is looked at.
STAGES = {"start": 0.0, "middle": 0.1, "end": 1.0}
# Words that a language model knows, the most frequent first; all others are one more.
WORDS, STEPS = 31, 10
# The unseen examples of every measurement, and how many examples a model is trained on.
UNSEEN, EXAMPLES = 128, 1400
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Cell:
    """A model on data: how it is made, how long it is trained, and its measurements.

    `settings` are pairs of a Fisher type and a batch size.
    The first is measured at every stage, all of them at the end.
    """

    name: str
    data: str
    build: Callable[[], nn.Module]
    steps: int = 300
    settings: tuple[tuple[str, int], ...] = (("mc", 64), ("empirical", 64), ("mc", 16))
    lr: float = 3e-3
    pooled: bool = False

    def batches(self) -> Batch:
        """The examples that are trained on, measured on, and unseen, in this order."""
        x, y = _words() if self.data == "ptb" else _images(self.data)
        return x, y


def _images(name: str) -> Batch:
    x, y = datasets.load(name).train.tensors
    return x[:EXAMPLES].double(), y[:EXAMPLES]


def _words() -> Batch:
    """Sequences of the most frequent words of Penn Treebank."""
    x, y = datasets.load("ptb").train.tensors
    x, y = x[:EXAMPLES, :STEPS], y[:EXAMPLES, :STEPS]
    frequent = x.flatten().bincount().topk(WORDS).indices
    known = torch.full((int(max(x.max(), y.max())) + 1,), WORDS)
    known[frequent] = torch.arange(WORDS)
    return known[x], known[y]


def _image_model(name: str, width: float = 1.0, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        seed = int(torch.randint(2**31, ()))
        generator = torch.Generator().manual_seed(seed)
        return models.create(
            name, num_classes=10, input_size=(1, 8, 8), width=width, generator=generator, **options
        )

    return build


CELLS = (
    Cell("token", "digits", lambda: Classifier(8, 8, 10, 12, "token"), 300, pooled=True),
    Cell("mean", "digits", lambda: Classifier(8, 8, 10, 12, "mean"), 300, pooled=True),
    Cell("mlp", "digits", _image_model("mlp", hidden=(20, 16))),
    Cell("causal_lm", "ptb", lambda: CausalModel(WORDS + 1, STEPS, 12)),
    Cell("token", "mnist", lambda: Classifier(28, 28, 10, 12, "token"), pooled=True),
    Cell("mean", "mnist", lambda: Classifier(28, 28, 10, 12, "mean"), pooled=True),
    Cell("lenet", "digits", _image_model("lenet", 0.25)),
    Cell("lstm", "ptb", lambda: models.create("lstm", num_classes=WORDS + 1, width=0.06)),
    Cell("vgg11", "digits", _image_model("vgg11", 1 / 16, batch_norm=False), 200),
    Cell("resnet20", "digits", _image_model("resnet20", 0.25), 200),
)


def named(names: list[str]) -> list[Cell]:
    """The cells of some models, `mlp` or `token-mnist`, in the order of `CELLS`; none names all.

    Raises:
        ValueError: there is no such model.
    """
    known = {cell.name for cell in CELLS} | {f"{cell.name}-{cell.data}" for cell in CELLS}
    for name in names:
        if name not in known:
            raise ValueError(unknown("model of the atlas", name, sorted(known)))
    wanted = set(names) or known
    return [cell for cell in CELLS if {cell.name, f"{cell.name}-{cell.data}"} & wanted]
