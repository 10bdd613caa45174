"""The factor between `dL/ds` and the gradient of the per-example loss: followed or recognised.

Mean or sum, gradient accumulation and loss scaling all hide in it. A wrong factor c would silently
scale the Fisher matrix by c^2.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from fisherlab import doors
from fisherlab.blocks.reads import numbers_of
from fisherlab.distributed import RankError, Ranks
from fisherlab.extract import fisher
from fisherlab.extract.criteria import is_a
from fisherlab.extract.isolation import is_isolated, is_traced
from fisherlab.optim.passes import behind
from fisherlab.optim.watch import Hook
from fisherlab.optim.weight import Weight


class OptimizerError(RuntimeError):
    """A step that cannot be taken; nothing has been changed."""


class NotFinite(OptimizerError):
    """What tells the scale of a loss has NaN or inf, and so will the gradients have."""


def scale_factor(
    output: Tensor,
    output_gradient: Tensor | None,
    loss_scale: Tensor | None,
    criterion: Callable[..., Any] | None,
    own_scale: Tensor | None = None,
    last: bool = True,
) -> float:
    """From the criterion's own loss tensor where it was seen, else from the output's gradient."""
    if loss_scale is not None:
        scale = float(loss_scale)
        if not math.isfinite(scale):
            raise NotFinite("the gradient at the loss is NaN or inf: the loss is multiplied by it")
        if scale == 0:
            raise OptimizerError(
                "the loss is multiplied by 0, so the gradients of its examples are not known; "
                "leave the batch out; no parameter was changed"
            )
        mean = criterion is not None and fisher.reduction_of(criterion) == "mean"
        return (len(output) if mean else 1.0) / scale
    if output_gradient is None:
        raise OptimizerError(
            "no gradient arrived at the model's output in this backward pass; call the model "
            "itself (not model.forward or parts of it) and backpropagate its output"
        )
    return recognised_factor(output, output_gradient, criterion, own_scale, last)


def recognised_factor(
    output: Tensor,
    gradient: Tensor,
    criterion: Callable[..., Any] | None = None,
    own_scale: Tensor | None = None,
    last: bool = True,
) -> float:
    """`c / kappa` for `dL/df = kappa (p - onehot(y))`: a mean of Z terms has `c = M / Z`, a sum 1.

    kappa holds the mean or sum, accumulation and loss scaling together.

    Args:
        output: class scores, the classes in axis 1 or in the last.
        gradient: what arrived there.
        criterion: whose reduction says mean or sum, and its label smoothing.
        own_scale: what arrived at the loss that the model itself returned: with kappa it gives Z.
        last: whether classes may be the last axis.

    Raises:
        OptimizerError: the gradient is not that of softmax cross entropy, or an output has several
            terms and nothing says whether they are averaged.
    """
    criterion = fisher.as_module(criterion) if criterion is not None else None
    if criterion is not None and not is_a(criterion, nn.CrossEntropyLoss):
        raise OptimizerError(
            "the scale of the loss cannot be read off its gradient for "
            f"{type(criterion).__name__}; call the very `criterion` object given to the optimizer "
            "in the training loop, on the output of the model's last call, so that its loss can be "
            "followed"
        )
    smoothing = 0.0 if criterion is None else cast(nn.CrossEntropyLoss, criterion).label_smoothing
    found = _softmax(output, gradient, smoothing)
    if found is None and last and output.ndim > 2:
        found = _softmax(output.transpose(1, -1), gradient.transpose(1, -1), smoothing)
    if found is None and not bool(torch.isfinite(gradient).all()):
        raise NotFinite(
            "the gradient at the model's output has NaN or inf entries: the loss has diverged, or "
            "the data or the model hold such values"
        )
    if found is None:
        raise OptimizerError(_ASK if last else f"{_ASK}, or take fisher_type='empirical'")
    kappa, arrived, terms = found
    M = len(output)
    if (output.ndim == 2 and terms == M) or not terms:
        return 1 / kappa
    if criterion is not None:
        mean = fisher.reduction_of(criterion) == "mean"
    elif own_scale is not None:
        # in a sum over the examples and their terms, each counts once
        Z = float(own_scale) / kappa
        mean = not math.isclose(Z, 1, rel_tol=1e-3)
        # terms whose gradient underflowed are told from ignored ones
        terms = round(Z) if arrived <= round(Z) <= terms else terms
    else:
        raise OptimizerError(
            "the model's output has several loss terms per example (or ignored ones), so mean and "
            "sum cannot be told apart: pass `criterion=` (its reduction says which)"
        )
    return (M / terms if mean else 1.0) / kappa


def _softmax(output: Tensor, gradient: Tensor, smoothing: float) -> tuple[float, int, int] | None:
    """kappa for class scores in axis 1, the terms with a gradient, and all that may be terms.

    None where the gradient is another one than that of softmax cross entropy.
    """
    if output.ndim < 2 or output.shape[1] < 2:
        return None
    f, G = output.double(), gradient.double()
    p = f.softmax(1)
    # only the label's entry is negative; where it was rounded to zero the model is sure of it
    lowest, labels = G.min(1, keepdim=True)
    labels = torch.where(lowest < 0, labels, p.argmax(1, keepdim=True))
    target = torch.full_like(f, smoothing / f.shape[1])
    target.scatter_add_(1, labels, torch.full_like(labels, 1, dtype=f.dtype) * (1 - smoothing))
    # a row of zeros is an ignored label, or a saturated softmax whose gradient underflowed
    sure = 1 - p.amax(1, keepdim=True) < 1e-4
    arrived = (G != 0).any(1, keepdim=True)
    score = (p - target) * arrived
    fitted = (G * score).sum() / score.square().sum().clamp(min=1e-300)
    found = [G.norm(), fitted, (G - fitted * score).norm(), arrived.sum(), (arrived | sure).sum()]
    # all numbers in one read
    size, kappa, wrong, seen, terms = numbers_of(found)
    rounding = torch.finfo(gradient.dtype).eps
    if size == 0:
        return 1.0, 0, 0  # every per-example gradient is zero, at any scale
    tolerance = 1e-2 if gradient.dtype.itemsize < 4 else 1e-3
    if not kappa > 0 or not wrong <= tolerance * size + 16 * rounding * kappa * len(f) ** 0.5:
        return None
    return kappa, round(seen), round(terms)


def check_ranks(
    ranks: Ranks, factors: list[float], at: str, count: int
) -> tuple[list[float], list[int]]:
    """The factors, with one rounding for all, and every rank's count.

    Ranks whose examples DDP weighs differently are refused.

    Args:
        ranks: the ranks.
        factors: of each pass, from `dL/ds` to the gradient of the per-example loss: the number of
            examples for a mean. DDP's `p.grad` is that of the joint batch where they agree.
        at: what this rank is about to send, which must be the same on all.
        count: of this rank's examples, or of the layers they reach.

    Raises:
        OptimizerError: the factors differ.
        RankError: the ranks are about to send different things, or one has nothing.
    """
    told = ranks.objects((at, factors, count))
    counts = [count for *_, count in told]
    if 0 in counts and any(counts):
        raise RankError(
            f"rank {counts.index(0)} has no example that reaches a layer, and others have; give "
            "every rank at least one (drop_last=True); no parameter was changed"
        )
    for rank, (theirs, *_) in enumerate(told):
        if theirs != told[0][0]:
            raise RankError(
                f"rank 0 is at {told[0][0]} and rank {rank} at {theirs}; give every rank the same "
                "model, whose forward pass takes the same way for every batch, and load the same "
                "checkpoint; no parameter was changed"
            )
    every = [factors for _, factors, _ in told]
    for rank, theirs in enumerate(every):
        ours = every[0]
        if len(theirs) != len(ours) or any(
            not math.isclose(a, b, rel_tol=1e-4) for a, b in zip(ours, theirs, strict=True)
        ):
            weights = [[f"1/{factor:.6g}" for factor in side] for side in (ours, theirs)]
            raise OptimizerError(
                f"the ranks weigh their examples differently (dL/dl_n is "
                f"{', '.join(weights[0])} on rank 0 and {', '.join(weights[1])} on rank "
                f"{rank}): DDP averages ranks, not examples, so with "
                "unequal batches p.grad is not the joint batch's. Give every rank the same "
                "number of examples (drop_last=True), or scale the loss of each by world_size "
                "* its examples / all examples; no parameter was changed"
            )
    return every[0], counts


def ignored_terms(output: Tensor, gradient: Tensor) -> bool:
    """Whether some loss terms of class scores are ignored: no gradient, though not saturated."""
    if output.ndim < 2:
        return False
    arrived = (gradient != 0).any(1)
    sure = 1 - output.double().softmax(1).amax(1) < 1e-4
    return bool(arrived.any()) and bool((~arrived & ~sure).any())


_ASK = (
    "the gradient at the model's output is not that of softmax cross entropy, so the scale between "
    "the loss and the per-example loss is not known; pass `criterion=` (the criterion object that "
    "the training loop calls) to the optimizer"
)


class Loss:
    """The loss of one forward, as its backward tells it: where its scale is read off."""

    def __init__(self, criterion: Callable[..., Any] | None, own: Callable[[], bool]) -> None:
        """`own`: whether the pass that runs is one of FisherLab's own."""
        self.criterion, self.is_own = criterion, own
        self._output: Tensor | None = None
        self._gradient: Tensor | None = None
        self._scale: Tensor | None = None
        # the backward pass that the scale is of
        self._task = -1
        self._own: Tensor | None = None
        self._known: float | None = None

    @property
    def factor(self) -> float:
        """The factor from `dL/ds` to the gradient of the per-example loss.

        NaN where what arrived has NaN or inf: the backward pass goes on, and the step refuses it.
        """
        if self._known is None:
            if self._output is None:
                raise OptimizerError("a backward pass came without a forward of the model itself")
            try:
                self._known = scale_factor(
                    self._output, self._gradient, self._scale, self.criterion, self._own
                )
            except NotFinite:
                self._known = math.nan
        return self._known

    def follow(self, output: Tensor, own: Tensor | None) -> None:
        """Watch the output of the model, and the loss that it returned."""
        self._output = output.detach()
        output.register_hook(self._arrive)
        if own is not None:
            own.register_hook(self._arrive_own)

    def _arrive_own(self, gradient: Tensor) -> None:
        if not self.is_own():
            self._own, self._known = gradient.detach(), None

    def _arrive(self, gradient: Tensor) -> None:
        if not self.is_own():
            self._gradient, self._known = gradient.detach(), None

    def scaled(self, gradient: Tensor) -> None:
        """The gradient that arrives at the criterion's own loss.

        Losses of one output, as of mixed labels, add up in one backward pass.
        """
        if self.is_own():
            return
        before, self._task = self._task, torch._C._current_graph_task_id()
        known = self._scale if before == self._task else None
        own = gradient.detach()
        self._scale, self._known = own if known is None else known + own, None


