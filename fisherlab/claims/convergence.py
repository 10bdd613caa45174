"""FNGD's Theorem 1: as printed, and with its two roots removed (FNGD V and appendix)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fisherlab.approximations.exact import Exact
from fisherlab.blocks import Block
from fisherlab.claims.base import (
    EXTENSION,
    HOLDS,
    REFUTED,
    AtMost,
    Case,
    Claim,
    ClaimError,
    Identity,
)
from fisherlab.claims.instances import captured, log_uniform, normal, orthogonal, without_one

__all__ = [
    "spectrum",
]

STEPS = 20


class Linear(Claim):
    """`v(w) = sum_l J_l^T w_l`, `L` layers, squared error, full batch, `lambda = lambda_min / M`.

    Every layer has a Gram matrix `J_l^T J_l` with eigenvalues in `[lambda_min, lambda_max]`, as
    Assumption 1 wants it, and a Jacobian that does not change, as Assumption 2 does.
    """

    source = "FNGD Theorem 1"
    sides = ("worst step", "bound")
    depths = (3, 10)
    trials = 24

    def draw(self, generator: torch.Generator, size: float) -> Case:
        low, high = self.depths
        L = low + int(torch.randint(0, round(size * (high - low)) + 1, (), generator=generator))
        M = 2 + int(torch.randint(0, 1 + round(3 * size), (), generator=generator))
        units = log_uniform(generator, 1e-2, 1e2)
        jacobians = []
        for _ in range(L):
            values = torch.tensor([log_uniform(generator, 1.0, 5.0) for _ in range(M)])
            rows = orthogonal(generator, M + 1)[:, :M] * values.double()
            jacobians.append(units * rows @ orthogonal(generator, M))
        return {"J": jacobians, "residual": normal(generator, M)}

    def smaller(self, case: Case) -> Iterator[Case]:
        J = case["J"]
        for k in range(len(J) if len(J) > self.depths[0] else 0):
            yield {**case, "J": J[:k] + J[k + 1 :]}
        for keep in without_one(J[0].shape[1]):
            yield {**case, "J": [x[:, keep] for x in J], "residual": case["residual"][keep]}

    def blocks(self, case: Case) -> list[Block]:
        """FisherLab's exact block `J_l J_l^T / M` of each layer."""
        one = torch.ones(1, case["J"][0].shape[1], 1, 1, dtype=torch.float64)
        return [Exact()(captured({"a": J.mT[:, None], "g": one})) for J in case["J"]]

    def residuals(self, case: Case) -> Tensor:
        """`||v_k - y||^2` of exact natural-gradient steps, `[STEPS + 1]`."""
        J, r = torch.stack(case["J"]), case["residual"]
        M, (low, _) = len(r), spectrum(case)
        # one natural step of every layer per unit of the residual, and what it does to the outputs
        steps = [
            F.solve(x.mT[:, None], low / M)[:, 0] for F, x in zip(self.blocks(case), J, strict=True)
        ]
        S = sum(step @ x for step, x in zip(steps, J, strict=True)) / M
        found = [r]
        for _ in range(STEPS):
            r = r - self.rate(case) * (r @ S)
            found.append(r)
        return torch.stack(found).square().sum(1)

    def rate(self, case: Case) -> float:
        """The learning rate, of the claims that take steps."""
        raise ClaimError(f"{self.name} takes no steps; give it a `rate`")

    def left(self, case: Case) -> Tensor:
        """`||v_k - y||^2` relative to the start; infinite where it overflows."""
        found = self.residuals(case)
        return torch.nan_to_num(found / found[0], nan=math.inf)

    def right(self, case: Case) -> Tensor:
        """`(1 - eta)^k`."""
        eta = self.rate(case)
        return (1 - eta) ** torch.arange(STEPS + 1, dtype=torch.float64)

    def compare(self, left: Tensor, right: Tensor) -> float:
        # per step, so that twenty steps weigh no more than one
        k = torch.arange(1, len(left), dtype=torch.float64)
        growth = (left[1:].clamp(min=1e-300).log() - right[1:].log()) / k
        return -growth.max().item()


def spectrum(case: Case) -> tuple[float, float]:
    """`lambda_min, lambda_max` of the block-diagonal Gram matrix."""
    values = torch.cat([torch.linalg.svdvals(J).square() for J in case["J"]])
    return values.min().item(), values.max().item()


class Corrected(Linear, name="fngd_theorem_corrected"):
    """With both roots removed and L >= 3 every step multiplies the residual by at most 1 - eta."""

    kind = EXTENSION
    latex = (
        r"\tilde\eta = (L - \sqrt L - 1) / "
        r"(L \tfrac{\lambda_{\max}}{\lambda_{\min} + \lambda_{\max}} + \tfrac{\sqrt L}{2})^2"
    )
    assumption = "L >= 3 layers, constant Jacobians, Gram matrices positive definite"
    outside = "fngd_theorem_as_printed"

    def assume(self, case: Case) -> bool:
        return len(case["J"]) >= 3 and spectrum(case)[0] > 0

    def rate(self, case: Case) -> float:
        L, (low, high) = len(case["J"]), spectrum(case)
        return (L - L**0.5 - 1) / (L * high / (low + high) + L**0.5 / 2) ** 2


