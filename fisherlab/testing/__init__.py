"""Laws as a kit: what FisherLab asks of its own methods, for yours.

`check_approximation(Neuron())` tries a method on thin and full layers, several positions, groups
and padding, in float32 and float64. It runs in one batch, in chunks, in `compare` and in an
optimizer. Each check returns a report of what holds, or raises a `LawError` that lists what does
not.
"""

from fisherlab.testing.approximations import check_approximation
from fisherlab.testing.blocks import check_block
from fisherlab.testing.laws import LawError, Report
from fisherlab.testing.optimizers import check_optimizer
from fisherlab.testing.statistics import check_statistic

__all__ = [
    "LawError",
    "Report",
    "check_approximation",
    "check_block",
    "check_optimizer",
    "check_statistic",
]
