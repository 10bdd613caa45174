"""One layer made of independent parts: the groups of a convolution, a weight beside its bias."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self, TypeGuard, TypeVar

import torch
from torch import Tensor

from fisherlab import doors
from fisherlab.blocks.base import Block
from fisherlab.blocks.basis import Basis, matrix_of
from fisherlab.blocks.numerics import BlockError, check_alike
from fisherlab.blocks.outer import Outer

AnyBlock = TypeVar("AnyBlock", bound=Block)


class Parted(Block):
    """`F = blockdiag(parts)` up to order: part k acts on rows or columns of its own.

    Sums, spectra and powers are those of the parts; nothing couples two parts.

    Args:
        parts: blocks on rows or columns of the weight, one after another.
    """

    # the axis of the weight that the parts share out, and what to call this
    axis: ClassVar[int]
    called: ClassVar[str]

    def __init__(self, parts: Sequence[Block]) -> None:
        if not isinstance(parts, Sequence) or not all(isinstance(p, Block) for p in parts):
            raise BlockError(f"parts must be a list of blocks, got {doors.said(parts)}")
        if not parts or len({part.shape[-3 - self.axis] for part in parts}) != 1:
            raise BlockError(
                f"a {self.called} takes at least one block, all with the same number of "
                f"{'columns' if self.axis == -2 else 'rows'}; got shapes "
                f"{[part.shape for part in parts]}"
            )
        check_alike(*parts)
        self.parts = tuple(parts)

    @property
    def _sizes(self) -> list[int]:
        return [part.shape[self.axis] for part in self.parts]

    @property
    def shape(self) -> tuple[int, int]:
        o, i = self.parts[0].shape
        return (sum(self._sizes), i) if self.axis == -2 else (o, sum(self._sizes))

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    @property
    def device(self) -> torch.device:
        return self.parts[0].device

    def sizes(self) -> dict[int, int]:
        return {key: size for part in self.parts for key, size in part.sizes().items()}

    def formed_bytes(self) -> int:
        return sum(part.formed_bytes() for part in {id(part): part for part in self.parts}.values())

    def split(self, V: Tensor) -> tuple[Tensor, ...]:
        """The rows or columns of each part."""
        self.check(V)
        return V.split(self._sizes, self.axis)

    def _each(self, V: Tensor, act: Callable[[Any, Tensor], Tensor]) -> list[Tensor]:
        """The results of all parts on their own rows or columns; `V` came through a door."""
        pairs = zip(self.parts, V.split(self._sizes, self.axis), strict=True)
        return [act(part, v) for part, v in pairs]

    def __matmul__(self, V: Tensor) -> Tensor:
        return torch.cat(self._each(V, lambda part, v: part @ v), self.axis)

    def power(self, exponent: float, damping: float = 0.0) -> Block:
        return type(self)([part.power(exponent, damping) for part in self.parts])

    def solve(self, V: Tensor, damping: float) -> Tensor:
        return torch.cat(self._each(V, lambda part, v: part.solve(v, damping)), self.axis)

    def without_rounding(self, V: Tensor) -> Tensor:
        return torch.cat(self._each(V, lambda part, v: part.without_rounding(v)), self.axis)

    def quadratic(self, V: Tensor) -> Tensor:
        return torch.stack(self._each(V, lambda part, v: part.quadratic(v.contiguous()))).sum(0)

    def column_quadratics(self, a: Tensor, g: Tensor) -> Tensor:
        count = len(self.parts)
        inputs = [a] * count if self.axis == -2 else a.split(self._sizes, -1)
        rows = g.split(self._sizes, -1) if self.axis == -2 else [g] * count
        triples = zip(self.parts, inputs, rows, strict=True)
        return torch.stack(
            [part.column_quadratics(a.contiguous(), g) for part, a, g in triples]
        ).sum(0)

    def parted_as(self, other: Block) -> TypeGuard[Self]:
        """Whether the other block has parts of the same shapes."""
        return isinstance(other, type(self)) and [part.shape for part in self.parts] == [
            part.shape for part in other.parts
        ]

    def _inner(self, other: Block) -> Tensor | None:
        if not self.parted_as(other):
            return None
        pairs = zip(self.parts, other.parts, strict=True)
        return torch.stack([one.inner(two) for one, two in pairs]).sum()

    def _total(self, value: Callable[[Block], Tensor]) -> Tensor:
        return torch.stack([value(part) for part in self.parts]).sum(0)

    def trace(self) -> Tensor:
        return self._total(lambda part: part.trace())

    def squared_norm(self) -> Tensor:
        return self._total(lambda part: part.squared_norm())

    def logdet(self, damping: float) -> Tensor:
        return self._total(lambda part: part.logdet(damping))

    def diagonal(self) -> Tensor:
        return torch.cat([part.diagonal() for part in self.parts], self.axis)

    def eigenvalues(self) -> Tensor:
        values = torch.cat([part.eigenvalues() for part in self.parts])
        return values.sort(descending=True).values

    def leading_values(self, k: int) -> Tensor:
        values = torch.cat([part.leading_values(k) for part in self.parts])
        return values.sort(descending=True).values[:k]

    def leading(self, k: int) -> tuple[Tensor, Tensor]:
        values, vectors, start = [], [], 0
        for part, size in zip(self.parts, self._sizes, strict=True):
            top, inside = part.leading(k)
            whole = inside.new_zeros(len(top), *self.shape)
            whole.narrow(self.axis, start, size).copy_(inside)
            values.append(top)
            vectors.append(whole)
            start += size
        everything = torch.cat(values)
        order = everything.argsort(descending=True)[:k]
        return everything[order], torch.cat(vectors)[order]

    def rotated_diagonal(self, Q_G: Basis, Q_A: Basis) -> Tensor:
        own = matrix_of(Q_G if self.axis == -2 else Q_A).split(self._sizes)
        pairs = [(Q, Q_A) if self.axis == -2 else (Q_G, Q) for Q in own]
        found = [part.rotated_diagonal(*Q) for part, Q in zip(self.parts, pairs, strict=True)]
        return torch.stack(found).sum(0)

    @property
    def clamped(self) -> float:
        shares = [part.clamped for part in self.parts]
        if not any(shares):
            return 0.0
        if any(math.isnan(share) for share in shares):
            return math.nan
        sums = [float(part.eigenvalues().detach().abs().sum()) for part in self.parts]
        return _mean(shares, sums)

    @property
    def trace_below_rounding(self) -> float:
        shares = [part.trace_below_rounding for part in self.parts]
        if not any(shares):
            return 0.0
        return _mean(shares, [float(part.trace().detach().abs()) for part in self.parts])


class DirectSum(Parted):
    """`F = blockdiag(parts)`; part k acts on its own rows of the weight `[sum_k o_k, i]`.

    The weight of a grouped convolution is `[O, C_in / groups, ...]`: its groups are row slices. The
    exact block of the layer is the direct sum of one block per group.

    Args:
        parts: blocks on `[o_k, i]`.
    """

    axis, called = -2, "direct sum"

    def gram(self) -> Tensor:
        """`sum_k K_k`: the Gram matrix of the whole layer's per-example gradients."""
        outers = [part for part in self.parts if isinstance(part, Outer)]
        if len(outers) < len(self.parts):
            raise BlockError(f"only exact blocks have a Gram matrix, got {self.parts}")
        return torch.stack([part.gram() for part in outers]).sum(0)

    def diagonal_of(self, other: Block) -> Tensor:
        if not self.parted_as(other):
            return super().diagonal_of(other)
        pairs = zip(self.parts, other.parts, strict=True)
        return torch.cat([one.diagonal_of(two).flatten() for one, two in pairs])

    def chosen(self, other: Block) -> Tensor:
        if not self.parted_as(other):
            return super().chosen(other)
        pairs = zip(self.parts, other.parts, strict=True)
        return torch.stack([one.chosen(two) for one, two in pairs]).sum()


def _mean(shares: Sequence[float], weights: Sequence[float]) -> float:
    """Shares of the parts as the share of the whole."""
    total = sum(weights)
    return sum(s * w for s, w in zip(shares, weights, strict=True)) / total if total else 0.0


def layer_block(parts: Sequence[AnyBlock]) -> AnyBlock | DirectSum:
    """The block of a layer: that of its only group, or the direct sum of its groups'."""
    return parts[0] if len(parts) == 1 else DirectSum(parts)


def parts_of(block: Block) -> tuple[Block, ...]:
    """The blocks of a layer's groups; a block that is no direct sum is its only one."""
    return block.parts if isinstance(block, DirectSum) else (block,)
