"""Laws of a block: every method says what its dense matrix says."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy.sparse.linalg import eigsh
from torch import Tensor

from fisherlab.blocks import (
    Block,
    BlockError,
    Dense,
    Diagonal,
    DirectSum,
    Kronecker,
    MiniBlock,
    Outer,
    OuterSum,
)
from fisherlab.testing.laws import TOLERANCE, Report, Run, near, number, randn, refused

# a block, its matrix in float64, and the precision of the block
Law = Callable[[Block, Tensor, torch.dtype], None]


def psd(*shape: int, seed: int, rank: int | None = None) -> Tensor:
    """A random PSD matrix `[..., d, d]`, of full rank and well conditioned by default."""
    *batch, d = shape
    root = randn(*batch, d, rank or 3 * d, seed=seed)
    return root @ root.mT / root.shape[-1]


def matrix_power(matrix: Tensor, exponent: float, damping: float) -> Tensor:
    """`(F + damping I)^exponent` by NumPy; eigenvalues below rounding are zero."""
    values, Q = np.linalg.eigh(matrix.numpy())
    values = np.where(values > 1e-12 * np.abs(values).max(initial=0), values, 0) + damping
    return torch.from_numpy((Q * values**exponent) @ Q.T)


def columns(a: Tensor, g: Tensor) -> Tensor:
    """`U` `[o i, m n]`, its column `sum_t vec(g[m, n, t] a[n, t]^T)`, written as loops."""
    m, n, t = g.shape[:3]
    D = [
        sum(torch.outer(g[j, k, s], a[k, s]) for s in range(t)) for j in range(m) for k in range(n)
    ]
    return torch.stack([torch.as_tensor(d) for d in D]).flatten(1).mT.double()


def companions(o: int, i: int, dtype: torch.dtype) -> dict[str, tuple[Block, Tensor]]:
    """Blocks of a weight `[o, i]` in several forms, each with its matrix."""

    def outer(m: int, n: int, t: int, shift: float, seed: int) -> tuple[Block, Tensor]:
        a, g = randn(n, t, i, seed=seed, dtype=dtype), randn(m, n, t, o, seed=seed + 1, dtype=dtype)
        U = columns(a, g)
        return Outer(a, g, 1 / n, shift), U @ U.mT / n + shift * torch.eye(o * i).double()

    G, A = psd(o, seed=20).to(dtype), psd(i, seed=21).to(dtype)
    inside = psd(o, 1, i, seed=36).to(dtype)
    entries = (0.1 + randn(o, i, seed=34).abs()).to(dtype)
    F = psd(o * i, seed=1).to(dtype)
    found: dict[str, tuple[Block, Tensor]] = {
        "columns": outer(2, 3, 4, 0.0, 4),
        "columns and a shift": outer(1, 6, 2, 0.3, 5),
        "a Kronecker product": (Kronecker(G, A), torch.kron(G, A).double()),
        "mini-blocks": (MiniBlock(inside), torch.block_diag(*inside.flatten(0, 1).double())),
        "a diagonal": (Diagonal(entries), entries.flatten().double().diag()),
        "a dense matrix": (Dense(F, (o, i)), F.double()),
    }
    if i > 1:
        square, bias = inside[..., 1:, 1:].contiguous(), entries[:, 0]
        rows = [torch.block_diag(x[0], b.reshape(1, 1)) for x, b in zip(square, bias, strict=True)]
        found["mini-blocks and a bias"] = MiniBlock(square, bias), torch.block_diag(*rows).double()
    if o > 1:
        a, g = randn(3, 2, i, seed=39, dtype=dtype), randn(2, 3, 2, 1, seed=40, dtype=dtype)
        U, rest = columns(a, g), psd(o - 1, seed=41).to(dtype)
        whole = torch.block_diag(U @ U.mT / 3, torch.kron(rest, A).double())
        found["a direct sum"] = DirectSum([Outer(a, g), Kronecker(rest, A)]), whole
    return found


def spectrum(matrix: Tensor) -> Tensor:
    """Eigenvalues, largest first."""
    return torch.linalg.eigvalsh(matrix).flip(0)


def condition(matrix: Tensor, damping: float) -> float:
    """The condition of the damped matrix; 1 where it is singular, which is refused or rounded."""
    values = spectrum(matrix).clamp(min=0) + damping
    return 1.0 if values[-1] <= 1e-7 * values[0] else float(values[0] / values[-1])


def is_singular(matrix: Tensor) -> bool:
    """Whether the smallest eigenvalue is at most 1e-7 of the largest."""
    values = spectrum(matrix)
    return bool(values[-1] <= 1e-7 * values[0])


def vec(V: Tensor) -> Tensor:
    """`[..., o, i]` as `[..., o i]` in float64."""
    return V.flatten(-2).double()


def law_product(block: Block, F: Tensor, dtype: torch.dtype) -> None:
    """`block @ V` is `vec(V) F`, for any batch of `V`."""
    for batch in ((), (3,), (2, 1), (0,)):
        V = randn(*batch, *block.shape, seed=50, dtype=dtype)
        product = block @ V
        assert product.dtype == dtype, f"the product is {product.dtype}"
        near(vec(product), vec(V) @ F, dtype)


def law_dense(block: Block, F: Tensor, dtype: torch.dtype) -> None:
    """`dense()` and `rows()` are F, which is symmetric."""
    assert block.dense().dtype == dtype, f"dense() is {block.dense().dtype}"
    near(block.dense(), F, dtype)
    near(block.dense().mT, F, dtype)
    for budget in (7 * block.size * dtype.itemsize, None):
        parts = list(block.rows(budget))
        assert parts[0][0].start == 0
        near(torch.cat([rows for _, rows in parts]), F, dtype)


def law_power(block: Block, F: Tensor, dtype: torch.dtype) -> None:
    """`power(exponent, damping)` is `(F + damping I)^exponent`."""
    largest = spectrum(F)[0].item()
    V = randn(2, *block.shape, seed=51, dtype=dtype)
    for exponent in (-1, -0.5, 0.5, 1):
        for damping in (0.0, 0.3 * largest or 0.3):
            if damping == 0 and exponent < 0 and is_singular(F):
                refused(BlockError, "damping", block.power, exponent, 0.0)
                continue
            power, expected = block.power(exponent, damping), matrix_power(F, exponent, damping)
            assert power.dtype == dtype and power.shape == block.shape
            if damping == 0 and exponent == 0.5 and is_singular(F):
                # the root of a rounding error: eps -> sqrt(eps)
                loose = 1e2 * (torch.finfo(dtype).eps ** 0.5) * (largest**0.5)
                assert (power.dense() - expected).abs().max() <= loose, "the root is off"
                continue
            # a root or an inverse multiplies rounding by the condition
            bound = max(TOLERANCE[dtype], 100 * torch.finfo(dtype).eps * condition(F, damping))
            near(power.dense(), expected, dtype, bound=bound)
            near(vec(power @ V), vec(V) @ expected, dtype, bound=bound)
            if exponent == -1:
                near(block.solve(V, damping), power @ V, dtype)


def law_quadratics(block: Block, F: Tensor, dtype: torch.dtype) -> None:
    """`quadratic(V)` is `vec(V)^T F vec(V)`, of one matrix and of many columns."""
    V = randn(2, 3, *block.shape, seed=52, dtype=dtype)
    value = block.quadratic(V)
    assert value.dtype == torch.float64, f"quadratic is {value.dtype}"
    near(value, (vec(V) @ F * vec(V)).sum(-1), dtype)
    for t in (1, 3):
        a = randn(4, t, block.shape[1], seed=53, dtype=dtype)
        g = randn(2, 4, t, block.shape[0], seed=54, dtype=dtype)
        U = columns(a, g)
        value = block.column_quadratics(a, g)
        assert value.dtype == torch.float64, f"column_quadratics is {value.dtype}"
        near(value, (U * (F @ U)).sum(0).view(2, 4), dtype)


def law_scalars(block: Block, F: Tensor, dtype: torch.dtype) -> None:
    """Trace, squared norm, log determinant and diagonal are F's."""
    values = spectrum(F).clamp(min=0)
    number(block.trace(), F.trace(), dtype)
    number(block.squared_norm(), F.square().sum(), dtype)
    damping = 0.2 * values[0].item() or 0.2
    number(block.logdet(damping), (values + damping).log().sum(), dtype, scale=block.size)
    if not is_singular(F):
        number(block.logdet(0.0), values.log().sum(), dtype, scale=block.size)
    near(block.diagonal(), F.diagonal().view(block.shape), dtype)
    assert block.clamped <= 1e-5, f"clamped is {block.clamped:.2e} of a positive block"


