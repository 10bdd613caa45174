"""Central claims of the methods of 2024 and 2025: SOAP and KL-Shampoo, on one block."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from fisherlab.approximations import Approximation, Running
from fisherlab.approximations.exact import Exact
from fisherlab.approximations.kl_optimal import KLOptimal
from fisherlab.approximations.kl_shampoo import KLShampoo
from fisherlab.approximations.shampoo import Shampoo
from fisherlab.approximations.soap import SOAP
from fisherlab.blocks import Eigen, Kronecker
from fisherlab.claims import dense
from fisherlab.claims.base import CONTRAST, EXTENSION, REFUTED, AtMost, Case, Identity
from fisherlab.claims.instances import OfLayer, captured, integer, layer_case, normal
from fisherlab.claims.tekfac import error_of

# Above these parameters a dense Stein loss takes too long for a trial.
LARGEST = 120
RIDGE = 0.01


class ShampooIsAdafactor(OfLayer, Identity, name="shampoo_squared_is_adafactor_in_its_eigenbasis"):
    """Shampoo's squared preconditioner is Adafactor's of the second moments in its eigenbasis."""

    source = "SOAP claim 1"
    latex = (
        r"L \otimes R / \mathrm{tr} L = Q \, \mathrm{diag}(V 1 \, 1^\top V / 1^\top V 1) \, Q^\top"
    )
    sides = ("Adafactor in SOAP's basis", "Shampoo squared")

    def left(self, case: Case) -> Tensor:
        block = SOAP()(captured(case))
        assert isinstance(block, Eigen)
        V = block.spectrum
        values = torch.outer(V.sum(1), V.sum(0)) / V.sum()
        return Eigen(block.Q_G, block.Q_A, values) @ case["V"]

    def right(self, case: Case) -> Tensor:
        L, R = dense.moments(case)
        return L @ case["V"] @ R / L.trace()


class SoapBest(OfLayer, Identity, name="soap_is_the_best_diagonal_in_shampoos_basis"):
    """SOAP's error is the least that any diagonal has in the eigenbasis of Shampoo's factors."""

    source = "SOAP section 4"
    kind = EXTENSION
    latex = (
        r"\|F - F_{\mathrm{SOAP}}\|_F = \min_{\Lambda\ \mathrm{diagonal}} "
        r"\|F - (Q_L \otimes Q_R) \Lambda (Q_L \otimes Q_R)^\top\|_F"
    )
    tolerance = 1e-6

    def adapt(self, real: Case, generator: torch.Generator) -> Case | None:
        return None if real["V"][0].numel() > 700 else super().adapt(real, generator)

    def left(self, case: Case) -> Tensor:
        # 1 - error^2 is compared: the error itself may be zero
        return torch.tensor(1 - error_of(SOAP(), case) ** 2, dtype=torch.float64)

    def right(self, case: Case) -> Tensor:
        Q = torch.kron(*(torch.linalg.eigh(factor)[1] for factor in dense.moments(case)))
        F = dense.block(case)
        return (Q * (F @ Q)).sum(0).square().sum() / F.square().sum()


class ShampooOneSided(OfLayer, Identity, name="shampoo_is_kl_optimal_for_one_factor"):
    """Shampoo's left factor, over the inputs' number, is the KL-optimal S of `S (x) I`."""

    source = "KL-Shampoo Claim 1"
    latex = r"L / i = \arg\min_S \mathrm{KL}(F, S \otimes I)"
    sides = ("Shampoo", "a natural step from S = I")

    def left(self, case: Case) -> Tensor:
        block = Shampoo(form="squared")(captured(case))
        assert isinstance(block, Kronecker)
        return block.G * (block.trace() / block.G.trace() / len(block.A))

    def right(self, case: Case) -> Tensor:
        """`S - S grad S / i`, which is the minimum from any S; the gradient is autograd's."""
        F, (o, i) = dense.block(case), case["V"].shape[1:]
        S = torch.eye(o, dtype=F.dtype, requires_grad=True)
        X = torch.kron(S, torch.eye(i, dtype=F.dtype))
        loss = torch.linalg.solve(X, F).trace() + torch.linalg.slogdet(X)[1]
        (slope,) = torch.autograd.grad(loss, S)
        return (S - S @ slope @ S / i).detach()

    def adapt(self, real: Case, generator: torch.Generator) -> Case | None:
        return None if real["V"][0].numel() > LARGEST else super().adapt(real, generator)


