"""Tables to figures, in one theme; nothing is computed here.

Every function takes a table (a `Comparison`, or its frame) and returns a `matplotlib` figure that
belongs to nobody: no global state, nothing to close.
"""

from fisherlab.plots import claims, theme
from fisherlab.plots.alignment import eigenbasis_overlap, off_diagonal_mass, principal_angles
from fisherlab.plots.comparison import cost, direction, error, trace_ratio, training
from fisherlab.plots.curves import training_cost, training_curves
from fisherlab.plots.errors import (
    error_facets,
    in_sample_against_population,
    lines,
    pareto,
    staleness,
    why_bad,
)
from fisherlab.plots.explorer import Explorer, explore
from fisherlab.plots.fisher_matrix import (
    dropped_over_training,
    fisher_types,
    layer_masses,
    mc_convergence,
)
from fisherlab.plots.gram import (
    coefficient_drift,
    coefficients,
    gram_matrices,
    gram_over_training,
    gram_similarity,
)
from fisherlab.plots.reproduce import drawn_schedules, reproduced, time_split
from fisherlab.plots.spectra import (
    condition_against_damping,
    cumulative_trace,
    effective_rank,
    eigenvalues,
)
from fisherlab.plots.sweep import search_importance, search_slices
from fisherlab.plots.theme import colour, save

__all__ = [
    "Explorer",
    "claims",
    "coefficient_drift",
    "coefficients",
    "colour",
    "condition_against_damping",
    "cost",
    "cumulative_trace",
    "direction",
    "drawn_schedules",
    "dropped_over_training",
    "effective_rank",
    "eigenbasis_overlap",
    "eigenvalues",
    "error",
    "error_facets",
    "explore",
    "fisher_types",
    "gram_matrices",
    "gram_over_training",
    "gram_similarity",
    "in_sample_against_population",
    "layer_masses",
    "lines",
    "mc_convergence",
    "off_diagonal_mass",
    "pareto",
    "principal_angles",
    "reproduced",
    "save",
    "search_importance",
    "search_slices",
    "staleness",
    "theme",
    "time_split",
    "trace_ratio",
    "training",
    "training_cost",
    "training_curves",
    "why_bad",
]
