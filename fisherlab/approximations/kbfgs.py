"""K-BFGS: KFAC's structure with each inverse factor kept by BFGS updates."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fisherlab import doors
from fisherlab.approximations.base import Approximation
from fisherlab.approximations.means import Means, Sums
from fisherlab.blocks import Block, BlockError, FromInverse, Kronecker
from fisherlab.blocks.factor import Dense
from fisherlab.blocks.numerics import RANK_TOLERANCE, cholesky, sum_of, trace_of
from fisherlab.extract import LayerCapture
from fisherlab.statistics import InputMoment, Statistic


class Mean(Statistic):
    """`sum_n mean_t a`, `[i]`."""

    needs: ClassVar[frozenset[str]] = frozenset({"inputs"})

    def total(self, layer: LayerCapture) -> Tensor:
        return layer.position_mean(layer.inputs).sum(0)


class OfPair(Statistic):
    """A sum over a layer captured twice, before and after a step on the same batch."""

    needs: ClassVar[frozenset[str]] = frozenset({"label_gradients", "outputs", "pair"})

    def total(self, layer: LayerCapture) -> Tensor:
        if layer.after is None:
            raise BlockError(
                f"K-BFGS needs layer {layer.name!r} captured again after the step, on the same "
                "batch (`LayerCapture.after`); it cannot be built from one capture"
            )
        return self.change(layer, layer.after)

    @abstractmethod
    def change(self, layer: LayerCapture, after: LayerCapture) -> Tensor:
        """The sum of both captures."""


class OutputChange(OfPair):
    """`sum_n mean_t (s' - s)`, `[o]`, of the pre-activations."""

    def change(self, layer: LayerCapture, after: LayerCapture) -> Tensor:
        moved = after.outputs - layer.outputs
        if layer.counted is not None:
            moved = torch.where(layer.counted[..., None], moved, 0)
        return layer.position_mean(moved).sum(0)


class GradientChange(OfPair):
    """`sum_{n,t} g' - sum_{n,t} g`, `[o]`."""

    def change(self, layer: LayerCapture, after: LayerCapture) -> Tensor:
        return after.label_gradients.sum((0, 1)) - layer.label_gradients.sum((0, 1))


class GradientSum(OfPair):
    """`sum_{n,t} g`, `[o]`, before the step."""

    def change(self, layer: LayerCapture, after: LayerCapture) -> Tensor:
        return layer.label_gradients.sum((0, 1))


class GradientLength(OfPair):
    """`sum_{n,t} ||g|| + ||g'||`, 0-d."""

    def change(self, layer: LayerCapture, after: LayerCapture) -> Tensor:
        return sum_of(each.label_gradients.norm(dim=-1).sum() for each in (layer, after))


@dataclass(frozen=True)
class KBFGS(Approximation, name="kbfgs"):
    """`F^{-1} ~ H_g (x) H_a`, each kept by BFGS.      NGM section 3; Goldfarb et al. 2020.

    `H_a` starts at `(A + sqrt(lambda) I)^{-1}` and takes the pair `s = H_a E[a]`, `y = A_LM s`.
    `H_g` starts at I and takes the change over a step of the mean pre-activation and of its
    gradient, doubly damped. The change comes from a second pass on the same batch
    (`LayerCapture.after`). `H_g` tracks a Hessian of signed means, not `E[g g^T]`, so it cannot be
    built from one capture, and the damping is part of the inverse. A mean that cancels counts as
    zero, not as the direction of its rounding: the mean gradient in front of a batch norm or of
    attention's keys is one.

    Args:
        damping: lambda, absolute, positive.
        s: statistic of the change of the mean pre-activation.
        y: statistic of the change of its gradient.
        g: statistic of the sum of the gradients.
        length: statistic of the gradients' length.
        A: statistic of the input factor.
        a: statistic of the mean input.

    Raises:
        BlockError: `damping` is not positive.
    """

    placement = "factorwise"
    damping: float = 0.3
    s: Statistic = OutputChange()
    y: Statistic = GradientChange()
    g: Statistic = GradientSum()
    length: Statistic = GradientLength()
    A: Statistic = InputMoment()
    a: Statistic = Mean()

    def __post_init__(self) -> None:
        doors.number(self.damping, "damping of K-BFGS", above=0.0, error=BlockError)

    def basis(self, mean: Means, previous: Sums | None = None) -> Sums:
        root, A = math.sqrt(self.damping), mean(self.A)
        eye = torch.eye(len(A), dtype=A.dtype, device=A.device)
        A_LM = A + root * eye
        if previous is None:
            H_a = torch.cholesky_inverse(cholesky(A_LM, "damped input factor"))
            H_g = torch.eye(len(mean(self.s)), dtype=eye.dtype, device=eye.device)
        else:
            H_a, H_g = previous["H_a"], previous["H_g"]
        s = H_a @ without_rounding(mean(self.a), trace_of(A).sqrt())
        H_a = bfgs(H_a, s, A_LM @ s)
        y = without_rounding(mean(self.y), mean(self.length))
        s, y = double_damping(H_g, mean(self.s), y, mu=root)
        if s @ y > 1e-4 * (s @ s) * mean(self.g).norm():
            H_g = bfgs(H_g, s, y)
        return {"H_a": H_a, "H_g": H_g}

    def block(self, mean: Means, shape: tuple[int, int]) -> Block:
        return FromInverse(Kronecker(Dense(mean.basis["H_g"]), Dense(mean.basis["H_a"])))

    def damped(self, block: Block, damping: float) -> Block:
        return block.power(-1, 0.0)


def without_rounding(mean: Tensor, length: Tensor) -> Tensor:
    """The mean of terms of mean length `length`; 0 where it is no longer than their rounding.

    Terms that cancel leave 0.01 to 1 eps of their length, terms that do not leave 1,000 eps.
    """
    floor = RANK_TOLERANCE * torch.finfo(mean.dtype).eps * length
    return torch.where(mean.norm() > floor, mean, 0)


def bfgs(H: Tensor, s: Tensor, y: Tensor) -> Tensor:
    """`(I - r s y^T) H (I - r y s^T) + r s s^T`, `r = 1 / s.y`: the inverse with `H y = s`.

    The pair is scaled to `s.y = 1`: `r^2` overflows float32 where `s.y` is below 1e-19.
    """
    s, y = s.double(), y.double()
    curvature = s @ y
    if not curvature > 0:
        return H
    s, y = ((vector / curvature.sqrt()).to(H) for vector in (s, y))
    Hy = H @ y
    rank_one = torch.outer(s, Hy)
    return H - (rank_one + rank_one.mT) + (1 + y @ Hy) * torch.outer(s, s)


def double_damping(H: Tensor, s: Tensor, y: Tensor, mu: float) -> tuple[Tensor, Tensor]:
    """A pair with `s.y >= 0.2 y.H y` and then `s.y >= mu s.s`.  Goldfarb et al. 2020, Alg. 2.

    In float64, whose range holds the squares of small pairs.
    """
    Hy, s, y = (H @ y).double(), s.double(), y.double()
    sy, yHy = s @ y, y @ Hy
    if sy < 0.2 * yHy:
        theta = 0.8 * yHy / (yHy - sy)
        s = theta * s + (1 - theta) * Hy
        sy = s @ y
    ss = s @ s
    if sy < mu * ss:
        theta = (1 - mu) * ss / (ss - sy)
        y = theta * y + (1 - theta) * s
    return s, y
