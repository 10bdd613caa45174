"""Raw units, tiny and huge numbers in float32, and decompositions that fail at random."""

from __future__ import annotations

import copy
import math
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

import fisherlab as fl
from hostile.judge import Case
from hostile.optimizers import NAMES, batch, net, parameters, stepped

METHODS = fl.approximations.names()
COLUMNS = ["relative_error", "trace_ratio", "cosine", "scaled_error", "diagonal_share"]
COLUMNS += ["diagonalisation", "subspace_overlap", "direction_cosine", "direction_error"]
COLUMNS += ["quadratic_decrease", "quadratic_decrease_scaled", "stein_loss"]


def scaled(draw: random.Random) -> Case:
    """A comparison in float32 against the same in float64."""
    state = torch.get_rng_state()
    torch.manual_seed(draw.randrange(2**31))
    kind = draw.choice(["regression", "classes", "one class", "confident", "rank one", "dead"])
    model: nn.Module = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    x, y = torch.randn(12, 4), torch.arange(12) % 2
    torch.set_rng_state(state)
    unit, target = 10.0 ** draw.randint(-30, 30), 10.0 ** draw.randint(-30, 30)
    criterion: nn.Module = nn.CrossEntropyLoss()
    if kind == "regression":
        criterion, y = nn.MSELoss(), torch.stack([x[:, 0], x[:, 1]], 1) * target
        model = nn.Linear(4, 2)
        model.load_state_dict({"weight": torch.ones(2, 4), "bias": torch.ones(2)})
        x = x * unit
    elif kind == "one class":
        y = torch.zeros_like(y)
    elif kind == "confident":
        model[2].weight.data *= 30
    elif kind == "rank one":
        x = x[:1].expand(12, 4) * min(unit, 1.0)
    elif kind == "dead":
        model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        model[0].bias.data.fill_(-1e4)
    else:
        x = x * min(unit, 1.0)
    method = draw.choice(METHODS)
    tables: list[Any] = []

    def call() -> object:
        for dtype in (torch.float32, torch.float64):
            ours = copy.deepcopy(model).to(dtype)
            labels = y.to(dtype) if y.is_floating_point() else y
            table = fl.compare(
                ours,
                criterion,
                x.to(dtype),
                labels,
                approximations=[method],
                fisher_type="empirical",
            )
            tables.append(table.frame)
        return tables

    label = f"{method} on {kind}, x of {unit:g}, y of {target:g}"
    return Case(label, call, lambda found: differing(*tables))


def differing(one: Any, two: Any) -> str:
    """The first number of float32 that is not that of float64, and has no note."""
    for (_, row), (_, wanted) in zip(one.iterrows(), two.iterrows(), strict=True):
        for column in COLUMNS:
            a, b = row[column], wanted[column]
            if not np.isfinite(a) and not row["note"]:
                return f"{row['layer']}: {column} is {a} without a note"
            if np.isfinite(a) and np.isfinite(b) and abs(a - b) > 2e-2 * (1 + abs(b)):
                if not row["note"]:
                    return f"{row['layer']}: {column} is {a} for {b}"
    return ""


