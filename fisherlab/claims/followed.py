"""Kronecker products that follow a moving block batch by batch: DyKAF and KL-Shampoo."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fisherlab import datasets
from fisherlab.approximations import Running
from fisherlab.approximations.dykaf import DyKAF
from fisherlab.approximations.exact import Exact
from fisherlab.approximations.kl_shampoo import KLShampoo
from fisherlab.approximations.recursive import Recursive
from fisherlab.claims import dense
from fisherlab.claims.base import EXTENSION, REFUTED, AtMost, Case, Claim, Identity, Usually
from fisherlab.claims.instances import captured, integer, normal, orthogonal
from fisherlab.claims.memory import averaged_tkfac, parts

DECAY, RIDGE = 0.8, 1e-3
# Examples of a batch, and the learning rate, of the training that batches come from.
BATCH, RATE = 64, 0.5


def averaged(values: list[Tensor]) -> Tensor:
    """A mean over batches of equal size, with weights `DECAY^age`."""
    ages = torch.arange(len(values) - 1, -1, -1, dtype=torch.float64)
    weights = DECAY**ages
    return torch.einsum("b,b...->...", weights / weights.sum(), torch.stack(values))


def followed(approximation: Recursive, case: Case) -> Tensor:
    """FisherLab's running product after all batches, `[N, N]`."""
    running = Running(approximation, DECAY)
    for batch in parts(case):
        running.update(captured(batch))
    return running.block().dense()


def rivals(case: Case) -> list[tuple[Tensor, Tensor]]:
    """Averaged KFAC, Shampoo's square `L (x) R / tr L`, and Shampoo as `L^(1/2) (x) R^(1/2)`."""
    kfac = zip(*map(dense.kfac, parts(case)), strict=True)
    G, A = (averaged(list(side)) for side in kfac)
    L, R = averaged_tkfac(parts(case), DECAY)
    return [(G, A), (L, R), (dense.root(L, 0.5), dense.root(R * L.trace(), 0.5))]


def damped_stein(X: Tensor, S: Tensor) -> float:
    """`tr(X^{-1} S) - log det(X^{-1} S) - N`, both with a share of S's mean eigenvalue added."""
    damping = RIDGE * S.diagonal().mean() * torch.eye(len(S), dtype=S.dtype)
    ratio = torch.linalg.solve(X + damping, S + damping)
    return float(ratio.trace() - torch.linalg.slogdet(ratio)[1]) - len(S)


def distance(X: Tensor, S: Tensor) -> float:
    """`||X - S|| / ||S||`."""
    return float((X - S).norm() / S.norm())


