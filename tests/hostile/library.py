"""Methods, schedules, registries and tables: each argument replaced by junk, one at a time."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fisherlab as fl
from fisherlab.experiments import training
from hostile import junk
from hostile.judge import Case
from hostile.optimizers import batch, net, stepped

CRITERION = nn.CrossEntropyLoss()
Draw = random.Random
Junk = Callable[[Draw], object]


def other(*right: object, of: Junk = junk.anything) -> Junk:
    """Anything that is nothing of what is right."""

    def found(draw: Draw) -> object:
        while True:
            bad = of(draw)
            if not any(bad is one or (type(bad) is type(one) and bad == one) for one in right):
                return bad

    return found


def but(*kinds: type) -> Junk:
    return lambda draw: junk.anything(draw, *kinds)


positive: Junk = lambda draw: junk.number(draw, zero=True)  # noqa: E731
number: Junk = lambda draw: junk.number(draw)  # noqa: E731
count: Junk = junk.count
flag: Junk = but(bool)


def optional(bad: Junk) -> Junk:
    """Junk that is not None, which stands for a default."""

    def found(draw: Draw) -> object:
        while (value := bad(draw)) is None:
            pass
        return value

    return found


def layer() -> Any:
    x, y = batch(random.Random(0))
    return fl.capture(net(0), CRITERION, x, y)["0"]


@functools.cache
def table() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = net(0), torch.randn(8, 4).double()
        y = torch.arange(8) % 3
        reference = (torch.randn(9, 4).double(), torch.arange(9) % 3)
        names = ["kfac", "ekfac", "diagonal"]
        return fl.compare(model, CRITERION, x, y, approximations=names, reference=reference)


# What is called, with its good arguments, and the junk for each.
Call = tuple[Callable[..., object], dict[str, Callable[[], object]], dict[str, Junk]]


def applied(kind: str, **bad: Junk) -> Call:
    """A method with one option, applied to a layer."""
    maker = fl.approximations.get(kind)
    return (lambda **given: maker(**given)(layer())), {}, bad


def optimizer(kind: str, **bad: Junk) -> Call:
    def call(**given: object) -> object:
        model = net(0)
        made = fl.optim.create(kind, model, **given)
        stepped(made, model, *batch(random.Random(0)))
        return made

    return call, {}, bad


def scheduled(**bad: Junk) -> Call:
    def call(**given: Any) -> object:
        schedule = fl.optim.Schedule(**given)
        return fl.optim.NaturalGradient(net(0), fl.KFAC(), lr=0.1, damping=0.1, schedule=schedule)

    return call, {}, bad


def clipped(**bad: Junk) -> Call:
    def call(**given: Any) -> object:
        clip = fl.optim.Clip(**given)
        return fl.optim.NaturalGradient(net(0), fl.KFAC(), lr=0.1, damping=0.1, clip=clip)

    return call, {}, bad


def preconditioned(**bad: Junk) -> Call:
    def call(model: Any = None, approximation: Any = None, **given: Any) -> object:
        model, given = net(0) if model is None else model, {"damping": 0.1} | given
        approximation = fl.KFAC() if approximation is None else approximation
        made = fl.optim.Preconditioner(model, approximation, **given)
        x, y = batch(random.Random(0))
        CRITERION(model(x), y).backward()
        made.step()
        return made

    return call, {}, bad


CALLS: dict[str, Call] = {
    "kfac": applied(
        "kfac",
        weight_sharing=other("kfac"),
        placement=other(),
        pi=optional(positive),
        A=but(),
    ),
    "tkfac": applied("tkfac", weight_sharing=other(), placement=other(), pi=optional(positive)),
    "ifang": applied("ifang", rows=count),
    "kbfgs": applied("kbfgs", damping=number),
    "kl_optimal": applied(
        "kl_optimal",
        ridge=optional(number),
        tolerance=optional(positive),
        iterations=count,
    ),
    "kronecker_optimal": applied(
        "kronecker_optimal", tolerance=optional(positive), iterations=count
    ),
    "kronecker_sum": applied(
        "kronecker_sum", rank=count, tolerance=optional(positive), iterations=count
    ),
    "mini_block": applied("mini_block", shared=flag),
    "shampoo": applied("shampoo", form=other(), statistics=other()),
    "ekfac": applied("ekfac", factors=other()),
    "soap's block": applied("soap", factors=other()),
    "a layer": (
        lambda layer: fl.KFAC()(layer),
        {"layer": layer},
        {"layer": but()},
    ),
    "Exact of": (lambda layer: fl.Exact()(layer), {"layer": layer}, {"layer": but()}),
    "soap": optimizer(
        "soap",
        lr=number,
        betas=but(),
        eps=number,
        weight_decay=number,
        basis_every=count,
        largest_factor=lambda draw: junk.count(draw, 0),
    ),
    "muon": optimizer(
        "muon",
        lr=number,
        weight_decay=number,
        momentum=number,
        nesterov=flag,
        ns_coefficients=but(),
        ns_steps=count,
        rest=but(dict, type(None)),
    ),
    "Schedule": scheduled(
        statistics=count,
        basis=count,
        corrections=optional(count),
        warmup=lambda draw: junk.count(draw, 0),
        decay=lambda draw: draw.choice([junk.number(draw), 1.5]),
        examples=optional(count),
        until=optional(lambda draw: junk.count(draw, 0)),
        ema=other(),
    ),
    "Clip": clipped(
        kl=optional(lambda draw: draw.choice([0, -1.0, float("nan"), "x", [], True, 1j])),
        norm=optional(lambda draw: draw.choice([0, -1.0, float("nan"), "x", [], True, 1j])),
        warmup=lambda draw: junk.count(draw, 0),
    ),
    "Preconditioner": preconditioned(
        model=lambda draw: optional(but(nn.Module))(draw),
        approximation=lambda draw: draw.choice(["kfca", 3, object(), 1.5, int, torch.ones(2)]),
        damping=positive,
        schedule=but(),
    ),
    "approximations.get": (
        lambda name: fl.approximations.get(name),
        {"name": lambda: "kfac"},
        {"name": other("kfac")},
    ),
    "Running": (
        lambda **given: fl.approximations.Running(**{"approximation": fl.KFAC()} | given),
        {},
        {
            "approximation": but(),
            "decay": lambda draw: draw.choice([junk.number(draw), 1.5]),
            "largest_factor": lambda draw: junk.count(draw, 0),
            "ema": other(),
        },
    ),
    "claims.get": (fl.claims.get, {"name": lambda: "kfac_keeps_the_trace"}, {"name": but()}),
    "claims.verify": (
        lambda **given: fl.claims.verify(
            **{"names": "kfac_keeps_the_trace", "trials": 2, "seed": 0} | given
        ),
        {},
        {
            # a word may be a paper's, such as kfac
            "names": optional(but(type(None), tuple, list, dict, str)),
            "seed": lambda draw: junk.anything(draw, int, float),
            "trials": optional(count),
            "on": optional(but()),
        },
    ),
    "claims.load": (fl.claims.load, {}, {"path": but()}),
    "datasets.load": (fl.datasets.load, {}, {"name": but()}),
    "datasets.card": (fl.datasets.card, {}, {"name": but()}),
    "datasets.fetch": (fl.datasets.fetch, {}, {"name": but()}),
    "models.create": (
        lambda **given: fl.models.create(**{"name": "mlp", "input_size": (4,)} | given),
        {},
        {
            "name": but(),
            "num_classes": count,
            "in_channels": count,
            "input_size": other([1, 2], of=but(type(None), int)),
            "width": positive,
            "batch_norm": optional(flag),
            "activation": other(),
            "generator": optional(but()),
        },
    ),
    "support": (
        lambda **given: fl.support(**{"model": net(0), "x": batch(random.Random(0))[0]} | given),
        {},
        {"model": but(nn.Module), "x": lambda draw: draw.choice(["x", 3, {}, object(), 1.5])},
    ),
    "register_product": (fl.register_product, {}, {"function": lambda draw: _uncalled(draw)}),
    "register_criterion": (
        lambda **given: fl.register_criterion(**{"kind": nn.L1Loss} | given),
        {},
        {
            "kind": lambda draw: _uncalled(draw),
            "terms": lambda draw: optional(_uncalled)(draw),
            "root": lambda draw: optional(_uncalled)(draw),
            "sample": lambda draw: optional(_uncalled)(draw),
        },
    ),
    "table.order": (
        lambda **given: table().order(**{"first": "kfac", "second": "diagonal"} | given),
        {},
        {"first": other("kfac"), "second": other("kfac")},
    ),
    "table.plot": (lambda **given: table().plot(**given), {}, {"kind": but()}),
    "Comparison.load": (fl.Comparison.load, {}, {"folder": but(str)}),
    "Comparison.concat": (fl.Comparison.concat, {}, {"tables": but()}),
    "Comparison": (fl.Comparison, {}, {"frame": but()}),
    "table.save": (
        lambda folder: table().save(folder),
        {},
        {"folder": lambda draw: junk.anything(draw, str)},
    ),
    "reconstruct": (
        lambda **given: fl.optim.reconstruct(**{"model": net(0)} | given),
        {},
        {
            "model": but(nn.Module),
            "optimizer": optional(but()),
            "method": other(),
            "every": count,
            "decay": lambda draw: draw.choice([junk.number(draw), 1.5]),
            "eps": positive,
            "rank": count,
        },
    ),
    **{
        f"{name} of a capture": (
            lambda layer, name=name: getattr(fl.statistics, name)().total(layer),
            {},
            {"layer": but()},
        )
        for name in ("InputMoment", "OutputMoment", "Squares", "Energy")
    },
    "Memo": (
        lambda **given: fl.approximations.Memo(**{"layers": [layer()]} | given).block(fl.KFAC()),
        {},
        {"layers": but(), "memory": optional(count)},
    ),
    "damped": (
        lambda **given: fl.KFAC().damped(**{"block": fl.KFAC()(layer()), "damping": 0.1} | given),
        {},
        {"block": but(), "damping": number},
    ),
    "plots.error": (fl.plots.error, {}, {"table": but()}),
    "plots.eigenvalues": (fl.plots.eigenvalues, {}, {"spectra": but()}),
    "plots.gram_similarity": (fl.plots.gram_similarity, {}, {"study": but()}),
    "Settings": (
        lambda **given: training.Settings(**given),
        {},
        {"epochs": count, "width": positive, "seeds": other([1, 2]), "schedule": other("constant")},
    ),
    "hessian_blocks": (
        lambda **given: _hessian(given),
        {},
        {
            "model": but(nn.Module),
            "criterion": lambda draw: draw.choice(["ce", 3, [], object(), nn.CrossEntropyLoss]),
            "x": lambda draw: draw.choice(["x", 3, {}, object(), 1.5]),
            "layers": lambda draw: draw.choice(["nothing", 3, [3], object(), [], True]),
        },
    ),
}


def _uncalled(draw: Draw) -> object:
    while callable(bad := junk.anything(draw)):
        pass
    return bad


def _hessian(given: dict[str, Any]) -> object:
    x, y = batch(random.Random(0))
    good = {"model": net(0), "criterion": CRITERION, "x": x, "y": y}
    return fl.extract.hessian_blocks(**good | given)


def replaced(draw: Draw) -> Case:
    """A call with one junk argument."""
    name = draw.choice(list(CALLS))
    call, good, bads = CALLS[name]
    key = draw.choice(list(bads))
    bad = bads[key](draw)
    given = {k: make() for k, make in good.items()} | {key: bad}
    label = f"{name}({key}={_short(bad)})"
    return Case(label, lambda: call(**given), None)


def _short(value: object) -> str:
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else str(value)[:30]


def names(draw: Draw) -> Case:
    """Names of paths and things as people type them."""
    text = draw.choice(["", " ", "KFAC", "kfac ", "\n", "a" * 5000, "<b>", "../..", "\0", "ü"])
    calls: dict[str, Callable[[], object]] = {
        "approximations.get": lambda: fl.approximations.get(text),
        "claims.get": lambda: fl.claims.get(text),
        "claims.verify": lambda: fl.claims.verify(text.replace("KFAC", "KFAK")),
        "claims.load": lambda: fl.claims.load(text),
        "datasets.load": lambda: fl.datasets.load(text),
        "datasets.load(folder:)": lambda: fl.datasets.load(f"folder:{text}"),
        "datasets.load(module:)": lambda: fl.datasets.load(f"module:{text}"),
        "models.create": lambda: fl.models.create(text),
        "models.create(module:)": lambda: fl.models.create(f"module:{text}"),
        "optim.create": lambda: fl.optim.create(text, net(0)),
        "Comparison.load": lambda: fl.Comparison.load(Path("/nowhere") / text),
        "compare": lambda: fl.compare(net(0), CRITERION, *batch(draw), approximations=[text]),
        "reproduce": lambda: _reproduced(text),
        "table.order": lambda: table().order("kfac", text),
        "table.plot": lambda: table().plot(text),
    }
    name = draw.choice(list(calls))
    return Case(f"{name}({text[:10]!r})", calls[name], None)


def _reproduced(text: str) -> object:
    from fisherlab.experiments.reproduce import reproduce

    return reproduce(text, out="/nowhere")


def case(seed: int) -> Case:
    draw = random.Random(seed)
    table()
    return draw.choice([replaced, replaced, replaced, names])(draw)
