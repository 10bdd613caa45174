"""Optimizers: one for every approximation, and those that are more than a preconditioner."""

from fisherlab.optim.ang import ANG, TruncatedNaturalGradient
from fisherlab.optim.create import create, names, option_names
from fisherlab.optim.fngd import FNGD
from fisherlab.optim.kbfgs import KBFGSOptimizer
from fisherlab.optim.muon import Muon
from fisherlab.optim.natural_gradient import NaturalGradient
from fisherlab.optim.ngd import NGD
from fisherlab.optim.preconditioner import Preconditioner
from fisherlab.optim.scale import OptimizerError
from fisherlab.optim.schedule import Schedule
from fisherlab.optim.sngd import reconstruct, refresh, restore
from fisherlab.optim.soap import SOAP
from fisherlab.optim.step import Clip
from fisherlab.optim.woodbury import NGDSMW, TENGraD

__all__ = [
    "ANG",
    "FNGD",
    "NGD",
    "NGDSMW",
    "SOAP",
    "Clip",
    "KBFGSOptimizer",
    "Muon",
    "NaturalGradient",
    "OptimizerError",
    "Preconditioner",
    "Schedule",
    "TENGraD",
    "TruncatedNaturalGradient",
    "create",
    "names",
    "option_names",
    "reconstruct",
    "refresh",
    "restore",
]
