"""`LayerCapture`: what the passes leave at one layer; its weight-sharing form, made on demand.

A weight that is multiplied several times has the positions of all its calls. Nothing below knows
what a convolution is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fisherlab import doors
from fisherlab.blocks import contractions
from fisherlab.blocks.columns import Columns, compact, few, formed_gram
from fisherlab.blocks.numerics import sum_of
from fisherlab.blocks.work import once
from fisherlab.extract.geometry import CaptureError, Geometry

Raw = tuple[Tensor, ...] | None


@dataclass(frozen=True, eq=False)
class LayerCapture:
    """Raw inputs, raw output gradients and geometry of one layer; views of them on demand.

    One entry of each `raw_*` list per call of the module. `raw_output_gradients` are `[m, n, ...]`,
    of the per-example loss `l_n`, never divided by `M`, with each column's scale inside, so that
    `F = (1/M) sum_{m,n} vec(D) vec(D)^T`. `raw_label_gradients` are `[n, ...]`, at the observed
    labels, whatever the Fisher type.
    """

    name: str
    layer_type: str
    geometry: Geometry
    raw_inputs: tuple[Tensor, ...]
    raw_output_gradients: tuple[Tensor, ...] | None
    raw_label_gradients: tuple[Tensor, ...] | None
    raw_outputs: tuple[Tensor, ...] | None = None
    # `[n, 2]` per example: the sum of `f'` of what the map feeds, and the number of its terms
    slopes: Tensor | None = None
    # why the map has no `nu`; "" where it has one
    without_slope: str = ""
    fisher_type: str = "empirical"
    # scale from both raw gradients to the per-example loss; an optimizer's are 1/M of it
    gradient_scale: float = 1.0
    # the examples that each row of the raw tensors is the sum of; above 1 only sums are known
    summed: int = 1
    # c = M / Z of the batch, whose mean divides by Z loss terms; inside both raw gradients
    term_scale: float = 1.0
    # the share of each example's output vectors that this capture holds: 1 unless it is a chunk
    column_share: float = 1.0
    # positions that count in means over positions, `[n, t]`; None where all do
    counted: Tensor | None = None
    # the same batch captured again after a step, for quasi-Newton pairs
    after: LayerCapture | None = None
    # the geometry of each call, where they differ
    maps: tuple[Geometry, ...] | None = None
    # while a memo measures this layer: its columns, made once for every approximation
    shared: dict[str, Columns] | None = field(default=None, repr=False)
    # whether they are shared by a few sums only: their gradients are not kept
    brief: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse what is no capture: users may make one of other libraries' tensors."""
        if not isinstance(self.geometry, Geometry):
            raise CaptureError(f"geometry must be a Geometry, got {doors.said(self.geometry)}")
        for name in ("raw_inputs", "raw_output_gradients", "raw_label_gradients", "raw_outputs"):
            raw = getattr(self, name)
            if raw is None and name != "raw_inputs":
                continue
            tensors = isinstance(raw, tuple) and all(isinstance(x, Tensor) for x in raw)
            if not tensors or not raw:
                raise CaptureError(f"{name} must be a tuple of tensors, got {doors.said(raw)}")
        for name, kind in (("counted", Tensor), ("slopes", Tensor), ("after", LayerCapture)):
            given = getattr(self, name)
            if given is not None and not isinstance(given, kind):
                wanted = f"a {kind.__name__} or None"
                raise CaptureError(f"{name} must be {wanted}, got {doors.said(given)}")
        if self.maps is not None and not (
            isinstance(self.maps, tuple) and all(isinstance(m, Geometry) for m in self.maps)
        ):
            raise CaptureError(f"maps must be a tuple of Geometry, got {doors.said(self.maps)}")
        for name in ("gradient_scale", "summed", "term_scale", "column_share"):
            # NaN of a batch is named where its numbers are used
            if doors.real(getattr(self, name)) is None:
                got = doors.said(getattr(self, name))
                raise CaptureError(f"{name} must be a number, got {got}")
        for name in ("name", "layer_type", "without_slope", "fisher_type"):
            doors.name(getattr(self, name), name, error=CaptureError)

    def __repr__(self) -> str:
        o, i = self.shape
        return (
            f"LayerCapture({self.name!r}, {self.layer_type}, {o} x {i}, {self.fisher_type}, "
            f"{self.examples:g} examples, {self.dtype})"
        )

    @property
    def shape(self) -> tuple[int, int]:
        """`(o, i)` of the weight, the bias as last column."""
        return self.geometry.out_features, self.geometry.in_features + self.geometry.bias

    @property
    def examples(self) -> float:
        """Loss terms covered: the number of examples, times the share of their output vectors."""
        return self.raw_inputs[0].shape[0] * self.summed * self.column_share

    @property
    def whole(self) -> bool:
        """Whether it holds all output vectors of its examples."""
        return self.column_share == 1

    @property
    def device(self) -> torch.device:
        return self.raw_inputs[0].device

    @property
    def dtype(self) -> torch.dtype:
        return self.raw_inputs[0].dtype

    @property
    def inputs(self) -> Tensor:
        """`a` `[n, t, i]`, last feature 1 where there is a bias; made anew at each access.

        0 at positions that do not count, where `g` is 0 for every column.
        """
        calls = [map_.inputs(raw) for map_, raw in self.calls(self.raw_inputs)]
        a = calls[0] if len(calls) == 1 else torch.cat(calls, 1)
        return a if self.counted is None else torch.where(self.counted[..., None], a, 0)

    @property
    def position_weights(self) -> Tensor | None:
        """`T / T_n` `[n]`, `T_n` the positions that count; None where all do."""
        if self.counted is None:
            return None
        counts = self.counted.sum(1).double()
        return torch.where(counts > 0, self.positions / counts.clamp(min=1), 0).to(self.dtype)

    def weighed(self, a: Tensor, power: float = 0.5) -> Tensor:
        """Rows `[n, ...]` times `(T / T_n)^power`, so that means over `T` are means over `T_n`."""
        doors.tensor(a, "a", error=CaptureError)
        power = doors.number(power, "power", error=CaptureError)
        weights = self.position_weights
        return a if weights is None else a * (weights**power).view(-1, *[1] * (a.ndim - 1))

    def position_mean(self, a: Tensor) -> Tensor:
        """Means of rows `[n, t, ...]` over the positions that count, `[n, ...]`."""
        doors.tensor(a, "a", error=CaptureError)
        if a.ndim < 2:
            raise CaptureError(f"a must be [n, t, ...], got {doors.said(a)}")
        return self.weighed(a.mean(1), 1.0)

    @property
    def input_rows(self) -> Tensor:
        """`inputs`, laid out once where the columns are shared."""
        if self.shared is None or self.raw_output_gradients is None:
            return self.inputs
        return self.inputs if self.brief and not self.shared else self.columns.a

    @property
    def input_moment(self) -> Tensor:
        """`sum_n (T / T_n) sum_t a a^T`, `[i, i]`; `T_n = T` where all positions count."""
        conv = self.geometry.conv
        if self.counted is not None:
            return contractions.second_moment(self.weighed(self.input_rows))
        if self.shared is not None and "columns" in self.shared and not (conv and conv.plain):
            return contractions.second_moment(self.columns.a)
        moments = [map_.input_moment(raw) for map_, raw in self.calls(self.raw_inputs)]
        return moments[0] if len(moments) == 1 else torch.stack(moments).sum(0)

    @property
    def few_inputs(self) -> bool:
        """Whether the inputs span clearly less than their space."""
        return few(self.raw_inputs[0].shape[0] * self.positions, self.shape[1])

    @property
    def few_gradients(self) -> bool:
        """Whether the output gradients span clearly less than their space."""
        rows = self.columns_per_example * self.raw_inputs[0].shape[0] * self.positions
        return few(rows, self.shape[0])

    @property
    def mean_input_sum(self) -> Tensor:
        """`sum_n mean_t a`, `[i]`, over the positions that count."""
        if self.counted is not None:
            return self.weighed(self.inputs.sum(1), 1.0).sum(0) / self.positions
        sums = [map_.input_sum(raw, self.summed) for map_, raw in self.calls(self.raw_inputs)]
        total = sums[0][0] if len(sums) == 1 else torch.stack([s for s, _ in sums]).sum(0)
        return total / sum(positions for _, positions in sums)

    @property
    def output_gradients(self) -> Tensor:
        """`g` `[m, n, t, o]` of the per-example loss, the column scale inside."""
        raw = self._present("raw_output_gradients", "output_gradients")
        calls = [map_.outputs(x, 2) for map_, x in self.calls(raw)]
        return self._scaled(contractions.joined(calls, 2))

    @property
    def label_gradients(self) -> Tensor:
        """`g` `[n, t, o]` of the per-example loss at the observed labels."""
        raw = self._present("raw_label_gradients", "label_gradients")
        calls = [map_.outputs(x) for map_, x in self.calls(raw)]
        return self._scaled(contractions.joined(calls, 1))

    @property
    def label_gradient_sum(self) -> Tensor:
        """`sum_{n,t} g` at the observed labels, `[o]`."""
        raw = self._present("raw_label_gradients", "label_gradients")
        sums = [map_.outputs(x).sum((0, 1)) for map_, x in self.calls(raw)]
        return self._scaled(sums[0] if len(sums) == 1 else torch.stack(sums).sum(0))

    def _scaled(self, gradients: Tensor) -> Tensor:
        return gradients if self.gradient_scale == 1 else self.gradient_scale * gradients

    @property
    def outputs(self) -> Tensor:
        """`s` `[n, t, o]`, the layer's outputs."""
        raw = self._present("raw_outputs", "outputs")
        calls = [map_.outputs(x) for map_, x in self.calls(raw)]
        return calls[0] if len(calls) == 1 else torch.cat(calls, 1)

    @property
    def activation_slope(self) -> Tensor:
        """`nu = E f'(z)` of the element-wise function that `s` ends in, 0-d float64.

        The mean over examples, positions and units. `f` may stand behind a normalisation or a sum,
        and is then evaluated there; the gates of an LSTM have one each. 1 where `s` is the model's
        output; NaN where there is no such function (`without_slope` says why).
        """
        if self.slopes is None:
            raise CaptureError(self._absent("activation_slope", "activation_slope"))
        total, terms = self.slopes.double().sum(0)
        return total / terms if not self.without_slope else torch.full_like(total, math.nan)

    @property
    def gradient(self) -> Tensor:
        """`[o, i]`, the gradient of the mean per-example loss at the observed labels."""
        n = self.raw_inputs[0].shape[0]
        if self.shared and self.fisher_type == "empirical" and self.columns.formed is not None:
            # the columns are the gradients at these labels
            return self.columns.formed.sum(0).view(self.shape) / n
        if self.shared and "a" in vars(self.columns):
            return _product(self.label_gradients, self.columns.a) / n
        return sum_of(_product(x.label_gradients, x.inputs) for x in self._in_cache()) / n

    @property
    def columns(self) -> Columns:
        """The per-example gradients in the weight-sharing form, with the sums over them."""
        if self.shared is None:
            return Columns(self.inputs, self.output_gradients, careful=True)
        # dozens of products are to come: the gradients may take half again a workspace
        room = 0 if self.brief else 3 * contractions.WORKSPACE // 2
        careful = not self.brief
        return once(
            self.shared,
            "columns",
            lambda: Columns(self.inputs, self.output_gradients, room, careful),
        )

    def at_hand(self) -> LayerCapture:
        """The capture with its columns laid out once, for a few sums over them."""
        return self if self.shared is not None else replace(self, shared={}, brief=True)

    def per_example_gradients(self) -> Tensor:
        """`D[m,n,o,i] = sum_t g a^T`, all of them: m n o i numbers."""
        parts = [contractions.per_example(x.inputs, x.output_gradients) for x in self._in_cache()]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _in_cache(self) -> Iterator[LayerCapture]:
        """A few examples at a time, whose inputs stay in the cache.

        The inputs of a convolution are unfolded anew, and are many times larger than its image.
        """
        size = self.positions * self.shape[1] * self.raw_inputs[0].element_size()
        n = self.raw_inputs[0].shape[0]
        return (self.part(part) for part in contractions.slices(n, size, self.raw_inputs[0]))

    def gram(self) -> Tensor:
        """`U^T U`, `[m n, m n]` in float64."""
        m, t = self.columns_per_example, self.positions
        if self.shared is None and t > 1 and compact(m, t, *self.shape):
            return formed_gram(self.per_example_gradients().flatten(0, 1).flatten(1))
        return self.columns.gram

    def chunks(self, memory: int | None = None, whole: bool = False) -> Iterator[LayerCapture]:
        """Captures over some examples and, where one example is too large, some output vectors.

        `memory` in bytes bounds the weight-sharing form of each (None: no bound, the capture
        itself). Sums over the chunks are the sums over the whole. `whole` examples keep all their
        output vectors, at any size.
        """
        if memory is not None:
            memory = doors.count(memory, "memory", error=CaptureError)
        doors.flag(whole, "whole", error=CaptureError)
        n = self.raw_inputs[0].shape[0]
        columns = self.columns_per_example
        o, i = self.shape
        t = self.positions
        size = self.raw_inputs[0].element_size()
        per_column, per_input = t * o * size, t * i * size
        if memory is None or n * (columns * per_column + per_input) <= memory:
            yield self
            return
        if per_column + per_input > memory:
            raise CaptureError(
                f"layer {self.name!r} needs {per_column + per_input:,} bytes for one output vector "
                f"of one example, over the budget of {memory:,}; raise `memory`"
            )
        rows = max(1, memory // (columns * per_column + per_input))
        split = rows == 1 and not whole
        per_chunk = max(1, (memory - per_input) // per_column) if split else columns
        for start in range(0, n, rows):
            for first in range(0, columns, per_chunk):
                yield self.part(slice(start, start + rows), slice(first, first + per_chunk))

    @property
    def columns_per_example(self) -> int:
        """m, the number of output vectors of one example."""
        raw = self.raw_output_gradients
        return 1 if raw is None else raw[0].shape[0]

    @property
    def positions(self) -> int:
        """t, summed over the calls of the module."""
        raw = self.raw_output_gradients or self.raw_label_gradients or self.raw_outputs
        if raw is None:
            return self.inputs.shape[1]
        leading = 2 if self.raw_output_gradients is not None else 1
        return sum(map_.positions(x, leading) for map_, x in self.calls(raw))

    def calls(self, raw: tuple[Tensor, ...]) -> Iterator[tuple[Geometry, Tensor]]:
        """The geometry and the raw tensor of each call."""
        if not isinstance(raw, tuple) or not all(isinstance(x, Tensor) for x in raw):
            raise CaptureError(f"raw must be a tuple of tensors, got {doors.said(raw)}")
        return zip(self.maps or [self.geometry] * len(raw), raw, strict=True)

    def part(self, examples: slice | Sequence[int], columns: slice = slice(None)) -> LayerCapture:
        """The capture of some examples, by their places, and some of their output vectors."""
        if not isinstance(columns, slice):
            raise CaptureError(f"columns must be a slice, got {doors.said(columns)}")
        if not isinstance(examples, slice):
            known = range(min(len(x) for x in self.raw_inputs))
            what = f"examples must be a slice or a list of places below {len(known)}"
            if not isinstance(examples, Sequence) or isinstance(examples, str | bytes):
                raise CaptureError(f"{what}, got {doors.said(examples)}")
            for place in examples:
                if place not in known:
                    raise CaptureError(f"{what}, got {doors.said(place)} among them")
        rows: Any = examples if isinstance(examples, slice) else list(examples)

        def cut(raw: Raw, *index: Any) -> Raw:
            return None if raw is None else tuple(x[index] for x in raw)

        total = self.columns_per_example
        held = len(range(*columns.indices(total)))
        return replace(
            self,
            raw_inputs=tuple(x[rows] for x in self.raw_inputs),
            raw_output_gradients=cut(self.raw_output_gradients, columns, rows),
            raw_label_gradients=cut(self.raw_label_gradients, rows),
            raw_outputs=cut(self.raw_outputs, rows),
            slopes=None if self.slopes is None else self.slopes[rows],
            counted=None if self.counted is None else self.counted[rows],
            column_share=self.column_share * held / total,
            shared=None,
            after=None if self.after is None else self.after.part(rows, columns),
        )

    def map(self, function: Callable[[Tensor], Tensor]) -> LayerCapture:
        """The capture with `function` (a move, a cast) applied to every raw tensor."""
        doors.function(function, "function(tensor)", error=CaptureError)

        def each(raw: Raw) -> Raw:
            return None if raw is None else tuple(function(x) for x in raw)

        return replace(
            self,
            raw_inputs=tuple(function(x) for x in self.raw_inputs),
            raw_output_gradients=each(self.raw_output_gradients),
            raw_label_gradients=each(self.raw_label_gradients),
            raw_outputs=each(self.raw_outputs),
            slopes=None if self.slopes is None else function(self.slopes),
            counted=None if self.counted is None else function(self.counted).bool(),
            shared=None,
        )

    def _present(self, attribute: str, public: str) -> tuple[Tensor, ...]:
        value = getattr(self, attribute)
        if value is None:
            raise CaptureError(self._absent(public, public))
        return value

    def _absent(self, public: str, need: str) -> str:
        return (
            f"{public} of layer {self.name!r} was not captured; name {need!r} in the "
            "approximation's `needs`, or call fl.capture, which captures everything"
        )


def _product(g: Tensor, a: Tensor) -> Tensor:
    """`sum_{n,t} g a^T`, `[o, i]`."""
    return g.flatten(0, 1).mT @ a.flatten(0, 1)
