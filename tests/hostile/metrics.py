"""Metrics and damping rules: arguments right and wrong, against dense formulas."""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

import fisherlab as fl
from fisherlab import blocks, metrics
from fisherlab.approximations import damping as rules
from hostile import junk
from hostile.blocks import another, made, near, outer, power, psd, randn
from hostile.judge import Case


def _cosine(one: Tensor, two: Tensor) -> Tensor:
    return (one * two).sum() / (one.norm() * two.norm())


def _direction(X, F, g, lam):
    eye = torch.eye(len(F), dtype=F.dtype)
    ours, exact = (-power(S, -1, lam) @ g.flatten() for S in (X, F))
    quadratic = F + lam * eye
    slope, curvature = g.flatten() @ ours, ours @ quadratic @ ours
    best = g.flatten() @ exact
    return {
        "direction_cosine": _cosine(ours, exact),
        "direction_error": (ours - exact).norm() / exact.norm(),
        "quadratic_decrease": (slope + curvature / 2) / (best / 2),
        "quadratic_decrease_scaled": slope**2 / (-curvature * best),
    }


def _stein(X, F, lam):
    eye = torch.eye(len(F), dtype=F.dtype)
    P = power(X, -1, lam) @ (F + lam * eye)
    return P.trace() - torch.linalg.slogdet(P).logabsdet - len(F)


def _von_neumann(X: Tensor, F: Tensor, lam: float) -> Tensor:
    (x, Q), (f, V) = (torch.linalg.eigh(S + lam * torch.eye(len(S))) for S in (X, F))
    x, f = x.clamp(min=lam), f.clamp(min=lam)
    shared = (V.mT @ Q).square()
    return f @ f.log() - f @ shared @ x.log() - f.sum() + x.sum()


def _condition(X, F, lam):
    root = power(X, -0.5, lam)
    values = torch.linalg.eigvalsh(root @ (F + lam * torch.eye(len(F), dtype=F.dtype)) @ root)
    return values[-1] / values[0]


def _rank(F):
    p = torch.linalg.eigvalsh(F).clamp(min=0)
    p = p[p > 0] / p.sum()
    return (-(p * p.log()).sum()).exp()


PAIRS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relative_error": lambda X, F: (X - F).norm() / F.norm(),
    "absolute_error": lambda X, F: (X - F).norm(),
    "trace_ratio": lambda X, F: X.trace() / F.trace(),
    "cosine": _cosine,
    "scaled_error": lambda X, F: (1 - _cosine(X, F).square()).clamp(min=0).sqrt(),
}
DAMPED = {
    "stein_loss": _stein,
    "von_neumann_divergence": _von_neumann,
    "condition": _condition,
}
SINGLE: dict[str, Callable[[Tensor], Tensor]] = {
    "effective_rank": _rank,
    "participation_ratio": lambda F: F.trace().square() / F.square().sum(),
}
DIRECTIONS = (
    "direction_cosine",
    "direction_error",
    "quadratic_decrease",
    "quadratic_decrease_scaled",
)


def right(draw: random.Random) -> Case:
    """A metric with good arguments, against its dense formula."""
    F, S = made(draw)
    X, T = another(draw, F)
    lam = draw.choice([1e-3, 0.1, 10.0])
    label = f"of {type(X).__name__}, {type(F).__name__}"
    which = draw.choice(["pair", "damped", "single", "direction", "condition"])
    if which == "pair":
        name = draw.choice(list(PAIRS))
        wanted = PAIRS[name](T, S)
        # an error of rounding's size is no number to compare
        return Case(
            f"{name} {label}",
            lambda: getattr(metrics, name)(X, F),
            lambda found: near(found + 1, wanted + 1, 1e-6),
        )
    if which == "damped":
        name = draw.choice(list(DAMPED))
        wanted = DAMPED[name](T, S, lam)
        return Case(
            f"{name} {label} {lam}",
            lambda: getattr(metrics, name)(X, F, lam),
            lambda found: near(found + 1, wanted + 1, 1e-5),
        )
    if which == "single":
        name = draw.choice(list(SINGLE))
        return Case(
            f"{name} of {type(F).__name__}",
            lambda: getattr(metrics, name)(F),
            lambda found: near(found, SINGLE[name](S), 1e-5),
        )
    if which == "direction":
        name, g = draw.choice(DIRECTIONS), randn(draw, *F.shape)
        wanted = _direction(T, S, g, lam)[name]
        return Case(
            f"{name} {label} {lam}",
            lambda: getattr(metrics, name)(X, F, g, lam),
            lambda found: near(found + 1, wanted + 1, 1e-5),
        )
    values = torch.linalg.eigvalsh(S).clamp(min=0)
    wanted = torch.stack([(values[-1] + d) / (values[0] + d) for d in (lam, 2 * lam)])
    return Case(
        f"condition_curve of {type(F).__name__}",
        lambda: metrics.condition_curve(F, [lam, 2 * lam]),
        lambda found: near(found, wanted, 1e-6),
    )


