"""Columns of the table are what they say, for every block form, against dense float64 algebra."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fisherlab as fl
from fisherlab import blocks, metrics


def draw(*size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*size, generator=generator, dtype=torch.float64)


def exact(n: int, shape=(3, 4), seed: int = 0) -> blocks.Outer:
    """The exact block of n examples at one position."""
    o, i = shape
    return blocks.Outer(draw(n, 1, i, seed=seed), draw(1, n, 1, o, seed=seed + 1))


def leading(matrix: Tensor, k: int) -> Tensor:
    """Orthonormal columns of the k leading eigenvectors that are no null space, zeros after."""
    values, vectors = torch.linalg.eigh(matrix)
    top = vectors.flip(1)[:, :k] * (values.flip(0)[:k] > 1e-11 * values[-1])
    return top


def low_rank(form: str, rank: int) -> blocks.Block:
    """A block of that rank on a 3 x 4 weight, distinct eigenvalues, in each form."""
    F = exact(rank, seed=7)
    if form == "outer":
        return F
    if form == "dense":
        return blocks.Dense(F.dense(), F.shape)
    if form == "diagonal":
        entries = torch.zeros(12, dtype=torch.float64)
        entries[:rank] = torch.arange(rank, 0, -1)
        return blocks.Diagonal(entries.view(3, 4))
    if form == "mini_block":
        parts = torch.zeros(3, 2, 2, 2, dtype=torch.float64)
        for k in range(rank):
            row = draw(2, seed=k)
            parts[k % 3, k // 3] = torch.outer(row, row)
        return blocks.MiniBlock(parts)
    if form == "kronecker_sum":
        G, A = draw(1, 3, seed=3), draw(rank, 4, seed=4)
        return blocks.KroneckerSum((G.mT @ G)[None], (A.mT @ A)[None])
    Q_G, Q_A = (torch.linalg.qr(draw(d, d, seed=d)).Q for d in (3, 4))
    spectrum = torch.zeros(12, dtype=torch.float64)
    spectrum[:rank] = torch.arange(rank, 0, -1)
    if form == "eigen":
        return blocks.Eigen(Q_G, Q_A, spectrum.view(3, 4))
    assert form == "thin"
    values = torch.arange(rank, 0, -1, dtype=torch.float64)[None]
    return blocks.Eigen(Q_G[:, :1], Q_A[:, :rank], values)


FORMS = ["outer", "dense", "diagonal", "mini_block", "kronecker_sum", "eigen", "thin"]


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("form", FORMS)
def test_a_subspace_of_smaller_rank_misses_the_rest_in_every_form(form, rank):
    X, F, k = low_rank(form, rank), exact(6), 5
    assert torch.linalg.matrix_rank(X.dense()) == rank
    products = leading(X.dense(), k).mT @ leading(F.dense(), k)
    expected = products.square().sum() / k
    assert float(metrics.subspace_overlap(X, F, k)) == pytest.approx(float(expected), rel=1e-8)
    angles = metrics.principal_angles(X, F, k)
    assert len(angles) == k and (angles[rank:] == math.pi / 2).all()
    torch.testing.assert_close(angles.cos(), torch.linalg.svdvals(products), rtol=0, atol=1e-8)
    matrix = metrics.overlap_matrix(X, F, k)
    torch.testing.assert_close(matrix, products.mT.abs(), rtol=0, atol=1e-8)
    grouped = metrics.grouped_overlap(X, F, k, rtol=1e-9)
    assert len(grouped.sizes) == rank
    torch.testing.assert_close(grouped.matrix, matrix[:, :rank], rtol=0, atol=1e-8)


@pytest.mark.parametrize("form", FORMS)
def test_the_exact_subspace_has_the_rank_of_the_exact_block_in_every_form(form):
    """As `F`: k is lowered to its rank, whatever an eigensolver returns beyond it."""
    X, F = exact(6), low_rank(form, 2)
    products = leading(X.dense(), 2).mT @ leading(F.dense(), 2)
    expected = products.square().sum() / 2
    assert float(metrics.subspace_overlap(X, F, 9)) == pytest.approx(float(expected), rel=1e-8)
    assert len(metrics.principal_angles(X, F, 9)) == 2
    values = torch.linalg.eigvalsh(F.dense()).flip(0)
    assert float(metrics.spectral_gap(F, 9)) == pytest.approx(float(values[1] / values[0]))


def test_subspaces_of_grouped_layers_miss_the_rest_too():
    F, X = (
        blocks.DirectSum([exact(n, seed=s) for s in seeds])
        for n, seeds in ((4, (0, 2)), (1, (5, 9)))
    )
    products = leading(X.dense(), 6).mT @ leading(F.dense(), 6)
    expected = products.square().sum() / 6
    assert float(metrics.subspace_overlap(X, F, 6)) == pytest.approx(float(expected), rel=1e-8)


def test_a_block_of_zeros_has_no_subspace():
    zero, F = blocks.Dense(torch.zeros(12, 12, dtype=torch.float64), (3, 4)), exact(3)
    assert float(metrics.subspace_overlap(zero, F, 3)) == 0
    assert (metrics.principal_angles(zero, F, 3) == math.pi / 2).all()
    assert metrics.grouped_overlap(zero, F, 3).matrix.shape == (3, 0)
    assert float(metrics.spectral_gap(zero, 3)) == 0


@pytest.mark.parametrize("seed", range(3))
def test_overlaps_are_at_most_one_where_columns_nearly_depend(seed):
    """A confident softmax in float32: eigenvectors `U w / sqrt(lambda)` of small lambda."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    with torch.no_grad():
        model[2].weight.mul_(30)
    layers = fl.capture(model, nn.CrossEntropyLoss(), torch.randn(9, 6), torch.randint(4, (9,)))
    for layer in layers.values():
        F = fl.Exact()(layer)
        X = blocks.Dense(F.dense(), F.shape)
        for one in (F, X, fl.KFAC()(layer)):
            assert float(metrics.subspace_overlap(one, F, 10)) <= 1
            assert float(metrics.overlap_matrix(one, F, 10).max()) <= 1