def inputs(draw: random.Random, n: int) -> Tensor:
    """Inputs whose moments have equal eigenvalues, few directions, or nothing of the kind."""
    x = torch.randn(max(n, 4), 4, dtype=torch.float64)
    kinds = {
        "one-hot": torch.eye(4).double()[torch.arange(n) % 4],
        "duplicates": x[torch.arange(n) % max(1, n // 3)],
        "whitened": math.sqrt(n) * torch.linalg.qr(x).Q[:n],
        "signs": x[:n].sign(),
        "plain": x[:n],
    }
    return kinds[draw.choice(list(kinds))]


def network(draw: random.Random, outputs: int) -> tuple[nn.Module, tuple[int, ...]]:
    """A small network, and how it takes four numbers as input."""
    last = nn.Linear(3, outputs)
    return draw.choice(
        [
            (nn.Linear(4, outputs, bias=False), (4,)),
            (nn.Sequential(nn.Linear(4, 3), nn.Tanh(), last), (4,)),
            (nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.GELU(), last), (4,)),
            (nn.Sequential(nn.Linear(2, 3), nn.Tanh(), last, nn.Flatten()), (2, 2)),
            (nn.Sequential(nn.Conv1d(1, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(9, 2)), (1, 4)),
            (
                nn.Sequential(
                    nn.Conv1d(2, 4, 2, groups=2, padding=1),
                    nn.Tanh(),
                    nn.Flatten(),
                    nn.Linear(12, 2),
                ),
                (2, 2),
            ),
        ]
    )


def structured(draw: random.Random) -> Case:
    """Structure in inputs, network and loss: a comparison in float32 against one in float64."""
    state = torch.get_rng_state()
    torch.manual_seed(draw.randrange(2**31))
    n = draw.choice([1, 2, 3, 6, 12, 24])
    model, shape = network(draw, draw.choice([1, 2, 3, 4]))
    x = inputs(draw, n).reshape(n, *shape)
    model = model.double()
    with torch.no_grad():
        out = model(x)
    criterion, y = draw.choice(
        [
            (nn.MSELoss(), torch.randn_like(out)),
            (nn.BCEWithLogitsLoss(), (torch.rand_like(out) > 0.5).double()),
            (nn.CrossEntropyLoss(), out.argmax(1).flip(0)),
        ]
    )
    torch.set_rng_state(state)
    method, fisher_type = draw.choice(METHODS), draw.choice(["empirical", "exact"])
    options = {
        "approximations": [method],
        "fisher_type": fisher_type,
        "dampings": draw.choice([(1e-3, 1e-1), (1e-6,), (1.0,)]),
    }

    def call() -> object:
        return [
            fl.compare(
                copy.deepcopy(model).to(dtype),
                criterion,
                x.to(dtype),
                y.to(dtype) if y.is_floating_point() else y,
                **options,
            ).frame
            for dtype in (torch.float32, torch.float64)
        ]

    label = f"{method} of {n} {tuple(out.shape[1:])} outputs, {fisher_type}, {criterion}"
    return Case(label, call, lambda found: differing(*found))


FUNCTIONS = ("eigh", "eigvalsh", "svd", "svdvals", "qr", "inv", "cholesky_ex")


@contextmanager
def failing(draw: random.Random, share: float) -> Iterator[list[str]]:
    """LAPACK does not converge, at random."""
    failed: list[str] = []

    def fails(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if draw.random() < share:
                failed.append(name)
                if name == "cholesky_ex":  # which says so by a number
                    factor, info = real(*args, **options)
                    return factor * math.nan, info + 1
                raise torch.linalg.LinAlgError(f"{name} did not converge")
            return real(*args, **options)

        return call

    patches = [
        mock.patch.object(torch.linalg, name, fails(name, getattr(torch.linalg, name)))
        for name in FUNCTIONS
    ]
    for patch in patches:
        patch.start()
    try:
        yield failed
    finally:
        for patch in patches:
            patch.stop()


def measured(draw: random.Random) -> Case:
    """A comparison under failures: the numbers as without, or a note, or a named error."""
    model, (x, y), seed = net(draw.randrange(99)), batch(draw), draw.randrange(2**31)
    method, share = draw.choice(METHODS), draw.choice([0.1, 0.5, 1.0])

    def table() -> Any:
        return fl.compare(model, nn.CrossEntropyLoss(), x, y, approximations=[method]).frame

    def call() -> object:
        good = table()
        with failing(random.Random(seed), share):
            return good, table()

    def check(found: Any) -> str:
        good, other = found
        for (_, wanted), (_, row) in zip(good.iterrows(), other.iterrows(), strict=True):
            for column in COLUMNS:
                if np.isnan(row[column]) and not row["note"]:
                    return f"{column} is NaN without a note"
                if not np.isnan(row[column]) and abs(row[column] - wanted[column]) > 1e-5 * (
                    1 + abs(wanted[column])
                ):
                    return f"{column} is {row[column]} for {wanted[column]}"
        return ""

    return Case(f"{method} where {share:.0%} of LAPACK fails", call, check, (), model)


def trained(draw: random.Random) -> Case:
    """Steps under failures: as without them, or refused without a change."""
    name, seed, share = draw.choice(NAMES), draw.randrange(2**31), draw.choice([0.1, 0.5, 1.0])
    model, twin = net(seed % 99), net(seed % 99)
    batches = [batch(draw) for _ in range(3)]
    complaints: list[str] = []

    def call() -> object:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer, alone = (fl.optim.create(name, m) for m in (model, twin))
            chance = random.Random(seed)
            for x, y in batches:
                before = parameters(model)
                try:
                    with failing(chance, share):
                        stepped(optimizer, model, x, y)
                except ValueError as error:
                    if parameters(model) != before:
                        complaints.append(f"a refused step moved the weights ({error})")
                    return None
                stepped(alone, twin, x, y)
        return model, twin

    def check(found: Any) -> str:
        if complaints or found is None:
            return "".join(complaints[:1])
        pairs = zip(model.parameters(), twin.parameters(), strict=True)
        away = max(float((p - q).detach().abs().max()) for p, q in pairs)
        return "" if away < 1e-6 else f"weights differ by {away:.1e}"

    return Case(f"{name} where {share:.0%} of LAPACK fails", call, check)


def case(seed: int) -> Case:
    draw = random.Random(seed)
    return draw.choice([scaled, structured, measured, trained])(draw)
