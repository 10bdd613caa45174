"""`LayerCapture`: what the passes leave at one layer; its weight-sharing form, made on demand.

Every layer is an affine map with shared weights, `s[n,t] = W a[n,t]`: a `Linear` over `[n, ..., i]`
has its middle axes as positions, a convolution its output pixels, a module called several times its
calls. Positions, patches and biases end here; nothing below knows what a convolution is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fisherlab.blocks import contractions
from fisherlab.blocks.columns import Columns, compact, few, formed_gram
from fisherlab.blocks.numerics import sum_of
from fisherlab.extract.moments import example_sum, patch_moment, with_bias

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class CaptureError(ValueError):
    """A model, criterion or batch that cannot be captured, or a field that was not captured."""


Raw = tuple[Tensor, ...] | None


@dataclass(frozen=True)
class Convolution:
    """A convolution's hyper-parameters, one number per axis of the image."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    # last axis first, as F.pad takes it; right for numbers, "same" and "valid" alike
    padding: tuple[int, ...]
    mode: str

    @property
    def plain(self) -> bool:
        """3 x 3 or 5 x 5, stride 1, output as large as the input: what `patch_moment` knows."""
        size = self.kernel[0]
        ones = self.stride == self.dilation == (1, 1) and self.mode == "constant"
        return (
            ones
            and size in (3, 5)
            and (self.kernel, self.padding) == ((size,) * 2, (size // 2,) * 4)
        )

    @classmethod
    def of(cls, module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> Convolution:
        """Those of a module."""
        return cls(
            tuple(module.kernel_size),
            tuple(module.stride),
            tuple(module.dilation),
            tuple(module._reversed_padding_repeated_twice),
            "constant" if module.padding_mode == "zeros" else module.padding_mode,
        )


# Multiplications in whose time Python sees to one pair of offsets of `patch_moment`.
PAIR = 8e5


@dataclass(frozen=True)
class Geometry:
    """How one raw input `[n, ...]` becomes `[n, t, i]` and one raw output `[n, ...]` `[n, t, o]`.

    `conv` holds the convolution's hyper-parameters (None for a linear map); `group` is the group
    this capture covers, of `groups`; `bias` says whether a trailing 1 stands for the bias.
    """

    in_features: int
    out_features: int
    bias: bool
    conv: Convolution | None = None
    group: int = 0
    groups: int = 1

    @classmethod
    def of(cls, module: nn.Module, bias: bool, group: int = 0) -> Geometry:
        """The geometry of a `Linear` or `Conv1d/2d/3d`, one group of it."""
        if isinstance(module, nn.Linear):
            return cls(module.in_features, module.out_features, bias)
        if not isinstance(module, CONVOLUTIONS):
            raise CaptureError(f"no weight-sharing form for {type(module).__name__}")
        groups = module.groups
        return cls(
            module.in_channels // groups * math.prod(module.kernel_size),
            module.out_channels // groups,
            bias,
            Convolution.of(module),
            group,
            groups,
        )

    def inputs(self, raw: Tensor) -> Tensor:
        """The raw input of one call as `a` `[n, t, i]`, contiguous, the bias's 1 included."""
        n = raw.shape[0]
        if self.conv is None:
            rows = raw.reshape(n, -1, self.in_features)
            if not self.bias:
                return rows
            return torch.cat([rows, rows.new_ones(n, rows.shape[1], 1)], -1)
        patches = self._patches(raw, self.conv)
        dims = len(self.conv.kernel)
        positions = math.prod(tuple(patches.shape[1 : 1 + dims]))
        a = raw.new_empty(n, positions, self.in_features + self.bias)
        # one copy, straight from the strided view into the rows that carry the trailing 1
        body = a.as_strided(patches.shape, _row_strides(patches.shape, a.stride(), dims))
        body.copy_(patches)
        if self.bias:
            a[..., -1] = 1
        return a

    def project(self, raw: Tensor, v: Tensor) -> Tensor:
        """`a . v` `[n, t]` of every row of `inputs(raw)`, for `v` `[i]`; no patch is laid out."""
        direction = v[: self.in_features]
        if self.conv is None:
            product = raw.reshape(raw.shape[0], -1, self.in_features) @ direction
        else:
            padded = self._padded(raw, self.conv)
            kernel = direction.view(1, padded.shape[1], *self.conv.kernel)
            convolve = (F.conv1d, F.conv2d, F.conv3d)[len(self.conv.kernel) - 1]
            stride, dilation = self.conv.stride, self.conv.dilation
            product = convolve(padded, kernel, stride=stride, dilation=dilation).flatten(1)
        return product + v[-1] if self.bias else product

    def _padded(self, raw: Tensor, conv: Convolution) -> Tensor:
        """The padded input `[n, c, ...]` of this group."""
        channels = raw.shape[1] // self.groups
        raw = raw[:, self.group * channels : (self.group + 1) * channels]
        return F.pad(raw, conv.padding, mode=conv.mode) if any(conv.padding) else raw

    def _patches(self, raw: Tensor, conv: Convolution) -> Tensor:
        """A strided view `[n, *out, c, *kernel]` of the padded input of this group."""
        padded = self._padded(raw, conv)
        channels = padded.shape[1]
        kernel, stride, dilation = conv.kernel, conv.stride, conv.dilation
        out = [
            (length - d * (k - 1) - 1) // s + 1
            for length, k, s, d in zip(padded.shape[2:], kernel, stride, dilation, strict=True)
        ]
        step_n, step_c, *steps = padded.stride()
        strides = [step_n, *(s * z for s, z in zip(stride, steps, strict=True))]
        strides += [step_c, *(d * z for d, z in zip(dilation, steps, strict=True))]
        size = [padded.shape[0], *out, channels, *kernel]
        return padded.as_strided(size, strides, padded.storage_offset())

    def input_sum(self, raw: Tensor, summed: int = 1) -> tuple[Tensor, int]:
        """`sum_{n,t} a`, `[i]`, and the number of positions; windows of the examples' sum.

        Each row of `raw` is the sum of `summed` examples.
        """
        total = example_sum(raw)
        if self.conv is None:
            rows = total.reshape(1, -1, self.in_features)
        else:
            rows = self._patches(total, self.conv)
        places = 1 if self.conv is None else len(self.conv.kernel)
        positions = math.prod(rows.shape[1 : 1 + places])
        found = rows.sum(tuple(range(1 + places))).flatten()
        if self.bias:
            found = torch.cat([found, found.new_full((1,), summed * len(raw) * positions)])
        return found, positions

    def input_moment(self, raw: Tensor) -> Tensor:
        """`sum_{n,t} a a^T`, `[i, i]`; of plain convolutions without forming their patches."""
        if self.conv is None or not self.conv.plain or not self._correlated(raw):
            return contractions.second_moment(self.inputs(raw))
        channels = raw.shape[1] // self.groups
        group = raw[:, self.group * channels : (self.group + 1) * channels]
        moment = patch_moment(group, self.conv.kernel[0])
        if not self.bias:
            return moment
        total, positions = self.input_sum(raw)
        return with_bias(moment, total[:-1], len(raw) * positions)

    def _correlated(self, raw: Tensor) -> bool:
        """Whether `patch_moment` serves these images, and is faster than their patches.

        Patches: n t i (i + 80), the 80 for laying them out. Pairs of offsets: a fixed `PAIR` each.
        """
        assert self.conv is not None
        k = self.conv.kernel[0]
        patches = len(raw) * math.prod(raw.shape[2:]) * self.in_features * (self.in_features + 80)
        return min(raw.shape[2:]) >= k // 2 and patches >= PAIR * k**4

    def outputs(self, raw: Tensor, leading: int = 1) -> Tensor:
        """A raw output or output gradient `[*leading, ...]` as `[*leading, t, o]`."""
        lead = raw.shape[:leading]
        if self.conv is None:
            return raw.reshape(*lead, -1, self.out_features)
        start = self.group * self.out_features
        channels = raw.narrow(leading, start, self.out_features)
        return channels.flatten(leading + 1).transpose(leading, leading + 1)


@dataclass(frozen=True, eq=False)
class LayerCapture:
    """Raw inputs, raw output gradients and geometry of one layer; views of them on demand.

    One entry of each `raw_*` list per call of the module. `raw_output_gradients` are `[m, n, ...]`,
    of the per-example loss `l_n`, never divided by `M`, with each column's scale inside, so that
    `F = (1/M) sum_{m,n} vec(D) vec(D)^T`; `raw_label_gradients` are `[n, ...]`, at the observed
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
    # what both raw gradients count: those of an optimizer are of the loss, 1/M of the `l_n`
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
    # while a memo measures this layer: its columns, made once for every approximation
    shared: dict[str, Columns] | None = field(default=None, repr=False)

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
        calls = [self.geometry.inputs(raw) for raw in self.raw_inputs]
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
        weights = self.position_weights
        return a if weights is None else a * (weights**power).view(-1, *[1] * (a.ndim - 1))

    @property
    def input_moment(self) -> Tensor:
        """`sum_n (T / T_n) sum_t a a^T`, `[i, i]`; `T_n = T` where all positions count."""
        conv = self.geometry.conv
        if self.counted is not None:
            a = self.inputs if self.shared is None else self.columns.a
            return contractions.second_moment(self.weighed(a))
        if self.shared is not None and "columns" in self.shared and not (conv and conv.plain):
            return contractions.second_moment(self.columns.a)
        moments = [self.geometry.input_moment(raw) for raw in self.raw_inputs]
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
        sums = [self.geometry.input_sum(raw, self.summed) for raw in self.raw_inputs]
        total = sums[0][0] if len(sums) == 1 else torch.stack([s for s, _ in sums]).sum(0)
        return total / sum(positions for _, positions in sums)

    @property
    def output_gradients(self) -> Tensor:
        """`g` `[m, n, t, o]` of the per-example loss, the column scale inside."""
        raw = self._present("raw_output_gradients", "output_gradients")
        calls = [self.geometry.outputs(x, 2) for x in raw]
        return self._scaled(calls[0] if len(calls) == 1 else torch.cat(calls, 2))

    @property
    def label_gradients(self) -> Tensor:
        """`g` `[n, t, o]` of the per-example loss at the observed labels."""
        raw = self._present("raw_label_gradients", "label_gradients")
        calls = [self.geometry.outputs(x) for x in raw]
        return self._scaled(calls[0] if len(calls) == 1 else torch.cat(calls, 1))

    @property
    def label_gradient_sum(self) -> Tensor:
        """`sum_{n,t} g` at the observed labels, `[o]`."""
        raw = self._present("raw_label_gradients", "label_gradients")
        sums = [self.geometry.outputs(x).sum((0, 1)) for x in raw]
        return self._scaled(sums[0] if len(sums) == 1 else torch.stack(sums).sum(0))

    def _scaled(self, gradients: Tensor) -> Tensor:
        return gradients if self.gradient_scale == 1 else self.gradient_scale * gradients

    @property
    def outputs(self) -> Tensor:
        """`s` `[n, t, o]`, the layer's outputs."""
        raw = self._present("raw_outputs", "outputs")
        calls = [self.geometry.outputs(x) for x in raw]
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
            return Columns(self.inputs, self.output_gradients)
        if "columns" not in self.shared:
            # dozens of products are to come: the gradients may take half again a workspace
            room = 3 * contractions.WORKSPACE // 2
            self.shared["columns"] = Columns(self.inputs, self.output_gradients, room)
        return self.shared["columns"]

    def per_example_gradients(self) -> Tensor:
        """`D[m,n,o,i] = sum_t g a^T`, all of them: m n o i numbers."""
        parts = [contractions.per_example(x.inputs, x.output_gradients) for x in self._in_cache()]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _in_cache(self) -> Iterator[LayerCapture]:
        """A few examples at a time, whose inputs stay in the cache.

        Those of a convolution are laid out anew, and are many times larger than its image.
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

    def chunks(self, memory: int | None = None) -> Iterator[LayerCapture]:
        """Captures over some examples and, where one example is too large, some output vectors.

        `memory` in bytes bounds the weight-sharing form of each (None: no bound, the capture
        itself). Sums over the chunks are the sums over the whole.
        """
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
        per_chunk = columns if rows > 1 else max(1, (memory - per_input) // per_column)
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
        width = self.geometry.out_features * self.geometry.groups
        return sum(math.prod(x.shape[leading:]) // width for x in raw)

    def part(self, examples: slice, columns: slice = slice(None)) -> LayerCapture:
        """The capture of some examples and some of their output vectors."""

        def cut(raw: Raw, *index: slice) -> Raw:
            return None if raw is None else tuple(x[index] for x in raw)

        total = self.columns_per_example
        held = len(range(*columns.indices(total)))
        return replace(
            self,
            raw_inputs=tuple(x[examples] for x in self.raw_inputs),
            raw_output_gradients=cut(self.raw_output_gradients, columns, examples),
            raw_label_gradients=cut(self.raw_label_gradients, examples),
            raw_outputs=cut(self.raw_outputs, examples),
            slopes=None if self.slopes is None else self.slopes[examples],
            counted=None if self.counted is None else self.counted[examples],
            column_share=self.column_share * held / total,
            shared=None,
            after=None if self.after is None else self.after.part(examples, columns),
        )

    def map(self, function: Callable[[Tensor], Tensor]) -> LayerCapture:
        """The capture with `function` (a move, a cast) applied to every raw tensor."""

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


def _row_strides(size: torch.Size, rows: tuple[int, ...], dims: int) -> list[int]:
    """Strides that lay patches `[n, *out, c, *kernel]` into rows `[n, t, i]` of given strides."""
    out, inside = tuple(size[1 : 1 + dims]), tuple(size[1 + dims :])
    strides = [rows[0]]
    strides += [math.prod(out[d + 1 :]) * rows[1] for d in range(dims)]
    return strides + [math.prod(inside[d + 1 :]) for d in range(dims + 1)]
