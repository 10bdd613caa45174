"""What the Fisher matrix is, and what the natural gradient does (NGM, and the precise readings)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jacrev, vmap

from fisherlab.approximations.exact import Exact
from fisherlab.claims import dense
from fisherlab.claims.base import REFUTED, AtMost, Case, Identity, Order
from fisherlab.claims.instances import (
    OfLayer,
    OfNetwork,
    captured,
    criterion_of,
    labels,
    layer_of,
    model_of,
    network_case,
    normal,
    orthogonal,
    seen,
)
from fisherlab.extract import capture
from fisherlab.optim import create


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
    """The score has mean zero at the observed labels too: the empirical Fisher is centred."""

    source = "NGM (7)"
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
    """The empirical Fisher, with the observed labels, is the Fisher."""

    source = "NGM (7)"
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

    source = "NGM section 2"
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

    source = "NGM (8), details 2"
    latex = r"F = E[\nabla^2 \tfrac{1}{C} \sum_j \ell_j] = \tfrac{1}{C} E[\nabla^2 \sum_j \ell_j]"

    def right(self, case: Case) -> Tensor:
        net = dense.Layered(case)
        return net.hessian_product(net.expected_loss, case["V"]) / net.f.shape[1]


class ScoresOfMean(_MeanLoss, name="scores_of_a_mean_loss_give_its_fisher"):
    """Gradients of a loss averaged over outputs, at drawn labels, give the Fisher of that loss."""

    source = "NGM (6), trap A19"
    latex = (
        r"E[\nabla \bar\ell \, \nabla \bar\ell^\top] = E[\nabla^2 \bar\ell],\ \bar\ell = "
        r"\tfrac{1}{C} \sum_j \ell_j"
    )
    expected = REFUTED

    def right(self, case: Case) -> Tensor:
        net = dense.Layered(case)
        return net.expected_outer(case["V"], 1 / net.f.shape[1])


class SecondOrderKL(OfNetwork, Order, name="kl_is_quadratic_to_second_order"):
    """The KL divergence of a small step is half its Fisher norm, up to third order."""

    source = "NGM (14)"
    latex = (
        r"\mathrm{KL}(p_\theta \| p_{\theta + \epsilon v}) = \tfrac{1}{2} \epsilon^2 "
        r"v^\top F v + O(\epsilon^3)"
    )
    order = 3.0
    assumption = (
        "the third derivative does not vanish, as it does for a linear map and squared error"
    )
    free = ()
    start = 1e-2

    def _steps(self, case: Case) -> Tensor:
        # by the size of v alone, which both sides see
        return self.start / case["V"][0].norm() * 0.5 ** torch.arange(6, dtype=torch.float64)

    def draw(self, generator: torch.Generator, size: float) -> Case:
        return network_case(generator, size, examples=(2, 6), criteria=("cross_entropy",))

    def assume(self, case: Case) -> bool:
        net = dense.Layered(case)
        v = case["V"][0].flatten() / case["V"][0].norm()
        cubic, quartic = torch.zeros(2, dtype=torch.float64)
        for sign in (1, -1):
            value = net.divergence(net.theta + sign * 0.1 * v).detach()
            cubic += sign * value / 2
            quartic += value / 2
        return bool(cubic.abs() > 0.02 * quartic)

    def left(self, case: Case) -> Tensor:
        v = case["V"][0]
        return self._steps(case).square() / 2 * Exact()(seen(case, "exact")).quadratic(v)

    def right(self, case: Case) -> Tensor:
        net, v = dense.Layered(case), case["V"][0].flatten()
        steps = self._steps(case)
        return torch.stack([net.divergence(net.theta + e * v).detach() for e in steps])


class SteepestDescent(OfNetwork, AtMost, name="natural_gradient_is_steepest_in_kl"):
    """Of all small steps of equal KL divergence the natural one lowers the linearised loss most."""

    source = "NGM (15)-(18)"
    latex = (
        r"-F^{-1} \nabla L \propto \arg\min_{d:\, \mathrm{KL}(\theta, \theta + d) = c} "
        r"\nabla L^\top d"
    )
    sides = ("natural gradient", "best of the other directions")
    assumption = "F is well conditioned on its range: a small KL divergence is a small step"
    noise = 1e-4
    radius = 1e-10
    free = ()

    def assume(self, case: Case) -> bool:
        values = torch.linalg.eigvalsh(self._metric(dense.Layered(case)))
        inside = values[values > 1e-10 * values[-1]]
        return bool(inside[0] > 1e-4 * inside[-1])

    def _metric(self, net: dense.Layered) -> Tensor:
        eye = torch.eye(net.theta.numel(), dtype=torch.float64).view(-1, *net.shape)
        return net.hessian_product(net.divergence, eye).flatten(1)

    def _lowered(self, case: Case, directions: Tensor) -> Tensor:
        """The change of the linearised loss along each direction at KL divergence `radius`."""
        net = dense.Layered(case)
        unit = directions.flatten(1) / directions.flatten(1).norm(dim=1, keepdim=True)
        sizes = torch.full((len(unit), 1), 1e-5, dtype=torch.float64)
        for _ in range(12):
            values = vmap(net.divergence)(net.theta + sizes * unit)[:, None].clamp(min=1e-22)
            sizes = sizes * (self.radius / values).sqrt().clamp(max=1e3)
        return sizes[:, 0] * (unit @ net.gradient().flatten())

    def left(self, case: Case) -> Tensor:
        layer = seen(case, "exact")
        values, vectors = Exact()(layer).leading(layer.gradient.numel())
        kept = values > 1e-10 * values[0]
        # the inverse on the range of F: all else has no KL divergence, and no gradient
        inside = (vectors[kept] * layer.gradient).sum((1, 2)) / values[kept]
        return -torch.einsum("k,koi->oi", inside, vectors[kept])

    def right(self, case: Case) -> Tensor:
        """Rivals: the gradient, the diagonal's step, and random ones, some near the optimum."""
        net = dense.Layered(case)
        g, H = net.gradient(), self._metric(net)
        values, Q = torch.linalg.eigh(H)
        kept = values > 1e-8 * values[-1]
        optimum = -(Q[:, kept] / values[kept]) @ (Q[:, kept].mT @ g.flatten())
        generator = torch.Generator().manual_seed(0)
        noise = normal(generator, 12, *g.shape)
        near = optimum.view_as(g) + 0.3 * noise[:6] * optimum.norm() / math.sqrt(g.numel())
        diagonal = -g / (H.diagonal().view_as(g) + 1e-12)
        away = -noise[6:] * (noise[6:] * g).sum((1, 2), keepdim=True).sign()
        return torch.cat([-g[None], diagonal[None], near, away])

    def adapt(self, real: Case, generator: torch.Generator) -> Case | None:
        return super().adapt(real, generator) if real["V"][0].numel() <= 700 else None

    def values(self, case: Case) -> tuple[Tensor, Tensor]:
        rivals = self._lowered(case, self.right(case)).min()
        return self._lowered(case, self.left(case)[None])[0], rivals


