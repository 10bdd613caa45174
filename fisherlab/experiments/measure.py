"""`fisherlab compare`: train a model, and compare the approximations at some of its steps."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fisherlab import approximations
from fisherlab.comparison import Comparison, Interrupted, compare, default_fisher_type
from fisherlab.distributed import Ranks
from fisherlab.experiments import training
from fisherlab.experiments.training.divergence import Diverged
from fisherlab.experiments.training.entries import value
from fisherlab.experiments.training.run import Run
from fisherlab.experiments.training.task import Task
from fisherlab.extract import capture
from fisherlab.extract.select import check_batch
from fisherlab.metrics import GramStudy, gram_study
from fisherlab.names import unknown

PHASES = ("start", "middle", "end")
SMALL_MODEL = 50_000  # parameters
# Entries of a comparison's config that its first lines are made of.
ABOUT = ("mc_samples", "fisher_type_asked", "parameters", "skipped", "layers")
LARGEST_GRAM = 256  # examples: beyond it the picture of a Gram matrix is grey
Progress = Callable[[Sequence[str]], Iterable[str]]


class MeasureError(ValueError):
    """A comparison that cannot be made as asked."""


@dataclass(frozen=True)
class Settings:
    """Everything that determines the numbers of a run, timings aside.

    `batch_size` examples make X and F, `reference` further ones the population error (0: none);
    None takes up to 64 and 128 of the training set. `at` holds training steps, or the words start,
    middle and end. `dampings` are relative to `tr F / N` of each layer. `assign` gives methods
    options: `kfac.weight_sharing=reduce`.
    """

    data: str = "digits"
    model: str = "mlp"
    approximations: tuple[str, ...] | None = None
    assign: tuple[str, ...] = ()
    layers: tuple[str, ...] | None = None
    fisher_type: str | None = None
    mc_samples: int = 1
    batch_size: int | None = None
    reference: int | None = None
    dampings: tuple[float, ...] = (1e-3, 1e-2, 1e-1)
    epochs: int = 3
    at: tuple[str, ...] = PHASES
    optimizer: str = "sgd"
    lr: float | None = None
    train_batch: int = 64
    seeds: tuple[int, ...] = (0,)
    width: float = 1.0
    hidden: tuple[int, ...] | None = None
    activation: str = "relu"
    device: str = "cpu"
    dtype: str = "float64"
    memory: int | None = None


@contextmanager
def few_threads(model: nn.Module) -> Iterator[None]:
    """One thread for a small model: there, more of them mostly wait for each other.

    Measured on the default run, 2 cores: 31 s with one thread and 37 s with two; with two other
    processes on the machine 34 s and 102 s.
    """
    threads = torch.get_num_threads()
    if sum(p.numel() for p in model.parameters()) <= SMALL_MODEL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Study:
    """A comparison over training. Making one checks everything; `run` measures."""

    def __init__(self, settings: Settings) -> None:
        s = self.settings = settings
        self.notes: list[str] = []  # seeds whose training diverged
        self.measured: dict[str, Any] = {}  # entries of the config that the comparisons give
        self.grams: dict[int, GramStudy] = {}  # step -> study, for the first seed
        self.names = list(s.approximations or approximations.of_one_batch())
        self.makers = {name: approximations.get(name)() for name in self.names}
        self._assign()
        if not s.dampings or any(not math.isfinite(d) or d <= 0 for d in s.dampings):
            raise MeasureError(f"dampings are positive and finite, got {s.dampings}")
        if s.epochs < 0 or s.mc_samples < 1:
            raise MeasureError(f"epochs >= 0 and mc samples >= 1; got {s.epochs}, {s.mc_samples}")
        if s.lr is not None and not (math.isfinite(s.lr) and s.lr > 0):
            raise MeasureError(f"the learning rate is positive, got {s.lr}")
        (self.entry,) = training.entries(s.optimizer, common={} if s.lr is None else {"lr": s.lr})
        self.task = Task(
            training.Settings(
                data=s.data,
                model=s.model,
                entries=(self.entry,),
                epochs=max(1, s.epochs),
                batch_size=s.train_batch,
                seeds=s.seeds,
                width=s.width,
                hidden=s.hidden,
                activation=s.activation,
                device=s.device,
                dtype=s.dtype,
            )
        )
        self.steps = self._steps()
        self.batch_size, self.reference = self._sizes()
        self._check_capture()

    def _assign(self) -> None:
        """Give the methods the options that were assigned."""
        for text in self.settings.assign:
            match = re.fullmatch(r"([^=.]+)\.(\w+)=(.+)", text)
            if not match:
                raise MeasureError(
                    f"--set takes METHOD.OPTION=VALUE, such as kfac.weight_sharing=reduce; "
                    f"got {text!r}"
                )
            name, option, given = match.groups()
            if name not in self.makers:
                raise MeasureError(unknown("approximation in --set", name, self.makers))
            known = self.makers[name].options
            if option not in known:
                raise MeasureError(unknown(f"{name} option", option, known))
            chosen = {option: value(given, nn.Identity())}
            self.makers[name] = self.makers[name].with_options(**chosen)

    @property
    def config(self) -> dict[str, Any]:
        """The configuration that reruns it, with every default filled in."""
        filled = {
            "approximations": self.names,
            "batch_size": self.batch_size,
            "reference": self.reference,
            "fisher_type": self.fisher_type,
            "steps": self.steps,
            "optimizer": str(self.entry),
        }
        data = {"name": self.task.card.name, "sha256": self.task.card.sha256}
        return {
            "command": "compare",
            "title": self.title,
            "settings": asdict(self.settings) | filled,
            "data": data,
            "notes": self.notes,
            **self.measured,
        }

    @property
    def title(self) -> str:
        """The measurement in one line."""
        return f"{self.settings.model} on {self.settings.data}, {self.fisher_type} Fisher"

    def run(
        self, measured: Callable[[Comparison], None], progress: Callable[[str], Progress]
    ) -> Comparison:
        """Measure at every step of every seed; `measured` gets all there is whenever it grows.

        `progress(title)` makes the bar over the layers. Ctrl-C, wherever it falls, first hands
        over the layers that were measured.
        """
        tables: list[Comparison] = []
        with few_threads(self.task.model(self.settings.seeds[0])):
            for seed in self.settings.seeds:
                try:
                    for step, model in self.trained(seed):
                        if seed == self.settings.seeds[0]:
                            self._correlate(model, seed, step)
                        tables.append(self.compare(model, seed, step, progress(f"step {step}")))
                        measured(Comparison.concat(tables))
                except Diverged as error:
                    self.notes.append(f"seed {seed}: training diverged, {error}")
                except Interrupted as stop:
                    measured(Comparison.concat([*tables, stop.comparison]))
                    raise
        if not tables:
            raise MeasureError(f"nothing was measured: {'; '.join(self.notes)}; lower --lr")
        return Comparison.concat(tables)

    def trained(self, seed: int) -> Iterator[tuple[int, nn.Module]]:
        """The model at every step wanted, in evaluation mode and without the optimizer's hooks."""
        run = Run(self.task, training.Record(self.entry, seed))
        for epoch in range(self.settings.epochs):
            for batch in self.task.batches(seed, epoch):
                if run.steps in self.steps:
                    yield run.steps, self._copy(run.model, seed)
                if run.steps == max(self.steps):
                    return
                run.step(*batch)
        yield run.steps, self._copy(run.model, seed)

    def compare(self, model: nn.Module, seed: int, step: int, progress: Progress) -> Comparison:
        """One comparison at one step."""
        s = self.settings
        (x, y), reference = self.batch(seed)
        ranks = Ranks.current()
        if ranks is not None:
            x, y = ranks.shard(x), ranks.shard(y)
            if reference is not None:
                reference = ranks.shard(reference[0]), ranks.shard(reference[1])
        table = compare(
            model,
            self.task.criterion(),
            x,
            y,
            approximations=self.makers,
            fisher_type=s.fisher_type,
            dampings=s.dampings,
            reference=reference,
            generator=torch.Generator(s.device).manual_seed(seed),
            memory=s.memory,
            layers=s.layers,
            mc_samples=s.mc_samples,
            step=step,
            progress=progress,
        )
        self.measured = {name: table.config[name] for name in ABOUT}
        return table

    def _correlate(self, model: nn.Module, seed: int, step: int) -> None:
        """The Gram study of the batch at this step, where examples have one class each."""
        (x, y), _ = self.batch(seed)
        if y.ndim != 1 or y.is_floating_point() or not 2 <= len(y) <= LARGEST_GRAM:
            return
        layers = self.settings.layers
        captured = capture(
            model,
            self.task.criterion(),
            x,
            y,
            fisher_type="empirical",
            layers=layers,
            kinds=("map",),
        )
        self.grams[step] = gram_study(captured, y)

    def batch(self, seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None]:
        """The examples measured on and the unseen ones, drawn from the training set by the seed."""
        n, m = self.batch_size, self.reference
        order = torch.randperm(len(self.task.x), generator=torch.Generator().manual_seed(seed)).to(
            self.task.x.device
        )
        ours, unseen = order[:n], order[n : n + m]
        x, y = self.task.x, self.task.y
        return (x[ours], y[ours]), (x[unseen], y[unseen]) if m else None

    def _copy(self, model: nn.Module, seed: int) -> nn.Module:
        copy = self.task.model(seed)
        copy.load_state_dict(model.state_dict())
        return copy.eval()

    def _steps(self) -> list[int]:
        total = self.settings.epochs * self.task.steps_per_epoch
        named = dict(zip(PHASES, (0, total // 2, total), strict=True))
        steps = set()
        for word in self.settings.at:
            if word not in named and not word.isdecimal():
                raise MeasureError(f"--at takes training steps, start, middle or end; got {word!r}")
            step = named[word] if word in named else int(word)
            if step > total:
                raise MeasureError(
                    f"--at {step}, but {self.settings.epochs} epochs have {total} steps"
                )
            steps.add(step)
        if not steps:
            raise MeasureError("--at names no step to measure at")
        return sorted(steps)

    def _sizes(self) -> tuple[int, int]:
        there = len(self.task.x)
        n, m = self.settings.batch_size, self.settings.reference
        n = min(64, there // 2) if n is None else n
        m = max(0, min(128, there - n)) if m is None else m
        if n < 1 or m < 0 or m == 1 or n + m > there:
            raise MeasureError(
                f"a batch of {n} and {m} unseen examples of {self.settings.data!r}, whose training "
                f"set has {there}: take a batch of at least 1 and 0 or at least 2 unseen ones"
            )
        return n, m

    def _check_capture(self) -> None:
        """Everything that a capture refuses, on two examples; and every number and label used."""
        s, model = self.settings, self.task.model(self.settings.seeds[0]).eval()
        for seed in s.seeds:
            (x, y), reference = self.batch(seed)
            for part in ((x, y), reference) if reference else ((x, y),):
                check_batch(*part, model)
        criterion = self.task.criterion()
        self.fisher_type = s.fisher_type or default_fisher_type(model, criterion, x[:2])
        capture(model, criterion, x, y, fisher_type="empirical", layers=s.layers)
        capture(model, criterion, x[:2], y[:2], fisher_type=self.fisher_type, layers=s.layers)
