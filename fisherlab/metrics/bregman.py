"""The von Neumann divergence, between the Frobenius error and the Stein loss in the same family.

    D(F, X) = phi(F) - phi(X) - <phi'(X), F - X>

is `||F - X||^2` for `phi(Y) = ||Y||^2`, the Stein loss for `phi(Y) = -log det Y`, and the von
Neumann divergence for `phi(Y) = tr(Y log Y - Y)`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fisherlab.blocks import (
    Block,
    BlockError,
    ColumnSum,
    Dense,
    Diagonal,
    DirectSum,
    Eigen,
    Kronecker,
    Leading,
    Outer,
)
from fisherlab.blocks.numerics import eigh
from fisherlab.blocks.serialise import cast
from fisherlab.metrics.entry import entered
from fisherlab.metrics.frobenius import same
from fisherlab.metrics.invariant import orthonormal


@entered
def von_neumann_divergence(X: Block, F: Block, damping: float) -> Tensor:
    """`tr(F_l log F_l - F_l log X_l - F_l + X_l)`, `F_l = F + damping I`, `X_l = X + damping I`.

    It has the unit of `F`, times a logarithm, so that blocks of one layer compare. An eigenvalue
    `f` of F weighs a relative error with `f`, where the Stein loss weighs all alike and the
    Frobenius error weighs with `f^2`.

    Args:
        X: the approximation.
        F: the exact block, in the shape of `X`.
        damping: lambda, absolute, on the scale of `F`.

    Returns:
        0-d float64; 0 if the blocks agree.

    Raises:
        BlockError: `X + damping I` is singular.

    Example:
        >>> import torch
        >>> from fisherlab import blocks, metrics
        >>> F = blocks.Diagonal(torch.tensor([[3.0, 1.0]]))
        >>> X = blocks.Diagonal(torch.tensor([[1.0, 1.0]]))
        >>> round(float(metrics.von_neumann_divergence(X, F, damping=1.0)), 3)
        0.773
    """
    if same(X, F):
        return torch.zeros((), dtype=torch.float64, device=F.device)
    exact = F.eigenvalues().clamp(min=0) + damping
    log, F = _log(X, damping), F if F.dtype == torch.float64 else cast(F, torch.float64)
    found = torch.special.xlogy(exact, exact).sum() - F.inner(log) - damping * log.trace()
    return found - F.trace() + X.trace()


def _log(X: Block, damping: float) -> Block:
    """`log(X + damping I)`, symmetric and seldom positive, in float64."""
    if isinstance(X, DirectSum | ColumnSum):
        return type(X)([_log(part, damping) for part in X.parts])
    if isinstance(X, Diagonal):
        return Diagonal(_log_of(X.entries, damping))
    if isinstance(X, Kronecker):
        X = X.eigen
    if isinstance(X, Eigen):
        values = _log_of(X.spectrum, damping)
        rest = X.complement.mapped(lambda tail: _log_of(tail, damping))
        Q_G, Q_A = orthonormal(X.Q_G), orthonormal(X.Q_A)
        tails = (tail.double() for tail in (rest.G, rest.A, rest.both))
        return Eigen(Q_G, Q_A, values, *tails)
    if isinstance(X, Outer):
        values, vectors = X.double.leading(X.size)
        level = values.new_tensor(X.shift)
        X = Leading(vectors, values, level)
    if isinstance(X, Leading):
        level = _log_of(X.level, damping) if X.missing else X.level.double()
        return Leading(X.vectors.double(), _log_of(X.values, damping), level)
    values, vectors = eigh(X.dense().double(), "approximation")
    return Dense(vectors * _log_of(values, damping) @ vectors.mT, X.shape)


def _log_of(values: Tensor, damping: float) -> Tensor:
    shifted = values.double().clamp(min=0) + damping
    if shifted.numel() and not bool(shifted.min() > 0):
        raise BlockError(
            "the approximation has the eigenvalue 0, whose logarithm needs damping > 0"
        )
    return shifted.log()
