"""`Statistic`: a sum over examples with one definition, and cheaper views of the same sum."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import wraps
from itertools import pairwise
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from fisherlab import doors
from fisherlab.blocks import BlockError, MiniBlock, RowBlocks
from fisherlab.blocks.columns import Columns
from fisherlab.blocks.contractions import second_moment
from fisherlab.blocks.entry import guard
from fisherlab.blocks.factor import Rows, within_span
from fisherlab.blocks.mini_block import check_blocks
from fisherlab.extract import LayerCapture

__all__ = [
    "Energy",
    "EnergyProduct",
    "GradientLeft",
    "GradientRight",
    "GroupedMoment",
    "InputMoment",
    "LeftMoment",
    "LeftProduct",
    "MeanGradient",
    "MeanInput",
    "OutputMoment",
    "ReducedInput",
    "ReducedOutput",
    "RightMoment",
    "RightProduct",
    "RowMoments",
    "Slope",
    "Squares",
    "Statistic",
    "Ungrouped",
    "View",
    "totals",
]

COLUMNS = frozenset({"inputs", "output_gradients"})


class View(Protocol):
    """A sum that is kept in fewer numbers than its tensor has."""

    def scaled(self, factor: float, /) -> View:
        """The sum times a number."""

    def formed(self) -> Tensor:
        """The tensor."""


def _of_layer(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method of a statistic, which refuses what is no capture."""

    @wraps(method)
    def entered(self: Any, layer: Any, *rest: Any) -> Any:
        if isinstance(layer, type) or not hasattr(layer, "examples"):
            raise BlockError(f"layer must be that of fl.capture, got {doors.said(layer)}")
        return method(self, layer, *rest)

    return entered


@dataclass(frozen=True, eq=False)
class Statistic(ABC):
    """`S = sum_n s_n`, a sum over the examples of a batch, of one layer.

    `total` defines it. `diagonal` and `rows` are views of the same sum that cost less. A subclass
    that redefines `total` alone drops the views it inherits, so that every caller uses its total.

    Statistics with equal fields are equal, and are computed once for all methods that name them.
    Nothing here divides: a method gets the mean over all loss terms.
    """

    # "input" or "output" where the sum is a Kronecker factor of that side of the layer
    side: ClassVar[str | None] = None
    # tensors that a capture must hold
    needs: ClassVar[frozenset[str]] = COLUMNS
    # whether totals add up over output vectors of one example as well
    columnwise: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        guard(cls, dict.fromkeys(("total", "diagonal", "rows"), _of_layer))

        def depth(name: str) -> int:
            return next(k for k, base in enumerate(cls.__mro__) if name in vars(base))

        for view in ("diagonal", "rows", "columnwise"):
            if depth("total") < depth(view):
                setattr(cls, view, vars(Statistic)[view])

    def _fields(self) -> tuple[Any, ...]:
        if not vars(self):
            return ()
        # tensors are equal where they are one
        fields = sorted(vars(self).items())
        return tuple((key, id(x) if isinstance(x, Tensor) else x) for key, x in fields)

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return type(self) is type(other) and self._fields() == other._fields()

    def __hash__(self) -> int:
        return hash((type(self), self._fields())) if vars(self) else hash(type(self))

    @abstractmethod
    def total(self, layer: LayerCapture) -> Tensor:
        """The sum over the examples of a capture."""

    def diagonal(self, layer: LayerCapture) -> Tensor:
        """The diagonal of `total`, for a factor too large to be kept as a matrix."""
        S = self.total(layer)
        return S.diagonal() if S.ndim == 2 else S

    def rows(self, layer: LayerCapture) -> View | None:
        """`total` as the few rows that it is a moment of; None where they are not few."""
        return None

    def over(self, layer: LayerCapture, diagonal: bool = False) -> Tensor:
        """`total` or `diagonal`.

        Raises:
            BlockError: the capture holds some output vectors of its examples only, and the
                statistic is not `columnwise`.
        """
        if not self.columnwise and not layer.whole:
            raise BlockError(
                f"{self} is a sum over whole examples, and this capture of layer {layer.name!r} "
                "holds some of their output vectors; take chunks of examples, or set "
                "`columnwise = True` where its total adds up over output vectors too"
            )
        return self.diagonal(layer) if diagonal else self.total(layer)


