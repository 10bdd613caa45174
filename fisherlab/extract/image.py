"""Per-example gradients of a convolution straight from its images, without their patches."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fisherlab.blocks.columns import Columns, compact
from fisherlab.blocks.contractions import slices, stacked
from fisherlab.blocks.numerics import trace_of
from fisherlab.blocks.work import cached, once
from fisherlab.extract.geometry import Convolution
from fisherlab.extract.layer import LayerCapture

# Rows of gradients per image channel from which one product with all patches, laid out a few
# examples at a time (2 ns an entry), beats narrow products with the shifted images.
ROWS_PER_CHANNEL = 8


def image_gradients(x: Tensor, g: Tensor, conv: Convolution, out: Tensor) -> None:
    """`D[m,n]` of images `x` `[n, c, h, w]` and output gradients `g` `[m, n, o, h', w']`.

    Into `out`, `[m, n, o, c k k]`. With few rows `m o` and stride 1, every kernel entry is one
    batched product of the gradients with the shifted images. In the layout of the images' rows a
    shift is an offset, and nothing is copied.
    """
    m, n, o = g.shape[:3]
    if any(conv.padding):
        x = F.pad(x, conv.padding, mode=conv.mode)
    if conv.stride != (1, 1) or m * o > ROWS_PER_CHANNEL * x.shape[1]:
        positions = math.prod(g.shape[3:])
        for part in slices(n, positions * (m * o + out.shape[3]) * x.element_size(), x):
            patches = F.unfold(x[part], conv.kernel, conv.dilation, 0, conv.stride)
            D = torch.bmm(stacked(g[:, part].flatten(3).mT), patches.mT)
            out[:, part] = D.view(-1, m, o, out.shape[3]).transpose(0, 1)
        return
    width = x.shape[3]
    size, images = (g.shape[3] - 1) * width + g.shape[4], x.flatten(2)
    rows = stacked(F.pad(g, (0, width - g.shape[4])).flatten(3).mT)[..., :size]
    starts = [
        i * conv.dilation[0] * width + j * conv.dilation[1]
        for i, j in product(*map(range, conv.kernel))
    ]
    entries = [torch.bmm(rows, images[..., k : k + size].mT) for k in starts]
    # the entries laid side by side in one sweep: one by one, each would write to all cache lines
    if m == 1 and out.is_contiguous():
        torch.stack(entries, -1, out=out.view(n, o, -1, len(starts)))
    else:
        out.copy_(torch.stack(entries, -1).view(n, m, o, -1).transpose(0, 1))


class ImageColumns(Columns):
    """The columns of a convolution whose gradients take less room than its patches.

    Everything is computed of the gradients; `a` and `g` are made if somebody asks for them.
    """

    def __init__(self, layer: LayerCapture) -> None:
        self.layer, self.room, self.careful = layer, 0, False

    @staticmethod
    def of(layer: LayerCapture) -> ImageColumns | None:
        """The columns of a capture; None where they would not be cheaper."""
        conv = layer.geometry.conv
        if conv is None or len(conv.kernel) != 2 or len(layer.raw_inputs) > 1:
            return None
        if layer.raw_output_gradients is None or layer.counted is not None:
            return None
        m, t = layer.columns_per_example, layer.positions
        return ImageColumns(layer) if t > 1 and compact(m, t, *layer.shape) else None

    @property
    def a(self) -> Tensor:  # type: ignore[override]
        """The patches, `[n, t, i]`."""
        return once(vars(self), "a", lambda: self.layer.inputs)

    @property
    def g(self) -> Tensor:  # type: ignore[override]
        """The output gradients, `[m, n, t, o]`."""
        return once(vars(self), "g", lambda: self.layer.output_gradients)

    @property
    def shape(self) -> tuple[int, int]:
        return self.layer.shape

    @property
    def sizes(self) -> tuple[int, int]:
        return self.layer.columns_per_example, self.layer.raw_inputs[0].shape[0]

    @property
    def positions(self) -> int:
        return self.layer.positions

    @property
    def dtype(self) -> torch.dtype:
        return self.layer.dtype

    @property
    def device(self) -> torch.device:
        return self.layer.device

    def tensors(self) -> Iterator[Tensor]:
        yield from (*self.layer.raw_inputs, *(self.layer.raw_output_gradients or ()))

    @property
    def short(self) -> bool:
        return True

    @cached
    def formed(self) -> Tensor:
        """The gradients, `[R, o i]`."""
        geometry = self.layer.geometry
        (x,), (g,) = self.layer.raw_inputs, cast(tuple[Tensor], self.layer.raw_output_gradients)
        (o, i), (m, n) = self.shape, g.shape[:2]
        channels = x.shape[1] // geometry.groups
        x = x[:, geometry.group * channels : (geometry.group + 1) * channels]
        g = g[:, :, geometry.group * o : (geometry.group + 1) * o]
        D = g.new_empty(m, n, o, i)
        weights = D[..., : geometry.in_features]
        image_gradients(x, g, cast(Convolution, geometry.conv), weights)
        if geometry.bias:
            D[..., -1] = g.sum((3, 4))
        if self.layer.gradient_scale != 1:
            D *= self.layer.gradient_scale
        return D.view(m * n, o * i)

    @property
    def trace(self) -> Tensor:
        return trace_of(self.left)


def sharing(layer: LayerCapture) -> LayerCapture:
    """The capture with its per-example gradients made once, of its images where that is cheaper."""
    columns = ImageColumns.of(layer) if isinstance(layer, LayerCapture) else None
    return layer if columns is None else replace(layer, shared={"columns": columns})
