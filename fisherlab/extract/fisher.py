"""Output vectors: what `exact`, `mc` and `empirical` mean for each criterion, once.

A batch loss is `(1/Z) sum_n sum_j l_nj` over the loss terms j of example n (tokens, pixels, output
units). The per-example loss is `l_n = c sum_j l_nj` with `c = M / Z` under a mean and `c = 1` under
a sum. The Fisher type chooses the vectors v at the model's output that are sent backwards, with
`F = (1/M) sum_{m,n} J_n^T v_mn v_mn^T J_n`:

    empirical   v = dl_n / df                              at the observed labels
    exact       v_k = sqrt(c) S_k,  sum_k S_k S_k^T = Hessian of a term      one set per term
    mc          v = sqrt(c / draws) sum_j d l_nj(y^_j)/df   y^_j drawn from the term's likelihood

so `exact` is the Gauss-Newton matrix of `l_n`, and `mc` is unbiased for it for any number of terms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fisherlab.distributed import Ranks
from fisherlab.extract.geometry import CaptureError

FISHER_TYPES = ("exact", "mc", "empirical")
MAX_COLUMNS = 4096
EXACT_UP_TO = 20

_FUNCTIONS: dict[Callable, type[nn.Module]] = {
    F.cross_entropy: nn.CrossEntropyLoss,
    F.mse_loss: nn.MSELoss,
    F.binary_cross_entropy_with_logits: nn.BCEWithLogitsLoss,
}


def as_module(criterion: Callable) -> Callable:
    """`F.cross_entropy` and its kin as the modules they stand for; anything else unchanged."""
    if not callable(criterion):
        raise CaptureError(
            f"criterion is {criterion!r}; pass a loss such as torch.nn.CrossEntropyLoss()"
        )
    known = _FUNCTIONS.get(criterion) if not isinstance(criterion, nn.Module) else None
    return known() if known else criterion


@dataclass(frozen=True)
class Terms:
    """The loss terms of one batch: the scale `c`, and which count, `[n, ...]` or None for all."""

    scale: float
    counted: Tensor | None = None


def reduction_of(criterion: Callable) -> str:
    """`"mean"` or `"sum"`; anything else is refused."""
    reduction = getattr(criterion, "reduction", None)
    if reduction not in ("mean", "sum"):
        raise CaptureError(
            f"{_name(criterion)} has reduction {reduction!r}; FisherLab needs 'mean' or 'sum' to "
            "know the per-example loss: construct the criterion with one of them (a criterion of "
            "your own can carry a `reduction` attribute)"
        )
    return reduction


def _name(criterion: Callable) -> str:
    return getattr(criterion, "__name__", type(criterion).__name__)


def check_labels(criterion: Callable, outputs: Tensor, y: Tensor) -> None:
    """Refuse labels that do not fit the outputs, before anything is computed."""
    if isinstance(criterion, nn.CrossEntropyLoss) and not y.is_floating_point():
        classes = outputs.shape[1] if outputs.ndim > 1 else 0
        expected = (outputs.shape[0], *outputs.shape[2:])
        if y.dtype not in (torch.int64, torch.uint8):
            raise CaptureError(f"labels are {y.dtype}; class indices are torch.int64: y.long()")
        if tuple(y.shape) != expected:
            raise CaptureError(
                f"labels have shape {tuple(y.shape)}, outputs {tuple(outputs.shape)} need "
                f"{expected}; class scores are axis 1 of the outputs"
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
    elif isinstance(criterion, nn.CrossEntropyLoss) and y.shape != outputs.shape:
        raise CaptureError(
            f"labels are {y.dtype} of shape {tuple(y.shape)}: {_name(criterion)} takes class "
            "indices, y.long(), or class probabilities in the shape of the outputs, "
            f"{tuple(outputs.shape)}"
        )
    elif isinstance(criterion, nn.MSELoss | nn.BCEWithLogitsLoss) and y.shape != outputs.shape:
        raise CaptureError(
            f"targets have shape {tuple(y.shape)} and outputs {tuple(outputs.shape)}; "
            f"{_name(criterion)} would broadcast them into another loss: reshape the targets"
        )


def divisor(criterion: Callable, outputs: Tensor, y: Tensor) -> float:
    """`Z`: what a mean criterion divides its sum over examples or, with some ignored, terms by."""
    if not isinstance(criterion, nn.CrossEntropyLoss) or y.is_floating_point():
        return float(outputs.shape[0])
    counted = y[y != criterion.ignore_index]
    terms = counted.numel() if criterion.weight is None else criterion.weight[counted].sum().item()
    return float(terms)


def term_scale(
    criterion: Callable, outputs: Tensor, y: Tensor, ranks: Ranks | None = None
) -> float:
    """`c = M / Z` of a mean over `Z` loss terms (their class weights), 1 under a sum.

    1 for a criterion of the user's own, whose mean is one over examples. With `ranks` that of the
    batch of all ranks.
    """
    if reduction_of(criterion) == "sum" or not isinstance(criterion, tuple(_FUNCTIONS.values())):
        return 1.0
    M, Z = float(outputs.shape[0]), float(outputs.numel())
    if isinstance(criterion, nn.CrossEntropyLoss):
        # a mean over class probabilities is one over positions
        probabilities = y.is_floating_point()
        Z = Z / outputs.shape[1] if probabilities else divisor(criterion, outputs, y)
    if ranks is not None:
        M, Z = ranks.total(M), ranks.total(Z)
    return M / Z


def label_vectors(
    criterion: Callable, outputs: Tensor, y: Tensor, ranks: Ranks | None = None
) -> Tensor:
    """`d l_n / d f` at the observed labels, the shape of the outputs, undivided by `M`.

    With `ranks` that of the batch of all ranks, whose mean may count other terms than this one's.
    """
    free = outputs.detach().requires_grad_()
    with torch.enable_grad():
        loss = criterion(free, y)
    if loss.ndim:
        raise CaptureError(f"{_name(criterion)} returned shape {tuple(loss.shape)}, not a number")
    if not torch.isfinite(loss):
        raise CaptureError(f"the loss is {loss.item()}; check data, labels and weights")
    (gradient,) = torch.autograd.grad(loss, free)
    if reduction_of(criterion) == "sum":
        return gradient
    M, scale = float(outputs.shape[0]), 1.0
    if ranks is not None:
        Z = divisor(criterion, outputs, y)
        scale = (ranks.total(M) / ranks.total(Z)) / (M / Z)
    return gradient * (M * scale)


def check_additive(criterion: Callable, outputs: Tensor, y: Tensor) -> None:
    """Refuse a criterion of the user's own that is not a mean or sum over examples."""
    M = outputs.shape[0]
    if isinstance(criterion, tuple(_FUNCTIONS.values())) or M < 2:
        return
    k = M // 2
    with torch.no_grad():
        whole, head, tail = (
            criterion(outputs[s], y[s]) for s in (slice(None), slice(0, k), slice(k, None))
        )
    parts = head + tail if reduction_of(criterion) == "sum" else (k * head + (M - k) * tail) / M
    if not torch.allclose(whole, parts, rtol=1e-3 if whole.dtype == torch.float32 else 1e-8):
        raise CaptureError(
            f"{_name(criterion)} is not a {reduction_of(criterion)} of per-example losses "
            f"({whole.item():.6g} for the batch, {parts.item():.6g} from its two halves), so it "
            "has no per-example gradient"
        )


