"""Where Kronecker products are one another, the block itself, or the best there is (TEKFAC)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fisherlab.approximations.kfac import KFAC
from fisherlab.approximations.kronecker_optimal import KroneckerOptimal
from fisherlab.approximations.shampoo import Shampoo
from fisherlab.approximations.tkfac import TKFAC
from fisherlab.blocks import Kronecker
from fisherlab.claims import dense
from fisherlab.claims.base import CONTRAST, EXTENSION, REFUTED, AtMost, Case, Identity
from fisherlab.claims.instances import (
    OfLayer,
    captured,
    integer,
    layer_case,
    network_case,
    normal,
    seen,
)
from fisherlab.claims.tekfac import error_of


class OptimalBound(OfLayer, AtMost, name="optimal_kronecker_product_is_a_lower_bound"):
    """No Kronecker product is nearer to the block than the leading term of its rearrangement."""

    source = "TEKFAC (2.8); Van Loan and Pitsianis 1993"
    kind = EXTENSION
    latex = (
        r"\min_{G, A} \|F - G \otimes A\|_F \le \|F - X\|_F,\ X \in \{\mathrm{KFAC}, "
        r"\mathrm{TKFAC}, \dots\}"
    )
    scale = 1.0
    noise = 1e-6
    sides = ("optimal", "best of the others")

    def left(self, case: Case) -> float:
        return error_of(KroneckerOptimal(), case)

    def right(self, case: Case) -> float:
        L, R = dense.moments(case)
        rivals = [dense.kfac(case), dense.tkfac(case), (dense.root(L, 0.5), dense.root(R, 0.5))]
        return min(dense.product_error(case, *self.scaled(case, *pair)) for pair in rivals)

    def scaled(self, case: Case, G: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
        """The product at its best scale, so that no rival loses by its scale alone."""
        D = dense.gradients(case)
        size = (G.norm() * A.norm()).square().clamp(min=1e-300)
        return G * (torch.matmul(G @ D, A) * D).sum() / len(case["a"]) / size, A

    def draw(self, generator: torch.Generator, size: float) -> Case:
        return layer_case(generator, size, examples=(3, 8))


class OptimalSVD(OfLayer, Identity, name="optimal_kronecker_product_is_a_singular_vector"):
    """The optimal product's error is all singular values of the rearranged block but the first."""

    source = "TEKFAC (2.8); Van Loan and Pitsianis 1993"
    kind = EXTENSION
    latex = r"\|F - G \otimes A\|_F^2 = \sum_{k \ge 2} \sigma_k(\mathcal{R}(F))^2"
    tolerance = 1e-5

    def adapt(self, real: Case, generator: torch.Generator) -> Case | None:
        return None if real["V"][0].numel() > 700 else super().adapt(real, generator)

    def draw(self, generator: torch.Generator, size: float) -> Case:
        return layer_case(generator, size, examples=(3, 8))

    def left(self, case: Case) -> Tensor:
        # 1 - error^2 is compared: the error itself may be zero
        return torch.tensor(1 - error_of(KroneckerOptimal(), case) ** 2, dtype=torch.float64)

    def right(self, case: Case) -> Tensor:
        values = torch.linalg.svdvals(dense.rearranged(case)).square()
        return values[0] / values.sum()


class ShampooSquared(OfLayer, Identity, name="tkfac_is_shampoo_squared"):
    """TKFAC with partial traces is the squared form of per-example Shampoo, for every T."""

    source = "TEKFAC (2.10)"
    kind = EXTENSION
    latex = r"\sigma \Psi \otimes \Phi = L \otimes R / \mathrm{tr} L"

    def left(self, case: Case) -> Tensor:
        products = [X(captured(case)) @ case["V"] for X in (TKFAC(), Shampoo(form="squared"))]
        return torch.stack(products)

    def right(self, case: Case) -> Tensor:
        L, R = dense.moments(case)
        product = L @ case["V"] @ R / L.trace()
        return torch.stack([product, product])


