"""`Geometry`: how the input and the output gradient of one call become rows of an affine map.

Every product with a weight is an affine map with shared weights, `s[n,t] = W a[n,t]`. The positions
of a `Linear` over `[n, ..., i]` are its middle axes. A convolution has its output pixels, a
transposed convolution its input pixels, an embedding its tokens. Patches and biases end here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fisherlab import doors
from fisherlab.blocks import contractions
from fisherlab.extract.moments import example_sum, patch_moment, with_bias

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# Python's overhead for one pair of offsets in `patch_moment`, in multiplications.
PAIR = 8e5


class CaptureError(ValueError):
    """A model, criterion or batch that cannot be captured, or a field that was not captured."""


class NoBlock(CaptureError):
    """No layer that was asked for has a block; `reasons` are those of each."""

    def __init__(self, reasons: Mapping[str, str]) -> None:
        self.reasons = dict(reasons)
        told = "; ".join(f"{name!r}: {why}" for name, why in reasons.items())
        why = told or "it has no trainable weight that a product uses"
        super().__init__(f"no layer of this model has a block: {why}")


@dataclass(frozen=True)
class Convolution:
    """A convolution's hyper-parameters, one number per axis of the image."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    # last axis first, as F.pad takes it; right for numbers, "same" and "valid" alike
    padding: tuple[int, ...]
    mode: str = "constant"

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
    def of(cls, module: nn.modules.conv._ConvNd) -> Convolution:
        """The hyper-parameters of a module."""
        return cls(
            tuple(module.kernel_size),
            tuple(module.stride),
            tuple(module.dilation),
            tuple(module._reversed_padding_repeated_twice),
            "constant" if module.padding_mode == "zeros" else module.padding_mode,
        )

    def padded(self, x: Tensor) -> Tensor:
        """The image `[n, c, ...]` with its border."""
        return F.pad(x, self.padding, mode=self.mode) if any(self.padding) else x

    def windows(self, x: Tensor) -> Tensor:
        """A strided view `[n, *out, c, *kernel]` of the padded image."""
        x = self.padded(x)
        kernel, stride, dilation = self.kernel, self.stride, self.dilation
        out = [
            (length - d * (k - 1) - 1) // s + 1
            for length, k, s, d in zip(x.shape[2:], kernel, stride, dilation, strict=True)
        ]
        step_n, step_c, *steps = x.stride()
        strides = [step_n, *(s * z for s, z in zip(stride, steps, strict=True))]
        strides += [step_c, *(d * z for d, z in zip(dilation, steps, strict=True))]
        size = [x.shape[0], *out, x.shape[1], *kernel]
        return x.as_strided(size, strides, x.storage_offset())


