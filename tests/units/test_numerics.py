"""Linear algebra that must not fail quietly."""

import math

import pytest
import torch
from block_laws import orthonormal
from references import randn

from fisherlab import blocks
from fisherlab.blocks import Block, BlockError, BlockTooLarge, numerics
from fisherlab.blocks.factor import factor_of
from fisherlab.blocks.numerics import GIB, cholesky, eigh, rank_of, spectrum_power, units
from fisherlab.blocks.work import cached
from fisherlab.testing.blocks import psd
from fisherlab.testing.laws import near

DTYPES = [torch.float64, torch.float32]


@pytest.fixture
def counted(monkeypatch):
    calls = []
    solve = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda S: calls.append(S.dtype) or solve(S))
    return calls


def test_a_decomposition_is_made_once(counted):
    S = factor_of(psd(5, seed=1))
    assert S.spectrum()[1] is S.spectrum()[1]
    assert len(counted) == 1
    blocks.Kronecker(S, S.scaled(2.0)).power(-1, 0.1)
    assert len(counted) == 1


def test_a_block_of_a_matrix_changed_in_place_has_the_new_numbers():
    S = psd(5, seed=1)
    before = blocks.Dense(S, (5, 1)).eigenvalues()
    blocks.Kronecker(S, S).eigenvalues()
    S.mul_(0.9).add_(torch.eye(5), alpha=0.1)
    near(blocks.Dense(S, (5, 1)).eigenvalues(), 0.9 * before + 0.1, torch.float64)
    expected = torch.linalg.eigvalsh(torch.kron(S, S)).flip(0)
    near(blocks.Kronecker(S, S).eigenvalues(), expected, torch.float64)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_error_names_the_matrix(bad):
    S = psd(4, seed=1)
    S[1, 2] = bad
    with pytest.raises(BlockError, match=r"output factor G of shape \(4, 4\) has NaN or inf"):
        blocks.Kronecker(S, psd(3, seed=2)).power(-1, 0.1)
    with pytest.raises(BlockError, match="input factor A"):
        blocks.Kronecker(psd(3, seed=2), S).leading(1)
    with pytest.raises(BlockError, match="dense block"):
        blocks.Dense(S, (2, 2)).eigenvalues()
    with pytest.raises(BlockError, match="Gram matrix"):
        blocks.Outer(S[:, None, :], torch.ones(1, 4, 1, 2).double()).power(-1, 0.1)
    with pytest.raises(BlockError, match="spectrum .* NaN or inf"):
        spectrum_power(torch.tensor([1.0, bad]), -1, 0.1, "spectrum")


def test_lapack_failures_go_to_float64_then_to_an_error(monkeypatch):
    solve, failures = torch.linalg.eigh, []

    def fails_in_float32(S):
        if S.dtype == torch.float32:
            failures.append(S)
            raise torch.linalg.LinAlgError("did not converge")
        return solve(S)

    monkeypatch.setattr(torch.linalg, "eigh", fails_in_float32)
    S = psd(4, seed=1).float()
    values, vectors = eigh(S)
    assert failures and values.dtype == vectors.dtype == torch.float32
    near(vectors * values @ vectors.mT, S, torch.float32)

    def fails(S):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    with pytest.raises(BlockError, match=r"eigendecomposition of Hadamard square, shape \(4, 4\)"):
        eigh(psd(4, seed=2), "Hadamard square")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeated_eigenvalues_have_the_right_subspaces(dtype):
    Q = orthonormal(6, 6, seed=1)
    exact = torch.tensor([1.0, 1.0, 1.0, 3.0, 3.0, 7.0], dtype=torch.float64)
    values, vectors = eigh((Q * exact @ Q.mT).to(dtype))
    near(values, exact, dtype)
    for part in (slice(0, 3), slice(3, 5), slice(5, 6)):
        near(vectors[:, part] @ vectors[:, part].mT, Q[:, part] @ Q[:, part].mT, dtype)


