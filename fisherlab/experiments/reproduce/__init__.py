"""`fisherlab reproduce`: the papers' tables and figures, ours beside the papers' numbers."""

from fisherlab.experiments.reproduce.catalogue import ITEMS, PAPERS, items
from fisherlab.experiments.reproduce.item import SCALES, Item
from fisherlab.experiments.reproduce.outcome import Outcome
from fisherlab.experiments.reproduce.plan import (
    Planned,
    ReproduceError,
    check_scale,
    cost,
    in_words,
    settings_of,
)
from fisherlab.experiments.reproduce.runs import Listener, announcement, reproduce, verdicts

__all__ = [
    "ITEMS",
    "PAPERS",
    "SCALES",
    "Item",
    "Listener",
    "Outcome",
    "Planned",
    "ReproduceError",
    "announcement",
    "check_scale",
    "cost",
    "in_words",
    "items",
    "reproduce",
    "settings_of",
    "verdicts",
]