class LiteralTkfac(OfLayer, Identity, name="tkfac_as_printed_is_partial_traces"):
    """For one position the factors (2.10) are the partial traces of the block."""

    source = "TEKFAC (2.10)"
    kind = EXTENSION
    latex = r"\Phi = E[\mathrm{tr}\Gamma \, \Lambda] / E[\mathrm{tr}\Lambda \, \mathrm{tr}\Gamma]"
    assumption = "one position (T = 1)"
    outside = "tkfac_of_summed_positions_keeps_the_trace"

    def draw(self, generator: torch.Generator, size: float) -> Case:
        return layer_case(generator, size, positions=1)

    def assume(self, case: Case) -> bool:
        return case["a"].shape[1] == 1

    def left(self, case: Case) -> Tensor:
        return TKFAC()(captured(case)) @ case["V"]

    def right(self, case: Case) -> Tensor:
        Lambda = torch.einsum("nti,ntj->nij", case["a"], case["a"])
        Gamma = torch.einsum("mnto,mntp->nop", case["g"], case["g"])
        inputs, outputs = (torch.einsum("nii->n", X) for X in (Lambda, Gamma))
        sigma = (inputs * outputs).mean()
        Phi = (outputs[:, None, None] * Lambda).mean(0) / sigma
        Psi = (inputs[:, None, None] * Gamma).mean(0) / sigma
        return sigma * Psi @ case["V"] @ Phi


class HalfSteps(OfLayer, Identity, name="tkfac_is_the_first_step_to_the_optimum"):
    """TKFAC's factors are the two half-steps of the optimum's power iteration from the identity."""

    source = "TEKFAC (2.10)"
    kind = EXTENSION
    latex = (
        r"\mathrm{vec} L = \mathcal{R}(F) \mathrm{vec} I,\quad \mathrm{vec} R = "
        r"\mathcal{R}(F)^\top \mathrm{vec} I"
    )

    def adapt(self, real: Case, generator: torch.Generator) -> Case | None:
        return None if real["V"][0].numel() > 1500 else super().adapt(real, generator)

    def left(self, case: Case) -> Tensor:
        X = TKFAC()(captured(case))
        assert isinstance(X, Kronecker)
        return torch.cat([side.flatten() / side.trace() for side in (X.G, X.A)])

    def right(self, case: Case) -> Tensor:
        R = dense.rearranged(case)
        o, i = case["V"].shape[1:]
        L = R @ torch.eye(i, dtype=R.dtype).flatten()
        A = R.mT @ torch.eye(o, dtype=R.dtype).flatten()
        traces = [X.view(n, n).trace() for X, n in ((L, o), (A, i))]
        return torch.cat([L / traces[0], A / traces[1]])


class Uncorrelated(OfLayer, Identity, name="kfac_is_tkfac_when_uncorrelated"):
    """KFAC is TKFAC, scale included, when each trace is uncorrelated with the other's factor."""

    source = "TEKFAC section 2.4"
    kind = EXTENSION
    latex = (
        r"\mathrm{cov}(\mathrm{tr}\Gamma, \Lambda) = \mathrm{cov}(\mathrm{tr}\Lambda, "
        r"\Gamma) = 0 \Rightarrow G \otimes A = \sigma \Psi \otimes \Phi"
    )
    assumption = "one position; tr Gamma uncorrelated with Lambda and tr Lambda with Gamma"
    outside = "kfac_is_tkfac_when_one_is_uncorrelated"
    free: ClassVar[tuple[str, ...]] = ()

    def draw(self, generator: torch.Generator, size: float) -> Case:
        """Every input with every output gradient, so that nothing is correlated."""
        o, i = integer(generator, 2, 4, size), integer(generator, 2, 4, size)
        a, g = normal(generator, 3, i), normal(generator, 4, o)
        return {
            "a": a.repeat_interleave(4, 0)[:, None],
            "g": g.repeat(3, 1)[None, :, None],
            "V": normal(generator, 3, o, i),
        }

    def adapt(self, real: Case, generator: torch.Generator) -> Case | None:
        return None

    def left(self, case: Case) -> Tensor:
        return KFAC()(captured(case)) @ case["V"]

    def right(self, case: Case) -> Tensor:
        G, A = dense.tkfac(case)
        return G @ case["V"] @ A