def exact(draw: random.Random, o: int, i: int, n: int = 4) -> blocks.Outer:
    return blocks.Outer(randn(draw, n, 1, i), randn(draw, 1, n, 1, o))


def good(draw: random.Random) -> dict[str, object]:
    """Good arguments of every metric, by name."""
    o, i = draw.randint(1, 4), draw.randint(1, 4)
    F = exact(draw, o, i)
    X = blocks.Kronecker(psd(draw, o), psd(draw, i))
    square = psd(draw, 4)
    return {
        "X": X,
        "Y": X,
        "F": F,
        "G": X,
        "H": X,
        "reference": F,
        "mc": F,
        "exact": F,
        "blocks": [X],
        "layers": {"a": F, "b": exact(draw, o, i)},
        "states": {0: X},
        "gradient": randn(draw, o, i),
        "damping": 0.1,
        "dampings": [0.1, 1.0],
        "k": 2,
        "rtol": 1e-3,
        "alpha": 0.01,
        "examples": 4,
        "labels": torch.tensor([0, 1, 0, 1]),
        "correlation": square,
        "one": square,
        "two": psd(draw, 4),
        "masses": square.abs(),
        "similarities": square,
        "correlations": [square, psd(draw, 4)],
        "values": torch.tensor([3.0, 2.0, 1.0]),
        "coefficients": torch.tensor([1.0, 2.0]),
        "shared": torch.tensor([2.0, 1.0]),
        "costs": [1.0, 2.0],
        "errors": [2.0, 1.0],
        "preconditioner": X,
        "inverse": X,
        "beside": False,
        "grid": torch.tensor([0.0, 1.0, 2.0]),
        "width": 0.1,
    }


NAMES = [n for n in metrics.__all__ if inspect.isfunction(getattr(metrics, n))]


def wrong(draw: random.Random) -> Case:
    """A metric with one junk argument."""
    name = draw.choice(NAMES)
    measure = getattr(metrics, name)
    parameters = inspect.signature(measure).parameters
    known = good(draw)
    arguments = {key: known[key] for key in parameters if key in known}
    if name == "staleness":
        arguments["exact"] = {0: known["F"]}
    elif name == "step":
        del arguments["exact"]
    key = draw.choice(list(arguments))
    bad = _bad(draw, name, key, arguments[key])
    label = f"{name}: {key} = {str(bad)[:40]}"
    given = {**arguments, key: bad}
    if name == "staleness" and isinstance(bad, dict) and not bad:
        return Case(label, lambda: list(measure(**given)), lambda found: "" if found == [] else "?")
    if bad is None and parameters[key].default is None:
        return Case(label, lambda: measure(**given), lambda found: "")
    words = ("weights",) if isinstance(bad, blocks.Block) else (key,)
    return Case(label, lambda: measure(**given), None, words)


def _bad(draw: random.Random, name: str, key: str, value: object) -> object:
    if key == "damping":
        return junk.number(draw)
    if key in ("alpha", "width"):
        return junk.number(draw, zero=True)
    if key == "rtol":
        return junk.number(draw)
    if key in ("k", "examples"):
        return junk.count(draw, 0 if key == "k" else 1)
    if key == "dampings":
        return draw.choice([None, "0.1", 3.0, [], [-1.0], [0.1, math.nan], ["a"], [None], object()])
    if isinstance(value, Tensor) and key != "labels":
        while True:
            bad = junk.tensor(draw, value)
            # a longer list of numbers or one matrix more is another argument, no junk
            if not (isinstance(bad, Tensor) and type(bad) is Tensor and _ok(bad, key)):
                return bad
    if key == "labels":
        return draw.choice([None, "a", [0, 1], 3, torch.ones(2, 2), torch.ones(()), np.ones(4)])
    if key in ("costs", "errors"):
        return draw.choice([None, "ab", 3, ["a", "b"], [None, None], object()])
    if key == "beside":
        return draw.choice([None, "no", 1, 0.0, []])
    if (
        key in ("X", "Y", "F", "G", "H", "reference", "mc")
        and draw.random() < 0.3
        and name not in SOLO
    ):
        o, i = value.shape  # type: ignore[attr-defined]
        return exact(draw, o + 1, i)
    if key in ("layers", "states", "correlations", "blocks"):
        return draw.choice([None, "a", 3, [1], {"a": 1}, {0: "x"}, object(), torch.float32])
    return junk.anything(draw, blocks.Block)


def _ok(bad: Tensor, key: str) -> bool:
    if bad.is_nested or bad.layout != torch.strided or bad.is_meta or bad.dtype != torch.float64:
        return bad.dtype == torch.float32 and bad.ndim == 1
    return bad.ndim == 1 if key in ("values", "coefficients", "shared") else False