class _Moving(Claim):
    """Batches of one layer whose inputs and gradients turn from one batch to the next."""

    batches = 2

    def draw(self, generator: torch.Generator, size: float) -> Case:
        """Long inputs come with long gradients, so that no block is a Kronecker product."""
        i, o = (integer(generator, 2, 4, size) for _ in range(2))
        n, batches = 2 * o * i, []
        ends = [(normal(generator, d, d), orthogonal(generator, d)) for d in (i, o)]
        for k in range(self.batches):
            lengths = (0.6 * normal(generator, n, 1)).exp()
            batches.append(
                [
                    normal(generator, n, len(S)) * lengths @ S.lerp(Q @ S, k / self.batches)
                    for S, Q in ends
                ]
            )
        return {"a": [a[:, None] for a, _ in batches], "g": [g[None, :, None] for _, g in batches]}

    def smaller(self, case: Case) -> Iterator[Case]:
        a, g = case["a"], case["g"]
        for k in range(len(a) if len(a) > 2 else 0):
            yield {"a": a[:k] + a[k + 1 :], "g": g[:k] + g[k + 1 :]}
        n = len(a[0])
        for keep in (n // 2, n - 1) if n > 1 else ():
            yield {"a": [x[:keep] for x in a], "g": [y[:, :keep] for y in g]}
        for key, d in (("a", a[0].shape[-1]), ("g", g[0].shape[-1])):
            if d > 1:
                yield {**case, key: [x[..., 1:].clone() for x in case[key]]}


class _Nearer(_Moving, AtMost):
    """The distance to the averaged block, against the least of averaged KFAC's and Shampoo's."""

    approximation: ClassVar[Recursive] = DyKAF()
    loss = staticmethod(distance)
    sides = ("DyKAF", "best of averaged KFAC and Shampoo")
    scale = 1.0
    noise = 1e-7

    def left(self, case: Case) -> float:
        mean = averaged([Exact()(captured(batch)).dense() for batch in parts(case)])
        return self.loss(followed(self.approximation, case), mean)

    def right(self, case: Case) -> float:
        mean = averaged([dense.block(batch) for batch in parts(case)])
        return min(self.loss(torch.kron(*pair), mean) for pair in rivals(case))


class _Trained(_Nearer, Usually):
    """The first batches of a training on digits, at the first layer of a network with one more."""

    trials = 12
    noise = 0.0

    def draw(self, generator: torch.Generator, size: float) -> Case:
        x, y = datasets.load("digits").train.tensors
        x = x.double().view(-1, 8, 8)[:, 2:6, 1:7:2].flatten(1)
        widths = [x.shape[1], integer(generator, 3, 6, size), 10]
        first, last = (
            (normal(generator, o, i + 1) / math.sqrt(i)).requires_grad_()
            for i, o in itertools.pairwise(widths)
        )
        a, g = [], []
        for _ in range(integer(generator, 4, 10, size)):
            rows = torch.randint(len(x), (BATCH,), generator=generator)
            inputs = F.pad(x[rows], (0, 1), value=1.0)
            hidden = inputs @ first.mT
            outputs = F.pad(hidden.tanh(), (0, 1), value=1.0) @ last.mT
            drawn = torch.multinomial(outputs.softmax(1), 1, generator=generator)[:, 0]
            loss = F.cross_entropy(outputs, drawn, reduction="sum")
            (slope,) = torch.autograd.grad(loss, hidden, retain_graph=True)
            a.append(inputs[:, None])
            g.append(slope[None, :, None])
            slopes = torch.autograd.grad(F.cross_entropy(outputs, y[rows]), (first, last))
            with torch.no_grad():
                for W, dW in zip((first, last), slopes, strict=True):
                    W.sub_(dW, alpha=RATE)
        return {"a": a, "g": g}


class DykafUsually(_Trained, name="dykaf_is_nearer_to_a_moving_block_usually"):
    """DyKAF is usually nearer to the averaged block than averaged KFAC and Shampoo, in training."""

    source = "DyKAF abstract"
    latex = (
        r"P(\|\bar F - X_{\mathrm{DyKAF}}\|_F \le \|\bar F - X\|_F) > 1/2,\ "
        r"X \in \{\mathrm{KFAC}, \mathrm{Shampoo}\}"
    )


class DykafAlways(_Nearer, name="dykaf_is_nearer_to_a_moving_block"):
    """Taken to every sequence of batches, DyKAF is nearer to the averaged block than the others."""

    source = "DyKAF abstract"
    kind = EXTENSION
    latex = r"\|\bar F - X_{\mathrm{DyKAF}}\|_F \le \|\bar F - X_{\mathrm{Shampoo}}\|_F"
    expected = REFUTED
    effort = 15
    free: ClassVar[tuple[str, ...]] = ("a", "g")


class KLShampooUsually(_Trained, name="kl_shampoo_is_nearer_in_kl_usually"):
    """Early in training KL-Shampoo is usually nearer in KL than averaged KFAC and Shampoo.

    Shampoo is `L^(1/2) (x) R^(1/2)`; its square is no rival here, since the order to it is not
    resolved. Both sides of the divergence have a thousandth of the mean eigenvalue as damping.
    """

    source = "KL-Shampoo, Lin et al. 2025"
    kind = EXTENSION
    latex = (
        r"P(\mathrm{KL}(\bar F, X_{\mathrm{KL}}) \le \mathrm{KL}(\bar F, X)) > 1/2,\ "
        r"X \in \{\mathrm{KFAC}, \mathrm{Shampoo}\}"
    )
    trials = 24
    approximation: ClassVar[Recursive] = KLShampoo()
    loss = staticmethod(damped_stein)
    sides = ("KL-Shampoo", "best of averaged KFAC and Shampoo")

    def right(self, case: Case) -> float:
        mean = averaged([dense.block(batch) for batch in parts(case)])
        kfac, _, shampoo = rivals(case)
        return min(self.loss(torch.kron(*pair), mean) for pair in (kfac, shampoo))


class DykafExact(_Moving, Identity, name="dykaf_is_exact_while_one_factor_rests"):
    """DyKAF is the averaged block while that stays a Kronecker product, since one factor rests."""

    source = "DyKAF, Yudin et al. 2025; Lubich and Oseledets 2014"
    kind = EXTENSION
    latex = r"F_k = G \otimes A_k \Rightarrow X_{\mathrm{DyKAF}} = \bar F"
    assumption = "every batch's block is a Kronecker product, and all have one G"
    outside = "dykaf_is_exact_for_kronecker_products"
    batches = 5
    rests = True

    def draw(self, generator: torch.Generator, size: float) -> Case:
        """Every row of inputs comes with every row of gradients: the block is `G (x) A`."""
        o, i = (integer(generator, 2, 4, size) for _ in range(2))
        g = [normal(generator, o + 1, o) for _ in range(self.batches)]
        a = [normal(generator, i + 1, i) for _ in range(self.batches)]
        g = g[:1] * self.batches if self.rests else g
        return {
            "a": [x.repeat(o + 1, 1)[:, None] for x in a],
            "g": [x.repeat_interleave(i + 1, 0)[None, :, None] for x in g],
        }

    def assume(self, case: Case) -> bool:
        return all(torch.equal(g, case["g"][0]) for g in case["g"])

    def left(self, case: Case) -> Tensor:
        return followed(DyKAF(), case)

    def right(self, case: Case) -> Tensor:
        return averaged([dense.block(batch) for batch in parts(case)])


class DykafMoving(DykafExact, name="dykaf_is_exact_for_kronecker_products"):
    """DyKAF is the averaged block where every batch's is a Kronecker product of its own."""

    latex = r"F_k = G_k \otimes A_k \Rightarrow X_{\mathrm{DyKAF}} = \bar F"
    expected = REFUTED
    assumption = "every batch's block is a Kronecker product"
    outside = ""
    rests = False

    def assume(self, case: Case) -> bool:
        return True

    def smaller(self, case: Case) -> Iterator[Case]:
        a, g = case["a"], case["g"]
        for k in range(len(a) if len(a) > 2 else 0):
            yield {"a": a[:k] + a[k + 1 :], "g": g[:k] + g[k + 1 :]}
