"""What the command line runs: comparisons, training, sweeps, claims, and their pages."""