def test_clamped_of_groups_is_a_share_of_the_whole():
    parts = []
    for seed, scale in ((1, 1.0), (2, 40.0), (3, 0.1)):
        G, A = draw(2, 3, 3, seed=seed), draw(2, 4, 4, seed=seed + 10)
        parts.append(blocks.KroneckerSum(scale * (G + G.mT), A + A.mT))
    parts.append(blocks.Diagonal(torch.rand(3, 4).double()))
    values = torch.linalg.eigvalsh(torch.block_diag(*(part.dense() for part in parts)))
    expected = -values.clamp(max=0).sum() / values.abs().sum()
    assert blocks.DirectSum(parts).clamped == pytest.approx(float(expected), rel=1e-10)


def test_clamped_counts_the_tails_of_a_thin_basis():
    Q_G, Q_A = torch.linalg.qr(draw(3, 2)).Q, torch.linalg.qr(draw(4, 2)).Q
    X = blocks.Eigen(Q_G, Q_A, draw(2, 2), draw(2), draw(2), draw(()))
    values = torch.linalg.eigvalsh(X.dense())
    expected = -values.clamp(max=0).sum() / values.abs().sum()
    assert X.clamped == pytest.approx(float(expected), rel=1e-10)


def test_what_rounding_may_hide_of_groups_is_a_share_of_the_whole():
    class Half(blocks.Diagonal):
        trace_below_rounding = 0.5

    parts = [Half(torch.ones(2, 3).double()), blocks.Diagonal(9 * torch.ones(2, 3).double())]
    assert blocks.DirectSum(parts).trace_below_rounding == pytest.approx(0.05)


def test_the_diagonal_share_does_not_depend_on_the_root_of_the_hessian():
    a, g = draw(5, 2, 4), draw(3, 5, 2, 3, seed=1)
    F = blocks.Outer(a, g)
    turned = blocks.Outer(a, torch.einsum("mk,knto->mnto", torch.linalg.qr(draw(3, 3)).Q, g))
    torch.testing.assert_close(F.dense(), turned.dense())
    each = [blocks.Outer(a[n : n + 1], g[:, n : n + 1]).dense() for n in range(5)]
    total = sum((p * q).sum() for p in each for q in each)
    expected = sum(p.square().sum() for p in each) / total
    for block in (F, turned):
        torch.testing.assert_close(metrics.diagonal_share(block), expected, rtol=1e-12, atol=0)


# --- diagonalisation where an eigensolver picks the basis ---


def shared_weights(fisher_type: str) -> tuple[fl.Captures, torch.nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 3), nn.Tanh()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(12, 3)).double()
    x, y = draw(6, 2, 4, 4), torch.arange(6) % 3
    return fl.capture(model, nn.CrossEntropyLoss(), x, y, fisher_type=fisher_type), model, x, y


def eigenvectors(matrix: Tensor, generator: torch.Generator) -> Tensor:
    """Those of `matrix`, with a basis of its null space drawn at random."""
    values, Q = torch.linalg.eigh(matrix)
    null = values <= 1e-13 * values[-1]
    k = int(null.sum())
    turn = torch.linalg.qr(torch.randn(k, k, generator=generator, dtype=torch.float64)).Q
    return torch.cat([Q[:, null] @ turn, Q[:, ~null]], 1)


FACTORS = {
    "kfac": fl.KFAC(),
    "tkfac": fl.TKFAC(),
    "reduce": fl.KFACReduce(),
    "shampoo": fl.Shampoo(),
    "of_gradient": fl.Shampoo(statistics="gradient"),
}


