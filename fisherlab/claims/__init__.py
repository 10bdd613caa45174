"""The papers' theorems as executable claims, with margins and counterexamples: `verify`.

A *claim* is the paper's. An *extension* is ours: a correction, or a theorem taken out of sample. A
*contrast* is what the paper itself denies.
"""

# Importing a module registers its claims; the order is that of the table.
from fisherlab.claims import foundations, geometry, steps, losses  # isort: skip
from fisherlab.claims import tekfac, kronecker, memory, ang, sngd, fngd  # isort: skip
from fisherlab.claims import convergence, complexity, pooled, today  # isort: skip
from fisherlab.claims import followed, sketch, chain  # isort: skip
from fisherlab.claims.base import KINDS, PAPERS, Claim, ClaimError, get, names
from fisherlab.claims.table import Verdicts, load, verify

__all__ = [
    "KINDS",
    "PAPERS",
    "Claim",
    "ClaimError",
    "Verdicts",
    "ang",
    "chain",
    "complexity",
    "convergence",
    "fngd",
    "followed",
    "foundations",
    "geometry",
    "get",
    "kronecker",
    "load",
    "losses",
    "memory",
    "names",
    "pooled",
    "sketch",
    "sngd",
    "steps",
    "tekfac",
    "today",
    "verify",
]
