"""From an experiment and a scale to the settings of its training runs, and what they cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from fisherlab import datasets
from fisherlab.experiments.reproduce.item import SCALES, Arm, Cell, Experiment, Item, Size
from fisherlab.experiments.training import Entry, Settings
from fisherlab.names import unknown
from fisherlab.optim.create import option_names
from fisherlab.optim.presets import PAPER, inferred

# Share of the epochs, and of the training examples held out, when learning rates are chosen.
SEARCH_EPOCHS, HELD_OUT = 0.2, 0.1
REPEATS = 1


class ReproduceError(ValueError):
    """A paper, an item or a scale that is not there."""


@dataclass(frozen=True)
class Planned:
    """One folder of runs: the arms of a cell that share a length and a model."""

    cell: Cell
    arms: tuple[Arm, ...]
    settings: Settings
    folder: str


def check_scale(scale: str) -> None:
    """Refuse an unknown scale by name."""
    if scale not in SCALES:
        raise ReproduceError(unknown("scale", scale, list(SCALES)))


def searched(arm: Arm, scale: str) -> bool:
    """Whether the learning rate of an arm is chosen on held-out examples at this scale."""
    return bool(arm.grid) and scale != "minutes"


def planned(
    experiment: Experiment,
    scale: str,
    rates: dict[tuple[str, str], float] | None = None,
    only: tuple[str, ...] | None = None,
    control: bool = False,
) -> list[Planned]:
    """The runs of an experiment at a scale; `rates` are learning rates by cell and arm.

    With `control` a folder more for each that has preconditioners: SGD with their step lengths.
    """
    check_scale(scale)
    cells, arms = experiment.chosen(scale, only)
    found = []
    for cell in cells:
        groups: dict[tuple[str, int, bool | None], list[Arm]] = {}
        for arm in arms:
            if arm.cells is not None and cell.name not in arm.cells:
                continue
            own = arm.label if arm.apart else ""
            key = own, _epochs(experiment, cell, arm, scale), arm.batch_norm
            groups.setdefault(key, []).append(arm)
        shared = [key for key in groups if not key[0]]
        for key, mine in groups.items():
            own, epochs, batch_norm = key
            options = _common(experiment, cell, scale) | {"batch_norm": batch_norm}
            folder = cell.name
            if own or len(shared) > 1:
                folder += f"/{own or shared.index(key)}"
            beside = [_control(arm) for arm in mine if control and has_control(arm)]
            for where, taken in (folder, mine), (f"{folder}/control", beside):
                entries = tuple(
                    _entry(experiment, cell, a, options, epochs, (rates or {}).get(_of(cell, a)))
                    for a in taken
                )
                if entries:
                    settings = Settings(**options, entries=entries, epochs=epochs)
                    found.append(Planned(cell, tuple(taken), settings, where))
    return found


def has_control(arm: Arm) -> bool:
    """Whether an arm has per-layer step lengths that SGD can take."""
    return "control" not in arm.options and "control" in option_names(arm.name, arm.preset)


def _control(arm: Arm) -> Arm:
    """SGD with the step lengths of an arm, and with its grid of learning rates."""
    options = {**arm.options, "control": inferred(True, "ours")}
    return replace(arm, label=f"{arm.label}_control", options=options, control_of=arm.label)


def searches(
    experiment: Experiment,
    scale: str,
    only: tuple[str, ...] | None = None,
    control: bool = False,
) -> Iterator[tuple[Planned, Arm]]:
    """A run per cell and arm that tries every rate of the grid on held-out examples."""
    for plan in planned(experiment, scale, only=only, control=control):
        for arm in plan.arms:
            if not searched(arm, scale):
                continue
            base, entry = plan.settings, plan.settings.entries[plan.arms.index(arm)]
            tried = tuple(
                Entry(f"lr{rate:g}", entry.name, {**entry.options, "lr": rate}) for rate in arm.grid
            )
            held = max(1, int(HELD_OUT * examples_of(base)))
            settings = replace(
                base,
                entries=tried,
                epochs=max(1, round(SEARCH_EPOCHS * base.epochs)),
                validation=held,
                seeds=base.seeds[:1],
            )
            folder = f"{plan.folder}/search-{arm.label}"
            yield Planned(plan.cell, (arm,), settings, folder), arm


def examples_of(settings: Settings) -> int:
    """How many examples a run trains on."""
    whole = datasets.card(settings.data).train_examples or len(datasets.load(settings.data).train)
    left = whole - (settings.validation or 0)
    return min(left, settings.examples or left)


def _of(cell: Cell, arm: Arm) -> tuple[str, str]:
    return cell.name, arm.label


def _value(experiment: Experiment, cell: Cell, name: str, otherwise: Any = None) -> Any:
    given = experiment.setting(cell, name)
    return otherwise if given is None else given.value


def _epochs(experiment: Experiment, cell: Cell, arm: Arm, scale: str) -> int:
    """The epochs of an arm: at a smaller scale the same share of the paper's.

    `Size.epochs` stands for the experiment's; a cell or an arm with others has them in proportion.
    """
    whole = experiment.settings["epochs"].value
    mine = arm.epochs.value if arm.epochs else _value(experiment, cell, "epochs")
    size = experiment.sizes[scale].epochs
    return mine if size is None else max(1, round(size * mine / whole))


def _common(experiment: Experiment, cell: Cell, scale: str) -> dict[str, Any]:
    size: Size = experiment.sizes[scale]
    names = set(Settings.__dataclass_fields__) - {"entries", "epochs", "seeds"}
    options = {
        name: given.value
        for name in {**experiment.settings, **cell.settings}
        if name in names and (given := experiment.setting(cell, name)) is not None
    }
    repeats = size.seeds or _value(experiment, cell, "repeats", REPEATS)
    limits = {"examples": size.examples, "test_examples": size.test_examples}
    if size.width != 1.0 and cell.model.value != "mlp":  # an MLP is small as it is
        options["width"] = size.width * options.get("width", 1.0)
    if size.layers is not None:
        options["layers"] = size.layers
    return {
        **options,
        **{name: limit for name, limit in limits.items() if limit is not None},
        "data": cell.data.value,
        "model": cell.model.value,
        "seeds": tuple(range(repeats)),
    }


def _entry(
    experiment: Experiment,
    cell: Cell,
    arm: Arm,
    options: dict[str, Any],
    epochs: int,
    rate: float | None,
) -> Entry:
    given = {name: as_.value for name, as_ in arm.options.items()}
    if arm.switch_epoch is not None:
        whole = _value(experiment, cell, "epochs")
        run = Settings(**options, epochs=epochs)
        steps = examples_of(run) // min(run.batch_size, examples_of(run))
        given["switch_step"] = max(1, round(arm.switch_epoch.value / whole * epochs * steps))
    lr = arm.lr.value if rate is None else rate
    return Entry(arm.label, arm.name, {"preset": arm.preset, "lr": lr, **given})


# Cost ---------------------------------------------------------------------------------------------

# Seconds of SGD per step on one core, at the paper's batch size and width 1, as measured here.
SGD_STEP = {
    ("mlp", 128): 0.0012,
    ("resnet20", 128): 0.63,
    ("resnet32", 128): 1.03,
    ("vgg16", 128): 2.55,
    ("vgg11", 128): 1.36,
    ("resnet18", 128): 5.4,
    ("resnet34", 128): 10.0,
    ("resnet50", 128): 12.0,
    ("lstm", 20): 0.2,
    ("transformer", 64): 7.0,
    ("lenet", 128): 0.05,
}
# A method's step over SGD's: in nets of small layers, and in large ones, where SGD takes longer.
SMALL, LARGE = 0, 1
FACTORS = {
    "sgd": (1.0, 1.0),
    "adam": (1.2, 1.02),
    "adamw": (1.2, 1.02),
    "radam": (1.5, 1.02),
    "sngd": (50.0, 1.7),
    "fngd": (2.5, 1.2),
    "ngd_smw": (5.0, 2.4),
    "eva": (8.0, 1.5),
    "kbfgs": (8.0, 1.8),
    "tengrad": (4.0, 2.4),
    "ngd": (4.0, 2.4),
    "ngd_dense": (40.0, 100.0),
    "blockwise_ngd": (40.0, 100.0),
}
OTHERS = (8.0, 1.7)
# The power of the width that a step takes: narrow nets are bound by memory, not by products.
WIDTH = 0.8
# Beyond the steps: evaluation, the reference SGD, checkpoints.
OVERHEAD = 1.6


def seconds_of(plan: Planned) -> float:
    """An estimate of the seconds of one folder of runs on one core."""
    s = plan.settings
    base = next((v for (model, _), v in SGD_STEP.items() if model == s.model), 0.01)
    batch = next((b for model, b in SGD_STEP if model == s.model), 128)
    examples = examples_of(s)
    size = min(s.batch_size, examples)
    kind = SMALL if s.model == "mlp" else LARGE
    pixels = 1 / 16 if s.data == "digits" else 1 / 1.6 if s.data == "mnist" else 1.0
    width = 1.0 if s.model == "mlp" else s.width**WIDTH
    depth = (s.layers or 1) if s.model == "lstm" else (s.layers or 6) / 6
    depth = 1.0 if s.model not in ("lstm", "transformer") else depth
    step = base * (size / batch if kind == LARGE else 1.0) * width * pixels * depth
    steps = examples // size * s.epochs * len(s.seeds)
    per_arm = [FACTORS.get(arm.name, OTHERS)[kind] for arm in plan.arms]
    tried = max(1, len(s.entries) // len(plan.arms))
    return max(0.0004, step) * steps * sum(per_arm) * tried * OVERHEAD


def cost(item: Item, scale: str, control: bool = False) -> float:
    """An estimate of the seconds of an item on one core, with its search for learning rates."""
    if item.drawing is not None:
        return item.drawing.seconds
    if item.experiment is None:
        return 0.0
    experiment, cells = item.experiment, item.cells
    runs = sum(map(seconds_of, planned(experiment, scale, only=cells, control=control)))
    tried = searches(experiment, scale, cells, control)
    return runs + sum(seconds_of(plan) for plan, _ in tried)


def in_words(seconds: float) -> str:
    """`40 s`, `12 min`, `3.5 h`, `4 days`."""
    for unit, size, above in (("days", 86_400, 172_800), ("h", 3_600, 5_400), ("min", 60, 90)):
        if seconds >= above:
            amount = seconds / size
            return f"{amount:.1f} {unit}" if amount < 10 else f"{amount:.0f} {unit}"
    return f"{seconds:.0f} s"


def settings_of(item: Item, scale: str) -> pd.DataFrame:
    """Every setting of an item with its source: what is stated, and what had to be inferred."""
    experiment = item.experiment
    if experiment is None:
        return pd.DataFrame(columns=["of", "setting", "value", "source", "where or why"])
    cells, arms = experiment.chosen(scale, item.cells)
    given = [("all", name, value) for name, value in experiment.settings.items()]
    for cell in cells:
        given += [(cell.name, "data", cell.data), (cell.name, "model", cell.model)]
        given += [(cell.name, name, value) for name, value in cell.settings.items()]
    for arm in arms:
        given += [(arm.label, "lr", arm.lr)]
        preset = PAPER.get(arm.name, {}) if arm.preset == "paper" else {}
        options = {**preset, **arm.options}
        given += [(arm.label, name, options[name]) for name in options if name != "lr"]
        for name in ("epochs", "switch_epoch"):
            if (value := getattr(arm, name)) is not None:
                given.append((arm.label, name, value))
    return pd.DataFrame(
        [
            {
                "of": of,
                "setting": name,
                "value": str(g.value),
                "source": g.source,
                "where or why": g.why,
            }
            for of, name, g in given
        ]
    )
