"""Natural gradient descent with the exact block: over all layers jointly, layer by layer, dense."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fisherlab.approximations.exact import Exact
from fisherlab.blocks import Outer, contractions
from fisherlab.blocks.numerics import cholesky
from fisherlab.optim.base import CurvatureOptimizer
from fisherlab.optim.recorder import Recorder, delivered
from fisherlab.optim.scale import OptimizerError

# Parameters above which the dense forms are refused: the full matrix, and one layer's block.
DENSE_JOINT = 5_000
DENSE_LAYER = 5_000


class NGD(CurvatureOptimizer):
    """`W <- W - lr (F + lambda I)^{-1} dW` with the exact Fisher matrix of the batch.

    `scope="joint"`: `F` over all layers together; its Gram matrix is the sum of the layers', so the
    step is one `R x R` solve at any number of parameters (methods 2):

        d_l = (g_l - U_l (M lambda I + sum_k K_k)^{-1} sum_k U_k^T g_k) / lambda

    `scope="layer"`: one block per layer.  `form="dense"` builds the matrices as NGM measures them,
    and refuses more than 5,000 parameters; both forms agree.      NGM (28), A.5.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        criterion: Callable | None = None,
        fisher_type: str = "empirical",
        params: Iterable[Any] | None = None,
        lr: float,
        damping: float,
        scope: str = "joint",
        form: str = "gram",
        mc_samples: int = 1,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> None:
        if scope not in ("joint", "layer") or form not in ("gram", "dense"):
            raise ValueError(
                f"scope is 'joint' or 'layer' and form 'gram' or 'dense', got {scope!r}, {form!r}"
            )
        if not damping > 0:
            raise ValueError(f"damping must be positive, got {damping!r}")
        super().__init__(model, params, lr=lr, damping=damping, **options)
        self.scope, self.form = scope, form
        if form == "dense":
            self._check_size()
        self.recorder = Recorder(
            model,
            {name: weight.module for name, weight in self.weights.items()},
            criterion=criterion,
            fisher_type=fisher_type,
            mc_samples=mc_samples,
            generator=generator,
        )
        self.recorder.wanted = True

    def _check_size(self) -> None:
        sizes = {
            name: w.weight.numel() + (0 if w.bias is None else w.bias.numel())
            for name, w in self.weights.items()
        }
        total, (largest, size) = sum(sizes.values()), max(sizes.items(), key=lambda x: x[1])
        if self.scope == "joint" and total > DENSE_JOINT:
            raise ValueError(
                f"dense NGD over {total:,} parameters would need a {total:,} x {total:,} matrix; "
                f"refused above {DENSE_JOINT:,}. fl.optim.create('ngd') takes the same step from "
                "Gram matrices at any size"
            )
        if self.scope == "layer" and size > DENSE_LAYER:
            raise ValueError(
                f"dense blockwise NGD: layer {largest!r} has {size:,} parameters, refused above "
                f"{DENSE_LAYER:,}. fl.optim.create('tengrad') takes the same step at any size"
            )

    def remove(self) -> None:
        """Take the optimizer's hooks off the model."""
        self.recorder.remove()

    def __del__(self) -> None:
        if hasattr(self, "recorder"):
            self.recorder.remove()

    def _discard(self) -> None:
        self.recorder.clear()

    def _directions(self) -> dict[nn.Parameter, Tensor]:
        try:
            passes = self.recorder.captures()
        finally:
            self.recorder.clear()
        blocks: dict[str, list[Outer]] = {}
        gradients: dict[str, list[Tensor]] = {}
        for name, weight in self.weights.items():
            gradient = weight.gradient()
            if gradient is None:
                continue
            layers = [delivered(passes, key) for key in weight.keys]
            if not layers[0]:
                raise OptimizerError(
                    f"layer {name!r} has a gradient but delivered nothing; no parameter was "
                    "changed. Was the model compiled before the optimizer was made, or is the "
                    "layer inside activation checkpointing?"
                )
            blocks[name] = [Exact()(*captured) for captured in layers]
            gradients[name] = list(gradient.tensor_split(weight.groups))
        damping = self.param_groups[0]["damping"]
        if self.scope == "layer":
            steps = {
                name: [
                    self._layer_step(F, g, damping)
                    for F, g in zip(Fs, gradients[name], strict=True)
                ]
                for name, Fs in blocks.items()
            }
        elif self.form == "gram":
            steps = joint_step(blocks, gradients, damping)
        else:
            steps = _dense_joint_step(blocks, gradients, damping)
        return {
            p: d
            for name, parts in steps.items()
            for p, d in self.weights[name].split(torch.cat(parts)).items()
        }

    def _layer_step(self, F: Outer, gradient: Tensor, damping: float) -> Tensor:
        if self.form == "gram":
            return F.solve(gradient, damping)
        return _solve_dense(F.dense(), gradient.flatten(), damping).view_as(gradient)


def joint_step(
    blocks: dict[str, list[Outer]], gradients: dict[str, list[Tensor]], damping: float
) -> dict[str, list[Tensor]]:
    """`(F + damping I)^{-1} g` for the full matrix over all layers, from the sum of Gram matrices.

    Per layer one Gram matrix, one `U^T g` and one `U c`; one `R x R` Cholesky for all.
    """
    every = [
        (F, g) for name, Fs in blocks.items() for F, g in zip(Fs, gradients[name], strict=True)
    ]
    M = 1 / every[0][0].core
    K = torch.stack([F.gram() for F, _ in every]).sum(0)
    products = torch.stack([contractions.project(F.a, F.g, g).double() for F, g in every]).sum(0)
    eye = torch.eye(len(K), dtype=K.dtype, device=K.device)
    factor = cholesky(K + M * damping * eye, "joint Gram matrix")
    weights = torch.cholesky_solve(products.reshape(-1, 1), factor).view_as(products)
    return {
        name: [
            (g - contractions.combine(F.a, F.g, weights)) / damping
            for F, g in zip(Fs, gradients[name], strict=True)
        ]
        for name, Fs in blocks.items()
    }


def _dense_joint_step(
    blocks: dict[str, list[Outer]], gradients: dict[str, list[Tensor]], damping: float
) -> dict[str, list[Tensor]]:
    """The same from the dense matrix, as the survey measures it."""
    every = [
        (F, g) for name, Fs in blocks.items() for F, g in zip(Fs, gradients[name], strict=True)
    ]
    U = torch.cat(
        [contractions.per_example(F.a, F.g).flatten(0, 1).flatten(1) for F, _ in every], 1
    )
    F = every[0][0].core * U.mT @ U
    flat = _solve_dense(F, torch.cat([g.flatten() for _, g in every]), damping)
    pieces = iter(flat.split([g.numel() for _, g in every]))
    return {name: [next(pieces).view_as(g) for g in parts] for name, parts in gradients.items()}


def _solve_dense(F: Tensor, gradient: Tensor, damping: float) -> Tensor:
    matrix = F.double() + damping * torch.eye(len(F), dtype=torch.float64, device=F.device)
    factor = cholesky(matrix, "dense Fisher matrix")
    return torch.cholesky_solve(gradient.double()[:, None], factor)[:, 0].to(gradient)
