"""Every registered approximation against a dense matrix written from its equation."""

import dataclasses
import itertools

import dense
import pytest
import torch
from dense import REFERENCES
from formulas import CASES, FISHER_TYPES, found_and_expected
from references import randn, relative

import fisherlab as fl
from fisherlab.approximations import Means
from fisherlab.blocks.columns import Columns
from fisherlab.statistics import InputMoment, LeftMoment, RightMoment


@pytest.mark.parametrize("fisher_type", FISHER_TYPES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", REFERENCES)
def test_every_approximation_is_its_formula(name, case, fisher_type):
    layer, p = found_and_expected(case, fisher_type)
    if name == "kronecker_sum" and case == "one image" and fisher_type != "exact":
        pytest.skip("one column's rearrangement is D (x) D, whose second singular value is double")
    assert relative(fl.approximations.get(name)()(layer).dense(), REFERENCES[name](p)) < 1e-10


def test_the_variants_are_their_formulas():
    for case, fisher_type in itertools.product(("linear", "conv", "positions"), FISHER_TYPES):
        layer, p = found_and_expected(case, fisher_type)
        left, right, total = dense.tkfac_sides(p)
        squared = torch.kron(left, right) / total / p.M
        assert relative(fl.Shampoo(form="squared")(layer).dense(), squared) < 1e-10
        assert relative(fl.TKFAC()(layer).dense(), squared) < 1e-10
        V = p.gradient
        roots = torch.kron(dense.root(V @ V.mT), dense.root(V.mT @ V))
        assert relative(fl.Shampoo(statistics="gradient")(layer).dense(), roots) < 1e-10
        for k in (1, 2, 3):
            found = fl.KroneckerSum(rank=k)(layer).dense()
            assert relative(found, dense.kronecker_terms(p, k)) < 1e-9
        basis = fl.TEKFAC(factors=fl.TKFAC(weight_sharing="expand"))(layer)
        sides = [
            torch.einsum("n,nij->ij", w, torch.stack([dense.moment(x) for x in rows]))
            for w, rows in (
                (p.a.square().sum((1, 2)), p.g.transpose(0, 1)),
                (p.g.square().sum((0, 2, 3)), p.a),
            )
        ]
        assert relative(basis.dense(), dense.corrected(dense.exact(p), *sides)) < 1e-10


def test_shared_mini_blocks_are_the_mean_of_the_layer():
    for case in ("linear", "conv", "groups", "conv without bias"):
        layer, p = found_and_expected(case, "exact")
        F = dense.mini_block(p)
        o, i = p.g.shape[-1], p.a.shape[-1]
        k = i if p.kernel is None else p.kernel
        inner = (i - (p.kernel is not None and p.bias)) // k * k
        cells = [F[s : s + k, s : s + k] for r in range(o) for s in range(r * i, r * i + inner, k)]
        mean = torch.stack(cells).mean(0)
        expected = torch.zeros_like(F)
        for r in range(o):
            for s in range(r * i, r * i + inner, k):
                expected[s : s + k, s : s + k] = mean
        if inner < i:
            biases = range(i - 1, o * i, i)
            expected[biases, biases] = torch.stack([F[b, b] for b in biases]).mean()
        assert relative(fl.MiniBlock(shared=True)(layer).dense(), expected) < 1e-10


# --- laws of the registry: they hold for whatever is registered -----------------------------------


def buildable():
    """Every registered approximation that one capture can build."""
    made = (fl.approximations.get(name)() for name in fl.approximations.names())
    return [a for a in made if "pair" not in a.needs]


def test_no_two_approximations_give_the_same_block():
    layer, _ = found_and_expected("conv", "exact")
    blocks = {a.name: a(layer).dense() for a in buildable()}
    for (one, X), (two, Y) in itertools.combinations(blocks.items(), 2):
        same = relative(X, Y) < 1e-6
        # of each pair the block is one, and the damping or the power differs; the rank of the
        # Nystrom approximation is above that of this block
        alike = ({"eva", "ifang"}, {"soap", "tekfac"}, {"exact", "nystrom"})
        assert same == ({one, two} in alike), f"{one}, {two}"


@pytest.mark.parametrize("fisher_type", FISHER_TYPES)
@pytest.mark.parametrize("case", ["linear", "conv", "fewer examples than inputs", "groups"])
def test_chunks_and_batches_are_the_whole(case, fisher_type):
    layer, _ = found_and_expected(case, fisher_type)
    halves = [layer.part(slice(0, 1)), layer.part(slice(1, None))]
    one = layer.part(slice(0, 1), slice(0, 1))
    column = sum(x.numel() * 8 for x in (one.inputs, one.output_gradients))
    budgets = [column, 2 * column + 8, 4 * column]
    assert len(list(layer.chunks(column))) == len(layer.inputs) * layer.columns_per_example
    pieces = [halves, *(list(layer.chunks(budget)) for budget in budgets)]
    memos = [fl.approximations.Memo([layer], budget) for budget in budgets]
    for approximation in buildable():
        whole = approximation(layer).dense()
        found = [approximation(*parts) for parts in pieces]
        found += [memo.block(approximation) for memo in memos]
        for block in found:
            assert relative(block.dense(), whole) < 1e-12, approximation.name


def test_equal_approximations_are_equal_and_share_work(monkeypatch):
    layer, _ = found_and_expected("conv", "exact")
    assert fl.EKFAC() == fl.EKFAC(factors=fl.KFAC()) != fl.TEKFAC()
    assert len({fl.KFAC(), fl.KFAC(weight_sharing="expand"), fl.approximations.get("kfac")()}) == 1
    for approximation in buildable():
        assert dataclasses.replace(approximation) == approximation
        assert hash(dataclasses.replace(approximation)) == hash(approximation)
    sums, sizes = [], []
    original = InputMoment.total
    monkeypatch.setattr(InputMoment, "total", lambda S, x: sums.append(S) or original(S, x))
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda S: sizes.append(tuple(S.shape)) or eigh(S))
    memo = fl.approximations.Memo([layer])
    corrected, plain, again = memo.block(fl.EKFAC()), memo.block(fl.KFAC()), memo.block(fl.EKFAC())
    plain.power(-1, 0.1)
    assert again is corrected
    assert len(sums) == 1
    assert len(sizes) == 2  # one per factor, for EKFAC's basis and KFAC's inverse together


