"""Sums over the patches of a convolution that never form the patches."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor


def example_sum(x: Tensor) -> Tensor:
    """`sum_n x`, `[1, ...]`: a product with ones reads `x` twice as fast as a reduction does."""
    total = x.new_ones(1, len(x)) @ x.reshape(len(x), -1)
    return total.view(1, *x.shape[1:])


def patch_moment(x: Tensor, kernel: int = 3) -> Tensor:
    """`sum a a^T` over the k x k patches `a` of `x` `[n, c, h, w]`, `[k^2 c, k^2 c]`, k odd.

    Two entries of a patch, at offsets i and j, are correlated at lag `l = j - i`: half of
    (2 k - 1)^2 lags instead of k^4 pairs of offsets. A patch at the border sees zeros, so pairs of
    pixels with a patch outside the image are subtracted again. There both offsets point back into
    the image, and few pixels take part.
    """
    n, c, h, w = x.shape
    r = kernel // 2
    offsets = range(-r, r + 1)
    # one matrix [h n (w + 2 r), c]: every lag is a shift, and what leaves a row falls on zeros
    X = x.new_zeros(h, n, w + 2 * r, c)
    X[:, :, :w] = x.permute(2, 0, 3, 1)

    def along(first: Tensor, second: Tensor) -> Tensor:
        """`sum_p x[p] y[p + l]^T` for every lag l within a row, `[2 k - 1, c, c]`."""
        same = first.data_ptr() == second.data_ptr()
        first, second = first.reshape(-1, c), second.reshape(-1, c)
        size = len(first)
        later = [first[: size - l].mT @ second[l:] for l in range(2 * r + 1)]
        if same:
            earlier = [S.mT for S in later[:0:-1]]
        else:
            earlier = [first[l:].mT @ second[: size - l] for l in range(2 * r, 0, -1)]
        return torch.stack([*earlier, *later])

    def outside(i: int, j: int, size: int) -> list[tuple[int, int]]:
        """The two pixels of a row that a patch centred outside of it would hold at i and j."""
        centres = (*range(-r, 0), *range(size, size + r))
        pairs = [(q + i, q + j) for q in centres]
        return [(p, q) for p, q in pairs if 0 <= p < size and 0 <= q < size]

    everywhere = [along(X[: max(0, h - l)], X[l:]) for l in range(2 * r + 1)]
    moment = x.new_empty(c, kernel, kernel, c, kernel, kernel)
    for i1, j1 in product(offsets, offsets):
        if i1 > j1:
            continue
        inside = everywhere[j1 - i1]
        for p, q in outside(i1, j1, h):
            inside = inside - along(X[p], X[q])
        # the centres whose pixels at i1 and at j1 are both in the image
        start = max(0, -i1)
        stop = max(start, min(h, h - j1))
        for i2, j2 in product(offsets, offsets):
            S = inside[j2 - i2 + 2 * r]
            for p, q in outside(i2, j2, w):
                first = X[start + i1 : stop + i1, :, p].reshape(-1, c)
                S = S - first.mT @ X[start + j1 : stop + j1, :, q].reshape(-1, c)
            moment[:, i1 + r, i2 + r, :, j1 + r, j2 + r] = S
            moment[:, j1 + r, j2 + r, :, i1 + r, i2 + r] = S.mT
    return moment.view(kernel**2 * c, kernel**2 * c)


def with_bias(moment: Tensor, total: Tensor, count: int) -> Tensor:
    """The moment of rows that carry a trailing 1, from theirs without it and their sum."""
    return torch.cat(
        [
            torch.cat([moment, total[:, None]], 1),
            torch.cat([total, total.new_full((1,), count)])[None],
        ]
    )
