"""The record of one optimizer with one seed, in memory and in its checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from fisherlab.experiments import checkpoint
from fisherlab.experiments.training.settings import Entry, Settings

# The states in a checkpoint; a run in none of them was interrupted.
FINAL = ("done", "diverged", "refused")


@dataclass
class Record:
    """How a run ended and why; a row per epoch, the loss curve, blocks against exact ones."""

    entry: Entry
    seed: int
    status: str = "interrupted"  # or one of FINAL, or failed
    note: str = ""
    stopped_at: int | None = None  # the step at which a run diverged or was refused
    layer: str = ""  # the one that is to blame for a divergence
    rows: list[dict[str, Any]] = field(default_factory=list)
    curve: list[dict[str, Any]] = field(default_factory=list)
    comparisons: list[dict[str, Any]] = field(default_factory=list)
    traceback: str = ""  # traceback of a failure, which is a bug of ours

    @property
    def path(self) -> Path:
        """Its checkpoint, below the run folder."""
        return Path("checkpoints") / f"{self.entry.label}-seed{self.seed}.pt"

    def save(self, folder: Path, settings: Settings, state: dict[str, Any] | None = None) -> None:
        """Write the checkpoint: this record, and the training state that a resumed run needs."""
        mine = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "entry"}
        mine |= {"label": self.entry.label, "settings": settings.to_json(), "training": state}
        checkpoint.save(folder / self.path, mine)

    def restore(self, folder: Path, settings: Settings) -> dict[str, Any] | None:
        """Take over what the checkpoint says; the training state in it, or None."""
        path = folder / self.path
        if not path.exists():
            return None
        state = checkpoint.load(path, settings.device)
        needed = {"label", "settings", "training", *(f.name for f in fields(self))} - {"entry"}
        if missing := sorted(needed - state.keys()):
            raise checkpoint.CheckpointError(
                f"{path} lacks {', '.join(missing)}: it is of another version, or damaged; delete "
                "it to start that run again"
            )
        # a checkpoint of an earlier version has fewer settings
        there, epochs = Settings.from_json(state["settings"]).to_json(), settings.epochs
        same = {**there, "epochs": epochs} == settings.to_json() and there["epochs"] <= epochs
        if not same or state["label"] != self.entry.label:
            raise checkpoint.CheckpointError(
                f"{path} is of a run with other settings than config.json; delete it"
            )
        for f in fields(self):
            if f.name != "entry":
                setattr(self, f.name, state[f.name])
        mine = self.entry.epochs
        if self.status == "done" and mine(there["epochs"]) < mine(epochs):
            self.status = "interrupted"  # it goes on to the new number of epochs
        return state["training"]
