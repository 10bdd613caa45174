"""Every metric against its definition on dense matrices."""

import itertools
import math

import pytest
import torch
from block_laws import orthonormal
from formulas import found_and_expected
from references import randn
from scipy.linalg import logm
from torch import nn

import fisherlab as fl
from fisherlab import blocks, metrics
from fisherlab.testing.blocks import matrix_power, psd

NAMES = ["diagonal", "kfac", "ekfac", "tekfac", "tkfac", "eva", "shampoo", "mini_block"]
NAMES += ["kronecker_optimal", "kronecker_sum", "sngd"]
CASES = ["linear", "conv", "fewer examples than inputs"]
DAMPING = 0.03


def measured(case, name, fisher_type="exact"):
    """`X`, `F` and their matrices, and the mean gradient."""
    layer, _ = found_and_expected(case, fisher_type)
    X, F = fl.approximations.get(name)()(layer), fl.Exact()(layer)
    return X, F, X.dense(), F.dense(), layer.gradient


def near(value, expected, rel=1e-10, abs=0.0):
    assert value.dtype == torch.float64
    assert value.ndim == 0
    assert float(value) == pytest.approx(float(expected), rel=rel, abs=abs)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", NAMES)
def test_frobenius_and_trace(name, case):
    X, F, x, f, _ = measured(case, name)
    near(metrics.relative_error(X, F), (x - f).norm() / f.norm(), rel=1e-8, abs=1e-13)
    near(metrics.absolute_error(X, F), (x - f).norm(), rel=1e-8, abs=1e-13)
    near(metrics.trace_ratio(X, F), x.trace() / f.trace())
    cosine = (x * f).sum() / x.norm() / f.norm()
    near(metrics.cosine(X, F), cosine)
    c = (x * f).sum() / (x * x).sum()
    near(metrics.scaled_error(X, F), (c * x - f).norm() / f.norm(), rel=1e-8, abs=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("distance", [1e-2, 1e-3, 1e-5, 1e-7, 1e-9, 0.0])
def test_small_errors_are_recomputed_without_cancellation(distance, dtype):
    """Kronecker factors of a rank-one block, moved by a little: the three terms cancel."""
    a, g = randn(1, 1, 6, seed=1).to(dtype), randn(1, 1, 1, 4, seed=2).to(dtype)
    F = blocks.Outer(a, g)
    G, A = (torch.outer(v, v) for v in (g.flatten(), a.flatten()))
    X = blocks.Kronecker(G, A + distance * A.norm() * psd(6, seed=3).to(dtype))
    x, f = torch.kron(X.G.double(), X.A.double()), F.dense().double()
    exact = torch.kron(G.double(), A.double())
    rounding = 3 * torch.finfo(dtype).eps
    expected = (x - exact).norm() / exact.norm()
    near(metrics.relative_error(X, F), expected, rel=1e-6 if dtype == torch.float64 else 2e-4,
         abs=rounding)  # fmt: skip
    c = (x * f).sum() / (x * x).sum()
    scaled = (c * x - exact).norm() / exact.norm()
    near(metrics.scaled_error(X, F), scaled, rel=1e-6 if dtype == torch.float64 else 2e-4,
         abs=rounding)  # fmt: skip


def test_a_block_is_no_distance_from_itself_and_costs_nothing(monkeypatch):
    layer, _ = found_and_expected("conv", "exact")
    F = fl.Exact()(layer)
    pair = blocks.DirectSum([F, F]), blocks.DirectSum([F, F])
    monkeypatch.setattr(blocks.Block, "rows", None)
    for X, Y in ((F, F), pair):
        assert metrics.relative_error(X, Y) == metrics.scaled_error(X, Y) == 0
        assert metrics.absolute_error(X, Y) == 0
        near(metrics.cosine(X, Y), 1)


@pytest.mark.parametrize(("big", "small"), [(1e120, 1e60), (1e-60, 1e-120)])
def test_norms_whose_product_passes_the_range(big, small):
    X = blocks.Diagonal(big * torch.tensor([[4.0, 0.0]], dtype=torch.float64))
    F = blocks.Diagonal(small * torch.tensor([[4.0, 3.0]], dtype=torch.float64))
    near(metrics.cosine(X, F), 0.8)
    near(metrics.scaled_error(X, F), 0.6)
    g = torch.tensor([[1.0, 1.0]], dtype=torch.float64)
    near(metrics.direction_cosine(F, F, g * small, small), 1.0)


def test_zero_blocks_have_stated_values():
    zero = blocks.Kronecker(torch.zeros(2, 2).double(), torch.zeros(3, 3).double())
    F = blocks.Outer(torch.zeros(4, 1, 3).double(), torch.zeros(1, 4, 1, 2).double())
    one = blocks.Diagonal(torch.ones(2, 3).double())
    near(metrics.relative_error(zero, F), 0)
    assert metrics.relative_error(one, F) == math.inf
    near(metrics.trace_ratio(zero, F), 1)
    assert metrics.trace_ratio(one, F) == math.inf
    near(metrics.cosine(one, F), 0)
    near(metrics.scaled_error(one, F), 1)
    near(metrics.diagonalisation(one, F), 1)
    near(metrics.subspace_overlap(one, F), 1)
    near(metrics.effective_rank(F), 0)
    near(metrics.participation_ratio(F), 0)
    near(metrics.diagonal_share(F), 1)
    assert metrics.zero_gradients(F) == 4


# --- direction ------------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [1e-4, 0.03, 10.0])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", [n for n in NAMES if n != "kronecker_sum"])
def test_directions_and_the_quadratic_model(name, case, damping):
    X, F, x, f, gradient = measured(case, name)
    g, eye = gradient.flatten(), torch.eye(len(x)).double()
    d, best = (-torch.linalg.solve(m + damping * eye, g) for m in (x, f))

    def q(d):
        return g @ d + d @ (f + damping * eye) @ d / 2

    near(metrics.direction_cosine(X, F, gradient, damping), d @ best / d.norm() / best.norm(), 1e-8)
    near(metrics.direction_error(X, F, gradient, damping), (d - best).norm() / best.norm(), 1e-7)
    near(metrics.quadratic_decrease(X, F, gradient, damping), q(d) / q(best), 1e-7)
    lengths = -(g @ d) / (d @ (f + damping * eye) @ d)  # the best multiple of d
    scaled = metrics.quadratic_decrease_scaled(X, F, gradient, damping)
    near(scaled, q(lengths * d) / q(best), 1e-7)
    assert 0 <= scaled <= 1 + 1e-12
    # a preconditioner with its damping elsewhere takes the place of the inverse
    P = blocks.Kronecker(psd(X.shape[0], seed=7), psd(X.shape[1], seed=8))
    step = metrics.step(X, F, gradient, damping, P)
    d = -(P.dense() @ g)
    near(step.cosine, d @ best / d.norm() / best.norm(), 1e-8)
    near(step.decrease, q(d) / q(best), 1e-7)


def test_the_exact_step_and_a_zero_gradient():
    _, F, _, _, gradient = measured("linear", "kfac")
    for g in (gradient, torch.zeros_like(gradient)):
        near(metrics.direction_cosine(F, F, g, DAMPING), 1)
        near(metrics.direction_error(F, F, g, DAMPING), 0, abs=1e-12)
        near(metrics.quadratic_decrease(F, F, g, DAMPING), 1)
        near(metrics.quadratic_decrease_scaled(F, F, g, DAMPING), 1)


# --- alignment and spectrum -----------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["diagonal", "kfac", "ekfac", "tkfac", "tekfac", "shampoo"])
def test_diagonalisation_in_the_eigenbasis(name, case):
    X, F, _, f, _ = measured(case, name)
    if name == "diagonal":
        Q = torch.eye(len(f)).double()
    else:
        factors = fl.approximations.get({"ekfac": "kfac", "tekfac": "tkfac"}.get(name, name))()
        product = factors(found_and_expected(case, "exact")[0])
        Q = torch.kron(*(torch.linalg.eigh(side).eigenvectors for side in (product.G, product.A)))
    expected = (Q.mT @ f @ Q).diagonal().square().sum() / f.square().sum()
    near(metrics.diagonalisation(X, F), expected, 1e-9)
    assert 0 <= float(metrics.diagonalisation(X, F)) <= 1 + 1e-12


def test_the_exact_block_diagonalises_itself():
    _, F, _, f, _ = measured("conv", "kfac")
    near(metrics.diagonalisation(F, F), 1)
    near(metrics.subspace_overlap(F, F, 3), 1)
    # the arc cosine of 1 - 50 eps, which kernels of some CPUs make, is 1.5e-7
    assert metrics.principal_angles(F, F, 3).abs().max() < 1e-6


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("name", ["kfac", "ekfac", "tkfac", "mini_block", "diagonal"])
def test_leading_subspaces(name, k):
    X, F, x, f, _ = measured("conv", name)
    Q, V = (torch.linalg.eigh(m).eigenvectors[:, -k:] for m in (x, f))
    near(metrics.subspace_overlap(X, F, k), (Q.mT @ V).square().sum() / k, 1e-8)
    cosines = torch.linalg.svdvals(Q.mT @ V).clamp(max=1)
    assert torch.allclose(metrics.principal_angles(X, F, k).cos(), cosines, atol=1e-8)
    values = torch.linalg.eigvalsh(f).flip(0)
    near(metrics.spectral_gap(F, k), (values[k - 1] - values[k]) / values[0], 1e-8)


def test_subspaces_of_repeated_eigenvalues_and_of_low_rank():
    """Vectors in an eigenspace are LAPACK's choice; the space is not. k is at most the rank."""
    Q = orthonormal(12, 12, seed=4)
    values = torch.tensor([5.0, 5, 5, 2, 2, 2, 1, 1, 1, 1, 1, 1]).double()
    f = (Q * values) @ Q.mT
    F = blocks.Dense(f, (3, 4))
    turn = torch.block_diag(*(orthonormal(3, 3, seed=s) for s in (5, 6, 7, 8)))
    X = blocks.Dense((Q @ turn * values) @ (Q @ turn).mT, (3, 4))
    near(metrics.subspace_overlap(X, F, 3), 1)
    near(metrics.subspace_overlap(X, F, 6), 1)
    near(metrics.spectral_gap(F, 3), 3 / 5, 1e-9)
    near(metrics.spectral_gap(F, 2), 0, abs=1e-12)
    _, low, _, l, _ = measured("fewer examples than inputs", "kfac", "empirical")
    near(metrics.subspace_overlap(low, low, 10), 1)  # rank 2
    V = torch.linalg.eigh(l).eigenvectors[:, -2:]
    X = blocks.Diagonal(torch.arange(1.0, l.shape[0] + 1).double().view(low.shape))
    expected = V[-2:].square().sum() / 2
    near(metrics.subspace_overlap(X, low, 10), expected, 1e-8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["kfac", "ekfac", "shampoo", "kronecker_sum", "mini_block"])
def test_a_subspace_ends_at_a_gap_of_the_exact_block(name, dtype):
    """The last layer under a squared error: `F = I (x) A`, where the tenth gap is none."""
    torch.manual_seed(0)
    model = nn.Linear(5, 3).to(dtype)
    x, y = (randn(20, d, seed=d).to(dtype) for d in (5, 3))
    layer = fl.capture(model, nn.MSELoss(), x, y, fisher_type="exact")["linear"]
    X, F = fl.approximations.get(name)()(layer), fl.Exact()(layer)
    assert float(metrics.spectral_gap(F, 10)) == pytest.approx(0, abs=1e-6)
    near(metrics.subspace_overlap(X, F, 10), 1, 1e-6)
    assert metrics.principal_angles(X, F, 10).shape == (9,)
    assert math.isnan(metrics.subspace_overlap(X, F, 2))  # the first space has three


@pytest.mark.parametrize("form", ["eigen", "dense"])
def test_equal_eigenvalues_of_an_approximation_define_no_basis(form):
    F = blocks.Dense(psd(12, seed=1), (3, 4))
    Q_G, Q_A = orthonormal(3, 3, seed=2), orthonormal(4, 4, seed=3)
    l_G = torch.tensor([2.0, 1.0, 1.0]).double()
    X = blocks.Kronecker((Q_G * l_G) @ Q_G.mT, (Q_A * torch.arange(1.0, 5).double()) @ Q_A.mT)
    if form == "dense":
        X = blocks.Dense(X.dense(), X.shape)
    assert math.isnan(metrics.diagonalisation(X, F))
    assert math.isnan(metrics.subspace_overlap(X, F, 3))  # 8, 6, then two of 4
    near(metrics.diagonalisation(X, X), 1)  # a multiple of the identity on each space
    assert not math.isnan(metrics.subspace_overlap(X, F, 2))


def test_an_eigenvector_that_float32_hides_is_in_no_subspace():
    F = exact_of([2.0, 3e-4])
    assert math.isnan(metrics.subspace_overlap(graded(torch.float32), F))
    near(metrics.subspace_overlap(graded(torch.float64), F), 1, 1e-6)


def exact_of(lengths):
    """A float32 block of two examples, whose gradients are orthogonal and of these lengths."""
    g = torch.tensor(lengths)[None, :, None, None] * torch.eye(3)[:2].view(1, 2, 1, 3)
    return blocks.Outer(torch.eye(4)[:2].view(2, 1, 4), g)


def graded(dtype):
    """The same eigenvectors and eigenvalues, as a float32 matrix or a float64 one."""
    F = exact_of([2.0, 3e-4])
    return blocks.Dense(F.dense().to(dtype), F.shape)


@pytest.mark.parametrize("case", [*CASES, "groups"])
def test_spectra(case):
    _, F, _, f, _ = measured(case, "kfac")
    values = torch.linalg.eigvalsh(f).flip(0).clamp(min=0)
    p = values[values > 1e-16 * values[0]] / values.sum()
    near(metrics.effective_rank(F), (-(p * p.log()).sum()).exp(), 1e-9)
    near(metrics.participation_ratio(F), f.trace() ** 2 / f.square().sum())
    for damping in (1e-6, 0.1):
        expected = (values[0] + damping) / (values[-1] + damping)
        near(metrics.condition_number(F, damping), expected, 1e-8)
    shares = metrics.cumulative_trace(F)
    assert torch.allclose(shares, values.cumsum(0) / values.sum(), atol=1e-12)


# --- invariant ------------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [1e-3, 0.5])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", [*(n for n in NAMES if n != "kronecker_sum"), "exact"])
def test_stein_loss_and_condition(name, case, damping):
    X, F, x, f, _ = measured(case, name)
    eye = damping * torch.eye(len(x)).double()
    product = torch.linalg.solve(x + eye, f + eye)
    expected = product.trace() - torch.linalg.slogdet(product).logabsdet - len(x)
    near(metrics.stein_loss(X, F, damping), expected, rel=1e-8, abs=1e-9)
    root = matrix_power(x, -0.5, damping)
    values = torch.linalg.eigvalsh(root @ (f + eye) @ root)
    near(metrics.condition(X, F, damping), values[-1] / values[0], rel=1e-7)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", [*(n for n in NAMES if n != "kronecker_sum"), "exact", "nystrom"])
def test_von_neumann_divergence(name, case):
    X, F, x, f, _ = measured(case, name)
    assert metrics.von_neumann_divergence(F, F, 0.1) == 0
    for damping in (1e-3, 0.5):
        x_l, f_l = (S + damping * torch.eye(len(x)).double() for S in (x, f))
        log_x, log_f = (torch.from_numpy(logm(S.numpy())) for S in (x_l, f_l))
        expected = (f_l @ (log_f - log_x)).trace() - f_l.trace() + x_l.trace()
        scale = float(f_l.trace() * log_x.abs().max() + x_l.trace())
        near(metrics.von_neumann_divergence(X, F, damping), expected, rel=1e-8, abs=1e-11 * scale)


def test_von_neumann_divergence_is_zero_at_the_block_alone_and_refuses_a_logarithm_of_zero():
    diagonal = blocks.Diagonal(torch.tensor([[3.0, 1.0]]).double())
    other = blocks.Dense(diagonal.dense(), (1, 2))
    near(metrics.von_neumann_divergence(other, diagonal, 0.0), 0.0, abs=1e-14)
    parts = blocks.DirectSum([diagonal, diagonal])
    near(
        metrics.von_neumann_divergence(parts, parts.power(1, 0.5), 0.0),
        2 * sum((v + 0.5) * math.log((v + 0.5) / v) - 0.5 for v in (3.0, 1.0)),
        1e-12,
    )
    singular = blocks.Diagonal(torch.tensor([[3.0, 0.0]]).double())
    with pytest.raises(blocks.BlockError, match="eigenvalue 0, whose logarithm needs"):
        metrics.von_neumann_divergence(singular, diagonal, 0.0)


def test_condition_by_lanczos_is_the_dense_one(monkeypatch):
    for name in ("kfac", "tekfac", "diagonal", "mini_block", "exact"):
        X, F, *_ = measured("conv", name)
        expected = metrics.condition(X, F, 0.01)
        with monkeypatch.context() as patch:
            patch.setattr(metrics.invariant, "DENSE_SIZE", 0)
            near(metrics.condition(X, F, 0.01), expected, rel=1e-5)
            patch.setattr(metrics.invariant, "LANCZOS_BUDGET", 0)
            assert math.isnan(metrics.condition(X, F, 0.01))


def test_condition_by_lanczos_goes_on_until_it_has_converged(monkeypatch):
    """60 steps left both 1e-4 below the dense one."""
    x, y = (tensor[:128] for tensor in fl.datasets.load("digits").train.tensors)
    torch.manual_seed(0)
    model = fl.models.create("mlp", num_classes=10, input_size=x.shape[1:]).eval()
    layer = fl.extract.capture(model, nn.CrossEntropyLoss(), x, y, layers="5")["5"]
    F = fl.Exact()(layer)
    blocks = [fl.approximations.get(name)()(layer) for name in ("shampoo", "mini_block")]
    damping = 1e-3 * F.trace().item() / F.size
    found = metrics.conditions(blocks, F, [damping])[0]
    monkeypatch.setattr(metrics.invariant, "DENSE_SIZE", 10**4)
    for X, value in zip(blocks, found, strict=True):
        near(value, metrics.condition(X, F, damping), rel=1e-6)
    assert metrics.condition(F, F, damping) == 1 and metrics.stein_loss(F, F, damping) == 0


@pytest.mark.parametrize("positions", [1, 30])
def test_condition_by_lanczos_in_float32_is_that_of_float64(positions, monkeypatch):
    a, g = randn(6, positions, 4, seed=1), randn(1, 6, positions, 3, seed=2)
    values = []
    for dtype in (torch.float64, torch.float32):
        F = blocks.Outer(a.to(dtype), g.to(dtype))
        # with many positions the gradients are formed, and doubled as they are
        assert (F.columns.formed is None) == (positions == 1)
        damping = 1e-4 * F.trace().item() / F.size
        values.append(metrics.condition(blocks.Diagonal(F.diagonal()), F, damping))
        monkeypatch.setattr(metrics.invariant, "DENSE_SIZE", 0)
    assert F.columns.double.dtype == torch.float64 and F.columns.double is F.columns.double
    near(values[1], values[0], rel=1e-4)


SMALL_DAMPING = ["kfac", "ekfac", "tkfac", "diagonal", "eva", "mini_block", "exact"]


def slightly_damped(name, dtype):
    """`X` and `F` of three examples, and a damping of 1e-8 of the largest eigenvalue of `F`."""
    torch.manual_seed(0)
    model, x, labels = nn.Sequential(nn.Linear(40, 12)), randn(3, 40, seed=1), torch.arange(3)
    layer = fl.extract.capture(
        model.to(dtype), nn.CrossEntropyLoss(), x.to(dtype), labels, fisher_type="empirical"
    )["0"]
    F = fl.Exact()(layer)
    return fl.approximations.get(name)()(layer), F, 1e-5 * F.trace().item() / F.size


@pytest.mark.parametrize("name", SMALL_DAMPING)
@pytest.mark.parametrize("dense_size", [0, 10**4])
def test_condition_keeps_its_digits_where_it_is_large(name, dense_size, monkeypatch):
    """Up to 4e14. Each end is the largest eigenvalue of a matrix, known to all but 8 digits."""
    monkeypatch.setattr(metrics.invariant, "DENSE_SIZE", dense_size)
    X, F, damping = slightly_damped(name, torch.float64)
    x, f = (block.dense() + damping * torch.eye(F.size).double() for block in (X, F))
    ends = []
    for one, other in ((f, x), (x, f)):
        values, Q = torch.linalg.eigh(other)
        root = Q * values.clamp(min=damping).rsqrt() @ Q.mT
        ends.append(torch.linalg.eigvalsh(root @ one @ root)[-1])
    near(metrics.condition(X, F, damping), ends[0] * ends[1], rel=1e-6)


@pytest.mark.parametrize("name", SMALL_DAMPING)
@pytest.mark.parametrize("dense_size", [0, 10**4])
def test_condition_of_a_float32_model_is_that_of_float64(name, dense_size, monkeypatch):
    """A damping of 1e-8 of the largest eigenvalue: rounding of a product would be as large.

    No eigenvalue moves by more than some eps of itself, 1e-6, where the ranges are known.
    """
    monkeypatch.setattr(metrics.invariant, "DENSE_SIZE", dense_size)
    exact, single = (
        metrics.condition(*slightly_damped(name, dtype)) for dtype in (torch.float64, torch.float32)
    )
    near(single, exact, rel=1e-5)


def test_condition_of_a_singular_block_without_damping_has_no_bound():
    F = blocks.Dense(torch.diag(torch.tensor([0.0, 1, 2, 3]).double()), (2, 2))
    X = blocks.Dense(torch.diag(torch.tensor([1.0, 1, 1, 6]).double()), (2, 2))
    assert metrics.condition(X, F, 0.0) > 1e15


def test_invariant_measures_do_not_change_with_the_coordinates():
    """`F -> S F S`, `X -> S X S`, `damping I -> S damping S`: here `S = s I`."""
    X, F, x, f, _ = measured("linear", "tkfac")
    s = 7.0
    one, two = (blocks.Dense(s * s * m, X.shape) for m in (x, f))
    near(metrics.condition(one, two, s * s * DAMPING), metrics.condition(X, F, DAMPING), 1e-8)
    near(metrics.stein_loss(one, two, s * s * DAMPING), metrics.stein_loss(X, F, DAMPING), 1e-8)


# --- population -----------------------------------------------------------------------------------


def population(size, seed, o=2, i=3, m=2):
    """Inputs and output gradients of a small population, positions included."""
    return randn(size, 2, i, seed=seed), randn(m, size, 2, o, seed=seed + 1)


def test_the_squared_population_error_is_unbiased_by_enumeration():
    """Every sample of 3, with replacement, from a population of 4: `E` is the population's."""
    a, g = population(4, seed=1)
    f = blocks.Outer(a, g).dense()
    X = blocks.Kronecker(psd(2, seed=3), psd(3, seed=4))
    norms, squares = [], []
    for sample in itertools.product(range(4), repeat=3):
        reference = blocks.Outer(a[list(sample)], g[:, list(sample)])
        norms.append(metrics.population_norm(reference) ** 2)
        squares.append(metrics.population_estimate(X, reference).squared)
    near(torch.stack(norms).mean(), f.square().sum())
    near(torch.stack(squares).mean(), (X.dense() - f).square().sum())


def test_the_population_error_of_one_sample_is_its_formula():
    a, g = population(6, seed=5)
    X = blocks.Kronecker(psd(2, seed=3), psd(3, seed=4))
    D = torch.einsum("mnto,nti->mnoi", g, a).flatten(2)
    each = torch.einsum("mnx,mny->nxy", D, D)
    pairs = torch.stack([(each[j] * each[k]).sum() for j in range(6) for k in range(6) if j != k])
    products = (each * X.dense()).sum((1, 2))
    squared = X.dense().square().sum() - 2 * products.mean() + pairs.mean()
    reference = blocks.Outer(a, g)
    near(metrics.population_norm(reference), pairs.mean().sqrt())
    near(metrics.population_estimate(X, reference).squared, squared)
    # a layer in groups: squared errors and norms add
    two = blocks.DirectSum([reference, reference])
    near(metrics.population_estimate(blocks.DirectSum([X, X]), two).squared, 2 * squared)


def test_the_standard_error_is_the_spread_over_samples():
    a, g = population(300, seed=7)
    f = blocks.Outer(a, g).dense()
    damped = matrix_power(f, 1, 0.1)
    found = {scale: (blocks.Dense(scale * damped, (2, 3)), []) for scale in (0.3, 2.0, 4.0)}
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        sample = torch.randint(300, (60,), generator=generator)
        reference = blocks.Outer(a[sample], g[:, sample])
        for X, drawn in found.values():
            drawn.append(torch.stack(metrics.population_error(X, reference)))
    for X, drawn in found.values():
        errors, spreads = torch.stack(drawn).unbind(1)
        known = ~errors.isnan()
        assert float(known.double().mean()) > 0.9
        errors, spreads = errors[known], spreads[known]
        assert float(spreads.square().mean().sqrt() / errors.std()) == pytest.approx(1, abs=0.15)
        truth = (X.dense() - f).norm() / f.norm()
        assert float(errors.mean()) == pytest.approx(
            float(truth), abs=4 * float(errors.std()) / 20 + 0.02
        )


def test_what_no_population_error_exists_for():
    a, g = population(4, seed=1)
    X = blocks.Kronecker(psd(2, seed=3), psd(3, seed=4))
    for value in metrics.population_error(X, blocks.Outer(a[:2], g[:, :2])):
        assert math.isnan(value)
    for value in metrics.population_error(X, blocks.Outer(0 * a, g)):
        assert math.isnan(value)
    with pytest.raises(TypeError, match="the reference must be an exact block"):
        metrics.population_error(X, X)
    with pytest.raises(TypeError, match="groups needs an approximation in the same groups"):
        metrics.population_error(X, blocks.DirectSum([blocks.Outer(a, g[..., :1])] * 2))


# --- Gram -----------------------------------------------------------------------------------------


def test_gram_correlation_and_its_means():
    a, g = population(6, seed=9, m=1)
    g[:, 2] = 0
    F = blocks.Outer(a, g)
    U = torch.einsum("mnto,nti->mnoi", g, a).flatten(0, 1).flatten(1)
    found = metrics.gram_correlation(F)
    for j, k in itertools.product(range(6), repeat=2):
        expected = float(j == k) if 2 in (j, k) else U[j] @ U[k] / U[j].norm() / U[k].norm()
        near(found[j, k], expected, abs=1e-12)
    assert metrics.zero_gradients(F) == 1
    labels = torch.tensor([0, 1, 0, 1, 1, 0])
    within = [found[j, k] for j in range(6) for k in range(6) if j != k and labels[j] == labels[k]]
    between = [found[j, k] for j in range(6) for k in range(6) if labels[j] != labels[k]]
    for value, values in zip(metrics.class_means(found, labels), (within, between), strict=True):
        near(value, torch.stack(values).mean())
    near(metrics.similarity(found, found), 1)
    other = metrics.gram_correlation(blocks.Outer(*population(6, seed=11, m=1)))
    keep = ~torch.eye(6, dtype=torch.bool)
    expected = torch.corrcoef(torch.stack([found[keep], other[keep]]))[0, 1]
    near(metrics.similarity(found, other), expected, 1e-9)
    K = U @ U.mT
    near(metrics.diagonal_share(F), K.diagonal().square().sum() / K.square().sum())
    layer, p = found_and_expected("conv", "empirical")
    D = p.D.flatten(1)
    scale = D.norm(dim=1)
    assert torch.allclose(metrics.gram_correlation(layer), D @ D.mT / scale[:, None] / scale)


def test_blocks_of_two_layers_have_no_metric():
    X, F, *_ = measured("linear", "kfac")
    other = fl.KFAC()(found_and_expected("conv", "exact")[0])
    with pytest.raises(ValueError, match="the blocks are on different weights"):
        metrics.relative_error(other, F)


def test_examples_own_blocks_are_known_of_exact_blocks_only():
    F = blocks.Outer(torch.ones(3, 1, 2), torch.ones(1, 3, 1, 2))
    for block in (
        blocks.RowBlocks(F.a, F.g, 1.0),
        F.power(-1, 0.1),
        blocks.Dense(torch.eye(4), (2, 2)),
    ):
        with pytest.raises(TypeError, match="exact block or a capture, got"):
            metrics.diagonal_share(block)


def _with_nan(of: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.tensor([math.nan]), of.flatten()[1:]]).view(of.shape)


