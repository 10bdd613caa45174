"""Every optimizer by name, with defaults that train a small net."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fisherlab import approximations
from fisherlab.approximations.damping import relative
from fisherlab.approximations.eigen_corrected import EKFAC, TEKFAC
from fisherlab.approximations.eva import Eva
from fisherlab.approximations.ifang import IFANG
from fisherlab.approximations.kfac import KFAC
from fisherlab.approximations.shampoo import Shampoo
from fisherlab.approximations.sngd import SNGD
from fisherlab.approximations.tkfac import TKFAC
from fisherlab.optim.ang import ANG, TruncatedNaturalGradient
from fisherlab.optim.fngd import FNGD
from fisherlab.optim.kbfgs import KBFGSOptimizer
from fisherlab.optim.natural_gradient import NaturalGradient
from fisherlab.optim.ngd import NGD
from fisherlab.optim.woodbury import NGDSMW, TENGraD

Maker = Callable[..., torch.optim.Optimizer]

# Step clipped to a quadratic-model change of this size, as KFAC's users do: a damping relative to
# the block's own trace lets the step grow as a batch is fitted and its Fisher vanishes.
KL_CLIP = 1e-2


def _plain(kind: type[torch.optim.Optimizer], **defaults: Any) -> Maker:
    def make(model: nn.Module, params: Any = None, **options: Any) -> torch.optim.Optimizer:
        return kind(model.parameters() if params is None else params, **{**defaults, **options})

    return make


def _with(kind: Callable[..., torch.optim.Optimizer], *args: Any, **defaults: Any) -> Maker:
    def make(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
        return kind(model, *args, **{**defaults, **options})

    return make


def _natural(approximation: Any, share: float = 0.1, **defaults: Any) -> Maker:
    return _with(
        NaturalGradient,
        approximation,
        **{"lr": 0.1, "damping": relative(share), "kl_clip": KL_CLIP, **defaults},
    )


_OF_BATCH = {"statistics_every": 1, "basis_every": 1}
_MAKERS: dict[str, Maker] = {
    "sgd": _plain(torch.optim.SGD, lr=0.1, momentum=0.9),
    "adam": _plain(torch.optim.Adam, lr=1e-3),
    "adamw": _plain(torch.optim.AdamW, lr=1e-3),
    "radam": _plain(torch.optim.RAdam, lr=1e-3),
    "ngd": _with(NGD, lr=0.1, damping=1e-2, kl_clip=KL_CLIP),
    "ngd_dense": _with(NGD, lr=0.1, damping=1e-2, kl_clip=KL_CLIP, form="dense"),
    "blockwise_ngd": _with(NGD, lr=0.1, damping=1e-2, kl_clip=KL_CLIP, scope="layer", form="dense"),
    "tengrad": _with(TENGraD, lr=0.05, damping=0.1),
    "ngd_smw": _with(NGDSMW, lr=0.1, alpha=0.005),
    "fngd": _with(FNGD, lr=0.1, alpha=0.005),
    "kfac": _natural(KFAC(placement="factored")),
    "ekfac": _natural(EKFAC()),
    "tkfac": _natural(TKFAC(placement="factored")),
    "tekfac": _natural(TEKFAC()),
    "truncated_kfac": _with(
        TruncatedNaturalGradient,
        KFAC(placement="factored"),
        lr=0.1,
        damping=relative(0.1),
        kl_clip=KL_CLIP,
        switch_step=300,
    ),
    "ang": _with(
        ANG,
        KFAC(placement="factored"),
        lr=0.1,
        damping=relative(0.1),
        kl_clip=KL_CLIP,
        total_steps=1000,
    ),
    "ifang": _with(
        ANG, IFANG(), lr=0.1, damping=0.1, kl_clip=KL_CLIP, total_steps=1000, **_OF_BATCH
    ),
    "sngd": _natural(SNGD(), share=0.1, decay=0.995),
    "shampoo": _natural(Shampoo(statistics="gradient"), share=1e-4, graft=True, kl_clip=None),
    "eva": _natural(Eva(), share=1.0, damping=0.03, **_OF_BATCH),
    "kbfgs": _with(KBFGSOptimizer, lr=0.1, kl_clip=KL_CLIP),
}


def names() -> list[str]:
    """Every optimizer that `create` knows: torch's own, the papers', every other approximation."""
    return [*_MAKERS, *(n for n in approximations.names() if n not in _MAKERS)]


def create(name: str, model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    """The optimizer of a name over `model`, its defaults overridden by `options`.

    Raises `ValueError` for an unknown name (with the nearest) and `TypeError` for an option that the
    method does not have.
    """
    if name not in names():
        near = difflib.get_close_matches(name, names(), 3) or names()
        raise ValueError(f"no optimizer named {name!r}; nearest: {', '.join(near)}")
    if name in _MAKERS:
        make = _MAKERS[name]
    else:
        approximation = approximations.get(name)()
        make = _natural(approximation, **({} if approximation.additive else _OF_BATCH))
    try:
        return make(model, **options)
    except TypeError as error:
        if "unexpected keyword argument" in str(error):
            wrong = str(error).rsplit(" ", 1)[-1]
            raise TypeError(f"optimizer {name!r} has no option {wrong}") from None
        raise
