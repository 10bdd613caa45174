"""Optimizers: options, loops that go on after bad batches, states that are damaged or foreign."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fisherlab as fl
from fisherlab.extract.isolation import streams_kept
from fisherlab.optim.base import CurvatureOptimizer
from hostile import junk, models
from hostile.judge import Case, bits, refusal

with torch.random.fork_rng():
    NAMES = [
        name
        for name in fl.optim.names()
        if isinstance(fl.optim.create(name, nn.Linear(2, 2)), CurvatureOptimizer)
    ]


def net(seed: int) -> nn.Sequential:
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    torch.set_rng_state(state)
    return model


def batch(draw: random.Random, n: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(draw.randrange(2**31))
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (n,), generator=generator)


def stepped(optimizer: Any, model: nn.Module, x: Tensor, y: Tensor) -> None:
    """One step of an ordinary loop."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(model(x), y)
        value.backward()
        return value

    optimizer.step(closure)


def parameters(model: nn.Module) -> list[object]:
    return [bits(p) for p in model.parameters()]


def frozen(value: object) -> object:
    """A state as something to compare."""
    if isinstance(value, Tensor):
        return bits(value)
    if isinstance(value, dict):
        return {key: frozen(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [frozen(part) for part in value]
    return repr(value) if isinstance(value, float) else value


def options(draw: random.Random) -> Case:
    """A junk option."""
    name, model = draw.choice(NAMES), net(draw.randrange(100))
    key = draw.choice(list(OPTIONS))
    bad = OPTIONS[key](draw)
    label = f"{name}({key}={str(bad)[:30]})"

    def call() -> object:
        optimizer = fl.optim.create(name, model, **{key: bad})
        stepped(optimizer, model, *batch(random.Random(0)))
        return optimizer

    return Case(label, call, lambda found: _harmless(key, bad))


def _harmless(key: str, bad: object) -> str:
    if bad is None and key in ("generator", "params", "criterion", "layers", "skip"):
        return ""
    return "junk accepted"


def _flag(draw: random.Random) -> object:
    return draw.choice(["yes", 1, 0.0, None, [], object()])


def _word(draw: random.Random) -> object:
    return draw.choice(["x", "", 3, [], object(), True, b"mc", ("mc",)])


def _number(draw: random.Random) -> object:
    while callable(bad := junk.number(draw)):
        pass
    return bad


OPTIONS: dict[str, Callable[[random.Random], object]] = {
    "lr": _number,
    "momentum": lambda draw: draw.choice([_number(draw), 1.0, 2]),
    "weight_decay": _number,
    "damping": _number,
    "kl_clip": lambda draw: draw.choice([0.0, -1.0, math.nan, "x", [], True, object()]),
    "max_norm": lambda draw: draw.choice([0.0, -1.0, math.nan, "x", [], True, object()]),
    "warmup": lambda draw: junk.count(draw, 0),
    "statistics_every": junk.count,
    "basis_every": junk.count,
    "decay": lambda draw: draw.choice([_number(draw), 1.5, 2]),
    "statistics_examples": lambda draw: draw.choice([0, -1, 1.5, "x", [], math.nan, object()]),
    "nesterov": _flag,
    "decoupled": _flag,
    "graft": _flag,
    "weight_decay_placement": _word,
    "nonfinite": _word,
    "fisher_type": _word,
    "layers": lambda draw: draw.choice(["nothing", 3, [3], object(), [], True]),
    "skip": lambda draw: draw.choice(["nothing", 3, [3], object(), True]),
    "criterion": lambda draw: draw.choice(["ce", 3, [], object(), nn.CrossEntropyLoss]),
    "generator": lambda draw: draw.choice([3, "x", object(), [], True]),
    "mc_samples": junk.count,
    "largest_factor": lambda draw: junk.count(draw, 0),
    "params": lambda draw: draw.choice([3, "x", [], [3], [{}], object(), torch.ones(3)]),
    "schedule": lambda draw: draw.choice([3, "x", {}, [], object()]),
    "clip": lambda draw: draw.choice([3, "x", {}, [], object()]),
    "no_such_option": lambda draw: 1,
}


def things(draw: random.Random) -> Case:
    """Junk in place of the method or the model."""
    model = net(0)
    if draw.random() < 0.5:
        bad = junk.anything(draw, nn.Module)
        if isinstance(bad, str) and bad == "kfac":
            bad = "kafc"
        return Case(f"create({bad!r}, model)", lambda: fl.optim.create(bad, model), model=model)
    bad, name = junk.anything(draw, nn.Module), draw.choice(NAMES)
    kind = draw.choice([fl.optim.create, None])
    if kind is None:
        return Case(
            f"NaturalGradient({str(bad)[:30]}, ...)",
            lambda: fl.optim.NaturalGradient(bad, fl.KFAC(), lr=0.1, damping=0.1),
            words=("model",),
        )
    return Case(f"create({name}, {str(bad)[:30]})", lambda: fl.optim.create(name, bad))


def loops(draw: random.Random) -> Case:
    """Bad batches between good ones: the good ones take the steps that they take alone."""
    name, seed = draw.choice(NAMES), draw.randrange(100)
    model, twin = net(seed), net(seed)
    events = [draw.choice(["good", "good", *EVENTS]) for _ in range(5)] + ["good"]
    batches = [batch(draw) for _ in events]
    label = f"{name}: {', '.join(events)}"
    complaints: list[str] = []

    def call() -> object:
        optimizer, alone = (fl.optim.create(name, m) for m in (model, twin))
        for event, (x, y) in zip(events, batches, strict=True):
            if event == "good":
                stepped(optimizer, model, x, y)
                stepped(alone, twin, x, y)
                continue
            before = parameters(model), frozen(optimizer.state_dict())
            try:
                EVENTS[event](optimizer, model, x, y)
            except (Exception, KeyboardInterrupt) as error:
                ours = isinstance(error, Exception) and event not in THEIRS
                if ours and not (told := refusal(error)).good:
                    complaints.append(f"{event}: {told.detail}")
                if (parameters(model), frozen(optimizer.state_dict())) != before:
                    complaints.append(f"{event}, refused as {error}, changed something")
            else:
                if event in REFUSED:
                    complaints.append(f"{event} was taken")
        return parameters(model) == parameters(twin)

    def check(same: object) -> str:
        if complaints:
            return complaints[0]
        return "" if same else "other steps than without the bad batches"

    return Case(label, call, check)


def _skipped(optimizer, model, x, y) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.zero_grad()


def _nan_batch(optimizer, model, x, y) -> None:
    stepped(optimizer, model, x * math.nan, y)


def _nan_skipped(optimizer, model, x, y) -> None:
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x * math.nan), y)
    loss.backward()
    optimizer.zero_grad()


