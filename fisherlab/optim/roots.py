"""Square roots of a positive definite matrix and their inverses: SNGD (14), (15), and `eigh`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fisherlab.blocks.numerics import BlockError, eigh, inverse, svd
from fisherlab.blocks.reads import holds

# Iterations after which the host looks at the residuals of an accelerator.
TOGETHER = 8


@dataclass(frozen=True)
class Roots:
    """`S^{1/2}`, `S^{-1/2}`, and what the iteration cost: `||I - Z Y||` after each iteration."""

    root: Tensor
    inverse: Tensor
    residuals: tuple[float, ...] = ()

    @property
    def iterations(self) -> int:
        """How many iterations were taken."""
        return len(self.residuals)


def by_eigh(S: Tensor) -> Roots:
    """`Q sqrt(l) Q^T` and `Q / sqrt(l) Q^T`."""
    values, Q = eigh(S, "local Fisher")
    if not holds(values[0] > 0):
        raise BlockError(f"the local Fisher has eigenvalue {values[0]:.2e}; use a larger eps")
    return Roots(Q * values.sqrt() @ Q.mT, Q / values.sqrt() @ Q.mT)


def newton_schulz(
    S: Tensor, tolerance: float | None = None, iterations: int = 100, scale: bool = True
) -> Roots:
    """`Y <- Y (3 I - Z Y)/2`, `Z <- (3 I - Z Y)/2 Z` from `Y = S/||S||`, `Z = I`.      SNGD (15).

    `S^{1/2} = sqrt(||S||) Y`, `S^{-1/2} = Z / sqrt(||S||)`. The paper omits the scaling
    (`scale=False`), without which an eigenvalue above 3 diverges or ends at minus the root. Where
    the residual stops falling above 100 times the tolerance, `eigh` finishes the work.
    """
    tolerance = tolerance or 4 * torch.finfo(S.dtype).eps * len(S)
    norm = S.norm() if scale else torch.ones_like(S.norm())
    eye = torch.eye(len(S), dtype=S.dtype, device=S.device)
    Y, Z = S / norm, eye

    def advance(Y: Tensor, Z: Tensor, ZY: Tensor) -> tuple[Tensor, Tensor]:
        half = (3 * eye - ZY) / 2
        return Y @ half, half @ Z

    Y, Z, residuals = _iterated(advance, Y, Z, tolerance, 1e6, iterations)
    return _finished(S, norm.sqrt() * Y, Z / norm.sqrt(), residuals, tolerance, scale)


def denman_beavers(S: Tensor, tolerance: float | None = None, iterations: int = 100) -> Roots:
    """`Y <- (Y + Z^{-1})/2`, `Z <- (Z + Y^{-1})/2` from `Y = S`, `Z = I`.      SNGD (14)."""
    tolerance = tolerance or 4 * torch.finfo(S.dtype).eps * len(S)
    norm = S.norm()

    def advance(Y: Tensor, Z: Tensor, ZY: Tensor) -> tuple[Tensor, Tensor]:
        return (Y + inverse(Z, "a root")) / 2, (Z + inverse(Y, "a root")) / 2

    eye = torch.eye(len(S), dtype=S.dtype, device=S.device)
    Y, Z, residuals = _iterated(advance, S / norm, eye, tolerance, 1e12, iterations)
    return _finished(S, norm.sqrt() * Y, Z / norm.sqrt(), residuals, tolerance, True)


def _iterated(
    advance: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    Y: Tensor,
    Z: Tensor,
    tolerance: float,
    largest: float,
    iterations: int,
) -> tuple[Tensor, Tensor, list[float]]:
    """`Y, Z <- advance(Y, Z, Z Y)` until `||I - Z Y||` is small, too large or stalls.

    Args:
        advance: one iteration.
        Y: `[d, d]`, on its way to the root.
        Z: `[d, d]`, on its way to the inverse of the root, from `I`.
        tolerance: a residual at which the iteration ends.
        largest: a residual beyond which it ends.
        iterations: at most so many.

    Returns:
        `Y`, `Z`, and the residual after each iteration.
    """
    eye = Z
    residuals: list[float] = []
    waiting: list[Tensor] = []
    before, over = torch.tensor(0.0, device="cpu"), torch.tensor(False, device="cpu")
    together = 1 if Y.device.type == "cpu" else TOGETHER
    for k in range(1, iterations + 1):
        ZY = Z @ Y
        size = (eye - ZY).norm().double()
        over = over | (size <= tolerance) | ~(size < largest)
        if k > 3:
            over = over | (size < 0.1) & (size >= 0.5 * before)
        before = size
        waiting += [size, over.double()]
        if k % together == 0 or k == iterations:
            seen, waiting = torch.stack(waiting).tolist(), []
            # the first that is over is the last that counts
            going = seen[1::2].count(0.0)
            residuals += seen[::2][: going + 1]
            if going < len(seen) // 2:
                break
        if together == 1:
            Y, Z = advance(Y, Z, ZY)
            continue
        # where it is over the rest of the iterations change nothing, and meet no wild number
        there = advance(*(torch.where(over, eye, X) for X in (Y, Z, ZY)))
        Y, Z = (torch.where(over, X, new) for X, new in zip((Y, Z), there, strict=True))
    return Y, Z, residuals


def nystroem(S: Tensor, rank: int, eps: float) -> Roots:
    """Roots of `C W^+ C^T + eps I` from `rank` columns, those of the largest diagonal of `S`.

    Named in the SNGD paper for wide layers and specified nowhere; the landmark rule is ours.
    """
    inner = S - eps * torch.eye(len(S), dtype=S.dtype, device=S.device)
    columns = inner.diagonal().topk(min(rank, len(S))).indices
    C = inner[:, columns]
    values, Q = eigh(C[columns], "Nystroem core")
    kept = values > values.max() * 1e-10
    thin = C @ (Q[:, kept] / values[kept].sqrt())
    left, sizes, _ = svd(thin, "Nystroem columns")
    base = eps**0.5
    eye = torch.eye(len(S), dtype=S.dtype, device=S.device)
    roots = (sizes.square() + eps).sqrt()
    root = base * eye + left * (roots - base) @ left.mT
    return Roots(root, eye / base + left * (1 / roots - 1 / base) @ left.mT)


def _finished(
    S: Tensor, root: Tensor, inverse: Tensor, residuals: list[float], tolerance: float, scale: bool
) -> Roots:
    if scale and not residuals[-1] <= 100 * tolerance:
        exact = by_eigh(S)
        return Roots(exact.root, exact.inverse, tuple(residuals))
    return Roots(root, inverse, tuple(residuals))