class _FullRank(OfLayer, Identity):
    """A Kronecker product against the KL-optimal one of a block that needs no ridge."""

    trials = 6
    tolerance = 1e-6

    def draw(self, generator: torch.Generator, size: float) -> Case:
        """Long inputs come with long gradients, so that the block is no Kronecker product."""
        o, i = (integer(generator, 2, 3, size) for _ in range(2))
        n = 12 * o * i
        lengths = (0.4 * normal(generator, n, 1)).exp()
        a, g = (normal(generator, n, d) * lengths for d in (i, o))
        return {"a": a[:, None], "g": g[None, :, None], "V": normal(generator, 2, o, i)}

    def adapt(self, real: Case, generator: torch.Generator) -> Case | None:
        return None

    def assume(self, case: Case) -> bool:
        values = torch.linalg.eigvalsh(dense.block(case))
        return bool(values[0] > 1e-3 * values[-1])

    def right(self, case: Case) -> Tensor:
        (o, i), F = case["V"].shape[1:], dense.block(case)
        G, A = alternated(F.view(o, i, o, i))
        return G @ case["V"] @ A


class KLShampooRests(_FullRank, name="kl_shampoo_comes_to_rest_at_the_kl_optimum"):
    """Steps of KL-Shampoo on one block come to rest at the KL-optimal product, scale included."""

    source = "KL-Shampoo Claim 2"
    kind = EXTENSION
    latex = (
        r"G \leftarrow p G + \frac{q}{i} \mathrm{tr}_A[(I \otimes A^{-1}) F],\ A \leftarrow "
        r"\dots \ \Rightarrow\ G \otimes A \rightarrow \arg\min \mathrm{KL}(F, G \otimes A)"
    )
    assumption = "the block has full rank"
    steps = 80
    trials = 4
    method: ClassVar[Approximation] = KLShampoo(ridge=1e-12)

    def left(self, case: Case) -> Tensor:
        running, layer = Running(self.method, 0.5), captured(case)
        for _ in range(self.steps):
            running.update(layer)
        return running.block() @ case["V"]

    def smaller(self, case: Case) -> Iterator[Case]:
        # each is a run of its own
        return iter(())


class ShampooTwoSided(_FullRank, name="shampoo_is_kl_optimal_for_two_factors"):
    """Shampoo's two factors, each the best alone, are up to scale the best together."""

    source = "KL-Shampoo Claim 2"
    kind = CONTRAST
    expected = REFUTED
    latex = r"L \otimes R \propto \arg\min_{G, A} \mathrm{KL}(F, G \otimes A)"
    assumption = "the block has full rank"

    def left(self, case: Case) -> Tensor:
        return Shampoo(form="squared")(captured(case)) @ case["V"]

    def compare(self, left: Tensor, right: Tensor) -> float:
        scale = (left * right).sum() / left.square().sum()
        return super().compare(scale * left, right)


def alternated(F: Tensor) -> tuple[Tensor, Tensor]:
    """`G <- tr_A[(I (x) A^{-1}) F] / i` and `A <- tr_G[(G^{-1} (x) I) F] / o`, till they rest.

    Args:
        F: the block as `[o, i, o, i]`.
    """
    o, i = F.shape[:2]
    A = torch.eye(i, dtype=F.dtype)
    for _ in range(500):
        G, last = torch.einsum("oipj,ij->op", F, torch.linalg.inv(A)) / i, A
        A = torch.einsum("oipj,op->ij", F, torch.linalg.inv(G)) / o
        if (A - last).norm() <= 1e-13 * A.norm():
            break
    return G, A


class _Stein(OfLayer):
    """The statement on `F + lambda I` in the spans of both partial traces."""

    trials = 6
    approximation: ClassVar[Approximation] = KLOptimal(ridge=RIDGE)

    def draw(self, generator: torch.Generator, size: float) -> Case:
        return layer_case(generator, size, examples=(3, 8))

    def assume(self, case: Case) -> bool:
        return case["V"][0].numel() <= LARGEST and bool(case["g"].any()) and bool(case["a"].any())

    def adapt(self, real: Case, generator: torch.Generator) -> Case | None:
        return None if real["V"][0].numel() > LARGEST else super().adapt(real, generator)

    def product(self, case: Case) -> tuple[Tensor, Tensor]:
        """`G` and `A` of the approximation."""
        block = self.approximation(captured(case))
        assert isinstance(block, Kronecker)
        return block.G, block.A


