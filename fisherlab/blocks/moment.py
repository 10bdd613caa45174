"""Factors that are not kept as matrices: a second moment of few rows, a known decomposition."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fisherlab.blocks.contractions import second_moment, symmetric_product
from fisherlab.blocks.coordinates import Unformed
from fisherlab.blocks.numerics import _eigh, declare_range, dot, inherit, trace_of
from fisherlab.blocks.span import Span
from fisherlab.blocks.work import once

Frame = Callable[[], tuple[Tensor, Tensor] | None]


class Moment(Unformed):
    """`S = scale X^T W X` of rows `X` `[..., d]`, clearly fewer than d.

    `weight` applies the symmetric `W` to rows of any width (None: `W = I`). `frame()` returns
    orthonormal columns `V` `[d, r]` that span the rows, and the rows in these coordinates,
    `[..., r]`: eigenvectors are found there, by products with r features instead of d.
    """

    def __init__(
        self,
        rows: Tensor,
        scale: float | Tensor,
        frame: Frame,
        weight: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(rows.shape[-1], rows)
        self.rows, self.scale, self.frame, self.weight = rows, scale, frame, weight
        # at scale 1, of which those at any scale are made
        self._pairs: dict[str, tuple[Tensor, Tensor]] = {}
        self._traces: dict[str, Tensor] = {}

    def scaled(self, factor: float | Tensor) -> Moment:
        """`factor S`, with the same eigenvectors."""
        other = Moment(self.rows, self.scale * factor, self.frame, self.weight)
        other._pairs, other._traces = self._pairs, self._traces
        return other

    def _space(self) -> Tensor | None:
        frame = self.frame()
        return None if frame is None else frame[0]

    def _sides(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """`X` and `W X`, `[r, d]` each."""
        weighted = rows if self.weight is None else self.weight(rows)
        return rows.reshape(-1, rows.shape[-1]), weighted.reshape(-1, rows.shape[-1])

    def spectral(self, name: str) -> tuple[Tensor, Tensor]:
        values, vectors = once(self._pairs, "unit", lambda: self._unit(name))
        return values * self.scale, vectors

    def _unit(self, name: str) -> tuple[Tensor, Tensor]:
        frame = self.frame()
        assert frame is not None, "a moment of few rows has a thin basis"
        V, inside = frame
        rows, weighted = self._sides(inside)
        values, C = _eigh(symmetric_product(rows, weighted), name)
        return values, Span(V, C)

    def apply(self, V: Tensor) -> Tensor:
        rows, weighted = self._sides(self.rows)
        return (V @ weighted.mT) @ rows * self.scale

    def trace(self) -> Tensor:
        return once(self._traces, "unit", lambda: dot(*self._sides(self.rows))) * self.scale

    def formed(self) -> Tensor:
        if self.weight is None:
            matrix = second_moment(self.rows) * self.scale
        else:
            rows, weighted = self._sides(self.rows)
            matrix = symmetric_product(rows, weighted) * self.scale
        declare_range(matrix, self._space, self.spectral("factor") if self._pairs else None)
        return matrix


def within(frame: Frame, combine: Callable[[Tensor], Tensor]) -> Frame:
    """The frame of rows that are linear combinations of a frame's rows.

    Args:
        frame: returns a basis `V` `[d, r]` and rows in its coordinates, `[..., r]`.
        combine: maps rows of any width to their combinations, such as means over positions.

    Returns:
        A frame with the same `V` and the combined coordinates.
    """

    def combined() -> tuple[Tensor, Tensor] | None:
        found = frame()
        return None if found is None else (found[0], combine(found[1]))

    return combined


def scaled(side: Tensor | Moment, factor: Tensor) -> Tensor | Moment:
    """`factor S`, with the eigenvectors of `S`."""
    if isinstance(side, Moment):
        return side.scaled(factor)
    return inherit(side * factor, side, lambda values: values * factor)


class Decomposed(Unformed):
    """`S = Q diag(values) Q^T`, with orthonormal columns `Q` `[d, r]`."""

    def __init__(self, values: Tensor, vectors: Tensor) -> None:
        self.values, self.vectors = values, vectors
        super().__init__(len(vectors), values, vectors)

    def spectral(self, name: str) -> tuple[Tensor, Tensor]:
        return self.values, self.vectors

    def apply(self, V: Tensor) -> Tensor:
        return (V @ self.vectors * self.values) @ self.vectors.mT

    def trace(self) -> Tensor:
        return self.values.sum(dtype=torch.float64)

    def formed(self) -> Tensor:
        matrix = self.vectors * self.values @ self.vectors.mT
        declare_range(matrix, lambda: self.vectors, (self.values, self.vectors))
        return matrix


class Lifted(Unformed):
    """`S = V C V^T`, with orthonormal columns `V` `[d, r]` and a symmetric `C` `[r, r]`."""

    def __init__(self, V: Tensor, C: Tensor) -> None:
        self.V, self.C = V, C
        self._pairs: tuple[Tensor, Tensor] | None = None
        super().__init__(len(V), V, C)

    def spectral(self, name: str) -> tuple[Tensor, Tensor]:
        if self._pairs is None:
            values, inside = _eigh(self.C, name)
            self._pairs = values, Span(self.V, inside)
        return self._pairs

    def apply(self, V: Tensor) -> Tensor:
        return V @ self.V @ self.C @ self.V.mT

    def trace(self) -> Tensor:
        return trace_of(self.C)

    def formed(self) -> Tensor:
        matrix = self.V @ self.C @ self.V.mT
        declare_range(matrix, lambda: self.V, self._pairs)
        return matrix
