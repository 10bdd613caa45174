"""Errors and traces of KFAC, EKFAC, TKFAC and TEKFAC on one batch (TEKFAC)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fisherlab.approximations import Approximation
from fisherlab.approximations.eigen_corrected import EKFAC, TEKFAC
from fisherlab.approximations.exact import Exact
from fisherlab.approximations.kfac import KFAC
from fisherlab.approximations.tkfac import TKFAC, TKFACExpand
from fisherlab.claims import dense
from fisherlab.claims.base import (
    CONTRAST,
    EXTENSION,
    REFUTED,
    AtMost,
    Case,
    Identity,
    Usually,
)
from fisherlab.claims.instances import (
    OfLayer,
    captured,
    layer_case,
)
from fisherlab.metrics import relative_error


def error_of(approximation: Approximation, case: Case) -> float:
    """FisherLab's `||X - F|| / ||F||` of a layer case, matrix-free."""
    layer = captured(case)
    return relative_error(approximation(layer), Exact()(layer)).item()


class BestDiagonal(OfLayer, Identity, name="corrected_eigenvalues_are_optimal"):
    """In TKFAC's eigenbasis the second moments of the gradients are the best diagonal."""

    source = "TEKFAC section 3.1"
    latex = r"\Theta = \arg\min_{\Lambda\ \mathrm{diagonal}} \|F - Q \Lambda Q^\top\|_F"

    def draw(self, generator: torch.Generator, size: float) -> Case:
        return self._with_basis(layer_case(generator, size))

    def adapt(self, real: Case, generator: torch.Generator) -> Case | None:
        return None if real["V"][0].numel() > 60 else self._with_basis(real)

    def _with_basis(self, case: Case) -> Case:
        Q_G, Q_A = (torch.linalg.eigh(factor)[1] for factor in dense.tkfac(case))
        return {**case, "Q_G": Q_G, "Q_A": Q_A}

    def smaller(self, case: Case) -> Iterator[Case]:
        # the basis stays
        return (x for x in super().smaller(case) if x["V"].shape == case["V"].shape)

    def left(self, case: Case) -> Tensor:
        layer = captured(case)
        sums = EKFAC().corrections(layer, {"Q_G": case["Q_G"], "Q_A": case["Q_A"]})
        return sums["spectrum"] / layer.examples

    def right(self, case: Case) -> Tensor:
        """The least-squares solution over all diagonals, one column `vec(q q^T)` each."""
        Q = torch.kron(case["Q_G"], case["Q_A"])
        columns = (Q[:, None, :] * Q[None, :, :]).flatten(0, 1)
        best = torch.linalg.lstsq(columns, dense.block(case).flatten()[:, None]).solution
        return best.view(case["V"].shape[1:])


class _Ordered(OfLayer, AtMost):
    """The error of the corrected form against that of its factors."""

    scale = 1.0
    noise = 1e-7
    corrected: Approximation

    def left(self, case: Case) -> float:
        return error_of(self.corrected, case)


class TekfacTheorem(_Ordered, name="tekfac_error_at_most_tkfac"):
    """On one batch, undamped, TEKFAC's error is at most TKFAC's (Theorem 3.1)."""

    source = "TEKFAC Theorem 3.1"
    latex = r"\|F - F_{\mathrm{TEKFAC}}\|_F \le \|F - F_{\mathrm{TKFAC}}\|_F"
    trials = 24
    sides = ("TEKFAC", "TKFAC")
    assumption = "statistics, basis and F are those of one batch; no memory, no damping"
    outside = "tekfac_error_at_most_tkfac_with_memory"
    corrected = TEKFAC()

    def right(self, case: Case) -> float:
        return dense.product_error(case, *dense.tkfac(case))


class EkfacTheorem(_Ordered, name="ekfac_error_at_most_kfac"):
    """Theorem 3.1 taken to EKFAC: on one batch, undamped, its error is at most KFAC's."""

    source = "TEKFAC (2.7)"
    kind = EXTENSION
    latex = r"\|F - F_{\mathrm{EKFAC}}\|_F \le \|F - F_{\mathrm{KFAC}}\|_F"
    trials = 24
    sides = ("EKFAC", "KFAC")
    assumption = "statistics, basis and F are those of one batch; no memory, no damping"
    outside = "ekfac_error_at_most_kfac_out_of_sample"
    corrected = EKFAC()

    def right(self, case: Case) -> float:
        return dense.product_error(case, *dense.kfac(case))


class _Trace(OfLayer, Identity):
    """The trace of an approximation against that of the block."""

    approximation: Approximation
    source = "TEKFAC section 3.2"

    def left(self, case: Case) -> Tensor:
        return self.approximation(captured(case)).trace()

    def right(self, case: Case) -> Tensor:
        return dense.gradients(case).square().sum() / len(case["a"])


class TkfacTrace(_Trace, name="tkfac_keeps_the_trace"):
    """TKFAC has the trace of the Fisher block, at any number of positions (partial traces)."""

    latex = r"\mathrm{tr}(\sigma \Psi \otimes \Phi) = \mathrm{tr} F"
    approximation = TKFAC()


class EkfacTrace(_Trace, name="ekfac_keeps_the_trace"):
    """EKFAC has the trace of the Fisher block."""

    latex = r"\mathrm{tr} F_{\mathrm{EKFAC}} = \mathrm{tr} F"
    approximation = EKFAC()