@dataclass(frozen=True)
class Geometry:
    """How one raw input `[n, ...]` becomes `[n, t, i]` and one raw output `[n, ...]` `[n, t, o]`.

    At most one of `conv`, `transposed` and `lookup` is set; none of them is a linear map.

    Args:
        in_features: width of `a`, without the trailing ones.
        out_features: width of `g`.
        bias: whether the last column of `a` stands for the bias.
        conv: the hyper-parameters of a convolution, whose inputs are patches.
        group: the group of a convolution that this capture covers, of `groups`.
        transposed: the hyper-parameters of a transposed convolution, whose gradients are patches.
        lookup: for an embedding, the index without gradient (`padding_idx`), or -1.
        adds: whether this call adds the bias: 1 in that column, else 0.
        start: the first row of the weight that this call multiplies.
        width: the number of those rows; None for all.
        flipped: whether the weight is stored as `[i, o]`.
    """

    in_features: int
    out_features: int
    bias: bool
    conv: Convolution | None = None
    group: int = 0
    groups: int = 1
    transposed: Convolution | None = None
    lookup: int | None = None
    adds: bool = True
    start: int = 0
    width: int | None = None
    flipped: bool = False

    def __post_init__(self) -> None:
        """Refuse what is no width and no flag."""
        for name in ("in_features", "out_features", "group", "groups", "start"):
            if not doors.is_whole(getattr(self, name)):
                got = doors.said(getattr(self, name))
                raise CaptureError(f"{name} must be a whole number, got {got}")
        for name in ("bias", "adds", "flipped"):
            doors.flag(getattr(self, name), name, error=CaptureError)
        for name in ("conv", "transposed"):
            kinds = (Convolution, type(None))
            doors.instance(getattr(self, name), name, kinds, "a Convolution or None")

    @property
    def numel(self) -> int:
        """The entries of the weight, all groups."""
        return self.groups * self.in_features * self.out_features

    @classmethod
    def of(cls, module: nn.Module, bias: bool, group: int = 0) -> Geometry:
        """The geometry of a `Linear`, a convolution or a transposed one, one group of it."""
        if isinstance(module, nn.Linear):
            return cls(module.in_features, module.out_features, bias)
        if not isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)):
            raise CaptureError(f"no weight-sharing form for {type(module).__name__}")
        groups, conv = module.groups, Convolution.of(module)
        size = math.prod(module.kernel_size)
        i, o = module.in_channels // groups, module.out_channels // groups
        if isinstance(module, TRANSPOSED):
            # its bias is added once per pixel of the output, which no position of the input is
            return cls(i, o * size, False, None, group, groups, transposed=conv, flipped=True)
        return cls(i * size, o, bias, conv, group, groups)

    def inputs(self, raw: Tensor) -> Tensor:
        """The raw input of one call as `a` `[n, t, i]`, contiguous, the bias's 1 included."""
        n = raw.shape[0]
        if self.conv is None:
            rows = self._rows(raw)
            if not self.bias:
                return rows
            return torch.cat([rows, rows.new_full((n, rows.shape[1], 1), self.adds)], -1)
        patches = self.conv.windows(self._channels(raw))
        dims = len(self.conv.kernel)
        positions = math.prod(tuple(patches.shape[1 : 1 + dims]))
        a = raw.new_empty(n, positions, self.in_features + self.bias)
        # one copy, straight from the strided view into the rows that carry the trailing 1
        body = a.as_strided(patches.shape, _row_strides(patches.shape, a.stride(), dims))
        body.copy_(patches)
        if self.bias:
            a[..., -1] = self.adds
        return a

    def _rows(self, raw: Tensor) -> Tensor:
        """`a` `[n, t, i]` of anything but a convolution, without the bias's 1."""
        n = raw.shape[0]
        if self.transposed is not None:
            return self._channels(raw).flatten(2).mT
        if self.lookup is None:
            return raw.reshape(n, -1, self.in_features)
        index = raw.reshape(n, -1)
        one_hot = raw.new_zeros(*index.shape, self.in_features)
        one_hot.scatter_(2, index.long()[..., None], 1)
        if self.lookup >= 0:
            one_hot[..., self.lookup] = 0
        return one_hot

    def project(self, raw: Tensor, v: Tensor) -> Tensor:
        """`a . v` `[n, t]` of every row of `inputs(raw)`, for `v` `[i]`; no patch is laid out."""
        direction = v[: self.in_features]
        if self.conv is not None:
            padded = self.conv.padded(self._channels(raw))
            kernel = direction.view(1, padded.shape[1], *self.conv.kernel)
            convolve = (F.conv1d, F.conv2d, F.conv3d)[len(self.conv.kernel) - 1]
            stride, dilation = self.conv.stride, self.conv.dilation
            product = convolve(padded, kernel, stride=stride, dilation=dilation).flatten(1)
        elif self.lookup is not None:
            index = raw.reshape(raw.shape[0], -1).long()
            product = direction[index] * (index != self.lookup)
        else:
            product = self._rows(raw) @ direction
        return product + v[-1] if self.bias and self.adds else product

    def _channels(self, raw: Tensor) -> Tensor:
        """The channels `[n, c, ...]` of this group."""
        if self.groups == 1:
            return raw
        channels = raw.shape[1] // self.groups
        return raw[:, self.group * channels : (self.group + 1) * channels]

    def input_sum(self, raw: Tensor, summed: int = 1) -> tuple[Tensor, int]:
        """`sum_{n,t} a`, `[i]`, and the number of positions; windows of the examples' sum.

        Each row of `raw` is the sum of `summed` examples.
        """
        if self.lookup is not None:
            rows = self._rows(raw)
            places = 1
        else:
            total = example_sum(raw)
            places = 1 if self.conv is None else len(self.conv.kernel)
            conv = self.conv
            rows = self._rows(total) if conv is None else conv.windows(self._channels(total))
        positions = math.prod(rows.shape[1 : 1 + places])
        found = rows.sum(tuple(range(1 + places))).flatten()
        if self.bias:
            ones = summed * len(raw) * positions * self.adds
            found = torch.cat([found, found.new_full((1,), ones)])
        return found, positions

    def input_moment(self, raw: Tensor) -> Tensor:
        """`sum_{n,t} a a^T`, `[i, i]`; for plain convolutions without unfolding their inputs."""
        whole = self.adds or not self.bias
        if self.conv is None or not whole or not self.conv.plain or not self._correlated(raw):
            return contractions.second_moment(self.inputs(raw))
        moment = patch_moment(self._channels(raw), self.conv.kernel[0])
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
        if self.transposed is not None:
            channels = self.out_features // math.prod(self.transposed.kernel)
            image = raw.narrow(leading, self.group * channels, channels).flatten(0, leading - 1)
            windows = self.transposed.windows(image)
            dims = len(self.transposed.kernel)
            return windows.reshape(*lead, math.prod(windows.shape[1 : 1 + dims]), -1)
        if self.conv is not None:
            ours = raw.narrow(leading, self.group * self.out_features, self.out_features)
            return ours.flatten(leading + 1).transpose(leading, leading + 1)
        if self.width is None:
            return raw.reshape(*lead, -1, self.out_features)
        rows = raw.reshape(*lead, -1, self.width)
        return F.pad(rows, (self.start, self.out_features - self.start - self.width))

    def positions(self, raw: Tensor, leading: int) -> int:
        """t of a raw output or output gradient `[*leading, ...]`."""
        if self.transposed is not None:
            return self.outputs(raw[(slice(0, 1),) * leading], leading).shape[-2]
        width = self.width or self.out_features * self.groups
        return math.prod(raw.shape[leading:]) // width

    def matrix(self, weight: Tensor) -> Tensor:
        """A tensor of the weight's shape as `[o, i]`, the part of this group."""
        o, i = self.out_features, self.in_features
        if self.flipped:
            return weight.reshape(self.groups, i, o)[self.group].mT
        return weight.reshape(self.groups, o, i)[self.group]


def _row_strides(size: torch.Size, rows: tuple[int, ...], dims: int) -> list[int]:
    """Strides that lay patches `[n, *out, c, *kernel]` into rows `[n, t, i]` of given strides."""
    out, inside = tuple(size[1 : 1 + dims]), tuple(size[1 + dims :])
    strides = [rows[0]]
    strides += [math.prod(out[d + 1 :]) * rows[1] for d in range(dims)]
    return strides + [math.prod(inside[d + 1 :]) for d in range(dims + 1)]