# metrics of one block
SOLO = {
    "gram_correlation",
    "zero_gradients",
    "spectral_density",
    "diagonal_share",
    "example_coefficients",
    "spectral_gap",
    "kfac_error_split",
    "population_norm",
    "effective_rank",
    "participation_ratio",
    "condition_number",
    "condition_curve",
    "cumulative_trace",
}


def damping(draw: random.Random) -> Case:
    """A damping rule: its arguments, its blocks, a rule of one's own that returns junk."""
    which = draw.choice(["relative", "geometric", "trace", "gram_norm", "lm", "place", "blocks"])
    F, S = made(draw)
    o, i = F.shape
    if which == "place":
        K = blocks.Kronecker(psd(draw, o), psd(draw, i))
        exponent, lam, where = -1, 0.1, draw.choice([*rules.PLACEMENTS, "junk"])
        if where == "junk":
            bad = junk.anything(draw)
            return Case(
                f"place {bad!r}", lambda: rules.place(K, -1, 0.1, bad), words=("placement",)
            )
        value = draw.choice([junk.number(draw), lam])
        if value is lam:
            return Case(
                f"place {where}",
                lambda: rules.place(K, exponent, lam, where).dense(),
                lambda found: near(found, _placed(K, lam, where), 1e-6),
            )
        return Case(
            f"place {where} {value!r}",
            lambda: rules.place(K, exponent, value, where),
            words=("damping",),
        )
    if which in ("relative", "geometric"):
        rule = getattr(rules, which)
        if draw.random() < 0.4:
            share, N = draw.choice([0.01, 1.0]), F.size
            wanted = share * S.trace() / (N if which == "relative" else math.sqrt(N))
            return Case(
                f"{which}({share})",
                lambda: rule(share)({"a": F})["a"],
                lambda f: near(f, wanted.clamp(min=1e-10), 1e-6),
            )
        key = draw.choice(["share", "floor"])
        bad = junk.number(draw)
        return Case(
            f"{which}({key}={bad!r})", lambda: rule(**{"share": 0.1, key: bad}), None, (key,)
        )
    if which == "trace":
        good = {"vartheta": 0.1, "convolutions": {"a"}, "constant": 1e-3, "fc_expansion": True}
        key = draw.choice(list(good))
        bad = (
            junk.anything(draw, set, list, tuple, dict, str)
            if key == "convolutions"
            else draw.choice([None, "no", 1, 0.0, []])
            if key == "fc_expansion"
            else junk.number(draw)
        )
        return Case(
            f"trace({key}={bad!r})", lambda: rules.trace(**{**good, key: bad}), None, (key,)
        )
    if which == "gram_norm":
        if draw.random() < 0.3:
            kind, args, _ = outer(draw)
            E = kind(*args)
            U = torch.einsum("mnto,nti->mnoi", E.g, E.a).flatten(0, 1).flatten(1)
            wanted = 0.1 * (U @ U.mT).norm()
            return Case(
                "gram_norm(0.1)",
                lambda: rules.gram_norm(0.1)({"a": E})["a"],
                lambda f: near(f, wanted),
            )
        bad = junk.number(draw)
        return Case(f"gram_norm({bad!r})", lambda: rules.gram_norm(bad), None, ("alpha",))
    if which == "lm":
        key = draw.choice(["share", "every", "omega"])
        bad = junk.count(draw) if key == "every" else junk.number(draw, zero=True)
        return Case(
            f"levenberg_marquardt({key}={bad!r})",
            lambda: rules.levenberg_marquardt(**{key: bad}),
            None,
            (key,),
        )
    bad = junk.anything(draw, dict) if draw.random() < 0.5 else {"a": junk.anything(draw)}
    rule = draw.choice(
        [rules.relative(0.1), rules.geometric(0.1), rules.gram_norm(0.1), rules.trace(0.1, {"a"})]
    )
    return Case(f"{rule!r}({str(bad)[:30]})", lambda: rule(bad), None, ("block",))


def _placed(K: blocks.Kronecker, lam: float, where: str) -> Tensor:
    G, A = K.G, K.A
    eye_G, eye_A = (torch.eye(len(x), dtype=x.dtype) for x in (G, A))
    if where == "factored":
        pi = math.sqrt((A.trace() / len(A)) / (G.trace() / len(G)))
        pair = G + math.sqrt(lam) / pi * eye_G, A + math.sqrt(lam) * pi * eye_A
    elif where == "factorwise":
        pair = G + lam * eye_G, A + lam * eye_A
    else:
        full = torch.kron(G, A)
        return torch.linalg.inv(full + lam * torch.eye(len(full), dtype=G.dtype))
    return torch.kron(*map(torch.linalg.inv, pair))


def case(seed: int) -> Case:
    draw = random.Random(seed)
    kind = draw.choice([right, wrong, wrong, damping])
    assert fl.metrics is metrics
    return kind(draw)
