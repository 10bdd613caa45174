"""Criteria: what FisherLab knows of each loss, one value per kind, in one registry.

A criterion is known by its exact type. A subclass counts as its parent only if it overrides
nothing: with a `forward` of its own it is another loss.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fisherlab import doors
from fisherlab.blocks.numerics import eigh, normal
from fisherlab.extract.geometry import CaptureError

# Entries that the Hessians of all examples may have, where they are formed by autograd.
HESSIAN_ENTRIES = 2**26

_FUNCTIONS: dict[Any, type[nn.Module]] = {
    F.cross_entropy: nn.CrossEntropyLoss,
    F.nll_loss: nn.NLLLoss,
    F.mse_loss: nn.MSELoss,
    F.binary_cross_entropy_with_logits: nn.BCEWithLogitsLoss,
    F.poisson_nll_loss: nn.PoissonNLLLoss,
}

Terms = Callable[[Any, Tensor, Tensor], Tensor]
Root = Callable[[Any, Tensor, Tensor], Iterable[Tensor]]
Sampler = Callable[[Any, Tensor, torch.Generator], Tensor]
Score = Callable[[Any, Tensor, Tensor, Tensor], Tensor]
Check = Callable[[Any, Tensor, Tensor], None]


def as_module(criterion: Callable[..., Any]) -> Callable[..., Any]:
    """`F.cross_entropy` and its kin as the modules they stand for; anything else unchanged."""
    if not callable(criterion):
        raise CaptureError(
            f"criterion is {doors.said(criterion)}; pass a loss such as torch.nn.CrossEntropyLoss()"
        )
    known = None if isinstance(criterion, nn.Module) else _looked_up(_FUNCTIONS, criterion)
    return known() if known else criterion


def name_of(criterion: Callable[..., Any]) -> str:
    """The name that messages call a criterion by."""
    return getattr(criterion, "__name__", type(criterion).__name__)


def reduction_of(criterion: Callable[..., Any]) -> str:
    """`"mean"` or `"sum"`; anything else is refused."""
    reduction = getattr(criterion, "reduction", None)
    if reduction not in ("mean", "sum"):
        raise CaptureError(
            f"{name_of(criterion)} has reduction {reduction!r}; FisherLab needs 'mean' or 'sum' to "
            "know the per-example loss: construct the criterion with one of them (a criterion of "
            "your own can carry a `reduction` attribute)"
        )
    return reduction


def _accept(criterion: Any, outputs: Tensor, y: Tensor) -> None:
    """Labels of any kind."""


def _call(function: Any, outputs: Tensor, y: Tensor) -> Tensor:
    return function(outputs, y)


def _unhooked(criterion: Any) -> Any:
    """The function of a criterion without its hooks: an optimizer's recorder puts some there."""
    return criterion.forward if isinstance(criterion, nn.Module) else criterion


def _no_reason(criterion: Any, outputs: Tensor) -> str:
    return ""


@dataclass(frozen=True)
class Rules:
    """One kind of criterion, `L = (1/Z) sum_n sum_j l_nj` under a mean.

    Every function takes the criterion first, then the outputs `f` and the labels `y`.

    Args:
        terms: `l_nj` `[n, ...]`, un-averaged; None if only the mean over examples is known.
        weights: the share of each term in `Z`, in the shape of the terms.
        root: vectors `S_k` `[n, ...]` with `sum_k S_k S_k^T` the Hessian of `sum_j l_nj`, or the
            expected `s s^T` of its score `s` at drawn labels.
        sample: labels drawn from the predictive distribution.
        score: `sum_j d l_nj / df` at drawn labels, given the observed ones.
        check: refuses labels that do not fit the outputs.
        call: calls the criterion, or its `forward`.
        unknown: why these outputs have no predictive distribution, or "".
        factor: the weight of each term's Hessian, or None for 1 everywhere.
        classes: whether axis 1 of the outputs is the class axis.
        apart: whether the criterion takes the outputs in parts.
        proven: whether the functions are tested here, and need no proof at each capture.
    """

    terms: Terms | None = None
    weights: Terms | None = None
    root: Root | None = None
    sample: Sampler | None = None
    score: Score | None = None
    check: Check = _accept
    call: Callable[[Any, Tensor, Tensor], Tensor] = _call
    unknown: Callable[[Any, Tensor], str] = _no_reason
    factor: Callable[[Any, Tensor, Tensor], Tensor | None] | None = None
    classes: bool = False
    apart: bool = False
    proven: bool = False