def _evaluated(optimizer, model, x, y) -> None:
    model(x)
    with torch.no_grad():
        model(x)
    model.eval()
    F.cross_entropy(model(x), y)
    model.train()


def _interrupted(optimizer, model, x, y) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        raise KeyboardInterrupt

    optimizer.step(closure)


def _no_backward(optimizer, model, x, y) -> None:
    optimizer.zero_grad()
    model(x)
    optimizer.step()


def _compared(optimizer, model, x, y) -> None:
    if hasattr(optimizer, "blocks") and optimizer.blocks():
        fl.compare(model, nn.CrossEntropyLoss(), x, y, approximations=optimizer.blocks())


def _copied(optimizer, model, x, y) -> None:
    other = copy.deepcopy(model)
    other(x).sum().backward()
    copy.deepcopy(optimizer.state_dict())


def _bad_state(optimizer, model, x, y) -> None:
    optimizer.load_state_dict({})


def _own_state(optimizer, model, x, y) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def _audited(optimizer, model, x, y) -> None:
    if optimizer.steps:
        fl.audit(optimizer, model, nn.CrossEntropyLoss(), x, y, approximations=["diagonal"])


def _captured(optimizer, model, x, y) -> None:
    fl.capture(model, nn.MSELoss(), x, torch.ones(len(x), 3).double(), fisher_type="empirical")