class Spans:
    """`F + lambda I` in the ranges of its partial traces, and products there.

    Args:
        F: the block.
        L: its partial trace over the inputs.
        R: its partial trace over the outputs.
    """

    def __init__(self, F: Tensor, L: Tensor, R: Tensor) -> None:
        self.V_G, self.V_A = (_range(S) for S in (L, R))
        U = torch.kron(self.V_G, self.V_A)
        F = U.mT @ F @ U
        self.F = F + RIDGE * F.trace() / len(F) * torch.eye(len(F), dtype=F.dtype)

    def loss(self, G: Tensor, A: Tensor) -> float:
        """`tr(X^{-1} F) - log det(X^{-1} F) - N`; inf for a singular product."""
        sides = ((self.V_G, G), (self.V_A, A))
        factors = [torch.linalg.cholesky_ex(V.mT @ S @ V) for V, S in sides]
        if any(bool(info) for _, info in factors):
            return math.inf
        ratio = torch.cholesky_solve(self.F, torch.kron(*(C for C, _ in factors)))
        return float(ratio.trace() - torch.linalg.slogdet(ratio)[1]) - len(ratio)

    def fixed_point(self) -> tuple[Tensor, Tensor]:
        """The optimum by alternation."""
        o, i = self.V_G.shape[1], self.V_A.shape[1]
        G, A = alternated(self.F.view(o, i, o, i))
        return self.V_G @ G @ self.V_G.mT, self.V_A @ A @ self.V_A.mT


def _range(S: Tensor) -> Tensor:
    U, s, _ = torch.linalg.svd(S)
    return U[:, s > 1e-12 * s[0]]


class KLBound(_Stein, AtMost, name="kl_optimal_kronecker_product_is_a_lower_bound"):
    """No Kronecker product of KFAC, TKFAC or the Frobenius optimum has a smaller Stein loss."""

    source = "KL-Shampoo, Lin et al. 2025"
    kind = EXTENSION
    latex = (
        r"\min_{G, A} \mathrm{KL}(F, G \otimes A) \le \mathrm{KL}(F, X),\ "
        r"X \in \{\mathrm{KFAC}, \mathrm{TKFAC}, \dots\}"
    )
    scale = 1.0
    sides = ("KL-optimal", "best of the others")

    def left(self, case: Case) -> float:
        layer = captured(case)
        spans = Spans(Exact()(layer).dense(), layer.columns.left, layer.columns.right)
        return spans.loss(*self.product(case))

    def right(self, case: Case) -> float:
        U, _, Vh = torch.linalg.svd(dense.rearranged(case), full_matrices=False)
        G, A = (x.view(math.isqrt(len(x)), -1) for x in (U[:, 0], Vh[0]))
        spans = Spans(dense.block(case), *dense.moments(case))
        rivals = [dense.kfac(case), dense.tkfac(case), (G * G.trace().sign(), A * A.trace().sign())]
        return min(spans.loss(*pair) for pair in rivals)


class KLFixedPoint(_Stein, Identity, name="kl_optimal_kronecker_product_is_a_fixed_point"):
    """The KL-optimal product is the fixed point of the alternation between its two factors."""

    source = "KL-Shampoo, Lin et al. 2025"
    latex = r"G = \frac{1}{i} \mathrm{tr}_A[(I \otimes A^{-1}) F],\quad A = \frac{1}{o} \dots"
    tolerance = 1e-6

    def left(self, case: Case) -> Tensor:
        return _normalised(*self.product(case))

    def right(self, case: Case) -> Tensor:
        return _normalised(*Spans(dense.block(case), *dense.moments(case)).fixed_point())


def _normalised(G: Tensor, A: Tensor) -> Tensor:
    """Both factors at length 1: a scale may go from one into the other."""
    return torch.cat([(G / G.norm()).flatten(), (A / A.norm()).flatten()])
