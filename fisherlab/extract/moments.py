"""Sums over the patches of a convolution that never form the patches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight


def patch_moment(x: Tensor, kernel: int = 3) -> Tensor:
    """`sum a a^T` over the k x k patches `a` of `x` `[n, c, h, w]`, `[k^2 c, k^2 c]`, k odd.

    Two entries of a patch, at offsets i and i', are correlated at lag i' - i: (2 k - 1)^2 lags
    instead of k^4 pairs of offsets, all of them one weight gradient of a convolution that wide. A
    patch at the border sees zeros; for i = -2 the last two rows (columns) of `x` are never the
    first factor, for i = 1 the first is not, so their own correlations are taken off again.
    """
    _, c, h, w = x.shape
    r, wide = kernel // 2, 2 * kernel - 1
    padded = F.pad(x, (2 * r,) * 4)

    def lags(rows: slice, columns: slice) -> Tensor:
        """`sum x[q] x[q + lag]` over q in the rows and columns, `[c, c, 2 k - 1, 2 k - 1]`."""
        part = x[:, :, rows, columns]
        around = padded[:, :, rows.start : rows.stop + 4 * r, columns.start : columns.stop + 4 * r]
        return conv2d_weight(around.contiguous(), [c, c, wide, wide], part.contiguous())

    def left_out(offset: int, size: int) -> slice:
        return slice(size + offset, size) if offset < 0 else slice(0, offset)

    every_row, every_column = slice(0, h), slice(0, w)
    offsets = range(-r, r + 1)
    full = lags(every_row, every_column)
    rows = {i: lags(left_out(i, h), every_column) for i in offsets if i}
    columns = {j: lags(every_row, left_out(j, w)) for j in offsets if j}
    moment = x.new_empty(c, kernel, kernel, c, kernel, kernel)
    for i in offsets:
        for j in offsets:
            S = full
            if i:
                S = S - rows[i]
            if j:
                S = S - columns[j]
            if i and j:
                S = S + lags(left_out(i, h), left_out(j, w))
            moment[:, i + r, j + r] = S[:, :, r - i : 3 * r + 1 - i, r - j : 3 * r + 1 - j]
    flat = moment.view(kernel**2 * c, kernel**2 * c)
    return (flat + flat.mT) / 2


def with_bias(moment: Tensor, total: Tensor, count: int) -> Tensor:
    """The moment of rows that carry a trailing 1, from theirs without it and their sum."""
    return torch.cat(
        [
            torch.cat([moment, total[:, None]], 1),
            torch.cat([total, total.new_full((1,), count)])[None],
        ]
    )
