"""Every method as its paper has it: the options that differ from the defaults of `create`.

`PAPER` is the only place that says so. `docs/presets.md` is made from it and read by a test.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from fisherlab import doors
from fisherlab.approximations import damping

PRESETS = ("stable", "paper")
SOURCES = ("stated", "from the authors' code", "inferred")


@dataclass(frozen=True)
class As:
    """One option as the paper has it, where that is said, and in which words."""

    value: Any
    source: str
    why: str

    def __post_init__(self) -> None:
        doors.choice(self.source, "source", SOURCES)


def stated(value: Any, why: str) -> As:
    """An option that the paper states."""
    return As(value, SOURCES[0], why)


def code(value: Any, why: str) -> As:
    """An option that only the code the paper names has."""
    return As(value, SOURCES[1], why)


def inferred(value: Any, why: str) -> As:
    """An option that neither has; the reason stands beside it."""
    return As(value, SOURCES[2], why)


@dataclass(frozen=True)
class Trace:
    """`damping.trace(vartheta)` over the convolutions of a model that is not known yet."""

    vartheta: float

    def rule(self, model: nn.Module) -> damping.Rule:
        """The rule for one model."""
        kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
        names = {name for name, module in model.named_modules() if isinstance(module, kinds)}
        return damping.trace(self.vartheta, names)

    def __repr__(self) -> str:
        return f"trace({self.vartheta:g})"


_PLAIN = {
    "kl_clip": inferred(None, "no clipping is described"),
    "warmup": inferred(0, "no warm-up is described"),
}
_TENGRAD = {
    **_PLAIN,
    "damping": inferred(0.1, "NGM 4.3 gives no value of beta"),
    "momentum": stated(0.0, "NGM 5: momentum is future work"),
}
_SURVEY = {**_TENGRAD, "fisher_type": stated("empirical", "NGM (7), (37)")}
_TEKFAC = {
    **_PLAIN,
    "fisher_type": code("mc", "the code that TEKFAC 4.1 names draws labels from the model"),
    "momentum": stated(0.9, "TEKFAC 4.1"),
    "decay": stated(0.95, "TEKFAC 4.1: beta_1 = beta_2 = 0.95"),
    "ema": inferred("averaged", '(3.6)-(3.8) as printed are ema="literal", 0.95 on the new'),
    "statistics_every": stated(50, "TEKFAC 4.1: T_FIM = 50"),
}
_EIGEN = {
    **_TEKFAC,
    "basis_every": stated(50, "TEKFAC 4.1: T_EIG = 50"),
    "corrections_every": inferred(None, "T_RE has no value; with the statistics"),
}
_ANG = {
    **_PLAIN,
    "lr": stated(0.005, "ANG 3.1"),
    "damping": inferred(0.03, "ANG gives no value; its square is K-FAC's usual 1e-3"),
    "fisher_type": inferred("mc", "ANG gives no labels; K-FAC's own are the model's"),
    "momentum": inferred(0.9, "ANG gives no value"),
}
_ANG_KFAC = {
    **_ANG,
    "placement": stated("factorwise", "ANG (8): lambda I on each factor"),
    "decay": inferred(0.95, "ANG gives no value"),
    "statistics_every": inferred(10, "ANG gives no value; FNGD VI's T_1"),
    "basis_every": inferred(100, "ANG's seconds imply an inversion every 78 steps or so"),
}

PAPER: Mapping[str, Mapping[str, As]] = {
    "ngd": _SURVEY,
    "ngd_dense": _SURVEY,
    "blockwise_ngd": _SURVEY,
    "tengrad": _TENGRAD,
    "kfac": {
        **_PLAIN,
        "placement": stated("factored", "Martens & Grosse 6.3"),
        "damping": code(1e-3, "the repositories of TEKFAC 4.1"),
        "fisher_type": stated("mc", "Martens & Grosse 5: labels of the model"),
        "momentum": inferred(0.9, "as the baseline SGD"),
        "decay": stated(0.95, "Martens & Grosse 5"),
        "statistics_every": stated(10, "FNGD VI: T_1 = 10"),
        "basis_every": stated(100, "FNGD VI: T_2 = 100"),
    },
    "ekfac": {**_EIGEN, "damping": code(1e-3, "the repositories of TEKFAC 4.1")},
    "tkfac": {
        **_TEKFAC,
        "damping": code(1e-3, "the repositories of TEKFAC 4.1"),
        "basis_every": stated(200, "TEKFAC 4.1: T_INV = 200"),
    },
    "tekfac": {
        **_EIGEN,
        "lr": stated(1e-3, "TEKFAC 4.2: CIFAR-100, ResNet-20"),
        "damping": stated(Trace(0.01), "TEKFAC (3.5), vartheta = 0.01"),
    },
    "truncated_kfac": _ANG_KFAC,
    "ang": _ANG_KFAC,
    "ifang": {
        **_ANG,
        "damping": inferred(0.1, "ANG gives no value; outside two directions it only scales"),
        "decay": stated(0.0, "ANG (9)-(14): statistics of one batch"),
        "statistics_every": stated(1, "ANG (9)-(14): statistics of one batch"),
        "basis_every": stated(1, "ANG (9)-(14): statistics of one batch"),
    },
    # SGD on the network that SNGD reconstructs
    "sngd": {
        "lr": stated(0.1, "SNGD IV-A"),
        "momentum": code(0.0, "no momentum"),
        "decay": code(0.995, "running mean from the identity"),
        "every": code(100, "roots every 100 steps"),
        "eps": code(1e-4, "damping of eps tr(nu A)"),
        "weight_decay": stated(1e-3, "SNGD IV-A: L2 of 1e-3; on w' [inferred]"),
    },
    "eva": {
        "warmup": inferred(0, "no warm-up of the statistics is described"),
        "lr": code(0.1, "Eva's repository"),
        "damping": code(0.03, "Eva's repository"),
        "fisher_type": code("empirical", "Eva's repository"),
        "kl_clip": code(1e-3, "Eva's repository clips"),
        "decay": code(0.05, "Eva's repository: the new value weighs 0.95"),
    },
    "fngd": {"alpha": inferred(0.005, "the best of FNGD table V")},
    "ngd_smw": {"alpha": inferred(0.005, "the best of FNGD table V")},
    "shampoo": {
        **_PLAIN,
        "statistics_every": stated(10, "FNGD VI: T_1 = 10"),
        "basis_every": stated(100, "FNGD VI: T_2 = 100"),
    },
}


# Options that `preset="paper"` does not reach, and their stand-ins.
NOT_YET = {
    "sngd": 'the roots are of `eigh`; `root="newton_schulz"` is the paper\'s iteration (15). The '
    'authors\' code has the relative metric, a matrix per unit: `variant="relative"`.',
}


def paper_options(name: str, model: nn.Module) -> dict[str, Any]:
    """The options of a method as its paper has them, for one model; none for torch's own."""
    found = {option: given.value for option, given in PAPER.get(name, {}).items()}
    return {k: v.rule(model) if isinstance(v, Trace) else v for k, v in found.items()}
