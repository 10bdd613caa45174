"""The optimizers of a run by name, with their options: parsed, checked, made."""

from __future__ import annotations

import ast
import inspect
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from fisherlab import doors, optim
from fisherlab.approximations import damping
from fisherlab.experiments.training.settings import Entry, Settings, SettingsError, check_known
from fisherlab.optim.create import option_names
from fisherlab.optim.presets import PRESETS

RULES = ("constant", "relative", "geometric", "gram_norm", "trace", "levenberg_marquardt")
# Options that `make` fills in from the length of the whole run.
PLANNED = ("total_steps", "switch_step")
# Beyond those of the optimizer: its preset, and its own number of epochs.
OF_THE_RUN = ("preset", "epochs")
# Not a user's to set: the loop passes them.
_OURS = {"params", "criterion", "generator"}


def entries(
    wanted: str | Iterable[str],
    assignments: Sequence[str] = (),
    *,
    control: bool = False,
    common: dict[str, Any] | None = None,
) -> tuple[Entry, ...]:
    """`kfac,slow=sgd` and `slow.lr=0.01` as entries; every option checked on a tiny model.

    `all` is every optimizer there is. `common` holds options of all (a learning rate), which an
    assignment overrides. `control` adds SGD with its per-layer step lengths to each that has some.
    """
    items = wanted.split(",") if isinstance(wanted, str) else _words(wanted, "wanted")
    assignments = _words(assignments, "assignments")
    if common is not None and not isinstance(common, Mapping):
        raise SettingsError(f"common must be a dict of options, got {doors.said(common)}")
    items = [item.strip() for item in items]
    items = [name for item in items for name in (optim.names() if item == "all" else [item])]
    pairs = [_named(item) for item in dict.fromkeys(items)]
    named = dict(pairs)
    if len(named) < len(pairs):
        raise SettingsError(f"two optimizers have one label in {', '.join(items)}")
    options: dict[str, dict[str, Any]] = {label: dict(common or {}) for label in named}
    for assignment in assignments:
        label, option, value = _assignment(assignment, named)
        options[label][option] = value
    found = [Entry(label, name, options[label]) for label, name in named.items()]
    if control:
        able = [entry for entry in found if "control" in known_options(entry)]
        if not able:
            raise SettingsError(
                "--control is SGD with the step lengths of a preconditioner; none of --optimizer "
                "has them"
            )
        found += [Entry(f"{e.label}_control", e.name, {**e.options, "control": True}) for e in able]
    for entry in found:
        check(entry)
    return tuple(found)


def known_options(entry: Entry) -> list[str]:
    """The options that an entry takes: those of the optimizer's constructors, and `OF_THE_RUN`."""
    preset = entry.options.get("preset", PRESETS[0])
    if preset not in PRESETS:
        raise SettingsError(f"{entry.label}.preset is {' or '.join(PRESETS)}, got {preset!r}")
    return [*(o for o in option_names(entry.name, preset) if o not in _OURS), *OF_THE_RUN]


def check(entry: Entry) -> None:
    """Refuse an option or a value that the method does not take, whatever the model."""
    for option in entry.options:
        check_known(f"{entry.name} option", option, known_options(entry))
    try:
        epochs = entry.epochs(1)
        make(entry, _tiny(), nn.CrossEntropyLoss(), steps_per_epoch=1, epochs=epochs)
    except (ValueError, TypeError) as error:
        raise SettingsError(f"{entry}: {error}") from None


def _words(value: object, what: str) -> list[str]:
    """A list of strings."""
    found = list(doors.listed(value, what, error=SettingsError))
    return [doors.name(item, f"each of {what}", error=SettingsError) for item in found]