def test_an_asymmetric_rounding_is_symmetrised():
    S = psd(5, seed=1)
    noisy = S + 1e-9 * randn(5, 5, seed=2)
    near(eigh(noisy)[0], torch.linalg.eigvalsh((noisy + noisy.mT) / 2), torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_matrices(dtype):
    zeros = [
        blocks.Dense(torch.zeros(6, 6, dtype=dtype), (2, 3)),
        blocks.Kronecker(torch.zeros(2, 2, dtype=dtype), torch.zeros(3, 3, dtype=dtype)),
        blocks.Diagonal(torch.zeros(2, 3, dtype=dtype)),
        blocks.MiniBlock(torch.zeros(2, 1, 3, 3, dtype=dtype)),
        blocks.Outer(torch.ones(4, 1, 3, dtype=dtype), torch.zeros(1, 4, 1, 2, dtype=dtype)),
    ]
    eye = torch.eye(6, dtype=torch.float64)
    for block in zeros:
        near(block.power(-1, 0.5).dense(), 2 * eye, dtype)
        near(block.power(-0.5, 0.25).dense(), 2 * eye, dtype)
        assert block.power(0.5).dense().norm() == 0 == block.eigenvalues().norm()
        assert block.logdet(0.0) == -torch.inf
        assert block.clamped == 0
        for exponent in (-1, -0.5):
            with pytest.raises(BlockError, match="needs damping"):
                block.power(exponent)
        with pytest.raises(BlockError, match="damping"):
            block.solve(torch.ones(2, 3, dtype=dtype), 0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [5, 100, 400])
def test_singular_up_to_rounding_is_singular(d, dtype):
    U = randn(d, d // 2, seed=1, dtype=dtype)
    values = torch.linalg.eigvalsh(U @ U.mT)
    with pytest.raises(BlockError, match="its power -1 needs damping > 0"):
        spectrum_power(values, -1, 0.0, "factor")
    assert spectrum_power(values, -1, 1e-3, "factor").isfinite().all()
    assert rank_of(values, torch.finfo(dtype).eps) == d // 2


def test_ill_conditioned_is_not_singular():
    values = torch.tensor([1e-12, 1.0], dtype=torch.float64)
    near(spectrum_power(values, -1, 0.0, "factor"), 1 / values, torch.float64)
    tiny = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert spectrum_power(tiny, -1, 1e-30, "factor")[0] == pytest.approx(1e30)


def test_rank_of_nothing_and_of_zeros():
    assert rank_of(torch.zeros(0), 1e-16) == rank_of(torch.zeros(4), 1e-16) == 0


@pytest.mark.parametrize("damping", [-1e-12, float("nan"), float("inf")])
def test_impossible_dampings_are_refused(damping):
    with pytest.raises(BlockError, match="damping must be a finite number >= 0"):
        numerics.check_damping(damping)
    assert numerics.check_damping(torch.tensor(0.5)) == 0.5


def test_cholesky_names_the_matrix():
    S = psd(4, seed=1)
    near(cholesky(S) @ cholesky(S).mT, S, torch.float64)
    with pytest.raises(BlockError, match="kernel .* use a larger damping"):
        cholesky(-S, "kernel")
    S[0, 0] = torch.nan
    with pytest.raises(BlockError, match="kernel .* NaN or inf"):
        cholesky(S, "kernel")


def test_a_dense_refusal_names_the_size_and_the_way_on(monkeypatch):
    large = blocks.Kronecker(torch.eye(512), torch.eye(4608))
    with pytest.raises(BlockTooLarge) as refusal:
        large.dense()
    message = str(refusal.value)
    gib = (512 * 4608) ** 2 * 4 / GIB
    assert "Kronecker" in message and "2359296 x 2359296" in message
    assert f"{gib:.3g} GiB" in message
    for name in ("quadratic", "inner", "trace", "squared_norm", "power", "as_linear_operator"):
        assert f"`{name}`" in message and hasattr(Block, name)
    monkeypatch.setattr(numerics, "free_memory", lambda device: 4 * 36 * 8 - 1)
    small = blocks.Diagonal(torch.ones(2, 3, dtype=torch.float64))
    with pytest.raises(BlockTooLarge, match="6 x 6"):
        small.dense()
    monkeypatch.setattr(numerics, "free_memory", lambda device: 4 * 36 * 8)
    assert small.dense().shape == (6, 6)


def test_the_budget_is_a_quarter_of_what_is_free_and_at_most_4_gib(monkeypatch):
    device = torch.device("cpu")
    monkeypatch.setattr(numerics, "free_memory", lambda device: 100)
    assert numerics.dense_budget(device) == 25
    monkeypatch.setattr(numerics, "free_memory", lambda device: 1000 * GIB)
    assert numerics.dense_budget(device) == 4 * GIB


def test_errors_are_value_errors():
    assert issubclass(BlockTooLarge, BlockError) and issubclass(BlockError, ValueError)


def test_what_is_cached_is_made_once_and_known():
    class Thing:
        count = 0

        @cached
        def total(self):
            """The sum."""
            self.count += 1
            return 6

    thing = Thing()
    assert Thing.total.__doc__ == "The sum."
    assert Thing.total.known(thing) is None
    assert thing.total == thing.total == 6 and thing.count == 1
    assert Thing.total.known(thing) == 6


def test_a_damped_inverse_takes_no_eigenvectors(generator: torch.Generator) -> None:
    rows = torch.randn(40, 12, generator=generator, dtype=torch.float64)
    S = rows.T @ rows / 40
    expected = torch.linalg.inv(S + 0.1 * torch.eye(12, dtype=torch.float64))
    found = numerics.damped_inverse(S, 0.1)
    assert found is not None
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    # the power of a factor is the same one, known spectrum or not
    one = blocks.Kronecker(S, S).factored_power(-1.0, 0.1, 0.1)
    known = factor_of(S)
    known.spectrum()
    other = blocks.Kronecker(known, known).factored_power(-1.0, 0.1, 0.1)
    torch.testing.assert_close(one.A, other.A, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("damping", [0.0, 1e-7])
def test_damping_below_rounding_takes_the_eigenvalues(
    damping: float, generator: torch.Generator
) -> None:
    rows = torch.randn(4, 12, generator=generator)
    assert numerics.damped_inverse(rows.T @ rows, damping) is None


def test_a_float32_sum_of_products_is_that_of_float64(generator: torch.Generator) -> None:
    one, two = (torch.randn(300, 500, generator=generator) for _ in range(2))
    expected = (one.double() * two.double()).sum()
    size = one.double().norm() * two.double().norm()
    for x, y in ((one, two), (one, two.double()), (one.double(), two)):
        found = numerics.dot(x, y)
        assert found.dtype == torch.float64 and found.ndim == 0
        assert abs(found - expected) < 1e-8 * size
    square = one.T @ one
    assert numerics.trace_of(square).dtype == torch.float64
    torch.testing.assert_close(numerics.trace_of(square), square.double().trace())


@pytest.mark.parametrize("unit", [1e-4, 1e-6, 1e-7])
def test_a_solve_among_columns_of_one_large_direction(unit: float) -> None:
    """Inputs of `unit` beside a bias: eigenvalues of `unit^2` under one of 2."""
    draw = torch.Generator().manual_seed(5)
    a = torch.cat([unit * torch.randn(12, 1, 4, generator=draw), torch.ones(12, 1, 1)], 2)
    g = 1 + 10 * unit * torch.randn(1, 12, 1, 2, generator=draw)
    F = blocks.Outer(a, g)
    U = torch.einsum("nti,mnto->mnoi", a.double(), g.double()).reshape(12, 10)
    gradient = U.mean(0).float().view(2, 5)
    dense = U.mT @ U / 12 + 2e-4 * torch.eye(10, dtype=torch.float64)
    expected = torch.linalg.solve(dense, gradient.double().flatten())
    found = F.solve(gradient, 2e-4).flatten().double()
    assert (found - expected).norm() < 2e-3 * expected.norm()
    _, Z = F.columns.gram_eigen
    torch.testing.assert_close(Z.mT @ Z, torch.eye(10, dtype=torch.float64), rtol=0, atol=1e-12)


def test_numbers_of_eight_bits_are_looked_at():
    x = torch.ones(3).to(torch.float8_e4m3fn)
    assert numerics.all_finite(x)
    assert not numerics.all_finite((x.float() * math.nan).to(torch.float8_e4m3fn))


def test_a_unit_is_a_power_of_two_that_rounds_nothing():
    for dtype in (torch.float32, torch.float64):
        largest = torch.finfo(dtype).max
        for size in (1.0, 3e-38, 1e30, largest, 1e-45):
            x = randn(4, 3).to(dtype)
            x = x / x.abs().amax() * size
            part, unit = units(x)
            assert torch.equal(part * unit, x)
            assert 0.5 <= part.abs().amax() < 2 or not x.any()
    assert units(torch.zeros(2))[1] == 1
    assert units(torch.tensor([math.nan, 1.0]))[1] == 1
    assert units(torch.zeros(0))[0].numel() == 0
