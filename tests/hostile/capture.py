"""`fl.capture` and `fl.compare`: networks, batches, criteria and options, right and wrong."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import numpy as np
import torch
from references import Reference
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fisherlab as fl
from fisherlab.extract import Captures
from hostile import junk, models
from hostile.blocks import near
from hostile.judge import Case


def as_module(criterion: object) -> nn.Module:
    return criterion if isinstance(criterion, nn.Module) else nn.CrossEntropyLoss()


def blocks_of(model: nn.Module, criterion: object, x: Tensor, y: Tensor, kind: str) -> dict:
    """The dense block of every plain linear layer and convolution, by name."""
    model, x = copy.deepcopy(model).double(), x.double()
    y = y.double() if y.is_floating_point() else y
    found = {}
    for name, module in model.named_modules():
        plain = type(module) in (nn.Linear, nn.Conv2d) and getattr(module, "groups", 1) == 1
        if not plain or not module.weight.requires_grad or hasattr(module, "parametrizations"):
            continue
        fresh = lambda x: model(x.clone())  # noqa: E731  (it may write into its input)
        reference = Reference(fresh, as_module(criterion), x, y, module.weight, module.bias)
        try:
            found[name or "linear"] = getattr(reference, kind)()
        except RuntimeError:  # a weight that the output does not depend on
            continue
    return found


def checked(model, criterion, x, y, kind: str, tolerance: float) -> Callable[[object], str]:
    """Why a capture differs from autograd, one example at a time."""

    def check(captures: object) -> str:
        assert isinstance(captures, Captures)
        if len(x) > 1 and "v" in captures:
            return "a row that every example shares has a block"
        for name, wanted in blocks_of(model, criterion, x, y, kind).items():
            if name in captures:
                wrong = near(fl.Exact()(captures[name]).dense(), wanted, tolerance)
                if wrong:
                    return f"{name}: {wrong}"
        return ""

    return check


def sound(draw: random.Random) -> Case:
    """Good arguments in odd clothes: the numbers have to be right."""
    one = models.brought(draw, False)
    criterion, y = models.labelled(draw, one)
    model, x = one.model, one.x
    kind = draw.choice(["exact", "empirical"])
    tolerance = 1e-8
    clothes = draw.choice(
        ["plain", "float32", "strided", "graph", "inference", "expanded", "default"]
    )
    if clothes == "float32":
        model, x, tolerance = model.float(), x.float(), 1e-3
        y = y.float() if y.is_floating_point() else y
    elif clothes == "strided":
        x = torch.stack([x, x], -1)[..., 0]
    elif clothes == "graph":
        x = x.clone().requires_grad_()
    elif clothes == "inference":
        with torch.inference_mode():
            x = x.clone()
    elif clothes == "expanded":
        x = x[:1].expand_as(x)
    clean = (
        x.detach().clone() if clothes != "inference" else torch.tensor(x.tolist(), dtype=x.dtype)
    )
    options = draw.choice([{}, {"check": "off"}, {"check": "gradient"}, {"skip": "nothing*"}])
    if "skip" in options:
        options = {"kinds": ("map",)}
    label = f"capture {one.name}, {type(criterion).__name__}, {kind}, {clothes}, {options}"

    def call() -> object:
        return fl.capture(model, criterion, x, y, fisher_type=kind, **options)

    def written(_: BaseException | None) -> str:
        return "" if torch.equal(x, clean.to(x)) else "the batch"

    check = checked(model, criterion, clean, y, kind, tolerance)
    return Case(label, call, check, (), model, written)


def compared(draw: random.Random) -> Case:
    """A comparison: the diagonal's error against the dense block."""
    one = models.brought(draw, False)
    criterion, y = models.labelled(draw, one)
    model, x = one.model, one.x
    kind = draw.choice(["exact", "empirical"])
    names = draw.sample(["diagonal", "kfac", "ekfac", "tkfac", "kronecker_optimal"], 2)

    def check(table: object) -> str:
        frame = table.frame  # type: ignore[attr-defined]
        for name, F in blocks_of(model, criterion, x, y, kind).items():
            rows = frame[(frame.layer == name) & (frame.approximation == "diagonal")]
            norm = F.norm().item()
            for found in rows.relative_error:
                wanted = (F - F.diagonal().diag()).norm().item() / norm if norm else 0.0
                if not abs(found - wanted) <= 1e-6:
                    return f"{name}: {found} for {wanted}"
        silent = frame[frame.relative_error.isna() & (frame.note == "")]
        return f"NaN without a note: {silent.layer.tolist()}" if len(silent) else ""

    def call() -> object:
        return fl.compare(
            model, criterion, x, y, fisher_type=kind, approximations=["diagonal", *names]
        )

    return Case(f"compare {one.name}, {type(criterion).__name__}, {kind}", call, check, (), model)


