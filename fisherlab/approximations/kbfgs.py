"""K-BFGS: KFAC's structure with each inverse factor kept by BFGS updates."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fisherlab.approximations.base import Approximation, Means
from fisherlab.blocks import Block, BlockError, FromInverse, Kronecker
from fisherlab.blocks.contractions import second_moment
from fisherlab.extract import LayerCapture


@dataclass(frozen=True)
class KBFGS(Approximation, name="kbfgs"):
    """`F^{-1} ~ H_g (x) H_a`, each kept by BFGS.      NGM section 3; Goldfarb et al. 2020.

    `H_a` starts at `(A + sqrt(lambda) I)^{-1}`, takes the pair `s = H_a E[a]`, `y = A_LM s`; `H_g`
    starts at I and takes the change of the mean pre-activation and of its gradient over a step,
    from a second pass on the same batch (`LayerCapture.after`), doubly damped. `H_g` tracks a
    Hessian of signed means, not `E[g g^T]`, so it cannot be built from one capture, and the damping
    is part of the inverse.
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
        before, after = layer.label_gradients.sum((0, 1)), layer.after.label_gradients.sum((0, 1))
        moved = layer.after.outputs.sum((0, 1)) - layer.outputs.sum((0, 1))
        share = layer.column_share
        return {
            "A": second_moment(a) * (share / t),
            "a": a.sum((0, 1)) * (share / t),
            "s": moved * (share / t),
            "y": (after - before) * share,
            "g": before * share,
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
        s = H_a @ means["a"]
        H_a = bfgs(H_a, s, A_LM @ s)
        s, y = double_damping(H_g, means["s"], means["y"], mu=root)
        if s @ y > 1e-4 * (s @ s) * means["g"].norm():
            H_g = bfgs(H_g, s, y)
        return {"H_a": H_a, "H_g": H_g}

    def block(
        self, means: Means, basis: dict[str, Tensor], corrections: dict[str, Tensor]
    ) -> Block:
        return FromInverse(Kronecker(basis["H_g"], basis["H_a"]))

    def damped(self, block: Block, damping: float) -> Block:
        return block.power(-1, 0.0)


def bfgs(H: Tensor, s: Tensor, y: Tensor) -> Tensor:
    """`(I - r s y^T) H (I - r y s^T) + r s s^T`, `r = 1 / s.y`: the inverse with `H y = s`."""
    curvature = s @ y
    if not curvature > 0:
        return H
    r = 1 / curvature
    Hy = H @ y
    rank_one = torch.outer(s, Hy)
    return H - r * (rank_one + rank_one.mT) + (r + r * r * (y @ Hy)) * torch.outer(s, s)


def double_damping(H: Tensor, s: Tensor, y: Tensor, mu: float) -> tuple[Tensor, Tensor]:
    """A pair with `s.y >= 0.2 y.H y` and then `s.y >= mu s.s`.  Goldfarb et al. 2020, Alg. 2."""
    Hy = H @ y
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
