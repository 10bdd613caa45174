"""The population error over many references: bias and coverage, against a population that is known.

References are drawn afresh from a law whose block `E F = G (x) A` is known, or from a pool of
examples whose mean block is the truth.
"""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import binom
from torch import Tensor, nn

import fisherlab as fl
from fisherlab import blocks, metrics
from fisherlab.metrics import ratio

O, I = 6, 12


class Law:
    """Independent inputs and output gradients, the latter of a random scale."""

    def __init__(self, kind: str, seed: int = 0) -> None:
        self.kind, self.generator = kind, torch.Generator().manual_seed(seed)
        self.spread = (torch.arange(I) + 1.0).double() ** -0.5
        self.slope = (torch.arange(O) + 1.0).double() ** -0.5
        # the mean square of the scale
        square = {"gaussian": 1.0, "student": 10 / 8, "lognormal": math.exp(2 * 0.3**2)}[kind]
        self.block = blocks.Kronecker(
            square * self.slope.square().diag(), self.spread.square().diag()
        )

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        normal = lambda *s: torch.randn(*s, generator=self.generator, dtype=torch.float64)  # noqa: E731
        scale = torch.ones(count, dtype=torch.float64)
        if self.kind == "student":
            scale = normal(count, 10).square().mean(1).rsqrt()
        if self.kind == "lognormal":
            scale = (0.3 * normal(count)).exp()
        a = normal(count, 1, I) * self.spread
        a[..., 0] = 1  # the bias's
        return a, normal(1, count, 1, O) * self.slope * scale[:, None, None]

    def approximations(self) -> list[blocks.Block]:
        """Of few and of many examples, near and far; half the population's block comes last."""
        found: list[blocks.Block] = []
        for count in (16, 400):
            exact = blocks.Outer(*self.draw(count))
            a, g = self.draw(count)
            A, G = a[:, 0].T @ a[:, 0] / count, g[0, :, 0].T @ g[0, :, 0] / count
            found += [exact, blocks.Kronecker(G, A), blocks.Kronecker(2 * G, A)]
        return [*found, blocks.Kronecker(self.block.G / 2, self.block.A)]

    def error(self, X: blocks.Block) -> float:
        rest = X.dense() - self.block.dense()
        return float(rest.norm() / self.block.dense().norm())


def simulated(law: Law, M: int, draws: int) -> list[dict[str, float]]:
    """By approximation, over references of M examples: coverage, share and mean of the numbers."""
    makers = law.approximations()
    found = []
    for _ in range(draws):
        reference = blocks.Outer(*law.draw(M))
        found.append([metrics.population_estimate(X, reference) for X in makers])
    rows = []
    for X, estimates in zip(makers, zip(*found, strict=True), strict=True):
        right = law.error(X)
        numbers = [float(e.error) / right for e in estimates if not e.error.isnan()]
        covers = sum(bool(e.low <= right <= e.high) for e in estimates)
        mean = sum(numbers) / max(1, len(numbers))
        rows.append({"covers": covers, "known": len(numbers) / draws, "mean": mean})
    return rows


def assert_covers(rows: list[dict[str, float]], draws: int) -> None:
    """0.93 to 0.97 over the approximations, and none far below, but for the chance of the draws.

    Half the population's block is the hardest: where the tail is not seen, the norm is too small,
    and the estimate moves with it. 0.87 of its intervals hold the truth.
    """
    covers = [row["covers"] for row in rows]
    low, high = binom.ppf(1e-4, draws, 0.93), binom.ppf(1 - 1e-4, draws, 0.97)
    assert low <= sum(covers) / len(covers) <= high, (low, high, covers)
    assert min(covers[:-1]) >= low, (low, covers)
    assert covers[-1] >= binom.ppf(1e-4, draws, 0.87), covers


@pytest.mark.parametrize("M", [10, 30, 100])
def test_the_interval_covers_in_a_few_draws(M):
    assert_covers(simulated(Law("student"), M, 40), 40)


@pytest.mark.slow
@pytest.mark.parametrize("M", [10, 30, 100, 256])
@pytest.mark.parametrize("kind", ["gaussian", "student", "lognormal"])
def test_the_interval_covers_in_many_draws(kind, M):
    rows = simulated(Law(kind, seed=1), M, 600)
    assert_covers(rows, 600)
    for row in rows:
        assert row["known"] == 0 or M >= 30
        # nearly always a number: no choice of samples that would bias its mean
        if row["known"] > 0.95:
            assert row["mean"] == pytest.approx(1, abs=0.02)


