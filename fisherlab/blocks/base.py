"""`Block`: a symmetric matrix on a layer's weight, and `Dense`: its slow, right definitions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fisherlab import doors
from fisherlab.blocks.basis import Basis, Space, matrix_of
from fisherlab.blocks.columns import Columns
from fisherlab.blocks.contractions import per_example_chunks, slices
from fisherlab.blocks.entry import check_shape, guard
from fisherlab.blocks.numerics import (
    BlockError,
    BlockTooLarge,
    check_dense,
    check_symmetric,
    chosen_squares,
    dense_budget,
    eigh,
    moved_squares,
    negative_share,
    spectrum_power,
    symmetrise,
    turned,
    units,
)
from fisherlab.blocks.work import cached, once

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator


class Block(ABC):
    """A symmetric positive semi-definite matrix on one layer's weight; acts on `[..., o, i]`.

    `vec` is row-major (what `torch.flatten` does), so a Kronecker product is output factor (x)
    input factor: `(G (x) A) vec(V) = vec(G V A)`. The bias is the last column of the weight.

    A form implements `__matmul__`, `shape`, `dtype` and `device`; every other method has a
    definition here from `dense()` and is overridden only to be cheaper. `fisherlab.blocks.entry`
    checks the arguments of every form.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        guard(cls)

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """`(o, i)`, the shape of the weight the matrix acts on."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype of the entries."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the entries live."""

    @abstractmethod
    def __matmul__(self, V: Tensor) -> Tensor:
        """`F vec(V)` for each matrix of `V` `[..., o, i]`."""

    @cached_property
    def size(self) -> int:
        """`N = o i`, the number of parameters and the side of the dense matrix."""
        return self.shape[0] * self.shape[1]

    def look(self) -> Block:
        """The block, which has looked now at the values that choose how products are taken."""
        return self

    def power(self, exponent: float, damping: float = 0.0) -> Block:
        """`(F + damping I)^exponent` as a block; exponent -1 is the damped inverse."""
        return Dense(self.dense(), self.shape).power(exponent, damping)

    def solve(self, V: Tensor, damping: float) -> Tensor:
        """`(F + damping I)^{-1} vec(V)` for each matrix of `V`."""
        return self.power(-1, damping) @ V

    def without_rounding(self, V: Tensor) -> Tensor:
        """`V` without what is rounding of `V` beside the block's range; `V` where not known."""
        return V

    def quadratic(self, V: Tensor) -> Tensor:
        """`<V, F V>` per matrix, `[...]` in float64."""
        X, s = units(V, (-2, -1))
        Y, r = units((self @ X).to(X), (-2, -1))
        scale = (s.double().square() * r.double())[..., 0, 0]
        return torch.linalg.vecdot(X, Y).sum(-1, dtype=torch.float64) * scale

    def column_quadratics(self, a: Tensor, g: Tensor) -> Tensor:
        """`<D, F D>` for every per-example gradient `D = sum_t g a^T`, `[m, n]` in float64."""
        result = a.new_empty(g.shape[0], g.shape[1], dtype=torch.float64)
        for part, D in per_example_chunks(a, g):
            result[:, part] = self.quadratic(D)
        return result

    def inner_with_columns(self, columns: Columns) -> Tensor | None:
        """`<F, U U^T>` where something already known of the columns makes it cheap, else None."""
        return None

    def restricted_to(self, space: Space) -> Block | None:
        """`V^T F V` for `V = V_G (x) V_A`, where `F` is known to be zero beside its columns.

        A weight `V_G W V_A^T` has the coordinates `W`. Such weights, and blocks within the same
        space, are measured there, by products with fewer features. None where that is not known.
        """
        return None

    def inner(self, other: Block) -> Tensor:
        """`<F, other>_F`, a 0-d float64 tensor.

        Closed form for two structured forms, through `quadratic` against a low-rank one. Any other
        pair goes through `dense()`; past the budget it raises `BlockTooLarge`, which names both
        forms.
        """
        for one, two in ((self, other), (other, self)):
            value = one._inner(two)
            if value is not None:
                return value
        try:
            check_dense(self.size, self.dtype, self.device, type(self).__name__)
        except BlockTooLarge as error:
            raise BlockTooLarge(
                f"no closed inner product of {type(self).__name__} and {type(other).__name__}, and "
                f"{error}"
            ) from None
        return (self.dense().double() * other.dense().double()).sum()

    def _inner(self, other: Block) -> Tensor | None:
        """The closed form with `other`, or None where this form knows none."""
        return None

    def trace(self) -> Tensor:
        """`tr F`, 0-d float64."""
        return self.diagonal().sum(dtype=torch.float64)

    def squared_norm(self) -> Tensor:
        """`||F||_F^2`, 0-d float64."""
        return self.dense().double().square().sum()

    def diagonal(self) -> Tensor:
        """The diagonal of the matrix, as a weight `[o, i]`."""
        return self.dense().diagonal().reshape(self.shape)

    def eigenvalues(self) -> Tensor:
        """All `N` eigenvalues in float64, descending."""
        return eigh(self.dense().double(), type(self).__name__)[0].flip(0)

    def leading(self, k: int) -> tuple[Tensor, Tensor]:
        """The k largest eigenvalues `[k]` and their unit eigenvectors `[k, o, i]`.

        A low-rank form knows those of its range, which may be fewer.
        """
        values, vectors = eigh(self.dense().double(), type(self).__name__)
        k = min(k, self.size)
        top = vectors[:, -k:].flip(1).mT.reshape(k, *self.shape)
        return values[-k:].flip(0), top.to(self.dtype)

    def leading_values(self, k: int) -> Tensor:
        """The eigenvalues that `leading(k)` returns, `[k]` float64."""
        return self.leading(k)[0].double()

    def leading_factors(self, k: int) -> tuple[Tensor, Tensor] | None:
        """`[o, k]` and `[i, k]` where the vectors of `leading(k)` are `q_G q_A^T`, else None."""
        return None

    def leading_products(self, k: int, q_G: Tensor, q_A: Tensor) -> Tensor:
        """`<v_b, q_G q_A^T>` of the k leading eigenvectors, `[b, j]`, for columns of both."""
        _, vectors = self.leading(k)
        return ((q_G.mT @ vectors.to(q_G)) * q_A.mT).sum(-1)

    def diagonal_of(self, other: Block) -> Tensor:
        """`diag(Q^T other Q)` for this block's eigenvectors `Q`, float64.

        A low-rank form uses only the eigenvectors of its range.
        """
        check_dense(self.size, self.dtype, self.device, type(self).__name__)
        _, vectors = self.leading(self.size)
        return other.quadratic(vectors)

    def chosen(self, other: Block) -> Tensor:
        """How far `sum diagonal_of(other)^2` may move with an eigensolver's choice; 0-d float64.

        Above 0 where `other` has energy in a null space of this block, or is no multiple of the
        identity on a space of equal eigenvalues: nothing defines a basis there.
        """
        found, (values, vectors) = self.diagonal_of(other), self.leading(self.size)
        if len(values) < self.size:
            return self.nothing_chosen
        # in the dtype whose rounding they have
        values = values.to(self.dtype)

        def again(draw: int) -> Tensor | None:
            turn = turned(vectors.flatten(1).mT, values, draw)
            return None if turn is None else other.quadratic(turn.mT.reshape(vectors.shape))

        width = chosen_squares(found.reshape(1, -1), None, values, other.trace())
        return width + moved_squares(found, again)

    @property
    def nothing_chosen(self) -> Tensor:
        """The `chosen` of a basis that is given, or of a range alone."""
        return torch.zeros((), dtype=torch.float64, device=self.device)

    def rotated_diagonal(self, Q_G: Basis, Q_A: Basis) -> Tensor:
        """`diag((Q_G (x) Q_A)^T F (Q_G (x) Q_A))`, float64 `[o', i']`."""
        Q_G, Q_A = matrix_of(Q_G), matrix_of(Q_A)
        result = Q_G.new_empty(Q_G.shape[1], Q_A.shape[1], dtype=torch.float64)
        for row, q in enumerate(Q_G.mT):
            for part in slices(Q_A.shape[1], self.size * self.dtype.itemsize):
                vectors = q[None, :, None] * Q_A.mT[part, None, :]
                result[row, part] = self.quadratic(vectors)
        return result

    def logdet(self, damping: float) -> Tensor:
        """`log det (F + damping I)`, 0-d float64."""
        return (self.eigenvalues().clamp(min=0) + damping).log().sum()

    def sample(self, damping: float, generator: torch.Generator | None = None) -> Tensor:
        """`w ~ N(0, (F + damping I)^{-1})`, `[o, i]`: a draw of the layer's Laplace posterior.

        Args:
            damping: `> 0`.
            generator: the source of the draw; None: torch's global one, which `torch.manual_seed`
                sets. The noise is drawn on the generator's device, the global one's on the CPU.
        """
        device = "cpu" if generator is None else generator.device
        noise = torch.randn(self.shape, generator=generator, dtype=self.dtype, device=device)
        return self.power(-0.5, damping) @ noise.to(self.device)

    def dense(self) -> Tensor:
        """The matrix itself, `[o i, o i]`; raises `BlockTooLarge` past the memory budget."""
        check_dense(self.size, self.dtype, self.device, type(self).__name__)
        return symmetrise(torch.cat([rows for _, rows in self.rows()]))

    def rows(self, budget: int | None = None) -> Iterator[tuple[slice, Tensor]]:
        """`(slice, rows [chunk, o i])` of the matrix, a few at a time; never all of them."""
        budget = budget or min(dense_budget(self.device) // 8, 64 * 1024**2)
        step = max(1, budget // (self.size * self.dtype.itemsize))
        for start in range(0, self.size, step):
            stop = min(start + step, self.size)
            unit = torch.zeros(stop - start, self.size, dtype=self.dtype, device=self.device)
            index = torch.arange(start, stop, device="cpu")
            unit[index - start, index] = 1
            product = self @ unit.view(-1, *self.shape)
            yield slice(start, stop), product.reshape(stop - start, self.size)

    def as_linear_operator(self) -> LinearOperator:
        """The matrix as a SciPy `LinearOperator` on flat float vectors of length `N`."""
        from scipy.sparse.linalg import LinearOperator

        def matmat(X: np.ndarray) -> np.ndarray:
            V = torch.as_tensor(np.ascontiguousarray(X.T), dtype=self.dtype, device=self.device)
            product = self @ V.reshape(-1, *self.shape)
            return product.reshape(V.shape[0], self.size).mT.detach().cpu().numpy()

        dtype = torch.empty(0, dtype=self.dtype, device="cpu").numpy().dtype
        return LinearOperator(
            (self.size, self.size),
            matvec=lambda v: matmat(v.reshape(-1, 1))[:, 0],
            rmatvec=lambda v: matmat(v.reshape(-1, 1))[:, 0],
            matmat=matmat,
            rmatmat=matmat,
            dtype=dtype,
        )

    @property
    def clamped(self) -> float:
        """Share of the spectrum's absolute sum that was negative and taken as zero; 0 if PSD."""
        return 0.0

    @property
    def trace_below_rounding(self) -> float:
        """Share of the trace that may lie in eigenvalues below rounding, taken as zero."""
        return 0.0

    def tensors(self) -> Iterator[Tensor]:
        """The tensors that represent the block, not what is remembered beside them."""
        for name, value in vars(self).items():
            for item in value if isinstance(value, tuple) else (value,):
                if isinstance(item, Tensor) and not name.startswith("_"):
                    yield item
                elif isinstance(item, Block) and not name.startswith("_"):
                    yield from item.tensors()

    def memory_bytes(self) -> int:
        """Bytes of the tensors that represent the block, as kept; one used twice counts once.

        A factor of few rows is kept as its rows, a thin basis as its vectors: `formed_bytes` counts
        the matrices.
        """
        return sum(self.sizes().values())

    def sizes(self) -> dict[int, int]:
        """Bytes of everything kept, by its id."""
        return {id(tensor): tensor.numel() * tensor.element_size() for tensor in self.tensors()}

    def formed_bytes(self) -> int:
        """Bytes with every factor, basis and mini-block as a whole matrix, whatever the batch.

        Such is the block of many batches. A matrix-free block has no such part: its own matrix.
        """
        return self.memory_bytes()

    def saved(self, name: str) -> Any:
        """A constructor's argument, as it is written to a file."""
        return getattr(self, name)

    def check(self, V: Tensor) -> None:
        """Refuse what is no tensor of the block's kind, or has other last axes than the weight."""
        doors.tensor(V, "V", error=BlockError)
        if tuple(V.shape[-2:]) != self.shape:
            raise BlockError(
                f"this {type(self).__name__} acts on [..., {self.shape[0]}, {self.shape[1]}], got "
                f"V, {doors.said(V)}; a bias is the last column of the weight"
            )
        if V.dtype != self.dtype or V.device != self.device:
            raise BlockError(
                f"this {type(self).__name__} is {self.dtype} on {self.device}, got V in {V.dtype} "
                f"on {V.device}; pass V.to(block.device, block.dtype)"
            )

    def __repr__(self) -> str:
        o, i = self.shape
        return f"{type(self).__name__}({o} x {i}, {str(self.dtype).removeprefix('torch.')})"


guard(Block)


class Dense(Block):
    """`F` as a symmetric matrix; negative eigenvalues count as zero in `power`.

    Args:
        matrix: `[o i, o i]`, symmetric.
        shape: `(o, i)` of the weight.

    Raises:
        BlockError: the matrix does not fit the shape.

    Example:
        >>> import torch
        >>> from fisherlab import blocks
        >>> F = blocks.Dense(torch.tensor([[2.0, 1.0], [1.0, 2.0]]), (1, 2))
        >>> (F @ torch.tensor([[1.0, 0.0]])).tolist()
        [[2.0, 1.0]]
    """

    def __init__(self, matrix: Tensor, shape: tuple[int, int]) -> None:
        doors.tensor(matrix, "matrix", full=True, error=BlockError)
        shape = check_shape(shape)
        if matrix.shape != (shape[0] * shape[1],) * 2:
            raise BlockError(
                f"a dense block on a weight {shape} is {shape[0] * shape[1]} x "
                f"{shape[0] * shape[1]}, got {tuple(matrix.shape)}"
            )
        check_symmetric(matrix, "matrix")
        self.matrix = symmetrise(matrix)
        self._shape = shape
        # `diagonal_of` by the id of a block, and that block, which keeps its id
        self._diagonals: dict[int, tuple[Block, Tensor]] = {}

    @property
    def shape(self) -> tuple[int, int]:
        return self._shape

    @property
    def dtype(self) -> torch.dtype:
        return self.matrix.dtype

    @property
    def device(self) -> torch.device:
        return self.matrix.device

    @cached
    def _eigh(self) -> tuple[Tensor, Tensor]:
        return eigh(self.matrix, "dense block")

    def __matmul__(self, V: Tensor) -> Tensor:
        return (V.reshape(-1, self.size) @ self.matrix).view(V.shape)

    def power(self, exponent: float, damping: float = 0.0) -> Block:
        values, vectors = self._eigh
        powers = spectrum_power(values, exponent, damping, "dense block")
        return Powered(powers, vectors, self.shape, self)

    def diagonal_of(self, other: Block) -> Tensor:
        found = once(self._diagonals, id(other), lambda: (other, Block.diagonal_of(self, other)))
        return found[1]

    def _inner(self, other: Block) -> Tensor | None:
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for part, rows in other.rows():
            total += (rows.double() * self.matrix[part].double()).sum()
        return total

    def diagonal(self) -> Tensor:
        return self.matrix.diagonal().reshape(self.shape)

    def squared_norm(self) -> Tensor:
        return self.matrix.double().square().sum()

    def eigenvalues(self) -> Tensor:
        return self._eigh[0].flip(0).double()

    def leading(self, k: int) -> tuple[Tensor, Tensor]:
        values, vectors = self._eigh
        k = min(k, self.size)
        return values[-k:].flip(0).double(), vectors[:, -k:].flip(1).mT.reshape(k, *self.shape)

    def dense(self) -> Tensor:
        return self.matrix

    @property
    def clamped(self) -> float:
        return negative_share(self._eigh[0], self.dtype)


class Powered(Dense):
    """`(F + damping I)^exponent` by the eigenvectors of `F`, a matrix when somebody asks for it.

    Args:
        powers: `[N]`, of the eigenvalues of F from the lowest up.
        vectors: `[N, N]`, its eigenvectors as columns.
        shape: `(o, i)`.
        base: F itself, if it is at hand: it remembers what it was compared with.
    """

    def __init__(
        self, powers: Tensor, vectors: Tensor, shape: tuple[int, int], base: Dense | None = None
    ) -> None:
        self._powers, self._vectors, self._base = powers, vectors, base
        self._shape, self._diagonals = (int(shape[0]), int(shape[1])), {}

    @cached
    def matrix(self) -> Tensor:
        """The matrix itself."""
        return symmetrise(self._vectors * self._powers @ self._vectors.mT)

    @property
    def _eigh(self) -> tuple[Tensor, Tensor]:
        order = self._powers.argsort()
        return self._powers[order], self._vectors[:, order]

    @property
    def dtype(self) -> torch.dtype:
        return self._powers.dtype

    @property
    def device(self) -> torch.device:
        return self._powers.device

    def tensors(self) -> Iterator[Tensor]:
        yield from (self._powers, self._vectors)

    def __matmul__(self, V: Tensor) -> Tensor:
        rows = V.reshape(-1, self.size)
        if len(rows) >= self.size:
            return super().__matmul__(V)
        return ((rows @ self._vectors * self._powers) @ self._vectors.mT).view(V.shape)

    def _inner(self, other: Block) -> Tensor | None:
        if self._base is None:
            return super()._inner(other)
        # from the largest eigenvalue down
        return self._base.diagonal_of(other) @ self._powers.double().flip(0)

    def trace(self) -> Tensor:
        return self._powers.sum(dtype=torch.float64)

    def diagonal(self) -> Tensor:
        return (self._vectors.square() @ self._powers).reshape(self.shape)

    def squared_norm(self) -> Tensor:
        return self._powers.double().square().sum()