class Printed(Linear, name="fngd_theorem_as_printed"):
    """With the printed learning rate every step multiplies the residual by at most 1 - eta."""

    latex = (
        r"\tilde\eta = (L - \sqrt{2L} - 1) / (L \sqrt{\tfrac{\lambda_{\max}}"
        r"{\lambda_{\min}^2 + \lambda_{\min} \lambda_{\max}}} + \tfrac{\sqrt{2L}}{2})^2"
    )
    expected = REFUTED
    depths = (5, 10)

    def assume(self, case: Case) -> bool:
        return 0 < self.rate(case) < 1

    def rate(self, case: Case) -> float:
        L, (low, high) = len(case["J"]), spectrum(case)
        inside = L * math.sqrt(high / (low**2 + low * high)) + math.sqrt(2 * L) / 2
        return (L - math.sqrt(2 * L) - 1) / inside**2


class OneLayer(Linear, name="fngd_theorem_for_one_layer"):
    """Taken to one layer and any rate, Theorem 1 still bounds the residual by (1 - eta)^k."""

    kind = EXTENSION
    latex = r"L = 1,\ G = \mu I \Rightarrow \|v_k - y\|^2 \le (1 - \eta)^k \|v_0 - y\|^2"
    expected = REFUTED
    depths = (1, 1)

    def draw(self, generator: torch.Generator, size: float) -> Case:
        case = super().draw(generator, size)
        J = torch.linalg.qr(case["J"][0])[0] * log_uniform(generator, 0.1, 10.0)
        return {**case, "J": [J], "eta": log_uniform(generator, 0.01, 0.9)}

    def rate(self, case: Case) -> float:
        return case["eta"]


class NormBound(Linear, AtMost, name="fngd_norm_bound_as_printed"):
    """The norm of J^T (F + lambda I)^{-1} J is at most the printed expression with its root."""

    source = "FNGD appendix (2)-(3)"
    latex = (
        r"\|\tilde J^\top (F + \lambda I)^{-1} \tilde J\| \le \tfrac{1}{\lambda} "
        r"\sqrt{\tfrac{\lambda_{\max} \lambda M}{\lambda M + \lambda_{\max}}}"
    )
    expected = REFUTED
    sides = ("norm", "printed bound")
    depths = (1, 4)
    compare = AtMost.compare

    def left(self, case: Case) -> Tensor:
        low, _ = spectrum(case)
        norms = []
        for F, J in zip(self.blocks(case), case["J"], strict=True):
            inside = F.solve(J.mT[:, None], low / J.shape[1])[:, 0]
            norms.append(torch.linalg.matrix_norm(inside @ J, 2))
        return torch.stack(norms).max()

    def right(self, case: Case) -> Tensor:
        low, high = spectrum(case)
        expression = self.bound(low * high / (low + high)) * case["J"][0].shape[1] / low
        return torch.tensor(expression, dtype=torch.float64)

    def bound(self, value: float) -> float:
        """The expression, of `lambda_max lambda M / (lambda M + lambda_max)`."""
        return math.sqrt(value)


class NormBoundCorrected(Identity, NormBound, name="fngd_norm_bound_corrected"):
    """Without the root the expression is the norm itself."""

    kind = EXTENSION
    latex = (
        r"\|\tilde J^\top (F + \lambda I)^{-1} \tilde J\| = \tfrac{1}{\lambda} "
        r"\tfrac{\lambda_{\max} \lambda M}{\lambda M + \lambda_{\max}}"
    )
    expected = HOLDS

    sides = ("norm", "corrected expression")
    compare = Identity.compare  # type: ignore[assignment]

    def bound(self, value: float) -> float:
        return value


class Lemma3(Claim, name="fngd_lemma_3_as_printed"):
    """The last inequality of Lemma 3: at any rate the sum of all steps stays below the radius."""

    source = "FNGD Lemma 3"
    latex = r"\tfrac{\eta}{\sqrt 2} \sum_{i \ge 0} (1 - \eta)^{i/2} < 1"
    expected = REFUTED
    sides = ("sum of the steps", "radius")
    factor = 1 / math.sqrt(2)
    compare = AtMost.compare
    scale = 1.0

    def draw(self, generator: torch.Generator, size: float) -> Case:
        return {"eta": log_uniform(generator, 0.01, 0.99), "terms": 20_000}

    def left(self, case: Case) -> Tensor:
        i = torch.arange(case["terms"], dtype=torch.float64)
        return case["eta"] * self.factor * ((1 - case["eta"]) ** (i / 2)).sum()

    def right(self, case: Case) -> float:
        return 1.0

    def smaller(self, case: Case) -> Iterator[Case]:
        if case["terms"] > 1:
            yield {**case, "terms": case["terms"] // 2}


class Lemma3Corrected(Lemma3, name="fngd_lemma_3_corrected"):
    """With one half in the place of one over root two the inequality of Lemma 3 is true."""

    kind = EXTENSION
    latex = r"\tfrac{\eta}{2} \sum_{i \ge 0} (1 - \eta)^{i/2} < 1"
    expected = HOLDS
    factor = 0.5
