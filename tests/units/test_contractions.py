"""Every contraction against the naive einsum over all per-example gradients."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from references import randn

from fisherlab.blocks import contractions
from fisherlab.testing.laws import near

# m, n, t, o, i: what the operation counts decide on
SIZES = {
    "one position": (3, 5, 1, 4, 6),
    "few positions": (2, 4, 2, 9, 8),
    "many positions": (2, 3, 25, 3, 4),
    "many examples": (1, 30, 3, 2, 3),
    "one of all": (1, 1, 1, 1, 1),
    "wide": (1, 2, 5, 2, 40),
}


def naive(a, g):
    return torch.einsum("nti,mnto->mnoi", a.double(), g.double())


def functions(m, n, t, o, i):
    """name -> (call, naive): every public contraction."""
    V = randn(2, 3, o, i, seed=1)
    many = randn(60, o, i, seed=2)
    c = randn(2, m, n, seed=3)
    Q_G, Q_A = randn(o, o, seed=4), randn(i, max(1, i // 2), seed=5)
    # not symmetric: the terms of a Kronecker sum may be antisymmetric
    G, A = randn(o, o, seed=6), randn(i, i, seed=7)
    k = 2 if i % 2 == 0 else 1
    Q = randn(o, i // k, k, k, seed=8)
    b, h = randn(4, 2, i, seed=9), randn(2, 4, 2, o, seed=10)
    other = naive(b, h).flatten(0, 1)
    x = contractions
    return {
        "per_example": (x.per_example, lambda D: D),
        "per_example_chunks": (
            lambda a, g: torch.cat([D.clone() for _, D in x.per_example_chunks(a, g)], 1),
            lambda D: D,
        ),
        "gram": (x.gram, lambda D: D.flatten(0, 1).flatten(1) @ D.flatten(0, 1).flatten(1).mT),
        "cross_gram": (
            lambda a, g: x.cross_gram(a, g, b.to(a), h.to(a)),
            lambda D: torch.einsum("roi,soi->rs", D.flatten(0, 1), other),
        ),
        "energies": (x.energies, lambda D: D.square().sum((-2, -1))),
        "project": (
            lambda a, g: x.project(a, g, V.to(a)),
            lambda D: torch.einsum("mnoi,aboi->abmn", D, V),
        ),
        "project many": (
            lambda a, g: x.project(a, g, many.to(a)),
            lambda D: torch.einsum("mnoi,boi->bmn", D, many),
        ),
        "project_pairs": (
            lambda a, g: x.project_pairs(a, g, Q_G[:, :1].to(a), Q_A[:, :1].to(a)),
            lambda D: torch.einsum("mnoi,ok,ik->kmn", D, Q_G[:, :1], Q_A[:, :1]),
        ),
        "combine": (
            lambda a, g: x.combine(a, g, c.to(a)),
            lambda D: torch.einsum("mnoi,bmn->boi", D, c),
        ),
        "diagonal": (x.diagonal, lambda D: D.square().sum((0, 1))),
        "rotated_diagonal": (
            lambda a, g: x.rotated_diagonal(a, g, Q_G.to(a), Q_A.to(a)),
            lambda D: (Q_G.mT @ D @ Q_A).square().sum((0, 1)),
        ),
        "rotated_diagonal thin": (
            lambda a, g: x.rotated_diagonal(a, g, Q_G[:, :1].to(a), Q_A[:, :1].to(a)),
            lambda D: (Q_G[:, :1].mT @ D @ Q_A[:, :1]).square().sum((0, 1)),
        ),
        "grouped_diagonal": (
            lambda a, g: x.grouped_diagonal(a, g, Q.to(a)),
            lambda D: (
                torch.einsum("mnock,ockl->mnocl", D.unflatten(-1, (-1, k)), Q).square().sum((0, 1))
            ),
        ),
        "grouped_moments": (
            lambda a, g: x.grouped_moments(a, g, i // k, k),
            lambda D: torch.einsum("mnock,mnocl->ockl", *2 * (D.unflatten(-1, (-1, k)),)),
        ),
        "kronecker_quadratic": (
            lambda a, g: x.kronecker_quadratic(a, g, G.to(a), A.to(a)),
            lambda D: (G @ D @ A.mT * D).sum((-2, -1)),
        ),
        "left_moment": (x.left_moment, lambda D: (D @ D.mT).sum((0, 1))),
        "left_moment with A": (
            lambda a, g: x.left_moment(a, g, A.to(a)),
            lambda D: (D @ A @ D.mT).sum((0, 1)),
        ),
        "right_moment": (x.right_moment, lambda D: (D.mT @ D).sum((0, 1))),
        "right_moment with G": (
            lambda a, g: x.right_moment(a, g, G.to(a)),
            lambda D: (D.mT @ G @ D).sum((0, 1)),
        ),
    }


NAMES = list(functions(1, 1, 1, 1, 1))
FLOAT64 = {"gram", "cross_gram", "energies", "kronecker_quadratic"}


def check(name, sizes, dtype, seed=0):
    m, n, t, o, i = sizes
    a, g = randn(n, t, i, seed=seed, dtype=dtype), randn(m, n, t, o, seed=seed + 1, dtype=dtype)
    call, reference = functions(*sizes)[name]
    value, expected = call(a, g), reference(naive(a, g))
    assert value.dtype == (torch.float64 if name in FLOAT64 else dtype)
    near(value, expected, dtype, scale=1e-3)


@pytest.mark.parametrize("workspace", [1, 2000, contractions.WORKSPACE])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_against_the_naive_einsum(name, sizes, workspace, monkeypatch):
    monkeypatch.setattr(contractions, "WORKSPACE", workspace)
    for dtype in (torch.float64, torch.float32):
        check(name, sizes, dtype)


@pytest.mark.parametrize(
    "name",
    [
        "gram",
        "cross_gram",
        "energies",
        "project many",
        "kronecker_quadratic",
        "left_moment",
        "left_moment with A",
        "right_moment",
        "right_moment with G",
    ],
)
def test_both_sides_of_the_operation_count_are_taken(name, monkeypatch):
    """With few positions no per-example gradient is formed, with many it is."""
    formed = []
    stacked = contractions.stacked
    monkeypatch.setattr(contractions, "stacked", lambda g: formed.append(1) or stacked(g))
    check(
        name, SIZES["few positions"] if name != "project many" else (4, 3, 1, 2, 9), torch.float64
    )
    assert not formed
    check(name, (1, 3, 40, 2, 3), torch.float64)
    assert formed


def test_rotation_takes_both_sides_of_the_operation_count(monkeypatch):
    rotated = []
    diagonal = contractions.diagonal
    monkeypatch.setattr(contractions, "diagonal", lambda a, g: rotated.append(1) or diagonal(a, g))
    check("rotated_diagonal thin", (1, 3, 2, 8, 9), torch.float64)
    assert rotated
    rotated.clear()
    check("rotated_diagonal", (1, 3, 40, 3, 4), torch.float64)
    assert not rotated


@given(
    st.sampled_from(NAMES),
    st.tuples(*(st.integers(1, top) for top in (4, 6, 12, 7, 8))),
    st.integers(0, 100),
)
def test_against_the_naive_einsum_at_any_size(name, sizes, seed):
    check(name, sizes, torch.float64, seed)


@pytest.mark.parametrize("workspace", [1, 777])
def test_chunks_stay_inside_the_workspace(workspace, monkeypatch):
    monkeypatch.setattr(contractions, "WORKSPACE", workspace)
    parts = list(contractions.slices(10, 100))
    assert [k for part in parts for k in range(part.start, part.stop)] == list(range(10))
    assert all(part.stop - part.start <= max(1, workspace // 100) for part in parts)


def test_a_float32_gram_matrix_is_that_of_its_columns():
    """Made in float64: in float32 it is indefinite at 1e-7 of its largest eigenvalue."""
    a, g = randn(30, 1, 50, seed=1, dtype=torch.float32), randn(1, 30, 1, 40, seed=2).float()
    a[15:], g[:, 15:] = a[:15], g[:, :15]
    values = torch.linalg.eigvalsh(contractions.gram(a, g))
    assert values[:15].abs().max() < 1e-13 * values[-1]


@pytest.mark.parametrize("t", [1, 40])
def test_a_cross_gram_of_the_same_inputs(t):
    a, g, h = randn(3, t, 3, seed=1), randn(1, 3, t, 2, seed=2), randn(2, 3, t, 2, seed=3)
    one, two = naive(a, g).reshape(3, -1), naive(a, h).reshape(6, -1)
    near(contractions.cross_gram(a, g, a, h), one @ two.mT, torch.float64)


def test_second_moment_sums_over_every_leading_axis():
    x = randn(2, 3, 4, 5, seed=1)
    near(contractions.second_moment(x), torch.einsum("abci,abcj->ij", x, x), torch.float64)
    empty = contractions.second_moment(x[:, :0])
    assert torch.equal(empty, torch.zeros(5, 5, dtype=torch.float64))


def test_moments_are_symmetric_and_strides_do_not_matter():
    a, g = randn(3, 6, 4, seed=1), randn(2, 3, 6, 5, seed=2)
    strided_a = a.transpose(1, 2).contiguous().transpose(1, 2)
    strided_g = g.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0)
    for name, (call, _) in functions(2, 3, 6, 5, 4).items():
        near(call(strided_a, strided_g), call(a, g), torch.float64)
        if name.endswith("moment"):
            assert torch.equal(call(a, g), call(a, g).mT)


def test_a_wide_symmetric_product_is_made_of_its_lower_half():
    X = randn(5, 700, seed=1)
    W = randn(5, 5, seed=2)
    W = W + W.mT
    near(contractions.symmetric_product(X, W @ X), X.mT @ W @ X, torch.float64)
    near(contractions.second_moment(X[:, None]), X.mT @ X, torch.float64)


def test_the_diagonal_of_wide_gradients_is_that_of_narrow_ones(monkeypatch):
    monkeypatch.setattr(contractions, "WIDE", 1)
    for name in ("diagonal", "rotated_diagonal thin"):
        for size in SIZES.values():
            check(name, size, torch.float64)
