"""The papers' theorems as executable claims, with margins and counterexamples."""

# Importing a module registers its claims; the order is that of the table.
from fisherlab.claims import foundations
from fisherlab.claims.base import Claim, ClaimError, get, names

__all__ = ["Claim", "ClaimError", "foundations", "get", "names"]
