"""Statements on the natural gradient: small steps in KL divergence, in any coordinates (NGM)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.func import jacrev, vmap

from fisherlab.approximations.exact import Exact
from fisherlab.claims import dense
from fisherlab.claims.base import AtMost, Case, Order
from fisherlab.claims.instances import OfNetwork, network_case, normal, orthogonal, seen


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
        # scaled by the size of v alone, which both sides see
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
    """The natural step lowers the linearised loss most among small steps of equal KL divergence."""

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

    source = "NGM section 1"
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
