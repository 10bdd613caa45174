"""Every optimizer by name, with defaults that train a small net."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fisherlab import approximations, doors
from fisherlab.approximations.damping import Rule, geometric, relative
from fisherlab.approximations.diagonal import Diagonal
from fisherlab.approximations.dykaf import DyKAF
from fisherlab.approximations.eigen_corrected import EKFAC, TEKFAC
from fisherlab.approximations.eva import Eva
from fisherlab.approximations.ifang import IFANG
from fisherlab.approximations.kfac import KFAC, KFACReduce
from fisherlab.approximations.kl_shampoo import KLShampoo
from fisherlab.approximations.kronecker_optimal import KroneckerSum
from fisherlab.approximations.mini_block import MiniBlock
from fisherlab.approximations.nystrom import Nystrom
from fisherlab.approximations.shampoo import Shampoo
from fisherlab.approximations.sngd import SNGD
from fisherlab.approximations.tkfac import TKFAC
from fisherlab.extract.criteria import is_a
from fisherlab.names import nearest
from fisherlab.optim.ang import ANG, TruncatedNaturalGradient, respelled
from fisherlab.optim.base import CurvatureOptimizer, check_module
from fisherlab.optim.fngd import FNGD
from fisherlab.optim.kbfgs import KBFGSOptimizer
from fisherlab.optim.muon import Muon
from fisherlab.optim.natural_gradient import NaturalGradient
from fisherlab.optim.ngd import NGD
from fisherlab.optim.options import FLAT, flat_names, gathered
from fisherlab.optim.presets import PRESETS, paper_options
from fisherlab.optim.sngd import ReconstructedSGD
from fisherlab.optim.soap import SOAP
from fisherlab.optim.woodbury import NGDSMW, TENGraD

Maker = Callable[..., torch.optim.Optimizer]

# Defaults found on seeds of six tasks that docs/defaults.md does not show. One rule for all:
# damping by a share of the geometric mean of trace and mean eigenvalue, a learning rate that
# decides a step's length, and a momentum that forgets in a few steps: at 0.9 the velocity outlives
# the curvature it was made of, and a LeNet's loss doubles. kl_clip is a guard against divergence.
LR, MOMENTUM, KL_CLIP = 0.015, 0.6, 0.1
# shares for running means; one inside both factors damps the larger eigenvalues as well
SHARE, FACTORED_SHARE = 0.03, 0.02
# shares for a single batch's block, which that batch's gradient overfits, and for all layers'
BATCH_SHARE, EXACT_SHARE, JOINT_SHARE = 0.1, 0.3, 1.0
# An exact block holds that gradient: `lr^2 <direction, gradient>` is at most lr^2, per block.
EXACT_LR = 0.08
# Turned to the gradient at its own length, or made without output gradients, a step is longer in F.
LONG_CLIP = 0.03
# Steps at the start that refresh everything, while kl_clip grows to its value: on MNIST (MLP, batch
# 128) the inverse of the first batch, kept for 100 steps, cost KFAC half of its speed; and the
# gradients of a LeNet at its start are so small that its curvature grows 10^4-fold in ten steps.
WARMUP = 20
# A squared error's empirical Fisher matrix has the residual's square in it, 10^-4 of its curvature
# on the MNIST autoencoder, whose first step would be 500 long: columns drawn from the model
# instead; and no momentum, which adds up ten early steps of one direction.
UNMOVED = {"momentum": 0.0, "kl_clip": 1e-2}
SQUARED = {"fisher_type": "mc", "lr": 0.03, **UNMOVED}
# Where F is of the observed labels alone.
SQUARED_EXACT = {"lr": 0.1, "damping": geometric(0.1), **UNMOVED}
SQUARED_RANK_ONE = {"lr": 0.01}
# No running mean to save on.
_OF_BATCH: dict[str, Any] = {"statistics_every": 1, "basis_every": 1}
# Options that `create` passes itself, or that constructors pass on.
NOT_OPTIONS = {"self", "model", "approximation", "options", "kwargs", "groups"}
# An option that only one of the presets has.
ABSENT = "–"
# Parameters of a layer above which a Kronecker sum, whose inverse is dense, is refused.
KRONECKER_SUM_LAYER = 1_500


def _check_like_defaults(kind: type[torch.optim.Optimizer], options: dict[str, Any]) -> None:
    """Refuse options of torch's own optimizers that torch lets pass, such as NaN."""
    for name, parameter in inspect.signature(kind).parameters.items():
        value, default = options.get(name, parameter.default), parameter.default
        if value is default:
            continue
        if isinstance(default, bool) or "bool" in str(parameter.annotation):
            doors.flag(value, name)
        elif isinstance(default, tuple):
            if not isinstance(value, tuple | list) or len(value) != len(default):
                raise ValueError(f"{name} must be {len(default)} numbers, got {doors.said(value)}")
            for each in value:
                doors.number(each, f"each of {name}", least=0.0, below=1.0)
        elif isinstance(default, float | int) or name == "lr":
            number = doors.number(value, name, least=0.0)
            # torch's own take a tensor as the learning rate alone
            if isinstance(value, Tensor) and name != "lr":
                options[name] = number