def _another(optimizer, model, x, y) -> None:
    """A second optimizer of the same model, made, used without a step, and taken away."""
    other = fl.optim.create("kfac", model)
    F.cross_entropy(model(x), y).backward()
    other.zero_grad()
    other.remove()


def _deep_copies(optimizer, model, x, y) -> None:
    """A copy of the model is trained by an optimizer of its own."""
    other = copy.deepcopy(model)
    stepped(fl.optim.create("ekfac", other), other, x, y)


def _fails_forward(optimizer, model, x, y) -> None:
    stepped(optimizer, model, x[:, :2], y)


def _fails_in_loss(optimizer, model, x, y) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(x), y + 99).backward()


def _wrong_dtype(optimizer, model, x, y) -> None:
    stepped(optimizer, model, x.float(), y)


def _infinite(optimizer, model, x, y) -> None:
    stepped(optimizer, model, torch.full_like(x, 1e308) * 10, y)


def _junk_closure(optimizer, model, x, y) -> None:
    optimizer.step("a closure")


def _decomposition(optimizer, model, x, y) -> None:
    """Interrupted where a step decomposes; one that does not is taken back by its state."""
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with ExitStack() as stack:
        for name in ("eigh", "cholesky_ex", "inv_ex"):
            stack.enter_context(mock.patch.object(torch.linalg, name, interrupted))
        stepped(optimizer, model, x, y)
    model.load_state_dict(before[0])
    optimizer.load_state_dict(before[1])


def _transformed(optimizer, model, x, y) -> None:
    def loss(values: Any, one: Tensor, label: Tensor) -> Tensor:
        output = torch.func.functional_call(model, values, (one[None],))
        return F.cross_entropy(output, label[None])

    values = {name: p.detach() for name, p in model.named_parameters()}
    torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(values, x, y)
    torch.jit.trace(model, (x,), check_trace=False)


def _frozen(optimizer, model, x, y) -> None:
    model[0].bias.requires_grad_(False)
    try:
        _skipped(optimizer, model, x, y)
    finally:
        model[0].bias.requires_grad_(True)


def _half(optimizer, model, x, y) -> None:
    before = copy.deepcopy(model.state_dict())
    try:
        stepped(optimizer, model.bfloat16(), x.bfloat16(), y)
    finally:
        optimizer.zero_grad()
        model.double().load_state_dict(before)


def _weighed(optimizer, model, x, y) -> None:
    """Another optimizer weighs the gradients."""
    other: Any = fl.optim.create("tengrad", model)
    try:
        stepped(optimizer, model, x, y)
    finally:
        other.remove()


def _junk_group(optimizer, model, x, y) -> None:
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr": -1.0})


EVENTS: dict[str, Callable] = {
    "skipped": _skipped,
    "NaN batch": _nan_batch,
    "NaN skipped": _nan_skipped,
    "evaluated": _evaluated,
    "interrupted": _interrupted,
    "no backward": _no_backward,
    "compared": _compared,
    "copied": _copied,
    "bad state": _bad_state,
    "own state": _own_state,
    "audited": _audited,
    "captured": _captured,
    "another optimizer": _another,
    "a copy trained": _deep_copies,
    "fails in forward": _fails_forward,
    "fails in the loss": _fails_in_loss,
    "another dtype": _wrong_dtype,
    "infinite batch": _infinite,
    "a closure that is none": _junk_closure,
    "interrupted in a decomposition": _decomposition,
    "transformed": _transformed,
    "frozen": _frozen,
    "half precision": _half,
    "weighed by another": _weighed,
    "a junk group": _junk_group,
}
REFUSED = {"NaN batch", "no backward", "interrupted", "bad state", "infinite batch"}
# the fault of the loop's own code
THEIRS = {"fails in forward", "fails in the loss", "another dtype"}
REFUSED |= {"fails in forward", "fails in the loss", "another dtype", "a closure that is none"}
REFUSED |= {"half precision", "weighed by another", "a junk group"}


