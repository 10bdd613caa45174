"""Inverse-free fast natural gradient: its coefficients, and what sharing them leaves (FNGD)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fisherlab.approximations.exact import Exact
from fisherlab.claims import dense
from fisherlab.claims.base import EXTENSION, REFUTED, AtMost, Case, Claim, Identity
from fisherlab.claims.instances import (
    OfLayer,
    captured,
    criterion_of,
    layer_of,
    model_of,
    network_case,
)
from fisherlab.claims.steps import Tengrad, solve
from fisherlab.optim import FNGD
from fisherlab.optim.woodbury import weights_of


class ClosedForm(OfLayer, Identity, name="fngd_coefficients_are_the_natural_step"):
    """The natural step (5) is a weighted sum of the examples' gradients, with the weights (9)."""

    source = "FNGD (5), (9)"
    latex = r"(F + \lambda I)^{-1} g = U v,\quad v = (M \lambda I + U^\top U)^{-1} 1"
    assumption = "g is the mean of the same gradients: same batch, observed labels, no decay term"
    outside = "fngd_coefficients_with_weight_decay"

    def draw(self, generator: torch.Generator, size: float) -> Case:
        return self._observed(super().draw(generator, size))

    def adapt(self, real: Case, generator: torch.Generator) -> Case | None:
        case = super().adapt(real, generator)
        return None if case is None else self._observed(case)

    def _observed(self, case: Case) -> Case:
        return {**case, "g": case["g"][:1]}

    def left(self, case: Case) -> Tensor:
        layer = captured(case)
        v = weights_of(Exact()(layer).gram(), case["damping"], False, "layer") / len(case["a"])
        return torch.einsum("n,noi->oi", v, layer.per_example_gradients()[0])

    def right(self, case: Case) -> Tensor:
        return dense.damped_solve(case, case["damping"], self.gradient(case)[None])[0]

    def gradient(self, case: Case) -> Tensor:
        """The direction of the step, `[o, i]`."""
        return dense.gradients(case).mean(0)


class WithDecay(ClosedForm, name="fngd_coefficients_with_weight_decay"):
    """Taken to a gradient with a decay term, the weights (9) still give the natural step."""

    kind = EXTENSION
    latex = r"(F + \lambda I)^{-1} (g + \delta W) = U v"
    expected = REFUTED
    assumption = ""
    outside = ""

    def gradient(self, case: Case) -> Tensor:
        return super().gradient(case) + 0.1 * case["V"][0]


class FirstPhase(Tengrad, name="fngd_first_phase_is_folded_natural_gradient"):
    """A step of FNGD's first phase is lambda times the natural step, lambda of the Gram norm."""

    source = "FNGD Algorithm 1, (14)"
    latex = r"\lambda (F + \lambda I)^{-1} g,\quad \lambda = \alpha \|U^\top U\|_F"
    alpha = 0.05

    optimizer = "fngd"

    def options(self, case: Case) -> dict[str, Any]:
        return {"alpha": self.alpha, "coefficient_steps": 9}

    def right(self, case: Case) -> Tensor:
        U = self.scores(case)
        damping = self.alpha * (U @ U.mT).norm().item()
        return damping * solve(U, damping, -U.mean(0))