def terms_of(
    criterion: Callable, outputs: Tensor, y: Tensor, fisher_type: str, ranks: Ranks | None = None
) -> Terms:
    """The scale and mask of a criterion whose model distribution is known, or a refusal by name."""
    if not isinstance(criterion, tuple(_FUNCTIONS.values())):
        raise CaptureError(
            f"fisher_type={fisher_type!r} needs the predictive distribution of the model, and "
            f"{_name(criterion)} is none of CrossEntropyLoss, MSELoss, BCEWithLogitsLoss; use "
            "fisher_type='empirical'"
        )
    for option in ("weight", "pos_weight"):
        if getattr(criterion, option, None) is not None:
            raise CaptureError(
                f"fisher_type={fisher_type!r} is not defined for {_name(criterion)} with "
                f"`{option}`: a weighted loss is not the log-likelihood of a distribution; use "
                "fisher_type='empirical'"
            )
    M = outputs.shape[0]
    mean = reduction_of(criterion) == "mean"
    if not isinstance(criterion, nn.CrossEntropyLoss):
        return Terms(M / outputs.numel() if mean else 1.0)
    if y.is_floating_point():
        raise CaptureError(
            f"fisher_type={fisher_type!r} is not defined for class probabilities as targets; pass "
            "class indices or use fisher_type='empirical'"
        )
    counted = y != criterion.ignore_index
    total, terms = float(M), float(counted.sum())
    if ranks is not None:
        total, terms = ranks.total(total), ranks.total(terms)
    return Terms(total / terms if mean else 1.0, None if bool(counted.all()) else counted)


def exact_columns(outputs: Tensor) -> int:
    """Columns of `exact` for each example: the number of its output elements."""
    return math.prod(outputs.shape[1:])


def exact_vectors(
    criterion: Callable, outputs: Tensor, y: Tensor, ranks: Ranks | None = None
) -> Iterator[Tensor]:
    """Columns `sqrt(c) S_k` of a root of each term's Hessian, one `[n, ...]` at a time."""
    terms = terms_of(criterion, outputs, y, "exact", ranks)
    columns = exact_columns(outputs)
    if columns > MAX_COLUMNS:
        raise CaptureError(
            f"the exact Fisher of this model has {columns:,} output vectors per example, over the "
            f"limit of {MAX_COLUMNS:,}; use fisher_type='mc' with mc_samples="
        )
    root = math.sqrt(terms.scale)
    if isinstance(criterion, nn.CrossEntropyLoss):
        yield from _softmax_root(outputs, terms, root)
        return
    flat = outputs.reshape(outputs.shape[0], -1)
    if isinstance(criterion, nn.MSELoss):
        weights = torch.full_like(flat, math.sqrt(2.0))
    else:
        weights = (flat.sigmoid() * (-flat).sigmoid()).sqrt()
    for k in range(columns):
        vector = torch.zeros_like(flat)
        vector[:, k] = root * weights[:, k]
        yield vector.view_as(outputs)