def test_bad_arguments_are_refused_by_name():
    for make, message in (
        (lambda: fl.KFAC(weight_sharing="both"), "'expand' or 'reduce', got 'both'"),
        (lambda: fl.TKFAC(weight_sharing="reduce"), "'partial' or 'expand', got 'reduce'"),
        (lambda: fl.KFAC(placement="inside"), "unknown placement 'inside'; one of tikhonov"),
        (lambda: fl.Shampoo(form="cube"), "'root' or 'squared', got 'cube'"),
        (lambda: fl.Shampoo(statistics="all"), "'per_example' or 'gradient', got 'all'"),
        (lambda: fl.KroneckerSum(rank=0), "rank of KroneckerSum must be a whole number >= 1"),
        (
            lambda: fl.KBFGS(damping=0),
            r"damping of K-BFGS must be a finite number > 0, got 0 \(int\)",
        ),
        (lambda: fl.approximations.get("tefkac"), "'tefkac'; nearest: tekfac"),
        (lambda: fl.KFAC()(), "needs at least one LayerCapture"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    layer, _ = found_and_expected("linear", "exact")
    with pytest.raises(fl.blocks.BlockError, match="'0' captured again after the step"):
        fl.KBFGS()(layer)


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="'kfac' exists already"):

        class Other(fl.KFAC, name="kfac"):
            pass


def shampoo_of(columns):
    """Shampoo's block of 400 examples' columns."""
    found = {LeftMoment(): columns.left, RightMoment(): columns.right}
    means = Means(found.__getitem__, 400, columns.shape)
    return fl.Shampoo().block(means, columns.shape)


def test_the_norm_of_shampoo_keeps_what_its_roots_lose():
    # together the small eigenvalues are 1e-5 of the trace, each is rounding beside the largest
    scale = torch.full((300,), 2e-4, dtype=torch.float64)
    scale[0] = 1
    a, g = randn(400, 1, 300, seed=1) * scale, randn(1, 400, 1, 200, seed=2) * scale[:200]
    norms = []
    for dtype in (torch.float64, torch.float32):
        columns = Columns(a.to(dtype), g.to(dtype))
        block = shampoo_of(columns)
        norms.append(block.squared_norm().item())
    roots = block.spectra
    assert roots[1][0].count_nonzero() < 100
    assert norms[1] == pytest.approx(norms[0], rel=1e-6)


def test_roots_of_shampoo_run_on_below_the_bound_of_rounding():
    """As far as a graded moment is known: what a careful bound cuts, 1 / damping would show."""
    scale = torch.logspace(0, -3.5, 60, dtype=torch.float64)
    a, g = randn(400, 1, 60, seed=1) * scale, randn(1, 400, 1, 50, seed=2)
    steps, traces = [], []
    for dtype in (torch.float64, torch.float32):
        columns = Columns(a.to(dtype), g.to(dtype))
        X = shampoo_of(columns)
        traces.append(X.trace().item())
        steps.append(X.power(-1, 1e-7 * traces[0]) @ columns.combine(torch.ones(1, 400)))
        assert X.trace_below_rounding < 1e-3
    assert traces[1] == pytest.approx(traces[0], rel=1e-4)
    assert torch.cosine_similarity(*(s.double().flatten() for s in steps), 0) > 0.99
    # a spectrum that breaks off: what is left is rounding, and is cut
    flat = randn(400, 1, 20, seed=1) @ randn(20, 60, seed=3)
    columns = Columns(flat.float(), g.float())
    assert shampoo_of(columns).spectra[1][0].count_nonzero() == 20
