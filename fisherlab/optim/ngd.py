"""Natural gradient descent with the exact block: over all layers jointly, layer by layer, dense."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from fisherlab import doors
from fisherlab.approximations.damping import Rule, unexpanded
from fisherlab.approximations.exact import Exact
from fisherlab.blocks import Block, DirectSum, Outer, contractions
from fisherlab.blocks.direct_sum import parts_of
from fisherlab.blocks.numerics import cholesky
from fisherlab.blocks.reads import together, with_next_read
from fisherlab.distributed import unwrapped
from fisherlab.extract import LayerCapture
from fisherlab.extract.joint import joined
from fisherlab.optim.alike import options_of
from fisherlab.optim.attempt import Kept
from fisherlab.optim.base import CurvatureOptimizer
from fisherlab.optim.passes import delivered
from fisherlab.optim.recorder import Recorder
from fisherlab.optim.scale import OptimizerError
from fisherlab.optim.state import generator_state
from fisherlab.optim.summary import last_steps
from fisherlab.optim.weight import has_gradient, undelivered

if TYPE_CHECKING:
    import pandas as pd

# Parameters above which the dense forms are refused: the full matrix, and one layer's block.
DENSE_JOINT = 5_000
DENSE_LAYER = 5_000


class NGD(CurvatureOptimizer):
    """`W <- W - lr (F + lambda I)^{-1} dW` with the exact Fisher matrix of the batch.

    `scope="joint"`: `F` over all layers together. Its Gram matrix is the sum of the layers' Gram
    matrices, so the step is one `R x R` solve at any number of parameters. With one lambda per
    layer, as a relative damping rule gives,

        d_l = (g_l - U_l c) / lambda_l,
        c = (M I + sum_k K_k / lambda_k)^{-1} sum_k U_k^T g_k / lambda_k

    `scope="layer"`: one block per layer. `form="dense"` builds the matrices as NGM measures them,
    and refuses more than 5,000 parameters; both forms agree.      NGM (28), A.5.

    Args:
        model: the model.
        criterion: the very object that the loop calls; see `Preconditioner`.
        fisher_type: "empirical", "mc" or "exact".
        params: parameters, or groups of them with options of their own; None: all of the model.
        lr: learning rate.
        damping: lambda, absolute, or a rule `dict[layer, Block] -> dict[layer, lambda]`.
        scope: "joint" or "layer".
        form: "gram" or "dense".
        mc_samples: draws per example for "mc".
        generator: draws the labels of "mc"; None: a fresh one seeded with 0.
        options: further options of the step and its groups.
    """

    data_parallel = True

    def __init__(
        self,
        model: nn.Module,
        *,
        criterion: Callable[..., Any] | None = None,
        fisher_type: str = "empirical",
        params: Iterable[Any] | None = None,
        lr: float,
        damping: float | Rule,
        scope: str = "joint",
        form: str = "gram",
        mc_samples: int = 1,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> None:
        doors.choice(scope, "scope", ("joint", "layer"))
        doors.choice(form, "form", ("gram", "dense"))
        unexpanded(damping, "NGD")
        if damping == 0:
            raise ValueError("the exact block is singular, so damping must be positive, got 0")
        super().__init__(model, params, lr=lr, groups={"damping": damping}, **options)
        model = unwrapped(model)
        self.scope, self.form = scope, form
        if form == "dense":
            self._check_size()
        self.recorder = Recorder(
            model,
            self.coverage,
            criterion=criterion,
            fisher_type=fisher_type,
            mc_samples=mc_samples,
            generator=generator,
            ranks=self.ranks,
        )
        self.recorder.wanted = True
        self._install(self.recorder)
        if scope == "layer" or form == "dense":
            # a layer's own solve chooses its rank as it goes
            self._attempt.worthwhile = False
        # the captures of a step that may be taken back
        self._passes: list[dict[str, LayerCapture]] | None = None
        # the last step's size, damping and, for the spectrum, its Gram matrices
        self._last: dict[str, tuple[int, float, list[Tensor]]] = {}

    def _check_size(self) -> None:
        sizes = {name: weight.size for name, weight in self.weights.items()}
        total = sum(sizes.values())
        largest, size = max(sizes.items(), key=lambda x: x[1], default=("", 0))
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

    def _discard(self) -> None:
        self.recorder.clear()

    def _refused(self) -> None:
        self.recorder.refuse()

    def _stepped(self) -> None:
        super()._stepped()
        self.recorder.stepped()

    def _described(self) -> dict[str, str]:
        return {**super()._described(), **options_of(self.recorder)}

    def _keep(self) -> Kept:
        last = self._last

        def back() -> bool:
            self._last = last
            return self._passes is not None

        def release() -> None:
            self._passes = None

        return Kept(back, release)

    def _directions(self) -> dict[nn.Parameter, Tensor]:
        passes = self._passes
        if passes is None:
            try:
                passes = self.recorder.captures(f"step {self.steps}")
            finally:
                self.recorder.clear()
        if together() is not None:
            # a step that is taken back is computed again with the same captures
            self._passes = passes
        blocks: dict[str, Outer | DirectSum] = {}
        gradients: dict[str, Tensor] = {}
        for name, gradient in self.gradients().items():
            weight = self.weights[name]
            layers = [delivered(passes, key) for key in weight.keys]
            if name in self.left_out:
                continue
            if not layers[0]:
                if has_gradient(weight):
                    raise OptimizerError(undelivered(name))
                continue
            if self.ranks is not None:
                layers = [[joined(c, self.ranks) for c in captured] for captured in layers]
            parts = [Exact()(*captured) for captured in layers]
            blocks[name] = parts[0] if len(parts) == 1 else DirectSum(parts)
            gradients[name] = gradient
        lambdas = self.coverage.dampings(blocks, lambda damping: unexpanded(damping, "NGD"))
        steps = self._solve(blocks, gradients, lambdas) if blocks else {}
        self._last = {
            name: (block.size, lambdas[name], [F.core * F.gram() for F in _parts(block)])
            for name, block in blocks.items()
        }
        later = [name for name, x in lambdas.items() if isinstance(x, Tensor)]
        if later:

            def take(numbers: list[float]) -> None:
                for name, number in zip(later, numbers, strict=True):
                    size, _, grams = self._last[name]
                    self._last[name] = size, number, grams

            with_next_read([cast(Any, lambdas[name]) for name in later], take)
        return {p: d for n, step in steps.items() for p, d in self.weights[n].split(step).items()}

    def _solve(
        self,
        blocks: dict[str, Outer | DirectSum],
        gradients: dict[str, Tensor],
        lambdas: dict[str, float],
    ) -> dict[str, Tensor]:
        if self.scope == "layer":
            solve = _solve_dense if self.form == "dense" else _solve_gram
            return {n: solve(F, gradients[n], lambdas[n]) for n, F in blocks.items()}
        return (joint_step if self.form == "gram" else _dense_joint_step)(
            blocks, gradients, lambdas
        )

    def _extra_state(self) -> dict[str, Any]:
        return {"generator": self.recorder.generator_state}

    def _reading(self, extra: dict[str, Any]) -> Callable[[], None]:
        drawn = generator_state(extra)

        def take() -> None:
            self.recorder.generator.set_state(drawn)

        return take

    def summary(self) -> pd.DataFrame:
        """Per layer, of the last step: damping, relative too, and the eigenvalues above it."""
        return last_steps(self._last, self.steps)


def _parts(block: Outer | DirectSum) -> tuple[Outer, ...]:
    return cast(tuple[Outer, ...], parts_of(block))


def joint_step(
    blocks: dict[str, Outer | DirectSum], gradients: dict[str, Tensor], lambdas: dict[str, float]
) -> dict[str, Tensor]:
    """`(F + diag(lambda_l))^{-1} g` of the full matrix over all layers, from Gram matrices.

    Per layer one Gram matrix, one `U^T g` and one `U c`; one `R x R` Cholesky for all.
    """
    parts = [
        (F, g, lambdas[name])
        for name, block in blocks.items()
        for F, g in zip(_parts(block), _rows(block, gradients[name]), strict=True)
    ]
    M = 1 / float(parts[0][0].core)
    K = torch.stack([F.gram() / damping for F, _, damping in parts]).sum(0)
    products = torch.stack(
        [F.columns.project(g).double() / damping for F, g, damping in parts]
    ).sum(0)
    eye = torch.eye(len(K), dtype=K.dtype, device=K.device)
    factor = cholesky(K + M * eye, "joint Gram matrix")
    c = torch.cholesky_solve(products.reshape(-1, 1), factor).view_as(products)
    steps = iter([(g - F.columns.combine(c).to(g)) / damping for F, g, damping in parts])
    return {name: torch.cat([next(steps) for _ in _parts(b)]) for name, b in blocks.items()}


def _rows(block: Outer | DirectSum, gradient: Tensor) -> tuple[Tensor, ...]:
    return (gradient,) if isinstance(block, Outer) else block.split(gradient)


def _dense_joint_step(
    blocks: dict[str, Outer | DirectSum], gradients: dict[str, Tensor], lambdas: dict[str, float]
) -> dict[str, Tensor]:
    """The same from the dense matrix, as the survey measures it."""
    every = [F for block in blocks.values() for F in _parts(block)]
    U = torch.cat([contractions.per_example(F.a, F.g).flatten(0, 1).flatten(1) for F in every], 1)
    flat = torch.cat([gradients[name].flatten() for name in blocks]).double()
    damping = torch.cat([flat.new_full((b.size,), lambdas[name]) for name, b in blocks.items()])
    F = float(every[0].core) * U.double().mT @ U.double() + damping.diag()
    step = torch.cholesky_solve(flat[:, None], cholesky(F, "dense Fisher matrix"))[:, 0]
    pieces = step.split([block.size for block in blocks.values()])
    return {
        name: piece.view_as(gradients[name]).to(gradients[name])
        for name, piece in zip(blocks, pieces, strict=True)
    }


def _solve_gram(block: Block, gradient: Tensor, damping: float) -> Tensor:
    return block.solve(gradient, damping)


def _solve_dense(block: Block, gradient: Tensor, damping: float) -> Tensor:
    F = block.dense().double()
    matrix = F + damping * torch.eye(len(F), dtype=torch.float64, device=F.device)
    factor = cholesky(matrix, "dense Fisher matrix")
    step = torch.cholesky_solve(gradient.double().reshape(-1, 1), factor)
    return step.view_as(gradient).to(gradient)
