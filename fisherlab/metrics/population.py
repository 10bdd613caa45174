"""The error against the population's block, not against the sampling noise of a mini-batch.

A mini-batch block is mostly its own noise: `||F||^2` holds the squared norms of single examples.
With per-example blocks `F_n = sum_m u_mn u_mn^T` of a reference the approximation has not seen,

    u = mean_{n != k} <F_n, F_k>      unbiased for ||E F_n||^2
    p = mean_n <F_n, X>               unbiased for <E F_n, X>
    d = u - 2 p + ||X||^2             unbiased for ||X - E F_n||^2
    d / u                             the squared relative error: a ratio, corrected to second order

The interval is Fieller's: every `theta` for which `(1 - theta) u - 2 p + ||X||^2`, which has mean
zero at the truth, is within 1.96 jackknife standard errors of zero. It is open at the upper end
where `u` itself may be zero. Over layers and methods it covers 0.93 to 0.97 of the time from 10
examples on; a single layer and method as little as 0.87 with 10, 0.9 from 30. Nothing is stated
where few examples hold most of the norm: `enough` says whether.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fisherlab.blocks import Block, DirectSum, Outer

# Examples below which no interval is stated.
FEWEST = 10
# Standard errors on either side of 95 %.
_WIDTH = 1.959964
# Relative standard errors, of the norm and of the error, above which no number is stated.
_PRECISE = 1 / 3


@dataclass(frozen=True)
class PopulationEstimate:
    """What a reference says of the population error; 0-d float64, NaN where it says nothing."""

    squared: Tensor  # d, of ||X - E F||^2: unbiased, may be negative
    error: Tensor  # relative, corrected to second order
    error_se: Tensor
    low: Tensor  # 95 % interval of the relative error
    high: Tensor
    enough: bool  # whether the examples are many enough, and alike enough, for an interval


def population_estimate(X: Block, reference: Block) -> PopulationEstimate:
    """`||X - E F|| / ||E F||` from unseen examples: estimate, standard error and 95 % interval.

    `error` is NaN unless the norm and the error are known to a third of themselves; `low` and
    `high` are NaN for fewer than 10 examples and where single examples dominate, `mean(||F_n||)^2`
    below `(1/2 + 2/M) mean(||F_n||^2)`.

    Args:
        X: a block that was not made of the reference's examples.
        reference: the exact block (`Outer`, or a `DirectSum` of them) of unseen examples.
    """
    (rows, own), products = _pair_sums(reference), _example_products(X, reference)
    M = len(products)
    nan = torch.full((), torch.nan, dtype=torch.float64, device=rows.device)
    if M < 3:
        return PopulationEstimate(nan, nan, nan, nan, nan, False)
    rows = rows - own
    u, p = rows.sum() / (M * (M - 1)), products.mean()
    b = X.squared_norm() - 2 * p
    squared = u + b
    alike = own.sqrt().mean().square() >= (0.5 + 2 / M) * own.mean()
    if M < FEWEST or not alike or not own.any():
        return PopulationEstimate(squared, nan, nan, nan, nan, False)
    # delete-one jackknife; leaving out n changes u and p by these, from their means
    du = -2 * (rows - rows.mean()) / ((M - 1) * (M - 2))
    dp = -(products - p) / (M - 1)
    uu, pp, up = ((M - 1) / M * (one * two).sum() for one, two in ((du, du), (dp, dp), (du, dp)))
    low, high = _fieller(u, b, uu, pp, up)
    error = error_se = nan
    if u > 0 and uu.sqrt() <= _PRECISE * u:
        ratio = 1 + b / u - b * uu / u**3 - 2 * up / u**2
        variance = 4 * pp / u**2 + b.square() * uu / u**4 + 4 * b * up / u**3
        if ratio > 0 and variance.clamp(min=0).sqrt() <= 2 * _PRECISE * ratio:
            error = ratio.sqrt()
            error_se = variance.clamp(min=0).sqrt() / (2 * error)
    return PopulationEstimate(squared, error, error_se, low, high, True)


def _fieller(u: Tensor, b: Tensor, uu: Tensor, pp: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Roots of the smallest and the largest `theta` with `(s u + b)^2 <= z^2 var`, `s = 1 - theta`.

    `var(s u + b) = s^2 uu + 4 pp - 4 s up`, since `b = ||X||^2 - 2 p`.
    """
    z = _WIDTH**2
    A, B, C = u.square() - z * uu, u * b + 2 * z * up, b.square() - 4 * z * pp
    root = (B.square() - A * C).clamp(min=0).sqrt()
    ends = [float(1 - (-B + sign * root) / A) for sign in (1, -1)] if A != 0 else [-math.inf] * 2
    if A > 0 and u > 0:
        # below zero there is no squared error: the examples contradict it, and say nothing
        low, high = ends if ends[1] > 0 else [math.nan] * 2
    else:
        # all theta but those between the roots, or all of them: theta is at least 0
        low, high = max(ends) if A < 0 and B.square() > A * C and min(ends) < 0 else 0.0, math.inf
    found = u.new_tensor([low, high]).clamp(min=0).sqrt()
    return found[0], found[1]


def population_error(X: Block, reference: Block) -> tuple[Tensor, Tensor]:
    """The relative error against the population and its standard error; 0-d float64 each.

    NaN where the reference is too small to know them: see `population_estimate`, which has the
    interval and the unbiased squared error as well.
    """
    found = population_estimate(X, reference)
    return found.error, found.error_se


def population_norm(reference: Block) -> Tensor:
    """`||E F_n||`, from the off-diagonal Gram; 0-d float64, NaN where the estimate is negative."""
    rows, own = _pair_sums(reference)
    M = len(rows)
    return ((rows.sum() - own.sum()) / (M * (M - 1))).sqrt()


def _parts(block: Block) -> tuple[Block, ...]:
    return block.parts if isinstance(block, DirectSum) else (block,)


def _columns(reference: Block) -> list[Outer]:
    parts = []
    for part in _parts(reference):
        if not isinstance(part, Outer):
            raise TypeError(f"the reference must be an exact block (Outer), got {part!r}")
        parts.append(part)
    return parts


def _pair_sums(reference: Block) -> tuple[Tensor, Tensor]:
    """`sum_k <F_n, F_k>` and `<F_n, F_n>` of per-example blocks, `[n]` float64 each.

    In tiles of examples, once for all approximations: no `[R, R]` of a whole data set.
    """
    rows, own = zip(*(part.of.pair_sums for part in _columns(reference)), strict=True)
    return torch.stack(rows).sum(0), torch.stack(own).sum(0)


def _example_products(X: Block, reference: Block) -> Tensor:
    """`<F_n, X>`, `[n]` float64."""
    if isinstance(X, DirectSum) != isinstance(reference, DirectSum):
        raise TypeError("a layer in groups needs an approximation in groups")
    products = [
        x.column_quadratics(f.a, f.g).sum(0)
        for x, f in zip(_parts(X), _columns(reference), strict=True)
    ]
    return torch.stack(products).sum(0)