def states(draw: random.Random) -> Case:
    """A damaged or foreign state is refused whole."""
    name, seed = draw.choice(NAMES), draw.randrange(100)
    model = net(seed)
    optimizer = fl.optim.create(name, model)
    x, y = batch(draw)
    stepped(optimizer, model, x, y)
    state = copy.deepcopy(optimizer.state_dict())
    kind = draw.choice(["damaged", "damaged", "damaged", "foreign", "junk"])
    if kind == "junk":
        empty = {"state": {}, "param_groups": []}
        state = draw.choice([None, {}, [], "x", 3, {"state": {}}, empty])
        what = repr(state)
    elif kind == "foreign":
        other = draw.choice([n for n in NAMES if n != name])
        stranger = net(seed)
        foreign = fl.optim.create(other, stranger)
        stepped(foreign, stranger, x, y)
        state, what = foreign.state_dict(), f"of {other}"
        if foreign.method == optimizer.method:
            kind = "same"
    else:
        what = damage(draw, state)
    before = parameters(model), frozen(optimizer.state_dict())
    label = f"{name}.load_state_dict, {kind}: {what}"

    def after(error: BaseException | None) -> str:
        if error is None:
            return ""
        now = parameters(model), frozen(optimizer.state_dict())
        return "" if now == before else "the refused state was loaded in part"

    def check(found: object) -> str:
        return "" if kind == "same" or what == "fisherlab.form removed" else "junk accepted"

    return Case(label, lambda: optimizer.load_state_dict(state), check, after=after)


def damage(draw: random.Random, state: dict[str, Any]) -> str:
    """Remove or replace one leaf of a state; returns where and how."""
    path, holder = [], state
    while True:
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        if not path:
            keys = ["fisherlab", "state"] if holder.get("state") else ["fisherlab"]
        key = draw.choice(keys)
        path.append(key)
        value = holder[key]
        inner = isinstance(value, dict | list) and len(value) > 0
        if inner and (len(path) == 1 or draw.random() < 0.85):
            holder = value
            continue
        break
    how = draw.choice(["removed", "None", "object", "word", "shape", "complex"])
    if isinstance(value, Tensor) and how == "shape":
        holder[key] = torch.ones(*value.shape, 2, dtype=value.dtype)
    elif isinstance(value, Tensor) and how == "complex":
        holder[key] = value.to(torch.complex128)
    elif how == "removed" and isinstance(holder, dict):
        del holder[key]
    elif value is None:
        holder[key] = how = "word"
    else:
        holder[key] = {"None": None, "word": "junk"}.get(how, object())
    return f"{'.'.join(map(str, path))} {how}"


def together(draw: random.Random) -> Case:
    """Optimizers of several models, at once in threads, step as each does alone."""
    names = [draw.choice(NAMES) for _ in range(3)]
    # torch's random stream, from which weights are drawn, is one for all threads
    starts = [net(draw.randrange(100)) for _ in names]
    batches = [[batch(draw) for _ in range(3)] for _ in names]

    def run(k: int) -> list[object]:
        model = copy.deepcopy(starts[k])
        optimizer = fl.optim.create(names[k], model)
        for x, y in batches[k]:
            stepped(optimizer, model, x, y)
        return parameters(model)

    def call() -> object:
        alone = [run(k) for k in range(len(names))]
        with ThreadPoolExecutor(len(names)) as pool:
            return alone, list(pool.map(run, range(len(names))))

    def check(found: Any) -> str:
        alone, threads = found
        wrong = [n for n, one, two in zip(names, alone, threads, strict=True) if one != two]
        return f"other steps in threads: {wrong}" if wrong else ""

    return Case(f"threads: {', '.join(names)}", call, check)


