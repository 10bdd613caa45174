"""`fisherlab train`: every optimizer on the same model, batches and clock."""

from fisherlab.experiments.training.entries import bounds, entries
from fisherlab.experiments.training.loop import Watch, train
from fisherlab.experiments.training.record import Record
from fisherlab.experiments.training.results import COLUMNS, Results
from fisherlab.experiments.training.settings import Entry, Settings, SettingsError

__all__ = [
    "COLUMNS",
    "Entry",
    "Record",
    "Results",
    "Settings",
    "SettingsError",
    "Watch",
    "bounds",
    "entries",
    "train",
]