class Reparameterised(OfNetwork, Order, name="natural_gradient_is_invariant_to_first_order"):
    """In other smooth coordinates a natural step of size e ends within O(e^2) of the same place."""

    source = "NGM section 2.3"
    latex = (
        r"h(\phi - \epsilon F_\phi^{-1} \nabla_\phi L) = \theta - \epsilon F_\theta^{-1} "
        r"\nabla_\theta L + O(\epsilon^2)"
    )
    assumption = "F is invertible: at least as many output gradients as parameters"
    order = 2.0
    start = 1e-2
    free = ()

    def draw(self, generator: torch.Generator, size: float) -> Case:
        case = network_case(
            generator, size, examples=(8, 10), positions=1, criteria=("squared_error",)
        )
        case["layer"] = len(case["weights"]) - 2
        case["V"] = normal(generator, 3, *case["weights"][case["layer"]].shape)
        case["mixing"] = orthogonal(generator, case["V"][0].numel())
        return case

    def adapt(self, real: Case, generator: torch.Generator) -> Case | None:
        return None

    def assume(self, case: Case) -> bool:
        net = dense.Layered(case)
        eye = torch.eye(net.theta.numel(), dtype=torch.float64).view(-1, *net.shape)
        values = torch.linalg.eigvalsh(net.gauss_newton(eye).flatten(1))
        return bool(values[0] > 1e-3 * values[-1])

    def _steps(self) -> Tensor:
        return self.start * 0.5 ** torch.arange(6, dtype=torch.float64)

    def left(self, case: Case) -> Tensor:
        layer = seen(case, "exact")
        direction = Exact()(layer).power(-1, 0.0) @ layer.gradient
        unit = direction.norm()
        return case["weights"][case["layer"]] - self._steps()[:, None, None] * direction / unit

    def right(self, case: Case) -> Tensor:
        """theta = Q sinh(phi): gradient, Jacobian and Fisher matrix all taken in phi."""
        net, Q = dense.Layered(case), case["mixing"]
        phi = torch.asinh(Q.mT @ net.theta)

        def outputs(phi: Tensor) -> Tensor:
            return net.outputs(Q @ phi.sinh())

        J = jacrev(outputs)(phi)
        F = 2 * torch.einsum("nca,ncb->ab", J, J) / len(net.x)
        g = 2 * torch.einsum("nca,nc->a", J, net.f - net.y) / len(net.x)
        step = torch.linalg.solve(F, g)
        # the same length of step in theta, so that both sides walk at one speed
        unit = (Q @ (phi.cosh() * step)).norm()
        ends = [Q @ (phi - e * step / unit).sinh() for e in self._steps()]
        return torch.stack(ends).view(-1, *net.shape)