def bounds(entry: Entry) -> dict[str, float]:
    """The bounds on the length of an entry's steps, by the name of the option."""
    if not isinstance(entry, Entry):
        raise SettingsError(f"entry must be an Entry, got {doors.said(entry)}")
    made = make(entry, _tiny(), nn.CrossEntropyLoss(), steps_per_epoch=1, epochs=1)
    clip = getattr(made, "clip", None)
    return {} if clip is None else clip.bounds


def make(
    entry: Entry, model: nn.Module, criterion: nn.Module, *, steps_per_epoch: int, epochs: int
) -> torch.optim.Optimizer:
    """The optimizer of an entry over a model; what depends on the run's length is filled in."""
    known, total = known_options(entry), steps_per_epoch * epochs
    lengths = {
        "coefficient_steps": steps_per_epoch,  # FNGD: one epoch
        "total_steps": total,  # ANG: to the gradient's direction at the end
        "switch_step": max(1, total // 2),  # truncated KFAC: the second half is SGD
    }
    options: dict[str, Any] = {k: v for k, v in lengths.items() if k in known}
    options |= {k: value(v, model) for k, v in entry.options.items() if k != "epochs"}
    if "criterion" in option_names(entry.name, entry.options.get("preset", PRESETS[0])):
        options["criterion"] = criterion
    return optim.create(entry.name, model, **options)


def lengths_in(settings: Settings) -> str:
    """Parts of a run that are planned for its number of epochs, in words; "" where nothing is."""
    found = [] if settings.schedule == "constant" else [f"schedule {settings.schedule}"]
    for entry in settings.entries:
        planned = [o for o in PLANNED if o in known_options(entry) and o not in entry.options]
        found += [f"{entry.label} ({option})" for option in planned]
    return ", ".join(found)


def value(text: Any, model: nn.Module) -> Any:
    """`0.1`, `true`, `none`, a word, or a damping rule `relative(0.1)` as an option's value."""
    if not isinstance(text, str):
        return text
    if text.lower() in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[text.lower()]
    call = re.fullmatch(rf"({'|'.join(RULES)})\((.*)\)", text)
    if call:
        return _rule(call[1], call[2], model)
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _rule(name: str, text: str, model: nn.Module) -> damping.Rule:
    """A rule with its arguments as typed: `trace(0.01, constant=0.1, fc_expansion=false)`."""
    rule = getattr(damping, name)
    if name == "trace":
        kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
        convolutions = {n for n, m in model.named_modules() if isinstance(m, kinds)}
        rule = partial(rule, convolutions=convolutions)
    known = [name for name in inspect.signature(rule).parameters if name != "convolutions"]
    given: dict[str, Any] = {}
    for place, argument in enumerate(filter(None, map(str.strip, text.split(",")))):
        option, _, word = argument.rpartition("=")
        option = option.strip() or (known[place] if place < len(known) else "")
        if option not in known or option in given:
            raise ValueError(f"{name} takes {', '.join(known)}, each once; got {name}({text})")
        got = value(word.strip(), model)
        if not isinstance(got, int | float) or not 0 <= got < math.inf:
            raise ValueError(f"{name} takes a finite number >= 0, got {word.strip()}")
        given[option] = got
    if not given:
        raise ValueError(f"{name} takes {', '.join(known)}; got none")
    return rule(**given)


def _tiny() -> nn.Module:
    with torch.random.fork_rng(devices=[]):  # its weights are nobody's
        return nn.Sequential(nn.Linear(2, 2))


def _named(item: str) -> tuple[str, str]:
    label, _, name = item.rpartition("=")
    check_known("optimizer", name, optim.names())
    return label or name, name


def _assignment(text: str, named: dict[str, str]) -> tuple[str, str, str]:
    match = re.fullmatch(r"([^=]+)\.(\w+)=(.+)", text)
    if not match:
        raise SettingsError(
            f"--set takes OPTIMIZER.OPTION=VALUE, such as kfac.lr=0.05; got {text!r}"
        )
    label, option, given = match.groups()
    check_known("optimizer in --set", label, named)
    return label, option, given