class _Shared(Claim):
    """Two epochs of FNGD on a small network with zero learning rate: only the sampling varies."""

    batch, batches = 16, 16
    alpha = 0.005
    shuffled = True
    trials = 6

    def draw(self, generator: torch.Generator, size: float) -> Case:
        n = self.batch * self.batches
        case = network_case(
            generator, 1.0, examples=(n, n), positions=1, criteria=("cross_entropy",)
        )
        epochs = [torch.randperm(n, generator=generator) for _ in range(2)]
        if not self.shuffled:
            epochs[1] = epochs[0]
        return {**case, "layer": 0, "epochs": torch.stack(epochs)}

    def adapt(self, real: Case, generator: torch.Generator) -> Case | None:
        return None

    def shared(self, case: Case) -> Tensor:
        """FNGD's `M v~` of the first layer after its first phase, `[M]`."""
        model, criterion = model_of(case), criterion_of(case, "mean")
        options: dict[str, Any] = {"lr": 0.0, "alpha": self.alpha, "momentum": 0.0}
        optimizer = FNGD(model, criterion=criterion, coefficient_steps=self.batches, **options)
        with warnings.catch_warnings():
            # this claim measures whether the coefficients are flat
            warnings.simplefilter("ignore")
            for rows in case["epochs"][0].split(self.batch):
                optimizer.zero_grad()
                criterion(model(case["x"][rows]), case["y"][rows]).backward()
                optimizer.step()
        return optimizer.coefficients()[layer_of(case)][0]

    def own(self, case: Case, epoch: int) -> Tensor:
        """`M v` of every batch of an epoch on its own, by definition, `[B, M]`."""
        U = dense.Layered(case).scores(case["y"])
        found = []
        for rows in case["epochs"][epoch].split(self.batch):
            K = U[rows] @ U[rows].mT
            damping = self.alpha * K.norm()
            ones = torch.ones(len(K), dtype=K.dtype)
            shift = len(K) * damping
            found.append(shift * torch.linalg.solve(dense.shifted(K, shift), ones))
        return torch.stack(found)


class FlatCoefficients(_Shared, AtMost, name="fngd_coefficients_become_flat"):
    """After a shuffled first phase FNGD is SGD with a layer factor, up to noise std/sqrt(B)."""

    source = "FNGD IV-B"
    kind = EXTENSION
    latex = r"\mathrm{std}_m(\tilde v_m) \approx \mathrm{std}_m(v_m) / \sqrt{B}"
    sides = ("spread of shared coefficients", "1.6 std / sqrt(B)")

    def left(self, case: Case) -> Tensor:
        return self.shared(case).std()

    def right(self, case: Case) -> Tensor:
        # over M slots the spread itself is known within 1/sqrt(2 M), 18 %: three times that
        return 1.6 * self.own(case, 0).std(1).square().mean().sqrt() / self.batches**0.5


class SharedInformation(_Shared, AtMost, name="fngd_shared_coefficients_keep_information"):
    """After a shuffled epoch shared coefficients still tell the examples of a batch apart."""

    source = "FNGD IV-B"
    latex = r"\mathrm{std}_m(\tilde v_m) \ge \tfrac{1}{2} \mathrm{std}_m(v_m)"
    expected = REFUTED
    sides = ("half the spread in a batch", "spread of shared coefficients")

    def left(self, case: Case) -> Tensor:
        return self.own(case, 0).std(1).mean() / 2

    def right(self, case: Case) -> Tensor:
        return self.shared(case).std()


class _Nearer(_Shared, AtMost):
    """How far shared coefficients are from those of the next epoch's batches, and a constant is."""

    source = "FNGD IV-B"
    latex = r"\sum_b \|\tilde v - v_b\|^2 \le \sum_b \|\bar v - v_b\|^2"
    sides = ("shared coefficients", "their mean for all")

    def left(self, case: Case) -> Tensor:
        return self.shared(case)

    def right(self, case: Case) -> tuple[Tensor, Tensor]:
        """One number for all, and the coefficients of the next epoch."""
        return self.own(case, 0).mean(), self.own(case, 1)

    def values(self, case: Case) -> tuple[Tensor, Tensor]:
        constant, following = self.right(case)
        return (self.left(case) - following).norm(), (constant - following).norm()

    def smaller(self, case: Case) -> Iterator[Case]:
        return iter(())


class SharingShuffled(_Nearer, name="fngd_sharing_predicts_the_next_epoch"):
    """Shared coefficients predict a shuffled epoch's own better than one number for all."""

    expected = REFUTED


class SharingFixed(_Nearer, name="fngd_sharing_predicts_fixed_batches"):
    """In an epoch of one and the same batch, over and over, shared coefficients are its own."""

    kind = EXTENSION
    assumption = "the batches are not shuffled: every batch is the same one"
    outside = "fngd_sharing_predicts_the_next_epoch"
    shuffled = False

    def draw(self, generator: torch.Generator, size: float) -> Case:
        case = super().draw(generator, size)
        case["epochs"] = torch.arange(self.batch).repeat(2, self.batches)
        return case
