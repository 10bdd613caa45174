"""Functions of (approximate block, exact block); each returns a 0-d float64 tensor unless it says so."""

from fisherlab.metrics.alignment import (
    diagonalisation,
    overlap_matrix,
    principal_angles,
    spectral_gap,
    subspace_overlap,
)
from fisherlab.metrics.direction import (
    direction_cosine,
    direction_error,
    quadratic_decrease,
    quadratic_decrease_scaled,
    step,
)
from fisherlab.metrics.frobenius import (
    absolute_error,
    cosine,
    relative_error,
    scaled_error,
    trace_ratio,
)
from fisherlab.metrics.gram import (
    class_means,
    diagonal_share,
    gram_correlation,
    similarity,
    zero_gradients,
)
from fisherlab.metrics.invariant import condition, stein_loss
from fisherlab.metrics.population import population_error, population_norm
from fisherlab.metrics.spectrum import (
    condition_number,
    cumulative_trace,
    effective_rank,
    participation_ratio,
)

__all__ = [
    "absolute_error",
    "class_means",
    "condition",
    "condition_number",
    "cosine",
    "cumulative_trace",
    "diagonal_share",
    "diagonalisation",
    "direction_cosine",
    "direction_error",
    "effective_rank",
    "gram_correlation",
    "overlap_matrix",
    "participation_ratio",
    "population_error",
    "population_norm",
    "principal_angles",
    "quadratic_decrease",
    "quadratic_decrease_scaled",
    "relative_error",
    "scaled_error",
    "similarity",
    "spectral_gap",
    "stein_loss",
    "step",
    "subspace_overlap",
    "trace_ratio",
    "zero_gradients",
]