# --- definitions ----------------------------------------------------------------------------------


def dense_pairs(X: blocks.Block, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """The jackknife's pseudo-values of `d` and `u`, leaving examples out one at a time, dense."""
    each = [blocks.Outer(a[n : n + 1], g[:, n : n + 1]).dense() for n in range(len(a))]
    K = torch.stack([torch.stack([(p * q).sum() for q in each]) for p in each])
    own = torch.stack([(p * X.dense()).sum() for p in each])

    def parts(kept: list[int]) -> Tensor:
        M, Q = len(kept), K[kept][:, kept]
        u = (Q.sum() - Q.trace()) / (M * (M - 1))
        return torch.stack([X.dense().square().sum() - 2 * own[kept].mean() + u, u])

    every = list(range(len(a)))
    left = torch.stack([parts([k for k in every if k != n]) for n in every])
    pseudo = len(a) * parts(every) - (len(a) - 1) * left
    return pseudo[:, 0], pseudo[:, 1]


def test_the_estimate_is_that_of_the_pseudo_values():
    law = Law("student", seed=3)
    X = blocks.Kronecker(3 * law.block.G, law.block.A)
    a, g = law.draw(40)
    top, bottom = dense_pairs(X, a, g)
    found = metrics.population_estimate(X, blocks.Outer(a, g))
    assert float(found.squared) == pytest.approx(float(top.mean()), rel=1e-10)
    # the delta method on the root of the ratio, term by term, from the covariance of the means
    d, u = float(top.mean()), float(bottom.mean())
    (dd, du), (_, uu) = torch.cov(torch.stack([top, bottom])).tolist()
    dd, du, uu = dd / 40, du / 40, uu / 40
    root = (d / u) ** 0.5
    second = -dd / d**2 / 8 - du / (d * u) / 4 + 3 * uu / u**2 / 8
    assert float(found.error) == pytest.approx(root * (1 - second), rel=1e-10)
    spread = root / 2 * (dd / d**2 - 2 * du / (d * u) + uu / u**2) ** 0.5
    assert float(found.error_se) == pytest.approx(spread, rel=1e-10)
    low, high = ratio.interval(top, bottom)
    assert 0 < float(found.low) == pytest.approx(low, rel=1e-9)
    assert float(found.high) == pytest.approx(high, rel=1e-9)
    assert found.low < found.error < found.high and found.reason == ""


@pytest.mark.parametrize("seed", range(12))
def test_the_interval_is_every_ratio_that_the_values_do_not_contradict(seed):
    """Against a fine search, ratio by ratio, from the values themselves."""
    generator = torch.Generator().manual_seed(seed)
    M = (12, 30, 100)[seed % 3]
    top, bottom = torch.randn(2, M, generator=generator).double().exp()
    top = top + bottom * (seed % 2) - 0.5
    held = []
    for theta in torch.linspace(0, 12, 2401).double():
        h = top - theta * bottom
        T = M**0.5 * float(h.mean() / h.std())
        third = float(((h - h.mean()) ** 3).mean() / h.std(correction=0) ** 3)
        s = third * (M * (M - 1)) ** 0.5 / (M - 2) * (1 + 4 / M**0.5)
        c = 2 * s / (3 * M**0.5)
        moved = math.expm1(c * T) / c + s / (6 * M**0.5)
        if min(abs(T), abs(moved)) <= ratio.WIDTH:
            held.append(float(theta))
    low, high = ratio.interval(top, bottom)
    assert low**2 == pytest.approx(held[0], abs=0.0051)
    assert min(high**2, 12) == pytest.approx(held[-1], abs=0.0051)


def test_values_without_spread_have_a_point_for_an_interval():
    top, bottom = torch.full((30,), 2.0).double(), torch.full((30,), 8.0).double()
    assert ratio.interval(top, bottom) == pytest.approx((0.5, 0.5), rel=1e-9)
    assert ratio.root(top, bottom) == pytest.approx((0.5, 0.0), abs=1e-12)
    assert all(math.isnan(end) for end in ratio.interval(0 * top, 0 * bottom))


# --- too few --------------------------------------------------------------------------------------


def test_below_what_is_needed_there_is_no_number():
    law = Law("gaussian", seed=5)
    X, (a, g) = blocks.Kronecker(3 * law.block.G, law.block.A), law.draw(60)
    known = {}
    for M in (2, 9, 10, 29, 30, 60):
        found = metrics.population_estimate(X, blocks.Outer(a[:M], g[:, :M]))
        known[M] = [not bool(v.isnan()) for v in (found.squared, found.low, found.error)]
        assert (found.reason == "") == known[M][2]
        assert known[M][2] or f"examples for its population error: {M}" in found.reason
    assert known[2] == [False] * 3 and known[9] == [True, False, False]
    assert known[10] == known[29] == [True, True, False]
    assert known[30] == known[60] == [True] * 3


def test_a_norm_below_its_noise_leaves_the_interval_open():
    """Gradients all different but two: the population's norm may be zero."""
    a, g = torch.ones(40, 1, 1).double(), torch.eye(40).double()[None, :, None]
    g[0, 1, 0] = g[0, 0, 0]
    found = metrics.population_estimate(
        blocks.Diagonal(torch.ones(40, 1).double()), blocks.Outer(a, g)
    )
    assert found.high == math.inf and found.error.isnan() and "inf" in found.reason


def test_256_examples_of_a_trained_network_have_numbers():
    """A few wrong answers hold most of the empirical Fisher: notebook 02's setting."""
    data = fl.datasets.load("digits")
    x, y = data.train.tensors
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 10))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for batch in torch.randperm(len(y))[: 60 * 16].split(16):
        optimizer.zero_grad()
        nn.CrossEntropyLoss()(net(x[batch]), y[batch]).backward()
        optimizer.step()
    few, many = (
        fl.capture(net, nn.CrossEntropyLoss(), x[part], y[part], fisher_type="empirical")
        for part in (slice(64), slice(-256, None))
    )
    for name in many:
        for method in (fl.KFAC(), fl.EKFAC(), fl.TEKFAC(), fl.Diagonal()):
            found = metrics.population_estimate(method(few[name]), fl.Exact()(many[name]))
            assert found.low < found.error < found.high, found.reason


