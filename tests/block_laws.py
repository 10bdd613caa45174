"""The laws of blocks: a suite with one hole.

Give `CASES` a name and a pair (block, its matrix made without FisherLab); receive every law, in
both dtypes, and the inner product with every other case. All blocks act on a weight `[O, I]`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from references import randn
from scipy.sparse.linalg import eigsh
from torch import Tensor

from fisherlab import blocks
from fisherlab.blocks import Block, BlockError

O, I = 3, 9
TOLERANCE = {torch.float64: 1e-10, torch.float32: 5e-4}

Case = tuple[Block, Tensor]  # the block and its matrix [N, N] in float64


def psd(*shape: int, seed: int, rank: int | None = None) -> Tensor:
    """A random PSD matrix `[..., d, d]` of full rank by default; well conditioned then."""
    *batch, d = shape
    root = randn(*batch, d, rank or 3 * d, seed=seed)
    return root @ root.mT / root.shape[-1]


def orthonormal(d: int, k: int, seed: int) -> Tensor:
    return torch.linalg.qr(randn(d, d, seed=seed)).Q[:, :k].contiguous()


def matrix_power(matrix: Tensor, exponent: float, damping: float) -> Tensor:
    """`(F + damping I)^exponent` by NumPy; eigenvalues below rounding are zero."""
    values, Q = np.linalg.eigh(matrix.numpy())
    values = np.where(values > 1e-12 * np.abs(values).max(initial=0), values, 0) + damping
    return torch.from_numpy((Q * values**exponent) @ Q.T)


def columns(a: Tensor, g: Tensor) -> Tensor:
    """`U` `[N, m n]`, written as loops."""
    m, n, t = g.shape[:3]
    D = [
        sum(torch.outer(g[j, k, s], a[k, s]) for s in range(t)) for j in range(m) for k in range(n)
    ]
    return torch.stack(D).flatten(1).mT.double()


# --- the cases: name -> dtype -> (block, matrix) --------------------------------------------------

CASES: dict[str, Callable[[torch.dtype], Case]] = {}


def case(make: Callable[[torch.dtype], Case]) -> Callable[[torch.dtype], Case]:
    CASES[make.__name__] = make
    return make


@case
def dense(dtype):
    F = psd(O * I, seed=1).to(dtype)
    return blocks.Dense(F, (O, I)), F.double()


@case
def dense_rank_deficient(dtype):
    F = psd(O * I, seed=2, rank=5).to(dtype)
    return blocks.Dense(F, (O, I)), F.double()


def outer_case(m, n, t, seed, core=None, shift=0.0, repeat=False, scale=1.0):
    def make(dtype):
        a, g = randn(n, t, I, seed=seed, dtype=dtype), randn(m, n, t, O, seed=seed + 1, dtype=dtype)
        if repeat:
            a[1:], g[:, 1:] = a[:1], g[:, :1]
        a *= scale
        block = blocks.Outer(a, g, core, shift)
        U = columns(a, g)
        scalar = 1 / n if core is None else core
        C = core if isinstance(core, Tensor) else scalar * torch.eye(m * n, dtype=torch.float64)
        return block, U @ C @ U.mT + shift * torch.eye(O * I, dtype=torch.float64)

    return make


CASES |= {
    "outer": outer_case(2, 5, 1, seed=3),
    "outer_many_positions": outer_case(2, 3, 12, seed=4),
    "outer_shifted": outer_case(1, 6, 2, seed=5, core=0.7, shift=0.3),
    "outer_full_rank": outer_case(2, 25, 1, seed=6),
    "outer_repeated_example": outer_case(2, 4, 2, seed=7, repeat=True),
    "outer_one_example": outer_case(1, 1, 1, seed=8),
    "outer_zero": outer_case(2, 3, 1, seed=9, scale=0.0),
    "outer_full_core": outer_case(2, 4, 1, seed=10, core=psd(8, seed=11), shift=0.2),
    "outer_singular_core": outer_case(2, 4, 3, seed=12, core=psd(8, seed=13, rank=3)),
    "outer_full_core_repeated": outer_case(2, 3, 1, seed=14, core=psd(6, seed=15), repeat=True),
    "outer_full_core_full_rank": outer_case(2, 25, 1, seed=16, core=psd(50, seed=17)),
}


def powered(name, exponent, damping):
    def make(dtype):
        block, F = CASES[name](dtype)
        return block.power(exponent, damping), matrix_power(F, exponent, damping)

    return make


CASES |= {
    "outer_inverse": powered("outer", -1, 0.5),
    "outer_root": powered("outer_many_positions", 0.5, 0.0),
    "outer_inverse_root": powered("outer_shifted", -0.5, 0.1),
}


@case
def kronecker(dtype):
    G, A = psd(O, seed=20).to(dtype), psd(I, seed=21).to(dtype)
    return blocks.Kronecker(G, A), torch.kron(G, A).double()


@case
def kronecker_rank_deficient(dtype):
    G, A = psd(O, seed=22, rank=2).to(dtype), psd(I, seed=23, rank=4).to(dtype)
    return blocks.Kronecker(G, A), torch.kron(G, A).double()


@case
def kronecker_repeated_eigenvalues(dtype):
    return blocks.Kronecker(torch.eye(O, dtype=dtype), 2 * torch.eye(I, dtype=dtype)), (
        2 * torch.eye(O * I, dtype=torch.float64)
    )


@case
def kronecker_with_a_diagonal_output_factor(dtype):
    G, A = (0.1 + randn(O, seed=61).abs()).to(dtype), psd(I, seed=62).to(dtype)
    return blocks.Kronecker(G, A), torch.kron(G.diag(), A).double()


@case
def kronecker_with_a_diagonal_input_factor(dtype):
    G, A = psd(O, seed=63).to(dtype), randn(I, seed=64).clamp(min=0).to(dtype)
    return blocks.Kronecker(G, A), torch.kron(G, A.diag()).double()


def kronecker_sum_of(terms):
    def make(dtype):
        G, A = psd(terms, O, seed=24).to(dtype), psd(terms, I, seed=25).to(dtype)
        F = sum(torch.kron(x, y).double() for x, y in zip(G, A, strict=True))
        return blocks.KroneckerSum(G, A), F

    return make


CASES |= {"kronecker_sum": kronecker_sum_of(2), "kronecker_sum_of_one": kronecker_sum_of(1)}


@case
def kronecker_sum_with_an_antisymmetric_term(dtype):
    G, A = psd(2, O, seed=37), psd(2, I, seed=38)
    G[1], A[1] = (0.1 * (x - x.mT) for x in (randn(O, O, seed=39), randn(I, I, seed=40)))
    G, A = G.to(dtype), A.to(dtype)
    return blocks.KroneckerSum(G, A), sum(
        torch.kron(x, y).double() for x, y in zip(G, A, strict=True)
    )


@case
def eigen(dtype):
    Q_G, Q_A = orthonormal(O, O, seed=26), orthonormal(I, I, seed=27)
    spectrum = 0.1 + randn(O, I, seed=28).abs()
    Q = torch.kron(Q_G, Q_A)
    block = blocks.Eigen(Q_G.to(dtype), Q_A.to(dtype), spectrum.to(dtype))
    return block, Q * spectrum.flatten() @ Q.mT


@case
def eigen_in_output_coordinates(dtype):
    Q_A, spectrum = orthonormal(I, I, seed=65), 0.1 + randn(O, I, seed=66).abs()
    Q = torch.kron(torch.eye(O, dtype=torch.float64), Q_A)
    block = blocks.Eigen(None, Q_A.to(dtype), spectrum.to(dtype))
    return block, Q * spectrum.flatten() @ Q.mT


@case
def eigen_in_coordinates(dtype):
    spectrum = 0.1 + randn(O, I, seed=67).abs()
    return blocks.Eigen(None, None, spectrum.to(dtype)), spectrum.flatten().diag()


def thin_eigen(k_G, k_A, tails):
    """The matrix from a full basis whose spectrum is filled in with the tails."""

    def make(dtype):
        Q_G, Q_A = orthonormal(O, O, seed=29), orthonormal(I, I, seed=30)
        spectrum = 1 + randn(k_G, k_A, seed=31).abs()
        tail_G, tail_A = tails * randn(k_G, seed=32).abs(), tails * randn(k_A, seed=33).abs()
        tail = tails * torch.tensor(0.05, dtype=torch.float64)
        full = tail.repeat(O, I)
        full[:k_G, :k_A], full[:k_G, k_A:], full[k_G:, :k_A] = spectrum, tail_G[:, None], tail_A
        Q = torch.kron(Q_G, Q_A)
        parts = [x.to(dtype).contiguous() for x in (Q_G[:, :k_G], Q_A[:, :k_A], spectrum)]
        parts += [x.to(dtype) for x in (tail_G, tail_A, tail)] if tails else []
        return blocks.Eigen(*parts), Q * full.flatten() @ Q.mT

    return make


CASES |= {
    "eigen_thin": thin_eigen(2, 3, 0.1),
    "eigen_thin_inputs": thin_eigen(O, 3, 0.1),
    "eigen_thin_outputs": thin_eigen(2, I, 0.1),
    "eigen_low_rank": thin_eigen(1, 1, 0.0),
}


@case
def diagonal(dtype):
    entries = (0.1 + randn(O, I, seed=34).abs()).to(dtype)
    return blocks.Diagonal(entries), torch.diag(entries.flatten().double())


@case
def diagonal_with_zeros(dtype):
    entries = randn(O, I, seed=35).clamp(min=0).to(dtype)
    return blocks.Diagonal(entries), torch.diag(entries.flatten().double())


@case
def mini_block(dtype):
    inside = psd(O, 3, 3, seed=36).to(dtype)
    F = torch.block_diag(*inside.flatten(0, 1).double())
    return blocks.MiniBlock(inside), F


@case
def mini_block_with_bias(dtype):
    inside, bias = psd(O, 4, 2, seed=37).to(dtype), (0.1 + randn(O, seed=38).abs()).to(dtype)
    rows = [
        torch.block_diag(*x, b.reshape(1, 1)).double() for x, b in zip(inside, bias, strict=True)
    ]
    return blocks.MiniBlock(inside, bias), torch.block_diag(*rows)


@case
def row_blocks(dtype):
    a, g = randn(5, 1, I, seed=57, dtype=dtype), randn(2, 5, 1, O, seed=58, dtype=dtype)
    weights = g[:, :, 0].double().square().sum(0)
    rows = [0.3 * (a[:, 0].double().mT * w) @ a[:, 0].double() for w in weights.mT]
    return blocks.RowBlocks(a, g, 0.3), torch.block_diag(*rows)


@case
def from_inverse(dtype):
    block, F = kronecker(dtype)
    return blocks.FromInverse(block), torch.linalg.inv(F)


@case
def direct_sum(dtype):
    a = randn(3, 2, I, seed=39, dtype=dtype)
    g = randn(2, 3, 2, 1, seed=40, dtype=dtype)
    G, A = psd(O - 1, seed=41).to(dtype), psd(I, seed=42).to(dtype)
    U = columns(a, g)
    F = torch.block_diag(U @ U.mT / 3, torch.kron(G, A).double())
    return blocks.DirectSum([blocks.Outer(a, g), blocks.Kronecker(G, A)]), F


@case
def direct_sum_of_outers(dtype):
    parts, matrices = [], []
    for seed, o in ((43, 1), (45, O - 1)):
        a, g = randn(5, 1, I, seed=seed, dtype=dtype), randn(1, 5, 1, o, seed=seed + 1, dtype=dtype)
        U = columns(a, g)
        parts.append(blocks.Outer(a, g))
        matrices.append(U @ U.mT / 5)
    return blocks.DirectSum(parts), torch.block_diag(*matrices)


@cache
def built(name: str, dtype: torch.dtype) -> Case:
    """The case, shared by tests that change nothing in it."""
    return CASES[name](dtype)


# --- the laws -------------------------------------------------------------------------------------


def assert_near(actual: Tensor, expected: Tensor, dtype: torch.dtype, scale: float = 0.0) -> None:
    """Equal up to rounding of `dtype`, relative to the norm of `expected` (or `scale`)."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    error = (actual.double() - expected.double()).norm().item()
    size = max(expected.double().norm().item(), scale)
    assert error <= TOLERANCE[dtype] * size, f"error {error:.3e} against size {size:.3e}"


