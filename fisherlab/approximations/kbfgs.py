"""K-BFGS: KFAC's structure with each inverse factor kept by BFGS updates."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fisherlab.approximations.base import Approximation, Means
from fisherlab.blocks import Block, BlockError, FromInverse, Kronecker
from fisherlab.blocks.contractions import second_moment
from fisherlab.blocks.numerics import RANK_TOLERANCE, trace_of
from fisherlab.extract import LayerCapture


@dataclass(frozen=True)
class KBFGS(Approximation, name="kbfgs"):
    """`F^{-1} ~ H_g (x) H_a`, each kept by BFGS.      NGM section 3; Goldfarb et al. 2020.

    `H_a` starts at `(A + sqrt(lambda) I)^{-1}`, takes the pair `s = H_a E[a]`, `y = A_LM s`; `H_g`
    starts at I and takes the change of the mean pre-activation and of its gradient over a step,
    from a second pass on the same batch (`LayerCapture.after`), doubly damped. `H_g` tracks a
    Hessian of signed means, not `E[g g^T]`, so it cannot be built from one capture, and the damping
    is part of the inverse. A mean that cancels counts as zero, not as the direction of its
    rounding: the mean gradient in front of a batch norm or of attention's keys is one.
    """

    needs = frozenset({"inputs", "label_gradients", "outputs", "pair"})
    damping: float = 0.3

    def __post_init__(self) -> None:
        if not self.damping > 0:
            raise BlockError(f"K-BFGS needs damping > 0, got {self.damping}")

    @property
    def placement(self) -> str:
        return "factorwise"

    def sums(self, layer: LayerCapture) -> dict[str, Tensor]:
        if layer.after is None:
            raise BlockError(
                f"K-BFGS needs layer {layer.name!r} captured again after the step, on the same "
                "batch (`LayerCapture.after`); it cannot be built from one capture"
            )
        a, t = layer.inputs, layer.positions
        first, second = layer.label_gradients, layer.after.label_gradients
        before, after = first.sum((0, 1)), second.sum((0, 1))
        moved = layer.after.outputs - layer.outputs
        if layer.counted is not None:
            moved = layer.weighed(torch.where(layer.counted[..., None], moved, 0), 1.0)
        share = layer.column_share
        return {
            "A": second_moment(layer.weighed(a)) * (share / t),
            "a": layer.weighed(a.sum(1), 1.0).sum(0) * (share / t),
            "s": moved.sum((0, 1)) * (share / t),
            "y": (after - before) * share,
            "g": before * share,
            "length": (first.norm(dim=-1).sum() + second.norm(dim=-1).sum()) * share,
        }

    def basis(self, means: Means, previous: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        root = math.sqrt(self.damping)
        eye = torch.eye(len(means["A"]), dtype=means["A"].dtype, device=means["A"].device)
        A_LM = means["A"] + root * eye
        if previous is None:
            H_a = torch.cholesky_inverse(torch.linalg.cholesky(A_LM))
            H_g = torch.eye(len(means["s"]), dtype=eye.dtype, device=eye.device)
        else:
            H_a, H_g = previous["H_a"], previous["H_g"]
        s = H_a @ without_rounding(means["a"], trace_of(means["A"]).sqrt())
        H_a = bfgs(H_a, s, A_LM @ s)
        y = without_rounding(means["y"], means["length"])
        s, y = double_damping(H_g, means["s"], y, mu=root)
        if s @ y > 1e-4 * (s @ s) * means["g"].norm():
            H_g = bfgs(H_g, s, y)
        return {"H_a": H_a, "H_g": H_g}

    def block(
        self, means: Means, basis: dict[str, Tensor], corrections: dict[str, Tensor]
    ) -> Block:
        return FromInverse(Kronecker(basis["H_g"], basis["H_a"]))

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
