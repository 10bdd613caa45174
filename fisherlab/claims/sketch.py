"""Nystrom blocks: below F, near it by the tail of its spectrum, and good preconditioners."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fisherlab.approximations.exact import Exact
from fisherlab.approximations.nystrom import Nystrom, directions
from fisherlab.claims import dense
from fisherlab.claims.base import EXTENSION, REFUTED, AtMost, Case, Identity
from fisherlab.claims.instances import OfLayer, captured, integer, layer_case, normal

# Draws of the random directions, whose mean the bounds speak of.
DRAWS = 6


class NystromBelow(OfLayer, Identity, name="nystrom_is_never_above_the_block"):
    """The block less Nystrom's is what a projection leaves of F, and so is never negative."""

    source = "Nystrom, Frangella et al. 2023, section 2"
    latex = r"F - X = R^\top (I - P) R \ge 0,\ F = R^\top R,\ P\ \mathrm{onto}\ R W"
    tolerance = 1e-6
    rank = 3

    def draw(self, generator: torch.Generator, size: float) -> Case:
        return self._directed(layer_case(generator, max(size, 0.5), examples=(4, 8)))

    def adapt(self, real: Case, generator: torch.Generator) -> Case | None:
        case = super().adapt(real, generator)
        return None if case is None or case["V"][0].numel() > 700 else self._directed(case)

    def _directed(self, case: Case) -> Case:
        return {**case, "W": directions(case["V"].shape[1:], self.rank, 0)}

    def assume(self, case: Case) -> bool:
        """Whether more than rounding is left: the block has a higher rank than the sketch."""
        values = torch.linalg.svdvals(dense.gradients(case).flatten(1))
        return len(values) > self.rank and bool(values[self.rank] > 1e-3 * values[0])

    def smaller(self, case: Case) -> Iterator[Case]:
        # the directions stay
        return (x for x in super().smaller(case) if x["V"].shape == case["V"].shape)

    def left(self, case: Case) -> Tensor:
        layer = captured(case)
        return Exact()(layer) @ case["V"] - Nystrom(self.rank)(layer) @ case["V"]

    def right(self, case: Case) -> Tensor:
        R = dense.gradients(case).flatten(1) / math.sqrt(len(case["a"]))
        Q, _ = torch.linalg.qr(R @ case["W"].flatten(1).mT)
        of_V = R @ case["V"].flatten(1).mT
        return (R.mT @ (of_V - Q @ (Q.mT @ of_V))).mT.view_as(case["V"])


def falling(generator: torch.Generator, size: float) -> Case:
    """A layer case without positions, whose spectrum falls fast: inputs and gradients do."""
    i, o = (integer(generator, 3, 5, size) for _ in range(2))
    n = i * o
    a, g = (
        normal(generator, n, d) * torch.logspace(0, -1.5, d, dtype=torch.float64) for d in (i, o)
    )
    return {"a": a[:, None], "g": g[None, :, None], "V": normal(generator, 1, o, i)}


class NystromTail(OfLayer, AtMost, name="nystrom_error_at_most_the_tail"):
    """Nystrom's mean error in trace is at most the spectrum's tail times `1 + r / (k - r - 1)`."""

    source = "Nystrom, Tropp et al. 2017"
    latex = (
        r"E\, \mathrm{tr}(F - X_k) \le (1 + \frac{r}{k - r - 1}) \sum_{j > r} \lambda_j,\ r < k - 1"
    )
    sides = ("Nystrom", "least bound of all r")
    free = ()
    rank = 5

    def draw(self, generator: torch.Generator, size: float) -> Case:
        return falling(generator, size)

    def adapt(self, real: Case, generator: torch.Generator) -> Case | None:
        return None if real["V"][0].numel() > 700 else super().adapt(real, generator)

    def left(self, case: Case) -> float:
        layer = captured(case)
        trace = Exact()(layer).trace()
        errors = [trace - Nystrom(self.rank, seed)(layer).trace() for seed in range(DRAWS)]
        return float(torch.stack(errors).mean())

    def right(self, case: Case) -> float:
        sizes = torch.linalg.svdvals(dense.gradients(case).flatten(1))
        values = sizes.square() / len(case["a"])
        k = self.rank
        return min(float((1 + r / (k - r - 1)) * values[r:].sum()) for r in range(k - 1))


class NystromPreconditioner(OfLayer, AtMost, name="nystrom_preconditioner_has_condition_28"):
    """With k about three effective dimensions, Nystrom's damped inverse has condition below 28.

    The paper's preconditioner has its least eigenvalue beside the sketch; here it is `X + mu I`.
    """

    source = "Nystrom, Frangella et al. 2023, theorem 1.1"
    kind = EXTENSION
    latex = (
        r"E\, \kappa((X + \mu I)^{-1/2} (F + \mu I) (X + \mu I)^{-1/2}) < 28,\ "
        r"k = 2 \lceil 1.5\, d \rceil + 1,\ d = \mathrm{tr}\, F (F + \mu I)^{-1}"
    )
    assumption = "k = 2 ceil(1.5 d) + 1 directions"
    outside = "nystrom_preconditioner_of_any_rank_has_condition_28"
    sides = ("condition number", "28")
    free = ()
    bound = 28.0

    def draw(self, generator: torch.Generator, size: float) -> Case:
        case = falling(generator, max(size, 0.5))
        case["damping"] = 0.003 * float(dense.gradients(case).square().sum()) / len(case["a"])
        return {**case, "rank": needed(case)}

    def adapt(self, real: Case, generator: torch.Generator) -> Case | None:
        return None

    def assume(self, case: Case) -> bool:
        return case["rank"] >= needed(case)

    def left(self, case: Case) -> float:
        layer, found = captured(case), []
        F = Exact()(layer).dense()
        F.diagonal().add_(case["damping"])
        for seed in range(DRAWS):
            X = Nystrom(case["rank"], seed)(layer)
            S = X.power(-0.5, case["damping"]).dense()
            values = torch.linalg.eigvalsh(S @ F @ S)
            found.append(float(values[-1] / values[0]))
        return sum(found) / DRAWS

    def right(self, case: Case) -> float:
        return self.bound


def needed(case: Case) -> int:
    """`2 ceil(1.5 d) + 1` of the effective dimension `d`."""
    values = torch.linalg.svdvals(dense.gradients(case).flatten(1)).square() / len(case["a"])
    return 2 * math.ceil(1.5 * float((values / (values + case["damping"])).sum())) + 1


class NystromAnyRank(
    NystromPreconditioner, name="nystrom_preconditioner_of_any_rank_has_condition_28"
):
    """With two directions, whatever the effective dimension, the condition is below 28 as well."""

    latex = r"E\, \kappa((X + \mu I)^{-1/2} (F + \mu I) (X + \mu I)^{-1/2}) < 28,\ k = 2"
    expected = REFUTED
    assumption = ""
    outside = ""

    def draw(self, generator: torch.Generator, size: float) -> Case:
        case = super().draw(generator, size)
        return {**case, "damping": 1e-2 * case["damping"], "rank": 2}

    def smaller(self, case: Case) -> Iterator[Case]:
        # in less room two directions are enough
        return iter(())

    def assume(self, case: Case) -> bool:
        return True