def _softmax_root(outputs: Tensor, terms: Terms, root: float) -> Iterator[Tensor]:
    """`sqrt(p_k) (e_k - p)` for each position and class: no division by p anywhere."""
    n, classes = outputs.shape[:2]
    p = outputs.softmax(1).reshape(n, classes, -1)
    counted = None if terms.counted is None else terms.counted.reshape(n, -1)
    for position in range(p.shape[2]):
        scale = root * p[:, :, position].sqrt()
        if counted is not None:
            scale = scale * counted[:, position, None]
        for k in range(classes):
            vector = torch.zeros_like(p)
            vector[:, :, position] = -scale[:, k, None] * p[:, :, position]
            vector[:, k, position] += scale[:, k]
            yield vector.view_as(outputs)


def check_draws(mc_samples: int) -> None:
    """Refuse a number of draws that is none."""
    if not isinstance(mc_samples, int) or mc_samples < 1:
        raise CaptureError(f"mc_samples must be a whole number of at least 1, got {mc_samples!r}")


def mc_vectors(
    criterion: Callable,
    outputs: Tensor,
    y: Tensor,
    draws: int,
    generator: torch.Generator | None,
    ranks: Ranks | None = None,
) -> Iterator[Tensor]:
    """Scores at drawn labels, one `[n, ...]` per draw; drawn on the CPU from `generator`.

    Every one of `ranks` draws for the joint batch and keeps its own rows: two ranks never share a
    draw, their generators stay in step, and the draws are those of a single process.
    """
    check_draws(draws)
    terms = terms_of(criterion, outputs, y, "mc", ranks)
    generator = generator or torch.Generator().manual_seed(0)
    scale = math.sqrt(terms.scale / draws)
    joint = outputs if ranks is None else ranks.gather(outputs)
    mine = slice(None) if ranks is None else ranks.rows(len(outputs))
    for _ in range(draws):
        labels = draw_labels(criterion, joint, generator)[mine]
        yield scale * term_scores(criterion, outputs, labels, terms.counted)


def draw_labels(criterion: Callable, outputs: Tensor, generator: torch.Generator) -> Tensor:
    """Labels from the predictive distribution: class indices, 0/1, or Gaussian of variance 1/2."""
    if isinstance(criterion, nn.CrossEntropyLoss):
        p = outputs.softmax(1).movedim(1, -1)
        flat = p.reshape(-1, p.shape[-1]).double().to(generator.device)
        drawn = torch.multinomial(flat, 1, generator=generator).view(p.shape[:-1])
        return drawn.to(outputs.device)
    if isinstance(criterion, nn.MSELoss):
        noise = torch.randn(outputs.shape, generator=generator, dtype=torch.float64)
        return outputs + noise.to(outputs) * math.sqrt(0.5)
    uniform = torch.rand(outputs.shape, generator=generator, dtype=torch.float64)
    return (uniform.to(outputs.device) < outputs.sigmoid()).to(outputs)


def term_scores(
    criterion: Callable, outputs: Tensor, labels: Tensor, counted: Tensor | None = None
) -> Tensor:
    """`d l_nj(labels) / df` of each un-averaged term, the shape of the outputs."""
    if isinstance(criterion, nn.CrossEntropyLoss):
        # directly, never through the criterion: label smoothing is not part of the likelihood
        p = outputs.softmax(1)
        hot = F.one_hot(labels, outputs.shape[1]).movedim(-1, 1).to(p)
        score = p - hot
        return score if counted is None else score * counted.unsqueeze(1)
    if isinstance(criterion, nn.MSELoss):
        return 2 * (outputs - labels)
    return outputs.sigmoid() - labels


def output_vectors(
    fisher_type: str,
    criterion: Callable,
    outputs: Tensor,
    y: Tensor,
    mc_samples: int = 1,
    generator: torch.Generator | None = None,
    ranks: Ranks | None = None,
) -> Iterator[Tensor]:
    """The vectors to send backwards for a Fisher type, each the shape of the outputs."""
    if fisher_type == "exact":
        return exact_vectors(criterion, outputs, y, ranks)
    if fisher_type == "mc":
        return mc_vectors(criterion, outputs, y, mc_samples, generator, ranks)
    if fisher_type == "empirical":
        return iter((label_vectors(criterion, outputs, y, ranks),))
    raise CaptureError(f"unknown fisher_type {fisher_type!r}; one of {', '.join(FISHER_TYPES)}")
