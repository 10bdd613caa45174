"""Affine-invariant measures: what is left of the curvature after preconditioning.

Both compare `X + lambda I` with `F + lambda I` and do not change under a linear change of the
weights: 1 and 0 mean that the preconditioned block is the identity.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Sequence
from itertools import cycle
from typing import TypeGuard

import torch
from torch import Tensor

from fisherlab.blocks import (
    Block,
    Diagonal,
    DirectSum,
    Eigen,
    FromInverse,
    Kronecker,
    MiniBlock,
    Outer,
)
from fisherlab.blocks.basis import Basis, Coordinates, matrix_of
from fisherlab.blocks.direct_sum import parts_of
from fisherlab.blocks.numerics import normal, qr, svdvals
from fisherlab.blocks.serialise import cast
from fisherlab.metrics.entry import entered
from fisherlab.metrics.frobenius import same

# Up to this many parameters the generalised eigenproblem is solved densely.
DENSE_SIZE = 512
# Multiplications that the Lanczos iteration may cost; beyond it `condition` is NaN.
LANCZOS_BUDGET = 1e9
# Forms whose inverse is as cheap to apply as they are.
_MATRIX_FREE = Eigen | Kronecker | Diagonal | FromInverse | MiniBlock | Outer
_STEPS = 200
_USUAL = 60  # steps that all but a few pairs need
_CHECK = 4  # steps between two looks at the Ritz value
_TOLERANCE = 1e-8


@entered
def stein_loss(X: Block, F: Block, damping: float, inverse: Block | None = None) -> Tensor:
    """`tr(P F_l) - log det(P F_l) - N`, `P = (X + damping I)^{-1}`, `F_l = F + damping I`.

    It is twice the Kullback-Leibler divergence between `N(0, F_l)` and `N(0, X + damping I)`, in
    closed form: `tr(P F) + damping tr P - log det F_l + log det (X + damping I) - N`.

    Args:
        X: the approximation.
        F: the exact block, in the shape of `X`.
        damping: lambda, absolute, on the scale of `F`.
        inverse: `P`, if it is known.

    Returns:
        0-d float64; 0 if the blocks agree.

    Example:
        >>> import torch
        >>> from fisherlab import blocks, metrics
        >>> F = blocks.Diagonal(torch.tensor([[3.0, 1.0]]))
        >>> X = blocks.Diagonal(torch.tensor([[1.0, 1.0]]))
        >>> round(float(metrics.stein_loss(X, F, damping=1.0)), 3)
        0.307
    """
    if same(X, F):
        return torch.zeros((), dtype=torch.float64, device=F.device)
    P = X.power(-1, damping) if inverse is None else inverse
    trace = F.inner(P) + damping * P.trace()
    return trace - F.logdet(damping) + X.logdet(damping) - F.size


@entered
def condition(X: Block, F: Block, damping: float, beside: bool = False) -> Tensor:
    """Condition number of `(X + damping)^{-1/2} (F + damping) (X + damping)^{-1/2}`; 0-d float64.

    Dense up to 512 parameters, beyond it by Lanczos to about 1e-5, which may rest on a plateau.

    Args:
        X: the approximation.
        F: the exact block, in the shape of `X`.
        damping: lambda, absolute, on the scale of `F`.
        beside: whether both blocks are zero in further dimensions (a null complement).

    Returns:
        The largest generalised eigenvalue over the smallest; NaN where Lanczos exceeds its budget.
    """
    return conditions([X], F, [damping], beside)[0, 0]


@entered
def conditions(
    blocks: Sequence[Block], F: Block, dampings: Sequence[float], beside: bool = False
) -> Tensor:
    """`condition` of every block at every damping.

    Together they cost a fraction of the single calls: `F` and its inverse are read once for the
    vectors of all blocks.

    Args:
        blocks: the approximations.
        F: the exact block, in their shape.
        dampings: values of lambda, absolute, on the scale of `F`.
        beside: whether all blocks are zero in further dimensions (a null complement).

    Returns:
        `[dampings, blocks]` float64; NaN as in `condition`.
    """
    by_part = [isinstance(X, DirectSum) and X.parted_as(F) for X in blocks]
    if len(set(by_part)) > 1:
        return torch.cat([conditions([X], F, dampings, beside) for X in blocks], 1)
    exact = parts_of(F) if by_part[0] else (F,)
    columns = zip(*(parts_of(X) if by_part[0] else (X,) for X in blocks), strict=True)
    ends = [_extremes(Xs, part, dampings) for Xs, part in zip(columns, exact, strict=True)]
    if beside:
        ends.append(torch.ones_like(ends[0]))
    smallest, largest = torch.stack(ends).unbind(-1)
    return largest.amax(0) / smallest.amin(0).clamp(min=1e-300)


def _extremes(blocks: Sequence[Block], F: Block, dampings: Sequence[float]) -> Tensor:
    """The smallest and the largest eigenvalue of each preconditioned block, `[dampings, b, 2]`."""
    dense = F.size <= DENSE_SIZE
    result = torch.ones(len(dampings), len(blocks), 2, dtype=torch.float64, device=F.device)
    others = [k for k, X in enumerate(blocks) if X is not F]
    known = [k for k in others if dense or _affordable(blocks[k], F)]
    result[:, others] = math.nan
    Xs, exact = [_exactly(blocks[k]) for k in known], _exactly(F)
    for row, damping in enumerate(dampings if known else ()):
        result[row, known] = (_densely if dense else _by_lanczos)(Xs, exact, damping)
    return result


def _densely(Xs: Sequence[Block], F: Block, damping: float) -> Tensor:
    eye = damping * torch.eye(F.size, dtype=torch.float64, device=F.device)
    root, singular = torch.linalg.cholesky_ex(F.dense() + eye)
    if singular:
        root = F.power(0.5, damping).dense()
    # Rounding is eps of the largest: 1e14 between eigenvalues is 1e7 between singular values.
    products = (root.mT @ X.power(-0.5, damping).dense() for X in Xs)
    return torch.stack(
        [svdvals(product, "preconditioned block").square()[[-1, 0]] for product in products]
    )


def _by_lanczos(Xs: Sequence[Block], F: Block, damping: float) -> Tensor:
    X, X_inverse = (Together([B.power(p, damping) for B in Xs]) for p in (1, -1))
    F_damped, F_inverse = (Together([F.power(p, damping)] * len(Xs)) for p in (1, -1))
    return torch.stack([1 / _largest(X, F_inverse), _largest(F_damped, X_inverse)], -1)


def _exactly(block: Block) -> Block:
    """The block in float64: an inverse divides rounding, that of its product, by the damping."""
    if block.dtype == torch.float64:
        return block
    if isinstance(block, Outer):
        return block.double
    if isinstance(block, Kronecker):
        block = block.eigen
    if not isinstance(block, Eigen):
        return cast(block, torch.float64)
    Q_G, Q_A = (orthonormal(Q) for Q in (block.Q_G, block.Q_A))
    tails = (block.spectrum, block.tail_G, block.tail_A, block.tail)
    return Eigen(Q_G, Q_A, *(values.double() for values in tails))


def orthonormal(Q: Basis) -> Tensor | None:
    """A basis to the last digit of float64; None for the coordinates themselves."""
    return None if isinstance(Q, Coordinates) else qr(matrix_of(Q).double(), "eigenvectors")[0]


def _affordable(X: Block, F: Block) -> bool:
    if not isinstance(X, _MATRIX_FREE):
        return False
    product = F.operations if isinstance(F, Outer) else 0
    return 2 * _USUAL * (F.size * sum(F.shape) + product) <= LANCZOS_BUDGET


def _largest(A: Together, B_inverse: Together) -> Tensor:
    """The largest `theta` in `A_k v = theta B_k v` of every pair, `[b]`, by Lanczos in lockstep."""
    generator = torch.Generator().manual_seed(0)
    first = A.blocks[0]
    start = normal(generator, first.size).to(first.device)
    runs = [_lanczos(start) for _ in A.blocks]
    vectors = {k: next(run) for k, run in enumerate(runs)}
    values = start.new_zeros(len(runs))
    for operators in cycle((B_inverse, A)):
        for k, image in operators.times(vectors).items():
            try:
                vectors[k] = runs[k].send(image)
            except StopIteration as end:
                values[k] = end.value
                del vectors[k]
        if not vectors:
            break
    return values


class Together:
    """Blocks that meet one vector each: the same one all at once, those in Kronecker bases too."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.blocks = blocks
        self._stack: tuple[tuple[int, ...], tuple[Tensor, ...]] = ((), ())

    def times(self, vectors: dict[int, Tensor]) -> dict[int, Tensor]:
        """`F_k v_k` for vectors `[N]` by the index of their block."""
        first = self.blocks[0]
        if all(self.blocks[k] is first for k in vectors):
            images = first @ _side_by_side(vectors.values(), first.shape)
            return dict(zip(vectors, images.flatten(1), strict=True))
        found = {}
        which = tuple(k for k in vectors if _of_one_level(self.blocks[k]))
        if which:
            V = _side_by_side([vectors[k] for k in which], first.shape)
            found = dict(zip(which, self._in_bases(which, V).flatten(1), strict=True))
        rest = {k: self.blocks[k] for k in vectors if k not in found}
        return found | {k: (F @ vectors[k].view(F.shape)).flatten() for k, F in rest.items()}

    def _in_bases(self, which: tuple[int, ...], V: Tensor) -> Tensor:
        """`Q_G ((spectrum - level) * (Q_G^T V Q_A)) Q_A^T + level V` of blocks in their bases."""
        if self._stack[0] != which:
            blocks = [B for k in which if isinstance(B := self.blocks[k], Eigen)]
            levels = torch.stack([_level(B) for B in blocks])
            inside = _padded([B.spectrum - level for B, level in zip(blocks, levels, strict=True)])
            bases = (_padded([matrix_of(getattr(B, Q)) for B in blocks]) for Q in ("Q_G", "Q_A"))
            self._stack = which, (*bases, inside, levels[:, None, None])
        Q_G, Q_A, inside, levels = self._stack[1]
        core = inside * torch.bmm(Q_G.mT, torch.bmm(V, Q_A))
        return torch.bmm(Q_G, torch.bmm(core, Q_A.mT)).addcmul_(levels, V)