class Woodbury(OfLayer, Identity, name="woodbury_step_is_dense_step"):
    """The damped natural step from the Gram matrix of the examples is that of the dense block."""

    source = "NGM (28), FNGD (7)-(9)"
    latex = (
        r"\tfrac{1}{\lambda}(v - U(M \lambda I + U^\top U)^{-1} U^\top v) = (F + \lambda I)^{-1} v"
    )

    def left(self, case: Case) -> Tensor:
        return Exact()(captured(case)).solve(case["V"], case["damping"])

    def right(self, case: Case) -> Tensor:
        return dense.damped_solve(case, case["damping"], case["V"])


class Tengrad(OfNetwork, Identity, name="tengrad_step_is_dense_blockwise_step"):
    """A step of TENGraD is the damped natural step of the layer's dense empirical block."""

    source = "NGM (36)-(43)"
    latex = r"U(M \lambda I + U^\top U)^{-1} 1 = (F + \lambda I)^{-1} g"
    optimizer = "tengrad"
    layerwise = True

    def left(self, case: Case) -> Tensor:
        model, criterion = model_of(case), criterion_of(case, "mean")
        # without momentum or clipping: the step itself
        options = {"lr": 1.0, "damping": case["damping"], "momentum": 0.0, "kl_clip": None}
        optimizer = create(self.optimizer, model, criterion=criterion, **options)
        names = [layer_of(case)] if self.layerwise else layer_names(case)
        old = {name: joint(model, name) for name in names}
        criterion(model(case["x"]), case["y"]).backward()
        optimizer.step()
        return torch.cat([(old[name] - joint(model, name)).flatten() for name in names])

    def right(self, case: Case) -> Tensor:
        names = [layer_of(case)] if self.layerwise else layer_names(case)
        # a mean over C outputs is 1/C of the log-likelihood
        c = 1.0 if case["criterion"] == "cross_entropy" else 1.0 / case["y"][0].numel()
        scores = [c * dense.Layered(case, name).scores(case["y"]) for name in names]
        U = torch.cat(scores, 1)
        return _solve(U, case["damping"], -U.mean(0))


class JointStep(Tengrad, name="joint_ngd_from_summed_gram_matrices"):
    """The natural step over all layers jointly needs only the sum of the layers' Gram matrices."""

    source = "NGM (9), (28)"
    latex = (
        r"(F + \lambda I)^{-1} g = \tfrac{1}{\lambda}(g - U(M\lambda I + \textstyle\sum_l "
        r"K_l)^{-1} U^\top g)"
    )
    optimizer = "ngd"
    layerwise = False


class BlockMass(OfNetwork, Identity, name="mass_off_the_block_diagonal"):
    """The share of the Fisher outside the layers' blocks is 1 - sum ||K_l||^2 / ||sum K_l||^2."""

    source = "NGM section 3, methods 2"
    latex = r"1 - \textstyle\sum_l \|F_{ll}\|^2 / \|F\|^2 = 1 - \sum_l \|K_l\|^2 / \|\sum_l K_l\|^2"

    def adapt(self, real: Case, generator: torch.Generator) -> Case | None:
        numbers = sum(value.numel() for value in real["state"].values())
        return super().adapt(real, generator) if numbers <= 3000 else None

    def left(self, case: Case) -> Tensor:
        arguments = (model_of(case), criterion_of(case), case["x"], case["y"])
        found = capture(*arguments, fisher_type="empirical")
        K = torch.stack([Exact()(layer).gram() for layer in found.values()])
        return 1 - K.square().sum() / K.sum(0).square().sum()

    def right(self, case: Case) -> Tensor:
        U = [dense.Layered(case, name).scores(case["y"]) for name in layer_names(case)]
        F = torch.cat(U, 1).mT @ torch.cat(U, 1)
        return 1 - sum((u.mT @ u).square().sum() for u in U) / F.square().sum()


def layer_names(case: Case) -> list[str]:
    """Every layer of the case's network."""
    return [n for n, m in model_of(case).named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]


def joint(model: nn.Module, name: str) -> Tensor:
    """`[weight | bias]` of a layer."""
    module: Any = model.get_submodule(name)
    weight = module.weight.detach().flatten(1)
    return weight if module.bias is None else torch.cat([weight, module.bias.detach()[:, None]], 1)


def _solve(U: Tensor, damping: float, v: Tensor) -> Tensor:
    """`(U^T U / M + damping I)^{-1} v` for rows `U` `[M, N]`, dense or by the SVD of `U`."""
    case = {"a": U[:, None, :], "g": torch.ones(1, len(U), 1, 1, dtype=U.dtype)}
    return dense.damped_solve(case, damping, v[None, None])[0, 0]