class TekfacTrace(_Trace, name="tekfac_keeps_the_trace"):
    """TEKFAC has the trace of the Fisher block."""

    latex = r"\mathrm{tr} F_{\mathrm{TEKFAC}} = \mathrm{tr} F"
    approximation = TEKFAC()


class SummedTrace(_Trace, name="tkfac_of_summed_positions_keeps_the_trace"):
    """Taken to several positions, summed inside each factor, (2.10) still keeps the trace."""

    source = "TEKFAC (2.10)"
    kind = EXTENSION
    latex = (
        r"\sigma = E[\mathrm{tr}\Lambda \, \mathrm{tr}\Gamma] = \mathrm{tr} F,\ \Lambda = "
        r"\sum_t a a^\top"
    )
    expected = REFUTED
    approximation = TKFACExpand()

    def draw(self, generator: torch.Generator, size: float) -> Case:
        case = layer_case(generator, size, positions=4)
        return case if case["a"].shape[1] > 1 else self.draw(generator, max(size, 0.5))

    def adapt(self, real: Case, generator: torch.Generator) -> Case | None:
        return super().adapt(real, generator) if real["a"].shape[1] > 1 else None


class KfacTrace(_Trace, name="kfac_keeps_the_trace"):
    """KFAC, before EKFAC's correction, has the trace of the Fisher block."""

    source = "TEKFAC section 3.2"
    kind = CONTRAST
    latex = r"\mathrm{tr} G \, \mathrm{tr} A = \mathrm{tr} F"
    expected = REFUTED
    approximation = KFAC()


class KfacCovariance(OfLayer, Identity, name="kfac_trace_error_is_a_covariance"):
    """KFAC's trace is off by the covariance of the traces of its factors (one position)."""

    source = "TEKFAC (2.4)"
    kind = EXTENSION
    latex = r"\mathrm{tr} G \, \mathrm{tr} A = \mathrm{tr} F - \mathrm{cov}(\|a\|^2, \|g\|^2)"
    assumption = "one position (T = 1)"

    def draw(self, generator: torch.Generator, size: float) -> Case:
        return layer_case(generator, size, positions=1)

    def assume(self, case: Case) -> bool:
        return case["a"].shape[1] == 1 and len(case["a"]) > 1

    def left(self, case: Case) -> Tensor:
        return KFAC()(captured(case)).trace()

    def right(self, case: Case) -> Tensor:
        inputs, outputs = case["a"].square().sum((1, 2)), case["g"].square().sum((0, 2, 3))
        covariance = torch.cov(torch.stack([inputs, outputs]), correction=0)[0, 1]
        return (inputs * outputs).mean() - covariance


class TkfacUsually(OfLayer, Usually, name="tkfac_beats_kfac_usually"):
    """In most cases TKFAC's error is below KFAC's, as it is in the experiments that 2.4 cites."""

    source = "TEKFAC section 2.4"
    latex = r"P(\|F - F_{\mathrm{TKFAC}}\| \le \|F - F_{\mathrm{KFAC}}\|) > 1/2"
    scale = 1.0
    sides = ("TKFAC", "KFAC")

    def draw(self, generator: torch.Generator, size: float) -> Case:
        return layer_case(generator, max(size, 0.3), examples=(4, 12), fisher_type="empirical")

    def left(self, case: Case) -> float:
        return error_of(TKFAC(), case)

    def right(self, case: Case) -> float:
        return dense.product_error(case, *dense.kfac(case))


class TkfacAlways(OfLayer, AtMost, name="tkfac_error_at_most_kfac"):
    """Taken from general cases to every case, TKFAC's error is at most KFAC's."""

    source = "TEKFAC section 2.4"
    kind = EXTENSION
    latex = r"\|F - F_{\mathrm{TKFAC}}\|_F \le \|F - F_{\mathrm{KFAC}}\|_F"
    expected = REFUTED
    scale = 1.0
    noise = 1e-7
    trials = 60
    effort = 300
    sides = ("TKFAC", "KFAC")

    def draw(self, generator: torch.Generator, size: float) -> Case:
        return layer_case(generator, size, positions=1)

    def left(self, case: Case) -> float:
        return error_of(TKFAC(), case)

    def right(self, case: Case) -> float:
        return dense.product_error(case, *dense.kfac(case))


class TekfacUsually(TkfacUsually, name="tekfac_beats_ekfac_usually"):
    """In most cases TEKFAC's error is below EKFAC's too."""

    source = "TEKFAC section 3.1"
    kind = EXTENSION
    latex = r"P(\|F - F_{\mathrm{TEKFAC}}\| \le \|F - F_{\mathrm{EKFAC}}\|) > 1/2"
    sides = ("TEKFAC", "EKFAC")

    def left(self, case: Case) -> float:
        return error_of(TEKFAC(), case)

    def right(self, case: Case) -> float:
        F = dense.block(case)
        Q = torch.kron(*(torch.linalg.eigh(factor)[1] for factor in dense.kfac(case)))
        kept = (Q * (F @ Q)).sum(0).square().sum()
        return float((F.square().sum() - kept).clamp(min=0).sqrt() / F.norm())

    def adapt(self, real: Case, generator: torch.Generator) -> Case | None:
        return None if real["V"][0].numel() > 1500 else super().adapt(real, generator)
