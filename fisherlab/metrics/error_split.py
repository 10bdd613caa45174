"""Why a layer is bad: KFAC's error as dependence, correlation between positions, batch noise.

With `S_n = sum_t (g g^T) (x) (a a^T)`, the block `F_n` of one example without its pairs of distinct
positions, and `L_n = G_n (x) A + G (x) A_n - G (x) A`, whose mean is KFAC,

    P_n = F_n - S_n      correlation between positions
    D_n = S_n - L_n      dependence of a and g

and their means add up to `E = F - G (x) A`. The part
`(mean ||E_n||^2 - mean_{n != k} <E_n, E_k>) / M` of `||E||^2` is the noise that a mean of M
examples keeps. The rest, a U-statistic, is `<D, E> + <P, E>` without their terms of one example.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fisherlab.blocks import Block, BlockError, Outer
from fisherlab.blocks.contractions import kronecker_quadratic, second_moment, slices
from fisherlab.blocks.direct_sum import parts_of
from fisherlab.metrics.entry import entered


@dataclass(frozen=True)
class ErrorSplit:
    """Three parts of `||F - G (x) A||^2 / ||F||^2`, 0-d float64, that add up to `total`.

    `dependence` and `positions` are unbiased for the population, so a small one may be negative;
    `noise` is what a larger batch would remove.
    """

    dependence: Tensor
    positions: Tensor
    noise: Tensor

    @property
    def total(self) -> Tensor:
        """The squared relative error of KFAC (expand)."""
        return self.dependence + self.positions + self.noise


@entered
def kfac_error_split(F: Block) -> ErrorSplit:
    """`||F - G (x) A||^2 / ||F||^2 = dependence + positions + noise` of an exact block.

    The largest part says what to repair: the eigenvalues or the number of Kronecker terms
    (dependence), the weight sharing (positions; `kfac_reduce`), or the batch (noise). No matrix of
    the block's size is formed: it takes `n^2 t o i` multiplications.

    Args:
        F: an exact block.

    Returns:
        The three parts, 0-d float64.
    """
    parts = parts_of(F)
    norm = F.squared_norm().clamp(min=1e-300)
    dependence, positions, total = torch.stack([_split(part) for part in parts]).sum(0) / norm
    return ErrorSplit(dependence, positions, total - dependence - positions)


def _split(F: Block) -> Tensor:
    """U-statistics of `<D, E>` and `<P, E>`, and `||E||^2`."""
    if not isinstance(F, Outer) or F.shift:
        raise BlockError(f"the error is split for the exact block of a capture, got {F!r}")
    M, t, _ = F.a.shape
    if M < 2:
        raise BlockError("splitting the error needs at least 2 examples: one has no noise estimate")
    # any weight of the columns goes into g, so that F is the mean over examples
    a, g = F.a.double(), F.g.double() * (M * float(F.core)) ** 0.5
    A, G = second_moment(a) / (M * t), second_moment(g) / M

    FF, XX = F.squared_norm(), A.square().sum() * G.square().sum()
    FX, SX = kronecker_quadratic(a, g, G, A).sum() / M, _same_position(a, g, G, A) / M
    FS, own = _full_and_same_position(a, g)
    FL, SL, LL = _linear(a, g, G, A)
    own_F = torch.stack([_own_norm(a[n], g[:, n]) for n in range(M)])

    def unbiased(mean: Tensor, one: Tensor) -> Tensor:
        return (M**2 * mean - one.sum()) / (M * (M - 1))

    dependence = unbiased(FS - SX - FX + XX, own - SL - FL + LL)
    positions = unbiased(FF - FX - FS + SX, own_F - FL - own + SL)
    if t == 1:
        positions = torch.zeros_like(positions)
    return torch.stack([dependence, positions, FF - 2 * FX + XX])


def _own_norm(a: Tensor, g: Tensor) -> Tensor:
    """`<F_n, F_n>` of one example."""
    D = (g.mT @ a).flatten(1)
    return (D @ D.mT).square().sum()


def _full_and_same_position(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """`<F, S>`, and `<F_n, S_n>` `[n]`: the squares of `g^T D a`."""
    rows, gradients = a.flatten(0, 1), g.flatten(1, 2)
    own, total = [], torch.zeros((), dtype=torch.float64, device=a.device)
    for n in range(len(a)):
        D = g[:, n].mT @ a[n]
        own.append(_squares(D, a[n], g[:, n]))
        for part in slices(len(rows), 8 * len(D) * (D.shape[1] + len(g))):
            total += _squares(D, rows[part], gradients[:, part])
    return total / len(a) ** 2, torch.stack(own)


def _squares(D: Tensor, a: Tensor, g: Tensor) -> Tensor:
    """`sum (g[m,r]^T D[l] a[r])^2`."""
    return torch.einsum("lro,mro->lmr", a @ D.mT, g).square().sum()


def _same_position(a: Tensor, g: Tensor, G: Tensor, A: Tensor) -> Tensor:
    """`sum_n <S_n, G (x) A>`."""
    return (((g @ G) * g).sum(-1) * ((a @ A) * a).sum(-1)).sum()


def _linear(a: Tensor, g: Tensor, G: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`<F_n, L_n>`, `<S_n, L_n>` and `<L_n, L_n>`, `[n]` each."""
    full, same, linear = [], [], []
    AA, GG = A.square().sum(), G.square().sum()
    for n in range(len(a)):
        one, two = a[n : n + 1], g[:, n : n + 1]
        A_n, G_n = second_moment(one) / a.shape[1], second_moment(two)
        terms = [kronecker_quadratic(one, two, *f).sum() for f in ((G_n, A), (G, A_n), (G, A))]
        full.append(terms[0] + terms[1] - terms[2])
        terms = [_same_position(one, two, *f) for f in ((G_n, A), (G, A_n), (G, A))]
        same.append(terms[0] + terms[1] - terms[2])
        A_, G_ = (A_n * A).sum(), (G_n * G).sum()
        squares = G_n.square().sum() * AA + GG * A_n.square().sum() + GG * AA
        linear.append(squares + 2 * (G_ * A_ - G_ * AA - GG * A_))
    return torch.stack(full), torch.stack(same), torch.stack(linear)
