"""Every optimizer by name, with defaults that train a small net."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from fisherlab import approximations
from fisherlab.approximations.damping import Rule, relative
from fisherlab.approximations.eigen_corrected import EKFAC, TEKFAC
from fisherlab.approximations.eva import Eva
from fisherlab.approximations.ifang import IFANG
from fisherlab.approximations.kfac import KFAC
from fisherlab.approximations.kronecker_optimal import KroneckerSum
from fisherlab.approximations.shampoo import Shampoo
from fisherlab.approximations.sngd import SNGD
from fisherlab.approximations.tkfac import TKFAC
from fisherlab.extract.criteria import is_a
from fisherlab.names import nearest
from fisherlab.optim.ang import ANG, TruncatedNaturalGradient
from fisherlab.optim.fngd import FNGD
from fisherlab.optim.kbfgs import KBFGSOptimizer
from fisherlab.optim.natural_gradient import NaturalGradient
from fisherlab.optim.ngd import NGD
from fisherlab.optim.woodbury import NGDSMW, TENGraD

Maker = Callable[..., torch.optim.Optimizer]

# Defaults found by a small search on digits (MLP and CNN, batch 64, 1 to 10 epochs):
# damping relative to the mean eigenvalue tr F / N of each layer's block, three times it for running
# means and ten times for the block of a single batch, which the gradient of that batch overfits;
DAMPING, BATCH_DAMPING = 3.0, 10.0
# and steps at most sqrt(1e-4) long in the metric of their blocks: as a batch is fitted its Fisher
# matrix vanishes faster than its gradient, and a relative damping lets the step grow without bound.
# Momentum 0.9 makes of it a KL divergence near 1e-2.
# A product fitted to a single batch does not hold that batch's gradient: a tenth of it there.
LR, KL_CLIP, CAUTIOUS_CLIP = 0.03, 1e-4, 1e-5
# The corrected eigenvalues of a few batches are zero outside their span: shorter steps there.
CORRECTED_CLIP = 2e-5
# Steps at the start that refresh everything: on MNIST (MLP, batch 128) the inverse of the first
# batch, kept for 100 steps, cost KFAC half of its speed and EKFAC 12 steps of divergence.
WARMUP = 20
# A squared error's empirical Fisher matrix has the residual's square in it, 10^-4 of its curvature
# on the MNIST autoencoder, whose first step would be 500 long: columns drawn from the model
# instead; and no momentum, since clipped steps of one direction add up to ten of them.
SQUARED = {"fisher_type": "mc", "kl_clip": 1e-5, "momentum": 0.0}
# What `create` passes itself, and what constructors pass on.
NOT_OPTIONS = {"self", "model", "approximation", "options", "kwargs"}
# Parameters of a layer above which a Kronecker sum, whose inverse is dense, is refused.
KRONECKER_SUM_LAYER = 1_500


def _plain(kind: type[torch.optim.Optimizer], **defaults: Any) -> Maker:
    def make(model: nn.Module, params: Any = None, **options: Any) -> torch.optim.Optimizer:
        lr = options.get("lr", 0)
        if not isinstance(lr, Real | Tensor) or not lr < math.inf:  # torch lets a NaN pass
            raise ValueError(f"lr must be a finite number >= 0, got {lr!r}")
        return kind(model.parameters() if params is None else params, **{**defaults, **options})

    return make


def _with(kind: Callable[..., torch.optim.Optimizer], *args: Any, **defaults: Any) -> Maker:
    def make(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
        return kind(model, *args, **{**defaults, **options})

    return make


def _natural(
    approximation: Any,
    share: float = DAMPING,
    kind: type[NaturalGradient] = NaturalGradient,
    **defaults: Any,
) -> Maker:
    options = {**_clipped(relative(share)), "warmup": WARMUP, **defaults}
    return _for_criterion(_with(kind, approximation, **options))


def _for_criterion(make: Maker) -> Maker:
    """The maker, with `SQUARED` as defaults where the criterion is a squared error."""

    def made(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
        squared = is_a(options.get("criterion"), nn.MSELoss)
        return make(model, **{**(SQUARED if squared else {}), **options})

    return made


def _clipped(damping: float | Rule) -> dict[str, Any]:
    return {"lr": LR, "damping": damping, "kl_clip": KL_CLIP}


def _other(name: str) -> Maker:
    """Any approximation that the table does not list."""
    approximation = approximations.get(name)()
    if approximation.additive:
        return _natural(approximation)
    clip = KL_CLIP if name == "exact" else CAUTIOUS_CLIP
    return _natural(approximation, BATCH_DAMPING, NaturalGradient, kl_clip=clip, **_OF_BATCH)


def _kronecker_sum(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    defaults = {"basis_every": 10, "kl_clip": CAUTIOUS_CLIP, "warmup": 0}
    make = _natural(KroneckerSum(), BATCH_DAMPING, NaturalGradient, **defaults)
    optimizer = make(model, **options)
    assert isinstance(optimizer, NaturalGradient)
    for name, weight in optimizer.weights.items():
        size = weight.size // weight.groups
        if size > KRONECKER_SUM_LAYER:
            optimizer.remove()
            raise ValueError(
                f"the inverse of a Kronecker sum is dense, and layer {name!r} has {size:,} "
                f"parameters; refused above {KRONECKER_SUM_LAYER:,}. kronecker_optimal is its "
                "leading term, with an inverse at any size"
            )
    return optimizer


_OF_BATCH = {"statistics_every": 1, "basis_every": 1}
_EXACT = _clipped(relative(BATCH_DAMPING))
_KFAC = KFAC(placement="factored")
_MAKERS: dict[str, Maker] = {
    "sgd": _plain(torch.optim.SGD, lr=0.1, momentum=0.9),
    "adam": _plain(torch.optim.Adam, lr=1e-3),
    "adamw": _plain(torch.optim.AdamW, lr=1e-3),
    "radam": _plain(torch.optim.RAdam, lr=1e-2),
    "ngd": _with(NGD, **_EXACT),
    "ngd_dense": _with(NGD, form="dense", **_EXACT),
    "blockwise_ngd": _with(NGD, scope="layer", form="dense", **_EXACT),
    "tengrad": _with(TENGraD, **_EXACT),
    "ngd_smw": _with(NGDSMW, lr=0.1, alpha=0.005),
    "fngd": _with(FNGD, lr=0.1, alpha=0.005),
    "kfac": _natural(_KFAC),
    "ekfac": _natural(EKFAC(), kl_clip=CORRECTED_CLIP),
    "tkfac": _natural(TKFAC(placement="factored")),
    "tekfac": _natural(TEKFAC(), kl_clip=CORRECTED_CLIP),
    "truncated_kfac": _natural(_KFAC, kind=TruncatedNaturalGradient, switch_step=300),
    "ang": _natural(_KFAC, kind=ANG, total_steps=1000),
    # damping inside two rank-one factors is not on the scale of F
    "ifang": _with(ANG, IFANG(), total_steps=1000, **_clipped(0.1), **_OF_BATCH),
    "sngd": _natural(SNGD(), 0.1, decay=0.995),
    "shampoo": _with(
        NaturalGradient, Shampoo(statistics="gradient"), lr=0.1, damping=relative(1e-4), graft=True
    ),
    # the paper's code weighs the new mean by 0.95: averaged longer, signed means cancel
    "eva": _with(NaturalGradient, Eva(), decay=0.05, **_clipped(0.03), **_OF_BATCH),
    "kbfgs": _with(KBFGSOptimizer, lr=0.3),
    "kronecker_sum": _kronecker_sum,
}


def names() -> list[str]:
    """Every optimizer that `create` knows: torch's own, the papers', every other approximation."""
    return [*_MAKERS, *(n for n in approximations.names() if n not in _MAKERS)]


def create(name: str, model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    """The optimizer of a name over `model`, its defaults overridden by `options`.

    Most curvature methods come with a `kl_clip`, which keeps them stable at any learning rate: a
    step that it shortens is as long at any larger `lr`. `opt.clipped` counts those steps; with
    `kl_clip=None` the learning rate alone decides.

    Raises `ValueError` for an unknown name (with the nearest) or a model too large for the method,
    and `TypeError` for an option that the method does not have.
    """
    if name not in names():
        near = nearest(name, names(), names())
        raise ValueError(f"no optimizer named {name!r}; nearest: {near}")
    make = _MAKERS[name] if name in _MAKERS else _other(name)
    try:
        return make(model, **options)
    except TypeError as error:
        wrong = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if wrong is None:
            raise
        known = option_names(name)
        near = nearest(wrong[1], known)
        hint = f"; nearest: {near}" if near else ""
        raise TypeError(
            f"optimizer {name!r} has no option {wrong[1]!r}{hint}. It takes {', '.join(known)}"
        ) from None


def option_names(name: str) -> list[str]:
    """The options that an optimizer takes, read off its constructors."""
    kinds = type(create(name, nn.Sequential(nn.Linear(2, 2)))).__mro__
    ours = kinds[: kinds.index(torch.optim.Optimizer)]
    found = dict.fromkeys(option for kind in ours for option in inspect.signature(kind).parameters)
    return [option for option in found if option not in NOT_OPTIONS]