def _side_by_side(vectors: Iterable[Tensor], shape: tuple[int, int]) -> Tensor:
    return torch.stack(list(vectors)).unflatten(-1, shape)


def _of_one_level(block: Block) -> TypeGuard[Eigen]:
    """Whether there is one eigenvalue beside its bases at most."""
    return isinstance(block, Eigen) and block.complement.level is not None


def _level(block: Eigen) -> Tensor:
    assert block.complement.level is not None, "asked of blocks of one level"
    return block.complement.level


def _padded(matrices: Sequence[Tensor]) -> Tensor:
    """Matrices one above the other, `[b, p, q]`, with zeros where one is smaller."""
    p, q = (max(matrix.shape[axis] for matrix in matrices) for axis in (0, 1))
    result = matrices[0].new_zeros(len(matrices), p, q)
    for row, matrix in zip(result, matrices, strict=True):
        row[: matrix.shape[0], : matrix.shape[1]] = matrix
    return result


def _lanczos(residual: Tensor) -> Generator[Tensor, Tensor, float]:
    """Lanczos in the inner product of `B^{-1}`: yields `v` for `B^{-1} v`, then `q` for `A q`.

    The basis `P = B Q` is orthonormal in `B^{-1}`; `B` needs no root. Nothing is reorthogonalised:
    rounding makes copies of a Ritz value that has converged, and the largest is what is wanted.
    """
    alphas: list[float] = []
    betas: list[float] = []
    value, before = 0.0, residual
    for step in range(_STEPS):
        image = yield residual
        beta = (residual @ image).clamp(min=0).sqrt().item()
        if step and beta <= 1e-12 * value:
            break
        betas.append(beta)
        q, p = image / beta, residual / beta
        image = yield q
        alphas.append((image @ q).item())
        residual = torch.add(image, p, alpha=-alphas[-1])
        if step:
            residual.sub_(before, alpha=beta)
        before = p
        if step % _CHECK == _CHECK - 1:
            previous, value = value, _top(alphas, betas[1:])
            if abs(value - previous) <= _TOLERANCE * value:
                break
    return _top(alphas, betas[1:])


def _top(alphas: list[float], betas: list[float]) -> float:
    """The largest eigenvalue of the symmetric tridiagonal matrix."""
    from scipy.linalg import eigh_tridiagonal

    last = len(alphas) - 1
    found = eigh_tridiagonal(
        alphas, betas[:last], eigvals_only=True, select="i", select_range=(last, last)
    )
    return float(found[0])
