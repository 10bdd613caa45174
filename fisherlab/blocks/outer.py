"""The exact block, matrix-free: a shifted sum of outer products of per-example gradients."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from fisherlab.blocks import contractions
from fisherlab.blocks.base import Block
from fisherlab.blocks.eigen import Eigen
from fisherlab.blocks.kronecker import Kronecker
from fisherlab.blocks.numerics import (
    BlockError,
    check_damping,
    cholesky,
    eigh,
    rank_of,
    spectrum_power,
    symmetrise,
)


class Outer(Block):
    """`F = shift I + U C U^T`, the columns of `U` being `vec(sum_t g[m,n,t] a[n,t]^T)`.

    `a` is `[n, t, i]`, `g` is `[m, n, t, o]`; `core` is a number `c` (`C = c I`, `1/M` for a Fisher
    block) or a symmetric float64 `[R, R]` matrix over the `R = m n` columns, m major. Neither `F`
    nor `U` is ever formed. `power(-1, damping)` is the Woodbury inverse of TENGraD, FNGD (7)-(9) and
    NGM (28): the same `a` and `g` with another core and shift.
    """

    def __init__(
        self, a: Tensor, g: Tensor, core: float | Tensor | None = None, shift: float = 0.0
    ) -> None:
        if a.ndim != 3 or g.ndim != 4 or a.shape[:2] != g.shape[1:3]:
            raise BlockError(
                f"an outer block takes a [n, t, i] and g [m, n, t, o], got {tuple(a.shape)} and "
                f"{tuple(g.shape)}"
            )
        self.a, self.g = a, g
        self.core = 1.0 / a.shape[0] if core is None else core
        self.shift = float(shift)
        self._gram: Tensor | None = None
        self._rotated: list[tuple[Tensor, Tensor, Tensor]] = []

    @property
    def shape(self) -> tuple[int, int]:
        return self.g.shape[-1], self.a.shape[-1]

    @property
    def dtype(self) -> torch.dtype:
        return self.a.dtype

    @property
    def device(self) -> torch.device:
        return self.a.device

    @property
    def columns(self) -> int:
        """`R = m n`, the number of columns of `U`."""
        return self.g.shape[0] * self.g.shape[1]

    def gram(self) -> Tensor:
        """`K = U^T U`, `[R, R]` in float64, without the `1/M`; computed once."""
        if self._gram is None:
            self._gram = symmetrise(contractions.gram(self.a, self.g))
        return self._gram

    @cached_property
    def _gram_eigh(self) -> tuple[Tensor, Tensor]:
        values, vectors = eigh(self.gram(), "Gram matrix")
        return values.clamp(min=0), vectors

    def _with(self, core: float | Tensor, shift: float) -> Outer:
        block = Outer(self.a, self.g, core, shift)
        block._gram = self._gram
        return block

    def _apply_core(self, columns: Tensor) -> Tensor:
        """`C` applied to `[..., m, n]`."""
        if isinstance(self.core, Tensor):
            flat = columns.reshape(-1, self.columns).double() @ self.core
            return flat.view(columns.shape).to(columns.dtype)
        return self.core * columns

    def __matmul__(self, V: Tensor) -> Tensor:
        self.check(V)
        inner = contractions.project(self.a, self.g, V)
        product = contractions.combine(self.a, self.g, self._apply_core(inner))
        return product + self.shift * V if self.shift else product

    @cached_property
    def _range(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues `[r]` of `U C U^T`, and `W` `[R, r]` with eigenvectors `U W`."""
        values, Z = self._gram_eigh
        kept = values > 0
        kept[: len(values) - rank_of(values)] = False
        values, Z = values[kept], Z[:, kept]
        if not isinstance(self.core, Tensor):
            return self.core * values, Z / values.sqrt()
        root = Z * values.sqrt()
        inside, P = eigh(root.mT @ self.core @ root, "core of an outer block")
        return inside, (Z / values.sqrt()) @ P

    def power(self, exponent: float, damping: float = 0.0) -> Block:
        damping = check_damping(damping)
        if exponent == 1:
            return self._with(self.core, self.shift + damping)
        base = self.shift + damping
        if exponent == -1 and base > 0 and not isinstance(self.core, Tensor) and self.core > 0:
            # (mu I + c U U^T)^{-1} = I/mu - U (mu/c I + K)^{-1} U^T / mu
            kernel = self.gram() + base / self.core * torch.eye(
                self.columns, dtype=torch.float64, device=self.device
            )
            inverse = torch.cholesky_inverse(cholesky(kernel, "damped Gram matrix"))
            return self._with(-inverse / base, 1 / base)
        values, W = self._range
        full = len(values) == self.size
        if base == 0 and exponent < 0 and not full:
            raise BlockError(
                f"this block has rank {len(values)} of {self.size}, so its power {exponent:g} "
                "needs damping > 0"
            )
        powers = spectrum_power(values + base, exponent, 0.0, "outer block")
        rest = 0.0 if base == 0 else base**exponent
        return self._with(symmetrise(W * (powers - rest) @ W.mT), rest)

    def quadratic(self, V: Tensor) -> Tensor:
        self.check(V)
        inner = contractions.project(self.a, self.g, V)
        value = (inner.double() * self._apply_core(inner).double()).sum((-2, -1))
        return value + self.shift * V.double().square().sum((-2, -1))

    def _inner(self, other: Block) -> Tensor | None:
        shifted = self.shift * other.trace() if self.shift else 0.0
        if isinstance(self.core, Tensor):
            if not isinstance(other, Outer) or isinstance(other.core, Tensor):
                return shifted + self._general_inner(other)
            return other._inner(self)
        if isinstance(other, Outer) and other.a is self.a and other.g is self.g:
            core = other.core
            K = self.gram()
            same = (K @ core * K).sum() if isinstance(core, Tensor) else core * K.square().sum()
            return shifted + self.core * (same + other.shift * K.trace())
        if isinstance(other, Eigen) and not other.thin:
            return shifted + (other.spectrum * self._rotated_gradients(other.Q_G, other.Q_A)).sum()
        if isinstance(other, Kronecker) and self._knows_basis(other):
            return shifted + self._inner(other.eigen)
        return shifted + self.core * other.column_quadratics(self.a, self.g).sum()

    def _general_inner(self, other: Block) -> Tensor:
        """`sum_{rs} C_rs <D_r, other D_s>` for a full core."""
        values, W = eigh(self.core, "core of an outer block")
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for part in contractions._slices(len(values), 4 * self.size * self.dtype.itemsize):
            weights = W[:, part].mT.reshape(-1, self.g.shape[0], self.g.shape[1])
            vectors = contractions.combine(self.a, self.g, weights.to(self.dtype))
            total += (values[part] * other.quadratic(vectors)).sum()
        return total

    def _knows_basis(self, other: Kronecker) -> bool:
        cached = vars(other).get("eigen")
        return cached is not None and any(
            Q_G is cached.Q_G and Q_A is cached.Q_A for Q_G, Q_A, _ in self._rotated
        )

    def _rotated_gradients(self, Q_G: Tensor, Q_A: Tensor) -> Tensor:
        """`diag(Q^T (U C U^T) Q)` for a scalar core, remembered per basis."""
        for known_G, known_A, value in self._rotated:
            if known_G is Q_G and known_A is Q_A:
                return value
        value = self.core * contractions.rotated_diagonal(self.a, self.g, Q_G, Q_A).double()
        self._rotated.append((Q_G, Q_A, value))
        return value

    def rotated_diagonal(self, Q_G: Tensor, Q_A: Tensor) -> Tensor:
        if isinstance(self.core, Tensor):
            return super().rotated_diagonal(Q_G, Q_A)
        value = self._rotated_gradients(Q_G, Q_A)
        if not self.shift:
            return value
        norms = torch.outer(Q_G.double().square().sum(0), Q_A.double().square().sum(0))
        return value + self.shift * norms

    def trace(self) -> Tensor:
        if isinstance(self.core, Tensor):
            inside = (self.core * self.gram()).sum()
        else:
            inside = self.core * self.energies().sum()
        return inside + self.shift * self.size

    def energies(self) -> Tensor:
        """`||D[m,n]||^2`, `[m, n]` in float64."""
        if self._gram is not None:
            return self._gram.diagonal().view(self.g.shape[:2])
        return contractions.energies(self.a, self.g)

    def squared_norm(self) -> Tensor:
        K = self.gram()
        if isinstance(self.core, Tensor):
            CK = self.core @ K
            inside, linear = (CK * CK.mT).sum(), CK.trace()
        else:
            inside, linear = self.core**2 * K.square().sum(), self.core * K.trace()
        return inside + 2 * self.shift * linear + self.shift**2 * self.size

    def diagonal(self) -> Tensor:
        if isinstance(self.core, Tensor):
            return super().diagonal()
        return self.core * contractions.diagonal(self.a, self.g) + self.shift

    def eigenvalues(self) -> Tensor:
        values = self._range[0] + self.shift
        rest = values.new_full((self.size - len(values),), self.shift)
        return torch.cat([values, rest]).sort(descending=True).values

    def leading(self, k: int) -> tuple[Tensor, Tensor]:
        """The largest eigenpairs of the range of `U`; fewer than k where its rank is smaller."""
        values, W = self._range
        order = values.argsort(descending=True)[:k]
        weights = W[:, order].mT.reshape(-1, *self.g.shape[:2]).to(self.dtype)
        return values[order] + self.shift, contractions.combine(self.a, self.g, weights)

    def logdet(self, damping: float) -> Tensor:
        base = self.shift + check_damping(damping)
        values = self._range[0]
        missing = self.size - len(values)
        rest = missing * torch.tensor(base, dtype=torch.float64).log() if missing else 0.0
        return (values + base).log().sum() + rest
