"""Output vectors: what `exact`, `mc` and `empirical` mean for each criterion, once.

A batch loss is `(1/Z) sum_n sum_j l_nj` over the loss terms j of example n (tokens, pixels, output
units). The per-example loss is `l_n = c sum_j l_nj` with `c = M / Z` under a mean and `c = 1` under
a sum. The Fisher type chooses the vectors v at the model's output that are sent backwards, with
`F = (1/M) sum_{m,n} J_n^T v_mn v_mn^T J_n`:

    empirical   v = dl_n / df                              at the observed labels
    exact       v_k = sqrt(c) S_k,  sum_k S_k S_k^T = Hessian of a term      one set per term
    mc          v = sqrt(c / draws) sum_j d l_nj(y^_j)/df   y^_j drawn from the term's likelihood

so `exact` is the Gauss-Newton matrix of `l_n`, and `mc` is unbiased for it for any number of terms.
A term with a weight (class weights, soft labels) has its Hessian times that weight, and its drawn
score times the root of it. The terms, roots and draws of each criterion are defined in `criteria`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fisherlab import doors
from fisherlab.distributed import Ranks
from fisherlab.extract import criteria
from fisherlab.extract.criteria import Rules, as_module, name_of, reduction_of, rules_of
from fisherlab.extract.geometry import CaptureError

__all__ = ["FISHER_TYPES", "as_module", "reduction_of"]

FISHER_TYPES = ("exact", "mc", "empirical")
MAX_COLUMNS = 4096
EXACT_UP_TO = 20


@dataclass(frozen=True)
class Terms:
    """The loss terms of one batch: the scale `c` of their sum."""

    scale: float


def check_labels(criterion: Callable[..., Any], outputs: Tensor, y: Tensor) -> None:
    """Refuse labels that do not fit the outputs, before anything is computed."""
    rules = rules_of(criterion)
    if rules is not None:
        rules.check(criterion, outputs, y)


def divisor(criterion: Callable[..., Any], outputs: Tensor, y: Tensor) -> float:
    """`Z`: what a mean criterion divides its sum over loss terms by, their weights in it."""
    return float(criteria.weights_at(criterion, outputs, y).sum())


def term_scale(
    criterion: Callable[..., Any], outputs: Tensor, y: Tensor, ranks: Ranks | None = None
) -> float:
    """`c = M / Z` of a mean over `Z` loss terms (their class weights), 1 under a sum.

    1 for a criterion of the user's own, whose mean is one over examples. With `ranks` that of the
    batch of all ranks.
    """
    if reduction_of(criterion) == "sum":
        return 1.0
    M, Z = float(outputs.shape[0]), divisor(criterion, outputs, y)
    if ranks is not None:
        M, Z = ranks.total(M), ranks.total(Z)
    return M / Z


def label_vectors(
    criterion: Callable[..., Any], outputs: Tensor, y: Tensor, ranks: Ranks | None = None
) -> Tensor:
    """`d l_n / d f` at the observed labels, the shape of the outputs, undivided by `M`.

    With `ranks` that of the batch of all ranks, whose mean may count other terms than this one's.
    """
    rules = rules_of(criterion) or Rules()
    free = outputs.detach().contiguous().requires_grad_()
    try:
        with torch.enable_grad():
            given = free.clone(), y.clone()
            loss = rules.call(criterion, *given)
    except CaptureError:
        raise
    except Exception as error:
        raise CaptureError(
            f"{name_of(criterion)} failed as criterion(outputs, y) on outputs {outputs.dtype} of "
            f"shape {tuple(outputs.shape)} and labels {y.dtype} of shape {tuple(y.shape)}: {error}"
        ) from error
    if not isinstance(loss, Tensor) or loss.ndim:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise CaptureError(f"{name_of(criterion)} returned {got}, not a number")
    if loss.is_complex():
        raise CaptureError(f"{name_of(criterion)} returned {loss.dtype}; return a real number")
    for tensor, role in zip(given, ("outputs", "labels"), strict=True):
        if tensor._version:
            raise CaptureError(
                f"{name_of(criterion)} writes into the {role}, and a capture calls it several "
                "times: make that operation out of place"
            )
    if not torch.isfinite(loss):
        raise CaptureError(f"the loss is {loss.item()}; check data, labels and weights")
    gradient = None
    if loss.requires_grad:
        (gradient,) = torch.autograd.grad(loss, free, allow_unused=True)
    if gradient is None:
        raise CaptureError(
            f"{name_of(criterion)} returned a number that does not depend on the outputs: it "
            "detaches them, or computes it elsewhere than in torch"
        )
    if reduction_of(criterion) == "sum":
        return gradient
    M, scale = float(outputs.shape[0]), 1.0
    if ranks is not None:
        scale = term_scale(criterion, outputs, y, ranks) / term_scale(criterion, outputs, y)
    return gradient * (M * scale)


def check_additive(criterion: Callable[..., Any], outputs: Tensor, y: Tensor) -> None:
    """Refuse a criterion of the user's own that is not a mean or sum over examples."""
    M = outputs.shape[0]
    rules = rules_of(criterion)
    if (rules is not None and rules.proven) or M < 2:
        return
    k, head, tail = M // 2, slice(0, M // 2), slice(M // 2, None)
    with torch.no_grad():
        if rules is not None and rules.terms is not None:
            whole = criteria.per_term(criterion, outputs, y)
            one, two = (criteria.per_term(criterion, outputs[s], y[s]) for s in (head, tail))
            parts = one + two
        else:
            whole, one, two = (criterion(outputs[s], y[s]) for s in (slice(None), head, tail))
            summed = reduction_of(criterion) == "sum"
            parts = one + two if summed else (k * one + (M - k) * two) / M
    if not torch.allclose(whole, parts, rtol=1e-3 if whole.dtype == torch.float32 else 1e-8):
        raise CaptureError(
            f"{name_of(criterion)} is not a {reduction_of(criterion)} of per-example losses "
            f"({whole.item():.6g} for the batch, {parts.item():.6g} from its two halves), so it "
            "has no per-example gradient"
        )


