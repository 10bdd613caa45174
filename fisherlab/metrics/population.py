"""The error against the population's block, unbiased by the sampling noise of a mini-batch.

A mini-batch block is mostly its own noise: `||F||^2` holds the squared norms of single examples.
With per-example blocks `F_n = sum_m u_mn u_mn^T` of a reference the approximation has not seen,

    ||E F_n||^2       = mean_{n != k} <F_n, F_k>            a U-statistic of the off-diagonal Gram
    <E F_n, X>        = mean_n <F_n, X>
    population error  = sqrt(||X||^2 - 2 <E F_n, X> + ||E F_n||^2) / ||E F_n||
"""

from __future__ import annotations

import torch
from torch import Tensor

from fisherlab.blocks import Block, DirectSum, Outer


def population_error(X: Block, reference: Block) -> tuple[Tensor, Tensor]:
    """The relative error against the population and its standard error; 0-d float64 each.

    `reference` is the exact block (`Outer`, or a `DirectSum` of them) of examples that `X` was not
    built from. NaN for fewer than three examples, and where the estimate of the population's norm
    or of the squared error is not positive, which is to say below its own noise. The standard error
    is that of the first-order (Hajek) projection.
    """
    (rows, own), products = _pair_sums(reference), _example_products(X, reference)
    M = len(products)
    nan = torch.full((), torch.nan, dtype=torch.float64, device=rows.device)
    if M < 3:
        return nan, nan
    rows = (rows - own) / (M - 1)
    norm, product = rows.mean(), products.mean()
    if norm <= 0:
        return nan, nan
    rest = X.squared_norm() - 2 * product
    squared = 1 + rest / norm
    influence = -2 * (products - product) / norm - rest * 2 * (rows - norm) / norm.square()
    spread = influence.std() / M**0.5
    if squared <= 0:
        return nan, nan
    error = squared.sqrt()
    return error, spread / (2 * error)


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
