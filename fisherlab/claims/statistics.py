"""A fitted power and a confidence interval of a frequency."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def fitted_slope(x: Tensor, y: Tensor) -> float:
    """The power `p` of `y ~ c x^p`, least squares in logarithms; NaN where a `y` is not above 0."""
    if not bool((y > 0).all()) or not bool(torch.isfinite(y).all()):
        return math.nan
    u, v = x.double().log(), y.double().log()
    u = u - u.mean()
    return ((u @ v) / (u @ u)).item()


def wilson(wins: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95 % interval of a frequency."""
    p, share = wins / trials, z * z / trials
    centre = (p + share / 2) / (1 + share)
    half = z * math.sqrt(p * (1 - p) / trials + share / (4 * trials)) / (1 + share)
    return centre - half, centre + half