def check_registered(criterion: Callable[..., Any], outputs: Tensor, y: Tensor) -> None:
    """Refuse what a user registered for a criterion if it is not what that criterion computes."""
    rules = rules_of(criterion)
    if rules is not None and not rules.proven:
        criteria.prove(criterion, outputs, y, label_vectors(criterion, outputs, y))


def default_type(criterion: Callable[..., Any], outputs: Tensor) -> tuple[str, str]:
    """The Fisher type for a criterion and its outputs, and why it is empirical, or "".

    exact up to `EXACT_UP_TO` output elements per example, else mc, the other one where only that is
    known; empirical where neither is.
    """
    few = exact_columns(outputs) <= EXACT_UP_TO
    reasons = []
    for fisher_type in ("exact", "mc") if few else ("mc", "exact"):
        reason = criteria.unknown(criterion, outputs, fisher_type)
        if not reason:
            return fisher_type, ""
        reasons.append(reason)
    return "empirical", f"The Fisher matrix is the empirical one: {reasons[0]}."


def known(criterion: Callable[..., Any], outputs: Tensor, fisher_type: str) -> Rules:
    """The rules of a criterion whose model distribution is known, or a refusal by name."""
    reason = criteria.unknown(criterion, outputs, fisher_type)
    if reason:
        raise CaptureError(
            f"fisher_type={fisher_type!r} needs the predictive distribution of the model: {reason}."
            " fisher_type='empirical' needs none"
        )
    rules = rules_of(criterion)
    assert rules is not None
    return rules


def terms_of(
    criterion: Callable[..., Any],
    outputs: Tensor,
    y: Tensor,
    fisher_type: str,
    ranks: Ranks | None = None,
) -> Terms:
    """The scale of the terms of a criterion whose model distribution is known, or a refusal."""
    rules = known(criterion, outputs, fisher_type)
    if rules.factor is not None:
        rules.factor(criterion, outputs, y)  # refuses negative weights
    return Terms(term_scale(criterion, outputs, y, ranks))


def exact_columns(outputs: Tensor) -> int:
    """Columns of `exact` for each example: the number of its output elements."""
    return math.prod(outputs.shape[1:])


def exact_vectors(
    criterion: Callable[..., Any], outputs: Tensor, y: Tensor, ranks: Ranks | None = None
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
    S = known(criterion, outputs, "exact").root
    assert S is not None
    for vector in S(criterion, outputs, y):
        if vector.shape != outputs.shape:
            raise CaptureError(
                f"`root` registered for {name_of(criterion)} made a vector of shape "
                f"{tuple(vector.shape)}; the outputs have {tuple(outputs.shape)}"
            )
        yield vector if root == 1 else root * vector


def check_draws(mc_samples: int) -> int:
    """The number of draws; refuses what is none."""
    return doors.count(mc_samples, "mc_samples", error=CaptureError)


def mc_vectors(
    criterion: Callable[..., Any],
    outputs: Tensor,
    y: Tensor,
    draws: int,
    generator: torch.Generator | None,
    ranks: Ranks | None = None,
) -> Iterator[Tensor]:
    """Scores at drawn labels, one `[n, ...]` per draw; drawn on the CPU from `generator`.

    Every one of `ranks` draws for the joint batch and keeps its own rows. Two ranks never share a
    draw, their generators stay in step, and the draws equal those of a single process.
    """
    draws = check_draws(draws)
    terms = terms_of(criterion, outputs, y, "mc", ranks)
    score = known(criterion, outputs, "mc").score
    assert score is not None
    generator = generator or torch.Generator().manual_seed(0)
    scale = math.sqrt(terms.scale / draws)
    joint = outputs if ranks is None else ranks.gather(outputs)
    mine = slice(None) if ranks is None else ranks.own_examples(len(outputs))
    for _ in range(draws):
        labels = draw_labels(criterion, joint, generator)[mine]
        yield scale * score(criterion, outputs, labels, y)


def draw_labels(
    criterion: Callable[..., Any], outputs: Tensor, generator: torch.Generator
) -> Tensor:
    """Labels from the predictive distribution that a criterion reads the outputs as."""
    sample = known(criterion, outputs, "mc").sample
    assert sample is not None
    return sample(criterion, outputs, generator)


def output_vectors(
    fisher_type: str,
    criterion: Callable[..., Any],
    outputs: Tensor,
    y: Tensor,
    mc_samples: int = 1,
    generator: torch.Generator | None = None,
    ranks: Ranks | None = None,
) -> Iterator[Tensor]:
    """The vectors to send backwards for a Fisher type, each the shape of the outputs."""
    doors.choice(fisher_type, "fisher_type", FISHER_TYPES, error=CaptureError)
    if fisher_type == "exact":
        return exact_vectors(criterion, outputs, y, ranks)
    if fisher_type == "mc":
        return mc_vectors(criterion, outputs, y, mc_samples, generator, ranks)
    return iter((label_vectors(criterion, outputs, y, ranks),))