def assert_number(actual: Tensor, expected: Tensor | float, dtype, scale: float = 0.0) -> None:
    assert actual.ndim == 0
    assert actual.dtype == torch.float64
    assert_near(actual, torch.as_tensor(expected, dtype=torch.float64), dtype, scale)


def spectrum(matrix: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(matrix).flip(0)


def is_singular(matrix: Tensor) -> bool:
    values = spectrum(matrix)
    return bool(values[-1] <= 1e-7 * values[0])


def vec(V: Tensor) -> Tensor:
    return V.flatten(-2).double()


def law_product(block, F, dtype):
    for batch in ((), (3,), (2, 1), (0,)):
        V = randn(*batch, *block.shape, seed=50, dtype=dtype)
        product = block @ V
        assert product.dtype == dtype
        assert_near(vec(product), vec(V) @ F, dtype)


def law_dense(block, F, dtype):
    assert block.dense().dtype == dtype
    assert_near(block.dense(), F, dtype)
    for budget in (7 * block.size * dtype.itemsize, None):
        parts = list(block.rows(budget))
        assert parts[0][0].start == 0
        assert_near(torch.cat([rows for _, rows in parts]), F, dtype)


def law_power(block, F, dtype):
    largest = spectrum(F)[0].item()
    V = randn(2, *block.shape, seed=51, dtype=dtype)
    for exponent in (-1, -0.5, 0.5, 1):
        for damping in (0.0, 0.3 * largest or 0.3):
            if damping == 0 and exponent < 0 and is_singular(F):
                with pytest.raises(BlockError, match="damping"):
                    block.power(exponent, damping)
                continue
            power, expected = block.power(exponent, damping), matrix_power(F, exponent, damping)
            assert power.dtype == dtype and power.shape == block.shape
            if damping == 0 and exponent == 0.5 and is_singular(F):
                # the root of a rounding error: eps -> sqrt(eps)
                loose = 1e2 * (torch.finfo(dtype).eps ** 0.5) * (largest**0.5)
                assert (power.dense() - expected).abs().max() <= loose
                continue
            assert_near(power.dense(), expected, dtype)
            assert_near(vec(power @ V), vec(V) @ expected, dtype)
            if exponent == -1:
                assert_near(block.solve(V, damping), power @ V, dtype)


def law_quadratics(block, F, dtype):
    V = randn(2, 3, *block.shape, seed=52, dtype=dtype)
    value = block.quadratic(V)
    assert value.dtype == torch.float64
    assert_near(value, (vec(V) @ F * vec(V)).sum(-1), dtype)
    for t in (1, 3):
        a = randn(4, t, block.shape[1], seed=53, dtype=dtype)
        g = randn(2, 4, t, block.shape[0], seed=54, dtype=dtype)
        U = columns(a, g)
        value = block.column_quadratics(a, g)
        assert value.dtype == torch.float64
        assert_near(value, (U * (F @ U)).sum(0).view(2, 4), dtype)


def law_scalars(block, F, dtype):
    values = spectrum(F).clamp(min=0)
    assert_number(block.trace(), F.trace(), dtype)
    assert_number(block.squared_norm(), F.square().sum(), dtype)
    damping = 0.2 * values[0].item() or 0.2
    assert_number(block.logdet(damping), (values + damping).log().sum(), dtype, scale=block.size)
    if not is_singular(F):
        assert_number(block.logdet(0.0), values.log().sum(), dtype, scale=block.size)
    assert_near(block.diagonal(), F.diagonal().view(block.shape), dtype)
    assert block.clamped <= 1e-5


def law_spectrum(block, F, dtype):
    values = block.eigenvalues()
    assert values.dtype == torch.float64
    assert_near(values, spectrum(F), dtype)
    for k in (1, 3, block.size):
        top, vectors = block.leading(k)
        assert top.dtype == torch.float64 and vectors.dtype == dtype
        assert vectors.shape == (len(top), *block.shape) and len(top) <= k
        assert (top.diff() <= 0).all()
        flat = vec(vectors)
        assert_near(flat @ flat.mT, torch.eye(len(top), dtype=torch.float64), dtype)
        assert_near(flat @ F, top[:, None] * flat, dtype, scale=spectrum(F)[0].item())
        assert_near(block.leading_values(k), top, dtype)
        q_G, q_A = (randn(d, 2, seed=54 + s).to(dtype) for s, d in enumerate(block.shape))
        pairs = torch.einsum("ok,ik->koi", q_G, q_A)
        assert_near(block.leading_products(k, q_G, q_A), flat @ vec(pairs).mT, dtype)
        factors = block.leading_factors(k)
        if factors is not None:
            assert_near(vec(torch.einsum("ok,ik->koi", *factors)), flat, dtype)
        if k == block.size and spectrum(F)[-1] >= 0 and len(top) < k:
            continue
        if not _is_inverse(block):
            assert_near(top, spectrum(F)[: len(top)], dtype, scale=spectrum(F)[0].item())


def _is_inverse(block) -> bool:
    """Whether the complement of the columns' range, which `leading` leaves out, is on top."""
    return isinstance(block, blocks.OuterSum) and block.eigenvalues()[0] == block.shift > 0


def law_bases(block, F, dtype):
    Q_G, Q_A = randn(block.shape[0], 3, seed=55), randn(block.shape[1], 2, seed=56)
    Q = torch.kron(Q_G, Q_A)
    value = block.rotated_diagonal(Q_G.to(dtype), Q_A.to(dtype))
    assert value.dtype == torch.float64
    assert_near(value, (Q * (F @ Q)).sum(0).view(3, 2), dtype)


def law_diagonal_of(block, F, dtype):
    _, vectors = block.leading(block.size)
    flat = vec(vectors)
    for name in (
        "outer_many_positions",
        "outer_shifted",
        "kronecker",
        "mini_block",
        "mini_block_with_bias",
        "direct_sum",
    ):
        other, H = built(name, dtype)
        if other.shape != block.shape:
            continue
        value = block.diagonal_of(other)
        assert value.dtype == torch.float64
        expected = (flat @ H * flat).sum(-1)
        assert_near(value.flatten().sort().values, expected.sort().values, dtype)
    own = block.diagonal_of(block).flatten().sort(descending=True).values
    assert_near(own, block.leading(block.size)[0], dtype, scale=spectrum(F)[0].item())


def law_sample(block, F, dtype):
    damping = 0.5 * spectrum(F)[0].item() or 0.5
    noise = torch.randn(block.shape, generator=torch.Generator().manual_seed(7), dtype=dtype)
    before = torch.get_rng_state()
    draw = block.sample(damping, torch.Generator().manual_seed(7))
    assert_near(vec(draw), matrix_power(F, -0.5, damping) @ vec(noise), dtype)
    torch.manual_seed(123)
    one = block.sample(damping)
    torch.manual_seed(321)
    assert torch.equal(one, block.sample(damping))
    torch.set_rng_state(before)
    block.sample(damping)
    assert torch.equal(before, torch.get_rng_state())


def law_linear_operator(block, F, dtype):
    operator = block.as_linear_operator()
    assert operator.shape == (block.size, block.size)
    X = randn(block.size, 3, seed=57, dtype=dtype).numpy()
    assert operator.matmat(X).dtype == X.dtype
    assert_near(torch.from_numpy(operator @ X), F @ torch.from_numpy(X).double(), dtype)
    assert_near(
        torch.from_numpy(operator.H @ X[:, 0]), F @ torch.from_numpy(X[:, 0]).double(), dtype
    )
    if block.size > 4 and F.norm() > 0:
        start = np.linspace(1, 2, block.size).astype(X.dtype)
        top = eigsh(operator, k=2, which="LA", v0=start, return_eigenvectors=False)
        assert_near(torch.from_numpy(np.sort(top)[::-1].copy()), spectrum(F)[:2], dtype)


def law_refusals(block, F, dtype):
    o, i = block.shape
    for wrong in (torch.zeros(i + 1, o, dtype=dtype), torch.zeros(2, o, i + 1, dtype=dtype)):
        for act in (block.__matmul__, block.quadratic):
            with pytest.raises(BlockError, match=rf"{o}, {i}\]"):
                act(wrong)
    for damping in (-1e-3, float("nan"), float("inf")):
        for act in (lambda d: block.power(-1, d), block.logdet, block.sample):
            with pytest.raises(BlockError, match="damping"):
                act(damping)
    with pytest.raises(BlockError, match="shapes"):
        block.inner(blocks.Diagonal(torch.ones(o, i + 1, dtype=dtype)))


LAWS = {name: law for name, law in list(globals().items()) if name.startswith("law_")}