@pytest.mark.parametrize("target", ["empirical", "exact"])
@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("name", FACTORS)
def test_a_basis_that_nothing_defines_has_no_diagonalisation(name, corrected, target):
    factors = FACTORS[name]
    maker = fl.EKFAC(factors=factors) if corrected else factors
    captured = shared_weights("empirical")[0]
    against = captured if target == "empirical" else shared_weights(target)[0]
    generator, undefined = torch.Generator().manual_seed(1), 0
    for layer in captured:
        X, F = maker(captured[layer]), fl.Exact()(against[layer])
        product, f = factors(captured[layer]), F.dense()
        shares = []
        for _ in range(3):
            sides = [eigenvectors(side, generator) for side in (product.G, product.A)]
            Q = torch.kron(*sides)
            shares.append(float((Q.mT @ f @ Q).diagonal().square().sum() / f.square().sum()))
        found = float(metrics.diagonalisation(X, F))
        if max(shares) - min(shares) > 1e-7:
            assert math.isnan(found), layer
            undefined += 1
        else:
            assert found == pytest.approx(shares[0], rel=1e-8), layer
    own = name in ("kfac", "tkfac", "shampoo") and target == "empirical"
    assert undefined == 0 if own else undefined > 0 or name in ("kfac",)


def test_a_table_says_which_basis_nothing_defines():
    _, model, x, y = shared_weights("exact")
    names = [fl.KFAC(), fl.KFACReduce(), fl.EKFAC(factors=fl.KFACReduce())]
    frame = fl.compare(model, nn.CrossEntropyLoss(), x, y, approximations=names).frame
    missing = frame["diagonalisation"].isna()
    assert set(frame[missing]["approximation"]) == {"kfac_reduce", "ekfac"}
    assert (frame["note"].str.contains("the eigensolver picks the basis") == missing).all()
    assert frame["relative_error"].notna().all()


def test_factors_that_are_rounding_beside_the_block_define_no_basis():
    g = draw(1, 5, 2, 3, seed=1)
    g[:, :, 1] = -g[:, :, 0] * (1 + 1e-16 * draw(1, 5, 3, seed=2))  # sums over positions cancel
    F = blocks.Outer(draw(5, 2, 4), g)
    sums = draw(9, 3, seed=3) * 1e-17
    X = blocks.Kronecker(sums.mT @ sums, torch.arange(1.0, 5).double().diag())
    assert math.isnan(metrics.diagonalisation(X, F))
    assert not math.isnan(metrics.diagonalisation(blocks.Kronecker(X.G * 1e34, X.A), F))


def test_rows_of_zero_gradient_are_no_direction_of_the_range():
    """IFANG of four rows, two of which have no gradient, is IFANG of the directions it has."""
    model = nn.Linear(4, 3).double()
    x, y = draw(8, 4), draw(8, 3, seed=2)
    with torch.no_grad():
        y[2:6] = model(x[2:6])  # fitted: their gradients are zero
    (layer,) = fl.capture(model, nn.MSELoss(), x, y, fisher_type="empirical").values()
    X, F = fl.IFANG(rows=4)(layer), fl.Exact()(layer)
    values, Q = torch.linalg.eigh(X.dense())
    within = Q[:, values > 1e-12 * values[-1]]
    g, a = X.Q_G[:, X.g_energies > 1e-20], X.Q_A
    assert g.shape[1] == 2 and within.shape[1] == 8
    basis = torch.kron(g, a)
    expected = (basis.mT @ F.dense() @ basis).diagonal().square().sum() / F.dense().square().sum()
    assert float(metrics.diagonalisation(X, F)) == pytest.approx(float(expected), rel=1e-10)


# --- in float32 ---


@pytest.mark.parametrize("fisher_type", ["exact", "empirical"])
def test_terms_of_a_sum_of_products_are_counted_once_in_float32(fisher_type):
    """Two classes: the block is one product, and a second term is rounding."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2))
    x, y = draw(60, 5).float(), torch.arange(60) % 2
    options = {"approximations": ["kronecker_sum"], "fisher_type": fisher_type, "layers": ["2"]}
    (row, *_) = fl.compare(model, nn.CrossEntropyLoss(), x, y, **options).frame.itertuples()
    assert row.trace_ratio == pytest.approx(1, rel=1e-5) and row.relative_error < 1e-5
    layer = fl.capture(model, nn.CrossEntropyLoss(), x, y, fisher_type=fisher_type)["2"]
    X = fl.approximations.get("kronecker_sum")()(layer)
    assert (X.dense() - fl.Exact()(layer).dense()).norm() < 1e-5 * X.dense().norm()


@pytest.mark.parametrize("units", [(1e4, 1e6), (1e-9, 1.0)])
def test_columns_do_not_depend_on_the_unit_of_the_data_in_float32(units):
    """Squares of a block's entries leave the range of float32: prices of 1e6, inputs of 1e-9."""
    torch.manual_seed(0)
    x, y = draw(32, 4) * units[0], draw(32, 2, seed=1) * units[1]
    names = ["kfac", "diagonal", "kronecker_optimal", "ekfac", "mini_block"]
    columns = ["relative_error", "trace_ratio", "cosine", "diagonalisation", "direction_cosine"]
    found = []
    for dtype in (torch.float64, torch.float32):
        model = nn.Linear(4, 2, bias=False).to(dtype)
        nn.init.zeros_(model.weight)
        table = fl.compare(
            model, nn.MSELoss(), x.to(dtype), y.to(dtype), approximations=names,
            fisher_type="empirical", dampings=0.1,
        )  # fmt: skip
        found.append(table.frame.set_index("approximation")[columns].to_numpy())
    np.testing.assert_allclose(found[1], found[0], rtol=1e-3, atol=1e-5)
