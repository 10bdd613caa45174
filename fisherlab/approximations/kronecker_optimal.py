"""The best Kronecker product, and the best sum of k of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fisherlab import blocks, doors
from fisherlab.approximations.base import Approximation, check_iteration
from fisherlab.blocks import Block, BlockError, Kronecker, contractions
from fisherlab.blocks.columns import joined
from fisherlab.blocks.factor import Subspace
from fisherlab.blocks.numerics import eigh, length_of, normal, qr, sum_of, symmetrise
from fisherlab.extract import LayerCapture

_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
# Vectors kept per eigenvector sought before the iteration is restarted.
_WIDTH = 16


class _Rearranged:
    """Van Loan and Pitsianis' rearrangement `R(F)`, `<G, R(F) A> = <F, G (x) A>`, never formed.

    `R(F) A = (1/M) sum D A D^T` and `R(F)^T G = (1/M) sum D^T G D`: symmetric to symmetric,
    antisymmetric to antisymmetric, and positive semi-definite to positive semi-definite, so that
    the leading pair is semi-definite (Perron and Frobenius) and only needs a sign. Few inputs are
    taken in coordinates of the space they span, in which `A` then is.
    """

    def __init__(self, layers: tuple[LayerCapture, ...]) -> None:
        self.columns = [layer.columns for layer in layers]
        self.space = None
        if len(layers) == 1 and self.columns[0].input_span is not None:
            assert self.columns[0].of_inputs is not None
            self.space = self.columns[0].input_span[0]
            self.columns = [self.columns[0].of_inputs]
        self.columns = [of.apart for of in self.columns]
        self.count = sum(layer.examples for layer in layers)
        self.share_columns = len(layers) == 1 or all(x.whole for x in layers)
        self.dtype, self.device = layers[0].dtype, layers[0].device
        self.shape = self.columns[0].shape

    def lift(self, A: Tensor) -> Tensor:
        """An input factor in the weight's own coordinates."""
        return A if self.space is None else self.space @ A @ self.space.mT

    @property
    def flat(self) -> bool:
        """Whether every capture has one position and whole examples."""
        return self.share_columns and all(of.a.shape[1] == 1 for of in self.columns)

    def left(self, A: Tensor) -> Tensor:
        """`R(F) A`, `[i, i] -> [o, o]`."""
        moments = [contractions.left_moment(of.a, of.g, A) for of in self.columns]
        return sum_of(moments) / self.count

    def right(self, G: Tensor) -> Tensor:
        """`R(F)^T G`, `[o, o] -> [i, i]`."""
        moments = [contractions.right_moment(of.a, of.g, G) for of in self.columns]
        return sum_of(moments) / self.count

    def singular_pairs(
        self, terms: int, tolerance: float | None, iterations: int
    ) -> list[tuple[Tensor, Tensor]]:
        """Leading `(G, A)`, `||G|| ||A|| = sigma`, by Krylov iteration on the smaller side."""
        o, i = self.shape
        width = min(terms, o * o, i * i)
        forth, back = (self.left, self.right) if i <= o else (self.right, self.left)
        d = min(o, i)
        if d * d <= _WIDTH * max(width, 4):
            start = torch.eye(d * d, device="cpu").view(-1, d, d)
        else:
            # the identity is near the leading factor; the rest, antisymmetric parts too, is random
            generator = torch.Generator().manual_seed(0)
            start = normal(generator, width, d, d)
            start[0] = torch.eye(d, device="cpu")
        found = _leading(
            lambda X: back(forth(X)),
            start.to(self.device, self.dtype),
            width,
            tolerance or _TOLERANCE.get(self.dtype, 1e-5),
            iterations,
        )
        parts = [_symmetric_or_not(X) for X in found]
        pairs = [(forth(X), X) if i <= o else (X, forth(X)) for X in parts]
        return [(G, A) for G, A in pairs if G.any() and A.any()]

    def output_matrices(self, terms: int) -> list[Tensor]:
        """For T = 1, the leading left singular matrices, `sum_n w_n Gamma_n` of `Columns.hadamard`.

        `R(F) = (1/M) sum_n vec(Gamma_n) vec(a a^T)^T` with `Gamma_n = sum_m g g^T`.
        """
        of = self.columns[0] if len(self.columns) == 1 else joined(self.columns)
        values, weights = of.hadamard
        top = min(terms, int((values > 1e-14 * len(values) * values[-1]).sum()))
        # in float64: where a singular value is rounding, float32 sums are multiples of the first
        g = of.g[:, :, 0].double()
        flat = g.flatten(0, 1)
        found: list[Tensor] = []
        for w in weights[:, len(values) - top :].flip(1).double().mT:
            G = symmetrise((g * w[:, None]).flatten(0, 1).mT @ flat)
            size = G.norm()
            for _ in range(2):  # twice is enough
                for other in found:
                    G = G - (other * G).sum() * other
            if G.norm() > 1e-3 * size:  # else there is no further term
                found.append(G / G.norm())
        return [G.to(self.dtype) for G in found]

    def zero(self) -> tuple[Tensor, Tensor]:
        o, i = self.shape
        empty = torch.empty(0, dtype=self.dtype, device=self.device)
        return empty.new_zeros(o, o), empty.new_zeros(i, i)

    def balanced(self, G: Tensor, A: Tensor) -> Kronecker:
        """`G (x) A` with factors of equal norm, in the weight's own coordinates."""
        sizes = length_of(G), length_of(A)
        if not min(sizes) > 0:
            return Kronecker(torch.zeros_like(G), self.lift(torch.zeros_like(A)))
        scale = (sizes[0] / sizes[1]).sqrt().to(A)
        A = A * scale
        return Kronecker(G / scale, A if self.space is None else Subspace(self.space, A))


