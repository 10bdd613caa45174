"""Asymptotic natural gradient: its minimiser, its sphere, its inverse-free factors (ANG)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fisherlab.approximations.ifang import IFANG
from fisherlab.approximations.kfac import KFAC
from fisherlab.claims import dense
from fisherlab.claims.base import CONTRAST, REFUTED, AtMost, Case, Identity
from fisherlab.claims.instances import (
    OfLayer,
    OfNetwork,
    captured,
    criterion_of,
    layer_case,
    layer_of,
    log_uniform,
    model_of,
    without_one,
)
from fisherlab.optim.ang import ANG, CURVES, blended

POINTS = 5


def _damped_factors(case: Case, damping: float) -> tuple[Tensor, Tensor]:
    """`G + damping I` and `A + damping I` of KFAC, by their definition."""
    G, A = dense.kfac(case)
    return dense.shifted(G, damping), dense.shifted(A, damping)


class _Minimiser(OfLayer):
    """The quadratic (1): `-t.u + l1/2 u.Gu - l2/2 (u + t).G(u + t)`, `t = V[0]`, G damped KFAC."""

    source = "ANG Proposition 2"

    def point(self, case: Case) -> Tensor:
        """`((1/(l1 - l2)) G^{-1} + (l2/(l1 - l2)) I) t`."""
        t, l1, l2 = case["V"][0], case["l1"], case["l2"]
        inverse = KFAC(placement="factorwise").damped(KFAC()(captured(case)), case["damping"])
        return (inverse @ t + l2 * t) / (l1 - l2)

    def metric(self, case: Case) -> tuple[Tensor, Tensor]:
        """The damped factors, by their definition."""
        return _damped_factors(case, case["damping"])

    def objective(self, case: Case, u: Tensor) -> Tensor:
        """The value of (1) at `u`."""
        G, A = self.metric(case)
        t, l1, l2 = case["V"][0], case["l1"], case["l2"]
        ahead = u + t
        first, second = ((x * (G @ x @ A)).sum() for x in (u, ahead))
        return -(t * u).sum() + l1 / 2 * first - l2 / 2 * second

    def weights(self, generator: torch.Generator) -> tuple[float, float]:
        """`l1 > l2 > 0`."""
        low = log_uniform(generator, 0.1, 2.0)
        return low + log_uniform(generator, 0.1, 2.0), low

    def draw(self, generator: torch.Generator, size: float) -> Case:
        return self._weighted(layer_case(generator, size), generator)

    def adapt(self, real: Case, generator: torch.Generator) -> Case | None:
        case = super().adapt(real, generator)
        return None if case is None else self._weighted(case, generator)

    def _weighted(self, case: Case, generator: torch.Generator) -> Case:
        l1, l2 = self.weights(generator)
        return {**case, "damping": max(case["damping"], 0.05), "l1": l1, "l2": l2}


class Minimiser(_Minimiser, Identity, name="ang_point_is_the_minimiser"):
    """The combination of natural and Euclidean gradient minimises the regularised model (1)."""

    latex = (
        r"\arg\min_u (1) = (\tfrac{1}{\lambda_1 - \lambda_2} G^{-1} + "
        r"\tfrac{\lambda_2}{\lambda_1 - \lambda_2} I) t"
    )
    assumption = "lambda_1 > lambda_2 > 0 and G positive definite"
    outside = "ang_point_is_the_minimiser_for_any_weights"

    def assume(self, case: Case) -> bool:
        return case["l1"] > case["l2"] > 0

    def left(self, case: Case) -> Tensor:
        return self.point(case)

    def right(self, case: Case) -> Tensor:
        """From the gradient and the curvature of (1) itself: `(l1 - l2) G u A = t + l2 G t A`."""
        G, A = self.metric(case)
        zero = torch.zeros_like(case["V"][0], requires_grad=True)
        (slope,) = torch.autograd.grad(self.objective(case, zero), zero)
        inside = torch.linalg.solve(G, torch.linalg.solve(A, -slope, left=False))
        return inside / (case["l1"] - case["l2"])


class AnyWeights(_Minimiser, AtMost, name="ang_point_is_the_minimiser_for_any_weights"):
    """As printed, `lambda_1 > 0` and `lambda_2 > 0` is enough for the point to be the minimiser."""

    source = "ANG Propositions 1-2"
    latex = r"\lambda_1, \lambda_2 > 0 \Rightarrow (1)(u^*) \le (1)(u)\ \forall u"
    expected = REFUTED
    sides = ("value at the point", "best value near by")

    def weights(self, generator: torch.Generator) -> tuple[float, float]:
        return log_uniform(generator, 0.1, 2.0), log_uniform(generator, 0.1, 2.0)

    def left(self, case: Case) -> Tensor:
        return self.point(case)

    def right(self, case: Case) -> Tensor:
        """Rivals around the point, by its definition."""
        G, A = self.metric(case)
        t, l1, l2 = case["V"][0], case["l1"], case["l2"]
        inverse = torch.linalg.solve(G, torch.linalg.solve(A, t, left=False))
        return (inverse + l2 * t) / (l1 - l2) + torch.cat([case["V"], -case["V"][:1]])

    def values(self, case: Case) -> tuple[Tensor, Tensor]:
        rivals = torch.stack([self.objective(case, u) for u in self.right(case)])
        return self.objective(case, self.left(case)), rivals.min()


class _Blend(OfLayer):
    """Natural direction `d = G^{-1} t` and `t = -gradient`, blended at five points of the way."""

    source = "ANG Proposition 4"
    free = ("d", "t")
    floor = 0.01

    def draw(self, generator: torch.Generator, size: float) -> Case:
        return self._pair(layer_case(generator, size))

    def adapt(self, real: Case, generator: torch.Generator) -> Case | None:
        return self._pair(real)

    def metric(self, case: Case) -> tuple[Tensor, Tensor]:
        """The damped factors of a layer case."""
        return _damped_factors(case, max(case["damping"], self.floor))

    def _pair(self, case: Case) -> Case:
        G, A = self.metric(case)
        t = case["V"][0]
        d = torch.linalg.solve(G, torch.linalg.solve(A, t, left=False))
        return {"d": d.flatten(), "t": t.flatten()}

    def smaller(self, case: Case) -> Iterator[Case]:
        if len(case["d"]) > 2:
            for keep in without_one(len(case["d"])):
                yield {"d": case["d"][keep], "t": case["t"][keep]}

    def assume(self, case: Case) -> bool:
        # in between: the two do not point the same way, where any blend is a blend
        cosine = case["d"] @ case["t"] / (case["d"].norm() * case["t"].norm())
        return bool(0 < cosine < 0.999)

    @property
    def way(self) -> Tensor:
        """The points between 0 and 1."""
        return torch.linspace(0, 1, POINTS + 2, dtype=torch.float64)[1:-1]


class Sphere(_Blend, Identity, name="ang_blend_rotates_on_the_sphere"):
    """The spherical blend turns the natural direction towards the gradient at constant length."""

    latex = (
        r"\|\tfrac{\sin(1-\lambda)\Omega}{\sin\Omega} \hat d + "
        r"\tfrac{\sin\lambda\Omega}{\sin\Omega} \hat t\| = 1"
    )

    def left(self, case: Case) -> Tensor:
        return torch.stack([blended(case["d"], case["t"], float(s)) for s in self.way])

    def right(self, case: Case) -> Tensor:
        """A rotation in the plane of both, by the share `s` of the angle between them."""
        d, t = case["d"], case["t"]
        e = d / d.norm()
        across = t - (t @ e) * e
        angle = torch.atan2(across.norm(), t @ e)
        turned = self.way[:, None] * angle
        return d.norm() * (turned.cos() * e + turned.sin() * across / across.norm())


class Chord(_Blend, AtMost, name="ang_chord_is_shorter_than_the_sphere"):
    """The linear blend of two unit vectors is shorter than one, so it underestimates the step."""

    source = "ANG section 2.2"
    latex = r"\|(1-\lambda) \hat d + \lambda \hat t\| < 1"
    sides = ("longest chord point", "sphere")

    def left(self, case: Case) -> Tensor:
        d, t = (x / x.norm() for x in (case["d"], case["t"]))
        s = self.way[:, None]
        return ((1 - s) * d + s * t).norm(dim=1).max()

    def right(self, case: Case) -> Tensor:
        points = [blended(case["d"], case["t"], float(s)) for s in self.way]
        return torch.stack(points).norm(dim=1).min() / case["d"].norm()


class GNorm(_Blend, Identity, name="ang_blend_has_unit_length_in_the_g_norm"):
    """With `||t||_G = sqrt(t.G t)`, as the symbol says, the spherical blend has length one."""

    source = "ANG (4), (7)"
    latex = r"\|t\|_G = \sqrt{t^\top G t} \Rightarrow \|\text{blend}\| = 1"
    expected = REFUTED
    floor = 1.0

    def _pair(self, case: Case) -> Case:
        G, A = self.metric(case)
        t = case["V"][0]
        g_norm = (t * (G @ t @ A)).sum().sqrt()
        return {**super()._pair(case), "g_norm": g_norm}

    def smaller(self, case: Case) -> Iterator[Case]:
        return iter(())

    def assume(self, case: Case) -> bool:
        # an angle of its own, else there is nothing to blend
        cosine = case["d"] @ case["t"] / (case["g_norm"] * case["t"].norm())
        return super().assume(case) and bool(cosine < 0.999)

    def left(self, case: Case) -> Tensor:
        d, t = case["d"] / case["g_norm"], case["t"] / case["t"].norm()
        omega = (case["d"] @ t / case["g_norm"]).arccos()
        s = self.way[:, None]
        blend = (torch.sin((1 - s) * omega) * d + torch.sin(s * omega) * t) / torch.sin(omega)
        return blend.norm(dim=1)

    def right(self, case: Case) -> Tensor:
        return torch.ones(POINTS, dtype=torch.float64)


class Factors(OfLayer, Identity, name="ang_factors_by_a_scalar_inverse"):
    """The damped inverse of a factor of one mean row needs no more than the inverse of a scalar."""

    source = "ANG (13)"
    latex = (
        r"(\lambda I + \tilde a \tilde a^\top)^{-1} = \tfrac{1}{\lambda}(I - \tilde a "
        r"(\lambda + \tilde a^\top \tilde a)^{-1} \tilde a^\top)"
    )

    def draw(self, generator: torch.Generator, size: float) -> Case:
        return layer_case(generator, size, fisher_type="empirical")

    def left(self, case: Case) -> Tensor:
        return IFANG().damped(IFANG()(captured(case)), case["damping"]) @ case["V"]

    def right(self, case: Case) -> Tensor:
        # one mean row of inputs, and of gradients summed over positions
        a, g = case["a"].mean((0, 1)), case["g"][0].sum(1).mean(0)
        G, A = (dense.shifted(torch.outer(x, x), case["damping"]) for x in (g, a))
        return torch.linalg.inv(G) @ case["V"] @ torch.linalg.inv(A)


class PrintedFactors(Factors, name="ang_factors_as_printed"):
    """With reduced rows in the middle scalar alone, (11)-(12) invert the damped reduced factors."""

    source = "ANG (11)-(12)"
    latex = (
        r"(\lambda I + \tilde A^\top \tilde A)^{-1} = \tfrac{1}{\lambda} I - "
        r"\tfrac{1}{\lambda} A^\top (\lambda + \tilde A \tilde A^\top)^{-1} A"
    )
    expected = REFUTED

    def assume(self, case: Case) -> bool:
        return len(case["a"]) > 1

    def right(self, case: Case) -> Tensor:
        damping, found = case["damping"], []
        g = case["g"][0].sum(1)
        for rows in (g, case["a"].mean(1)):
            reduced = rows.mean(0)
            eye = torch.eye(rows.shape[1], dtype=rows.dtype)
            inside = rows.mT @ rows / (damping + reduced @ reduced)
            found.append((eye - inside) / damping)
        return found[0] @ case["V"] @ found[1]


class AngEnd(OfNetwork, Identity, name="ang_ends_as_sgd_up_to_a_layer_factor"):
    """The last step of ANG is the gradient's, times a factor of each layer's own."""

    source = "ANG (7)"
    latex = r"\lambda = 1 \Rightarrow u = (\|G^{-1} t\| / \|t\|) \, t"

    def left(self, case: Case) -> Tensor:
        model, criterion = model_of(case), criterion_of(case)
        name = layer_of(case)
        module: Any = model.get_submodule(name)
        optimizer = ANG(
            model, KFAC(), total_steps=2, criterion=criterion, lr=0.0, damping=0.1, momentum=0.0
        )
        for _ in range(2):
            # the first step has length zero and leaves the network as it is
            optimizer.zero_grad()
            criterion(model(case["x"]), case["y"]).backward()
            old = module.weight.detach().clone()
            if optimizer.steps == 1:
                optimizer.param_groups[0]["lr"] = 1.0
            optimizer.step()
        return (old - module.weight.detach()) / self.factor(optimizer, name)

    def factor(self, optimizer: ANG, name: str) -> float:
        """The length of the step over the length of the gradient."""
        assert CURVES["concave"](1.0) == 1.0
        return optimizer.factors[name]

    def right(self, case: Case) -> Tensor:
        gradient = dense.Layered(case).gradient() * len(case["x"])
        return gradient[:, :-1]


class AngIsSGD(AngEnd, name="ang_ends_as_sgd"):
    """The last step of ANG, which has the length of the natural gradient, is that of SGD."""

    source = "ANG abstract, (7)"
    kind = CONTRAST
    latex = r"\lambda = 1 \Rightarrow u = t"
    expected = REFUTED

    def factor(self, optimizer: ANG, name: str) -> float:
        return 1.0