@pytest.mark.parametrize("entries", ["dense", "diagonal", "exact"])
@pytest.mark.parametrize("side", ["approximation", "exact block"])
def test_nan_in_a_block_never_becomes_a_number(entries, side):
    a, g = randn(6, 1, 2, dtype=torch.float64), randn(1, 6, 1, 2, seed=1, dtype=torch.float64)
    scale = torch.tensor([4.0, 3.0, 2.0, 1.0])
    good, bad = {
        "dense": [blocks.Dense(f(scale).diag(), (2, 2)) for f in (torch.clone, _with_nan)],
        "diagonal": [blocks.Diagonal(f(scale).view(2, 2)) for f in (torch.clone, _with_nan)],
        "exact": [blocks.Outer(f(a), g) for f in (torch.clone, _with_nan)],
    }[entries]
    X, F = (bad, good) if side == "approximation" else (good, bad)
    for measure in ("relative_error", "absolute_error", "trace_ratio", "cosine", "scaled_error"):
        assert math.isnan(getattr(metrics, measure)(X, F)), measure
    for measure in (metrics.subspace_overlap, metrics.principal_angles, metrics.overlap_matrix):
        with pytest.raises(blocks.BlockError, match="has NaN or inf entries"):
            measure(X, F, 2)
    assert math.isnan(metrics.participation_ratio(bad))