def totals(
    statistics: Sequence[Statistic], layer: LayerCapture, memory: int | None = None
) -> Iterator[dict[Statistic, Tensor]]:
    """The totals of several statistics, chunk by chunk of at most `memory` bytes.

    Statistics that are not `columnwise` take whole examples, at any cost.
    """
    for columnwise in (True, False):
        group = [S for S in statistics if S.columnwise == columnwise]
        if not group:
            continue
        for chunk in layer.chunks(memory, whole=not columnwise):
            # one layout of the columns for all of them
            at_hand = chunk.at_hand() if len(group) > 1 else chunk
            yield {S: S.over(at_hand) for S in group}


def _rows(layer: LayerCapture) -> tuple[Tensor, Tensor]:
    """`a` and `g`, laid out once."""
    columns = layer.columns
    return columns.a, columns.g


def _mean(layer: LayerCapture) -> float:
    """The factor from a sum over `weighed` positions to a mean over counted positions."""
    return layer.column_share / layer.positions


def _input_rows(
    layer: LayerCapture,
    combine: Callable[[Tensor], Tensor],
    scale: float,
    weight: Callable[[Tensor], Tensor] | None = None,
) -> Rows | None:
    """The moment of combinations of the inputs, where these span clearly less than their space."""
    if layer.raw_output_gradients is None or not layer.few_inputs:
        return None
    columns = layer.columns
    return Rows(combine(columns.a), scale, within_span(lambda: columns.input_span, combine), weight)


def _output_rows(
    layer: LayerCapture,
    combine: Callable[[Tensor], Tensor],
    scale: float = 1.0,
    weight: Callable[[Tensor], Tensor] | None = None,
) -> Rows | None:
    """The same of the output gradients."""
    if not layer.few_gradients:
        return None
    columns = layer.columns
    return Rows(
        combine(columns.g), scale, within_span(lambda: columns.output_span, combine), weight
    )


def _same(rows: Tensor) -> Tensor:
    return rows


# the factors of KFAC -----------------------------------------------------------------------------


class InputMoment(Statistic):
    """`sum_n (1/T_n) sum_t a a^T`, `[i, i]`: a mean over the positions that count."""

    side, needs, columnwise = "input", frozenset({"inputs"}), True

    def total(self, layer: LayerCapture) -> Tensor:
        return layer.input_moment * _mean(layer)

    def diagonal(self, layer: LayerCapture) -> Tensor:
        return _mean(layer) * layer.weighed(layer.input_rows).square().flatten(0, -2).sum(0)

    def rows(self, layer: LayerCapture) -> Rows | None:
        return _input_rows(layer, layer.weighed, _mean(layer))


class OutputMoment(Statistic):
    """`sum_{m,n,t} g g^T`, `[o, o]`."""

    side, needs, columnwise = "output", frozenset({"output_gradients"}), True

    def total(self, layer: LayerCapture) -> Tensor:
        return second_moment(layer.output_gradients)

    def diagonal(self, layer: LayerCapture) -> Tensor:
        return layer.output_gradients.square().flatten(0, -2).sum(0)

    def rows(self, layer: LayerCapture) -> Rows | None:
        return _output_rows(layer, _same)


class ReducedInput(Statistic):
    """`sum_n abar abar^T`, `[i, i]`, with `abar` the mean over the positions that count."""

    side, needs, columnwise = "input", frozenset({"inputs"}), True

    def total(self, layer: LayerCapture) -> Tensor:
        return layer.column_share * second_moment(layer.position_mean(layer.input_rows))

    def diagonal(self, layer: LayerCapture) -> Tensor:
        return layer.column_share * layer.position_mean(layer.input_rows).square().sum(0)

    def rows(self, layer: LayerCapture) -> Rows | None:
        return _input_rows(layer, layer.position_mean, layer.column_share)


class ReducedOutput(Statistic):
    """`sum_{m,n} ghat ghat^T`, `[o, o]`, with `ghat = sum_t g`."""

    side, needs, columnwise = "output", frozenset({"output_gradients"}), True

    def total(self, layer: LayerCapture) -> Tensor:
        return second_moment(layer.output_gradients.sum(2))

    def diagonal(self, layer: LayerCapture) -> Tensor:
        return layer.output_gradients.sum(2).square().flatten(0, -2).sum(0)

    def rows(self, layer: LayerCapture) -> Rows | None:
        return _output_rows(layer, lambda g: g.sum(2))


# partial traces, exact and of independent factors ------------------------------------------------


class LeftMoment(Statistic):
    """`sum D D^T`, `[o, o]`, of the per-example gradients."""

    side, columnwise = "output", True

    def total(self, layer: LayerCapture) -> Tensor:
        return layer.columns.left

    def diagonal(self, layer: LayerCapture) -> Tensor:
        return layer.columns.squares.sum(1)

    def rows(self, layer: LayerCapture) -> Rows | None:
        # D = g^T a, so that sum D D^T = g^T (a a^T) g
        columns = layer.columns
        if columns.cancels:
            return None
        return _output_rows(layer, _same, weight=lambda g: columns.input_products @ g)


