"""The root of a ratio of two means, of few and skewed values: estimate and 95 % interval.

With pairs `(t_n, w_n)`, `n = 1..M`, and `theta = E t / E w`, the values `h_n = t_n - theta w_n`
have mean zero. The skewness `s` of `h` moves the quantiles of `T = sqrt(M) mean(h) / std(h)`, and

    T' = (exp(c T) - 1) / c + s / (6 sqrt(M)),    c = 2 s / (3 sqrt(M))

is nearer to normal (Zhou and Dinh 2005). The interval holds every `theta >= 0` with `|T| <= 1.96`
or `|T'| <= 1.96`: with `T` alone it is Fieller's, too short on the side of a heavy tail. A sample's
skewness is too small where tails are heavy, so it enters times `1 + 4 / sqrt(M)`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import Tensor

# Standard errors on either side of 95 %.
WIDTH = 1.959964
# Shares of the largest value: a deviation that is rounding, and one that is no unit of an angle.
ROUNDED, LEAST_UNIT = 1e-13, 1e-6
# Points of a search, and how often the step around an end is searched again.
_POINTS, _TIMES = 257, 6


def root(top: Tensor, bottom: Tensor) -> tuple[float, float]:
    """`sqrt(E t / E w)` and its standard error; NaN where the ratio of means is not positive.

    With `r = mean t / mean w`, its bias `B` and its variance `v` to first order,

        sqrt(r) - B / (2 sqrt(r)) + v / (8 r^(3/2))

    is unbiased to second order.
    """
    t, w = top.mean().item(), bottom.mean().item()
    M = len(top)
    ratio = t / w if w > 0 else math.nan
    if not ratio > 0:
        return math.nan, math.nan
    rest = (top - t) - ratio * (bottom - w)
    bias = -float((rest * (bottom - w)).sum()) / (M * (M - 1)) / w**2
    variance = float(rest.square().sum()) / (M * (M - 1)) / w**2
    plain = math.sqrt(ratio)
    value = plain - bias / (2 * plain) + variance / (8 * plain**3)
    return value, math.sqrt(variance) / (2 * plain)


def interval(top: Tensor, bottom: Tensor) -> tuple[float, float]:
    """The ends of the interval of `sqrt(E t / E w)`; the upper one may be infinite.

    NaN where no `theta >= 0` is in it. The search is over the angle `theta = tan`, in units of the
    two standard deviations, from 0 to infinity.
    """
    low, high = _ends(top, bottom, 0.0)
    return math.sqrt(low), math.sqrt(high)


def signed(top: Tensor, bottom: Tensor) -> tuple[float, float, float]:
    """`E t / E w` of any sign, without its bias to second order, and the ends of its interval.

    Zero is in the interval exactly where the mean of `t` alone may be zero. All three are NaN where
    the mean of `w` is not positive; an end may be infinite.
    """
    t, w, M = top.mean().item(), bottom.mean().item(), len(top)
    if not w > 0:
        return math.nan, math.nan, math.nan
    rest = (top - t) - t / w * (bottom - w)
    bias = -float((rest * (bottom - w)).sum()) / (M * (M - 1)) / w**2
    return t / w - bias, *_ends(top, bottom, -np.pi / 2)


def mean(values: Tensor) -> tuple[float, float]:
    """The 95 % interval of a mean: every `m` with `|T| <= 1.96` or `|T'| <= 1.96` of `v - m`."""
    M, deviation = len(values), float(values.std())
    if deviation == 0:
        return float(values[0]), float(values[0])
    rest = (values - values.mean()) / values.std(correction=0)
    skewness = float(rest.pow(3).mean()) * math.sqrt(M * (M - 1)) / (M - 2)
    left, right = (float(end) for end in quantiles(np.array(skewness), M))
    spread, middle = deviation / math.sqrt(M), float(values.mean())
    return middle - right * spread, middle - left * spread


def _ends(top: Tensor, bottom: Tensor, start: float) -> tuple[float, float]:
    """The ends of the interval of `E t / E w`, searched from the angle `start` up to infinity."""
    values = np.stack([top.double().cpu().numpy(), bottom.double().cpu().numpy()])
    size, spread = np.abs(values).max(axis=1), values.std(axis=1)
    # values that differ by rounding are one, whatever the shape of that looks like
    values = np.where((spread <= ROUNDED * size)[:, None], values.mean(axis=1)[:, None], values)
    # in the unit of a small deviation the angle of the ratio would have no digits
    unit = np.maximum(spread, LEAST_UNIT * size)
    if not unit.all():
        return math.nan, math.nan
    t, w = values / unit[:, None]
    inside = _Inside(t, w)
    angles = np.linspace(start, np.pi / 2, _POINTS)
    held = inside(angles)
    if w.mean() > 0 and (t.mean() >= 0 or start < 0):
        # the estimate itself, which the steps may miss where the interval is short
        estimate = math.atan2(t.mean(), w.mean())
        place = int(np.searchsorted(angles, estimate))
        angles, held = np.insert(angles, place, estimate), np.insert(held, place, True)
    if not held.any():
        return math.nan, math.nan
    first, last = int(held.argmax()), len(held) - 1 - int(held[::-1].argmax())
    scale = unit[0] / unit[1]
    low, high = (0.0 if start == 0 else -math.inf), math.inf
    if first:
        low = scale * math.tan(inside.edge(angles[first - 1], angles[first]))
    if last < len(held) - 1:
        high = scale * math.tan(inside.edge(angles[last + 1], angles[last]))
    return low, high


class _Inside:
    """Whether angles are in the interval, from the moments of `h = cos t - sin w`."""

    def __init__(self, t: Any, w: Any) -> None:
        self.M = len(t)
        self.means = t.mean(), w.mean()
        t, w = t - self.means[0], w - self.means[1]
        self.squares = [(p * q).mean() for p, q in ((t, t), (t, w), (w, w))]
        cubes = ((t, t, t), (t, t, w), (t, w, w), (w, w, w))
        self.cubes = [(p * q * r).mean() for p, q, r in cubes]

    def __call__(self, angles: Any) -> Any:
        """Booleans, one per angle."""
        c, s, M = np.cos(angles), -np.sin(angles), self.M
        mean = c * self.means[0] + s * self.means[1]
        tt, tw, ww = self.squares
        variance = np.maximum(c * c * tt + 2 * c * s * tw + s * s * ww, 1e-30)
        ttt, ttw, tww, www = self.cubes
        third = c**3 * ttt + 3 * c * c * s * ttw + 3 * c * s * s * tww + s**3 * www
        skewness = third / variance**1.5 * math.sqrt(M * (M - 1)) / (M - 2)
        left, right = quantiles(skewness, M)
        T = mean * np.sqrt((M - 1) / variance)
        return (left <= T) & (right >= T)

    def edge(self, outside: float, inside: float) -> float:
        """The end of the interval between an angle outside and one inside."""
        for _ in range(_TIMES):
            steps = np.linspace(outside, inside, _POINTS)
            held = self(steps[:-1])
            place = int(held.argmax()) if held.any() else _POINTS - 1
            if place == 0:
                break
            outside, inside = steps[place - 1], steps[place]
        return float(inside)


def quantiles(skewness: Any, M: int) -> tuple[Any, Any]:
    """The range of `T` with `|T| <= 1.96` or `|T'| <= 1.96`, for an array of skewnesses."""
    s = skewness * (1 + 4 / math.sqrt(M))
    c = 2 * s / (3 * math.sqrt(M))
    c = np.where(np.abs(c) < 1e-6, 1e-6, c)
    ends = []
    for sign in (-1, 1):
        exponential = 1 + c * (sign * WIDTH - s / (6 * math.sqrt(M)))
        with np.errstate(divide="ignore", invalid="ignore"):
            end = np.where(exponential > 0, np.log(exponential) / c, sign * np.inf)
        ends.append(end)
    return np.minimum(ends[0], -WIDTH), np.maximum(ends[1], WIDTH)