def test_nan_in_a_matrix_of_numbers_stays_nan():
    none, some = torch.full((3, 3), math.nan), torch.eye(3) + 1
    assert math.isnan(metrics.dropped_mass(none))
    assert math.isnan(metrics.similarity(none, some))
    assert metrics.similarity_matrix([none, some]).isnan().any()
    assert metrics.layer_correlation(none)[0, 1].isnan()
    with pytest.raises(blocks.BlockError, match="values of shape .* has NaN or inf"):
        metrics.eigenvalue_groups(torch.tensor([2.0, math.nan]))
    near(metrics.similarity(torch.ones(3, 3), torch.arange(9.0).view(3, 3)), 0)
    assert all(mean.dtype == torch.float64 for mean in metrics.adjacent_similarity(some))


@pytest.mark.parametrize("share", [0.005, 0.012, 0.028, 0.05])
def test_a_small_relative_error_has_its_digits_in_float32(share):
    F = blocks.Outer(randn(30, 1, 6, seed=1).float(), randn(1, 30, 1, 5, seed=2).float())
    M = F.dense()
    noise = psd(30, seed=3).float()
    X = blocks.Dense(M + share * M.norm() / noise.norm() * noise, F.shape)
    expected = (X.dense().double() - M.double()).norm() / M.double().norm()
    assert metrics.relative_error(X, F).item() == pytest.approx(expected.item(), rel=1e-3)


