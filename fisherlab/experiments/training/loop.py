"""Training by several optimizers side by side, on the same model, batches and clock."""

from __future__ import annotations

import gc
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fisherlab import doors, optim, whole
from fisherlab.blocks import BlockError
from fisherlab.experiments.checkpoint import CheckpointError
from fisherlab.experiments.training.cost import SGDReference
from fisherlab.experiments.training.divergence import Diverged, blame, finite
from fisherlab.experiments.training.entries import lengths_in
from fisherlab.experiments.training.record import FINAL, Record
from fisherlab.experiments.training.results import Results
from fisherlab.experiments.training.run import Run
from fisherlab.experiments.training.settings import Entry, Settings, SettingsError
from fisherlab.experiments.training.task import Task
from fisherlab.extract import CaptureError
from fisherlab.heap import is_out_of_memory

# Errors by which a method may refuse a model, a batch or a number; any other is a bug.
REFUSALS: tuple[type[Exception], ...] = (
    optim.OptimizerError,
    BlockError,
    CaptureError,
    MemoryError,
    torch.linalg.LinAlgError,
    torch.OutOfMemoryError,
)


class Watch:
    """A listener for a caller that waits; every method may be overridden."""

    def planned(self, records: Sequence[Record]) -> None:
        """These are the runs, some of them perhaps done already."""

    def started(self, record: Record, done: int, steps: int) -> None:
        """A run begins, or goes on after `done` of its steps."""

    def stepped(self, loss: float) -> None:
        """One step was taken."""

    def measured(self, record: Record) -> None:
        """An epoch has ended, and is on the disk."""

    def ended(self, record: Record) -> None:
        """A run has ended."""


def train(settings: Settings, folder: str | Path, *, watch: Watch | None = None) -> Results:
    """Train every optimizer with every seed, and leave rows and checkpoints in the folder.

    Finished runs in the folder are taken over. Interrupted runs go on from their last epoch, and
    shorter runs go on to the new number of epochs if no schedule depends on it. The rows equal
    those of an uninterrupted run, times and peak memory aside. A method that refuses or diverges
    ends with the reason, and the others go on. Ctrl-C ends with what there is
    (`results.interrupted`).
    """
    if not isinstance(settings, Settings):
        raise SettingsError(f"settings must be Settings, got {doors.said(settings)}")
    folder, watch = doors.place(folder, "folder", error=SettingsError), watch or Watch()
    _check_same(settings, folder)
    task = Task(settings)
    records = [Record(entry, seed) for seed in settings.seeds for entry in settings.entries]
    _held = whole.hold(folder)  # until this function returns
    whole.sweep_parts(folder)
    for record in records:
        record.restore(folder, settings)
    watch.planned(records)
    results = Results(task, records)
    results.write_config(folder, "running")
    reference = SGDReference(task.model(0).train(), task.criterion())
    try:
        for record in records:
            if record.status not in FINAL:
                _train_one(task, record, folder, reference, watch)
                results.write(folder)
            watch.ended(record)
    except KeyboardInterrupt:
        results.interrupted = True
    results.write(folder)
    results.write_config(folder, "interrupted" if results.interrupted else "complete")
    return results


def _check_same(settings: Settings, folder: Path) -> None:
    """Refuse a folder that holds a run with other settings; more epochs are the same run, longer.

    Longer where the epochs done so far would have been the same ones.
    """
    if not (folder / "config.json").exists():
        return
    earlier = Settings.load(folder)
    ours, there = settings.to_json(), earlier.to_json()
    other = [
        f"{'optimizers' if key == 'entries' else key} {_said(there[key])}, not {_said(ours[key])}"
        for key in ours
        if ours[key] != there[key]
    ]
    longer = settings.epochs > earlier.epochs
    planned = lengths_in(settings)
    if longer and len(other) == 1 and not planned:
        return
    if other:
        why = (
            f"; its epochs were planned for that length by {planned}" if planned and longer else ""
        )
        raise SettingsError(
            f"{folder} holds another run ({'; '.join(other)}){why}; give another folder"
        )


def _said(value: Any) -> str:
    """A setting as a user would say it."""
    if not isinstance(value, list):
        return str(value)
    return "+".join(str(Entry(**v)) if isinstance(v, dict) else str(v) for v in value)


def _train_one(
    task: Task, record: Record, folder: Path, reference: SGDReference, watch: Watch
) -> None:
    """One optimizer with one seed, from its checkpoint or from the start, to its end."""
    devices = [task.x.device] if task.x.device.type == "cuda" else []
    record.status, record.traceback = "interrupted", ""
    with torch.random.fork_rng(devices), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            _train_epochs(task, record, folder, reference, watch, caught)
        except (CheckpointError, OSError):  # of the folder, not of the method: a full disk
            raise
        except Diverged as error:
            record.status, record.note = "diverged", str(error)
            record.stopped_at, record.layer = error.step, error.layer
        except Exception as error:
            if isinstance(error, REFUSALS) or is_out_of_memory(error):
                record.status, record.note = "refused", str(error)
            else:
                record.status = "failed"
                record.note = f"{type(error).__name__}: {error}"
                record.traceback = traceback.format_exc()
    if record.status in ("diverged", "refused"):
        record.save(folder, task.settings)
    gc.collect()  # a scheduler and its optimizer hold each other


def _train_epochs(
    task: Task,
    record: Record,
    folder: Path,
    reference: SGDReference,
    watch: Watch,
    caught: list[warnings.WarningMessage],
) -> None:
    settings = task.settings
    state = record.restore(folder, settings)
    try:
        run = Run(task, record)
    except ValueError as error:  # the options were checked on another model: it is this one's size
        raise optim.OptimizerError(str(error)) from error
    if state is not None:
        try:
            run.load(state)
        except Exception as error:  # torch raises what it meets in a state
            if is_out_of_memory(error):
                raise
            raise CheckpointError(
                f"{folder / record.path} cannot be gone on from ({' '.join(str(error).split())}); "
                "delete it to start that run again"
            ) from error
    else:
        run.before()
        record.save(folder, settings, run.state())
    watch.started(record, run.steps, run.epochs * task.steps_per_epoch)
    while run.epoch < run.epochs:
        try:
            run.train_epoch(reference, watch.stepped)
        except REFUSALS as error:
            record.stopped_at = run.steps
            if finite(run.model):
                raise
            layer, why = blame(run.model, run.start, task.x[:1])
            raise Diverged(run.steps, layer, f"{why}; {error}") from error
        said = [record.note, *(str(warning.message) for warning in caught)]
        if settings.compare_every and run.epoch % settings.compare_every == 0:
            try:
                run.compare()
            except REFUSALS as error:  # a failure of the exact block, not of the method
                said.append(f"not compared: {error}")
        record.note = "; ".join(dict.fromkeys(filter(None, said)))
        if run.epoch == run.epochs:
            record.status = "done"
        record.save(folder, settings, run.state())
        watch.measured(record)
