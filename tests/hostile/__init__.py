"""Hostile inputs: cases of one kind per file, each drawn from a seed, and how each ends.

`cases(seed)` of a kind returns a `Case`; `judge.judged` runs it. `python -m tests.hostile` writes
the table of outcomes.
"""

KINDS = (
    "blocks",
    "metrics",
    "capture",
    "optimizers",
    "scales",
    "files",
    "around",
    "library",
    "commands",
)
