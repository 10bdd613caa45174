"""Affine-invariant measures: what is left of the curvature after preconditioning.

Both compare `X + lambda I` with `F + lambda I` and do not change under a linear change of the weights:
1 and 0 mean that the preconditioned block is the identity.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fisherlab.blocks import Block, Diagonal, Eigen, FromInverse, Kronecker, Outer

# Up to this many parameters the generalised eigenproblem is solved densely.
DENSE_SIZE = 1500
# Multiplications that the Lanczos iteration may cost; beyond it `condition` is NaN.
LANCZOS_BUDGET = 5e9
_STEPS = 60


def stein_loss(X: Block, F: Block, damping: float) -> Tensor:
    """`tr(P F_l) - log det(P F_l) - N`, `P = (X + damping I)^{-1}`, `F_l = F + damping I`; 0-d float64.

    Twice the Kullback-Leibler divergence between `N(0, F_l)` and `N(0, X + damping I)`: 0 if they
    agree. `tr(P F) + damping tr P - log det F_l + log det (X + damping I) - N`, all in closed form.
    """
    P = X.power(-1, damping)
    trace = F.inner(P) + damping * P.trace()
    return trace - F.logdet(damping) + X.logdet(damping) - F.size


def condition(X: Block, F: Block, damping: float) -> Tensor:
    """Condition number of `(X + damping)^{-1/2} (F + damping) (X + damping)^{-1/2}`; 0-d float64.

    Dense up to 1500 parameters, beyond it by Lanczos to about 1e-6; NaN where even that costs more
    than its budget.
    """
    if F.size <= DENSE_SIZE:
        eye = damping * torch.eye(F.size, dtype=torch.float64, device=F.device)
        root = X.power(-0.5, damping).dense().double()
        values = torch.linalg.eigvalsh(root @ (F.dense().double() + eye) @ root)
        return values[-1] / values[0].clamp(min=1e-300)
    if not _affordable(X, F):
        return torch.full((), math.nan, dtype=torch.float64, device=F.device)
    shifted = F.power(1, damping)
    inverse = F.power(-1, damping)
    largest = _largest(X.power(-0.5, damping), shifted)
    smallest = _largest(X.power(0.5, damping), inverse)
    return largest * smallest


def _affordable(X: Block, F: Block) -> bool:
    if not isinstance(X, Eigen | Kronecker | Diagonal | FromInverse | Outer):
        return False
    o, i = F.shape
    columns = getattr(F, "columns", 0)
    return 2 * _STEPS * (2 * F.size * (o + i) + 2 * F.size * columns) <= LANCZOS_BUDGET


def _largest(root: Block, inside: Block) -> Tensor:
    """The largest eigenvalue of `root inside root`, by Lanczos with full reorthogonalisation."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(root.shape, generator=generator, dtype=torch.float64)
    vector = start.to(root.device) / start.norm()
    basis = [vector]
    alphas: list[Tensor] = []
    betas: list[Tensor] = []
    value = vector.new_zeros(())
    for _ in range(_STEPS):
        product = root @ (inside @ (root @ basis[-1].to(root.dtype)))
        product = product.double()
        alphas.append((product * basis[-1]).sum())
        Q = torch.stack(basis).flatten(1)
        for _ in range(2):
            product = product - (Q.mT @ (Q @ product.flatten())).view_as(product)
        previous, value = value, _top(alphas, betas)
        norm = product.norm()
        if norm <= 1e-12 * value or (value - previous).abs() <= 1e-9 * value:
            break
        betas.append(norm)
        basis.append(product / norm)
    return value


def _top(alphas: list[Tensor], betas: list[Tensor]) -> Tensor:
    T = torch.diag(torch.stack(alphas))
    if betas:
        off = torch.stack(betas)
        T = T + torch.diag(off, 1) + torch.diag(off, -1)
    return torch.linalg.eigvalsh(T)[-1]