def law_spectrum(block: Block, F: Tensor, dtype: torch.dtype) -> None:
    """Eigenvalues and leading eigenvectors are F's."""
    values = block.eigenvalues()
    assert values.dtype == torch.float64, f"eigenvalues are {values.dtype}"
    near(values, spectrum(F), dtype)
    largest = spectrum(F)[0].item()
    for k in (1, 3, block.size):
        top, vectors = block.leading(k)
        assert top.dtype == torch.float64 and vectors.dtype == dtype
        assert vectors.shape == (len(top), *block.shape) and len(top) <= k
        assert (top.diff() <= 0).all(), "leading eigenvalues do not descend"
        flat = vec(vectors)
        near(flat @ flat.mT, torch.eye(len(top), dtype=torch.float64), dtype)
        near(flat @ F, top[:, None] * flat, dtype, scale=largest)
        near(block.leading_values(k), top, dtype)
        q_G, q_A = (randn(d, 2, seed=54 + s).to(dtype) for s, d in enumerate(block.shape))
        pairs = torch.einsum("ok,ik->koi", q_G, q_A)
        near(block.leading_products(k, q_G, q_A), flat @ vec(pairs).mT, dtype)
        factors = block.leading_factors(k)
        if factors is not None:
            near(vec(torch.einsum("ok,ik->koi", *factors)), flat, dtype)
        if k == block.size and spectrum(F)[-1] >= 0 and len(top) < k:
            continue
        if not _is_inverse(block):
            near(top, spectrum(F)[: len(top)], dtype, scale=largest)


