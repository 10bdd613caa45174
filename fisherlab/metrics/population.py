"""The error against the population's block, not against the sampling noise of a mini-batch.

A mini-batch block is mostly its own noise: `||F||^2` holds the squared norms of single examples.
With per-example blocks `F_n = sum_m u_mn u_mn^T` of a reference the approximation has not seen,

    u = mean_{n != k} <F_n, F_k>      unbiased for ||E F_n||^2, a U-statistic
    p = mean_n <F_n, X>               unbiased for <E F_n, X>
    d = ||X||^2 - 2 p + u             unbiased for ||X - E F_n||^2
    population error = sqrt(d / u)    corrected for its bias to second order

The pseudo-values of the jackknife, `u_n = M u - (M - 1) u_{-n}` and those of `d`, give standard
error and interval as if they were independent pairs (`metrics.ratio`).

Simulated coverage of the 95 % interval in percent, the mean over 5 to 11 approximations each, with
the least and the largest of the laws in brackets (150 references per case):

    unseen examples                  10           30          100          256
    Gaussian                   96 (96-97)   96 (96-97)   96 (96-97)   96 (96-97)
    Student, lognormal tails   95 (92-97)   95 (94-97)   96 (95-98)   96 (93-98)
    extreme tails, outliers    93 (83-98)   94 (93-96)   93 (90-97)   92 (85-97)
    networks, untrained        98 (96-100)  96 (94-97)   95 (94-96)   95 (94-96)
    networks, in training      98 (95-100)  98 (96-99)   96 (93-99)   96 (94-99)
    networks, converged        99 (98-100) 100 (98-100)  99 (98-100)  98 (96-99)

No interval knows of what no unseen example shows: of 10, a third holds none of one in ten. The
hardest approximation is a multiple of the population's block that is too small: 87 at 30 examples.

Cosine and trace ratio against the population, `p / (||X|| sqrt(u))` and `tr X / E tr F_n`, have
intervals of the same values. The order of two approximations X and Y does not need u,

    ||X - E F||^2 - ||Y - E F||^2 = E z_n,    z_n = ||X||^2 - ||Y||^2 - 2 <F_n, X - Y>,

so it is told by the mean of independent numbers, in which the noise of examples that both
approximations share cancels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fisherlab.blocks import Block, DirectSum, Outer
from fisherlab.blocks.direct_sum import parts_of
from fisherlab.metrics import ratio
from fisherlab.metrics.entry import entered

# Unseen examples below which there is no interval, and no number.
FEWEST, ENOUGH = 10, 30
# Orders: the first approximation is nearer, or the second, or the two are one block.
NEARER, FURTHER, OPEN, SAME = "nearer", "further", "not resolved", "same"
# Multiples of rounding, of the largest value, below which two blocks count as one.
ROUNDING = 1e3
# How a row says that its population error is no number.
UNKNOWN = "too few unseen examples for its population error"


@dataclass(frozen=True)
class Interval:
    """A number and the ends of its 95 % interval; NaN where it is not known."""

    value: float = math.nan
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True)
class PopulationOrder(Interval):
    """`value = (||X - E F||^2 - ||Y - E F||^2) / ||E F||^2`, its interval and the verdict on X.

    `verdict` is "nearer" (X is), "further", "not resolved" or "same" (X and Y are one block).
    """

    verdict: str = OPEN


@dataclass(frozen=True)
class PopulationEstimate:
    """`||X - E F|| / ||E F||` as unseen examples tell it; 0-d float64, NaN where they do not.

    `squared` is the unbiased estimate of `||X - E F||^2`, which may be negative. The 95 % interval
    runs from `low` to `high`. `error` is NaN below 30 examples and where the interval reaches 0 or
    infinity; `low` and `high` are NaN below 10.
    """

    squared: Tensor
    error: Tensor
    error_se: Tensor
    low: Tensor
    high: Tensor
    examples: int
    # `||X||^2 - 2 <F_n, X>` and the pseudo-values of u, `[n]`: what an order is told by
    values: Tensor = field(default_factory=lambda: torch.zeros(0, device="cpu"), repr=False)
    norms: Tensor = field(default_factory=lambda: torch.zeros(0, device="cpu"), repr=False)
    cosine: Interval = Interval()
    trace_ratio: Interval = Interval()

    @property
    def reason(self) -> str:
        """Why `error` is NaN; empty where it is not."""
        if not self.error.isnan():
            return ""
        if self.examples < FEWEST:
            return f"{UNKNOWN}: {self.examples}, where an interval needs {FEWEST}"
        if self.low.isnan():
            return f"{UNKNOWN}: {self.examples} contradict each other or are zero"
        ends = f"{self.examples} leave it between {self.low:.2g} and {self.high:.2g}"
        if self.examples < ENOUGH:
            return f"{UNKNOWN}: {ends}, and a number needs {ENOUGH}"
        return f"{UNKNOWN}: {ends}"


@entered
def population_estimate(X: Block, reference: Block) -> PopulationEstimate:
    """`||X - E F|| / ||E F||` from unseen examples: number, standard error and 95 % interval.

    Args:
        X: a block that was not built from the reference's examples.
        reference: the exact block (`Outer`, or a `DirectSum` of them) of the unseen examples.

    Returns:
        The estimate, its standard error and interval, 0-d float64 each.

    Raises:
        TypeError: the reference is no exact block, or one of the two is in groups.
    """
    (rows, own), products = _pair_sums(reference), _example_products(X, reference)
    M = len(products)
    nan = torch.full((), torch.nan, dtype=torch.float64, device=rows.device)
    if M < 3:
        return PopulationEstimate(nan, nan, nan, nan, nan, M)
    rows = rows - own
    norm = rows.sum() / (M * (M - 1))
    rest = X.squared_norm().double() - 2 * products
    squared = norm + rest.mean()
    # the jackknife of u: left out, example n takes 2 rows[n] off the sum over pairs
    bottom = M * norm - (M * (M - 1) * norm - 2 * rows) / (M - 2)
    if M < FEWEST or not own.any():
        return PopulationEstimate(squared, nan, nan, nan, nan, M, rest, bottom)
    top = bottom + rest
    low, high = ratio.interval(top, bottom)
    error = spread = math.nan
    if M >= ENOUGH and low > 0 and high < math.inf:
        error, spread = ratio.root(top, bottom)
    numbers = nan.new_tensor([error, spread, low, high])
    more = rest, bottom, _cosine(X, products, bottom), _trace_ratio(X, reference)
    return PopulationEstimate(squared, numbers[0], numbers[1], numbers[2], numbers[3], M, *more)


@entered
def population_order(X: Block, Y: Block, reference: Block) -> PopulationOrder:
    """Which of two approximations is nearer to the population's block, by unseen examples.

    Args:
        X: a block that was not built from the reference's examples.
        Y: another one, of the same shape.
        reference: the exact block (`Outer`, or a `DirectSum` of them) of the unseen examples.

    Raises:
        TypeError: the reference is no exact block, or one of the blocks is in groups.
    """
    x, y = population_estimate(X, reference), population_estimate(Y, reference)
    return order(x.values, y.values, x.norms, torch.finfo(X.dtype).eps)


def order(x: Tensor, y: Tensor, norms: Tensor, eps: float) -> PopulationOrder:
    """The order of two approximations from the `values` and `norms` of their estimates, `[n]`.

    `eps` is the rounding of the blocks that they are of.
    """
    if len(norms) < FEWEST or not norms.any():
        return PopulationOrder()
    z = x.double() - y.double()
    if float(z.abs().max()) <= ROUNDING * eps * float(torch.stack([x, y]).abs().max()):
        return PopulationOrder(0.0, 0.0, 0.0, SAME)
    low, high = ratio.mean(z)
    verdict = NEARER if high < 0 else FURTHER if low > 0 else OPEN
    value, low, high = ratio.signed(z, norms)
    # where the norm may be zero the ends are open, but the sign is known
    low, high = (max(low, 0.0), high) if verdict == FURTHER else (low, high)
    low, high = (low, min(high, 0.0)) if verdict == NEARER else (low, high)
    return PopulationOrder(value, low, high, verdict)


def _cosine(X: Block, products: Tensor, norms: Tensor) -> Interval:
    """`E <F_n, X> / (||X|| ||E F||)` by the delta method on the pseudo-values."""
    p, u, length = products.mean().item(), norms.mean().item(), X.squared_norm().double().item()
    if not (u > 0 and length > 0):
        return Interval()
    size = math.sqrt(length) * math.sqrt(u)  # the product of both may pass the range
    value = p / size
    moved = (products - p) / size - value / 2 * (norms - u) / u
    low, high = ratio.mean(value + moved)
    return Interval(value, low, high)


def _trace_ratio(X: Block, reference: Block) -> Interval:
    """`tr X / E tr F_n`."""
    traces = torch.stack([part.energies().sum(0) for part in _columns(reference)]).sum(0)
    total, mean = X.trace().item(), traces.mean().item()
    if not (mean > 0 and total > 0):
        return Interval()
    low, high = ratio.mean(traces)
    return Interval(total / mean, total / high, total / low if low > 0 else math.inf)


@entered
def population_error(X: Block, reference: Block) -> tuple[Tensor, Tensor]:
    """`||X - E F|| / ||E F||` from held-out examples, and its standard error.

    `population_estimate` has the interval, the unbiased squared error and the reason as well.

    Args:
        X: a block that was not built from the reference's examples.
        reference: the exact block of the held-out examples.

    Returns:
        Two 0-d float64 tensors, NaN where the held-out examples are too few.

    Raises:
        TypeError: the reference is no exact block, or one of the two is in groups.
    """
    found = population_estimate(X, reference)
    return found.error, found.error_se


@entered
def population_norm(reference: Block) -> Tensor:
    """`||E F_n||`, from the off-diagonal of the Gram matrix.

    Args:
        reference: the exact block of the held-out examples.

    Returns:
        0-d float64, NaN where the estimate of the squared norm is negative.
    """
    rows, own = _pair_sums(reference)
    M = len(rows)
    return ((rows.sum() - own.sum()) / (M * (M - 1))).sqrt()


def _columns(reference: Block) -> list[Outer]:
    parts = []
    for part in parts_of(reference):
        if not isinstance(part, Outer):
            raise TypeError(f"the reference must be an exact block (Outer), got {part!r}")
        parts.append(part)
    return parts


def _pair_sums(reference: Block) -> tuple[Tensor, Tensor]:
    """`sum_k <F_n, F_k>` and `<F_n, F_n>` of per-example blocks, `[n]` float64 each.

    In tiles of examples, once for all approximations: no `[R, R]` of a whole data set.
    """
    rows, own = zip(*(part.columns.pair_sums for part in _columns(reference)), strict=True)
    return torch.stack(rows).sum(0), torch.stack(own).sum(0)


def _example_products(X: Block, reference: Block) -> Tensor:
    """`<F_n, X>`, `[n]` float64."""
    grouped = [isinstance(block, DirectSum) for block in (X, reference)]
    if any(grouped) and not (isinstance(X, DirectSum) and X.parted_as(reference)):
        raise TypeError("a layer in groups needs an approximation in the same groups")
    products = [
        x.column_quadratics(f.a, f.g).sum(0)
        for x, f in zip(parts_of(X), _columns(reference), strict=True)
    ]
    return torch.stack(products).sum(0)
