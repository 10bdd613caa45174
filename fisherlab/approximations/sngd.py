"""SNGD's local Fisher."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fisherlab.approximations.base import Approximation
from fisherlab.approximations.means import Means
from fisherlab.blocks import Block, Kronecker
from fisherlab.statistics import InputMoment, Slope, Statistic


@dataclass(frozen=True)
class SNGD(Approximation, name="sngd"):
    """`F ~ I (x) nu A`,  `A = E[a a^T]`,  `nu = E f'(s)` of the activation fed.      SNGD (12).

    It has no output gradients in it, so it is not on the scale of `F`: read its cosine and its
    scaled error only. A layer that feeds no element-wise function has no `nu` and no block. In a
    comparison it is a row of NaN; in an optimizer it takes its plain gradient, with a warning.

    Args:
        slope: statistic of `nu`.
        A: statistic of the input factor `[i, i]`.
    """

    slope: Statistic = Slope()
    A: Statistic = InputMoment()

    def block(self, mean: Means, shape: tuple[int, int]) -> Block:
        slope, A = mean(self.slope), mean.factor(self.A)
        identity = torch.ones(shape[0], dtype=A.dtype, device=A.device)
        return Kronecker(identity, A.scaled(slope.to(identity)))