def _is_inverse(block: Block) -> bool:
    """Whether the complement of the columns' range, which `leading` leaves out, is on top."""
    return isinstance(block, OuterSum) and bool(block.eigenvalues()[0] == block.shift > 0)


def law_bases(block: Block, F: Tensor, dtype: torch.dtype) -> None:
    """`rotated_diagonal(Q_G, Q_A)` is the diagonal of `Q^T F Q`, `Q = Q_G (x) Q_A`."""
    Q_G, Q_A = randn(block.shape[0], 3, seed=55), randn(block.shape[1], 2, seed=56)
    Q = torch.kron(Q_G, Q_A)
    value = block.rotated_diagonal(Q_G.to(dtype), Q_A.to(dtype))
    assert value.dtype == torch.float64, f"rotated_diagonal is {value.dtype}"
    near(value, (Q * (F @ Q)).sum(0).view(3, 2), dtype)


def law_pairs(block: Block, F: Tensor, dtype: torch.dtype) -> None:
    """`inner` and `diagonal_of` with blocks of other forms, and with itself."""
    _, vectors = block.leading(block.size)
    flat = vec(vectors)
    for other, H in companions(*block.shape, dtype).values():
        scale = (F.norm() * H.norm()).item()
        number(block.inner(other), (F * H).sum(), dtype, scale)
        number(other.inner(block), (F * H).sum(), dtype, scale)
        value = block.diagonal_of(other)
        assert value.dtype == torch.float64, f"diagonal_of is {value.dtype}"
        expected = (flat @ H * flat).sum(-1)
        near(value.flatten().sort().values, expected.sort().values, dtype)
    number(block.inner(block), F.square().sum(), dtype)
    own = block.diagonal_of(block).flatten().sort(descending=True).values
    near(own, block.leading(block.size)[0], dtype, scale=spectrum(F)[0].item())