def networks(draw: random.Random) -> Case:
    """A hostile network."""
    one = models.brought(draw, True)
    call = draw.choice([fl.capture, fl.compare])
    y = torch.arange(len(one.x)) % 3
    criterion = draw.choice([nn.CrossEntropyLoss(), nn.MSELoss()])
    if isinstance(criterion, nn.MSELoss):
        y = torch.ones(len(one.x), 3, dtype=one.x.dtype if one.x.is_floating_point() else None)

    def check(found: object) -> str:
        if isinstance(found, Captures):
            finite = all(fl.Exact()(layer).trace().isfinite() for layer in found.values())
            return "" if finite else "a block that is not finite"
        frame = found.frame  # type: ignore[attr-defined]
        silent = frame[~np.isfinite(frame.relative_error) & (frame.note == "")]
        return f"NaN without a note: {silent.layer.tolist()}" if len(silent) else ""

    model = one.model if isinstance(one.model, nn.Module) else None
    return Case(
        f"{call.__name__} of a network: {one.name}, {type(criterion).__name__}",
        lambda: call(one.model, criterion, one.x, y),
        check,
        (),
        model,
    )


def criteria(draw: random.Random) -> Case:
    """A hostile criterion."""
    one = models.brought(draw, False)
    while not one.classes:
        one = models.brought(draw, False)
    name = draw.choice(list(models.CRITERIA))
    criterion = models.CRITERIA[name]()
    call = draw.choice([fl.capture, fl.compare])
    y = torch.arange(len(one.x)) % 3
    allowed = name in ("ignores all", "cosine", "odd smoothing", "NLL on logits", "a network")

    def check(found: object) -> str:
        return "" if allowed else f"returned {str(found)[:60]}"

    return Case(
        f"{call.__name__} with a criterion: {name}",
        lambda: call(one.model, criterion, one.x, y),
        check,
        (),
        one.model,
    )


def batches(draw: random.Random) -> Case:
    """Hostile inputs or labels."""
    one = models.brought(draw, False)
    while not one.classes or one.name == "by hand":
        one = models.brought(draw, False)
    call = draw.choice([fl.capture, fl.compare])
    x, y = one.x, torch.arange(len(one.x)) % 3
    criterion: nn.Module = nn.CrossEntropyLoss()
    if draw.random() < 0.4:
        criterion, y = nn.MSELoss(), torch.randn(len(x), 3, dtype=torch.float64)
    nan, inf = torch.full_like(x, math.nan), torch.full_like(x, math.inf)
    if draw.random() < 0.5:
        bad = draw.choice([junk.tensor(draw, x), nan, inf, x * 1e300])
        what, given = "x", (bad, y)
    else:
        numbers = y.is_floating_point()
        bad = draw.choice(
            [
                junk.tensor(draw, y),
                y + 7 if not numbers else y * math.nan,
                -y - 5 if not numbers else y * math.inf,
                y.double() + 0.5 if not numbers else y[:, :2],
                torch.cat([y, y]),
                y[:0],
                torch.full_like(y, -100) if not numbers else y.to(torch.complex128),
            ]
        )
        what, given = "y", (x, bad)
    label = f"{call.__name__} {one.name}, {type(criterion).__name__}: {what} = {_short(bad)}"

    def check(found: object) -> str:
        """Junk that torch's own loss takes as it is has a right answer."""
        if not (isinstance(bad, Tensor) and type(bad) is Tensor):
            return "junk accepted"
        if isinstance(found, Captures):
            for layer in found.values():
                huge = isinstance(bad, Tensor) and bad.dtype == x.dtype and bad.abs().max() > 1e150
                if not fl.Exact()(layer).trace().isfinite() and not huge:
                    return "a block that is not finite"
            if huge:
                return ""
            return checked(one.model, criterion, *given, "empirical", 1e-6)(
                fl.capture(one.model, criterion, *given, fisher_type="empirical")
            )
        frame = found.frame  # type: ignore[attr-defined]
        silent = frame[~np.isfinite(frame.relative_error) & (frame.note == "")]
        return f"NaN without a note: {silent.layer.tolist()}" if len(silent) else ""

    return Case(label, lambda: call(one.model, criterion, *given), check, (), one.model)


def _short(value: object) -> str:
    if isinstance(value, Tensor) and not value.is_nested and not nn.parameter.is_lazy(value):
        return f"{value.dtype} {tuple(value.shape)} {value.layout}"
    return str(value)[:40]


class Odd:
    """An object with nothing on it."""


