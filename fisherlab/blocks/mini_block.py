"""Block diagonal inside the layer."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fisherlab import doors
from fisherlab.blocks import contractions
from fisherlab.blocks.base import Block
from fisherlab.blocks.basis import Space
from fisherlab.blocks.columns import Columns
from fisherlab.blocks.entry import check_columns, check_held
from fisherlab.blocks.numerics import (
    GIB,
    BlockError,
    BlockTooLarge,
    check_alike,
    check_dense,
    check_symmetric,
    dense_budget,
    dot,
    eigh,
    equal_of,
    moved_squares,
    negative_share,
    null_of,
    spectrum_power,
    turned,
)
from fisherlab.blocks.outer import Outer
from fisherlab.blocks.work import cached


class MiniBlock(Block):
    """`F = blockdiag(blocks)`: one `[k, k]` matrix per output feature and group of k inputs.

    Args:
        blocks: `[o, c, k, k]`, for a weight whose first `c k` columns fall into c groups.
        bias: `[o]`, the entries of one more column; None if every column is in a group.
    """

    blocks: Tensor
    bias: Tensor | None

    def __init__(self, blocks: Tensor, bias: Tensor | None = None) -> None:
        doors.tensor(blocks, "blocks", ndim=(4,), full=True, error=BlockError)
        if blocks.shape[-1] != blocks.shape[-2]:
            raise BlockError(f"mini-blocks are [o, c, k, k], got {tuple(blocks.shape)}")
        check_symmetric(blocks, "each of blocks")
        if bias is not None:
            doors.tensor(bias, "bias", ndim=(1,), error=BlockError)
            if len(bias) != len(blocks):
                raise BlockError(f"bias must have {len(blocks)} entries, got {len(bias)}")
            check_alike(blocks, bias)
        self.blocks, self.bias = blocks, bias

    @property
    def shape(self) -> tuple[int, int]:
        o, c, k, _ = self.blocks.shape
        return o, c * k + (self.bias is not None)

    @property
    def dtype(self) -> torch.dtype:
        return self.blocks.dtype

    @property
    def device(self) -> torch.device:
        return self.blocks.device

    @cached
    def _eigh(self) -> tuple[Tensor, Tensor]:
        return eigh(self.blocks, "mini-blocks")

    def _split(self, V: Tensor) -> tuple[Tensor, Tensor | None]:
        """`V [..., o, i]` as `[..., o, c, k]` and the bias column `[..., o]`."""
        o, c, k, _ = self.blocks.shape
        body = V[..., : c * k].reshape(*V.shape[:-2], o, c, k)
        return body, None if self.bias is None else V[..., -1]

    def _join(self, body: Tensor, column: Tensor | None) -> Tensor:
        """The inverse of `split`."""
        flat = body.flatten(-2)
        return flat if column is None else torch.cat([flat, column[..., None]], -1)

    def __matmul__(self, V: Tensor) -> Tensor:
        body, column = self._split(V)
        product = torch.einsum("ockl,...ocl->...ock", self.blocks, body)
        if column is None or self.bias is None:
            return self._join(product, None)
        return self._join(product, column * self.bias)

    def power(self, exponent: float, damping: float = 0.0) -> Block:
        values, vectors = self._eigh
        powers = spectrum_power(values, exponent, damping, "a mini-block")
        bias = self.bias
        if bias is not None:
            bias = spectrum_power(bias, exponent, damping, "the bias mini-block", rounded=False)
        return MiniBlock(vectors * powers[..., None, :] @ vectors.mT, bias)

    def _inner(self, other: Block) -> Tensor | None:
        if not isinstance(other, MiniBlock) or other.blocks.shape != self.blocks.shape:
            return None
        total = dot(self.blocks, other.blocks)
        if self.bias is None or other.bias is None:
            return total
        return total + dot(self.bias, other.bias)

    def inner_with_columns(self, columns: Columns) -> Tensor | None:
        _, c, k, _ = self.blocks.shape
        if (c, k) not in columns.grouped:
            return None
        total = dot(self.blocks, columns.grouped_moments(c, k))
        return total if self.bias is None else total + dot(self.bias, columns.squares[:, -1])

    def squared_norm(self) -> Tensor:
        value = dot(self.blocks, self.blocks)
        return value if self.bias is None else value + dot(self.bias, self.bias)

    def diagonal(self) -> Tensor:
        return self._join(self.blocks.diagonal(0, -2, -1), self.bias)

    def eigenvalues(self) -> Tensor:
        values = self._eigh[0].double().flatten()
        if self.bias is not None:
            values = torch.cat([values, self.bias.double()])
        return values.sort(descending=True).values

    @property
    def clamped(self) -> float:
        return negative_share(self.eigenvalues(), self.dtype)

    def leading(self, k: int) -> tuple[Tensor, Tensor]:
        values, vectors = self._eigh
        o, c, width, _ = self.blocks.shape
        flat = values.double().flatten()
        if self.bias is not None:
            flat = torch.cat([flat, self.bias.double()])
        top, index = flat.topk(min(k, self.size))
        result = torch.zeros(len(index), *self.shape, dtype=self.dtype, device=self.device)
        for row, position in enumerate(index.tolist()):
            if position >= o * c * width:
                result[row, position - o * c * width, -1] = 1
                continue
            group, column = divmod(position, width)
            output, channel = divmod(group, c)
            inside = slice(channel * width, (channel + 1) * width)
            result[row, output, inside] = vectors[output, channel, :, column]
        return top, result

    def diagonal_of(self, other: Block) -> Tensor:
        return self._rotated(other, self._eigh[1])

    def _rotated(self, other: Block, Q: Tensor) -> Tensor:
        """`diag(Q^T other Q)` for a basis `[o, c, k, k]` of each mini-block."""
        if isinstance(other, MiniBlock) and other.blocks.shape == self.blocks.shape:
            rotated = (other.blocks @ Q * Q).sum(-2, dtype=torch.float64)
            return self._join(rotated, None if other.bias is None else other.bias.double())
        if isinstance(other, Outer):
            of = other.columns.even
            rotated = contractions.grouped_diagonal(of.a, of.g, Q)
            column = None
            if self.bias is not None:
                column = contractions.diagonal(of.a[..., -1:], of.g)[:, 0]
            return other.core * self._join(rotated, column).double() + other.shift
        check_dense(self.size, self.dtype, self.device, type(self).__name__)
        eye = torch.eye(self.size, dtype=self.dtype, device=self.device)
        units, column = self._split(eye.view(-1, *self.shape))
        vectors = torch.einsum("ockl,...ocl->...ock", Q, units)
        return other.quadratic(self._join(vectors, column).to(other.dtype)).view(self.shape)

    def chosen(self, other: Block) -> Tensor:
        found, (values, vectors) = self.diagonal_of(other), self._eigh
        rotated, _ = self._split(found.double())
        null = null_of(values)
        sums, directions = (rotated * null).sum(-1), null.sum(-1).clamp(min=1)
        width = (sums.square() * (1 - 1 / directions)).sum()
        equal = equal_of(values).any(-1).nonzero().tolist()

        def again(draw: int) -> Tensor | None:
            Q = vectors.clone()
            for o, c in equal:
                turn = turned(Q[o, c], values[o, c], draw)
                Q[o, c] = Q[o, c] if turn is None else turn
            return self._rotated(other, Q) if equal else None

        return width + moved_squares(found, again)


class RowBlocks(MiniBlock):
    """The exact restriction of `scale U U^T` to the rows of the weight, for columns of T = 1.

    It is `scale sum_n w[o, n] a_n a_n^T` with `w = sum_m g^2`. The `o i^2` numbers of its blocks
    are made on demand; norm, trace and inner product with `U U^T` do not need them.

    Args:
        a: `[n, 1, i]`, the inputs.
        g: `[m, n, 1, o]`, the output gradients.
        scale: the multiple of `U U^T`.
        columns: `U`, if it is known.

    Raises:
        BlockError: there is more than one position.
    """

    bias = None

    def __init__(self, a: Tensor, g: Tensor, scale: float, columns: Columns | None = None) -> None:
        check_columns(a, g)
        doors.number(scale, "scale", least=0.0, error=BlockError)
        if a.shape[1] != 1:
            raise BlockError(f"RowBlocks is for one position, got {a.shape[1]}")
        if columns is not None:
            check_held(columns, (g.shape[-1], a.shape[-1]))
        self.columns = Columns(a, g) if columns is None else columns
        self.scale = scale

    @property
    def a(self) -> Tensor:
        """Inputs `[n, 1, i]`."""
        return self.columns.a

    @property
    def g(self) -> Tensor:
        """Output gradients `[m, n, 1, o]`."""
        return self.columns.g

    @cached
    def blocks(self) -> Tensor:
        """`[o, 1, i, i]`; raises `BlockTooLarge` past the memory budget."""
        o, i = self.columns.shape
        check_blocks(o, 1, i, self.dtype, self.device, "RowBlocks")
        return self.columns.grouped_moments(1, self.columns.shape[1]) * self.scale

    @property
    def shape(self) -> tuple[int, int]:
        return self.columns.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.columns.a.dtype

    @property
    def device(self) -> torch.device:
        return self.columns.a.device

    def restricted_to(self, space: Space) -> Block | None:
        # the outputs keep their own coordinates, whose blocks these are
        inside = self.columns.inside if space is self.columns.space and space.G is None else None
        return None if inside is None else RowBlocks(inside.a, inside.g, self.scale, inside)

    # sums of squares have no eigenvalue below 0
    clamped = 0.0

    def squared_norm(self) -> Tensor:
        # sum_o w_o^T (a a^T)^2 w_o:      n^2 (i + o)
        a, w = self.a[:, 0].double(), self.g[:, :, 0].double().square().sum(0)
        return self.scale**2 * (w * ((a @ a.mT).square() @ w)).sum()

    def trace(self) -> Tensor:
        return self.scale * self.columns.energies.sum()

    def diagonal(self) -> Tensor:
        return self.scale * self.columns.squares

    def inner_with_columns(self, columns: Columns) -> Tensor | None:
        # <X, F> = ||X||^2, since X is an orthogonal projection of F
        return self.squared_norm() / self.scale if columns is self.columns and self.scale else None

    def tensors(self) -> Iterator[Tensor]:
        yield from (self.a, self.g)

    def formed_bytes(self) -> int:
        return self.size * self.shape[1] * self.dtype.itemsize


def check_blocks(
    o: int, c: int, k: int, dtype: torch.dtype, device: torch.device, name: str
) -> None:
    """Raises `BlockTooLarge` where `[o, c, k, k]` numbers exceed the memory budget."""
    needed, budget = o * c * k * k * dtype.itemsize, dense_budget(device)
    if needed > budget:
        raise BlockTooLarge(
            f"{name}: {o} x {c} mini-blocks of {k} x {k} take {needed / GIB:.3g} GiB, over the "
            f"budget of {budget / GIB:.3g} GiB"
        )