def law_sample(block: Block, F: Tensor, dtype: torch.dtype) -> None:
    """`sample` is `(F + damping I)^(-1/2)` of the noise of its generator, or of torch's."""
    damping = 0.5 * spectrum(F)[0].item() or 0.5
    root = matrix_power(F, -0.5, damping)
    before = torch.get_rng_state()
    try:
        noise = torch.randn(block.shape, generator=torch.Generator().manual_seed(7), dtype=dtype)
        draw = block.sample(damping, torch.Generator().manual_seed(7))
        near(vec(draw), root @ vec(noise), dtype)
        same = torch.equal(before, torch.get_rng_state())
        assert same, "a sample of a generator moves torch's global stream"
        torch.manual_seed(123)
        first, second = (torch.randn(block.shape, dtype=dtype) for _ in range(2))
        torch.manual_seed(123)
        near(vec(block.sample(damping)), root @ vec(first), dtype)
        near(vec(block.sample(damping)), root @ vec(second), dtype)
    finally:
        torch.set_rng_state(before)


def law_linear_operator(block: Block, F: Tensor, dtype: torch.dtype) -> None:
    """`as_linear_operator()` is F to SciPy."""
    operator = block.as_linear_operator()
    assert operator.shape == (block.size, block.size)
    X = randn(block.size, 3, seed=57, dtype=dtype).numpy()
    assert operator.matmat(X).dtype == X.dtype
    near(torch.from_numpy(operator @ X), F @ torch.from_numpy(X).double(), dtype)
    near(torch.from_numpy(operator.H @ X[:, 0]), F @ torch.from_numpy(X[:, 0]).double(), dtype)
    if block.size > 4 and F.norm() > 0:
        start = np.linspace(1, 2, block.size).astype(X.dtype)
        top = eigsh(operator, k=2, which="LA", v0=start, return_eigenvectors=False)
        near(torch.from_numpy(np.sort(top)[::-1].copy()), spectrum(F)[:2], dtype)


def law_refusals(block: Block, F: Tensor, dtype: torch.dtype) -> None:
    """Wrong shapes and wrong dampings are refused by name."""
    o, i = block.shape
    for wrong in (torch.zeros(i + 1, o, dtype=dtype), torch.zeros(2, o, i + 1, dtype=dtype)):
        for act in (block.__matmul__, block.quadratic):
            refused(BlockError, f"{o}, {i}]", act, wrong)
    for damping in (-1e-3, float("nan"), float("inf")):
        refused(BlockError, "damping", block.power, -1, damping)
        refused(BlockError, "damping", block.logdet, damping)
        refused(BlockError, "damping", block.sample, damping)
    wider = Diagonal(torch.ones(o, i + 1, dtype=dtype))
    refused(BlockError, "shapes", block.inner, wider)


LAWS: dict[str, Law] = {
    name.removeprefix("law_"): law
    for name, law in list(globals().items())
    if name.startswith("law_")
}


def check_block(block: Block, matrix: Tensor | None = None) -> Report:
    """Every method of a block against its dense matrix.

    Args:
        block: The block, positive semi-definite, with at most some hundred weights.
        matrix: `[o i, o i]`, the truth in float64 made without the block; None takes
            `block.dense()`, and the block is tested for agreeing with itself.

    Returns:
        The laws that hold: product, dense, power, quadratics, scalars, spectrum, bases, pairs,
        sample, linear_operator, refusals.

    Raises:
        LawError: a law is broken; the message lists each with its figures.
        TypeError: `block` is no block.
        ValueError: `matrix` has another shape.
    """
    if not isinstance(block, Block):
        raise TypeError(f"check_block takes a fisherlab.blocks.Block, got {type(block).__name__}")
    if matrix is not None and matrix.shape != (block.size, block.size):
        raise ValueError(
            f"matrix is [{block.size}, {block.size}] for a block of shape {list(block.shape)}, got "
            f"{list(matrix.shape)}"
        )
    run = Run(
        f"{type(block).__name__} {list(block.shape)} {str(block.dtype).removeprefix('torch.')}"
    )
    F = block.dense() if matrix is None else matrix
    for name, law in LAWS.items():
        run.law(name, "", law, block, F.double(), block.dtype)
    return run.report()
