"""FisherLab: how good is an approximation of a layer's Fisher block, and what does it buy?"""

from importlib import import_module
from typing import Any

from fisherlab import approximations, blocks, distributed, metrics
from fisherlab.approximations.diagonal import Diagonal
from fisherlab.approximations.eigen_corrected import EKFAC, TEKFAC, EigenCorrected
from fisherlab.approximations.eva import Eva
from fisherlab.approximations.exact import Exact
from fisherlab.approximations.ifang import IFANG
from fisherlab.approximations.kbfgs import KBFGS
from fisherlab.approximations.kfac import KFAC, KFACReduce
from fisherlab.approximations.kl_optimal import KLOptimal
from fisherlab.approximations.kronecker_optimal import KroneckerOptimal, KroneckerSum
from fisherlab.approximations.mini_block import MiniBlock
from fisherlab.approximations.shampoo import Shampoo
from fisherlab.approximations.sngd import SNGD
from fisherlab.approximations.soap import SOAP
from fisherlab.approximations.tkfac import TKFAC, TKFACExpand
from fisherlab.comparison import Comparison, compare
from fisherlab.extract import (
    CaptureError,
    LayerCapture,
    capture,
    register_criterion,
    register_product,
    support,
)
from fisherlab.heap import keep_freed_memory

__version__ = "0.1.0"

# Parts that `import fisherlab` leaves alone until they are named: pictures need matplotlib's fonts,
# data sets scikit-learn.
LAZY = (
    "adapters",
    "auditing",
    "claims",
    "datasets",
    "experiments",
    "models",
    "monitoring",
    "optim",
    "plots",
    "testing",
)

# Names of modules that import optimizers.
ELSEWHERE = {"Monitor": "fisherlab.monitoring", "audit": "fisherlab.auditing"}


def __getattr__(name: str) -> Any:
    if name == "reproduce":
        return import_module("fisherlab.experiments.reproduce").reproduce
    if name in ELSEWHERE:
        return getattr(import_module(ELSEWHERE[name]), name)
    if name in LAZY:
        return import_module(f"fisherlab.{name}")
    raise AttributeError(f"module 'fisherlab' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *LAZY, *ELSEWHERE, "reproduce", "__version__"})


__all__ = [
    "EKFAC",
    "IFANG",
    "KBFGS",
    "KFAC",
    "SNGD",
    "SOAP",
    "TEKFAC",
    "TKFAC",
    "CaptureError",
    "Comparison",
    "Diagonal",
    "EigenCorrected",
    "Eva",
    "Exact",
    "KFACReduce",
    "KLOptimal",
    "KroneckerOptimal",
    "KroneckerSum",
    "LayerCapture",
    "MiniBlock",
    "Shampoo",
    "TKFACExpand",
    "approximations",
    "blocks",
    "capture",
    "compare",
    "distributed",
    "keep_freed_memory",
    "metrics",
    "register_criterion",
    "register_product",
    "support",
]