def options(draw: random.Random) -> Case:
    """A hostile option."""
    one = models.brought(draw, False)
    criterion, y = nn.CrossEntropyLoss(), torch.arange(len(one.x)) % (3 if one.classes else 1)
    call = draw.choice([fl.capture, fl.compare])
    words: list[object] = [
        "x",
        "",
        3,
        None,
        [],
        {},
        Odd(),
        True,
        1.5,
        b"exact",
        ("a",),
        torch.ones(2),
    ]
    table: dict[str, list[object]] = {
        "fisher_type": [w for w in words if w is not None],
        "backend": words,
        "mc_samples": [0, -1, 1.5, "2", None, [], True, math.nan, Odd(), torch.ones(2)],
        "generator": [w for w in words if w is not None],
        "layers": ["nothing", [3], 3, [], [None], Odd(), True, 1.5, b"0", {"a": 1}],
        "skip": ["nothing", [3], 3, [None], Odd(), True, "*"],
        "forward": [3, "x", lambda m: m, lambda m, x: None, lambda m, x: 3, Odd(), [], True],
        "mask": [3, Odd(), True, "x", [1], torch.ones(3), torch.ones(9, 9), 1.5, {}],
        "loss_scale": ["x", 3, True, Odd(), [], 1.5],
    }
    if call is fl.capture:
        table |= {
            "kinds": ["x", 3, ["x"], [3], Odd(), True, None],
            "check": words,
            "examples": [3, "x", torch.ones(2), torch.arange(99), [0, 1], Odd(), True],
            "ranks": ["x", 3, Odd()],
        }
    else:
        table |= {
            "approximations": [
                "x",
                [],
                3,
                [3],
                {"a": 3},
                {3: "kfac"},
                Odd(),
                [Odd()],
                {},
                True,
                [""],
            ],
            "dampings": [
                [],
                -1,
                "x",
                {0.1: 1},
                np.array(["a"]),
                b"1",
                [0.0],
                [math.nan],
                None,
                ["a"],
                Odd(),
                True,
                [True],
                1j,
            ],
            "reference": ["x", 3, one.x, Odd(), [], {}, True, [(one.x, None)], (one.x,)],
            "memory": [0, -1, "x", 1.5, math.nan, [], True, Odd()],
            "step": ["x", 1.5, Odd(), [], math.nan],
            "progress": [3, "x", Odd(), [], lambda: 3, lambda names: None],
            "alone": ["x", 3, None, [], Odd()],
        }
    key = draw.choice(list(table))
    bad = draw.choice(table[key])
    label = f"{call.__name__}({key}={str(bad)[:40]})"
    harmless = {("mask", True), ("progress", 3)} - {("mask", True), ("progress", 3)}

    def check(found: object) -> str:
        ok = (key, bad) in harmless if isinstance(bad, str | int | float) else False
        return "" if ok else "junk accepted"

    none = bad is None
    return Case(
        label,
        lambda: call(one.model, criterion, one.x, y, **{key: bad}),
        check if not none else (lambda found: "junk accepted" if key in ("kinds",) else ""),
        (),
        one.model,
    )


WORLDS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "no_grad": torch.no_grad,
    "a default device": lambda: torch.device("meta"),
    "a default dtype": lambda: default_dtype(torch.float16),
    "anomaly detection": lambda: torch.autograd.set_detect_anomaly(True),
    "tensors saved elsewhere": torch.autograd.graph.save_on_cpu,
}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def worlds(draw: random.Random) -> Case:
    """A call inside a setting of torch, with a loader that draws, numbers of NumPy's, functions."""
    one = models.brought(draw, False)
    criterion, y = models.labelled(draw, one)
    kind, name = draw.choice(["exact", "empirical"]), draw.choice(list(WORLDS))
    if draw.random() < 0.5:

        def call() -> object:
            with WORLDS[name]():
                return fl.capture(one.model, criterion, one.x, y, fisher_type=kind)

        check = checked(one.model, criterion, one.x, y, kind, 1e-8)
        return Case(f"capture {one.name} under {name}", call, check, (), one.model)
    given = draw.choice([np.array([0.1]), np.float32(0.1), torch.tensor(0.1), (d for d in [0.1])])
    whole: object = DataLoader(TensorDataset(one.x, y), 2, shuffle=True)
    if name == "a default device":  # torch's own loader draws its seed there
        whole = list(zip(one.x.split(2), y.split(2), strict=True))
    methods = {"given": lambda layer: fl.KFAC()(layer), "junk": lambda layer: layer.raw_inputs}

    def call() -> object:
        with WORLDS[name]():
            return fl.compare(one.model, criterion, one.x, y, approximations=methods), fl.compare(
                one.model, criterion, whole, approximations=["kfac"], dampings=given
            )

    def right(found: object) -> str:
        first, second = (table.frame for table in found)  # type: ignore[attr-defined]
        named = first[first.approximation == "junk"].note.str.contains("no block")
        ours = first[first.approximation == "given"].groupby("layer").relative_error.first()
        loaded = second.groupby("layer").relative_error.first()
        away = (ours - loaded).abs().max()
        return "" if named.all() and not away > 1e-8 else f"junk: {named.all()}, off by {away}"

    return Case(f"compare {one.name} under {name}", call, right, (), one.model)


def case(seed: int) -> Case:
    draw = random.Random(seed)
    return draw.choice([sound, sound, compared, networks, criteria, batches, options, worlds])(draw)