@pytest.mark.parametrize(("a_unit", "g_unit"), [(1e-15, 1), (1e15, 1), (1, 1e10), (1e-5, 1e-10)])
def test_measures_of_float32_blocks_do_not_depend_on_the_unit(a_unit, g_unit):
    """Fourth powers left the range of float32: KFAC's cosine was NaN or 0."""
    a = randn(6, 1, 4, dtype=torch.float64).mul(a_unit).float()
    g = randn(2, 6, 1, 3, seed=1, dtype=torch.float64).mul(g_unit).float()
    G, A = (x.flatten(0, -2) for x in (g, a))
    one = {
        "F": blocks.Outer(a, g),
        "kfac": blocks.Kronecker(G.mT @ G / 6, A.mT @ A / 6),
        "rows": blocks.RowBlocks(a, g, 1 / 6),
    }
    two = {name: blocks.serialise.cast(block, torch.float64) for name, block in one.items()}
    for name in ("kfac", "rows"):
        for measure in (metrics.cosine, metrics.scaled_error, metrics.relative_error):
            near(measure(one[name], one["F"]), measure(two[name], two["F"]), rel=1e-4)


def test_squares_of_columns_whose_sides_are_far_apart_stay_in_the_range():
    a = randn(5, 1, 4, dtype=torch.float64).mul(1e25).float()
    g = randn(2, 5, 1, 3, seed=1, dtype=torch.float64).mul(1e-25).float()
    F, exact = blocks.Outer(a, g), blocks.Outer(a.double(), g.double())
    torch.testing.assert_close(F.diagonal().double(), exact.diagonal(), rtol=1e-5, atol=0)
    X, rows = blocks.RowBlocks(a, g, 0.2), blocks.RowBlocks(a.double(), g.double(), 0.2)
    torch.testing.assert_close(X.dense().double(), rows.dense(), rtol=1e-4, atol=1e-7)


