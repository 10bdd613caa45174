"""The runs behind the command line: comparisons, training, sweeps, claims, and their pages."""
