"""Tables to figures, in one theme; nothing is computed here.

Every function takes a table (a `Comparison`, or its frame) and returns a `matplotlib` figure that
belongs to nobody: no global state, nothing to close.
"""

from fisherlab.plots import theme
from fisherlab.plots.comparison import cost, direction, error, trace_ratio, training
from fisherlab.plots.theme import colour, save

__all__ = ["colour", "cost", "direction", "error", "save", "theme", "trace_ratio", "training"]
