"""Affine-invariant measures: what is left of the curvature after preconditioning.

Both compare `X + lambda I` with `F + lambda I` and do not change under a linear change of the
weights: 1 and 0 mean that the preconditioned block is the identity.
"""

from __future__ import annotations

import math

import torch
from scipy.linalg import eigh_tridiagonal
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
from fisherlab.blocks.coordinates import Identity
from fisherlab.blocks.serialise import cast
from fisherlab.blocks.span import multiplied
from fisherlab.metrics.frobenius import same

# Up to this many parameters the generalised eigenproblem is solved densely.
DENSE_SIZE = 512
# Multiplications that the Lanczos iteration may cost; beyond it `condition` is NaN.
LANCZOS_BUDGET = 1e9
# Forms whose inverse is as cheap to apply as they are.
_MATRIX_FREE = Eigen | Kronecker | Diagonal | FromInverse | MiniBlock | Outer
_STEPS = 60
_CHECK = 4  # steps between two looks at the Ritz value
_TOLERANCE = 1e-8


def stein_loss(X: Block, F: Block, damping: float) -> Tensor:
    """`tr(P F_l) - log det(P F_l) - N`, `P = (X + damping I)^{-1}`, `F_l = F + damping I`; float64.

    Twice the Kullback-Leibler divergence between `N(0, F_l)` and `N(0, X + damping I)`: 0 if they
    agree. `tr(P F) + damping tr P - log det F_l + log det (X + damping I) - N`, all in closed form.
    """
    if same(X, F):
        return torch.zeros((), dtype=torch.float64, device=F.device)
    P = X.power(-1, damping)
    trace = F.inner(P) + damping * P.trace()
    return trace - F.logdet(damping) + X.logdet(damping) - F.size


def condition(X: Block, F: Block, damping: float, beside: bool = False) -> Tensor:
    """Condition number of `(X + damping)^{-1/2} (F + damping) (X + damping)^{-1/2}`; 0-d float64.

    Dense up to 512 parameters, beyond it by Lanczos to about 1e-6; NaN where even that costs more
    than its budget. `beside`: there are further dimensions in which both blocks are zero.
    """
    if same(X, F):
        return torch.ones((), dtype=torch.float64, device=F.device)
    if isinstance(X, DirectSum) and isinstance(F, DirectSum):
        parts = [_extremes(x, f, damping) for x, f in zip(X.parts, F.parts, strict=True)]
    else:
        parts = [_extremes(X, F, damping)]
    if beside:
        parts.append(torch.ones_like(parts[0]))
    smallest, largest = torch.stack(parts).unbind(1)
    return largest.max() / smallest.min().clamp(min=1e-300)


def _extremes(X: Block, F: Block, damping: float) -> Tensor:
    """The smallest and the largest eigenvalue of the preconditioned block, `[2]`."""
    if F.size <= DENSE_SIZE:
        X, F = _exactly(X), _exactly(F)
        eye = damping * torch.eye(F.size, dtype=torch.float64, device=F.device)
        root, singular = torch.linalg.cholesky_ex(F.dense() + eye)
        if singular:
            root = F.power(0.5, damping).dense()
        # Rounding is eps of the largest: 1e14 between eigenvalues is 1e7 between singular values.
        product = root.mT @ X.power(-0.5, damping).dense()
        return torch.linalg.svdvals(product).square()[[-1, 0]]
    if not _affordable(X, F):
        return torch.full((2,), math.nan, dtype=torch.float64, device=F.device)
    X, F = _exactly(X), _exactly(F)
    largest = _largest(F.power(1, damping), X.power(-1, damping))
    smallest = 1 / _largest(X.power(1, damping), F.power(-1, damping))
    return torch.stack([smallest, largest])


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
    Q_G, Q_A = (_orthonormal(Q) for Q in (block.Q_G, block.Q_A))
    tails = (block.spectrum, block.tail_G, block.tail_A, block.tail)
    return Eigen(Q_G, Q_A, *(values.double() for values in tails))


def _orthonormal(Q: Tensor) -> Tensor | None:
    """A basis to the last digit of float64; None for the coordinates themselves."""
    return None if isinstance(Q, Identity) else torch.linalg.qr(multiplied(Q).double()).Q


def _affordable(X: Block, F: Block) -> bool:
    if not isinstance(X, _MATRIX_FREE):
        return False
    product = F.operations if isinstance(F, Outer) else 0
    return 2 * _STEPS * (F.size * sum(F.shape) + product) <= LANCZOS_BUDGET


def _largest(A: Block, B_inverse: Block) -> Tensor:
    """The largest `theta` of `A v = theta B v`, by Lanczos in the inner product of `B^{-1}`.

    The basis `P = B Q` is orthonormal in `B^{-1}`, fully reorthogonalised; `B` needs no root.
    """
    generator = torch.Generator().manual_seed(0)
    residual = torch.randn(A.size, generator=generator, dtype=torch.float64).to(A.device)
    Q, P = residual.new_empty(_STEPS, A.size), residual.new_empty(_STEPS, A.size)
    alphas: list[float] = []
    betas: list[float] = []
    value = 0.0
    for step in range(_STEPS):
        image = _apply(B_inverse, residual)
        beta = (residual @ image).clamp(min=0).sqrt().item()
        if step and beta <= 1e-12 * value:
            break
        betas.append(beta)
        Q[step], P[step] = image / beta, residual / beta
        residual = _apply(A, Q[step])
        alphas.append((residual @ Q[step]).item())
        for _ in range(2):
            residual = residual - (Q[: step + 1] @ residual) @ P[: step + 1]
        if step % _CHECK == _CHECK - 1:
            previous, value = value, _top(alphas, betas[1:])
            if abs(value - previous) <= _TOLERANCE * value:
                break
    return residual.new_tensor(_top(alphas, betas[1:]))


def _apply(block: Block, vector: Tensor) -> Tensor:
    return (block @ vector.to(block.dtype).view(block.shape)).double().flatten()


def _top(alphas: list[float], betas: list[float]) -> float:
    """The largest eigenvalue of the symmetric tridiagonal matrix."""
    last = len(alphas) - 1
    found = eigh_tridiagonal(
        alphas, betas[:last], eigvals_only=True, select="i", select_range=(last, last)
    )
    return float(found[0])
