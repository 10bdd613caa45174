"""Torch's criteria: what each is made of, as rules that are tested here and proven nowhere else.

Importing this module makes the registry know them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fisherlab.extract.criteria import (
    Check,
    Rules,
    Sampler,
    Terms,
    autograd_score,
    know,
    name_of,
    noise,
    ones,
    terms_at,
)
from fisherlab.extract.geometry import CaptureError

# Classes --------------------------------------------------------------------------------------


def _check_classes(criterion: Any, outputs: Tensor, y: Tensor) -> None:
    if y.is_floating_point():
        if y.shape != outputs.shape or type(criterion) is nn.NLLLoss:
            raise CaptureError(
                f"labels are {y.dtype} of shape {tuple(y.shape)}: {name_of(criterion)} takes class "
                "indices, y.long(), or class probabilities in the shape of the outputs, "
                f"{tuple(outputs.shape)}"
            )
        return
    if outputs.ndim < 2:
        raise CaptureError(
            f"outputs of shape {tuple(outputs.shape)} have no class axis; {name_of(criterion)} "
            "takes one score per class, [n, classes]"
        )
    classes = outputs.shape[1]
    expected = (outputs.shape[0], *outputs.shape[2:])
    if y.dtype not in (torch.int64, torch.uint8):
        raise CaptureError(f"labels are {y.dtype}; class indices are torch.int64: y.long()")
    if y.shape == outputs.shape != expected:
        raise CaptureError(
            f"labels of the outputs' shape {tuple(y.shape)} in whole numbers are one-hot; pass "
            "class indices, y.argmax(1), or probabilities, y.float()"
        )
    if tuple(y.shape) != expected:
        raise CaptureError(
            f"labels have shape {tuple(y.shape)}, outputs {tuple(outputs.shape)} need "
            f"{expected}; class scores are axis 1 of the outputs, or the last if labels show it"
        )
    counted = y[y != criterion.ignore_index]
    if counted.numel() == 0:
        raise CaptureError("every label is ignore_index: no loss term is left")
    low, high = int(counted.min()), int(counted.max())
    if low < 0 or high >= classes:
        raise CaptureError(
            f"labels run from {low} to {high}, outputs have {classes} classes (0 to "
            f"{classes - 1}); check the data or the model's num_classes"
        )


def _counted(criterion: Any, y: Tensor) -> Tensor:
    """`[n, ...]`: which labels are not ignored."""
    return y != criterion.ignore_index


def _of_labels(criterion: Any, counted: Tensor, y: Tensor) -> Tensor:
    """The class weight of each label, 0 where it is ignored."""
    return torch.where(counted, criterion.weight[torch.where(counted, y, 0).long()], 0)


def _class_shares(criterion: Any, outputs: Tensor, y: Tensor) -> Tensor:
    """The share of each term in the mean: class weights for indices, 1 for probabilities."""
    if y.is_floating_point():
        return ones((y.shape[0], *y.shape[2:]), y)
    counted = _counted(criterion, y)
    return counted if criterion.weight is None else _of_labels(criterion, counted, y)


def _class_factor(criterion: Any, outputs: Tensor, y: Tensor) -> Tensor | None:
    """The factor on `diag(p) - p p^T` in the Hessian of each term; None for 1 everywhere.

    A term is `-sum_c w_c q_c log p_c` with `q` the smoothed label, so the factor is
    `sum_c w_c q_c`.
    """
    smoothing = getattr(criterion, "label_smoothing", 0.0)
    weight, classes = criterion.weight, outputs.shape[1]
    if y.is_floating_point():
        q = (1 - smoothing) * y + smoothing / classes
        w = 1 if weight is None else weight.view(-1, *[1] * (y.ndim - 2))
        factor = (q * w).sum(1)
    else:
        counted = _counted(criterion, y)
        if weight is None:
            return None if bool(counted.all()) else counted
        factor = (1 - smoothing) * _of_labels(criterion, counted, y)
        factor = factor + counted * (smoothing / classes * weight.sum())
    return _positive(criterion, factor)


def _positive(criterion: Any, factor: Tensor) -> Tensor:
    if bool((factor < 0).any()):
        raise CaptureError(
            f"{name_of(criterion)} has negative weights, so its Hessian has no root; use "
            "fisher_type='empirical'"
        )
    return factor


def _class_root(
    criterion: Any, outputs: Tensor, y: Tensor, through_softmax: bool = True
) -> Iterator[Tensor]:
    """`sqrt(w p_k) (e_k - p)` for each position and class: no division by p anywhere.

    At log-probabilities it is `sqrt(w p_k) e_k`, which the log-softmax below turns into the former.
    """
    n, classes = outputs.shape[:2]
    p = outputs.softmax(1) if through_softmax else outputs.exp()
    p = p.reshape(n, classes, -1)
    factor = _class_factor(criterion, outputs, y)
    rows = None if factor is None else factor.to(p).reshape(n, -1).sqrt()
    for position in range(p.shape[2]):
        scale = p[:, :, position].sqrt()
        if rows is not None:
            scale = scale * rows[:, position, None]
        for k in range(classes):
            vector = torch.zeros_like(p)
            if through_softmax:
                vector[:, :, position] = -scale[:, k, None] * p[:, :, position]
            vector[:, k, position] += scale[:, k]
            yield vector.view_as(outputs)


def _draw_classes(criterion: Any, outputs: Tensor, generator: torch.Generator) -> Tensor:
    p = outputs.softmax(1).movedim(1, -1)
    # outputs with NaN have vectors with NaN, whatever the draw
    flat = p.reshape(-1, p.shape[-1]).double().nan_to_num(1.0).to(generator.device)
    drawn = torch.multinomial(flat, 1, generator=generator).view(p.shape[:-1])
    return drawn.to(outputs.device)


def _class_score(
    criterion: Any, outputs: Tensor, drawn: Tensor, y: Tensor, through_softmax: bool = True
) -> Tensor:
    # directly, never through the criterion: label smoothing is not part of the likelihood
    hot = F.one_hot(drawn, outputs.shape[1]).movedim(-1, 1).to(outputs)
    score = outputs.softmax(1) - hot if through_softmax else -hot
    factor = _class_factor(criterion, outputs, y)
    return score if factor is None else score * factor.to(score).sqrt().unsqueeze(1)


def _not_normalised(criterion: Any, outputs: Tensor) -> str:
    """Why the outputs are no log-probabilities, or ""."""
    sums = outputs.detach().double().exp().sum(1) if outputs.ndim > 1 else outputs.new_zeros(1)
    tolerance = {torch.float64: 1e-8, torch.float32: 1e-4}.get(outputs.dtype, 5e-2)
    worst = float((sums - 1).abs().max())
    if worst <= tolerance:
        return ""
    return (
        f"{name_of(criterion)} is a log-likelihood only of log-probabilities, and exp(outputs) "
        f"sums to 1 {worst:+.1e} over the classes: end the model in log_softmax"
    )


# Single outputs -------------------------------------------------------------------------------


def _check_same(criterion: Any, outputs: Tensor, y: Tensor) -> None:
    if y.shape != outputs.shape:
        raise CaptureError(
            f"targets have shape {tuple(y.shape)} and outputs {tuple(outputs.shape)}; "
            f"{name_of(criterion)} would broadcast them into another loss: reshape the targets"
        )


def _check_bits(criterion: Any, outputs: Tensor, y: Tensor) -> None:
    if not y.is_floating_point():
        raise CaptureError(
            f"targets are {y.dtype}; {name_of(criterion)} takes floating targets: y.float()"
        )
    _check_same(criterion, outputs, y)


def _label_ones(criterion: Any, outputs: Tensor, y: Tensor) -> Tensor:
    return ones(y.shape, y)


def _diagonal(criterion: Any, outputs: Tensor, y: Tensor, entries: Terms) -> Iterator[Tensor]:
    """A diagonal root: the entry of each output in a vector of its own."""
    found = entries(criterion, outputs, y)
    flat = found.reshape(len(found), -1)
    for k in range(flat.shape[1]):
        vector = torch.zeros_like(flat)
        vector[:, k] = flat[:, k]
        yield vector.view_as(found)


def _squared_entries(criterion: Any, outputs: Tensor, y: Tensor) -> Tensor:
    return torch.full_like(outputs, math.sqrt(2.0))


def _draw_gaussian(criterion: Any, outputs: Tensor, generator: torch.Generator) -> Tensor:
    return outputs + noise(outputs, generator) * math.sqrt(0.5)


def _bernoulli_factor(criterion: Any, outputs: Tensor, y: Tensor) -> Tensor | None:
    """`w (y w_+ + 1 - y)`, what multiplies `p (1 - p)`; None for 1 everywhere."""
    weight, positive = criterion.weight, criterion.pos_weight
    if weight is None and positive is None:
        return None
    factor = torch.ones_like(y) if positive is None else 1 + (positive - 1) * y
    return _positive(criterion, factor if weight is None else factor * weight)


def _bernoulli_entries(criterion: Any, outputs: Tensor, y: Tensor) -> Tensor:
    entries = (outputs.sigmoid() * (-outputs).sigmoid()).sqrt()
    factor = _bernoulli_factor(criterion, outputs, y)
    return entries if factor is None else entries * factor.to(entries).sqrt()


def _draw_bits(criterion: Any, outputs: Tensor, generator: torch.Generator) -> Tensor:
    uniform = torch.rand(
        outputs.shape, generator=generator, dtype=torch.float64, device=generator.device
    )
    return (uniform.to(outputs.device) < outputs.sigmoid()).to(outputs)


def _bernoulli_score(criterion: Any, outputs: Tensor, drawn: Tensor, y: Tensor) -> Tensor:
    score = outputs.sigmoid() - drawn
    factor = _bernoulli_factor(criterion, outputs, y)
    return score if factor is None else score * factor.to(score).sqrt()


def _check_rates(criterion: Any, outputs: Tensor, y: Tensor) -> None:
    _check_same(criterion, outputs, y)
    if not criterion.log_input and not bool((outputs > 0).all()):
        raise CaptureError(
            f"{name_of(criterion)}(log_input=False) takes rates, which are positive; the outputs "
            f"go down to {float(outputs.detach().min()):.3g}: end the model in softplus or exp"
        )


def _poisson_entries(criterion: Any, outputs: Tensor, y: Tensor) -> Tensor:
    """The root of `E s^2`: `exp(f)`, or `(f + eps^2) / (f + eps)^2` at rates."""
    if criterion.log_input:
        return (outputs / 2).exp()
    return (outputs + criterion.eps**2).sqrt() / (outputs + criterion.eps)


def _draw_counts(criterion: Any, outputs: Tensor, generator: torch.Generator) -> Tensor:
    rates = (outputs.exp() if criterion.log_input else outputs).double().to(generator.device)
    return torch.poisson(rates.nan_to_num(0.0), generator).to(outputs)


# A mean and a variance ------------------------------------------------------------------------


def _check_pairs(criterion: Any, outputs: Tensor, y: Tensor) -> None:
    means = outputs.shape[1] // 2 if outputs.ndim > 1 else 0
    shapes = [(outputs.shape[0], means, *outputs.shape[2:])]
    if means == 1:
        shapes.append((outputs.shape[0], *outputs.shape[2:]))
    if outputs.ndim < 2 or outputs.shape[1] % 2 or tuple(y.shape) not in shapes:
        raise CaptureError(
            f"{name_of(criterion)} takes means and variances: axis 1 of the outputs holds the "
            f"means, then as many variances (torch.cat([mean, var], 1)); outputs "
            f"{tuple(outputs.shape)} do not fit targets {tuple(y.shape)}"
        )
    if bool((outputs.chunk(2, 1)[1] < 0).any()):
        raise CaptureError(
            f"{name_of(criterion)} takes variances in the second half of axis 1, and some are "
            "negative; end the model in softplus or exp there"
        )


def _gaussian_call(function: Any, outputs: Tensor, y: Tensor) -> Tensor:
    mean, variance = outputs.chunk(2, 1)
    return function(mean.reshape(y.shape), y, variance.reshape(y.shape))


def _mean_and_variance(criterion: Any, outputs: Tensor) -> tuple[Tensor, Tensor]:
    mean, variance = outputs.chunk(2, 1)
    return mean, variance.clamp(min=criterion.eps)


def _gaussian_entries(criterion: Any, outputs: Tensor, y: Tensor) -> Tensor:
    """The root of `E s s^T`, `diag(1 / v, 1 / (2 v^2))`."""
    _, v = _mean_and_variance(criterion, outputs)
    return torch.cat([v.rsqrt(), 1 / (math.sqrt(2.0) * v)], 1)


def _draw_pairs(criterion: Any, outputs: Tensor, generator: torch.Generator) -> Tensor:
    mean, v = _mean_and_variance(criterion, outputs)
    return mean + v.sqrt() * noise(mean, generator)


_built_in = partial(Rules, terms=terms_at, proven=True)


def _of_classes(**more: Any) -> Rules:
    found: dict[str, Any] = {"root": _class_root, "score": _class_score} | more
    return _built_in(
        weights=_class_shares,
        sample=_draw_classes,
        check=_check_classes,
        factor=_class_factor,
        classes=True,
        **found,
    )


def _of_single(entries: Terms, sample: Sampler, check: Check, **more: Any) -> Rules:
    """Rules for one output per term; its Hessian or expected `s s^T` has the root `entries`."""
    found: dict[str, Any] = {"score": autograd_score} | more
    root = partial(_diagonal, entries=entries)
    return _built_in(weights=_label_ones, root=root, sample=sample, check=check, **found)


know(
    {
        nn.CrossEntropyLoss: _of_classes(),
        nn.NLLLoss: _of_classes(
            root=partial(_class_root, through_softmax=False),
            score=partial(_class_score, through_softmax=False),
            unknown=_not_normalised,
        ),
        nn.MSELoss: _of_single(_squared_entries, _draw_gaussian, _check_same),
        nn.BCEWithLogitsLoss: _of_single(
            _bernoulli_entries,
            _draw_bits,
            _check_bits,
            score=_bernoulli_score,
            factor=_bernoulli_factor,
        ),
        nn.PoissonNLLLoss: _of_single(_poisson_entries, _draw_counts, _check_rates),
        nn.GaussianNLLLoss: _of_single(
            _gaussian_entries, _draw_pairs, _check_pairs, call=_gaussian_call, apart=True
        ),
    }
)
