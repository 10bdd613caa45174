"""The population error over many references: bias and coverage, against a population that is known.

Every setting is a pool of examples. Its mean block is the truth; references are drawn from it.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import fisherlab as fl
from fisherlab import blocks, metrics
from fisherlab.metrics import population

METHODS = ("kfac", "ekfac", "diagonal", "kronecker_optimal", "exact")


def pool(kind: str, seen: int, seed: int) -> dict[str, tuple[Tensor, Tensor, list]]:
    """By layer: `a` and `g` of 500 examples, and blocks made of a few others."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    x, y = torch.randn(500 + seen, 8).double(), torch.randint(4, (500 + seen,))
    take = lambda s: fl.capture(net, nn.CrossEntropyLoss(), x[s], y[s], fisher_type=kind)  # noqa: E731
    few, many = take(slice(seen)), take(slice(seen, None))
    made = lambda layer: [fl.approximations.get(m)()(layer) for m in METHODS]  # noqa: E731
    return {n: (c.inputs, c.output_gradients, made(few[n])) for n, c in many.items()}


def truth(X: blocks.Block, a: Tensor, g: Tensor) -> float:
    D = torch.einsum("mnto,nti->mnoi", g, a).flatten(0, 1).flatten(1)
    F = D.mT @ D / len(a)
    return float((X.dense() - F).norm() / F.norm())


def simulated(kind: str, seen: int, M: int, draws: int, seed: int) -> list[dict[str, float]]:
    """Over references of M examples: coverage, mean estimate and shares, by layer and method."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for a, g, made in pool(kind, seen, seed).values():
        exact = [truth(X, a, g) for X in made]
        found = []
        for _ in range(draws):
            s = torch.randint(len(a), (M,), generator=generator)
            reference = blocks.Outer(a[s], g[:, s])
            found.append([metrics.population_estimate(X, reference) for X in made])
        for right, estimates in zip(exact, zip(*found, strict=True), strict=True):
            stated = [e for e in estimates if not math.isnan(e.low)]
            known = [float(e.error) for e in estimates if not math.isnan(e.error)]
            rows.append(
                {
                    "stated": len(stated) / draws,
                    "covers": sum(float(e.low <= right <= e.high) for e in stated)
                    / max(1, len(stated)),
                    "known": len(known) / draws,
                    "mean": sum(known) / len(known) / right if known else math.nan,
                }
            )
    return rows


def assert_covers(rows: list[dict[str, float]], M: int, loose: float) -> None:
    # where single examples dominate nothing is stated, in 10 of an empirical Fisher often
    rows = [row for row in rows if row["stated"] > 0.5]
    assert len(rows) > 4
    covers = [row["covers"] for row in rows]
    assert 0.93 - loose <= sum(covers) / len(covers) <= 0.97 + loose, (M, covers)
    # one layer and method by itself: 0.874 at least as measured with 10 examples
    assert min(covers) > (0.87 if M == 10 else 0.9) - loose
    # where the number is nearly always stated, none is left out that would bias its mean
    means = [row["mean"] for row in rows if row["known"] > 0.95]
    assert all(abs(mean - 1) < 0.04 + loose for mean in means), means


@pytest.mark.parametrize("M", [10, 30])
def test_the_interval_covers_in_a_few_draws(M):
    assert_covers(simulated("exact", 6, M, 60, seed=1), M, loose=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("M", [10, 30, 100])
@pytest.mark.parametrize(("kind", "seen"), [("exact", 6), ("exact", 40), ("empirical", 40)])
def test_the_interval_covers_and_the_estimate_is_unbiased(kind, seen, M):
    assert_covers(simulated(kind, seen, M, 400, seed=2), M, loose=0.01)


def test_too_few_examples_or_single_ones_that_dominate_have_no_number():
    (a, g, made), *_ = pool("exact", 20, 3).values()
    for reference in (blocks.Outer(a[:9], g[:, :9]), _dominated(a, g)):
        found = metrics.population_estimate(made[0], reference)
        assert not found.enough and math.isfinite(found.squared)
        for value in (found.error, found.error_se, found.low, found.high):
            assert math.isnan(value)


def _dominated(a: Tensor, g: Tensor) -> blocks.Outer:
    scale = torch.ones(40, dtype=torch.float64)
    scale[0] = 20
    return blocks.Outer(a[:40] * scale[:, None, None], g[:, :40])


def test_a_norm_below_its_noise_leaves_the_interval_open():
    """Directions all different: the population's norm may be zero, so there is no upper end."""
    g = torch.eye(12, dtype=torch.float64)[None, :, None]
    a = torch.ones(12, 1, 1, dtype=torch.float64)
    a[1:3] = 1.01
    g[0, 1, 0] = g[0, 0, 0]
    X = blocks.Diagonal(torch.ones(12, 1).double())
    found = metrics.population_estimate(X, blocks.Outer(a, g))
    assert found.enough and found.high == math.inf and math.isnan(found.error)


