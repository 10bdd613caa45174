"""From the calls on a tape to captures: one matrix per weight, its examples first.

Most calls are taken as they are. Three kinds are brought to the form `D = sum_t g[t] a[t]^T`:

    rows in another order      gathered by example; an example with fewer rows has zeros
    an element-wise weight     `D = sum g * x` as the only column; the bias has a column of its own
    a weight in two roles      (an embedding that is the head too, `W` and `W^T`): the gradient of
                               the second role is formed, and `a` are the unit vectors
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fisherlab.blocks.contractions import per_example
from fisherlab.extract.geometry import Geometry
from fisherlab.extract.layer import LayerCapture
from fisherlab.extract.rows import order, take, whole_rows
from fisherlab.extract.tape import Call

# Bytes of a weight's gradients from which on those of several calls lie in one tensor.
LARGE = 64 * 1024**2


@dataclass(frozen=True)
class Form:
    """The matrix of one weight: its geometry, and the bias that is its last column."""

    geometry: Geometry
    bias: Tensor | None

    @classmethod
    def of(cls, calls: Sequence[Call]) -> Form:
        """The form that the calls have, with the bias that comes first.

        A second bias of a weight belongs to another module and is in no block.
        """
        # a head before an embedding: a head's inputs are what Kronecker factors are about
        first = next((c for c in calls if c.geometry.lookup is None), calls[0])
        form = cls(replace(first.geometry, bias=False, start=0, width=None), None)
        bias = next((c.bias for c in calls if c.bias is not None and form.fits(c)), None)
        return cls(replace(form.geometry, bias=bias is not None), bias)

    def fits(self, call: Call) -> bool:
        """Whether the call multiplies the weight in the block's own role."""
        one, other = self.geometry, call.geometry
        return (one.in_features, one.out_features, one.flipped) == (
            other.in_features,
            other.out_features,
            other.flipped,
        )


@dataclass(frozen=True)
class Piece:
    """Part of a capture: a geometry, its raw input, and the way from the call's gradient to its."""

    geometry: Geometry
    raw_input: Tensor
    call: Call
    rows: Tensor | None = None
    # "": as it arrived; "weight" or "bias" of an element-wise product; "formed": a second role
    sums: str = ""
    inner: Geometry | None = None

    def gradient(self, arrived: Tensor) -> Tensor:
        """The raw gradient `[m, n, ...]` of one that arrived, `[m, ...]`."""
        call = self.call
        m = len(arrived)
        g = arrived
        if self.rows is not None:
            g = g if whole_rows(call) else g.reshape(m, -1, *g.shape[g.ndim - call.row_axes :])
            g = take(g, self.rows, 1)
        if self.sums in ("weight", "bias"):
            scale = call.scale if self.sums == "weight" else None
            if self.rows is not None and scale is not None and scale.ndim:
                scale = scale.expand(cast(Tensor, call.output).shape)
                features = scale.shape[scale.ndim - call.row_axes :]
                scale = take(scale.reshape(-1, *features), self.rows)
            return _elementwise(g, scale, self._aligned(g), call.geometry)
        if self.sums == "formed":
            assert self.inner is not None
            a = self.inner.inputs(self._rows_of_input(g.dtype))
            D = per_example(a, self.inner.outputs(g, 2))
            # unit vectors as inputs: one position per column of the weight
            return D
        return g

    def _rows_of_input(self, dtype: torch.dtype) -> Tensor:
        x = self.call.raw_input.to(dtype)
        if self.rows is None:
            return x
        lookup = self.call.geometry.lookup is not None
        return take(x.flatten() if lookup else x.reshape(-1, x.shape[-1]), self.rows)

    def _aligned(self, g: Tensor) -> list[int]:
        """The axes of `[m, n, ...]` that the weight is spread over, without the first two."""
        call, ndim = self.call, g.ndim
        if call.axis is not None:
            return [k for k in range(2, ndim) if k != call.axis + 1]
        shape = [1] * (ndim - len(call.weight_shape)) + list(call.weight_shape)
        return [k for k in range(2, ndim) if shape[k] == 1]


def _elementwise(g: Tensor, scale: Tensor | None, spread: list[int], geometry: Geometry) -> Tensor:
    """`sum g * x` over the axes that the weight is spread over, `[m, n, 1, d]`."""
    product = g if scale is None else g * scale
    summed = product.sum(spread) if spread else product
    o, start = geometry.out_features, geometry.start
    rows = summed.reshape(*g.shape[:2], 1, geometry.width or o)
    return rows if geometry.width is None else F.pad(rows, (start, o - start - geometry.width))