# --- what a table says ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    x, y = torch.randn(48, 8).double(), torch.randint(4, (48,))
    return fl.compare(
        net,
        nn.CrossEntropyLoss(),
        x[:12],
        y[:12],
        reference=(x[12:], y[12:]),
        fisher_type="empirical",
    )


def test_a_median_with_missing_numbers_says_how_many_it_has(table):
    once = table.frame.drop_duplicates(["layer", "approximation"])
    missing = once["population_error"].isna()
    assert missing.any() and not missing.all()
    assert (once["note"].str.contains("too few unseen examples") == missing).all()
    assert once["population_error_low"].notna().all()
    summary = table.summary()
    for name, rows in once.groupby("approximation"):
        count = f"{rows['population_error'].notna().sum()} of {len(rows)}"
        assert summary["population_error known"][name] == count
    assert "relative_error known" not in summary
    assert f"{missing.sum()} of {len(once)} population errors" in table.note
    assert "population_error known" in repr(table)


def test_the_terminal_counts_what_is_missing(table):
    from fisherlab.commands.compare import by_layer, overview

    shown, _ = overview(table)
    assert list(shown.columns[1:4]) == ["population_error", "population_error known", "order"]
    frame = table.frame.assign(diagonal_share=0.5)  # so that it leads with the population error
    whole = fl.Comparison(frame)
    errors, _ = by_layer(whole)
    once = frame.drop_duplicates(["layer", "approximation"])
    assert len(errors) == once["approximation"].nunique()
    for _, row in errors.iterrows():
        rows = once[once["approximation"] == row["approximation"]]
        assert row["known"] == f"{rows['population_error'].notna().sum()} of {len(rows)}"


def test_a_picture_counts_what_is_missing(table):
    figure = fl.plots.in_sample_against_population(table)
    texts = {text.get_text() for text in figure.axes[0].texts}
    assert texts == {"1/2"}
    facets = fl.plots.error_facets(table, over="examples", measure="population_error")
    assert facets.axes[0].texts


# --- the order of two -----------------------------------------------------------------------------


def orders_of(law: Law, M: int, draws: int) -> tuple[list[float], list[float]]:
    """Shares of the paired intervals that hold the truth, and of wrong verdicts, by pair."""
    makers = law.approximations()
    square = float(law.block.dense().square().sum())
    right = [law.error(X) ** 2 for X in makers]
    pairs = [(0, 1), (1, 2), (3, 4), (4, 5), (4, 6), (1, 4)]
    held, wrong = [0] * len(pairs), [0] * len(pairs)
    assert square > 0
    for _ in range(draws):
        reference = blocks.Outer(*law.draw(M))
        each = [metrics.population_estimate(X, reference) for X in makers]
        for k, (i, j) in enumerate(pairs):
            found = metrics.population.order(each[i].values, each[j].values, each[i].norms, 1e-16)
            truth = right[i] - right[j]
            held[k] += found.low <= truth <= found.high
            wrong[k] += found.verdict == ("further" if truth < 0 else "nearer")
    return [h / draws for h in held], [w / draws for w in wrong]


