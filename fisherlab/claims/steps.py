"""Natural steps from Gram matrices, and what the layers' blocks leave out (NGM)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fisherlab.approximations.exact import Exact
from fisherlab.claims import dense
from fisherlab.claims.base import EXTENSION, AtMost, Case, Identity
from fisherlab.claims.instances import (
    OfLayer,
    OfNetwork,
    captured,
    criterion_of,
    joint,
    layer_names,
    layer_of,
    model_of,
)
from fisherlab.extract import capture
from fisherlab.optim import NGD, create


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

    def options(self, case: Case) -> dict[str, Any]:
        """The options of the optimizer."""
        return {"damping": case["damping"]}

    def names(self, case: Case) -> list[str]:
        """The layers of one system."""
        return [layer_of(case)] if self.layerwise else layer_names(case)

    def left(self, case: Case) -> Tensor:
        model, criterion = model_of(case), criterion_of(case, "mean")
        # without momentum or clipping: the step itself
        options = {"lr": 1.0, "momentum": 0.0, "kl_clip": None, **self.options(case)}
        optimizer = create(self.optimizer, model, criterion=criterion, **options)
        old = {name: joint(model, name) for name in self.names(case)}
        criterion(model(case["x"]), case["y"]).backward()
        optimizer.step()
        return torch.cat([(W - joint(model, name)).flatten() for name, W in old.items()])

    def scores(self, case: Case) -> Tensor:
        """The rows of `U`: minus the gradient of every example's loss."""
        return scores_of(case, self.names(case))

    def right(self, case: Case) -> Tensor:
        U = self.scores(case)
        return solve(U, case["damping"], -U.mean(0))


class JointStep(Tengrad, name="joint_ngd_from_summed_gram_matrices"):
    """The natural step over all layers jointly needs only the sum of the layers' Gram matrices."""

    source = "NGM (9), (28)"
    kind = EXTENSION
    latex = (
        r"(F + \lambda I)^{-1} g = \tfrac{1}{\lambda}(g - U(M\lambda I + \textstyle\sum_l "
        r"K_l)^{-1} U^\top g)"
    )
    optimizer = "ngd"
    layerwise = False


def stepped(case: Case) -> tuple[Tensor, Tensor]:
    """The joint natural step at the damping of a case, and the gradient."""
    model, criterion = model_of(case), criterion_of(case, "mean")
    options = {"lr": 1.0, "momentum": 0.0, "kl_clip": None, "damping": case["damping"]}
    optimizer = create("ngd", model, criterion=criterion, **options)
    names = layer_names(case)
    old = {name: joint(model, name) for name in names}
    criterion(model(case["x"]), case["y"]).backward()
    assert isinstance(optimizer, NGD)
    gradients = optimizer.gradients()
    optimizer.step()
    steps = [(W - joint(model, name)).flatten() for name, W in old.items()]
    return torch.cat(steps), torch.cat([gradients[name].flatten() for name in names])


class LargeBeta(OfNetwork, AtMost, name="large_beta_is_scaled_sgd"):
    """At a large beta the natural step is SGD's, divided by beta."""

    source = "NGM 4.3"
    latex = (
        r"\|\beta (F + \beta I)^{-1} g - g\| \le "
        r"\tfrac{\lambda_{\max}}{\lambda_{\max} + \beta} \|g\|"
    )

    def left(self, case: Case) -> Tensor:
        d, g = stepped(case)
        return (case["damping"] * d - g).norm() / g.norm().clamp(min=1e-300)

    def right(self, case: Case) -> Tensor:
        U = scores_of(case, layer_names(case))
        largest = torch.linalg.svdvals(U).max() ** 2 / len(U)
        return largest / (largest + case["damping"])


class SmallBeta(OfNetwork, AtMost, name="small_beta_lengthens_the_step"):
    """Halving beta never shortens the natural step: what a small one leaves unbounded."""

    source = "NGM 4.3"
    kind = EXTENSION
    latex = r"\|(F + \beta I)^{-1} g\| \le \|(F + \tfrac{\beta}{2} I)^{-1} g\|"

    def left(self, case: Case) -> Tensor:
        return stepped(case)[0].norm()

    def right(self, case: Case) -> Tensor:
        U = scores_of(case, layer_names(case))
        return solve(U, case["damping"] / 2, -U.mean(0)).norm()


class BlockMass(OfNetwork, Identity, name="mass_off_the_block_diagonal"):
    """The share of the Fisher outside the layers' blocks is 1 - sum ||K_l||^2 / ||sum K_l||^2."""

    source = "NGM section 3"
    kind = EXTENSION
    latex = r"1 - \textstyle\sum_l \|F_{ll}\|^2 / \|F\|^2 = 1 - \sum_l \|K_l\|^2 / \|\sum_l K_l\|^2"

    def adapt(self, real: Case, generator: torch.Generator) -> Case | None:
        numbers = sum(value.numel() for value in real["state"].values())
        return super().adapt(real, generator) if numbers <= 3000 else None

    def left(self, case: Case) -> Tensor:
        arguments = (model_of(case), criterion_of(case), case["x"], case["y"])
        found = capture(*arguments, fisher_type="empirical", kinds=("map",))
        K = torch.stack([Exact()(layer).gram() for layer in found.values()])
        return 1 - K.square().sum() / K.sum(0).square().sum()

    def right(self, case: Case) -> Tensor:
        U = [dense.Layered(case, name).scores(case["y"]) for name in layer_names(case)]
        F = torch.cat(U, 1).mT @ torch.cat(U, 1)
        return 1 - sum((u.mT @ u).square().sum() for u in U) / F.square().sum()


def scores_of(case: Case, names: list[str]) -> Tensor:
    """The rows of `U`, of the criterion with its mean over outputs."""
    # a mean over C outputs is 1/C of the log-likelihood
    c = 1.0 if case["criterion"] == "cross_entropy" else 1.0 / case["y"][0].numel()
    return torch.cat([c * dense.Layered(case, name).scores(case["y"]) for name in names], 1)


def solve(U: Tensor, damping: float, v: Tensor) -> Tensor:
    """`(U^T U / M + damping I)^{-1} v` for rows `U` `[M, N]`, dense or by the SVD of `U`."""
    case = {"a": U[:, None, :], "g": torch.ones(1, len(U), 1, 1, dtype=U.dtype)}
    return dense.damped_solve(case, damping, v[None, None])[0, 0]