class OneUncorrelated(Uncorrelated, name="kfac_is_tkfac_when_one_is_uncorrelated"):
    """One of the two conditions is enough for KFAC to be TKFAC up to scale."""

    latex = (
        r"\mathrm{cov}(\mathrm{tr}\Gamma, \Lambda) = 0 \Rightarrow G \otimes A \propto "
        r"\Psi \otimes \Phi"
    )
    expected = REFUTED
    assumption = "one position; output gradients of length one"
    outside = ""
    free = ("a", "g")

    def draw(self, generator: torch.Generator, size: float) -> Case:
        case = layer_case(generator, size, positions=1, fisher_type="empirical")
        return {**case, "g": case["g"] / case["g"].norm(dim=-1, keepdim=True)}

    def assume(self, case: Case) -> bool:
        return bool(torch.allclose(case["g"].norm(dim=-1), torch.ones(1, dtype=torch.float64)))

    def compare(self, left: Tensor, right: Tensor) -> float:
        scale = (left * right).sum() / left.square().sum()
        return super().compare(scale * left, right)


class LinearNetwork(OfLayer, Identity, name="kfac_is_exact_for_linear_networks"):
    """KFAC of the exact Fisher is the exact block of a deep linear network with squared error."""

    source = "TEKFAC (2.4)"
    kind = EXTENSION
    latex = r"f = W_L \cdots W_1 x,\ \ell = \|f - y\|^2 \Rightarrow F = G \otimes A"
    assumption = "no activation, squared error, exact Fisher, one position"
    outside = "kfac_is_exact_for_networks"
    activations = ("identity",)
    free: ClassVar[tuple[str, ...]] = ()

    def draw(self, generator: torch.Generator, size: float) -> Case:
        case = network_case(
            generator,
            size,
            examples=(3, 8),
            positions=1,
            criteria=("squared_error",),
            activations=self.activations,
        )
        layer = seen({**case, "layer": 0}, "exact")
        a, g = layer.inputs, layer.output_gradients
        V = normal(generator, 3, g.shape[-1], a.shape[-1])
        return {"a": a, "g": g, "V": V}

    def adapt(self, real: Case, generator: torch.Generator) -> Case | None:
        return None

    def left(self, case: Case) -> Tensor:
        return KFAC()(captured(case)) @ case["V"]

    def right(self, case: Case) -> Tensor:
        return dense.block_product(case, case["V"])


class NonlinearNetwork(LinearNetwork, name="kfac_is_exact_for_networks"):
    """KFAC, an approximation in (2.4), equals the exact block of a network with tanh units."""

    kind = CONTRAST
    expected = REFUTED
    latex = r"F = G \otimes A"
    assumption = "squared error, exact Fisher, one position"
    outside = ""
    activations = ("tanh",)
    free = ("a", "g")


class OneExample(OfLayer, Identity, name="kfac_and_tkfac_are_exact_for_one_example"):
    """For one example and one position KFAC and TKFAC are both the exact block."""

    source = "TEKFAC (2.4)"
    kind = EXTENSION
    latex = r"M = T = 1 \Rightarrow G \otimes A = \sigma \Psi \otimes \Phi = F"
    assumption = "one example, one position"

    def draw(self, generator: torch.Generator, size: float) -> Case:
        return layer_case(generator, size, examples=(1, 1), positions=1)

    def adapt(self, real: Case, generator: torch.Generator) -> Case | None:
        if real["a"].shape[1] > 1:
            return None
        real = {**real, "a": real["a"][:1], "g": real["g"][:, :1]}
        return super().adapt(real, generator)

    def assume(self, case: Case) -> bool:
        return case["a"].shape[:2] == (1, 1)

    def left(self, case: Case) -> Tensor:
        return torch.stack([X(captured(case)) @ case["V"] for X in (KFAC(), TKFAC())])

    def right(self, case: Case) -> Tensor:
        product = dense.block_product(case, case["V"])
        return torch.stack([product, product])
