"""The meaning of every column of a comparison, in the words of the report; which are clocks."""

from __future__ import annotations

import pandas as pd

# In the name of every column, of any table, that a second run with the same seed does not repeat.
CLOCKS = ("seconds", "ratio_to_sgd", "timed_steps", "peak_memory_bytes", "at_equal_time")

MEANING = {
    "layer": "name of the module whose weight (bias as last column) the block is of",
    "layer_type": "class of the module",
    "n_parameters": "size N of the block, which is N x N",
    "approximation": "name; `fisherlab approximations` has the equations",
    "fisher_type": "output vectors sent backwards: exact, mc (labels drawn from the model) or "
    "empirical (observed labels)",
    "examples": "examples that X and F were made of",
    "reference_examples": "unseen examples of the population error; empty without",
    "reference_fisher_type": "Fisher type of the exact block",
    "seed": "seed of initialisation, batches and drawn labels",
    "step": "training steps taken before the measurement",
    "dtype": "precision of the measurement",
    "damping": "the lambda of F + lambda I",
    "damping_relative": "lambda in units of tr F / N, the mean eigenvalue",
    "placement": "where the approximation puts the damping: tikhonov is X + lambda I",
    "relative_error": "||X - F|| / ||F|| in the Frobenius norm, on the same examples; 0 is best",
    "population_error": "the same against the block of the whole distribution, from unseen "
    "examples, its bias corrected to second order; empty where they are too few (see `note`)",
    "population_error_se": "its standard error",
    "population_error_low": "lower end of its 95 % interval, from 10 unseen examples on",
    "population_error_high": "upper end; infinite where the population's norm may be 0",
    "population_cosine": "cosine of X and the whole distribution's block, from unseen examples",
    "population_cosine_low": "lower end of its 95 % interval",
    "population_cosine_high": "upper end",
    "population_trace_ratio": "tr X / tr F of the whole distribution, from unseen examples",
    "population_trace_ratio_low": "lower end of its 95 % interval",
    "population_trace_ratio_high": "upper end",
    "diagonal_share": "share of ||F||^2 that the examples' own blocks hold: sampling noise of the "
    "batch",
    "optimality_gap": "relative error minus that of the best Kronecker product; negative for "
    "blocks that are no Kronecker product",
    "trace_ratio": "tr X / tr F; 1 keeps the trace",
    "cosine": "<X, F> / (||X|| ||F||); 1 is right up to scale",
    "scaled_error": "relative error after the best rescaling, sqrt(1 - cosine^2)",
    "diagonalisation": "share of ||F||^2 on the diagonal in the eigenbasis of X; 1: only "
    "eigenvalues can be wrong; empty where F has energy in a null space of X",
    "subspace_overlap": "overlap of the leading eigenspaces (10, or the rank) of X and F; 1: equal",
    "direction_cosine": "cosine between the damped natural gradients of X and of F; 1 is best",
    "direction_error": "|d - d*| / |d*| of the same two steps",
    "quadratic_decrease": "decrease of F's quadratic model by X's step over the best possible",
    "quadratic_decrease_scaled": "the same with the best step length along X's direction",
    "stein_loss": "tr S - log det S - N of S = (X + lambda)^-1/2 (F + lambda) (X + lambda)^-1/2; 0 "
    "is equal",
    "condition": "condition number of S: how well X preconditions F; 1 is best",
    "build_seconds": "time to make the block alone, from the captured inputs and gradients; empty "
    "for a block that was given",
    "decompose_seconds": "time, alone, of what its inverse needs at any damping: eigenvectors of "
    "Kronecker factors, or the Gram matrix of its columns",
    "shared_seconds": "the part of both that other methods of the table use as well, done once",
    "solve_seconds": "time to invert it, its eigenvectors or Gram matrix known, and take one step",
    "memory_bytes": "tensors that the block keeps: rows and thin bases where the batch spans few "
    "dimensions, so it grows with the batch",
    "formed_bytes": "the same with every factor, basis and mini-block as a whole matrix, whatever "
    "the batch; of exact the block itself; eva and ifang have vectors only",
    "clamped": "share of the absolute spectrum that was negative and set to zero",
    "note": "why a row has no numbers, or what to mind about them",
}


def steady(table: pd.DataFrame) -> pd.DataFrame:
    """A table without its clocks: what the same seed repeats to the last byte, on one thread."""
    return table.drop(columns=[name for name in table if any(word in name for word in CLOCKS)])
