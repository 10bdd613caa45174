"""TENGraD and NGD-SMW: the exact block's damped inverse, solved in each layer's own backward."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from fisherlab.approximations.damping import Rule, gram_norm, unexpanded
from fisherlab.blocks import DirectSum, Outer
from fisherlab.blocks.columns import Columns
from fisherlab.blocks.numerics import cholesky, dot, sum_of
from fisherlab.distributed import unwrapped
from fisherlab.extract.image import ImageColumns
from fisherlab.optim.base import CurvatureOptimizer
from fisherlab.optim.scale import LossScale, OptimizerError
from fisherlab.optim.summary import last_steps
from fisherlab.optim.weight import Weight, has_gradient, undelivered
from fisherlab.optim.weighted import WeightedLayers, columns_of


class Woodbury(CurvatureOptimizer):
    """`W <- W - lr U v`,  `v = (M lambda I + K)^{-1} 1`,  `K = U^T U`, per layer and batch.

    With `U 1 / M` the mean gradient this is `(F + lambda I)^{-1} g` exactly (TENGraD, NGM 36-43;
    FNGD (8), (9)), for the empirical Fisher and observed labels. `fold=True` multiplies by lambda,
    as FNGD does, so that lr is of SGD's size. `damping` is lambda or a rule, or `alpha` gives
    `lambda = alpha ||K||_F` per layer and batch (FNGD (14)); exactly one of them.

    `p.grad` is the weighted gradient after `backward()`, so clipping, loss scaling and accumulation
    see what will be used (accumulation: the mean of the micro-batches' steps). A layer called
    several times in one forward is solved in `step()`.

    Under DDP every rank solves for the joint batch: a layer's raw inputs and output gradients are
    gathered, `n (|x| + |s|)` numbers, never per-example gradients.
    """

    data_parallel = True

    # `P (g + w W)` needs the columns of the whole weight, which no backward pass has
    decay_placements = ("after",)

    def __init__(
        self,
        model: nn.Module,
        *,
        criterion: Callable | None = None,
        params: Iterable[Any] | None = None,
        lr: float,
        damping: float | Rule | None = None,
        alpha: float | None = None,
        fold: bool = False,
        **options: Any,
    ) -> None:
        if (damping is None) == (alpha is None):
            raise ValueError("give either damping (lambda) or alpha (lambda = alpha ||K||_F)")
        for name, value in {"damping": damping, "alpha": alpha}.items():
            if value is None or callable(value):
                continue
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be positive, got {value!r}")
        if damping is not None:
            unexpanded(damping, type(self).__name__)
        super().__init__(model, params, lr=lr, groups={"damping": damping}, **options)
        model = unwrapped(model)
        self.alpha, self.fold = alpha, fold
        # the calls of layers called several times, of each backward pass with its factor
        self._repeated: dict[str, dict[int, tuple[float, list[tuple[Tensor, Tensor]]]]] = {}
        # of the last solve: its product with the gradient, and its square length
        self._changes: dict[str, tuple[float, float]] = {}
        # of the last step: size, damping and, for the spectrum, the Gram matrices
        self._last: dict[str, tuple[int, float, list[Tensor]]] = {}
        self.layers = WeightedLayers(model, self.weights, *_unowned(self.rows, self._remember))
        # after the layers' hooks, whose output it follows: the model may be a single layer
        self.scale = LossScale(model, criterion)
        self.hooked += [self.layers, self.scale]

    def rows(self, weight: Weight, x: Tensor, g: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """`M v`, `[groups, n]`, for one call of a layer, and the weighted gradient where cheap."""
        factor = self.scale.factor
        calls, mine = self._gathered([(x, g)], factor)
        columns = columns_of(weight, calls, factor)
        rows = self.solve(weight, columns)
        # of gradients that were formed for their Gram matrix their sum is free
        if self.ranks is None and all(isinstance(each, ImageColumns) for each in columns):
            return rows, _combined(columns, rows).mul_(1 / factor)
        return rows[:, mine], None

    def _gathered(
        self, calls: list[tuple[Tensor, Tensor]], factor: float
    ) -> tuple[list[tuple[Tensor, Tensor]], slice]:
        """The raw pairs of the joint batch, and which of its rows are this rank's."""
        if self.ranks is None:
            return calls, slice(None)
        self._check_ranks([factor])
        mine = self.ranks.rows(len(calls[0][1]))
        return [(self.ranks.gather(x), self.ranks.gather(g)) for x, g in calls], mine

    def solve(self, weight: Weight, columns: list[Columns]) -> Tensor:
        """`M v` of every group from its columns."""
        blocks = [GramBlock(each) for each in columns]
        lambdas = self._dampings(weight, blocks)
        found, change, square = [], 0.0, 0.0
        for block, damping in zip(blocks, lambdas, strict=True):
            K = block.gram()
            rows = weights_of(K, damping, self.fold, weight.name)
            # <U M v, U 1> and ||U M v||^2, in the scale of the per-example gradients
            weighted = K @ rows
            change += weighted.sum().item()
            square += float(rows @ weighted)
            found.append(rows)
        self._changes[weight.name] = change, square
        size = sum(block.size for block in blocks)
        grams = [block.core * block.gram() for block in blocks]
        self._last[weight.name] = size, sum(lambdas) / len(lambdas), grams
        return torch.stack(found)

    def _dampings(self, weight: Weight, blocks: list[GramBlock]) -> list[float]:
        """The damping of every group: the layer's own, or `alpha ||K||` of each."""
        if self.alpha is not None:
            rule = gram_norm(self.alpha)
            return [rule({weight.name: block})[weight.name] for block in blocks]
        whole = blocks[0] if len(blocks) == 1 else DirectSum(blocks)
        rule = unexpanded(self.option(weight, "damping"), type(self).__name__)
        return [rule({weight.name: whole})[weight.name]] * len(blocks)

    def summary(self) -> pd.DataFrame:
        """Per layer, of the last batch: damping, relative too, and the eigenvalues above it."""
        # solved in the order of the backward pass, told in that of the layers
        return last_steps({n: self._last[n] for n in self.weights if n in self._last}, self.steps)

    def _remember(self, weight: Weight, x: Tensor, g: Tensor) -> None:
        current, passes = self.scale.backwards, self._repeated.setdefault(weight.name, {})
        if weight.weight.grad is None:
            # what an earlier backward pass left was dropped with its gradient
            for earlier in passes.keys() - {current}:
                del passes[earlier]
        passes.setdefault(current, (self.scale.factor, []))[1].append((x, g))

    def _discard(self) -> None:
        self._repeated.clear()
        self.layers.reached.clear()

    def _check_delivered(self) -> None:
        reached, self.layers.reached = self.layers.reached, set()
        for name, weight in self.weights.items():
            if name not in reached and has_gradient(weight):
                raise OptimizerError(undelivered(name))

    def _directions(self) -> dict[nn.Parameter, Tensor]:
        self._check_delivered()
        found: dict[nn.Parameter, Tensor] = {}
        repeated, self._repeated = self._repeated, {}
        for name, passes in repeated.items():
            weight = self.weights[name]
            gradient = weight.gradient()
            if gradient is not None:
                pairs = [self._step_of(weight, *one) for one in passes.values()]
                step, plain = (sum_of(terms) for terms in zip(*pairs, strict=True))
                # .grad may have been unscaled, clipped or averaged over ranks since
                ratio = dot(gradient, plain) / dot(plain, plain).clamp(min=1e-300)
                found |= weight.split((ratio * step).to(weight.weight.dtype))
        if self.kl_clip is None and self.max_norm is None:
            return found
        every = [p for w in self.weights.values() for p in (w.weight, w.bias) if p is not None]
        return {p: p.grad for p in every if p.grad is not None} | found

    def _step_of(
        self, weight: Weight, factor: float, calls: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """The step `U M v / factor` of one backward pass, and its gradient `U 1 / factor`."""
        calls, _ = self._gathered(calls, factor)
        columns = columns_of(weight, calls, factor)
        rows = self.solve_repeated(weight, columns)
        step, plain = _combined(columns, rows), _combined(columns, torch.ones_like(rows))
        return step / factor, plain / factor

    def _predicted_kl(self, directions: dict[nn.Parameter, Tensor]) -> float:
        # p.grad is the direction already: its product with the gradient comes from the Gram
        # matrix, at the scale that the lengths of the two tell
        changes, self._changes = self._changes, {}
        total = 0.0
        for name, (change, square) in changes.items():
            weight = self.weights[name]
            parts = [p for p in (weight.weight, weight.bias) if p is not None and p in directions]
            length = sum(float(dot(directions[p], directions[p])) for p in parts)
            total += self.option(weight, "lr") ** 2 * change * length / max(square, 1e-300)
        return total

    def solve_repeated(self, weight: Weight, columns: list[Columns]) -> Tensor:
        """`M v` of a layer that was called several times."""
        return self.solve(weight, columns)


class GramBlock(Outer):
    """The exact block of columns whose Gram matrix is wanted in any case."""

    def __init__(self, columns: Columns) -> None:
        self.of, self.core, self.shift = columns, 1.0 / columns.count, 0.0

    def trace(self) -> Tensor:
        return self.core * self.gram().trace()


def _combined(columns: list[Columns], rows: Tensor) -> Tensor:
    """`U v` of every group, stacked as the weight `[o, i]`."""
    return torch.cat([each.combine(row[None]) for each, row in zip(columns, rows, strict=True)])


def _unowned(*methods: Callable) -> list[Callable]:
    """Bound methods that do not keep their object alive: the model holds the hooks."""
    references = [weakref.WeakMethod(method) for method in methods]
    return [lambda *args, r=r: _call(r, args) for r in references]


def _call(reference: weakref.WeakMethod, args: tuple) -> Any:
    method = reference()
    if method is None:
        raise OptimizerError("the optimizer was deleted between this forward and its backward")
    return method(*args)


def weights_of(K: Tensor, damping: float | Tensor, fold: bool, name: str) -> Tensor:
    """`M v = M (M lambda I + K)^{-1} 1`, times lambda where folded, `[M]` float64.      FNGD (9).

    `lambda (M lambda I + K)^{-1} 1` has no cancellation, where the printed
    `(1/M)(1 - (lambda I + K/M)^{-1} K 1/M)` loses all digits in float32.
    """
    M = len(K)
    damping = torch.as_tensor(damping, dtype=torch.float64, device=K.device)
    if damping == 0:
        # alpha ||K|| of a layer whose gradients are all zero: any weights give the same step
        return torch.ones(M, dtype=torch.float64, device=K.device)
    damped = K.clone()
    damped.diagonal().add_(M * damping)
    factor = cholesky(damped, f"damped Gram matrix of layer {name!r}")
    ones = torch.ones(M, 1, dtype=torch.float64, device=K.device)
    v = torch.cholesky_solve(ones, factor)[:, 0]
    return M * v * (damping if fold else 1.0)


class TENGraD(Woodbury):
    """`(F + lambda I)^{-1} g` of the mini-batch's exact block, layer by layer.    NGM (36)-(43)."""


class NGDSMW(Woodbury):
    """FNGD without sharing: its coefficients recomputed at every step.      FNGD tab. IV."""

    def __init__(self, model: nn.Module, *, fold: bool = True, **options: Any) -> None:
        super().__init__(model, fold=fold, **options)
