"""A loss that the model computes itself: from its number, or its examples' losses, to captures.

    L = (1/M) sum_n l_n  ("mean")  or  L = sum_n l_n  ("sum")       both give  g_n = d l_n / d s_n

Such a loss has no known distribution, so its Fisher is the empirical one. The statement of its
scale is proven on two halves of the batch, whose examples must keep their gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fisherlab import doors
from fisherlab.distributed import Ranks
from fisherlab.extract.criteria import WithRules
from fisherlab.extract.geometry import CaptureError
from fisherlab.extract.hooks import fill
from fisherlab.extract.proof import call_tolerance
from fisherlab.extract.tape import Record, Recorded

SCALES = ("mean", "sum")
# Relative. The scale of the other half of a batch differs by the number of its examples.
SLACK = 1e-2
# Why a weight has no examples where half of the batch gives them other gradients.
INTERACT = (
    "its rows are not the batch's examples, or examples interact: the loss of half the batch gives "
    "them other gradients; return the loss of every example"
)


class Inside(WithRules):
    """The criterion of a model that returns its loss, or the loss of every example.

    Args:
        scale: "mean" or "sum": how the loss of the batch is made of the losses of its examples.
    """

    rules = None

    def __init__(self, scale: str) -> None:
        self.reduction = scale
        self.__name__ = "the model's own loss"

    def __call__(self, outputs: Tensor, y: Tensor) -> Tensor:
        """The loss of the batch."""
        return outputs.mean() if self.reduction == "mean" else outputs.sum()

    def gradient(self, losses: Tensor, n: int, ranks: Ranks | None) -> Tensor:
        """`d sum_n l_n / d losses`: 1 for the losses of `n` examples, `n` for their mean.

        Raises:
            CaptureError: for what is neither the loss of the batch nor one number per example.
        """
        if losses.ndim > 1 or (losses.ndim and len(losses) != n):
            raise CaptureError(
                f"the model's own loss has shape {tuple(losses.shape)} for {n} examples; return "
                f"the loss of the batch, or one per example, ({n},)"
            )
        if ranks is not None and not losses.ndim:
            raise CaptureError(
                "a loss of each process's own batch is none of the joint batch; return the loss of "
                "every example"
            )
        if not torch.isfinite(losses).all():
            raise CaptureError("the model's own loss is NaN or inf; check data and weights")
        mean = self.reduction == "mean" and not losses.ndim
        return torch.full_like(losses, float(n if mean else 1)).detach()

    def prove(
        self,
        record: Record,
        empty: Callable[[], Record],
        run: Callable[[object], Tensor],
        x: object,
        n: int,
    ) -> dict[str, str]:
        """Why weights have no examples by the losses of two halves of the batch, by name.

        Args:
            record: of the whole batch, gradients included.
            empty: makes an empty record of the same weights.
            run: makes the loss of some examples.
            x: the batch.
            n: its number of examples.

        Raises:
            CaptureError: the loss has another scale than the stated one.
        """
        if n < 2:
            return {}
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(n, generator=generator, device="cpu")
        failures: dict[str, str] = {}
        # the factor of the gradients in each half that has some, and its share of the examples
        factors: list[tuple[float, float]] = []
        for half in (order[: n // 2].sort().values, order[n // 2 :].sort().values):
            again = empty()
            with again.tape:
                loss = run(rows_of(x, n, half))
            if not torch.isfinite(loss).all():  # a mean of no term
                continue
            again.labels = self.gradient(loss, len(half), None)
            fill(loss, again, again.labels, None)
            ratios, wrong = _ratios(record, again, half)
            failures |= dict.fromkeys(wrong, INTERACT)
            if ratios:
                ratio, _ = max(ratios, key=lambda pair: pair[1])
                if any(abs(other - ratio) > SLACK * abs(ratio) for other, _ in ratios):
                    raise self._of_another_scale(ratio)
                factors.append((ratio, len(half) / n))
        if self.reduction == "sum":
            for ratio, _ in factors:
                if abs(ratio - 1) > SLACK:
                    raise self._of_another_scale(ratio)
        # a mean over tokens has a factor of its own in each batch
        elif factors and all(abs(ratio / share - 1) < SLACK for ratio, share in factors):
            raise self._of_another_scale(factors[0][0])
        return failures

    def _of_another_scale(self, ratio: float) -> CaptureError:
        return CaptureError(
            f"the model's own loss is no {self.reduction} over examples: half of the batch has "
            f"{ratio:.3g} x the gradients; loss_scale is 'mean' or 'sum', or return the loss of "
            "every example"
        )


def _ratios(
    record: Record, again: Record, half: Tensor
) -> tuple[list[tuple[float, float]], list[str]]:
    """What half of the batch makes of the gradients of each call, and the weights that it loses."""
    ratios: list[tuple[float, float]] = []
    wrong = []
    for name, calls in record.calls.items():
        others = again.calls[name]
        found = [_ratio(one, two, half) for one, two in zip(calls, others, strict=False)]
        if len(calls) != len(others) or None in found:
            wrong.append(name)
        ratios += [pair for pair in found if pair is not None and pair[1]]
    return ratios, wrong


def criterion_of(criterion: Any, loss_scale: str | None) -> Any:
    """The criterion, or `Inside` where the model computes the loss.

    Raises:
        CaptureError: neither or both are given, or `loss_scale` is none of `SCALES`.
    """
    if loss_scale is None:
        if criterion is None:
            raise CaptureError(
                "criterion is None; pass a loss such as torch.nn.CrossEntropyLoss(), or for a loss "
                "inside the model loss_scale='mean' or 'sum'"
            )
        return criterion
    doors.choice(loss_scale, "loss_scale", SCALES, error=CaptureError)
    if criterion is not None and not isinstance(criterion, Inside):
        raise CaptureError("loss_scale is for a loss inside the model; pass None as criterion")
    return Inside(loss_scale)


def rows_of(x: object, n: int, rows: slice | Tensor) -> object:
    """Some examples of a model's arguments; tensors of another length belong to every example."""
    if isinstance(x, Tensor):
        return x[rows] if x.ndim and len(x) == n else x
    if isinstance(x, Mapping):
        return {key: rows_of(value, n, rows) for key, value in x.items()}
    if isinstance(x, tuple | list):
        return type(x)(rows_of(value, n, rows) for value in x)
    return x


def _ratio(call: Recorded, other: Recorded, rows: Tensor) -> tuple[float, float] | None:
    """The factor of a call's gradients in the half batch, and their length; None if no factor."""
    g, h = call.label_gradient, other.label_gradient
    if len(call.output) <= int(rows.max()) or len(h) != len(rows):
        return None
    g = g[rows.to(g.device)]
    if g.shape != h.shape:
        return None
    square = float(g.square().sum())
    if not square:
        return None if bool(h.any()) else (1.0, 0.0)
    ratio = float((g * h).sum()) / square
    if float((h - ratio * g).norm()) > call_tolerance(call) * float(h.norm()):
        return None
    return ratio, square
