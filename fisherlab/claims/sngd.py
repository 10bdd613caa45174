"""Structured natural gradient: Proposition 1, the refresh, and the two iterations (SNGD)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fisherlab.claims import dense
from fisherlab.claims.base import EXTENSION, REFUTED, Case, Claim, Identity, Order
from fisherlab.claims.instances import (
    ACTIVATIONS,
    OfNetwork,
    criterion_of,
    joint,
    layer_names,
    layer_of,
    log_uniform,
    model_of,
    network_case,
    normal,
    positive_definite,
    without_one,
)
from fisherlab.optim import reconstruct, refresh
from fisherlab.optim.roots import Roots, denman_beavers, newton_schulz
from fisherlab.optim.sngd import local_fishers

EPS = 1e-2


class _Reconstructed(OfNetwork):
    """A network with local Fisher layers, `G = nu A + eps I` of the batch at hand."""

    def draw(self, generator: torch.Generator, size: float) -> Case:
        return network_case(generator, size, examples=(3, 8))

    def adapt(self, real: Case, generator: torch.Generator) -> Case | None:
        return super().adapt(real, generator) if real["model"] == "mlp" else None

    def network(self, case: Case) -> nn.Module:
        """FisherLab's reconstructed network, refreshed once from the batch."""
        model = model_of(case)
        activations = {name: activation_after(case, name) for name in layer_names(case)}
        reconstruct(model, method="eigh", decay=0.0, eps=EPS, activations=activations)
        model.train()
        model(case["x"])
        model.eval()
        refresh(model)
        return model


def activation_after(case: Case, name: str) -> nn.Module | None:
    """The activation that a layer of the case's network feeds; None for the last."""
    if name == layer_names(case)[-1]:
        return None
    return ACTIVATIONS[case["activation"]]() if "activation" in case else nn.ReLU()


def local_fisher(case: Case, name: str) -> Tensor:
    """`nu A + eps tr(nu A) I` of one layer, from its inputs and pre-activations."""
    seen: list[tuple[Tensor, Tensor]] = []
    model = model_of(case)
    module = model.get_submodule(name)
    handle = module.register_forward_hook(lambda m, x, s: seen.append((x[0], s)))
    model(case["x"])
    handle.remove()
    x, s = (v.detach() for v in seen[0])
    rows = torch.cat([x.flatten(0, -2), torch.ones(x.flatten(0, -2).shape[0], 1).to(x)], 1)
    A = rows.mT @ rows / len(rows)
    activation = activation_after(case, name)
    slope = torch.ones_like(s)
    if activation is not None:
        # differences are exact enough for a mean, and share no autograd with the other side
        slope = (activation(s + 1e-5) - activation(s - 1e-5)) / 2e-5
    G = slope.mean() * A
    return dense.shifted(G, EPS * G.trace())


class Proposition1(_Reconstructed, Identity, name="sngd_step_is_a_natural_step"):
    """A gradient step on `w'` of the reconstructed network is a natural step on `W`, G fixed."""

    source = "SNGD Proposition 1"
    latex = (
        r"w' \leftarrow w' - \eta \nabla_{w'} \ell \iff W \leftarrow W - \eta \nabla_W "
        r"\ell \, G^{-1}"
    )
    assumption = "G is held fixed during the step"
    tolerance = 1e-6

    def left(self, case: Case) -> Tensor:
        model, name = self.network(case), layer_of(case)
        before = joint(model, name)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        criterion_of(case)(model(case["x"]), case["y"]).backward()
        optimizer.step()
        return before - joint(model, name)

    def right(self, case: Case) -> Tensor:
        gradient = dense.Layered(case).gradient() * len(case["x"])
        return torch.linalg.solve(local_fisher(case, layer_of(case)), gradient, left=False)


class Refresh(_Reconstructed, Identity, name="sngd_refresh_keeps_the_function"):
    """Refreshing G with `w' <- W G^{1/2}` (11) leaves the function of the network unchanged."""

    source = "SNGD (11)"
    latex = r"w' \leftarrow W G^{1/2} \Rightarrow f(w' G^{-1/2} x) = f(W x)"

    def left(self, case: Case) -> Tensor:
        return self.network(case)(case["x"]).detach()

    def right(self, case: Case) -> Tensor:
        return dense.Layered(case).f


class PrintedRefresh(_Reconstructed, Identity, name="sngd_refresh_as_printed"):
    """Step 3 of Algorithm 1, `w' <- W G^{-1/2}`, leaves the function of the network unchanged."""

    source = "SNGD Algorithm 1"
    latex = r"w' \leftarrow W G^{-1/2} \Rightarrow f(w' G^{-1/2} x) = f(W x)"
    expected = REFUTED

    @torch.no_grad()
    def left(self, case: Case) -> Tensor:
        model = self.network(case)
        for module, fisher in local_fishers(model).values():
            self.assign(module, fisher.inverse)
        return model(case["x"])

    def assign(self, module: Any, factor: Tensor) -> None:
        """`w' <- W factor`."""
        W = torch.cat([module.weight, module.bias[:, None]], 1) @ factor
        module.parametrizations.weight.original.copy_(W[:, :-1])
        module.parametrizations.bias.original.copy_(W[:, -1])

    def right(self, case: Case) -> Tensor:
        return dense.Layered(case).f