@dataclass(frozen=True)
class KroneckerOptimal(Approximation, name="kronecker_optimal"):
    """`argmin_{G, A} ||F - G (x) A||_F`: the lower bound of KFAC, TKFAC and Shampoo.

    Van Loan & Pitsianis 1993; Koroko et al. 2022. With one position the result is exact, from two
    M x M Hadamard squares. With more, a Krylov iteration starts from the identity.

    Args:
        tolerance: relative residual at which the iteration ends; None: 1e-12 in float64, 1e-5 in
            float32.
        iterations: the most iterations.
    """

    additive = False
    tolerance: float | None = None
    iterations: int = 100

    def __post_init__(self) -> None:
        check_iteration(self.tolerance, self.iterations)

    def of_batch(self, layers: tuple[LayerCapture, ...]) -> Block:
        operator = _Rearranged(layers)
        if operator.flat:
            matrices = operator.output_matrices(1)
            if not matrices:
                return operator.balanced(*operator.zero())
            G = matrices[0] * matrices[0].trace().sign()
            return operator.balanced(G, operator.right(G))
        pairs = operator.singular_pairs(1, self.tolerance, self.iterations)
        G, A = pairs[0] if pairs else operator.zero()
        sign = A.trace().sign()
        return operator.balanced(symmetrise(sign * G), symmetrise(sign * A))


@dataclass(frozen=True)
class KroneckerSum(Approximation, name="kronecker_sum"):
    """`F ~ sum_k G_k (x) A_k`, the best sum of `rank` Kronecker products.      Koroko et al. 2022.

    Its leading term is the optimal product; a later one may be a product of two antisymmetric
    factors. A sum of two or more need not be positive semi-definite, and the block says how much of
    it was clamped.

    Args:
        rank: number of terms, at least 1.
        tolerance: relative residual at which the iteration ends; None: 1e-12 in float64, 1e-5 in
            float32.
        iterations: the most iterations.

    Raises:
        BlockError: `rank` is below 1.
    """

    additive = False
    rank: int = 2
    tolerance: float | None = None
    iterations: int = 300

    def __post_init__(self) -> None:
        doors.count(self.rank, "rank, the number of terms,", error=BlockError)
        check_iteration(self.tolerance, self.iterations)

    def of_batch(self, layers: tuple[LayerCapture, ...]) -> Block:
        operator = _Rearranged(layers)
        if operator.flat:
            terms = [(G, operator.right(G)) for G in operator.output_matrices(self.rank)]
        else:
            terms = operator.singular_pairs(self.rank, self.tolerance, self.iterations)
        G, A = zip(*(terms or [operator.zero()]), strict=True)
        return blocks.KroneckerSum(torch.stack(G), torch.stack([operator.lift(X) for X in A]))


def _leading(
    apply: Callable[[Tensor], Tensor], start: Tensor, count: int, tolerance: float, iterations: int
) -> Tensor:
    """Leading eigenvectors `[count, d, d]`, largest first, of a symmetric operator on matrices.

    Rayleigh-Ritz in a space that grows by the residuals of the eigenvectors sought (block Lanczos
    with full reorthogonalisation), restarted from the best of it when it is full.
    """
    basis = _orthonormal(start.flatten(1))
    images = torch.stack([apply(b.view_as(start[0])).flatten() for b in basis])
    for _ in range(iterations):
        values, mixing = eigh(basis @ images.mT, "rearranged block")
        values, mixing = values.flip(0), mixing.flip(1).mT
        ritz, mapped = mixing[:count] @ basis, mixing[:count] @ images
        residuals = mapped - values[:count, None] * ritz
        open_ = residuals.norm(dim=1) > tolerance * values[0].abs()
        if not open_.any() or len(basis) == basis.shape[1]:
            break
        if len(basis) + count > _WIDTH * count:
            kept = mixing[: count + 2]
            basis, images = kept @ basis, kept @ images
        fresh = _orthonormal(residuals[open_], basis)
        basis = torch.cat([basis, fresh])
        images = torch.cat([images, *(apply(b.view_as(start[0])).view(1, -1) for b in fresh)])
    return (mixing[:count] @ basis).view(-1, *start.shape[1:])


def _orthonormal(rows: Tensor, against: Tensor | None = None) -> Tensor:
    """Orthonormal rows spanning these, orthogonal to those of `against`."""
    for _ in range(2):  # twice is enough
        if against is not None:
            rows = rows - (rows @ against.mT) @ against
        rows = qr(rows.mT, "rows")[0].mT
    return rows


def _symmetric_or_not(X: Tensor) -> Tensor:
    """The larger of the symmetric and antisymmetric parts, normalised: tied ones may be mixed."""
    parts = (X + X.mT) / 2, (X - X.mT) / 2
    part = max(parts, key=lambda part: part.norm().item())
    return part / part.norm().clamp(min=1e-30)