def is_loss(value: object) -> bool:
    """Whether a criterion returned what a step may be of, in a pass of the user's own."""
    if is_isolated() or is_traced():
        return False
    return isinstance(value, Tensor) and value.requires_grad


def check_criterion(criterion: object) -> None:
    """Refuse what no loop calls as its loss, a class of losses among it; None is allowed.

    Raises:
        ValueError: it is neither a module nor a function.
    """
    if criterion is not None and (not callable(criterion) or isinstance(criterion, type)):
        raise ValueError(
            "criterion is the module or the function that the loop calls, or None; got "
            f"{doors.said(criterion)}"
        )


class LossScale:
    """The loss of each forward, in `loss` that of the latest."""

    def __init__(
        self,
        criterion: Callable[..., Any] | None,
        own: Callable[[], bool],
        weights: Mapping[str, Weight],
    ) -> None:
        """`weights`: those of the model, some of which every loss of it depends on."""
        self.criterion, self.own, self.loss = criterion, own, Loss(criterion, own)
        self.weights, self._key = weights, f"fisherlab loss of {id(self)}"
        self.handles = []
        if isinstance(criterion, nn.Module):
            hook = Hook(lambda _, *args: self._loss(*args))
            self.handles.append(criterion.register_forward_hook(hook, with_kwargs=True))

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def begin(self) -> None:
        """A forward begins: earlier ones may still await their backward."""
        self.loss = Loss(self.criterion, self.own)

    def end(self, output: Tensor | None, own: Tensor | None = None) -> None:
        """A forward ends with this output, and the model's own loss."""
        if output is not None:
            self.loss.follow(output, own)
            if output.grad_fn is not None:
                # the graph keeps the loss alive with its layers
                cast(Any, output.grad_fn).metadata[self._key] = weakref.ref(self.loss)

    def _loss(
        self, criterion: nn.Module, args: tuple[Any, ...], kwargs: dict[Any, Any], loss: Tensor
    ) -> None:
        if not is_loss(loss):
            return
        saw = args[0] if args else kwargs["input"]
        of = behind(saw, self._key, self.loss, (w.weight for w in self.weights.values()))
        if len(of) == 1:
            loss.register_hook(of[0].scaled)