def test_no_basis_of_a_null_space_is_taken_in_float32():
    """The eigenvalues that rounding leaves in a null space were told apart in float64."""
    g = torch.Generator().manual_seed(0)
    u = torch.randn(12, generator=g)
    X = blocks.Dense(torch.outer(u, u), (3, 4))
    F = blocks.Dense(psd(12, seed=1).float(), (3, 4))
    assert metrics.diagonalisation(X, F).isnan()
    inside = blocks.Dense(2 * torch.outer(u, u), (3, 4))
    near(metrics.diagonalisation(X, inside), 1, rel=1e-5)


@pytest.mark.parametrize("form", ["leading", "column sum", "mini-block", "dense"])
def test_no_basis_of_equal_eigenvalues_is_taken(form):
    V = torch.linalg.qr(randn(12, 12, seed=1))[0]
    three = torch.tensor([3.0, 1.0, 1.0], dtype=torch.float64)
    side = (V[:3, :3] * three) @ V[:3, :3].mT
    X = {
        "leading": lambda: blocks.Leading(V[:2].view(2, 3, 4), three[:2], three[0]),
        "column sum": lambda: blocks.ColumnSum(
            [
                blocks.Kronecker(torch.eye(3).double(), psd(3, seed=2, rank=1)),
                blocks.Diagonal(torch.ones(3, 1).double()),
            ]
        ),
        "mini-block": lambda: blocks.MiniBlock(
            torch.linalg.qr(randn(3, 1, 4, 4, seed=3))[0]
            @ torch.diag(torch.tensor([3.0, 1.0, 1.0, 1.0], dtype=torch.float64))
            @ torch.linalg.qr(randn(3, 1, 4, 4, seed=3))[0].mT
        ),
        "dense": lambda: blocks.Dense(torch.block_diag(side, side, side, side), (3, 4)),
    }[form]()
    F = blocks.Outer(randn(9, 1, 4, seed=4), randn(2, 9, 1, 3, seed=5))
    assert metrics.diagonalisation(X, F).isnan()
    near(metrics.diagonalisation(X, X), 1)


