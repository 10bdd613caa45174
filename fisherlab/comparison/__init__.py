"""Every approximation x layer x metric of one batch, as a table."""

from fisherlab.comparison.api import compare
from fisherlab.comparison.request import default_fisher_type, versions
from fisherlab.comparison.run import notebook_bar
from fisherlab.comparison.table import COLUMNS, Comparison, Interrupted

__all__ = [
    "COLUMNS",
    "Comparison",
    "Interrupted",
    "compare",
    "default_fisher_type",
    "notebook_bar",
    "versions",
]
