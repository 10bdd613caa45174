"""TENGraD and NGD-SMW: the exact block's damped inverse, solved in each layer's own backward."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from fisherlab import doors
from fisherlab.approximations.damping import Rule, gram_norm, lambdas, unexpanded
from fisherlab.blocks import DirectSum, Outer
from fisherlab.blocks.columns import Columns
from fisherlab.blocks.numerics import cholesky, dot, sum_of
from fisherlab.blocks.reads import Together, Unmet, together
from fisherlab.distributed import answering, unwrapped
from fisherlab.extract.geometry import Geometry
from fisherlab.extract.image import ImageColumns
from fisherlab.optim.attempt import Kept
from fisherlab.optim.base import CurvatureOptimizer
from fisherlab.optim.scale import OptimizerError, check_criterion, check_ranks
from fisherlab.optim.step import Directions
from fisherlab.optim.summary import last_steps
from fisherlab.optim.weight import Weight, has_gradient, undelivered
from fisherlab.optim.weighted import Calls, WeightedLayers, columns_of, of_columns

if TYPE_CHECKING:
    import pandas as pd


class Woodbury(CurvatureOptimizer):
    """`W <- W - lr U v`,  `v = (M lambda I + K)^{-1} 1`,  `K = U^T U`, per layer and batch.

    With `U 1 / M` the mean gradient this is `(F + lambda I)^{-1} g` exactly (TENGraD, NGM 36-43;
    FNGD (8), (9)), for the empirical Fisher and observed labels. `fold=True` multiplies by lambda,
    as FNGD does, so that lr is of SGD's size. `damping` is lambda or a rule, or `alpha` gives
    `lambda = alpha ||K||_F` per layer and batch (FNGD (14)); exactly one of them.

    `p.grad` is the weighted gradient after `backward()`, so clipping, loss scaling and accumulation
    see what will be used (accumulation: the mean of the micro-batches' steps). The calls of a layer
    in one forward share one Gram matrix; those of two forwards never do. With
    `Clip(kl=...)`, inputs and output gradients are kept until the step.

    A rule's lambda is one per layer; `alpha ||K||_F` is one per group of a convolution.

    Under DDP every rank solves for the joint batch: a layer's raw inputs and output gradients are
    gathered, `n (|x| + |s|)` numbers, never per-example gradients.
    """

    data_parallel = True

    # `P (g + w W)` needs the columns of the whole weight, which no backward pass has
    decay_placements = ("after",)

    @property
    def damped(self) -> bool:
        """Whether every group has a damping; `alpha` takes its place."""
        return self.alpha is None

    # whether `control` makes the coefficients of every batch equal
    controls_solve: ClassVar[bool] = True

    def __init__(
        self,
        model: nn.Module,
        *,
        criterion: Callable[..., Any] | None = None,
        params: Iterable[Any] | None = None,
        lr: float,
        damping: float | Rule | None = None,
        alpha: float | None = None,
        fold: bool = False,
        **options: Any,
    ) -> None:
        check_criterion(criterion)
        if (damping is None) == (alpha is None):
            raise ValueError(
                "give either damping (lambda) or alpha (lambda = alpha ||K||_F), got damping "
                f"{doors.said(damping)} and alpha {doors.said(alpha)}; with damping=... pass "
                "alpha=None"
            )
        for name, value in {"damping": damping, "alpha": alpha}.items():
            if value is None or callable(value):
                continue
            doors.number(value, name, above=0.0)
        if damping is not None:
            unexpanded(damping, type(self).__name__)
        self.alpha = alpha  # its groups need no damping then
        super().__init__(model, params, lr=lr, groups={"damping": damping}, **options)
        model = unwrapped(model)
        self.fold = doors.flag(fold, "fold")
        # per layer, the backward passes that `.grad` holds
        self._taken: dict[str, list[Taken]] = {}
        # the last step's size, damping and, for the spectrum, its Gram matrices
        self._last: dict[str, tuple[int, Any, list[tuple[float, Tensor]]]] = {}
        ended = None if self.ranks is None else _unowned(self._ended)
        self.layers = WeightedLayers(model, self.coverage, _unowned(self.rows), criterion, ended)
        self._install(self.layers)

    @staticmethod
    def takes(geometry: Geometry) -> bool:
        # the rows of a transposed convolution's gradient are no rows of its weight
        return geometry.transposed is None and geometry.lookup is None

    def rows(self, weight: Weight, calls: Calls, factor: float) -> tuple[Tensor, Tensor | None]:
        """`M v`, `[groups, n]`, for a layer's calls, and the weighted gradient where cheap."""
        with answering(self.ranks, f"solving for layer {weight.name!r}"):
            return self._rows(weight, calls, factor)

    def _rows(self, weight: Weight, calls: Calls, factor: float) -> tuple[Tensor, Tensor | None]:
        mine, _, factor = self._places(weight, calls, factor)
        every = self._gathered(calls)
        columns = columns_of(weight, every, factor)
        waiting = Together()
        # the step looks at the conditions of all layers; ranks differ in theirs
        with waiting.noting() if self.ranks is None else nullcontext():
            rows, products, check = self.solve(weight, columns)
        # in the scale of the gradient that backward leaves
        # divided twice: a square may overflow
        of_all = factor * (1 if self.ranks is None else self.ranks.size)
        scale = 1 / of_all / of_all
        products = products[0] * scale, products[1] * scale
        taken = Taken(weight, calls, rows[:, mine], factor, rows, products)
        taken.waiting, taken.check = waiting, check
        self._take(weight, taken)
        # the sum of gradients is free if they were formed for their Gram matrix, or joined
        joined = len(calls) > 1 or all(isinstance(each, ImageColumns) for each in columns)
        if self.ranks is None and joined:
            return rows, of_columns(columns, rows) / factor
        return rows[:, mine], None

    def _ended(self, examples: int) -> None:
        """Meet the others before DDP does, which waits for a rank that is still at a layer."""
        assert self.ranks is not None
        with answering(self.ranks, "ending a backward pass"):
            check_ranks(self.ranks, [], f"the end of a pass of step {self.steps}", examples)

    def _take(self, weight: Weight, taken: Taken) -> None:
        passes = self._taken.setdefault(weight.name, [])
        if passes and not has_gradient(weight):
            # the captures of an earlier backward pass were dropped with its gradient
            passes.clear()
        if self.clip.kl is None:
            taken.calls = []
        passes.append(taken)

    def _gathered(self, calls: Calls) -> Calls:
        """The raw pairs of the joint batch."""
        if self.ranks is None:
            return calls
        return [(self.ranks.gather(x), self.ranks.gather(g)) for x, g in calls]

    def _places(self, weight: Weight, calls: Calls, factor: float) -> tuple[slice, int, float]:
        """This rank's rows in the joint batch, how many that has, and the ranks' one factor."""
        n = len(calls[0][1])
        if self.ranks is None:
            return slice(None), n, factor
        at = f"layer {weight.name!r} of step {self.steps}, called {len(calls)} times"
        (shared,), counts = check_ranks(self.ranks, [factor], at, n)
        start = sum(counts[: self.ranks.index])
        return slice(start, start + n), sum(counts), shared

    def solve(
        self, weight: Weight, columns: list[Columns]
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Callable[[], None]]:
        """`M v` of every group from its columns; `<U M v, U 1>` and `||U M v||^2`.

        Called where reads wait, what is returned last solves once more, and says what failed.
        """
        blocks = [GramBlock(each) for each in columns]
        lambdas = self._dampings(weight, blocks)
        grams = [block.gram() for block in blocks]
        pairs = list(zip(grams, lambdas, strict=True))

        def check() -> None:
            for K, damping in pairs:
                weights_of(K, damping, self.fold, weight.name)

        found = [weights_of(K, damping, self.fold, weight.name) for K, damping in pairs]
        weighted = [K @ rows for K, rows in zip(grams, found, strict=True)]
        change = sum_of(each.sum() for each in weighted)
        square = sum_of(rows @ each for rows, each in zip(found, weighted, strict=True))
        if self.control and self.controls_solve:
            # M v = c for all examples, as long a step of the layer
            plain = sum_of(K.sum() for K in grams)
            ratio = square / torch.where(plain > 0, plain, 1)
            factor = torch.where(plain > 0, ratio, 0).sqrt()
            found = [factor.expand_as(rows) for rows in found]
            change, square = factor * plain, factor * factor * plain
        size = sum(block.size for block in blocks)
        scaled = [(block.core, K) for block, K in zip(blocks, grams, strict=True)]
        self._last[weight.name] = size, sum(lambdas) / len(lambdas), scaled
        return torch.stack(found), (change, square), check

    def _dampings(self, weight: Weight, blocks: list[GramBlock]) -> list[float]:
        """The damping of every group: the layer's own, or `alpha ||K||` of each."""
        if self.alpha is not None:
            rule = gram_norm(self.alpha)
            return [lambdas(rule, {weight.name: block})[weight.name] for block in blocks]
        whole = blocks[0] if len(blocks) == 1 else DirectSum(blocks)
        rule = unexpanded(self.coverage.option(weight, "damping"), type(self).__name__)
        return [lambdas(rule, {weight.name: whole})[weight.name]] * len(blocks)

    def summary(self) -> pd.DataFrame:
        """Per layer, of the last batch: damping, relative too, and the eigenvalues above it."""
        # solved in the order of the backward pass, told in that of the layers
        last = {n: self._last[n] for n in self.weights if n in self._last}
        found = {
            n: (size, float(damping), [core * K for core, K in scaled])
            for n, (size, damping, scaled) in last.items()
        }
        return last_steps(found, self.steps)

    def _refused(self) -> None:
        self.layers.watch.settle()

    def _discard(self) -> None:
        self._taken.clear()
        self.layers.state.reached.clear()

    def _keep(self) -> Kept:
        reached = set(self.layers.state.reached)

        def back() -> bool:
            self.layers.state.reached = reached
            return True

        return Kept(back, lambda: None)

    def _settle(self) -> None:
        """Have the conditions of the backward passes looked at."""
        every = [taken for passes in self._taken.values() for taken in passes]
        waiting = together()
        noted = Together() if waiting is None else waiting
        for taken in every:
            noted.join(taken.waiting)
        try:
            if waiting is None and noted:
                noted.settle([])
        except Unmet:
            for taken in every:
                if taken.check is not None:
                    taken.check()
            raise

    def _check_delivered(self) -> None:
        state = self.layers.state
        reached, state.reached = state.reached, set()
        for name, weight in self.weights.items():
            if name not in reached and name not in self.left_out and has_gradient(weight):
                raise OptimizerError(undelivered(name))

    def _directions(self) -> dict[nn.Parameter, Tensor]:
        self._check_delivered()
        self._settle()
        if not self.clip.bounds:
            return {}
        every = [p for w in self.weights.values() for p in (w.weight, w.bias) if p is not None]
        return {p: p.grad for p in every if p.grad is not None}

    def _of_gradients(self, directions: dict[nn.Parameter, Tensor]) -> dict[nn.Parameter, Tensor]:
        return directions  # the control is in the coefficients

    def _apply(self, directions: Directions) -> None:
        self._taken.clear()
        super()._apply(directions)

    def _predicted_kl(self, directions: Directions) -> Tensor:
        # .grad is the direction already, unscaled, clipped or averaged over ranks since: what
        # backward left of direction and gradient, at the scale that the two lengths tell
        every = list(directions)
        norms = torch._foreach_norm([directions[p] for p in every], 2, dtype=torch.float64)
        lengths = dict(zip(every, torch.stack(norms).square(), strict=True))
        total = torch.zeros_like(next(iter(lengths.values())))
        rates = {p: float(group["lr"]) for group in self.param_groups for p in group["params"]}
        for passes in self._taken.values():
            weight = passes[0].weight
            params = [p for p in (weight.weight, weight.bias) if p is not None]
            lrs = {p: rates[p] for p in params if p in directions}
            if not lrs:  # frozen since, or no part of this loss
                continue
            change, square = self._products(weight, passes, lrs)
            length = sum_of(lengths[p] for p in lrs)
            ratio = change * length / torch.where(square != 0, square, 1)
            total = total + torch.where(square != 0, ratio, 0)
        return total

    def _products(
        self, weight: Weight, passes: list[Taken], lrs: dict[nn.Parameter, float]
    ) -> tuple[Tensor, Tensor]:
        """`sum lr^2 <d, g>` and `||d||^2` of what the passes together left in a layer."""
        known = passes[0].products
        if len(passes) == 1 and known is not None and len(set(lrs.values())) == 1:
            lr = next(iter(lrs.values()))
            return known[0] * (lr * lr), known[1]
        steps, gradients = zip(*(taken.pair() for taken in passes), strict=True)
        found = {"d": sum_of(steps), "g": sum_of(gradients)}
        if self.ranks is not None:
            found = {key: sums / self.ranks.size for key, sums in self.ranks.sum(found).items()}
        d, g = (weight.split(found[key]) for key in "dg")
        change = sum_of(lr * lr * dot(d[p], g[p]) for p, lr in lrs.items())
        return change, dot(found["d"], found["d"])


@dataclass(eq=False)
class Taken:
    """The captures of one backward pass at a layer, and the weights of its examples."""

    # as the pass multiplied it
    weight: Weight
    # this rank's own
    calls: Calls
    rows: Tensor
    factor: float
    # all ranks together
    every: Tensor
    # `<d, g>` and `||d||^2` of its direction and gradient, if they were at hand
    products: tuple[Tensor, Tensor] | None = None
    # the examples' indices in the data set
    indices: Tensor | None = None
    # the conditions of its solve, and what says which of them failed
    waiting: Together = field(default_factory=Together)
    check: Callable[[], None] | None = None

    def pair(self) -> tuple[Tensor, Tensor]:
        """Its direction and its gradient, in the scale of the loss."""
        columns = columns_of(self.weight, self.calls, self.factor)
        ones = torch.ones_like(self.rows)
        return of_columns(columns, self.rows) / self.factor, of_columns(columns, ones) / self.factor


class GramBlock(Outer):
    """Exact block that reads its trace from the Gram matrix, which is always needed."""

    def __init__(self, columns: Columns) -> None:
        self.columns, self.core, self.shift = columns, 1.0 / columns.count, 0.0

    def trace(self) -> Tensor:
        return self.core * self.gram().trace()


def _unowned(method: Callable[..., Any]) -> Callable[..., Any]:
    """A bound method that does not keep its object alive: the model holds the hooks."""
    reference = weakref.WeakMethod(method)
    return lambda *args: _call(reference, args)


def _call(reference: weakref.WeakMethod[Any], args: tuple[Any, ...]) -> Any:
    method = reference()
    if method is None:
        raise OptimizerError("the optimizer was deleted between this forward and its backward")
    return method(*args)


def weights_of(K: Tensor, damping: float | Tensor, fold: bool, name: str) -> Tensor:
    """`M v = M (M lambda I + K)^{-1} 1`, times lambda where folded, `[M]` float64.      FNGD (9).

    `lambda (M lambda I + K)^{-1} 1` has no cancellation, where the printed
    `(1/M)(1 - (lambda I + K/M)^{-1} K 1/M)` loses all digits in float32.
    """
    M, damping = len(K), torch.as_tensor(damping, dtype=torch.float64, device=K.device)
    # alpha ||K|| of a layer whose gradients are all zero: any weights give the same step
    zero = damping == 0
    damped = K.clone()
    damped.diagonal().add_(torch.where(zero, 1, M * damping))
    factor = cholesky(damped, f"damped Gram matrix of layer {name!r}")
    ones = torch.ones(M, 1, dtype=torch.float64, device=K.device)
    v = torch.cholesky_solve(ones, factor)[:, 0]
    return torch.where(zero, 1, M * v * (damping if fold else 1.0))


class TENGraD(Woodbury):
    """`(F + lambda I)^{-1} g` of the mini-batch's exact block, layer by layer.    NGM (36)-(43).

    After `backward()`, `p.grad` is the preconditioned gradient: clip and log it as such. The plain
    gradient is nowhere.

    Args:
        model: the model.
        criterion: the very object that the loop calls; see `Preconditioner`.
        params: parameters, or groups of them with options of their own; None: all of the model.
        lr: learning rate.
        damping: lambda, absolute, or a rule; exclusive with `alpha`.
        alpha: lambda relative to `||K||_F`, per layer and batch; exclusive with `damping`.
        fold: whether the direction is multiplied by lambda, so that `lr` is of SGD's size.
        options: further options of the step and its groups.
    """


class NGDSMW(Woodbury):
    """FNGD without sharing: its coefficients recomputed at every step.      FNGD tab. IV.

    After `backward()`, `p.grad` is the preconditioned gradient: clip and log it as such. The plain
    gradient is nowhere.

    Args:
        model: the model.
        fold: whether the direction is multiplied by lambda, so that `lr` is of SGD's size.
        options: further arguments of `TENGraD`.
    """

    def __init__(self, model: nn.Module, *, fold: bool = True, **options: Any) -> None:
        super().__init__(model, fold=fold, **options)
