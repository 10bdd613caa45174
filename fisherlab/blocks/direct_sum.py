"""One layer made of independent parts, as the groups of a convolution are."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from fisherlab import doors
from fisherlab.blocks.base import Block
from fisherlab.blocks.basis import Basis, matrix_of
from fisherlab.blocks.numerics import BlockError, check_alike
from fisherlab.blocks.outer import Outer

AnyBlock = TypeVar("AnyBlock", bound=Block)


class DirectSum(Block):
    """`F = blockdiag(parts)`; part k acts on its own rows of the weight `[sum_k o_k, i]`.

    The weight of a grouped convolution is `[O, C_in / groups, ...]`: its groups are row slices. The
    exact block of the layer is the direct sum of one block per group.

    Args:
        parts: blocks on `[o_k, i]`.
    """

    def __init__(self, parts: Sequence[Block]) -> None:
        if not isinstance(parts, Sequence) or not all(isinstance(p, Block) for p in parts):
            raise BlockError(f"parts must be a list of blocks, got {doors.said(parts)}")
        if not parts or len({part.shape[1] for part in parts}) != 1:
            raise BlockError(
                "a direct sum takes at least one block, all with the same number of columns; got "
                f"shapes {[part.shape for part in parts]}"
            )
        check_alike(*parts)
        self.parts = tuple(parts)

    @property
    def shape(self) -> tuple[int, int]:
        return sum(part.shape[0] for part in self.parts), self.parts[0].shape[1]

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
        """The rows of each part."""
        self.check(V)
        return V.split([part.shape[0] for part in self.parts], -2)

    def __matmul__(self, V: Tensor) -> Tensor:
        return torch.cat([p @ v for p, v in zip(self.parts, self.split(V), strict=True)], -2)

    def power(self, exponent: float, damping: float = 0.0) -> Block:
        return DirectSum([part.power(exponent, damping) for part in self.parts])

    def solve(self, V: Tensor, damping: float) -> Tensor:
        pairs = zip(self.parts, self.split(V), strict=True)
        return torch.cat([part.solve(v, damping) for part, v in pairs], -2)

    def quadratic(self, V: Tensor) -> Tensor:
        pairs = zip(self.parts, self.split(V), strict=True)
        return torch.stack([part.quadratic(v) for part, v in pairs]).sum(0)

    def column_quadratics(self, a: Tensor, g: Tensor) -> Tensor:
        groups = g.split([part.shape[0] for part in self.parts], -1)
        pairs = zip(self.parts, groups, strict=True)
        return torch.stack([part.column_quadratics(a, rows) for part, rows in pairs]).sum(0)

    def _inner(self, other: Block) -> Tensor | None:
        if not isinstance(other, DirectSum) or [p.shape for p in self.parts] != [
            p.shape for p in other.parts
        ]:
            return None
        pairs = zip(self.parts, other.parts, strict=True)
        return torch.stack([one.inner(two) for one, two in pairs]).sum()

    def _total(self, value: Callable[[Block], Tensor]) -> Tensor:
        return torch.stack([value(part) for part in self.parts]).sum(0)

    def gram(self) -> Tensor:
        """`sum_k K_k`: the Gram matrix of the whole layer's per-example gradients."""
        outers = [part for part in self.parts if isinstance(part, Outer)]
        if len(outers) < len(self.parts):
            raise BlockError(f"only exact blocks have a Gram matrix, got {self.parts}")
        return torch.stack([part.gram() for part in outers]).sum(0)

    def trace(self) -> Tensor:
        return self._total(lambda part: part.trace())

    def squared_norm(self) -> Tensor:
        return self._total(lambda part: part.squared_norm())

    def logdet(self, damping: float) -> Tensor:
        return self._total(lambda part: part.logdet(damping))

    def diagonal(self) -> Tensor:
        return torch.cat([part.diagonal() for part in self.parts])

    def eigenvalues(self) -> Tensor:
        values = torch.cat([part.eigenvalues() for part in self.parts])
        return values.sort(descending=True).values

    def leading_values(self, k: int) -> Tensor:
        values = torch.cat([part.leading_values(k) for part in self.parts])
        return values.sort(descending=True).values[:k]

    def leading(self, k: int) -> tuple[Tensor, Tensor]:
        values, vectors, start = [], [], 0
        for part in self.parts:
            top, inside = part.leading(k)
            whole = inside.new_zeros(len(top), *self.shape)
            whole[:, start : start + part.shape[0]] = inside
            values.append(top)
            vectors.append(whole)
            start += part.shape[0]
        everything = torch.cat(values)
        order = everything.argsort(descending=True)[:k]
        return everything[order], torch.cat(vectors)[order]

    def diagonal_of(self, other: Block) -> Tensor:
        if not isinstance(other, DirectSum):
            return super().diagonal_of(other)
        pairs = zip(self.parts, other.parts, strict=True)
        return torch.cat([one.diagonal_of(two).flatten() for one, two in pairs])

    def chosen(self, other: Block) -> Tensor:
        if not isinstance(other, DirectSum):
            return super().chosen(other)
        pairs = zip(self.parts, other.parts, strict=True)
        return torch.stack([one.chosen(two) for one, two in pairs]).sum()

    def rotated_diagonal(self, Q_G: Basis, Q_A: Basis) -> Tensor:
        pairs = zip(
            self.parts, matrix_of(Q_G).split([part.shape[0] for part in self.parts]), strict=True
        )
        return torch.stack([part.rotated_diagonal(rows, Q_A) for part, rows in pairs]).sum(0)

    @property
    def clamped(self) -> float:
        shares = [part.clamped for part in self.parts]
        if not any(shares):
            return 0.0
        if any(math.isnan(share) for share in shares):
            return math.nan
        sums = [float(part.eigenvalues().abs().sum()) for part in self.parts]
        return _mean(shares, sums)

    @property
    def trace_below_rounding(self) -> float:
        shares = [part.trace_below_rounding for part in self.parts]
        if not any(shares):
            return 0.0
        return _mean(shares, [float(part.trace().abs()) for part in self.parts])


def _mean(shares: Sequence[float], weights: Sequence[float]) -> float:
    """Shares of the parts as the share of the whole."""
    total = sum(weights)
    return sum(s * w for s, w in zip(shares, weights, strict=True)) / total if total else 0.0


def layer_block(parts: Sequence[AnyBlock]) -> AnyBlock | DirectSum:
    """The block of a layer: that of its only group, or the direct sum of its groups'."""
    return parts[0] if len(parts) == 1 else DirectSum(parts)
