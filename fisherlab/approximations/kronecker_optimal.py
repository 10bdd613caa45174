"""The best Kronecker product, and the best sum of k of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fisherlab import blocks
from fisherlab.approximations.base import Approximation
from fisherlab.blocks import Block, BlockError, Kronecker, contractions
from fisherlab.blocks.numerics import eigh, symmetrise
from fisherlab.extract import LayerCapture

_TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-7}
_ITERATIONS = {torch.float64: 200, torch.float32: 25}


class _Rearranged:
    """Van Loan and Pitsianis' rearrangement `R(F)`, `<G, R(F) A> = <F, G (x) A>`, never formed.

    `R(F) A = (1/M) sum D A D^T` and `R(F)^T G = (1/M) sum D^T G D`: symmetric to symmetric, and
    positive semi-definite to positive semi-definite, so a power iteration from the identity stays
    in the cone and its factors need no sign.
    """

    def __init__(self, layers: tuple[LayerCapture, ...]) -> None:
        self.pairs = [(layer.inputs, layer.output_gradients) for layer in layers]
        self.count = sum(layer.examples for layer in layers)
        self.share_columns = len(layers) == 1 or all(x.column_share == 1 for x in layers)
        self.dtype, self.device = layers[0].dtype, layers[0].device
        self.shape = layers[0].shape

    @property
    def flat(self) -> bool:
        """Whether every capture has one position and whole examples."""
        return self.share_columns and all(a.shape[1] == 1 for a, _ in self.pairs)

    def left(self, A: Tensor) -> Tensor:
        """`R(F) A`, `[i, i] -> [o, o]`."""
        return sum(contractions.left_moment(a, g, A) for a, g in self.pairs) / self.count

    def right(self, G: Tensor) -> Tensor:
        """`R(F)^T G`, `[o, o] -> [i, i]`."""
        return sum(contractions.right_moment(a, g, G) for a, g in self.pairs) / self.count

    def input_matrices(self, terms: int) -> list[Tensor]:
        """For T = 1, the leading right singular matrices from two `[M, M]` Hadamard squares.

        `R(F) = (1/M) sum_n vec(sum_m g g^T) vec(a a^T)^T`: with `B_a = (a a^T)^2` and
        `B_g[n, k] = sum_{m,l} (g_mn . g_lk)^2` its singular values are those of
        `B_a^{1/2} B_g B_a^{1/2} / M^2`, square-rooted.
        """
        a = torch.cat([a[:, 0] for a, _ in self.pairs])
        m = max(g.shape[0] for _, g in self.pairs)
        pad = torch.nn.functional.pad
        g = torch.cat([pad(g[:, :, 0], (0, 0, 0, 0, 0, m - g.shape[0])) for _, g in self.pairs], 1)
        n = a.shape[0]
        B_a = (a @ a.mT).double().square()
        flat = g.reshape(m * n, -1)
        B_g = (flat @ flat.mT).double().square().view(m, n, m, n).sum((0, 2))
        values, vectors = eigh(B_a, "Hadamard square")
        kept = values > values.max() * 1e-14 * n
        root = vectors[:, kept] * values[kept].sqrt()
        inside, P = eigh(symmetrise(root.mT @ B_g @ root), "rearranged block")
        top = min(terms, int((inside > 0).sum()))
        weights = (vectors[:, kept] / values[kept].sqrt()) @ P[:, -top:].flip(1)
        return [symmetrise((a * w[:, None].to(a)).mT @ a) for w in weights.mT] if top else []

    def zero(self) -> tuple[Tensor, Tensor]:
        o, i = self.shape
        options = {"dtype": self.dtype, "device": self.device}
        return torch.zeros(o, o, **options), torch.zeros(i, i, **options)


@dataclass(frozen=True)
class KroneckerOptimal(Approximation, name="kronecker_optimal"):
    """`argmin_{G, A} ||F - G (x) A||_F`: the lower bound of KFAC, TKFAC and Shampoo.

    Van Loan & Pitsianis 1993; Koroko et al. 2022. One position: exact, from two M x M Hadamard
    squares. More: power iteration from the identity, until the singular value moves by less than
    `tolerance` (relative; None: 1e-13 in float64, 1e-7 in float32) or after `iterations`.
    """

    additive = False
    tolerance: float | None = None
    iterations: int | None = None

    def of_batch(self, layers: tuple[LayerCapture, ...]) -> Block:
        operator = _Rearranged(layers)
        if operator.flat:
            matrices = operator.input_matrices(1)
            if not matrices:
                return Kronecker(*operator.zero())
            A = matrices[0] * matrices[0].trace().sign()
            return _balanced(operator.left(A / A.norm()), A / A.norm())
        return self._iterate(operator)

    def _iterate(self, operator: _Rearranged) -> Block:
        tolerance = self.tolerance or _TOLERANCE.get(operator.dtype, 1e-7)
        iterations = self.iterations or _ITERATIONS.get(operator.dtype, 25)
        i = operator.shape[1]
        A = torch.eye(i, dtype=operator.dtype, device=operator.device) / i**0.5
        value = 0.0
        for _ in range(iterations):
            G = operator.left(A)
            size = G.double().norm().item()
            if size == 0:
                return Kronecker(*operator.zero())
            A = operator.right(G / size)
            A = A / A.norm()
            if abs(size - value) <= tolerance * size:
                break
            value = size
        return _balanced(operator.left(A), A)


@dataclass(frozen=True)
class KroneckerSum(Approximation, name="kronecker_sum"):
    """`F ~ sum_k G_k (x) A_k`, the best sum of `rank` Kronecker products.      Koroko et al. 2022.

    Its leading term is the optimal product; a sum of two or more need not be positive
    semi-definite, and the block says how much of it was clamped.
    """

    additive = False
    rank: int = 2
    iterations: int = 300

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise BlockError(f"a Kronecker sum has at least one term, got rank={self.rank}")

    def of_batch(self, layers: tuple[LayerCapture, ...]) -> Block:
        operator = _Rearranged(layers)
        if operator.flat:
            matrices = [A / A.norm() for A in operator.input_matrices(self.rank)]
        else:
            matrices = self._subspace(operator)
        terms = [(operator.left(A), A) for A in matrices] or [operator.zero()]
        G, A = (torch.stack(side) for side in zip(*terms, strict=True))
        return blocks.KroneckerSum(G, A)

    def _subspace(self, operator: _Rearranged) -> list[Tensor]:
        """Orthogonal iteration on `R(F)^T R(F)` with a few vectors to spare, then Rayleigh-Ritz."""
        i = operator.shape[1]
        width = min(self.rank + 6, i * (i + 1) // 2)
        generator = torch.Generator().manual_seed(0)
        options = {"dtype": torch.float64, "generator": generator}
        start = torch.randn(width, i, i, **options).to(operator.device)
        start[0] = torch.eye(i, dtype=torch.float64)
        basis = _orthonormal(symmetrise(start))
        tolerance = 1e-11 if operator.dtype == torch.float64 else 1e-6
        known = torch.zeros(self.rank)
        for _ in range(self.iterations):
            images = torch.stack([operator.left(A.to(operator.dtype)).double() for A in basis])
            left, values, mixing = torch.linalg.svd(images.flatten(1).mT, full_matrices=False)
            ritz = torch.einsum("kb,bij->kij", mixing, basis)
            if (values[: self.rank] - known).abs().max() <= tolerance * values[0]:
                basis = ritz
                break
            known = values[: self.rank]
            o = operator.shape[0]
            sides = left.mT.reshape(-1, o, o).to(operator.dtype)
            basis = _orthonormal(torch.stack([operator.right(G).double() for G in sides]))
        kept = int((values[: self.rank] > 1e-14 * values[0]).sum())
        return [A.to(operator.dtype) for A in basis[:kept]]


def _orthonormal(matrices: Tensor) -> Tensor:
    """Orthonormal symmetric matrices with the same span, `[b, i, i]`."""
    Q, _ = torch.linalg.qr(matrices.flatten(1).mT)
    return symmetrise(Q.mT.reshape(-1, *matrices.shape[1:]))


def _balanced(G: Tensor, A: Tensor) -> Kronecker:
    """`G (x) A` with factors of equal norm, positive semi-definite."""
    size = G.norm()
    if size == 0:
        return Kronecker(torch.zeros_like(G), torch.zeros_like(A))
    return Kronecker(G / size.sqrt(), A * size.sqrt())