def test_the_interval_is_every_ratio_that_the_examples_do_not_contradict():
    """Against a search: `|(1 - theta) u + b|` at most 1.96 of its standard errors."""
    generator = torch.Generator().manual_seed(0)
    theta = torch.linspace(0, 40, 4001).double()
    s = 1 - theta
    bounded = 0
    for _ in range(300):
        u, b = (2 * torch.randn(2, generator=generator)).double()
        root = torch.randn(2, 2, generator=generator).double()
        (uu, up), (_, pp) = root @ root.mT / 4
        inside = (s * u + b).abs() <= 1.959964 * (s**2 * uu + 4 * pp - 4 * s * up).sqrt()
        low, high = population._fieller(u, b, uu, pp, up)
        if low.isnan():
            assert not inside.any()
            continue
        held = (theta.sqrt() >= low) & (theta.sqrt() <= high)
        assert not (inside & ~held).any()
        if high < math.inf:
            bounded += 1
            assert torch.equal(inside, held)
    assert bounded > 50


def test_the_estimate_follows_its_definition():
    """By leaving examples out one at a time, dense."""
    (a, g, made), *_ = pool("exact", 20, 4).values()
    a, g, X = a[:30], g[:, :30], made[0]
    each = [blocks.Outer(a[n : n + 1], g[:, n : n + 1]).dense() for n in range(30)]
    pairs = torch.stack([torch.stack([(p * q).sum() for q in each]) for p in each])
    own = torch.stack([(p * X.dense()).sum() for p in each])

    def parts(kept):
        K = pairs[kept][:, kept]
        M = len(K)
        u = (K.sum() - K.trace()) / (M * (M - 1))
        return torch.stack([u, own[kept].mean()])

    everyone = torch.ones(30, dtype=torch.bool)
    u, p = parts(everyone)
    left = torch.stack([parts(everyone & (torch.arange(30) != n)) for n in range(30)])
    spread = left - left.mean(0)
    (uu, up), (_, pp) = 29 / 30 * spread.mT @ spread
    b = X.dense().square().sum() - 2 * p
    found = metrics.population_estimate(X, blocks.Outer(a, g))
    ratio = 1 + b / u - b * uu / u**3 - 2 * up / u**2
    variance = 4 * pp / u**2 + b**2 * uu / u**4 + 4 * b * up / u**3
    assert float(found.error) == pytest.approx(float(ratio.sqrt()), rel=1e-8)
    expected = variance.sqrt() / (2 * ratio.sqrt())
    assert float(found.error_se) == pytest.approx(float(expected), rel=1e-8)
    low, high = population._fieller(u, b, uu, pp, up)
    assert float(found.low) == pytest.approx(float(low), rel=1e-8)
    assert float(found.high) == pytest.approx(float(high), rel=1e-8)


def test_a_median_with_missing_numbers_says_how_many_it_has():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    x, y = torch.randn(36, 8).double(), torch.randint(4, (36,))
    table = fl.compare(
        net,
        nn.CrossEntropyLoss(),
        x[:12],
        y[:12],
        reference=(x[12:], y[12:]),
        fisher_type="empirical",
    )
    once = table.frame.drop_duplicates(["layer", "approximation"])
    missing = once["population_error"].isna()
    assert missing.any() and not missing.all()
    assert (once["note"].str.contains("too few") == missing).all()
    assert once["population_error_low"].notna().any()
    counts = table.summary()["population_error known"]
    for name, rows in once.groupby("approximation"):
        assert counts[name] == f"{rows['population_error'].notna().sum()} of {len(rows)}"
