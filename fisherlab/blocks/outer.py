"""The exact block, matrix-free: a shifted sum of outer products of per-example gradients."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fisherlab import doors
from fisherlab.blocks import contractions
from fisherlab.blocks.base import Block, Powered
from fisherlab.blocks.basis import Basis, Space
from fisherlab.blocks.columns import Columns
from fisherlab.blocks.diagonal import Diagonal
from fisherlab.blocks.eigen import Eigen
from fisherlab.blocks.entry import check_held
from fisherlab.blocks.kronecker import Kronecker
from fisherlab.blocks.numerics import (
    ENTRY_EPS,
    RANK_TOLERANCE,
    RESIDUAL_EPS,
    BlockError,
    check_alike,
    check_damping,
    check_fits,
    check_symmetric,
    cholesky,
    dot,
    eigh,
    fits_gram,
    is_coarse,
    negative_share,
    null_of,
    over,
    qr,
    rank_of,
    spectrum_power,
    squares,
    symmetrise,
)
from fisherlab.blocks.work import cached

# Columns may be dependent where a pivot of their damped Gram matrix is below this share of another:
# its pivots only hint at it, an inverse made without eigenvectors would not be positive definite.
DEPENDENT = 0.1


class OfColumns(Block):
    """`F = shift I + U C U^T` over columns `U` that others hold as well, never formed."""

    columns: Columns
    shift: float

    @property
    def a(self) -> Tensor:
        """Inputs `[n, t, i]`."""
        return self.columns.a

    @property
    def g(self) -> Tensor:
        """Output gradients `[m, n, t, o]`."""
        return self.columns.g

    @cached_property
    def shape(self) -> tuple[int, int]:
        return self.columns.shape

    @cached_property
    def dtype(self) -> torch.dtype:
        return self.columns.dtype

    @cached_property
    def device(self) -> torch.device:
        return self.columns.device

    @cached_property
    def num_columns(self) -> int:
        """`R = m n`, the number of columns of `U`."""
        return self.columns.count

    @property
    def operations(self) -> int:
        """Multiplications in one product with a matrix."""
        (m, n), t, (o, i) = self.columns.sizes, self.columns.positions, self.shape
        if self.columns.formed is not None:
            return 2 * self.num_columns * self.size
        return 2 * n * t * o * (i + m)

    def gram(self) -> Tensor:
        """`K = U^T U`, `[R, R]` in float64, without the `1/M`; computed once."""
        return self.columns.gram

    def energies(self) -> Tensor:
        """`||D[m,n]||^2`, `[m, n]` in float64."""
        return self.columns.energies

    def tensors(self) -> Iterator[Tensor]:
        yield from self.columns.tensors()

    def formed_bytes(self) -> int:
        return self.size**2 * self.dtype.itemsize

    @property
    @abstractmethod
    def _range(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues `[r]` of `U C U^T`, and `W` `[R, r]` with eigenvectors `U W`."""

    def _vectors(self, W: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """`(part, U W[:, part])` as weights `[part, o, i]`, a workspace of them at a time."""
        for part in contractions.slices(W.shape[1], 8 * self.size):
            yield part, self._of_columns(W[:, part].mT)

    def _of_columns(self, weights: Tensor) -> Tensor:
        """`U w`, `[..., R] -> [..., o, i]`, in float64."""
        sizes = *weights.shape[:-1], *self.columns.sizes
        return self.columns.combine(weights.reshape(sizes), True)

    def power(self, exponent: float, damping: float = 0.0) -> Block:
        base = self.shift + damping
        values, W = self._range
        if base == 0 and exponent < 0 and len(values) < self.size:
            raise BlockError(
                f"this block has rank {len(values)} of {self.size}, so its power {exponent:g} "
                "needs damping > 0"
            )
        if base:
            check_fits(base, exponent, self.dtype, "outer block")
        # a core of one's own may have eigenvalues below 0
        powers = spectrum_power(values + self.shift, exponent, damping, "outer block")
        rest = 0.0 if base == 0 else base**exponent
        if len(values) == self.size:
            # nothing is beside the range, where the power of a small base would cancel
            rest = float(powers[values.argmin()].detach())
        return OuterSum.over(self.columns, W, powers - rest, rest, True)

    def diagonal_of(self, other: Block) -> Tensor:
        """`diag(Q^T other Q)` for the eigenvectors `Q` of the range of `U`."""
        values, W = self._range
        if other is self:
            return values.sort(descending=True).values + self.shift
        # the vectors of small eigenvalues have lengths with the rounding of the largest one
        parts = [
            other.quadratic(vectors.to(self.dtype)) / squares(vectors.flatten(1))
            for _, vectors in self._vectors(W[:, values.argsort(descending=True)])
        ]
        return torch.cat(parts) if parts else values

    def chosen(self, other: Block) -> Tensor:
        return self.nothing_chosen

    @abstractmethod
    def _inside_trace(self) -> Tensor:
        """`tr U C U^T`, 0-d float64."""

    def _gram_trace(self) -> Tensor:
        """The same in float64 throughout, where the Gram matrix fits."""
        return self._inside_trace()

    def trace(self) -> Tensor:
        return self._inside_trace() + self.shift * self.size

    def eigenvalues(self) -> Tensor:
        values = self._range[0] + self.shift
        rest = values.new_full((self.size - len(values),), self.shift)
        return torch.cat([values, rest]).sort(descending=True).values

    def leading(self, k: int) -> tuple[Tensor, Tensor]:
        """The largest eigenpairs of the range of `U`; fewer than k where its rank is smaller."""
        values, W = self._range
        order = values.argsort(descending=True)[:k]
        empty = W.new_zeros(0, *self.shape)
        vectors = torch.cat([empty, *(part for _, part in self._vectors(W[:, order]))])
        # the Gram matrix knows eigenvalues to the rounding of the largest, and the vectors of small
        # ones are as far from orthogonal: QR keeps them, the largest first
        Q, R = qr(vectors.flatten(1).mT, "eigenvectors of an outer block")
        Q = torch.where(R.diagonal() < 0, -Q, Q)
        return values[order] + self.shift, Q.mT.reshape(-1, *self.shape).to(self.dtype)

    def leading_values(self, k: int) -> Tensor:
        return self._range[0].sort(descending=True).values[:k] + self.shift

    def logdet(self, damping: float) -> Tensor:
        base = self.shift + damping
        values = self._range[0]
        missing = self.size - len(values)
        rest = missing * math.log(base) if missing and base else -math.inf if missing else 0.0
        return ((values + self.shift).clamp(min=0) + damping).log().sum() + rest


@dataclass(frozen=True)
class Split:
    """`V = sum_k x_k u_k + d + e` over eigenvectors `u_k` of the range, `e` the rounding of `V`."""

    inside: Tensor  # x, [..., r] in float64
    rest: Tensor | None  # d, [..., o, i] in float64; None where it is 0
    kept: Tensor  # ||d||, [...]
    lost: Tensor  # ||e||, [...]


class Outer(OfColumns):
    """`F = shift I + c U U^T`, the columns of `U` being `vec(sum_t g[m,n,t] a[n,t]^T)`.

    Args:
        a: `[n, t, i]`, the inputs.
        g: `[m, n, t, o]`, the output gradients.
        core: `c`; None: the `1/M` of a Fisher block. A symmetric float64 matrix `[R, R]` makes an
            `OuterSum`.
        shift: a multiple of the identity.

    Example:
        >>> import torch
        >>> from fisherlab import blocks
        >>> a, g = torch.tensor([[[1.0, 2.0]]]), torch.ones(1, 1, 1, 1)
        >>> blocks.Outer(a, g).dense().tolist()
        [[1.0, 2.0], [2.0, 4.0]]
    """

    def __new__(cls, a: Any = None, g: Any = None, core: Any = None, shift: float = 0.0) -> Any:
        if cls is Outer and isinstance(core, Tensor) and core.ndim:
            return OuterSum(a, g, core, shift)
        return super().__new__(cls)

    def __init__(self, a: Tensor, g: Tensor, core: float | None = None, shift: float = 0.0) -> None:
        self._hold(Columns(a, g, careful=True), core, shift)

    @classmethod
    def over(cls, columns: Columns, core: float | None = None, shift: float = 0.0) -> Outer:
        """The block over columns that others hold as well; what is known of them stays known."""
        check_held(columns)
        block = object.__new__(cls)
        block._hold(columns, core, shift)
        return block

    def _hold(self, columns: Columns, core: float | None, shift: float) -> None:
        self.columns, self.shift = columns, _shift(shift)
        known = None if core is None else doors.number(core, "core", least=0.0, error=BlockError)
        self.core = 1.0 / columns.sizes[1] if known is None else known

    @property
    def double(self) -> Outer:
        """The same block in float64, one object: what is known of it stays known."""
        return self if self.dtype == torch.float64 else self._double

    @cached_property
    def _double(self) -> Outer:
        return Outer.over(self.columns.double, self.core, self.shift)

    def restricted_to(self, space: Space) -> Outer | None:
        return self._restricted if space is self.columns.space else None

    @cached_property
    def _restricted(self) -> Outer | None:
        inside = self.columns.inside
        return None if self.shift or inside is None else Outer.over(inside, self.core)

    def __matmul__(self, V: Tensor) -> Tensor:
        product = self.core * self.columns.combine(self.columns.project(V))
        return (product + self.shift * V.to(product) if self.shift else product).to(V.dtype)

    @cached
    def _range(self) -> tuple[Tensor, Tensor]:
        values, Z = self.columns.gram_eigen
        rank = rank_of(values, rounding(self.dtype))
        values, Z = values[len(values) - rank :], Z[:, len(values) - rank :]
        return self.core * values, Z / values.sqrt()

    def power(self, exponent: float, damping: float = 0.0) -> Block:
        base = self.shift + damping
        if exponent == 1:
            return Outer.over(self.columns, self.core, base)
        if exponent == -1 and base > 0 and self.core > 0 and not self.columns.eigen_known:
            # (mu I + c U U^T)^{-1} = I/mu - U (mu/c I + K)^{-1} U^T / mu
            L = self._damped_gram(base / self.core)
            pivots = L.diagonal().square()
            if bool(pivots.min() > DEPENDENT * pivots.max()):
                eye = torch.eye(len(L), dtype=L.dtype, device=L.device)
                W = torch.linalg.solve_triangular(L.mT, eye, upper=True)
                return OuterSum.over(self.columns, W, L.new_full((len(L),), -1 / base), 1 / base)
            # linearly dependent columns: cancellation in U would dominate the inverse
        return super().power(exponent, damping)

    def solve(self, V: Tensor, damping: float) -> Tensor:
        """`(F + damping I)^{-1} V`;  for `V = U w` it is `U (damping I + c K)^{-1} w`.

        A gradient in float32 is such a sum up to its rounding, which 1 / damping would amplify. In
        a layer of 10^6 parameters, a damping of 1e-3 tr F / N is 1e-8 of the eigenvalues.
        """
        split = self._split(V) if damping else None
        if split is None:
            return super().solve(V, damping)
        values, _ = self._range
        step = self._lifted(split.inside / (values + damping))
        return (step if split.rest is None else step + split.rest / damping).to(V.dtype)

    def without_rounding(self, V: Tensor) -> Tensor:
        split = self._split(V)
        if split is None:
            return V
        inside = self._lifted(split.inside)
        return (inside if split.rest is None else inside + split.rest).to(V.dtype)

    def _lifted(self, inside: Tensor) -> Tensor:
        """`sum_k x_k u_k` over the eigenvectors, `[..., r] -> [..., o, i]` in float64."""
        return self._of_columns(inside @ self._range[1].mT)

    def _damped_gram(self, damping: float) -> Tensor:
        """Lower `L` with `K + damping I = L L^T`."""
        damped = self.gram().clone()
        damped.diagonal().add_(damping)
        return cholesky(damped, "damped Gram matrix")

    def _split(self, V: Tensor) -> Split | None:
        """`V` in the range and beside it; None in float64, and beside a shift.

        An entry of a sum `U w` is rounded to eps of `||w|| (sum_n D_n^2)^{1/2}` there: parameters
        of inputs in small units have a small rounding. That of float64 no damping makes visible.
        """
        if self.shift or not self.core > 0 or not is_coarse(V.dtype):
            return None
        eps, (_, W) = torch.finfo(V.dtype).eps, self._range
        inside = self.columns.project(V, True).flatten(-2) @ W
        rest = self._lifted(inside).neg_().add_(V)
        every = torch.linalg.vector_norm(rest, dim=(-2, -1))
        length = torch.linalg.vector_norm(V.double(), dim=(-2, -1))
        # a longer rest is that of a matrix which is no sum of columns
        sums = (every <= RESIDUAL_EPS * eps * length)[..., None, None]
        if sums.any():
            weights = torch.linalg.vector_norm(inside @ W.mT, dim=-1)[..., None, None]
            floor = (weights * self.columns.lengths).add_(V.abs()).mul_(ENTRY_EPS * eps)
            rest.masked_fill_((rest.abs() <= floor) & sums, 0)
        kept = torch.linalg.vector_norm(rest, dim=(-2, -1))
        lost = (every.square() - kept.square()).clamp(min=0).sqrt()
        return Split(inside, rest if kept.any() else None, kept, lost)

    def rounding_of_solves(self, V: Tensor, dampings: Sequence[float]) -> list[float]:
        """The share of each `(F + damping I)^{-1} V` that may be rounding, `V` a mean of columns.

        Columns of one direction, such as those of equal inputs, have eigenvalues beside it that
        are rounding; a mean of columns that cancel is no longer than it. 0 in float64.
        """
        self.check(V)
        for damping in doors.listed(dampings, "dampings", error=BlockError):
            check_damping(damping)
        split = self._split(V)
        if split is None:
            return [0.0] * len(dampings)
        inside, rest = split.inside, split.rest
        values, W = self._range
        eps = torch.finfo(V.dtype).eps
        floor = (RANK_TOLERANCE * eps) ** 2
        unsure = values <= floor * values.amax() if len(values) else values > 0
        cancelled = eps * over(self.trace(), dot(V, V)).sqrt()
        # along eigenvectors whose eigenvalues are rounding, a sum of columns is as short as these
        short = torch.linalg.vector_norm(W @ inside) * self._length_below_range
        beside, missed = torch.minimum(split.lost, short), torch.zeros_like(short)
        if rest is not None:
            # a mean of columns is rounded to eps of their mean square
            scale = RANK_TOLERANCE * eps * math.sqrt(self.core) * self.columns.lengths
            beside = beside + rest.masked_fill(rest.abs() > scale, 0).norm()
            # `solve` takes the eigenvalues of the rest as 0
            missed = (self.double @ rest).norm()
        shares = []
        for damping in dampings:
            parts = (inside / (values + damping)).square()
            noise, square = parts[unsure].sum(), parts.sum()
            if damping:
                moved = beside + torch.minimum(missed / damping, split.kept)
                noise = noise + (moved / damping).square()
                square = square + (split.kept / damping).square()
            shares.append(torch.maximum(over(noise, square).sqrt(), cancelled))
        return torch.stack(shares).tolist() if shares else []

    @cached
    def _length_below_range(self) -> Tensor:
        """How long a sum `U w` with `||w|| = 1` is at most beside the range, 0-d float64."""
        values, _ = self.columns.gram_eigen
        below = values[: len(values) - len(self._range[0])]
        if len(below):
            below = below - RANK_TOLERANCE * torch.finfo(values.dtype).eps * values.amax()
        return below.clamp(min=0).sum().sqrt()

    def quadratic(self, V: Tensor) -> Tensor:
        value = self.core * self.columns.project(V).double().square().sum((-2, -1))
        return value + self.shift * _squares(V) if self.shift else value

    def column_quadratics(self, a: Tensor, g: Tensor) -> Tensor:
        K = contractions.cross_gram(self.a, self.g, a, g)
        value = self.core * K.square().sum(0).view(g.shape[:2])
        return value + self.shift * contractions.energies(a, g) if self.shift else value

    def _inner(self, other: Block) -> Tensor | None:
        shifted = self.shift * other.trace() if self.shift else 0.0
        if isinstance(other, OuterSum | Powered):
            return None  # which knows its product with any block
        if isinstance(other, Outer):
            return shifted + other.shift * self._gram_trace() + self._outer_inner(other)
        if isinstance(other, Kronecker):
            eigen = Kronecker.eigen.known(other)
            if eigen is not None and self.columns.knows(eigen.Q_G, eigen.Q_A):
                other = eigen
        if isinstance(other, Eigen):
            return shifted + self._eigen_inner(other)
        if isinstance(other, Diagonal):
            return shifted + self.core * dot(other.entries, self.columns.squares)
        known = other.inner_with_columns(self.columns)
        if known is not None:
            return shifted + self.core * known
        if self.columns.short:
            return shifted + self.core * other.quadratic(self.columns.matrices).sum()
        apart = self.columns.apart
        return shifted + self.core * other.column_quadratics(apart.a, apart.g).sum()

    def _eigen_inner(self, other: Eigen) -> Tensor:
        """`<c U U^T, other>` from squared coordinates in its basis; tails take the complement."""
        E = self._rotated_gradients(other.Q_G, other.Q_A)
        value = (other.spectrum * E).sum()
        total = self.core * self.energies().sum()
        noise = RANK_TOLERANCE * torch.finfo(self.dtype).eps * total
        # 1 / damping would amplify rounding errors in the orthogonal complement
        if other.confined or total - E.sum() <= noise:
            return value
        rows, columns = E.sum(1), E.sum(0)
        if other.Q_A.shape[1] < self.shape[1]:
            rows = self.core * self.columns.left_diagonal(other.Q_G)
        if other.Q_G.shape[1] < self.shape[0]:
            columns = self.core * self.columns.right_diagonal(other.Q_A)
        rest = total - rows.sum() - columns.sum() + E.sum()
        return value + other.complement.weighed(rows - E.sum(1), columns - E.sum(0), rest)

    def _outer_inner(self, other: Outer) -> Tensor:
        """`<c U U^T, c' U' U'^T> = c c' ||U^T U'||^2`."""
        scale = self.core * other.core
        if same_columns(self.columns, other.columns):
            if self._fits:
                return scale * self.gram().square().sum()
            return scale * self.columns.pair_sums[0].sum()
        # the larger one's examples, a workspace of the smaller's products at a time
        few, many = sorted((self, other), key=lambda block: block.num_columns)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for p in contractions.slices(len(many.a), 8 * len(many.g) * few.num_columns):
            K = contractions.cross_gram(few.a, few.g, many.a[p], many.g[:, p])
            total += K.square().sum()
        return scale * total

    def _rotated_gradients(self, Q_G: Basis, Q_A: Basis) -> Tensor:
        """`diag(Q^T (c U U^T) Q)`."""
        return self.core * self.columns.rotated_squares(Q_G, Q_A)

    def rotated_diagonal(self, Q_G: Basis, Q_A: Basis) -> Tensor:
        value = self._rotated_gradients(Q_G, Q_A)
        return value + self.shift * _norms(Q_G, Q_A) if self.shift else value

    def _inside_trace(self) -> Tensor:
        return self.core * self.energies().sum()

    def _gram_trace(self) -> Tensor:
        return self.core * self.gram().trace() if self._fits else self._inside_trace()

    @property
    def _fits(self) -> bool:
        return fits_gram(self.num_columns, self.device)

    def squared_norm(self) -> Tensor:
        return self._squared_norm

    @cached
    def _squared_norm(self) -> Tensor:
        inside = self._restricted if self.columns.known_inside is not None else None
        if inside is not None:
            return inside.squared_norm()
        linear = 2 * self.shift * self._gram_trace() + self.shift**2 * self.size
        return self._outer_inner(self) + linear

    def diagonal(self) -> Tensor:
        return self.core * self.columns.squares + self.shift

    def leading(self, k: int) -> tuple[Tensor, Tensor]:
        if k not in self._leading:
            self._leading[k] = super().leading(k)
        return self._leading[k]

    @cached_property
    def _leading(self) -> dict[int, tuple[Tensor, Tensor]]:
        """The leading eigenpairs, by k."""
        return {}

    def leading_products(self, k: int, q_G: Tensor, q_A: Tensor) -> Tensor:
        values, W = self._range
        W = W[:, values.argsort(descending=True)[:k]]
        # <U w, q> = w . U^T q: no eigenvector is formed
        return W.mT @ self.columns.project_pairs(q_G, q_A).double().flatten(1).mT


class OuterSum(OfColumns):
    """`F = shift I + sum_k d_k v_k v_k^T` with `v_k = U W_k`: `U C U^T` of a full core `C`.

    `W` is `[R, r]`, `d` is `[r]`, both float64. Powers of an exact block have orthonormal `v_k`, so
    `d` determines everything about them. The Woodbury inverse of TENGraD, FNGD (7)-(9) and NGM (28)
    costs no more than a product.

    Args:
        a: `[n, t, i]`, the inputs.
        g: `[m, n, t, o]`, the output gradients.
        core: `C` `[R, R]`, symmetric, float64.
        shift: a multiple of the identity.
    """

    def __init__(self, a: Tensor, g: Tensor, core: Tensor, shift: float = 0.0) -> None:
        columns = Columns(a, g, careful=True)
        doors.tensor(core, "core", ndim=(2,), error=BlockError)
        if core.shape != (columns.count, columns.count):
            raise BlockError(
                f"core must be [R, R] for the R = {columns.count} columns of a and g, got "
                f"{tuple(core.shape)}"
            )
        check_symmetric(core, "core")
        d, W = eigh(core.double(), "core of an outer block")
        self._hold(columns, W, d, shift, False)

    @classmethod
    def over(
        cls,
        columns: Columns,
        W: Tensor,
        d: Tensor,
        shift: float = 0.0,
        orthonormal: bool = False,
    ) -> OuterSum:
        """The block of any `W` and `d`; `orthonormal`: the `v_k` are."""
        check_held(columns)
        doors.tensor(W, "W", ndim=(2,), error=BlockError)
        doors.tensor(d, "d", ndim=(1,), error=BlockError)
        if W.shape != (columns.count, len(d)):
            raise BlockError(
                f"W must be [{columns.count}, r], of {len(d)} eigenvalues d, got {tuple(W.shape)}"
            )
        check_alike(W, d)
        block = cls.__new__(cls)
        block._hold(columns, W, d, shift, doors.flag(orthonormal, "orthonormal", error=BlockError))
        return block

    @classmethod
    def of_saved(
        cls,
        a: Tensor,
        g: Tensor,
        W: Tensor | None,
        d: Tensor | None,
        shift: float,
        orthonormal: bool | None,
        core: Tensor | None = None,
    ) -> OuterSum:
        """From what `saved` gave: eigenpairs that are found anew would differ by rounding."""
        if core is not None:
            return cls(a, g, core, shift)
        for part, what in ((W, "W"), (d, "d")):
            doors.tensor(part, what, error=BlockError)
        assert W is not None and d is not None
        return cls.over(Columns(a, g, careful=True), W.double(), d.double(), shift, orthonormal)  # type: ignore[arg-type]

    def saved(self, name: str) -> Any:
        return None if name == "core" else getattr(self, name)

    def _hold(
        self, columns: Columns, W: Tensor, d: Tensor, shift: float, orthonormal: bool
    ) -> None:
        self.columns, self.W, self.d, self.shift = columns, W, d, _shift(shift)
        self.orthonormal = orthonormal

    @property
    def core(self) -> Tensor:
        """`C = W diag(d) W^T`, `[R, R]`."""
        return symmetrise(self.W * self.d @ self.W.mT)

    def tensors(self) -> Iterator[Tensor]:
        yield from (*self.columns.tensors(), self.W, self.d)

    @property
    def operations(self) -> int:
        return super().operations + 2 * self.W.numel()

    def __matmul__(self, V: Tensor) -> Tensor:
        inner = self._coordinates(V) * self.d
        product = self._combined(inner)
        return (product + self.shift * V.to(product) if self.shift else product).to(V.dtype)

    @cached
    def _directions(self) -> Tensor | None:
        """The `v_k`, `[r, o i]`, where they take less room than a Gram matrix."""
        if self.size > self.num_columns:
            return None
        parts = [vectors.flatten(1) for _, vectors in self._vectors(self.W)]
        return torch.cat(parts) if parts else self.W.new_zeros(0, self.size)

    def _coordinates(self, V: Tensor) -> Tensor:
        """`<v_k, V>`, `[..., r]` in float64."""
        if self._directions is None:
            return self.columns.project(V, True).flatten(-2).double() @ self.W
        return V.flatten(-2).double() @ self._directions.mT

    def _combined(self, weights: Tensor) -> Tensor:
        """`sum_k w_k v_k`, `[..., r] -> [..., o, i]` in float64."""
        if self._directions is None:
            return self._of_columns(weights @ self.W.mT)
        return (weights @ self._directions).view(*weights.shape[:-1], *self.shape)

    @property
    def _products(self) -> Tensor:
        """`<v_k, v_l>`, `[r, r]`."""
        return self.W.mT @ self.gram() @ self.W

    @cached
    def _range(self) -> tuple[Tensor, Tensor]:
        if self.orthonormal:
            return self.d, self.W
        # columns get length 1: the core may couple one that is rounding of the longest to it
        K = self.gram()
        lengths = K.diagonal().clamp(min=0).sqrt()
        unit = over(torch.ones_like(lengths), lengths)[:, None]
        values, Z = eigh(unit * K * unit.mT, "Gram matrix")
        rank = rank_of(values, rounding(self.dtype))
        values, Z = values[len(values) - rank :], Z[:, len(values) - rank :]
        root = (Z * values.sqrt()).mT @ (lengths[:, None] * self.W)
        inside, P = eigh(root * self.d @ root.mT, "core of an outer block")
        # directions that the core takes to zero lie beside the range, in no basis
        kept = ~null_of(inside)
        return inside[kept], unit * (Z / values.sqrt()) @ P[:, kept]

    def power(self, exponent: float, damping: float = 0.0) -> Block:
        if exponent != 1:
            return super().power(exponent, damping)
        shift = self.shift + damping
        return OuterSum.over(self.columns, self.W, self.d, shift, self.orthonormal)

    def quadratic(self, V: Tensor) -> Tensor:
        value = self._coordinates(V).square() @ self.d
        return value + self.shift * _squares(V) if self.shift else value

    def column_quadratics(self, a: Tensor, g: Tensor) -> Tensor:
        K = self.W.mT @ contractions.cross_gram(self.a, self.g, a, g)
        value = (self.d @ K.square()).view(g.shape[:2])
        return value + self.shift * contractions.energies(a, g) if self.shift else value

    def _inner(self, other: Block) -> Tensor | None:
        """`sum_k d_k <v_k, other v_k>`."""
        if not isinstance(other, OfColumns):
            value = self.shift * other.trace() if self.shift else 0.0
            total = torch.zeros((), dtype=torch.float64, device=self.device)
            for part, vectors in self._vectors(self.W):
                total += (self.d[part] * other.quadratic(vectors.to(self.dtype))).sum()
            return value + total
        if same_columns(self.columns, other.columns):
            K = self.gram() @ self.W
        else:
            K = contractions.cross_gram(other.a, other.g, self.a, self.g) @ self.W
        if isinstance(other, OuterSum):
            inside = other.d @ (other.W.mT @ K).square() @ self.d
        else:
            assert isinstance(other, Outer)
            inside = other.core * (K.square() @ self.d).sum()
        # terms that cancel are in float64 throughout
        trace = other._gram_trace() + other.shift * self.size
        return inside + self.shift * trace + other.shift * self._inside_trace()

    def _inside_trace(self) -> Tensor:
        if self.orthonormal:
            return self.d.sum()
        return ((self.gram() @ self.W) * self.W).sum(0) @ self.d

    @property
    def clamped(self) -> float:
        return negative_share(self.eigenvalues(), self.dtype)

    def squared_norm(self) -> Tensor:
        if self.orthonormal:
            beside = (self.size - len(self.d)) * self.shift**2
            return (self.d + self.shift).square().sum() + beside
        inside = self.d @ self._products.square() @ self.d
        linear = 2 * self.shift * self._inside_trace() + self.shift**2 * self.size
        return inside + linear

    def diagonal(self) -> Tensor:
        total = torch.full(self.shape, self.shift, dtype=torch.float64, device=self.device)
        for part, vectors in self._vectors(self.W):
            total += torch.einsum("r,roi->oi", self.d[part], vectors.square())
        return total.to(self.dtype)

    def rotated_diagonal(self, Q_G: Basis, Q_A: Basis) -> Tensor:
        a, g = self.a.double(), self.g.double()
        columns = Columns(a @ Q_A.double(), g @ Q_G.double())
        value = OuterSum.over(columns, self.W, self.d).diagonal()
        return value + self.shift * _norms(Q_G, Q_A) if self.shift else value


def _shift(shift: object) -> float:
    """A multiple of the identity."""
    return doors.number(shift, "shift", least=0.0, error=BlockError)


def same_columns(one: Columns, two: Columns) -> bool:
    """Whether they are the same columns."""
    return one is two or (one.a is two.a and one.g is two.g)


def rounding(dtype: torch.dtype) -> float:
    """`eps` of a Gram matrix: columns are rounded to their dtype, so to its eps squared."""
    return max(torch.finfo(torch.float64).eps, torch.finfo(dtype).eps ** 2)


def _squares(V: Tensor) -> Tensor:
    return torch.linalg.vecdot(V, V).sum(-1, dtype=torch.float64)


def _norms(Q_G: Basis, Q_A: Basis) -> Tensor:
    return torch.outer(Q_G.double().square().sum(0), Q_A.double().square().sum(0))
