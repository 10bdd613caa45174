"""Functions of (approximate block, exact block): 0-d float64 tensors unless they say otherwise."""

from fisherlab.metrics.alignment import (
    GroupedOverlap,
    diagonalisation,
    eigenvalue_groups,
    grouped_overlap,
    off_diagonal_mass,
    overlap_matrix,
    principal_angles,
    spectral_gap,
    subspace_overlap,
)
from fisherlab.metrics.bregman import von_neumann_divergence
from fisherlab.metrics.coefficients import coefficient_drift, example_coefficients
from fisherlab.metrics.direction import (
    direction_cosine,
    direction_error,
    quadratic_decrease,
    quadratic_decrease_scaled,
    step,
)
from fisherlab.metrics.error_split import ErrorSplit, kfac_error_split
from fisherlab.metrics.fisher_types import Convergence, mc_convergence
from fisherlab.metrics.frobenius import (
    absolute_error,
    cosine,
    relative_error,
    scaled_error,
    trace_ratio,
)
from fisherlab.metrics.gram import (
    adjacent_similarity,
    by_class,
    class_means,
    diagonal_share,
    gram_correlation,
    similarity,
    similarity_matrix,
    zero_gradients,
)
from fisherlab.metrics.gram_study import GramStudy, gram_study
from fisherlab.metrics.hessian_split import HessianSplit, hessian_split
from fisherlab.metrics.invariant import condition, conditions, stein_loss
from fisherlab.metrics.layers import dropped_mass, layer_correlation, layer_masses
from fisherlab.metrics.pareto import pareto_front
from fisherlab.metrics.population import (
    PopulationEstimate,
    population_error,
    population_estimate,
    population_norm,
    population_order,
)
from fisherlab.metrics.spectrum import (
    condition_curve,
    condition_number,
    cumulative_trace,
    effective_rank,
    participation_ratio,
    spectral_density,
)
from fisherlab.metrics.staleness import staleness

__all__ = [
    "Convergence",
    "ErrorSplit",
    "GramStudy",
    "GroupedOverlap",
    "HessianSplit",
    "PopulationEstimate",
    "absolute_error",
    "adjacent_similarity",
    "by_class",
    "class_means",
    "coefficient_drift",
    "condition",
    "condition_curve",
    "condition_number",
    "conditions",
    "cosine",
    "cumulative_trace",
    "diagonal_share",
    "diagonalisation",
    "direction_cosine",
    "direction_error",
    "dropped_mass",
    "effective_rank",
    "eigenvalue_groups",
    "example_coefficients",
    "gram_correlation",
    "gram_study",
    "grouped_overlap",
    "hessian_split",
    "kfac_error_split",
    "layer_correlation",
    "layer_masses",
    "mc_convergence",
    "off_diagonal_mass",
    "overlap_matrix",
    "pareto_front",
    "participation_ratio",
    "population_error",
    "population_estimate",
    "population_norm",
    "population_order",
    "principal_angles",
    "quadratic_decrease",
    "quadratic_decrease_scaled",
    "relative_error",
    "scaled_error",
    "similarity",
    "similarity_matrix",
    "spectral_density",
    "spectral_gap",
    "staleness",
    "stein_loss",
    "step",
    "subspace_overlap",
    "trace_ratio",
    "von_neumann_divergence",
    "zero_gradients",
]
