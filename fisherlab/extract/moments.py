"""Sums over the patches of a convolution that never form the patches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight


def patch_moment(x: Tensor) -> Tensor:
    """`sum a a^T` over the 3 x 3 patches `a` of `x` `[n, c, h, w]`, `[9 c, 9 c]`.

    Two entries of a patch, at offsets k and k', are correlated at lag k' - k: 25 lags instead of 81
    pairs of offsets, all of them one weight gradient of a 5 x 5 convolution. A patch at the border
    sees zeros; for k = -1 the last row (column) of `x` is never the first factor, for k = 1 the
    first is not, so their own correlations are taken off again.
    """
    _, c, h, w = x.shape
    padded = F.pad(x, (2, 2, 2, 2))

    def lags(rows: slice, columns: slice) -> Tensor:
        """`sum x[q] x[q + lag]` over q in the rows and columns, `[c, c, 5, 5]`."""
        part = x[:, :, rows, columns]
        around = padded[:, :, rows.start : rows.stop + 4, columns.start : columns.stop + 4]
        return conv2d_weight(around.contiguous(), [c, c, 5, 5], part.contiguous())

    every_row, every_column = slice(0, h), slice(0, w)
    left_out = {-1: lambda size: slice(size - 1, size), 1: lambda size: slice(0, 1)}
    full = lags(every_row, every_column)
    rows = {k: lags(cut(h), every_column) for k, cut in left_out.items()}
    columns = {k: lags(every_row, cut(w)) for k, cut in left_out.items()}
    moment = x.new_empty(c, 3, 3, c, 3, 3)
    for i in (-1, 0, 1):
        for j in (-1, 0, 1):
            S = full
            if i:
                S = S - rows[i]
            if j:
                S = S - columns[j]
            if i and j:
                S = S + lags(left_out[i](h), left_out[j](w))
            moment[:, i + 1, j + 1] = S[:, :, 1 - i : 4 - i, 1 - j : 4 - j]
    flat = moment.view(9 * c, 9 * c)
    return (flat + flat.mT) / 2


def with_bias(moment: Tensor, total: Tensor, count: int) -> Tensor:
    """The moment of rows that carry a trailing 1, from theirs without it and their sum."""
    return torch.cat(
        [
            torch.cat([moment, total[:, None]], 1),
            torch.cat([total, total.new_full((1,), count)])[None],
        ]
    )