class WithRules:
    """A criterion that brings its own rules along; None where it has none."""

    rules: Rules | None


_REGISTRY: dict[Any, Rules] = {}


def know(rules: dict[Any, Rules]) -> None:
    """Add rules that are tested here, so that no capture proves them."""
    _REGISTRY.update(rules)


def register_criterion(
    kind: Any,
    *,
    terms: Terms | None = None,
    root: Root | None = None,
    sample: Sampler | None = None,
    weights: Terms | None = None,
    check: Check | None = None,
) -> None:
    """`L = (1/Z) sum_n sum_j l_nj`: tell FisherLab what a criterion of your own is made of.

    Every function takes the criterion, the outputs `f` `[n, ...]` and the labels `y`; `sample`
    takes a generator in place of `y`. Given `terms` alone, "exact" takes the Hessian by autograd.
    Each capture proves `terms` against the criterion's gradient, and a root without a sampler
    against the Hessian. The optimizers use the same registry.

    Args:
        kind: a class of criteria (subclasses are other criteria), or a loss function.
        terms: the un-averaged losses `l_nj` `[n, ...]`, differentiable in `f`. Without it a mean
            divides by the number of examples.
        root: vectors `S_k`, each in the shape of `f`, with `sum_k S_k S_k^T` the Hessian of
            `sum_j l_nj`; with a sampler it may be the expected `s s^T` of the score `s` instead.
            It makes "exact" possible.
        sample: labels `[n, ...]` drawn from the distribution that the outputs stand for, by
            `torch` functions with `generator=`, on the CPU. It makes "mc" possible.
        weights: weight of each term in `Z` under a mean; default 1.
        check: raises `CaptureError` for labels that do not fit the outputs.

    Raises:
        TypeError: `kind` is neither a class nor a function, or is an object of a criterion.
        ValueError: `kind` is known already by FisherLab, or nothing is said about it.
    """
    if isinstance(kind, nn.Module) or not callable(kind) or not hasattr(kind, "__name__"):
        raise TypeError(
            f"kind is {doors.said(kind)}; register a class of criteria, such as type(criterion), "
            "or a loss function"
        )
    if kind in _FUNCTIONS or (kind in _REGISTRY and _REGISTRY[kind].proven):
        raise ValueError(f"{kind.__name__} is known to FisherLab; register a class of your own")
    functions = {"terms": terms, "root": root, "sample": sample, "weights": weights}
    for name, given in {**functions, "check": check}.items():
        if given is not None and not callable(given):
            raise TypeError(f"{name} must be a function, got {doors.said(given)}")
    if terms is None and root is None and sample is None:
        raise ValueError(f"nothing is said about {kind.__name__}: pass terms, root or sample")
    if weights is not None and terms is None:
        raise ValueError("weights are those of the loss terms: pass terms as well")
    _REGISTRY[kind] = Rules(
        terms,
        weights,
        root or (_hessian_root if sample is None else None),
        sample,
        None if sample is None else autograd_score,
        check or _accept,
    )


def rules_of(criterion: Callable[..., Any]) -> Rules | None:
    """The rules of a criterion by its exact type; None for one that is not known."""
    if isinstance(criterion, WithRules):
        return criterion.rules
    if not isinstance(criterion, nn.Module):
        found = _looked_up(_REGISTRY, criterion)
        if found is not None:
            return found
    if "forward" in getattr(criterion, "__dict__", ()):
        return None
    kind = type(criterion)
    for parent in kind.__mro__:
        if parent in _REGISTRY:
            return _REGISTRY[parent]
        if not _adds_nothing(parent):
            return None
    return None


def is_a(criterion: Callable[..., Any] | None, kind: type[nn.Module]) -> bool:
    """Whether a criterion, a function included, is known to compute the loss of `kind`."""
    if criterion is None or not callable(criterion):
        return False
    rules = rules_of(as_module(criterion))
    return rules is not None and rules is _REGISTRY.get(kind)


def _adds_nothing(kind: type) -> bool:
    """Whether a subclass leaves every attribute of its parents alone, its constructor apart."""
    free = {"__init__", "__module__", "__doc__", "__qualname__", "__annotations__"}
    free |= {"__static_attributes__", "__firstlineno__", "__parameters__", "__orig_bases__"}
    free |= {"extra_repr", "__repr__", "__dict__", "__weakref__", "__annotate_func__"}
    inherited = {name for parent in kind.__mro__[1:] for name in vars(parent)}
    return not (set(vars(kind)) - free) & inherited


