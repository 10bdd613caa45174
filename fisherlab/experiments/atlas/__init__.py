"""The atlas: approximations x models x stages of training x Fisher types x batch sizes."""

from fisherlab.experiments.atlas.cells import CELLS, STAGES, Cell, named
from fisherlab.experiments.atlas.measure import APPROXIMATIONS, kept, measured, wanted
from fisherlab.experiments.atlas.page import load, markdown, median_interval

__all__ = [
    "APPROXIMATIONS",
    "CELLS",
    "STAGES",
    "Cell",
    "kept",
    "load",
    "markdown",
    "measured",
    "median_interval",
    "named",
    "wanted",
]