def test_a_sum_in_parts_beside_one_in_other_parts():
    one, two = (blocks.Diagonal(randn(k, 4, seed=k).square()) for k in (1, 2))
    X, F = blocks.DirectSum([one, two]), blocks.DirectSum([two, one])
    near(metrics.diagonalisation(X, F), 1)
    dense = [blocks.Dense(block.dense(), block.shape) for block in (X, F)]
    for measure in (metrics.relative_error, metrics.cosine):
        near(measure(X, F), measure(*dense))
    for measure in (metrics.condition, metrics.stein_loss, metrics.von_neumann_divergence):
        near(measure(X, F, 0.1), measure(*dense, 0.1), rel=1e-8)
    a, g = randn(12, 1, 4, seed=5), randn(1, 12, 1, 3, seed=6)
    exact = blocks.DirectSum([blocks.Outer(a, g[..., :2]), blocks.Outer(a, g[..., 2:])])
    with pytest.raises(TypeError, match="in the same groups"):
        metrics.population_error(X, exact)


def test_the_leading_directions_of_an_indefinite_block_are_no_rounding():
    u = randn(6, seed=1)
    negative = blocks.Dense(-torch.outer(u, u), (2, 3))
    assert metrics.alignment.default_rank(negative, 3) == 0
    mixed = torch.diag(torch.tensor([3.0, -1.0]).double())
    F = blocks.OuterSum(torch.eye(2, 3).double()[:, None], torch.ones(1, 2, 1, 2).double(), mixed)
    near(metrics.spectral_gap(F, 1), 1)


