"""Statements on the Fisher matrix (NGM, and the precise readings)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fisherlab.approximations.exact import Exact
from fisherlab.claims import dense
from fisherlab.claims.base import CONTRAST, EXTENSION, REFUTED, Case, Identity
from fisherlab.claims.instances import (
    OfNetwork,
    criterion_of,
    labels,
    model_of,
    network_case,
    seen,
)


class _MeanScore(OfNetwork, Identity):
    """The length of a mean score against that of a typical one: one is zero beside the other."""

    sides = ("length of the mean score", "typical length of a score")

    def right(self, case: Case) -> Tensor:
        net = dense.Layered(case)
        total = torch.zeros((), dtype=torch.float64)
        for y, weight in labels(net.criterion, net.f):
            total += weight @ net.scores(y).square().sum(1)
        return (total / len(net.x)).sqrt()

    def compare(self, left: Tensor, right: Tensor) -> float:
        ratio = (left / right.clamp(min=1e-300)).item()
        return math.log10(self.tolerance / max(ratio, 1e-17))


class ScoreMean(_MeanScore, name="score_has_mean_zero"):
    """The score has expectation zero when the labels are drawn from the model."""

    source = "NGM (4)"
    latex = r"E_{y \sim p_\theta}[\nabla \log p_\theta(y|x)] = 0"

    def left(self, case: Case) -> Tensor:
        with torch.no_grad():
            f = model_of(case)(case["x"])
        total: Any = 0.0
        for y, weight in labels(case["criterion"], f):
            layer = seen({**case, "y": y}, "empirical")
            g = layer.output_gradients[0] * weight[:, None, None]
            total = total + torch.einsum("nto,nti->oi", g, layer.inputs) / len(f)
        return total.norm()


class ObservedScoreMean(_MeanScore, name="empirical_score_has_mean_zero"):
    """Taken to the observed labels, (4) still holds: their scores have mean zero."""

    source = "NGM (4), (7)"
    kind = EXTENSION
    latex = r"\frac{1}{M} \sum_n \nabla \log p_\theta(y_n|x_n) = 0"
    expected = REFUTED

    def left(self, case: Case) -> Tensor:
        return seen(case, "empirical").gradient.norm()


class _Matrix(OfNetwork, Identity):
    """The exact block of the captured layer times the probes."""

    fisher_type = "exact"

    def left(self, case: Case) -> Tensor:
        return Exact()(seen(case, self.fisher_type)) @ case["V"]


class OuterProduct(_Matrix, name="fisher_is_expected_outer_product"):
    """The exact Fisher is the expected outer product of scores with labels drawn from the model."""

    source = "NGM (6)"
    latex = r"F = E_{y \sim p_\theta}[\nabla \log p \, \nabla \log p^\top]"

    def right(self, case: Case) -> Tensor:
        return dense.Layered(case).expected_outer(case["V"])


class Empirical(_Matrix, name="empirical_fisher_is_fisher"):
    """The empirical Fisher, an estimate in (7) and an approximation in (37), equals the Fisher."""

    source = "NGM (7), (37)"
    kind = CONTRAST
    latex = r"\frac{1}{M} \sum_n \nabla \log p(y_n|x_n) \nabla \log p(y_n|x_n)^\top = F"
    expected = REFUTED
    fisher_type = "empirical"

    def right(self, case: Case) -> Tensor:
        return dense.Layered(case).expected_outer(case["V"])


class ExpectedHessian(_Matrix, name="fisher_is_minus_expected_hessian"):
    """The Fisher is minus the expected Hessian of the log-likelihood."""

    source = "NGM (8)"
    latex = r"F = -E_{y \sim p_\theta}[\nabla^2 \log p_\theta(y|x)]"

    def right(self, case: Case) -> Tensor:
        net = dense.Layered(case)
        return net.hessian_product(net.expected_loss, case["V"])


class HessianOfKL(_Matrix, name="fisher_is_hessian_of_kl"):
    """The Fisher is the Hessian of the KL divergence from the model to itself."""

    source = "NGM (13)"
    latex = r"F = \nabla^2_{\theta'} \mathrm{KL}(p_\theta \| p_{\theta'}) |_{\theta' = \theta}"

    def right(self, case: Case) -> Tensor:
        net = dense.Layered(case)
        return net.hessian_product(net.divergence, case["V"])


class GaussNewton(_Matrix, name="fisher_is_gauss_newton"):
    """The Fisher is the Gauss-Newton matrix of the softmax, squared and Bernoulli losses."""

    source = "NGM abstract, A.5.1"
    latex = r"F = \frac{1}{M} \sum_n J_n^\top (\nabla_f^2 \ell_n) J_n"

    def right(self, case: Case) -> Tensor:
        return dense.Layered(case).gauss_newton(case["V"])


class _MeanLoss(OfNetwork, Identity):
    """A loss that is a mean over the outputs of an example, `c = 1/C` of each term."""

    def draw(self, generator: torch.Generator, size: float) -> Case:
        return network_case(generator, size, criteria=("bernoulli", "squared_error"))

    def adapt(self, real: Case, generator: torch.Generator) -> Case | None:
        return super().adapt(real, generator) if real["criterion"] != "cross_entropy" else None

    def left(self, case: Case) -> Tensor:
        layer = seen(case, "exact", criterion=criterion_of(case, "mean"))
        return Exact()(layer) @ case["V"]


class FisherOfMean(_MeanLoss, name="exact_fisher_of_a_mean_loss"):
    """Where the loss averages over outputs, the exact Fisher is that of the averaged loss."""

    source = "NGM (8)"
    kind = EXTENSION
    latex = r"F = E[\nabla^2 \tfrac{1}{C} \sum_j \ell_j] = \tfrac{1}{C} E[\nabla^2 \sum_j \ell_j]"

    def right(self, case: Case) -> Tensor:
        net = dense.Layered(case)
        return net.hessian_product(net.expected_loss, case["V"]) / net.f.shape[1]


class ScoresOfMean(_MeanLoss, name="scores_of_a_mean_loss_give_its_fisher"):
    """Taken to a loss averaged over outputs, (6) still gives its Fisher from drawn labels."""

    source = "NGM (6)"
    kind = EXTENSION
    latex = (
        r"E[\nabla \bar\ell \, \nabla \bar\ell^\top] = E[\nabla^2 \bar\ell],\ \bar\ell = "
        r"\tfrac{1}{C} \sum_j \ell_j"
    )
    expected = REFUTED

    def right(self, case: Case) -> Tensor:
        net = dense.Layered(case)
        return net.expected_outer(case["V"], 1 / net.f.shape[1])