def _plain(kind: type[torch.optim.Optimizer], **defaults: Any) -> Maker:
    def make(model: nn.Module, params: Any = None, **options: Any) -> torch.optim.Optimizer:
        _check_like_defaults(kind, options)
        return kind(model.parameters() if params is None else params, **{**defaults, **options})

    return make


def _with(kind: type[CurvatureOptimizer], *args: Any, **defaults: Any) -> Maker:
    defaults = gathered({**kind.parts, **defaults})

    def make(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
        options = respelled(options) if issubclass(kind, ANG) else options
        ours = list(args)
        if ours:
            chosen = {key: options.pop(key) for key in ours[0].options if key in options}
            ours[0] = ours[0].with_options(**chosen)
        return kind(model, *ours, **{**defaults, **options})

    of_method = args[0].options if args else {}
    make.defaults = {**defaults, **of_method}  # type: ignore[attr-defined]
    return make


def _natural(
    approximation: Any,
    share: float = SHARE,
    kind: type[NaturalGradient] = NaturalGradient,
    **defaults: Any,
) -> Maker:
    return _for_criterion(_with(kind, approximation, **{**_guarded(geometric(share)), **defaults}))


def _for_criterion(make: Maker, squared: dict[str, Any] = SQUARED) -> Maker:
    """The maker, with `squared` as defaults where the criterion is a squared error."""

    def made(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
        is_squared = is_a(options.get("criterion"), nn.MSELoss)
        return make(model, **{**(squared if is_squared else {}), **options})

    made.defaults = make.defaults  # type: ignore[attr-defined]
    return made


def _guarded(damping: float | Rule, lr: float = LR) -> dict[str, Any]:
    bounds = {"kl_clip": KL_CLIP, "warmup": WARMUP}
    return {"lr": lr, "damping": damping, "momentum": MOMENTUM, **bounds}


def _exact(kind: type[CurvatureOptimizer], share: float, **defaults: Any) -> Maker:
    options = {**_guarded(geometric(share), EXACT_LR), **defaults}
    return _for_criterion(_with(kind, **options), SQUARED_EXACT)


def _rank_one(kind: type[NaturalGradient], *args: Any, lr: float, **defaults: Any) -> Maker:
    approximation, damping = args
    options = {**_guarded(damping, lr), **_OF_BATCH, **defaults}
    return _for_criterion(_with(kind, approximation, **options), SQUARED_RANK_ONE)


def _other(name: str) -> Maker:
    """Any approximation that the table does not list."""
    approximation = approximations.get(name)()
    if approximation.additive or approximation.recursive:
        return _natural(approximation)
    if name == "exact":
        return _natural(approximation, EXACT_SHARE, lr=EXACT_LR, **_OF_BATCH)
    return _natural(approximation, BATCH_SHARE, **_OF_BATCH)


def _kronecker_sum(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    make = _natural(KroneckerSum(), 0.3, lr=2 * LR, basis_every=10, warmup=5)
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


_KFAC = KFAC(placement="factored")
_MAKERS: dict[str, Maker] = {
    "sgd": _plain(torch.optim.SGD, lr=0.1, momentum=0.9),
    "adam": _plain(torch.optim.Adam, lr=1e-3),
    "adamw": _plain(torch.optim.AdamW, lr=1e-3),
    "radam": _plain(torch.optim.RAdam, lr=1e-2),
    "muon": Muon,
    "soap": _plain(SOAP),
    "ngd": _exact(NGD, JOINT_SHARE),
    "ngd_dense": _exact(NGD, JOINT_SHARE, form="dense"),
    "blockwise_ngd": _exact(NGD, EXACT_SHARE, scope="layer", form="dense"),
    "tengrad": _exact(TENGraD, EXACT_SHARE),
    "ngd_smw": _with(NGDSMW, lr=0.1, alpha=0.005),
    "fngd": _with(FNGD, lr=0.1, alpha=0.005),
    "kfac": _natural(_KFAC, FACTORED_SHARE),
    "ekfac": _natural(EKFAC()),
    "tkfac": _natural(TKFAC(placement="factored"), FACTORED_SHARE),
    "tekfac": _natural(TEKFAC()),
    "truncated_kfac": _natural(
        _KFAC, FACTORED_SHARE, kind=TruncatedNaturalGradient, switch_step=300
    ),
    "ang": _natural(_KFAC, 0.005, kind=ANG, kl_clip=LONG_CLIP, total_steps=1000),
    # damping inside two rank-one factors is not on the scale of F
    "ifang": _rank_one(ANG, IFANG(), 0.2, lr=0.04, total_steps=1000),
    "sngd": _natural(SNGD(), 0.005, lr=0.04, kl_clip=LONG_CLIP, decay=0.995),
    "shampoo": _with(
        NaturalGradient, Shampoo(statistics="gradient"), lr=0.1, damping=relative(1e-4), graft=True
    ),
    # the root of a second moment of batches' gradients gives steps of Adam's length
    **{
        name: _with(
            NaturalGradient,
            kind(statistics="gradient"),
            lr=1.5e-3,
            damping=relative(share),
            warmup=WARMUP,
        )
        # the nearest product in the Frobenius norm has next to no energy in most directions
        for name, kind, share in (("kl_shampoo", KLShampoo, 1e-2), ("dykaf", DyKAF, 1.0))
    },
    # the paper's code weighs the new mean by 0.95: averaged longer, signed means cancel
    "eva": _rank_one(NaturalGradient, Eva(), 0.07, lr=0.01, momentum=0.9, kl_clip=1e-3, decay=0.05),
    "kbfgs": _with(KBFGSOptimizer, lr=0.3),
    "kronecker_sum": _kronecker_sum,
    "kfac_reduce": _natural(KFACReduce()),
    # beside its directions there is nothing but the damping, which a LeNet's start needs larger
    "nystrom": _natural(Nystrom(), 0.3, lr=2 * LR),
    "diagonal": _natural(Diagonal(), 0.1, lr=0.02),
    "mini_block": _natural(MiniBlock()),
}

# Optimizers that read nothing but `.grad`: no blocks, no criterion, no options of a curvature.
GRADIENT_ONLY = ("sgd", "adam", "adamw", "radam", "muon", "soap")


def names() -> list[str]:
    """Every optimizer that `create` knows: torch's own, the papers', every other approximation.

    Returns:
        The names, in this order.

    Example:
        >>> import fisherlab as fl
        >>> {"sgd", "kfac", "ekfac"} <= set(fl.optim.names())
        True
    """
    return [*_MAKERS, *(n for n in approximations.names() if n not in _MAKERS)]


def create(
    name: str, model: nn.Module, *, preset: str = "stable", **options: Any
) -> torch.optim.Optimizer:
    """The optimizer of a name over `model`, the defaults of its preset overridden by `options`.

    The learning rate sets the length of the step. Most curvature methods have a default `kl_clip`,
    which guards against divergence. Once KL clipping is active, a larger learning rate no longer
    lengthens the step; `opt.clipped` counts these steps. `kl_clip=None` turns it off. With
    `criterion=torch.nn.MSELoss()` most methods have other defaults: labels drawn from the model, no
    momentum, another `lr` and a smaller `kl_clip`.

    Args:
        name: a name of `fl.optim.names()`, such as "kfac", "ekfac" or "sgd".
        model: the model, in the state to train.
        preset: "stable" has the defaults that train six small tasks. "paper" has the options of the
            method's paper: `optim.presets.PAPER` names each option, its value and its source.
        options: options of the method, such as `lr=0.01`; `fl.optim.option_names(name)` lists them.

    Returns:
        The optimizer, ready to step.

    Raises:
        ValueError: the name or preset is unknown, or the model is too large for the method.
        TypeError: the method has no such option; the message names the nearest.

    Example:
        >>> import fisherlab as fl
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        >>> type(fl.optim.create("kfac", model, lr=0.01)).__name__
        'NaturalGradient'
    """
    if not isinstance(name, str) or name not in names():
        near = nearest(name, names(), names())
        raise ValueError(f"no optimizer named {name!r}; nearest: {near}")
    check_module(model)
    doors.choice(preset, "preset", PRESETS)
    make = _MAKERS[name] if name in _MAKERS else _other(name)
    if preset == "paper":
        options = {**paper_options(name, model), **options}
        make = ReconstructedSGD if name == "sngd" else make
    try:
        return make(model, **options)
    except TypeError as error:
        wrong = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if wrong is None:
            raise
        known = option_names(name, preset)
        near = nearest(wrong[1], known)
        hint = f"; nearest: {near}" if near else ""
        raise TypeError(
            f"optimizer {name!r} has no option {wrong[1]!r}{hint}. It takes {', '.join(known)}"
        ) from None


def option_names(name: str, preset: str = "stable") -> list[str]:
    """The options that an optimizer takes, read off its constructors and those of its parts.

    Args:
        name: a name of `fl.optim.names()`.
        preset: "stable" or "paper".
    """
    optimizer = create(name, _tiny(), preset=preset)
    kind = type(optimizer)
    flat = flat_names(kind.parts) if issubclass(kind, CurvatureOptimizer) else []
    approximation = getattr(optimizer, "approximation", None)
    if approximation is not None and kind is not KBFGSOptimizer:
        flat += approximation.options
    found = [option for taker in _takers(kind) for option in inspect.signature(taker).parameters]
    return [option for option in dict.fromkeys([*found, *flat]) if option not in NOT_OPTIONS]


def _tiny() -> nn.Module:
    """A network to ask a constructor with; the global random stream stays where it is."""
    with torch.random.fork_rng(devices=[]):
        return nn.Sequential(nn.Linear(2, 2))


def _takers(kind: type[torch.optim.Optimizer]) -> list[Callable[..., Any]]:
    """Functions that take an optimizer's options: its constructors, and those they pass them to."""
    if not issubclass(kind, CurvatureOptimizer):
        return [kind]
    return [*kind.__mro__[: kind.__mro__.index(torch.optim.Optimizer)], *kind.takers]


def default(name: str, option: str) -> Any:
    """The value of an option in the preset "stable"; `ABSENT` where that has no such option."""
    make = _MAKERS[name] if name in _MAKERS else _other(name)
    ours = getattr(make, "defaults", {})
    if option in ours:
        return ours[option]
    for part, field in FLAT.get(option, {}).items():
        if part in ours:
            return getattr(ours[part], field)
    for taker in _takers(type(create(name, _tiny()))):
        if option in (parameters := inspect.signature(taker).parameters):
            return parameters[option].default
    return ABSENT