def test_paired_intervals_cover_in_a_few_draws():
    held, wrong = orders_of(Law("student"), 40, 40)
    assert sum(held) / len(held) >= binom.ppf(1e-4, 40, 0.93) / 40, held
    assert max(wrong) <= binom.ppf(1 - 1e-4, 40, 0.03) / 40, wrong


@pytest.mark.slow
@pytest.mark.parametrize("M", [10, 30, 100, 256])
@pytest.mark.parametrize("kind", ["gaussian", "student", "lognormal"])
def test_paired_intervals_cover_in_many_draws(kind, M):
    held, wrong = orders_of(Law(kind, seed=2), M, 600)
    assert 0.93 <= sum(held) / len(held) <= 0.985, held
    assert min(held) >= binom.ppf(1e-4, 600, 0.90) / 600, held
    assert max(wrong) <= binom.ppf(1 - 1e-4, 600, 0.03) / 600, wrong


def test_the_paired_difference_is_that_of_the_pseudo_values():
    law = Law("lognormal", seed=4)
    X, Y = (
        blocks.Kronecker(3 * law.block.G, law.block.A),
        blocks.Diagonal(torch.ones(O, I).double()),
    )
    a, g = law.draw(40)
    reference = blocks.Outer(a, g)
    (x, u), (y, _) = dense_pairs(X, a, g), dense_pairs(Y, a, g)
    found = metrics.population_order(X, Y, reference)
    z = x - y
    (zz, zu), (_, uu) = (torch.cov(torch.stack([z, u])) / 40).tolist()
    ratio_ = float(z.mean() / u.mean())
    bias = (ratio_ * uu - zu) / float(u.mean()) ** 2
    assert found.value == pytest.approx(ratio_ - bias, rel=1e-9)
    back = metrics.population_order(Y, X, reference)
    assert (back.low, back.high) == pytest.approx((-found.high, -found.low), rel=1e-5)
    assert {found.verdict, back.verdict} == {"nearer", "further"}
    assert metrics.population_order(X, X, reference).verdict == "same"
    few = metrics.population_order(X, Y, blocks.Outer(a[:9], g[:, :9]))
    assert few.verdict == "not resolved" and math.isnan(few.value)


def test_cosine_and_trace_ratio_against_the_population_cover():
    law, draws = Law("student", seed=6), 40
    makers, F = law.approximations()[1:5:3], law.block
    held = []
    for _ in range(draws):
        reference = blocks.Outer(*law.draw(60))
        for X in makers:
            found = metrics.population_estimate(X, reference)
            cosine = float(X.inner(F) / (X.squared_norm() * F.squared_norm()).sqrt())
            ratio_ = float(X.trace() / F.trace())
            held.append([i.low <= v <= i.high for i, v in [(found.cosine, cosine)]])
            held[-1].append(found.trace_ratio.low <= ratio_ <= found.trace_ratio.high)
            assert found.cosine.low < found.cosine.value < found.cosine.high
    shares = torch.tensor(held).double().mean(0)
    assert float(shares.min()) >= binom.ppf(1e-4, draws, 0.93) / draws, shares


def test_a_table_tells_the_order_of_its_methods(table, tmp_path):
    orders = table.orders()
    nearest = orders["against"].unique().item()
    others = table.frame["approximation"].nunique() - 1
    assert len(orders) == others * table.frame["layer"].nunique()
    summary = table.summary()
    assert summary["order"][nearest] == "nearest" and "order" in repr(table)
    for name, rows in orders.groupby("approximation"):
        left = int((rows["verdict"] == "not resolved").sum())
        assert ("not resolved" in summary["order"][name]) == (left > 0)
    one = table.order("kfac", "diagonal")
    assert list(one["approximation"]) == ["kfac"] * 2 and set(one["against"]) == {"diagonal"}
    back = fl.Comparison.load(table.save(tmp_path)).order("kfac", "diagonal")
    assert back.equals(one)
    both = fl.Comparison.concat([table, table])
    assert len(both.orders()) == len(orders) and "order" in both.summary()
    with pytest.raises(ValueError, match="unknown approximation 'kfacc'"):
        table.order("kfacc", "kfac")
    with pytest.raises(ValueError, match="pass `reference=`"):
        fl.Comparison(table.frame).order("kfac", "tkfac")
