"""The record of one optimizer with one seed, in memory and in its checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from fisherlab.comparison.table import READ
from fisherlab.experiments import checkpoint
from fisherlab.experiments.training.settings import Entry, Settings

# The states in a checkpoint; a run in none of them was interrupted.
FINAL = ("done", "diverged", "refused")

# Columns of a record's rows that hold words; all others hold numbers.
WORDS = {"optimizer", "method", "layer", "layer_type", "approximation", "fisher_type", "note"}
WORDS |= {"reference_fisher_type", "dtype", "placement"}
# The columns without which its tables and pictures cannot be made.
MINE = {"optimizer", "method", "seed", "epoch", "step"}
NEEDED = {
    "rows": MINE | {"train_loss", "test_loss"},
    "curve": MINE | {"train_loss", "train_seconds"},
    "comparisons": MINE | set(READ),
}


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
        there, epochs = Settings.found(state, path).to_json(), settings.epochs
        same = {**there, "epochs": epochs} == settings.to_json() and there["epochs"] <= epochs
        if not same or state["label"] != self.entry.label:
            raise checkpoint.CheckpointError(
                f"{path} is of a run with other settings than config.json; delete it"
            )
        self._check(state, path)
        for f in fields(self):
            if f.name != "entry":
                setattr(self, f.name, state[f.name])
        mine = self.entry.epochs
        if self.status == "done" and mine(there["epochs"]) < mine(epochs):
            self.status = "interrupted"  # it goes on to the new number of epochs
        return state["training"]

    def _check(self, state: dict[str, Any], path: Path) -> None:
        """Refuse what `save` cannot have written, of which tables would fail or lie."""
        typed: dict[str, type | tuple[type, ...]] = dict.fromkeys(("note", "layer"), str)
        typed |= {"status": str, "traceback": str, "stopped_at": (int, type(None))}
        wrong = [name for name, kind in typed.items() if not isinstance(state[name], kind)]
        wrong += [name for name, needed in NEEDED.items() if not self._is_mine(state[name], needed)]
        if state["status"] not in (*FINAL, "interrupted") or (
            state["status"] == "done" and not state["rows"]
        ):
            wrong.append("status")
        if wrong or state["seed"] != self.seed:
            raise checkpoint.CheckpointError(
                f"{path} is damaged: {', '.join(wrong) or 'seed'} cannot be of {self.entry.label} "
                f"with seed {self.seed}; delete it to start that run again"
            )

    def _is_mine(self, rows: object, needed: set[str]) -> bool:
        """Whether rows have the columns needed, each of its type, and are of this run."""
        mine = {"optimizer": self.entry.label, "method": self.entry.name, "seed": self.seed}
        return isinstance(rows, list) and all(
            isinstance(row, dict)
            and needed <= row.keys()
            and mine == {name: row[name] for name in mine}
            # a word that is missing is NaN
            and all(type(v) in (float, str if k in WORDS else int) for k, v in row.items())
            for row in rows
        )