class Experts(nn.Module):
    """A network beside which a second layer takes some rows of the batch, or none."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.main, self.expert, self.rows = net(1), net(2), rows

    def forward(self, x: Tensor) -> Tensor:
        found = self.main(x)
        return found + self.expert(x[: self.rows]).sum() if self.rows >= 0 else found


def experts(draw: random.Random) -> Case:
    """A layer that no example was sent to: the others step as without it."""
    name = draw.choice(NAMES)
    model, twin = Experts(0), Experts(-1)
    batches = [batch(draw) for _ in range(3)]

    def call() -> object:
        for one in (model, twin):
            optimizer = fl.optim.create(name, one)
            for x, y in batches:
                stepped(optimizer, one, x, y)
        return parameters(model.main) == parameters(twin.main)

    return Case(f"{name} with an expert of no rows", call, lambda same: "" if same else "others")


def networks(draw: random.Random) -> Case:
    """Three steps on a hostile network."""
    one = models.brought(draw, True)
    name = draw.choice(NAMES)
    y = torch.arange(len(one.x)) % 3

    def call() -> object:
        with streams_kept():  # the forward pass of training draws
            optimizer = fl.optim.create(name, one.model)
            for _ in range(2):
                stepped(optimizer, one.model, one.x, y)
        return one.model

    infinite = one.name in ("inf weight", "NaN weight")

    def check(model: object) -> str:
        finite = all(bool(torch.isfinite(p).all()) for p in model.parameters())
        return "" if finite or infinite else "parameters that are not finite"

    return Case(f"{name} on a network: {one.name}", call, check)


def beside(draw: random.Random) -> Case:
    """The criterion is called on another model's output as well: the step is as without."""
    name, seed = draw.choice(NAMES), draw.randrange(100)
    starts, share = [net(seed), net(seed)], draw.choice([0.3, 1.0])
    batches, teacher = [batch(draw) for _ in range(2)], net(seed + 1)
    squared, late = draw.random() < 0.5, draw.random() < 0.5

    def trained(model: nn.Module, taught: bool) -> list[object]:
        criterion: Any = nn.MSELoss() if squared else nn.CrossEntropyLoss()
        optimizer = fl.optim.create(name, model, criterion=criterion)
        for x, labels in batches:
            y = F.one_hot(labels, 3).double() if squared else labels

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                optimizer.zero_grad()
                output = model(x)
                other = share * criterion(teacher(x), y) if taught and not late else 0.0
                loss = criterion(output, y)
                other = share * criterion(teacher(x), y) if taught and late else other
                (loss + other).backward()
                return loss

            optimizer.step(closure)
        return parameters(model)

    def call() -> object:
        return trained(starts[0], True) == trained(starts[1], False)

    label = f"{name} beside a teacher"
    return Case(label, call, lambda same: "" if same else "other steps than alone")


def _good(optimizer, model, x, y) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()


def _group(key: str, bad: Callable[[random.Random], object]) -> Callable:
    def change(draw: random.Random, optimizer, model) -> None:
        draw.choice(optimizer.param_groups)[key] = bad(draw)

    return change


def _dropped(draw: random.Random, optimizer, model) -> None:
    del draw.choice(optimizer.param_groups)["lr"]


def _gradient(value: float) -> Callable:
    def change(draw: random.Random, optimizer, model) -> None:
        draw.choice(list(model.parameters())).grad.view(-1)[0] = value

    return change


def _reshaped(draw: random.Random, optimizer, model) -> None:
    model[0].weight.data = torch.ones(7, 4, dtype=torch.float64)


def _cast(draw: random.Random, optimizer, model) -> None:
    model.float()