def test_a_part_that_is_a_multiple_of_the_identity_has_no_leading_directions():
    zero = torch.zeros(2, 1, 4, dtype=torch.float64), torch.zeros(1, 2, 1, 1, dtype=torch.float64)
    level = blocks.Outer(*zero, shift=2.0)
    F = blocks.DirectSum([level, blocks.Diagonal(torch.tensor([[1.0, 0.5, 0.2, 0.1]]).double())])
    for block in (level, F):
        with pytest.raises(ValueError, match="lie beside its range"):
            metrics.spectral_gap(block, 1)


def test_directions_beside_a_range_of_equal_eigenvalues_are_nobodys():
    F = blocks.Diagonal(torch.tensor([[4.0, 3.0, 2.0, 1.0]], dtype=torch.float64))
    a, g = torch.eye(2, 4).double()[:, None], torch.ones(1, 2, 1, 1).double()
    X = blocks.Outer(a * torch.tensor([2.0, 1.0]).double()[:, None, None], g, 1.0)
    near(metrics.subspace_overlap(X, F, 3), 2 / 3)
    shifted = blocks.Outer(X.a, X.g, 1.0, shift=0.5)
    near(metrics.subspace_overlap(shifted, F, 2), 1)
    assert metrics.subspace_overlap(shifted, F, 3).isnan()


@pytest.mark.parametrize("t", [1, 3])
def test_unseen_examples_that_are_all_alike_leave_no_interval_around_another_number(t):
    for seed in range(5):
        a = randn(1, t, 5, seed=seed).expand(30, -1, -1).contiguous()
        g = randn(1, 1, t, 4, seed=seed + 50).expand(-1, 30, -1, -1).contiguous()
        X = blocks.Diagonal(1e3 * randn(4, 5, seed=seed + 90).square())
        found = metrics.population_estimate(X, blocks.Outer(a, g))
        true = metrics.relative_error(X, blocks.Outer(a, g))
        for value in (found.error, found.low, found.high):
            near(value, true, rel=1e-6)


def test_a_block_of_float32_rounding_is_cast():
    Q = torch.linalg.qr(randn(60, 40, seed=1))[0].float()
    side = blocks.factor.Subspace(Q, psd(40, seed=2, rank=2).float())
    X = blocks.Kronecker(torch.eye(2), side)
    assert not torch.equal(X.A, X.A.mT)
    near(blocks.serialise.cast(X, torch.float64).trace(), X.trace(), rel=1e-6)
