"""Every form of block against its dense matrix, and what the dense matrix cannot show."""

import copy
import math

import pytest
import torch
from block_laws import CASES, built, orthonormal
from hypothesis import given, settings
from hypothesis import strategies as st
from references import randn

import fisherlab as fl
from fisherlab import blocks
from fisherlab.blocks import Block, BlockError, BlockTooLarge, contractions, numerics
from fisherlab.blocks.factor import factor_of
from fisherlab.blocks.roots import Rooted, moment_root
from fisherlab.blocks.serialise import cast
from fisherlab.testing import check_block
from fisherlab.testing.blocks import LAWS, columns, matrix_power, psd
from fisherlab.testing.laws import near, number

DTYPES = [torch.float64, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_laws(name, dtype):
    check_block(*built(name, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_inner_product_with_every_form(name, dtype):
    block, matrix = built(name, dtype)
    for other_name in CASES:
        other, other_matrix = built(other_name, dtype)
        scale = (matrix.norm() * other_matrix.norm()).item()
        number(block.inner(other), (matrix * other_matrix).sum(), dtype, scale)
    number(block.inner(block), matrix.square().sum(), dtype)


@pytest.mark.parametrize("name", CASES)
def test_base_class_says_the_same(name):
    """Each override against the definition it replaces."""
    block, _ = CASES[name](torch.float64)
    V = randn(2, *block.shape, seed=1)
    Q_G, Q_A = randn(block.shape[0], 2, seed=2), randn(block.shape[1], 3, seed=3)
    a, g = randn(3, 2, block.shape[1], seed=4), randn(2, 3, 2, block.shape[0], seed=5)
    calls = {
        "quadratic": (V,),
        "column_quadratics": (a, g),
        "trace": (),
        "squared_norm": (),
        "diagonal": (),
        "eigenvalues": (),
        "rotated_diagonal": (Q_G, Q_A),
        "logdet": (0.3,),
        "dense": (),
        "solve": (V, 0.3),
    }
    scale = block.squared_norm().sqrt().item()
    for method, arguments in calls.items():
        ours, base = getattr(block, method)(*arguments), getattr(Block, method)(block, *arguments)
        near(ours, base, torch.float64, scale=scale), method


@pytest.mark.parametrize("name", CASES)
def test_what_a_block_keeps_belongs_to_it_alone(name):
    """A block is a value: of tensors that were changed in place, a new one is made."""

    def everything(block):
        pieces = [block.trace(), block.squared_norm(), block.logdet(1.0), block.eigenvalues()]
        pieces += [block.diagonal(), block.dense(), block.leading(2)[0]]
        pieces += [block.power(exponent, 1.0).dense() for exponent in (-1, -0.5, 0.5)]
        pieces += [block.rotated_diagonal(*bases), block.inner(other)]
        return [piece.flatten() for piece in pieces]

    block, _ = CASES[name](torch.float64)
    other, _ = built("kronecker", torch.float64)
    bases = other.eigen.Q_G, other.eigen.Q_A
    before = torch.cat(everything(block))
    bases_of_its_own = [getattr(block, name, None) for name in ("Q_G", "Q_A", "vectors")]
    for tensor in block.tensors():
        if any(tensor is Q for Q in bases_of_its_own):
            tensor.copy_(tensor.roll(1, 0))  # orthonormal as before
        else:
            tensor.mul_(0.7)
    state = blocks.to_dict(block)
    after, fresh = (
        torch.cat(everything(blocks.from_dict(x))) for x in (state, copy.deepcopy(state))
    )
    near(after, fresh, torch.float64)
    assert name == "outer_zero" or (before - after).norm() > 1e-3 * before.norm()


@pytest.mark.parametrize("name", CASES)
def test_memory_counts_the_tensors_and_no_cache(name):
    block, _ = CASES[name](torch.float64)
    size = block.memory_bytes()
    assert size == sum({id(x): x.numel() * 8 for x in block.tensors()}.values()) > 0
    block.eigenvalues(), block.power(-0.5, 1.0), block.logdet(1.0), block.leading(2)
    assert block.memory_bytes() == size


def test_memory_counts_a_shared_tensor_once():
    part = blocks.Diagonal(torch.ones(2, 3))
    assert blocks.DirectSum([part, part]).memory_bytes() == 24
    assert blocks.DirectSum([part, part]).formed_bytes() == 24


@pytest.mark.parametrize("examples", [5, 400])
def test_memory_is_counted_alike_for_all_methods(examples):
    """Layer 6 x 101: a few examples span a thin basis, many all of it."""
    torch.manual_seed(0)
    model = torch.nn.Linear(100, 6).double()
    x, y, CE = randn(examples, 100), torch.arange(examples) % 6, torch.nn.CrossEntropyLoss()
    frame = fl.compare(model, CE, x, y, fisher_type="empirical", dampings=0.1).frame
    rows = frame.set_index("approximation")
    o, i = 6, 101
    pair, entries = o * o + i * i, o * i
    formed = {
        "kfac": pair, "tkfac": pair, "shampoo": pair, "kronecker_optimal": pair,
        "ekfac": pair + entries, "tekfac": pair + entries, "diagonal": entries,
        "mini_block": o * i * i,
    }  # fmt: skip
    for name, numbers in formed.items():
        assert rows.loc[name, "formed_bytes"] == 8 * numbers, name
    for name in ("eva", "ifang"):  # vectors, never a matrix
        assert rows.loc[name, "formed_bytes"] == rows.loc[name, "memory_bytes"] <= 8 * (o + i + 6)
    assert rows.loc["exact", "formed_bytes"] == 8 * (o * i) ** 2
    assert rows.loc["exact", "memory_bytes"] == 8 * examples * (o + i)
    kept = rows["memory_bytes"]
    if examples == 5:
        # rows of inputs, or vectors of the same span; five gradients of six entries are a matrix
        assert kept["mini_block"] == kept["exact"] == 8 * 5 * (o + i)
        assert kept["kfac"] == kept["tkfac"] == 8 * (5 * i + o * o)
        assert kept["kfac"] <= kept["ekfac"] < 1.2 * kept["kfac"]
        assert kept["shampoo"] < 1.2 * kept["kfac"]
    else:
        assert kept["kfac"] == 8 * pair and kept["tkfac"] == 8 * pair
        assert 8 * (pair + entries) <= kept["ekfac"] <= 1.02 * 8 * (pair + entries)


@pytest.mark.parametrize("name", CASES)
def test_state_survives_a_dictionary(name):
    block, _ = CASES[name](torch.float32)
    again = blocks.from_dict(blocks.to_dict(block))
    assert again.dtype == torch.float32 and repr(again) == repr(block)
    assert torch.equal(again.dense(), block.dense())
    wider = cast(block, torch.float64)
    assert wider.dtype == torch.float64 and type(wider) is type(again)
    near(wider.dense(), block.dense(), torch.float32)


@pytest.mark.parametrize("name", CASES)
def test_blocks_work_in_inference_mode(name):
    with torch.inference_mode():
        block, matrix = CASES[name](torch.float64)
        number(block.logdet(1.0), (matrix + torch.eye(len(matrix))).logdet(), torch.float64, 1)
        near(block.power(-1, 1.0).dense(), matrix_power(matrix, -1, 1.0), torch.float64)


# --- outer blocks of any shape --------------------------------------------------------------------


@st.composite
def outer_blocks(draw):
    n, t, m = (draw(st.integers(1, top)) for top in (7, 6, 4))
    o, i = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    seed, dtype = draw(st.integers(0, 1000)), draw(st.sampled_from(DTYPES))
    a, g = randn(n, t, i, seed=seed, dtype=dtype), randn(m, n, t, o, seed=seed + 1, dtype=dtype)
    kind = draw(st.sampled_from(["generic", "repeated", "some zero", "all zero", "one output"]))
    if kind == "repeated":
        a, g = a[:1].repeat(n, 1, 1), g[:, :1].repeat(1, n, 1, 1)
    elif kind == "some zero":
        g[:, ::2] = 0
    elif kind == "all zero":
        g[:] = 0
    elif kind == "one output":
        g[..., 1:] = 0
    shift = draw(st.sampled_from([0.0, 0.0, 0.25]))
    full = draw(st.booleans())
    core = psd(m * n, seed=seed + 2) / n if full else 1 / n
    C = core if full else core * torch.eye(m * n, dtype=torch.float64)
    U = columns(a, g)
    matrix = U @ C @ U.mT + shift * torch.eye(o * i, dtype=torch.float64)
    return blocks.Outer(a, g, core, shift), matrix


@settings(max_examples=60)
@given(outer_blocks(), st.sampled_from(sorted(LAWS)))
def test_laws_of_an_outer_block_of_any_shape(case, law):
    block, matrix = case
    if law == "power" and matrix.norm() > 0:
        values = torch.linalg.eigvalsh(matrix)
        # ill-conditioned beyond what the tolerance covers, yet not singular
        if 1e-9 < values[0] / values[-1] < 1e-3:
            return
    if law == "scalars" and block.shift == 0 and len(matrix) <= block.num_columns:
        return  # log det of a nearly singular matrix
    LAWS[law](block, matrix, block.dtype)


@settings(max_examples=40)
@given(outer_blocks(), st.sampled_from([1e-8, 1e-5, 1e-2, 1.0]))
def test_woodbury_inverse_is_the_inverse(case, relative):
    """Including `(1/lambda)(I - V V^T)`, what the inverse is outside the range of the columns."""
    block, matrix = case
    damping = relative * torch.linalg.eigvalsh(matrix)[-1].item() or 1.0
    inverse = block.power(-1, damping)
    expected = matrix_power(matrix, -1, damping)
    base = 1 / (damping + block.shift)
    tolerance = 1e-15 / relative + 1e-12 if block.dtype == torch.float64 else 1e-6
    assert (inverse.dense() - expected).norm() <= tolerance * base * len(matrix)
    values, Q = torch.linalg.eigh(matrix)
    outside = Q[:, values - block.shift <= 1e-12 * values[-1].abs()]
    if outside.shape[1]:
        V = outside.mT.reshape(-1, *block.shape).to(block.dtype)
        assert ((inverse @ V).double() / base - V.double()).abs().max() < max(tolerance, 1e-5)


@pytest.mark.parametrize("t", [1, 4])
def test_float32_inverse_of_a_gradient_keeps_its_digits_at_tiny_damping(t):
    """The step of natural gradient: a vector in the range, where Woodbury's two terms cancel."""
    a, g = randn(6, t, 120, seed=1), randn(2, 6, t, 80, seed=2)
    V = contractions.combine(a.float(), g.float(), torch.ones(2, 6))
    exact = blocks.Outer(a.float().double(), g.float().double())
    damping = 1e-8 * exact.eigenvalues()[0].item()
    for exponent in (-1, -0.5):
        ours = blocks.Outer(a.float(), g.float()).power(exponent, damping) @ V
        # V itself is rounded: what of it lies outside the range is divided by the damping
        inside = exact.power(exponent, damping) @ V.double()
        assert (ours.double() - inside).norm() < 1e-3 * inside.norm()
    logdet = blocks.Outer(a.float(), g.float()).logdet(damping)
    assert abs(logdet - exact.logdet(damping)) < 1e-4 * exact.size


def test_float32_rank_is_that_of_the_data():
    a, g = randn(40, 1, 30, seed=1, dtype=torch.float32), randn(1, 40, 1, 20, seed=2).float()
    a[20:], g[:, 20:] = a[:20], g[:, :20]
    block = blocks.Outer(a, g)
    assert len(block.leading(40)[0]) == 20
    assert (block.eigenvalues() > 0).sum() == 20


def test_powers_share_the_gram_matrix(monkeypatch):
    block, _ = CASES["outer"](torch.float64)
    block.gram()
    monkeypatch.setattr(contractions, "gram", None)
    inverse = block.power(-1, 0.1)
    inverse.trace(), inverse.squared_norm(), inverse.power(0.5, 0.1).trace(), block.inner(inverse)


def test_rotated_gradients_are_computed_once(monkeypatch):
    outer, F = CASES["outer"](torch.float64)
    kronecker, X = CASES["kronecker"](torch.float64)
    kronecker.diagonal_of(outer)
    monkeypatch.setattr(contractions, "rotated_diagonal", None)
    monkeypatch.setattr(contractions, "kronecker_quadratic", None)
    kronecker.diagonal_of(outer)
    number(outer.inner(kronecker), (F * X).sum(), torch.float64)


# --- single forms ---------------------------------------------------------------------------------


def test_factored_power_damps_the_factors(generator):
    G, A = psd(3, seed=1), psd(4, seed=2)
    power = blocks.Kronecker(G, A).factored_power(-0.5, 0.1, 0.2)
    expected = torch.kron(matrix_power(G, -0.5, 0.1), matrix_power(A, -0.5, 0.2))
    near(power.dense(), expected, torch.float64)


def test_inverse_of_from_inverse_is_untouched():
    inner = CASES["kronecker"](torch.float64)[0]
    assert blocks.FromInverse(inner).power(-1, 0.0) is inner


def test_indefinite_matrices_are_clamped_and_say_so():
    matrix = torch.diag(torch.tensor([2.0, 1.0, -1.0, 0.0], dtype=torch.float64))
    block = blocks.Dense(matrix, (2, 2))
    assert block.clamped == pytest.approx(0.25)
    near(block.power(0.5).dense().square(), matrix.clamp(min=0), torch.float64)
    G = torch.stack([torch.eye(2), -torch.eye(2)]).double()
    A = torch.stack([torch.eye(2), torch.diag(torch.tensor([0.0, 4.0]))]).double()
    assert blocks.KroneckerSum(G, A).clamped == pytest.approx(0.75)


def test_every_form_of_an_indefinite_matrix_states_its_share_below_zero():
    values = torch.tensor([3.0, 1.0, -1.0], dtype=torch.float64)
    columns = torch.eye(3).double().view(1, 3, 1, 3), torch.ones(3, 1, 1).double()
    forms = [
        blocks.Diagonal(values[:, None]),
        blocks.Kronecker(values.diag(), torch.ones(1, 1).double()),
        blocks.Kronecker(values, torch.ones(1, 1).double()),
        blocks.KroneckerSum(values.diag()[None], torch.ones(1, 1, 1).double()),
        blocks.MiniBlock(values.view(3, 1, 1, 1)),
        blocks.Leading(torch.eye(3).double()[:2, :, None], values[:2], values[2]),
        blocks.Eigen(None, None, values[:, None]),
        blocks.OuterSum(columns[1], columns[0], values.diag()),
    ]
    for block in forms:
        near(block.eigenvalues(), values, torch.float64)
        assert block.clamped == pytest.approx(0.2), block
    both = blocks.Kronecker(values.diag(), values.diag())
    assert both.clamped == pytest.approx(8 / 25)
    # eigenvalues that are rounding of the largest count as zero
    assert blocks.Diagonal(torch.tensor([[1.0, -1e-8]])).clamped == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_leading_vectors_of_columns_of_very_different_lengths_are_orthogonal(dtype):
    sizes = torch.logspace(0, -8, 6, dtype=torch.float64)
    a, g = randn(6, 1, 5, seed=1) * sizes[:, None, None], randn(1, 6, 1, 4, seed=2)
    F = blocks.Outer(a.to(dtype), g.to(dtype))
    for block in (F, F.power(0.5, 1e-9), blocks.OuterSum(a.to(dtype), g.to(dtype), psd(6, seed=3))):
        values, vectors = block.leading(6)
        flat = vectors.double().flatten(1)
        near(flat @ flat.mT, torch.eye(len(values)), dtype, bound=100 * torch.finfo(dtype).eps)
        products = (block @ vectors).double().flatten(1)
        near(products, values[:, None] * flat, dtype)


def test_a_diagonal_is_exact_over_a_wide_range():
    entries = torch.tensor([[1e-12, 1.0], [1e9, 1e-3]])
    assert torch.equal(blocks.Diagonal(entries).power(-1).entries, 1 / entries)
    with pytest.raises(BlockError, match="damping"):
        blocks.Diagonal(torch.tensor([[0.0, 1.0]])).power(-1)


def test_gram_of_a_direct_sum_is_that_of_the_whole_layer():
    block, _ = CASES["direct_sum_of_outers"](torch.float64)
    U = torch.cat([columns(part.a, part.g) for part in block.parts])
    near(block.gram(), U.mT @ U, torch.float64)
    with pytest.raises(BlockError, match="Gram matrix, got .*Kronecker"):
        CASES["direct_sum"](torch.float64)[0].gram()


def test_sample_has_the_laplace_covariance():
    block, matrix = CASES["outer"](torch.float64)
    generator = torch.Generator().manual_seed(1)
    draws = torch.stack([block.sample(0.5, generator).flatten() for _ in range(4000)])
    expected = matrix_power(matrix, -1, 0.5)
    assert (draws.mT @ draws / 4000 - expected).norm() < 0.15 * expected.norm()


@pytest.mark.parametrize(
    "make",
    [
        lambda: blocks.Dense(torch.eye(5), (2, 3)),
        lambda: blocks.Outer(torch.ones(3, 2, 4), torch.ones(1, 2, 2, 5)),
        lambda: blocks.Outer(torch.ones(0, 2, 4), torch.ones(1, 0, 2, 5)),
        lambda: blocks.Kronecker(torch.ones(2, 3), torch.eye(2)),
        lambda: blocks.KroneckerSum(torch.ones(2, 3, 3), torch.ones(1, 2, 2)),
        lambda: blocks.Eigen(torch.eye(3), torch.eye(4), torch.ones(4, 3)),
        lambda: blocks.DirectSum([]),
        lambda: blocks.DirectSum([blocks.Diagonal(torch.ones(2, i)) for i in (2, 3)]),
    ],
)
def test_shapes_that_do_not_fit_are_refused(make):
    with pytest.raises(BlockError, match="got"):
        make()


# --- layers too large for a dense matrix ----------------------------------------------------------


@pytest.fixture
def no_dense(monkeypatch):
    monkeypatch.setattr(numerics, "free_memory", lambda device: 0)


def test_a_large_outer_block_never_goes_dense(no_dense):
    o, i, n = 512, 4608, 8
    a, g = randn(n, 4, i, seed=1, dtype=torch.float32), randn(1, n, 4, o, seed=2).float()
    block, V = blocks.Outer(a, g), randn(o, i, seed=3).float()
    damping = 1e-3 * block.trace().item() / block.size
    inverse = block.power(-1, damping)
    other = blocks.Outer(a.flip(0), g)
    values, vectors = block.leading(10)
    assert len(values) == n and vectors.shape == (n, o, i)
    top = vectors[0]
    # top is rounded: what of it lies outside the range would be divided by a tiny damping
    large = values[0].item()
    near((block.power(-1, large) @ top) * 2 * large, top, torch.float32)
    number(block.quadratic(top), values[0], torch.float32)
    number(block.inner(block), block.squared_norm(), torch.float32)
    for pair in ((block, other), (block, inverse), (inverse, other.power(-1, damping))):
        assert pair[0].inner(pair[1]) > 0
    number(block.inner(inverse), (values / (values + damping)).sum(), torch.float32)
    diagonal = inverse.diagonal()
    number(diagonal.double().sum(), inverse.trace(), torch.float32)
    expected = (values + damping).log().sum() + (block.size - n) * torch.tensor(damping).log()
    number(block.logdet(damping), expected, torch.float32)
    assert (inverse @ V).isfinite().all() and inverse.quadratic(V) > 0
    assert len(block.eigenvalues()) == block.size
    with pytest.raises(BlockTooLarge, match="GiB"):
        block.dense()


def test_other_large_forms_never_go_dense(no_dense):
    o, i = 12, 20
    a, g = randn(4, 3, i, seed=1), randn(2, 4, 3, o, seed=2)
    exact, V = blocks.Outer(a, g), randn(o, i, seed=3)
    kronecker = blocks.Kronecker(psd(o, seed=4), psd(i, seed=5))
    forms = [
        kronecker,
        kronecker.power(-1, 0.1),
        blocks.KroneckerSum(psd(1, o, seed=6), psd(1, i, seed=7)),
        blocks.Diagonal(randn(o, i, seed=8).square()),
        blocks.MiniBlock(psd(o, 4, 5, seed=9)),
        blocks.MiniBlock(psd(o, 19, 1, seed=9), torch.ones(o, dtype=torch.float64)),
        blocks.FromInverse(kronecker),
        exact.power(-1, 0.1),
        blocks.Eigen(
            torch.eye(o)[:, :3].double(), torch.eye(i)[:, :4].double(), psd(4, seed=1)[:3]
        ),
    ]
    for block in forms:
        block.trace(), block.diagonal(), block.eigenvalues(), block.leading(10), block.logdet(0.1)
        assert block.quadratic(V) >= 0 and exact.inner(block) > 0
        assert block.diagonal_of(exact).isfinite().all()
        assert (block.power(-1, 0.1) @ V).isfinite().all()
    with pytest.raises(BlockTooLarge, match="no closed inner product of MiniBlock and Kronecker"):
        forms[4].inner(kronecker)
    with pytest.raises(BlockTooLarge, match="GiB"):
        whole = blocks.Kronecker(psd(2 * o, seed=4), psd(i, seed=5))
        blocks.DirectSum([kronecker, exact]).diagonal_of(whole)


@pytest.mark.slow
def test_a_large_kronecker_block_never_goes_dense(no_dense):
    o, i = 512, 4608
    block = blocks.Kronecker(psd(o, seed=1).float(), psd(i, seed=2, rank=i).float())
    V = randn(o, i, seed=3).float()
    values, vectors = block.leading(10)
    near(block @ vectors, values[:, None, None] * vectors, torch.float32)
    W = block.power(-1, 0.1) @ V
    near(block @ W + 0.1 * W, V, torch.float32)
    eigenvalues = block.eigenvalues()
    number(eigenvalues.sum(), block.trace(), torch.float32)
    number(eigenvalues.square().sum(), block.squared_norm(), torch.float32)
    number(block.logdet(0.1), (eigenvalues.clamp(min=0) + 0.1).log().sum(), torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", CASES)
def test_every_form_stays_on_its_device(name):
    def moved(value):
        if isinstance(value, dict):
            return {key: moved(item) for key, item in value.items()}
        if isinstance(value, list):
            return [moved(item) for item in value]
        return value.cuda() if isinstance(value, torch.Tensor) else value

    block, matrix = CASES[name](torch.float64)
    block = blocks.from_dict(moved(blocks.to_dict(block)))
    inverse = block.power(-1, 1.0)
    for value in (inverse.dense(), block.trace(), block.logdet(1.0), block.eigenvalues()):
        assert value.is_cuda
    assert block.sample(1.0).is_cuda and block.inner(inverse).is_cuda
    near(inverse.dense().cpu(), matrix_power(matrix, -1, 1.0), torch.float64)


def test_an_inverse_of_dependent_columns_keeps_its_digits(generator: torch.Generator) -> None:
    """The columns of an exact Fisher sum to zero: what they cancel is 1 / damping^2 in its core."""
    a = torch.randn(6, 1, 8, generator=generator, dtype=torch.float64)
    g = torch.randn(4, 6, 1, 30, generator=generator, dtype=torch.float64)
    g = g - g.mean(0)
    F = blocks.Outer(a, g)
    damping = 1e-8 * F.trace().item() / F.size
    D = F.dense() + damping * torch.eye(F.size, dtype=torch.float64)
    inside = F.columns.combine(torch.randn(4, 6, generator=generator, dtype=torch.float64))
    anything = torch.randn(30, 8, generator=generator, dtype=torch.float64)
    for V in (inside, anything, torch.stack([inside, anything])):
        expected = torch.linalg.solve(D, V.reshape(-1, F.size).mT).mT.view_as(V)
        for found in (F.solve(V, damping), F.power(-1, damping) @ V):
            assert (found - expected).norm() < 1e-5 * expected.norm()
    values = torch.linalg.eigvalsh(F.power(-1, damping).dense())
    assert values[0] > 0
    identity = F.power(-1, damping) @ (F.power(1, damping) @ inside)
    assert (identity - inside).norm() < 1e-4 * inside.norm()


def test_a_power_of_a_dense_block_is_never_formed_and_is_that_of_its_matrix(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    D, F = psd(15, seed=1), blocks.Outer(randn(4, 1, 5, seed=2), randn(2, 4, 1, 3, seed=3))
    X, V = blocks.Dense(D, (3, 5)), randn(4, 3, 5, seed=4)
    for exponent in (-1.0, -0.5, 0.5, 1.0, 2.0):
        expected = matrix_power(D, exponent, 0.1)
        P = X.power(exponent, 0.1)
        assert "matrix" not in vars(P) and P.memory_bytes() == 8 * (15 + 15**2)
        near(P @ V, (V.view(4, 15) @ expected).view(4, 3, 5), torch.float64)
        for inner in (P.inner(F), F.inner(P)):
            number(inner, (expected * F.dense()).sum(), torch.float64)
        number(P.trace(), expected.trace(), torch.float64)
        number(P.squared_norm(), expected.square().sum(), torch.float64)
        near(P.diagonal().flatten(), expected.diagonal(), torch.float64)
        assert not any("matrix" in key for key in vars(P))
        near(P.dense(), expected, torch.float64)
        near(P.power(-1, 0.2).dense(), matrix_power(expected, -1, 0.2), torch.float64)
        near(P.eigenvalues(), torch.linalg.eigvalsh(expected).flip(0), torch.float64)


def test_eigenvectors_of_float32_are_a_basis_in_float64():
    Q_G, Q_A = (torch.linalg.eigh(psd(d, seed=d).float())[1] for d in (30, 40))
    block = blocks.Eigen(Q_G, Q_A, torch.ones(30, 40))
    assert cast(block, torch.float64).trace() == pytest.approx(1200)
    with pytest.raises(BlockError, match="the columns of Q_A must be orthonormal"):
        blocks.Eigen(Q_G, 1.01 * Q_A, torch.ones(30, 40))


def test_a_saved_inverse_is_the_inverse_to_the_last_bit():
    """Its core's eigenpairs were found anew, and a run that was resumed differed by rounding."""
    a, g = randn(5, 1, 4, dtype=torch.float64), randn(2, 5, 1, 3, seed=1, dtype=torch.float64)
    X = blocks.Outer(a, g).power(-1, 0.1)
    again = blocks.from_dict(blocks.to_dict(X))
    assert torch.equal(X.dense(), again.dense())
    state = {k: v for k, v in blocks.to_dict(X).items() if k not in ("W", "d", "orthonormal")}
    earlier = blocks.from_dict({**state, "core": X.core})
    torch.testing.assert_close(earlier.dense(), X.dense())
    with pytest.raises(blocks.BlockError, match="W must be a tensor"):
        blocks.from_dict(state)
    # directions that are not there have no eigenvalue, whatever the power
    Q_G, Q_A = torch.eye(3, 2).double(), torch.eye(4).double()
    thin = blocks.Eigen(Q_G, Q_A, torch.ones(2, 4).double()).power(-1, 0.5)
    saved = blocks.to_dict(thin)
    for key, value in blocks.to_dict(blocks.from_dict(saved)).items():
        assert key == "form" or torch.equal(value, saved[key])


def test_a_root_knows_its_eigenvalues_that_may_be_rounding():
    """2e-7 of float32 is kept, as the spectrum runs on to it, and its root moves Stein's loss."""
    side, one = factor_of(torch.diag(torch.tensor([1.0, 1e-5, 2e-7]))), factor_of(torch.eye(2))
    block = Rooted(side, one, moment_root(side), moment_root(one))
    root = math.sqrt(2e-7)
    share = root / (1 + math.sqrt(1e-5) + root)
    assert block.trace_below_rounding == pytest.approx(share, rel=1e-4)


def far_apart(axes, t, seed=0):
    """Columns in float32 whose inputs lie up to 1e30 apart, and whose gradients make up for it."""
    a, g = randn(5, t, 4, seed=seed), randn(2, 5, t, 3, seed=seed + 1)
    apart = 10 ** (30 * (torch.linspace(0, 1, 5 * t, dtype=torch.float64) - 0.5)).view(5, t, 1)
    apart = apart if axes == "positions" else apart[:, :1]
    a, g = a * apart, g / apart
    a[2], g[:, 2] = 0, 1e15  # a dead example has gradients of any size
    return a.float(), g.float()


@pytest.mark.parametrize("axes", ["columns", "positions"])
@pytest.mark.parametrize("t", [1, 3, 12])
def test_columns_whose_sides_are_far_apart_are_those_of_float64(axes, t):
    a, g = far_apart(axes, t)
    V, c = randn(2, 3, 4, seed=2).float(), randn(2, 2, 5, seed=3).float()
    Q_G, Q_A = orthonormal(3, 2, seed=4), orthonormal(4, 3, seed=5)
    both = [blocks.Outer(a, g).columns, blocks.Outer(a.double(), g.double()).columns]
    for act in (
        lambda of: of.project(V.to(of.dtype)),
        lambda of: of.project_pairs(Q_G.to(of.dtype), Q_A[:, :2].to(of.dtype)),
        lambda of: of.combine(c.to(of.dtype)),
        lambda of: of.energies,
        lambda of: of.gram,
        lambda of: of.squares,
        lambda of: of.rotated_squares(Q_G.to(of.dtype), Q_A.to(of.dtype)),
        lambda of: of.left_diagonal(Q_G.to(of.dtype)),
        lambda of: of.right_diagonal(Q_A.to(of.dtype)),
        lambda of: of.grouped_moments(2, 2),
    ):
        found, true = (act(of) for of in both)
        assert found.isfinite().all()
        near(found, true, torch.float32, bound=1e-5)


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("name", CASES)
def test_column_quadratics_have_their_digits_at_any_size(name, size):
    block, F = built(name, torch.float32)
    o, i = block.shape
    for t in (1, 3):
        a, g = randn(4, t, i, seed=1) / size, randn(2, 4, t, o, seed=2) * size
        # columns lie apart as well
        g = (g * torch.logspace(-24, 0, 4, dtype=torch.float64)[:, None, None]).float()
        U = columns(a.float(), g)
        found, true = block.column_quadratics(a.float(), g).flatten(), (U * (F @ U)).sum(0)
        bound = F.norm() * U.square().sum(0)
        assert ((found - true).abs() <= 1e-5 * bound).all()
        near(blocks.Outer(a.float(), g).energies().flatten(), U.square().sum(0), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("damping", [1e-9, 1e-3, 10.0])
def test_the_inverse_of_a_block_of_full_rank_does_not_cancel_at_a_small_damping(dtype, damping):
    """`I / damping` on a space that the range leaves nothing of cost all digits."""
    a, g = randn(30, 1, 3, seed=1, dtype=dtype), randn(1, 30, 1, 2, seed=2, dtype=dtype)
    block = blocks.Outer(a, g)
    F = block.core * columns(a, g) @ columns(a, g).mT
    inverse, expected = (
        block.power(-1, damping),
        torch.linalg.inv(F + damping * torch.eye(6).double()),
    )
    bound = 1e-10 if dtype == torch.float64 else 1e-5
    near(inverse.dense(), expected, dtype, bound=bound)
    near(inverse.squared_norm(), expected.square().sum(), dtype, bound=bound)
    near(inverse.trace(), expected.trace(), dtype, bound=bound)


@pytest.mark.parametrize("share", [1e-2, 1e-4])
def test_a_block_of_positions_that_cancel_has_the_digits_of_what_it_is_made_of(share):
    a, g = randn(6, 1, 5, seed=1), randn(2, 6, 1, 9, seed=2)
    a = torch.cat([a, a + share * randn(6, 1, 5, seed=3)], 1).float()
    g = torch.cat([g, -g], 2).float()
    U = columns(a, g)
    sums = (U.square().sum(), (U.mT @ U).square().sum())
    core = torch.eye(12, dtype=torch.float64)
    for block in (blocks.Outer(a, g, 1.0), blocks.OuterSum(a, g, core)):
        loaded = blocks.from_dict(blocks.to_dict(block))
        for found in (block, loaded, block.power(1, 0.0)):
            near(found.trace(), sums[0], torch.float32, bound=1e-6 / share)
            near(found.squared_norm(), sums[1], torch.float32, bound=1e-6 / share)
