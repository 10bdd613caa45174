"""The exact block, matrix-free: a shifted sum of outer products of per-example gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fisherlab.blocks import contractions
from fisherlab.blocks.base import Block
from fisherlab.blocks.columns import Columns
from fisherlab.blocks.diagonal import Diagonal
from fisherlab.blocks.eigen import Eigen
from fisherlab.blocks.kronecker import Kronecker
from fisherlab.blocks.numerics import (
    RANK_TOLERANCE,
    BlockError,
    check_damping,
    cholesky,
    dot,
    eigh,
    fits_gram,
    is_rounding,
    rank_of,
    spectrum_power,
    symmetrise,
)
from fisherlab.blocks.remembered import remembered

# Columns may be dependent where a pivot of their damped Gram matrix is below this share of another:
# its pivots only hint at it, an inverse made without eigenvectors would not be positive definite.
DEPENDENT = 0.1


class Outer(Block):
    """`F = shift I + U C U^T`, the columns of `U` being `vec(sum_t g[m,n,t] a[n,t]^T)`.

    `a` is `[n, t, i]`, `g` is `[m, n, t, o]`; `core` is a number `c` (`C = c I`, `1/M` for a Fisher
    block) or a symmetric float64 `[R, R]` matrix over the `R = m n` columns, m major. Neither `F`
    nor `U` is ever formed. `power(-1, damping)` is the Woodbury inverse of TENGraD, FNGD (7)-(9)
    and NGM (28): the same `a` and `g` with another core and shift.
    """

    def __init__(
        self,
        a: Tensor,
        g: Tensor,
        core: float | Tensor | None = None,
        shift: float = 0.0,
    ) -> None:
        self._hold(Columns(a, g), core, shift)

    @classmethod
    def over(
        cls, columns: Columns, core: float | Tensor | None = None, shift: float = 0.0
    ) -> Outer:
        """The block over columns that others hold as well; what is known of them stays known."""
        block = cls.__new__(cls)
        block._hold(columns, core, shift)
        return block

    def _hold(self, columns: Columns, core: float | Tensor | None, shift: float) -> None:
        self.of = columns
        self.core = 1.0 / columns.sizes[1] if core is None else core
        self.shift = float(shift)

    @property
    def a(self) -> Tensor:
        """Inputs `[n, t, i]`."""
        return self.of.a

    @property
    def g(self) -> Tensor:
        """Output gradients `[m, n, t, o]`."""
        return self.of.g

    @property
    def shape(self) -> tuple[int, int]:
        return self.of.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.of.dtype

    @property
    def device(self) -> torch.device:
        return self.of.device

    @property
    def columns(self) -> int:
        """`R = m n`, the number of columns of `U`."""
        return self.of.count

    @property
    def operations(self) -> int:
        """Multiplications in one product with a matrix."""
        m, n, t, o = self.g.shape
        if self.of.formed is not None:
            return 2 * self.columns * self.size
        return 2 * n * t * o * (self.shape[1] + m)

    def gram(self) -> Tensor:
        """`K = U^T U`, `[R, R]` in float64, without the `1/M`; computed once."""
        return self.of.gram

    def energies(self) -> Tensor:
        """`||D[m,n]||^2`, `[m, n]` in float64."""
        return self.of.energies

    def rescaled(self, core: float | Tensor, shift: float = 0.0) -> Outer:
        """The same columns with another core and shift."""
        return Outer.over(self.of, core, shift)

    @property
    def double(self) -> Outer:
        """The same block in float64, one object: what is known of it stays known."""
        return self if self.dtype == torch.float64 else self._double

    @remembered("of", "core", "shift")
    def _double(self) -> Outer:
        return Outer.over(self.of.double, self.core, self.shift)

    def within(self, V: Tensor) -> Outer | None:
        return self._within if V is self.of.input_space else None

    @remembered("of", "core", "shift")
    def _within(self) -> Outer | None:
        inside = self.of.inside
        if self.shift or inside is None:
            return None
        return Outer.over(inside, self.core)

    def tensors(self) -> Iterator[Tensor]:
        yield from self.of.tensors()
        if isinstance(self.core, Tensor):
            yield self.core

    def formed_bytes(self) -> int:
        return self.size**2 * self.dtype.itemsize

    @property
    def _full(self) -> bool:
        return isinstance(self.core, Tensor)

    def _apply_core(self, columns: Tensor) -> Tensor:
        """`C` applied to `[..., m, n]`."""
        if isinstance(self.core, Tensor):
            flat = columns.reshape(-1, self.columns).double() @ self.core
            return flat.view(columns.shape).to(columns.dtype)
        return self.core * columns

    def _core_times(self, K: Tensor) -> Tensor:
        """`C K` for `K` `[R, ...]`."""
        return self.core @ K if isinstance(self.core, Tensor) else self.core * K

    def __matmul__(self, V: Tensor) -> Tensor:
        self.check(V)
        columns = self._apply_core(self.of.project(V, self._full))
        product = self.of.combine(columns, self._full)
        if self.shift:
            product = product + self.shift * V.to(product.dtype)
        return product.to(V.dtype)

    @remembered("of", "core")
    def _range(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues `[r]` of `U C U^T`, and `W` `[R, r]` with eigenvectors `U W`."""
        values, Z = self.of.gram_eigen
        # columns are rounded to their dtype, so their Gram matrix is known to its eps squared
        eps = max(torch.finfo(torch.float64).eps, torch.finfo(self.dtype).eps ** 2)
        rank = rank_of(values, eps)
        values, Z = values[len(values) - rank :], Z[:, len(values) - rank :]
        if not isinstance(self.core, Tensor):
            return self.core * values, Z / values.sqrt()
        root = Z * values.sqrt()
        inside, P = eigh(root.mT @ self.core @ root, "core of an outer block")
        return inside, (Z / values.sqrt()) @ P

    def _vectors(self, W: Tensor, exact: bool = True) -> Iterator[tuple[slice, Tensor]]:
        """`(part, U W[:, part])` as weights `[part, o, i]`, a workspace of them at a time."""
        for part in contractions.slices(W.shape[1], 8 * self.size):
            yield part, self.of.combine(W[:, part].mT.reshape(-1, *self.of.sizes), exact)

    def power(self, exponent: float, damping: float = 0.0) -> Block:
        damping = check_damping(damping)
        if exponent == 1:
            return self.rescaled(self.core, self.shift + damping)
        base = self.shift + damping
        if exponent == -1 and base > 0 and not isinstance(self.core, Tensor) and self.core > 0:
            # (mu I + c U U^T)^{-1} = I/mu - U (mu/c I + K)^{-1} U^T / mu
            L = self._damped_gram(base / self.core)
            pivots = L.diagonal().square()
            if bool(pivots.min() > DEPENDENT * pivots.max()):
                return self.rescaled(-torch.cholesky_inverse(L) / base, 1 / base)
            # of dependent columns what U cancels would drown the rest of the inverse
        values, W = self._range
        full = len(values) == self.size
        if base == 0 and exponent < 0 and not full:
            raise BlockError(
                f"this block has rank {len(values)} of {self.size}, so its power {exponent:g} "
                "needs damping > 0"
            )
        powers = spectrum_power(values + base, exponent, 0.0, "outer block")
        rest = 0.0 if base == 0 else base**exponent
        return self.rescaled(symmetrise(W * (powers - rest) @ W.mT), rest)

    def solve(self, V: Tensor, damping: float) -> Tensor:
        """`(F + damping I)^{-1} V`;  of `V = U w` it is `U (damping I + C K)^{-1} w`.

        A gradient in float32 is such a sum up to its rounding, which 1 / damping would blow up: a
        damping of 1e-3 tr F / N is 1e-8 of the eigenvalues of a layer of 10^6 parameters.
        """
        self.check(V)
        damping = check_damping(damping)
        if self.shift or not damping or isinstance(self.core, Tensor) or not self.core > 0:
            return super().solve(V, damping)
        L = self._damped_gram(damping / self.core)

        def inverse(columns: Tensor) -> Tensor:
            """`U (K + damping / c I)^{-1} columns`."""
            solved = torch.cholesky_solve(columns.reshape(-1, self.columns).mT, L).mT
            return self.of.combine(solved.reshape(*V.shape[:-2], *self.of.sizes), True)

        w = self._combination(V)
        if w is not None:
            return (inverse(w) / self.core).to(V.dtype)
        inner = self.of.project(V, True)
        return ((V.double() - inverse(inner)) / damping).to(V.dtype)

    def _damped_gram(self, damping: float) -> Tensor:
        """Lower `L` with `K + damping I = L L^T`."""
        eye = torch.eye(self.columns, dtype=torch.float64, device=self.device)
        return cholesky(self.gram() + damping * eye, "damped Gram matrix")

    def _combination(self, V: Tensor) -> Tensor | None:
        """`w` `[..., R]` with `V = U w` up to the rounding of `V`; None where there is none.

        Nor in float64, whose rounding a damping does not make visible.
        """
        eps = torch.finfo(V.dtype).eps
        if eps**2 < torch.finfo(torch.float64).eps:
            return None
        inner = self.of.project(V, True).flatten(-2)
        _, W = self._range
        w = inner @ W @ W.mT
        square = torch.linalg.vecdot(V.double(), V.double()).sum(-1)
        beside = square - torch.linalg.vecdot(inner, w)
        return w if is_rounding(beside, square, V.dtype) else None

    def quadratic(self, V: Tensor) -> Tensor:
        self.check(V)
        inner = self.of.project(V, self._full).double()
        value = (inner * self._apply_core(inner)).sum((-2, -1))
        if not self.shift:
            return value
        return value + self.shift * torch.linalg.vecdot(V, V).sum(-1, dtype=torch.float64)

    def column_quadratics(self, a: Tensor, g: Tensor) -> Tensor:
        K = contractions.cross_gram(self.a, self.g, a, g)
        value = (K * self._core_times(K)).sum(0).view(g.shape[:2])
        return value + self.shift * contractions.energies(a, g) if self.shift else value

    def _inner(self, other: Block) -> Tensor | None:
        shifted = self.shift * other.trace() if self.shift else 0.0
        if isinstance(other, Outer):
            return shifted + other.shift * self._gram_trace() + self._outer_inner(other)
        if isinstance(self.core, Tensor):
            return shifted + self._general_inner(other)
        if isinstance(other, Kronecker):
            eigen = Kronecker.eigen.known(other)
            if eigen is not None and self.of.knows(eigen.Q_G, eigen.Q_A):
                other = eigen
        if isinstance(other, Eigen):
            return shifted + self._eigen_inner(other)
        if isinstance(other, Diagonal):
            return shifted + self.core * dot(other.entries, self.of.squares)
        known = other.inner_with_columns(self.of)
        if known is not None:
            return shifted + self.core * known
        if self.of.short:
            return shifted + self.core * other.quadratic(self.of.matrices).sum()
        return shifted + self.core * other.column_quadratics(self.a, self.g).sum()

    def _eigen_inner(self, other: Eigen) -> Tensor:
        """`<U C U^T, other>` from the energies in its basis and, for tails, beside it."""
        E = self._rotated_gradients(other.Q_G, other.Q_A)
        value = (other.spectrum * E).sum()
        total = self.core * self.energies().sum()
        noise = RANK_TOLERANCE * torch.finfo(self.dtype).eps * total
        # what rounding leaves beside a basis that holds all columns, 1 / damping would blow up
        if other.confined or total - E.sum() <= noise:
            return value
        rows, columns = E.sum(1), E.sum(0)
        if other.Q_A.shape[1] < self.shape[1]:
            L = self.of.left
            rows = self.core * ((L @ other.Q_G) * other.Q_G).sum(0, dtype=torch.float64)
        if other.Q_G.shape[1] < self.shape[0]:
            R = self.of.right
            columns = self.core * ((R @ other.Q_A) * other.Q_A).sum(0, dtype=torch.float64)
        value = value + other.tail_G.double() @ (rows - E.sum(1))
        value = value + other.tail_A.double() @ (columns - E.sum(0))
        rest = total - rows.sum() - columns.sum() + E.sum()
        return value + other.tail.double() * rest

    @property
    def _core_gram(self) -> Tensor:
        """`C K`, whose trace and squares are those of `U C U^T`."""
        return self._core_times(self.gram())

    def _outer_inner(self, other: Outer) -> Tensor:
        """`<U C U^T, U' C' U'^T> = <C U^T U', U^T U' C'>`."""
        scalar = not isinstance(self.core, Tensor) and not isinstance(other.core, Tensor)
        if other.of is self.of or (other.a is self.a and other.g is self.g):
            if scalar and not self._fits:
                return self.core * other.core * self.of.pair_sums[0].sum()
            return (self._core_gram * other._core_gram.mT).sum()
        if scalar:
            # the larger one's examples, a workspace of the smaller's products at a time
            few, many = sorted((self, other), key=lambda block: block.columns)
            total = torch.zeros((), dtype=torch.float64, device=self.device)
            for p in contractions.slices(len(many.a), 8 * len(many.g) * few.columns):
                K = contractions.cross_gram(few.a, few.g, many.a[p], many.g[:, p])
                total += K.square().sum()
            return self.core * other.core * total
        K = contractions.cross_gram(self.a, self.g, other.a, other.g)
        return (self._core_times(K) * other._core_times(K.mT).mT).sum()

    def _general_inner(self, other: Block) -> Tensor:
        """`sum_{rs} C_rs <D_r, other D_s>` for a full core."""
        assert isinstance(self.core, Tensor)
        values, W = eigh(self.core, "core of an outer block")
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for part, vectors in self._vectors(W):
            total += (values[part] * other.quadratic(vectors.to(self.dtype))).sum()
        return total

    def _rotated_gradients(self, Q_G: Tensor, Q_A: Tensor) -> Tensor:
        """`diag(Q^T (U C U^T) Q)` for a scalar core."""
        return self.core * self.of.rotated_squares(Q_G, Q_A)

    def rotated_diagonal(self, Q_G: Tensor, Q_A: Tensor) -> Tensor:
        if isinstance(self.core, Tensor):
            a, g = self.a.double(), self.g.double()
            value = Outer(a @ Q_A.to(a), g @ Q_G.to(g), self.core).diagonal()
        else:
            value = self._rotated_gradients(Q_G, Q_A)
        if not self.shift:
            return value
        norms = torch.outer(Q_G.double().square().sum(0), Q_A.double().square().sum(0))
        return value + self.shift * norms

    def diagonal_of(self, other: Block) -> Tensor:
        """`diag(Q^T other Q)` for the eigenvectors `Q` of the range of `U`."""
        values, W = self._range
        if other is self:
            return values.sort(descending=True).values + self.shift
        parts = [
            other.quadratic(vectors.to(self.dtype))
            for _, vectors in self._vectors(W[:, values.argsort(descending=True)])
        ]
        return torch.cat(parts) if parts else values

    def trace(self) -> Tensor:
        return self._inside_trace() + self.shift * self.size

    def _inside_trace(self) -> Tensor:
        """`tr U C U^T`."""
        if isinstance(self.core, Tensor):
            return self._core_gram.trace()
        return self.core * self.energies().sum()

    def _gram_trace(self) -> Tensor:
        """The same in float64 throughout, against a core that cancels it, where `K` fits."""
        return self._core_gram.trace() if self._fits else self._inside_trace()

    @property
    def _fits(self) -> bool:
        return isinstance(self.core, Tensor) or fits_gram(self.columns, self.device)

    def squared_norm(self) -> Tensor:
        return self._squared_norm

    @remembered("of", "core", "shift")
    def _squared_norm(self) -> Tensor:
        if not self._fits:
            inside = self.core**2 * self.of.pair_sums[0].sum()
            return inside + 2 * self.shift * self._inside_trace() + self.shift**2 * self.size
        CK = self._core_gram
        linear = 2 * self.shift * CK.trace() + self.shift**2 * self.size
        return (CK * CK.mT).sum() + linear

    def diagonal(self) -> Tensor:
        if not isinstance(self.core, Tensor):
            return self.core * self.of.squares + self.shift
        values, W = eigh(self.core, "core of an outer block")
        total = torch.full(self.shape, self.shift, dtype=torch.float64, device=self.device)
        for part, vectors in self._vectors(W):
            total += torch.einsum("r,roi->oi", values[part], vectors.square())
        return total.to(self.dtype)

    def eigenvalues(self) -> Tensor:
        values = self._range[0] + self.shift
        rest = values.new_full((self.size - len(values),), self.shift)
        return torch.cat([values, rest]).sort(descending=True).values

    def leading(self, k: int) -> tuple[Tensor, Tensor]:
        """The largest eigenpairs of the range of `U`; fewer than k where its rank is smaller."""
        if k not in self._leading:
            self._leading[k] = self._leading_pairs(k)
        return self._leading[k]

    def leading_values(self, k: int) -> Tensor:
        return self._range[0].sort(descending=True).values[:k] + self.shift

    def leading_products(self, k: int, q_G: Tensor, q_A: Tensor) -> Tensor:
        if self._full:
            return super().leading_products(k, q_G, q_A)
        values, W = self._range
        W = W[:, values.argsort(descending=True)[:k]]
        # <U w, q> = w . U^T q: no eigenvector is formed
        return W.mT @ self.of.project_pairs(q_G, q_A).double().flatten(1).mT

    @remembered("of", "core")
    def _leading(self) -> dict[int, tuple[Tensor, Tensor]]:
        """By k: the leading eigenpairs."""
        return {}

    def _leading_pairs(self, k: int) -> tuple[Tensor, Tensor]:
        values, W = self._range
        order = values.argsort(descending=True)[:k]
        # the leading vectors of a scalar core cancel nothing
        parts = self._vectors(W[:, order], self._full)
        vectors = [part.to(self.dtype) for _, part in parts]
        empty = torch.zeros(0, *self.shape, dtype=self.dtype, device=self.device)
        return values[order] + self.shift, torch.cat([empty, *vectors])

    def logdet(self, damping: float) -> Tensor:
        base = self.shift + check_damping(damping)
        values = self._range[0]
        missing = self.size - len(values)
        rest = missing * math.log(base) if missing and base else -math.inf if missing else 0.0
        return (values + base).clamp(min=0).log().sum() + rest