def _looked_up(table: dict[Any, Any], key: object) -> Any:
    try:
        return table.get(key)
    except TypeError:  # a callable that cannot be hashed
        return None


def unknown(criterion: Callable[..., Any], outputs: Tensor, fisher_type: str) -> str:
    """Why `fisher_type` is not defined for a criterion and its outputs, or ""."""
    rules = rules_of(criterion)
    if rules is None:
        parents = [p.__name__ for p in type(criterion).__mro__[1:] if p in _REGISTRY]
        known = ", ".join(k.__name__ for k, rules in _REGISTRY.items() if rules.proven)
        if parents:
            return (
                f"{name_of(criterion)} overrides parts of {parents[0]}, so it is another loss; "
                "fl.register_criterion tells FisherLab which"
            )
        return f"{name_of(criterion)} is none of {known}; fl.register_criterion adds your own"
    reason = rules.unknown(criterion, outputs)
    if reason:
        return reason
    needed = {"exact": "root", "mc": "sample"}.get(fisher_type)
    if needed and getattr(rules, needed) is None:
        return f"{name_of(criterion)} was registered without `{needed}`"
    return ""


def labels_matter(criterion: Callable[..., Any], outputs: Tensor, y: Tensor) -> bool:
    """Whether the exact and drawn vectors depend on the labels: on weights or on ignored ones."""
    rules = rules_of(criterion)
    if rules is None or not rules.proven:
        return True
    factor = None if rules.factor is None else rules.factor(criterion, outputs, y)
    return factor is not None and not bool(torch.isclose(factor, torch.ones_like(factor)).all())


def arranged(criterion: Callable[..., Any], outputs: Tensor, y: Tensor) -> Tensor:
    """The outputs with their classes in axis 1, where the labels show that they are last.

    Labels that fit both axes are read as torch reads them: classes first.
    """
    rules = rules_of(criterion)
    if rules is None or not rules.classes or outputs.ndim < 3 or y.is_floating_point():
        return outputs
    first = y.shape == (outputs.shape[0], *outputs.shape[2:])
    return outputs.movedim(-1, 1) if y.shape == outputs.shape[:-1] and not first else outputs


def terms_at(criterion: Any, outputs: Tensor, y: Tensor) -> Tensor:
    """`l_nj`, by the criterion itself without its reduction."""
    rules = rules_of(criterion)
    assert rules is not None
    bare = copy.copy(criterion)
    bare.reduction = "none"
    return rules.call(_unhooked(bare), outputs, y)


def weights_at(criterion: Any, outputs: Tensor, y: Tensor) -> Tensor:
    """The weight of each loss term in `Z` under a mean."""
    rules = rules_of(criterion)
    if rules is None or rules.terms is None:
        return ones(outputs.shape[:1], outputs)
    if rules.weights is not None:
        return rules.weights(criterion, outputs, y)
    with torch.no_grad():
        return ones(rules.terms(criterion, outputs, y).shape, outputs)


def ones(shape: Iterable[int], like: Tensor) -> Tensor:
    """Ones of a shape on the device of `like`, without memory for each."""
    return torch.ones((), device=like.device).expand(tuple(shape))


def per_term(criterion: Any, outputs: Tensor, y: Tensor) -> Tensor:
    """`sum_n sum_j l_nj` of a criterion, a number with a graph."""
    rules = rules_of(criterion)
    if rules is not None and rules.terms is not None:
        return rules.terms(criterion, outputs, y).sum()
    loss = (_call if rules is None else rules.call)(_unhooked(criterion), outputs, y)
    return loss * (len(outputs) if reduction_of(criterion) == "mean" else 1)


