"""A data set and a model that fit each other: batches, the criterion, and how good a model is."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from fisherlab import datasets, models
from fisherlab.experiments.training.settings import DTYPES, Settings, SettingsError
from fisherlab.experiments.training.translation import bleu
from fisherlab.models.sequence import Transformer, carry_on, forget

EVALUATION_BATCH = 500
AUGMENTED = (
    "cifar10",
    "cifar100",
    "cifar10_official",
    "cifar100_official",
)  # where the papers crop and flip
HIGHER_IS_BETTER = ("accuracy", "bleu")
OF_WORDS = {"lstm": "ptb", "transformer": "multi30k"}  # models of tokens, and their data sets
OF_ANY_SHAPE = ("mlp", "autoencoder")


class Task:
    """The parts that all optimizers of a run share, made from the settings.

    Every draw has its own generator, named by seed and epoch. An epoch's batches do not depend on
    earlier runs.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.dataset = datasets.load(settings.data)
        self.card = self.dataset.card
        self.autoencoder = settings.model == "autoencoder"
        self.x, self.y, self.test = self._split()
        if settings.augment and self.x.ndim != 4:
            raise SettingsError(f"--augment crops and flips images; {settings.data} has none")
        self.batch_size = min(settings.batch_size, len(self.x))
        self.steps_per_epoch = len(self.x) // self.batch_size
        self._check_fit()

    def _split(self) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Training inputs and targets, and what the metrics are measured on."""
        s = self.settings
        x, y = self._placed(self.dataset.train.tensors)
        x_test, y_test = self._placed(self.dataset.test.tensors)
        # the first ones, to which the references of a translation belong
        test = x_test[: s.test_examples], y_test[: s.test_examples]
        held = s.validation or 0
        if held >= len(x):
            raise SettingsError(f"--validation {held} leaves none of {len(x)} training examples")
        if not held and (s.examples or len(x)) >= len(x):
            return x, y, test
        generator = torch.Generator().manual_seed(0)
        order = torch.arange(len(x)) if s.carry else torch.randperm(len(x), generator=generator)
        order = order.to(x.device)
        if held:  # the end of the order, so that fewer examples from its start never meet them
            test = x[order[-held:]], y[order[-held:]]
        chosen = order[: len(x) - held][: s.examples]
        return x[chosen], y[chosen], test

    def _placed(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        x, y = tensors
        dtype, device = DTYPES[self.settings.dtype], self.settings.device
        x = x.to(device, dtype if x.is_floating_point() else None)
        if self.autoencoder:
            return x, x.flatten(1)
        return x, y.to(device, dtype if y.is_floating_point() else None)

    def _check_fit(self) -> None:
        model, x = self.model(0).eval(), self.x[:2]
        if self.settings.carry and not forget(model):
            raise SettingsError(f"--carry is of lstm; {self.settings.model!r} has no state")
        try:
            with torch.no_grad():
                loss = self.criterion()(model(x), self.y[:2])
        except (RuntimeError, IndexError, ValueError) as error:
            raise misfit(self.settings.model, self.settings.data, x, error) from None
        if not torch.isfinite(loss):
            raise SettingsError(
                f"the loss of {self.settings.model!r} is {loss.item()} from the start"
            )

    def model(self, seed: int) -> nn.Module:
        """The model of a seed at initialisation: the same for every optimizer."""
        s = self.settings
        options: dict[str, Any] = {"hidden": s.hidden, "layers": s.layers}
        model = models.create(
            s.model,
            num_classes=self.card.num_outputs,
            input_size=self.card.input_shape,
            width=s.width,
            batch_norm=s.batch_norm,
            activation=s.activation,
            generator=torch.Generator().manual_seed(seed),
            **{name: option for name, option in options.items() if option is not None},
        )
        return model.to(s.device, DTYPES[s.dtype])

    def criterion(self) -> nn.Module:
        """A new one: optimizers hook the object that their loop calls."""
        if self.regression:
            return nn.MSELoss()
        ignored = self.card.ignore_index
        return (
            nn.CrossEntropyLoss() if ignored is None else nn.CrossEntropyLoss(ignore_index=ignored)
        )

    @property
    def regression(self) -> bool:
        """Whether the loss is the squared error."""
        return self.autoencoder or self.card.task == "regression"

    @property
    def metric(self) -> str:
        """The column by which models are compared."""
        if self.regression:
            return "rmse"
        if self.y.ndim == 1:
            return "accuracy"
        translation = self.dataset.references and not self.settings.validation
        return "bleu" if translation else "perplexity"

    def batches(self, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Indices, inputs and targets of an epoch's whole batches; the rest is left out."""
        generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
        order = torch.randperm(len(self.x), generator=generator)
        whole = self.steps_per_epoch * self.batch_size
        every = order[:whole].view(self.steps_per_epoch, -1)
        for indices in streams(len(self.x), self.batch_size) if self.settings.carry else every:
            chosen = indices.to(self.x.device)
            x = self.x[chosen]
            if self.settings.augment:
                x = augmented(x, generator)
            yield indices, x, self.y[chosen]

    @torch.no_grad()
    def evaluate(self, model: nn.Module, *, translate: bool = True) -> dict[str, float]:
        """`test_loss` and the metrics on the test set, in evaluation mode."""
        x, y = self.test
        size = EVALUATION_BATCH if y.ndim == 1 else self.batch_size
        criterion: Any = self.criterion()
        loss, right, terms = 0.0, 0, 0
        model.eval()
        for part, target in self._parts(model, x, y, size):
            output = model(part)
            counted = torch.ones_like(target, dtype=torch.bool)
            if not self.regression:
                counted = target.ne(criterion.ignore_index)
                right += int((output.argmax(1) == target)[counted].sum())
            n = int(counted.sum())
            loss += criterion(output, target).double().item() * n
            terms += n
        found = self._metrics(loss / terms, right / terms)
        if translate and self.metric == "bleu" and isinstance(model, Transformer):
            found["bleu"] = bleu(model, self.dataset, x, EVALUATION_BATCH)
        model.train()
        return found

    def _parts(
        self, model: nn.Module, x: Tensor, y: Tensor, size: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of a test set; the state of an lstm is carried along its streams."""
        if not self.settings.carry:
            yield from zip(x.split(size), y.split(size), strict=True)
            return
        size = min(size, len(x))
        forget(model)
        for indices in streams(len(x), size).to(x.device):
            yield x[indices], y[indices]
            carry_on(model)
        forget(model)
        if rest := len(x) % size:  # less than one of every stream: from zeros
            yield x[-rest:], y[-rest:]
            forget(model)

    def _metrics(self, loss: float, accuracy: float) -> dict[str, float]:
        if self.regression:
            unit = 1.0 if self.autoencoder else self.dataset.target_std
            return {"test_loss": loss, "rmse": math.sqrt(loss) * unit}
        found = {"test_loss": loss, "accuracy": accuracy}
        if self.y.ndim > 1:
            found["perplexity"] = math.exp(min(loss, 700.0))
        return found


def streams(n: int, size: int) -> Tensor:
    """Batches `[n // size, size]` of examples in order: column b is a stream without a gap."""
    return torch.arange(n // size * size).view(size, -1).T


def misfit(model: str, data: str, x: Tensor, error: Exception) -> SettingsError:
    """The message for a user whose model failed with this error on this data set."""
    said = (
        f"model {model!r} does not take {data!r} ({tuple(x.shape[1:])}): "
        f"{str(error).splitlines()[0]}"
    )
    if ":" in model:  # a user's own
        return SettingsError(said)
    known = [name for name in datasets.names() if name not in OF_WORDS.values()]
    if model in OF_WORDS:
        known = [OF_WORDS[model]]
    elif model not in OF_ANY_SHAPE:
        known = [name for name in known if len(datasets.card(name).input_shape) == 3]
    return SettingsError(f"{said}; it takes --data {', '.join(known)}")


def augmented(x: Tensor, generator: torch.Generator, border: int = 4) -> Tensor:
    """Each image cropped at a random place from itself with a border; half of them flipped."""
    n, c, h, w = x.shape
    top, left = torch.randint(2 * border + 1, (2, n), generator=generator)
    rows, columns = top[:, None] + torch.arange(h), left[:, None] + torch.arange(w)
    flipped = torch.rand(n, generator=generator) < 0.5
    columns = torch.where(flipped[:, None], columns.flip(1), columns)
    return pad(x, (border,) * 4)[
        torch.arange(n)[:, None, None, None],
        torch.arange(c)[None, :, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]