def pieces(call: Call, form: Form, n: int) -> list[Piece]:
    """The parts of a call in the block's form; raises `ValueError` where it has none."""
    whole = form.geometry
    adds = form.bias is not None and call.bias is form.bias
    rows = None if call.examples is None else order(call.examples, n)
    if call.scale is not None:
        if not form.fits(call):
            raise ValueError("it is a factor per feature in one place and a matrix in another")
        if rows is not None and call.axis is not None:
            raise ValueError("its rows are not in the order of the examples")
        one = cast(Tensor, call.output).new_ones(n, 1, 1)
        parts = [Piece(replace(whole, adds=False), one, call, rows, "weight")]
        if adds:
            parts.append(Piece(whole, 0 * one, call, rows, "bias"))
        return parts
    geometry = replace(call.geometry, bias=whole.bias, adds=adds)
    if not form.fits(call):
        if whole.groups > 1 or call.geometry.groups > 1 or whole.conv or call.geometry.conv:
            raise ValueError("it is used by two kinds of convolutions")
        inner = replace(call.geometry, bias=False)
        like = cast(Tensor, call.output)
        unit = torch.eye(whole.in_features, dtype=like.dtype, device=like.device).expand(n, -1, -1)
        role = replace(whole, adds=False, conv=None, transposed=None, lookup=None)
        return [Piece(role, unit, call, rows, "formed", inner)]
    if rows is None:
        return [Piece(geometry, call.raw_input, call)]
    if whole_rows(call):
        return [
            Piece(geometry, take(call.raw_input, rows[:, k]), call, rows[:, k])
            for k in range(rows.shape[1])
        ]
    x = call.raw_input
    x = x.flatten() if geometry.lookup is not None else x.reshape(-1, x.shape[-1])
    return [Piece(geometry, take(x, rows), call, rows)]


def shared_biases(calls: Mapping[str, Sequence[Call]]) -> dict[str, str]:
    """Why weights have no block whose bias is another weight's too, which no single block holds."""
    owners: dict[int, list[str]] = {}
    for name, found in calls.items():
        for bias in {id(call.bias) for call in found if call.bias is not None}:
            owners.setdefault(bias, []).append(name)
    return {
        name: f"its bias is that of {', '.join(repr(n) for n in names if n != name)} as well"
        for names in owners.values()
        for name in names
        if len(names) > 1
    }


def capture_of(
    name: str,
    layer_type: str,
    parts: Sequence[Piece],
    form: Form,
    labels: Callable[[Call], Tensor],
    columns: Callable[[Call], Tensor] | None = None,
    **rest: Any,
) -> dict[str, LayerCapture]:
    """One capture per group of a weight, by name.

    Args:
        name: of the weight.
        layer_type: of the module that owns it.
        parts: its calls in the block's form.
        form: the block's form.
        labels: gives each call's gradient `[n, ...]` at the observed labels.
        columns: gives each call's output gradients `[m, n, ...]`; None for the labels alone.
        rest: further fields of the captures.
    """
    label = side_by_side(tuple(part.gradient(labels(part.call)[None])[0] for part in parts), 1)
    found = None
    if columns is not None:
        found = side_by_side(tuple(part.gradient(columns(part.call)) for part in parts), 2)
    inputs = tuple(_as(part.raw_input, g) for part, g in zip(parts, label, strict=True))
    outputs = None
    if not any(part.sums or part.call.output is None for part in parts):
        made = [part.gradient(cast(Tensor, part.call.output)[None])[0] for part in parts]
        outputs = tuple(_as(s, g) for s, g in zip(made, label, strict=True))
    maps = [part.geometry for part in parts]
    same = all(one == maps[0] for one in maps)
    whole = maps[0] if same else replace(form.geometry, conv=None, transposed=None, lookup=None)
    groups = form.geometry.groups
    captured = {}
    for k in range(groups):
        captured[f"{name}:{k}" if groups > 1 else name] = LayerCapture(
            name=name,
            layer_type=layer_type,
            geometry=replace(whole, group=k),
            maps=None if same else tuple(replace(one, group=k) for one in maps),
            raw_inputs=inputs,
            raw_output_gradients=found,
            raw_label_gradients=label,
            raw_outputs=outputs,
            **rest,
        )
    return captured


def side_by_side(parts: tuple[Tensor, ...], axis: int) -> tuple[Tensor, ...]:
    """Rows `[..., t, o]` of several calls as views of one tensor, if they are large and alike.

    Whoever joins them along `axis` then needs no second copy of them all (`contractions.joined`).
    """
    alike = len({(x.ndim, x.shape[:axis], x.shape[axis + 1 :], x.dtype) for x in parts}) == 1
    large = sum(x.numel() * x.element_size() for x in parts) >= LARGE
    if len(parts) < 2 or not alike or parts[0].ndim != axis + 2 or not large:
        return parts
    return torch.cat(parts, axis).split([x.shape[axis] for x in parts], axis)


def _as(raw: Tensor, gradients: Tensor) -> Tensor:
    return raw if raw.dtype == gradients.dtype else raw.to(gradients.dtype)