# what a loop may do to groups, gradients and the model between backward and the next step
CHANGES: dict[str, Callable] = {
    "lr": _group("lr", _number),
    "momentum": _group("momentum", _number),
    "weight_decay": _group("weight_decay", _number),
    "nesterov": _group("nesterov", _flag),
    "damping": _group("damping", lambda draw: draw.choice([-1.0, math.nan, "x", None, [], 1j])),
    "no lr": _dropped,
    "a NaN gradient": _gradient(math.nan),
    "an infinite gradient": _gradient(math.inf),
    "a huge gradient": _gradient(1e200),
    "another shape": _reshaped,
    "another dtype": _cast,
}
PLAIN = ["soap", "muon"]


def changed(draw: random.Random) -> Case:
    """Groups, gradients or the model are changed: the step is refused, and changes nothing."""
    without = [name for name in NAMES if name != "kbfgs"]  # which runs the closure anew
    name, what, model = draw.choice([*without, *PLAIN]), draw.choice(list(CHANGES)), net(0)
    optimizer = fl.optim.create(name, model)
    batches = [batch(draw) for _ in range(3)]
    for x, y in batches[:-1]:
        _good(optimizer, model, x, y)
        optimizer.step()
    _good(optimizer, model, *batches[-1])
    given = [{**group} for group in optimizer.param_groups]
    CHANGES[what](draw, optimizer, model)
    now = [{**group} for group in optimizer.param_groups]
    unread = name == "muon" and what == "momentum"  # of AdamW's group
    unread |= what in ("momentum", "nesterov") and name == "soap"
    unread |= what == "damping" and any(group.get("damping") is None for group in given)
    unread |= what == "nesterov" and name == "muon"
    before = parameters(model), frozen(optimizer.state_dict())

    def after(error: BaseException | None) -> str:
        same = (parameters(model), frozen(optimizer.state_dict())) == before
        return "" if error is None or same else f"the refused step changed something ({error})"

    label = f"{name}, {what} changed: {[str(group.get(what))[:20] for group in now]}"
    check = (lambda found: "") if unread else None
    return Case(label, optimizer.step, check, after=after)


def copied(draw: random.Random) -> Case:
    """A copy or a pickle of an optimizer steps as the first does, or is refused."""
    name, model, (x, y) = draw.choice([*NAMES, *PLAIN]), net(0), batch(draw)
    optimizer = fl.optim.create(name, model)
    stepped(optimizer, model, x, y)

    def call() -> object:
        pair = copy.deepcopy((model, optimizer))
        for one, its in (pair, (model, optimizer)):
            stepped(its, one, x, y)
        return parameters(pair[0]) == parameters(model)

    return Case(f"{name} copied", call, lambda same: "" if same else "the copy steps elsewhere")


def not_finite(draw: random.Random) -> Case:
    """A state with NaN is refused whole."""
    name, model = draw.choice([*NAMES, *PLAIN]), net(0)
    optimizer = fl.optim.create(name, model)
    stepped(optimizer, model, *batch(draw))
    state = copy.deepcopy(optimizer.state_dict())
    tensors = [t for t in leaves(state) if t.is_floating_point() and t.numel()]
    if not tensors:
        return states(draw)
    draw.choice(tensors).fill_(draw.choice([math.nan, math.inf]))
    before = frozen(optimizer.state_dict())

    def after(error: BaseException | None) -> str:
        same = frozen(optimizer.state_dict()) == before
        return "" if error is None or same else "the refused state was loaded in part"

    return Case(f"{name}: a state with NaN", lambda: optimizer.load_state_dict(state), after=after)


def leaves(value: object) -> list[Tensor]:
    """The tensors of a nest."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [leaf for part in parts for leaf in leaves(part)]


def case(seed: int) -> Case:
    draw = random.Random(seed)
    kinds = [options, options, things, loops, loops, loops, states, states, networks, together]
    kinds += [changed, changed, changed, copied, not_finite]
    kinds += [experts, beside]
    return draw.choice(kinds)(draw)