class RightMoment(Statistic):
    """`sum D^T D`, `[i, i]`, of the per-example gradients."""

    side, columnwise = "input", True

    def total(self, layer: LayerCapture) -> Tensor:
        return layer.columns.right

    def diagonal(self, layer: LayerCapture) -> Tensor:
        return layer.columns.squares.sum(0)

    def rows(self, layer: LayerCapture) -> Rows | None:
        # sum D^T D = a^T (sum_m g g^T) a
        columns = layer.columns
        if columns.cancels:
            return None
        return _input_rows(layer, _same, 1.0, lambda a: columns.gradient_products @ a)


class Energy(Statistic):
    """`sum ||D||^2`, 0-d float64: the trace of the block."""

    columnwise = True

    def total(self, layer: LayerCapture) -> Tensor:
        return layer.columns.trace


def _lengths(layer: LayerCapture, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """`sum_t ||a||^2`, weighed, and `sum_{m,t} ||g||^2` of each example, `[n]`."""
    return layer.weighed(a).square().sum((1, 2)), g.square().sum((0, 2, 3))


class LeftProduct(Statistic):
    """`sum_n (sum_t ||a||^2) (sum_{m,t} g g^T) / T_n`, `[o, o]`."""

    side, columnwise = "output", True

    def _rows(self, layer: LayerCapture) -> Tensor:
        a, g = _rows(layer)
        return g * _lengths(layer, a, g)[0].sqrt()[:, None, None]

    def total(self, layer: LayerCapture) -> Tensor:
        return second_moment(self._rows(layer)) / layer.positions

    def diagonal(self, layer: LayerCapture) -> Tensor:
        return self._rows(layer).square().sum((0, 1, 2)) / layer.positions

    def rows(self, layer: LayerCapture) -> Rows | None:
        columns = layer.columns
        return _output_rows(
            layer,
            _same,
            1 / layer.positions,
            lambda g: _lengths(layer, columns.a, columns.g)[0][:, None, None] * g,
        )


class RightProduct(Statistic):
    """`sum_n (sum_{m,t} ||g||^2) (sum_t a a^T) / T_n`, `[i, i]`."""

    side, columnwise = "input", True

    def _rows(self, layer: LayerCapture) -> Tensor:
        a, g = _rows(layer)
        return layer.weighed(a) * _lengths(layer, a, g)[1].sqrt()[:, None, None]

    def total(self, layer: LayerCapture) -> Tensor:
        return second_moment(self._rows(layer)) / layer.positions

    def diagonal(self, layer: LayerCapture) -> Tensor:
        return self._rows(layer).square().sum((0, 1)) / layer.positions

    def rows(self, layer: LayerCapture) -> Rows | None:
        columns = layer.columns

        def weight(a: Tensor) -> Tensor:
            weights = _lengths(layer, columns.a, columns.g)[1][:, None, None]
            return layer.weighed(weights * a, 1.0)

        return _input_rows(layer, _same, 1 / layer.positions, weight)


class EnergyProduct(Statistic):
    """`sum_n (sum_t ||a||^2) (sum_{m,t} ||g||^2) / T_n`, 0-d float64."""

    columnwise = True

    def total(self, layer: LayerCapture) -> Tensor:
        inputs, outputs = _lengths(layer, *_rows(layer))
        return (inputs.double() * outputs.double()).sum() / layer.positions


# gradients of the batch --------------------------------------------------------------------------


class GradientLeft(Statistic):
    """`M D D^T`, `[o, o]`, of the mean gradient `D` of a whole batch at the observed labels."""

    side, needs, columnwise = "output", frozenset({"gradient"}), True

    def total(self, layer: LayerCapture) -> Tensor:
        D = layer.gradient
        return layer.examples * D @ D.mT

    def diagonal(self, layer: LayerCapture) -> Tensor:
        return layer.examples * layer.gradient.square().sum(1)


class GradientRight(Statistic):
    """`M D^T D`, `[i, i]`, of the mean gradient `D` of a whole batch at the observed labels."""

    side, needs, columnwise = "input", frozenset({"gradient"}), True

    def total(self, layer: LayerCapture) -> Tensor:
        D = layer.gradient
        return layer.examples * D.mT @ D

    def diagonal(self, layer: LayerCapture) -> Tensor:
        return layer.examples * layer.gradient.square().sum(0)


# entries and small blocks of the block -----------------------------------------------------------


class Squares(Statistic):
    """`sum D^2` entrywise, `[o, i]`: the diagonal of the block."""

    columnwise = True

    def total(self, layer: LayerCapture) -> Tensor:
        return layer.columns.squares


def _groups(layer: LayerCapture) -> tuple[int, int]:
    """Groups of inputs and their size."""
    conv, i = layer.geometry.conv, layer.shape[1]
    k = math.prod(conv.kernel) if conv else i
    return (i - (layer.geometry.bias if conv else 0)) // k, k


class GroupedMoment(Statistic):
    """`sum D D^T` of each output and group of inputs, `[o, c, k, k]`.

    A convolution has a group for each input channel, anything else has one group. Raises
    `BlockTooLarge` where they exceed the memory budget.
    """

    columnwise = True

    def total(self, layer: LayerCapture) -> Tensor:
        (o, _), (c, k) = layer.shape, _groups(layer)
        check_blocks(o, c, k, layer.dtype, layer.device, f"layer {layer.name!r}")
        return layer.columns.grouped_moments(c, k)

    def rows(self, layer: LayerCapture) -> RowMoments | None:
        one = layer.geometry.conv is None and layer.positions == 1 and layer.whole
        return RowMoments(layer.columns) if one else None


@dataclass(frozen=True, eq=False)
class RowMoments:
    """`scale sum D D^T` of each output, for columns of one position: their inputs and gradients."""

    columns: Columns
    scale: float = 1.0

    def scaled(self, factor: float) -> RowMoments:
        """The sum times a number."""
        return RowMoments(self.columns, self.scale * factor)

    def block(self) -> MiniBlock:
        """The block diagonal of them."""
        return RowBlocks(self.columns.a, self.columns.g, self.scale, self.columns)

    def formed(self) -> Tensor:
        """The moments, `[o, 1, i, i]`; raises `BlockTooLarge` past the memory budget."""
        return self.block().blocks


class Ungrouped(Statistic):
    """`sum D^2`, `[o, ...]`, of the inputs in no group: the bias of a convolution."""

    columnwise = True

    def total(self, layer: LayerCapture) -> Tensor:
        (o, i), (c, k) = layer.shape, _groups(layer)
        if c * k == i:
            return torch.zeros(o, 0, dtype=layer.dtype, device=layer.device)
        return layer.columns.squares[:, c * k :]


# means of one side -------------------------------------------------------------------------------


def _grouped(layer: LayerCapture, groups: int, total: Callable[[LayerCapture], Tensor]) -> Tensor:
    """Totals of contiguous groups of the batch, `[groups, d]`, each for as much as all of it."""
    groups = doors.count(groups, "groups", error=BlockError)
    if groups == 1:
        return total(layer)
    n = len(layer.raw_inputs[0])
    if n < groups:
        raise BlockError(
            f"IFANG(rows={groups}) of layer {layer.name!r} needs as many examples in a batch or "
            f"chunk, got {n}"
        )
    parts = [layer.part(slice(*x)) for x in pairwise(k * n // groups for k in range(groups + 1))]
    return torch.stack([layer.examples / part.examples * total(part) for part in parts])


@dataclass(frozen=True, eq=False)
class MeanInput(Statistic):
    """`sum_n mean_t a`, `[i]`, over the positions that count; `[groups, i]` of parts of a batch."""

    columnwise = True
    groups: int = 1

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"mean_input_sum" if self.groups == 1 else "inputs"})

    def total(self, layer: LayerCapture) -> Tensor:
        return _grouped(layer, self.groups, lambda part: part.column_share * part.mean_input_sum)


@dataclass(frozen=True, eq=False)
class MeanGradient(Statistic):
    """`sum_{n,t} g`, `[o]`, at the observed labels; `[groups, o]` of parts of a batch."""

    columnwise = True
    groups: int = 1

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"label_gradient_sum" if self.groups == 1 else "label_gradients"})

    def total(self, layer: LayerCapture) -> Tensor:
        return _grouped(
            layer, self.groups, lambda part: part.column_share * part.label_gradient_sum
        )


class Slope(Statistic):
    """`M nu`, 0-d float64, with `nu = E f'(s)` of the activation that the layer feeds."""

    needs, columnwise = frozenset({"activation_slope"}), True

    def total(self, layer: LayerCapture) -> Tensor:
        if layer.without_slope:
            raise BlockError(layer.without_slope)
        return layer.activation_slope * layer.examples
