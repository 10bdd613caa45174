"""FisherLab: how good is an approximation of a layer's Fisher block, and what does it buy?"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fisherlab.extras import named

if TYPE_CHECKING:  # for readers and type checkers; HOMES says the same when a name is first used
    from fisherlab import adapters as adapters
    from fisherlab import approximations as approximations
    from fisherlab import auditing as auditing
    from fisherlab import blocks as blocks
    from fisherlab import callbacks as callbacks
    from fisherlab import claims as claims
    from fisherlab import comparison as comparison
    from fisherlab import datasets as datasets
    from fisherlab import distributed as distributed
    from fisherlab import experiments as experiments
    from fisherlab import extract as extract
    from fisherlab import metrics as metrics
    from fisherlab import models as models
    from fisherlab import monitoring as monitoring
    from fisherlab import network as network
    from fisherlab import optim as optim
    from fisherlab import plots as plots
    from fisherlab import statistics as statistics
    from fisherlab import storing as storing
    from fisherlab import testing as testing
    from fisherlab.approximations.diagonal import Diagonal
    from fisherlab.approximations.dykaf import DyKAF
    from fisherlab.approximations.eigen_corrected import EKFAC, TEKFAC, EigenCorrected
    from fisherlab.approximations.eva import Eva
    from fisherlab.approximations.exact import Exact
    from fisherlab.approximations.ifang import IFANG
    from fisherlab.approximations.kbfgs import KBFGS
    from fisherlab.approximations.kfac import KFAC, KFACReduce
    from fisherlab.approximations.kl_optimal import KLOptimal
    from fisherlab.approximations.kl_shampoo import KLShampoo
    from fisherlab.approximations.kronecker_optimal import KroneckerOptimal, KroneckerSum
    from fisherlab.approximations.mini_block import MiniBlock
    from fisherlab.approximations.nystrom import Nystrom
    from fisherlab.approximations.shampoo import Shampoo
    from fisherlab.approximations.sngd import SNGD
    from fisherlab.approximations.soap import SOAP
    from fisherlab.approximations.tkfac import TKFAC, TKFACExpand
    from fisherlab.auditing import audit
    from fisherlab.comparison import Comparison, compare
    from fisherlab.experiments.reproduce import reproduce
    from fisherlab.extract import (
        CaptureError,
        LayerCapture,
        capture,
        register_criterion,
        register_product,
    )
    from fisherlab.extract.support import support
    from fisherlab.heap import keep_freed_memory
    from fisherlab.monitoring import Monitor
    from fisherlab.storing import load, save

__version__ = "0.1.0"

PARTS = (
    "adapters", "approximations", "auditing", "blocks", "callbacks", "claims", "comparison",
    "datasets", "distributed", "experiments", "extract", "metrics", "models", "monitoring",
    "network", "optim", "plots", "statistics", "storing", "testing",
)  # fmt: skip
# `import fisherlab` imports nothing else, not even torch: `fisherlab --version` answers at once.
HOMES = {
    "CaptureError": "extract",
    "Comparison": "comparison",
    "Diagonal": "approximations.diagonal",
    "DyKAF": "approximations.dykaf",
    "EKFAC": "approximations.eigen_corrected",
    "EigenCorrected": "approximations.eigen_corrected",
    "Eva": "approximations.eva",
    "Exact": "approximations.exact",
    "IFANG": "approximations.ifang",
    "KBFGS": "approximations.kbfgs",
    "KFAC": "approximations.kfac",
    "KFACReduce": "approximations.kfac",
    "KLOptimal": "approximations.kl_optimal",
    "KLShampoo": "approximations.kl_shampoo",
    "KroneckerOptimal": "approximations.kronecker_optimal",
    "KroneckerSum": "approximations.kronecker_optimal",
    "LayerCapture": "extract",
    "MiniBlock": "approximations.mini_block",
    "Monitor": "monitoring",
    "Nystrom": "approximations.nystrom",
    "SNGD": "approximations.sngd",
    "SOAP": "approximations.soap",
    "Shampoo": "approximations.shampoo",
    "TEKFAC": "approximations.eigen_corrected",
    "TKFAC": "approximations.tkfac",
    "TKFACExpand": "approximations.tkfac",
    "audit": "auditing",
    "capture": "extract",
    "compare": "comparison",
    "keep_freed_memory": "heap",
    "load": "storing",
    "register_criterion": "extract",
    "register_product": "extract",
    "reproduce": "experiments.reproduce",
    "save": "storing",
    "support": "extract.support",
}


def __getattr__(name: str) -> Any:
    if name not in PARTS and name not in HOMES:
        raise AttributeError(f"module 'fisherlab' has no attribute {name!r}")
    with named():
        module = import_module(f"fisherlab.{HOMES.get(name, name)}")
    if name in PARTS:
        return module
    found = getattr(module, name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*PARTS, *HOMES, "__version__"})


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
    "DyKAF",
    "EigenCorrected",
    "Eva",
    "Exact",
    "KFACReduce",
    "KLOptimal",
    "KLShampoo",
    "KroneckerOptimal",
    "KroneckerSum",
    "LayerCapture",
    "MiniBlock",
    "Monitor",
    "Nystrom",
    "Shampoo",
    "TKFACExpand",
    "approximations",
    "audit",
    "blocks",
    "capture",
    "compare",
    "distributed",
    "keep_freed_memory",
    "load",
    "metrics",
    "register_criterion",
    "register_product",
    "reproduce",
    "save",
    "support",
]