def prove(criterion: Any, outputs: Tensor, y: Tensor, gradient: Tensor) -> None:
    """Refuse registered functions that are not those of the criterion.

    Args:
        criterion: one of a registered kind; others are left alone.
        outputs: `[n, ...]`, without a graph.
        y: the labels.
        gradient: `d sum_n l_n / df` of the criterion itself, its mean times `M` included.
    """
    rules = rules_of(criterion)
    if rules is None or rules.proven:
        return
    name = name_of(criterion)
    M, mean = len(outputs), reduction_of(criterion) == "mean"
    if rules.terms is not None:
        free = outputs.detach().contiguous().requires_grad_()
        with torch.enable_grad():
            total = per_term(criterion, free, y)
            (found,) = torch.autograd.grad(total, free)
        Z = float(weights_at(criterion, outputs, y).sum())
        scale = M / Z if mean else 1.0
        if not _close(scale * found, gradient):
            raise CaptureError(
                f"the gradient of `terms` registered for {name} has norm "
                f"{scale * found.norm():.6g}, that of its {criterion.reduction} "
                f"{gradient.norm():.6g}: correct `terms`, or pass `weights` if the mean divides by "
                "something else than their number"
            )
    if rules.root is not None and rules.root is not _hessian_root and rules.sample is None:
        draw = torch.Generator().manual_seed(0)
        v = noise(outputs, draw)
        expected = _hessian_product(criterion, outputs, y, v)
        made = torch.zeros_like(v)
        for S in rules.root(criterion, outputs, y):
            made += S * (S * v).flatten(1).sum(1).view(-1, *[1] * (v.ndim - 1))
        if not _close(made, expected):
            raise CaptureError(
                f"`root` registered for {name} is none of its Hessian: sum S S^T v has norm "
                f"{made.norm():.6g}, the Hessian's product {expected.norm():.6g}"
            )


def _close(one: Tensor, two: Tensor) -> bool:
    tolerance = 1e-8 if two.dtype == torch.float64 else 1e-3
    return bool((one - two).norm() <= tolerance * two.norm())


def _hessian_product(criterion: Any, outputs: Tensor, y: Tensor, v: Tensor) -> Tensor:
    free = outputs.detach().contiguous().requires_grad_()
    with torch.enable_grad():
        total = per_term(criterion, free, y)
        (slope,) = torch.autograd.grad(total, free, create_graph=True)
        if not slope.requires_grad:  # a loss that is linear in the outputs
            return torch.zeros_like(v)
        (product,) = torch.autograd.grad((slope * v).sum(), free, allow_unused=True)
    return torch.zeros_like(v) if product is None else product


def _hessian_root(criterion: Any, outputs: Tensor, y: Tensor) -> Iterator[Tensor]:
    """`sqrt(lambda_k) q_k` of each example's Hessian, by one backward pass per output."""
    n, width = len(outputs), outputs[0].numel()
    if n * width**2 > HESSIAN_ENTRIES:
        raise CaptureError(
            f"the Hessians of {name_of(criterion)} at {width:,} outputs of {n} examples are too "
            "large to form; register its `root` or `sample`, or use fisher_type='empirical'"
        )
    rows = []
    for k in range(width):
        v = torch.zeros_like(outputs).reshape(n, -1)
        v[:, k] = 1
        rows.append(_hessian_product(criterion, outputs, y, v.view_as(outputs)).reshape(n, -1))
    H = torch.stack(rows, 1).double()
    values, vectors = eigh(H, f"Hessian of {name_of(criterion)}")
    top = values.abs().max()
    if bool((values < -1e-6 * top).any()):
        raise CaptureError(
            f"{name_of(criterion)} is not convex in the outputs (an eigenvalue of its Hessian is "
            f"{values.min():.3g}), so its exact Fisher has no root; use fisher_type='empirical'"
        )
    S = (vectors * values.clamp(min=0).sqrt()[:, None]).to(outputs)
    for k in range(width):
        yield S[:, :, k].view_as(outputs)


def noise(like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal numbers in the shape of `like`, drawn in float64 where the generator is."""
    return normal(generator, *like.shape).to(like)


def autograd_score(criterion: Any, outputs: Tensor, drawn: Tensor, y: Tensor) -> Tensor:
    """`sum_j d l_nj / df` `[n, ...]` at drawn labels, by one backward pass of the criterion."""
    if drawn.numel() == y.numel():
        drawn = drawn.reshape(y.shape)
    if drawn.shape != y.shape:
        raise CaptureError(
            f"`sample` registered for {name_of(criterion)} drew labels of shape "
            f"{tuple(drawn.shape)}; those of the batch have {tuple(y.shape)}"
        )
    free = outputs.detach().contiguous().requires_grad_()
    with torch.enable_grad():
        (score,) = torch.autograd.grad(per_term(criterion, free, drawn), free)
    return score
