"""Cases for the laws of blocks: `CASES[name](dtype)` is a block and its matrix, made without it.

All blocks act on a weight `[O, I]`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from references import randn
from torch import Tensor

from fisherlab import blocks
from fisherlab.blocks import Block
from fisherlab.testing.blocks import columns, matrix_power, psd

O, I = 3, 9

Case = tuple[Block, Tensor]  # the block and its matrix [N, N] in float64


def orthonormal(d: int, k: int, seed: int) -> Tensor:
    return torch.linalg.qr(randn(d, d, seed=seed)).Q[:, :k].contiguous()


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


def leading_of(level):
    def make(dtype):
        Q = torch.linalg.qr(randn(O * I, 4, seed=65))[0]
        values = torch.tensor([3.0, 2.0, 1.0, 0.5]).double()
        F = Q @ (values - level).diag() @ Q.mT + level * torch.eye(O * I).double()
        vectors = Q.mT.reshape(4, O, I).to(dtype)
        return blocks.Leading(vectors, values.to(dtype), torch.tensor(level, dtype=dtype)), F

    return make


CASES |= {"leading": leading_of(0.0), "leading_above_a_level": leading_of(0.2)}
CASES |= {"leading_below_a_level": leading_of(5.0)}


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
