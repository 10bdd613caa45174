"""The Kronecker product nearest to the block in the Kullback-Leibler sense."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fisherlab import doors
from fisherlab.approximations.base import Approximation, check_iteration
from fisherlab.blocks import Block, BlockError, Kronecker, Outer
from fisherlab.blocks.columns import Columns, joined
from fisherlab.blocks.contractions import left_moment, right_moment
from fisherlab.blocks.factor import Subspace
from fisherlab.blocks.numerics import RANK_TOLERANCE, cholesky, eigh, rank_of, symmetrise
from fisherlab.extract import LayerCapture

_TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-7}
# Share of `tr F / N` that takes the place of directions no example has, where F is singular.
RIDGE = 1e-3
# Ratio of a factor's eigenvalues below which, without a ridge, it is taken to run off.
EDGE = 1e-8
# The rounding of a moment of columns in float32. It decides the rank of a float64 one too, or the
# ridge of one network would differ between the two.
FLOOR = RANK_TOLERANCE * torch.finfo(torch.float32).eps ** 2
# Parameters up to which a block is tested for full rank by its eigenvalues.
TESTED = 1024


@dataclass(frozen=True)
class KLOptimal(Approximation, name="kl_optimal"):
    """`argmin_{G, A} KL(F + lambda I, G (x) A)`, the optimum of the Stein loss.    Lin et al. 2025.

    With `F_l = F + lambda I` it is the least `tr((G (x) A)^{-1} F_l) + log det(G (x) A)`: twice the
    divergence of `N(0, F_l)` from `N(0, G (x) A)` up to a constant. KL-Shampoo follows its fixed
    point over time; the alternation is Dutilleul's (1999) for matrix normals:

        G <- (1/i) ((1/M) sum D A^{-1} D^T + lambda tr(A^{-1}) I)
        A <- (1/o) ((1/M) sum D^T G^{-1} D + lambda tr(G^{-1}) I)

    Everything is in the spans of `sum D D^T` and of `sum D^T D`, beside which F and the product are
    zero, and `I` is the identity of both. It is F itself where F is a Kronecker product.

    Args:
        ridge: `lambda` over the mean eigenvalue of F in the spans. Where F is singular there, no
            optimum needs to exist without one. None: 0 where F has full rank there, which is tested
            up to 1,024 parameters; else 1e-3.
        tolerance: `||G'^{-1} (G - G')|| / sqrt(o)` at which the alternation ends; None: 1e-13 in
            float64, 1e-7 in float32. Sums are float64 whatever the capture is.
        iterations: the most alternations. A product is refused that still moves by the root of the
            tolerance.
    """

    additive = False
    ridge: float | None = None
    tolerance: float | None = None
    iterations: int = 500

    def __post_init__(self) -> None:
        check_iteration(self.tolerance, self.iterations)
        if self.ridge is not None:
            doors.number(self.ridge, "ridge", least=0.0, error=BlockError)

    def of_batch(self, layers: tuple[LayerCapture, ...]) -> Block:
        columns = [x.columns.apart for x in layers]
        of = joined(columns) if len(columns) > 1 else columns[0]
        a, g, dtype = of.a.double(), of.g.double(), of.dtype
        examples = sum(layer.examples for layer in layers)
        V_G = _span(left_moment(a, g), "sum D D^T")
        V_A = _span(right_moment(a, g), "sum D^T D")
        if not V_G.shape[1] or not V_A.shape[1]:
            o, i = of.shape
            return Kronecker(of.a.new_zeros(o, o), of.a.new_zeros(i, i))
        # a span that is the whole space needs no other coordinates
        g = g if _whole(V_G) else g @ V_G
        a = a if _whole(V_A) else a @ V_A
        G, A = (X.to(dtype) for X in self._alternated(Columns(a, g), examples, dtype))
        return Kronecker(
            G if _whole(V_G) else Subspace(V_G.to(dtype), G),
            A if _whole(V_A) else Subspace(V_A.to(dtype), A),
        )

    def _alternated(
        self, of: Columns, examples: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """`G` and `A` in the spans, of columns that were captured in a dtype.

        Every third `G` is extrapolated from the two before (SQUAREM, Varadhan & Roland 2008), where
        what comes out is positive definite.
        """
        o, i = of.shape
        damping = self._damping(of, examples)
        eye_G, eye_A = (torch.eye(d, dtype=of.dtype, device=of.device) for d in (o, i))
        tolerance = self.tolerance or _TOLERANCE.get(dtype, 1e-7)

        def input_factor(Q: Tensor) -> Tensor:
            moment = symmetrise(right_moment(of.a, of.g, Q)) / examples
            return (moment + damping * Q.trace() * eye_A) / o

        G, recent = eye_G, [eye_G]
        for _ in range(self.iterations):
            Q = _inverse(G, "G")
            P = _inverse(input_factor(Q), "A")
            moment = symmetrise(left_moment(of.a, of.g, P)) / examples
            new = (moment + damping * P.trace() * eye_G) / i
            new = new * (o / new.trace())  # the scale that both share is put into A
            change = (Q @ (new - G)).norm()
            G = new
            if change <= tolerance * math.sqrt(o):
                break
            recent.append(G)
            if len(recent) == 3:
                first, second, third = recent
                G = _extrapolated(first, second, third, Q)
                recent = [G]
        if change > math.sqrt(tolerance * o):
            raise BlockError(
                f"the KL-optimal product has not settled after {self.iterations} alternations (the "
                f"last changed G by {float(change):.1e}); F may have no such optimum: pass a ridge "
                "such as 1e-3, or more iterations"
            )
        A = input_factor(_inverse(G, "G"))
        if self.ridge == 0:
            self._check_interior(G, A)
        balance = (A.norm() / G.norm()).sqrt()
        return G * balance, A / balance

    @staticmethod
    def _check_interior(G: Tensor, A: Tensor) -> None:
        """Refuse a product at the edge of the positive ones, where no optimum is."""
        for name, S in (("G", G), ("A", A)):
            values, _ = eigh(S, f"factor {name}")
            if values[0] < EDGE * values[-1]:
                raise BlockError(
                    f"factor {name} of the KL-optimal product runs into a singular one "
                    f"(eigenvalues {float(values[0]):.1e} to {float(values[-1]):.1e}): F "
                    "has no such optimum; pass a ridge such as 1e-3"
                )

    def _damping(self, of: Columns, examples: float) -> float:
        """`lambda`: of the ridge given, or of the rule for None."""
        mean = float(of.trace) / examples / (of.shape[0] * of.shape[1])
        if self.ridge is not None:
            return self.ridge * mean
        return 0.0 if _full_rank(of) else RIDGE * mean


def _span(moment: Tensor, name: str) -> Tensor:
    """The eigenvectors of a moment above its rounding, `[d, r]`."""
    values, vectors = eigh(moment, name)
    return vectors[:, len(values) - rank_of(values, FLOOR) :]


def _whole(V: Tensor) -> bool:
    return V.shape[0] == V.shape[1]


def _full_rank(of: Columns) -> bool:
    size = of.shape[0] * of.shape[1]
    if of.count < size or size > TESTED:
        return False
    return rank_of(Outer.over(of).eigenvalues(), FLOOR) == size


def _extrapolated(first: Tensor, second: Tensor, third: Tensor, Q: Tensor) -> Tensor:
    """`G_0 - 2 a r + a^2 v`, `r = G_1 - G_0`, `v = G_2 - 2 G_1 + G_0`, `a = -||r|| / ||v||`.

    Norms are those of `Q X`, `Q` about the inverse. It is `G_2` where the other is not positive.
    """
    r, v = second - first, third - 2 * second + first
    size = (Q @ v).norm()
    if not size > 0:
        return third
    a = -((Q @ r).norm() / size).clamp(min=1.0)
    found = symmetrise(first - 2 * a * r + a**2 * v)
    _, singular = torch.linalg.cholesky_ex(found)
    return third if bool(singular) else found * (len(found) / found.trace())


def _inverse(S: Tensor, name: str) -> Tensor:
    try:
        return torch.cholesky_inverse(cholesky(S, f"factor {name} of the KL-optimal product"))
    except BlockError as error:
        raise BlockError(f"{error}; F has no such optimum: pass a ridge such as 1e-3") from None