class _Roots(Claim):
    """`S^{1/2}` and `S^{-1/2}` of a positive definite matrix, by an iteration."""

    sides = ("iteration", "eigenvectors")
    condition = (2.0, 1e4)

    def draw(self, generator: torch.Generator, size: float) -> Case:
        n = 2 + round(6 * size)
        S = positive_definite(generator, n, log_uniform(generator, *self.condition))
        return {"S": self.units(generator) * S}

    def units(self, generator: torch.Generator) -> float:
        """The factor on all eigenvalues: a matter of the data's units."""
        return log_uniform(generator, 1e-3, 1e3)

    def adapt(self, real: Case, generator: torch.Generator) -> Case | None:
        a = real["a"].flatten(0, 1)
        S = a.mT @ a / len(a)
        return {"S": dense.shifted(S, 1e-3 * S.trace() / len(S))}

    @abstractmethod
    def roots(self, S: Tensor) -> Roots:
        """The iteration."""

    def left(self, case: Case) -> Tensor:
        found = self.roots(case["S"])
        scale = case["S"].norm().sqrt()
        return torch.stack([found.root / scale, found.inverse * scale])

    def right(self, case: Case) -> Tensor:
        scale = case["S"].norm().sqrt()
        return torch.stack(
            [dense.root(case["S"], 0.5) / scale, dense.root(case["S"], -0.5) * scale]
        )


class NewtonSchulz(_Roots, Identity, name="newton_schulz_converges"):
    """With A scaled to length one, Newton-Schulz converges to the roots of A and its inverse."""

    source = "SNGD (15)"
    kind = EXTENSION
    latex = r"\sqrt{\|A\|} \, Y_k \to A^{1/2},\quad Z_k / \sqrt{\|A\|} \to A^{-1/2}"
    tolerance = 1e-7

    def roots(self, S: Tensor) -> Roots:
        return newton_schulz(S)


class DenmanBeavers(_Roots, Identity, name="denman_beavers_converges"):
    """The Denman-Beavers iteration converges to the roots of A and its inverse."""

    source = "SNGD (14)"
    latex = r"Y_k \to A^{1/2},\quad Z_k \to A^{-1/2}"
    tolerance = 1e-7

    def roots(self, S: Tensor) -> Roots:
        return denman_beavers(S)


class BelowThree(_Roots, Identity, name="newton_schulz_without_scaling_below_three"):
    """Without scaling Newton-Schulz converges where all eigenvalues are in (0, 3)."""

    source = "SNGD (15)"
    latex = r"\lambda(A) \subset (0, 3) \Rightarrow Y_k \to A^{1/2}"
    assumption = "all eigenvalues below 3"
    outside = "newton_schulz_without_scaling"
    tolerance = 1e-7
    condition = (2.0, 50.0)

    def units(self, generator: torch.Generator) -> float:
        return log_uniform(generator, 0.3, 2.9)

    def assume(self, case: Case) -> bool:
        return bool(torch.linalg.eigvalsh(case["S"])[-1] < 3)

    def roots(self, S: Tensor) -> Roots:
        return newton_schulz(S, scale=False)


class Unscaled(_Roots, Identity, name="newton_schulz_without_scaling"):
    """As printed, without scaling A, Newton-Schulz converges to the roots."""

    source = "SNGD (15)"
    latex = r"Y_0 = A,\ Z_0 = I \Rightarrow Y_k \to A^{1/2}"
    expected = REFUTED
    tolerance = 1e-7
    free = ("S",)

    def roots(self, S: Tensor) -> Roots:
        return newton_schulz(S, scale=False)

    def assume(self, case: Case) -> bool:
        S = case["S"]
        return bool((S - S.mT).norm() <= 1e-12 * S.norm() and torch.linalg.eigvalsh(S)[0] > 0)

    def smaller(self, case: Case) -> Iterator[Case]:
        for keep in without_one(len(case["S"])):
            yield {"S": case["S"][keep][:, keep]}


class QuadraticNewtonSchulz(Order, name="newton_schulz_is_quadratic"):
    """Near the roots the residual `||I - Z Y||` after an iteration is the square of that before."""

    latex = r"\|I - Z_{k+1} Y_{k+1}\| = O(\|I - Z_k Y_k\|^2)"
    order = 2.0
    source = "SNGD (15)"
    kind = EXTENSION
    sides = ("residual", "zero")

    def draw(self, generator: torch.Generator, size: float) -> Case:
        n = 2 + round(6 * size)
        E = normal(generator, n, n)
        return {"E": (E + E.mT) / (E + E.mT).norm()}

    def left(self, case: Case) -> Tensor:
        E = case["E"]
        eye = torch.eye(len(E), dtype=E.dtype)
        steps = 0.05 * 0.5 ** torch.arange(6, dtype=torch.float64)
        runs = [newton_schulz(eye + e * E, 1e-30, 2, scale=False) for e in steps]
        return torch.tensor([run.residuals[1] for run in runs], dtype=torch.float64)

    def right(self, case: Case) -> Tensor:
        return torch.zeros(6, dtype=torch.float64)
