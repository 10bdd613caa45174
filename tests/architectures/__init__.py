"""Architectures as people build them, with random weights: one table for tests and docs."""

from architectures import hub, plain
from architectures.table import TABLE, Architecture, Problem

__all__ = ["TABLE", "Architecture", "Problem", "hub", "plain"]
