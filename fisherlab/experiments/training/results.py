"""The rows of a training run, its table, and the files they are written to."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fisherlab.experiments.rundir import RunDir
from fisherlab.experiments.training.cost import FEWEST, WARM_UP
from fisherlab.experiments.training.record import Record
from fisherlab.experiments.training.task import HIGHER_IS_BETTER, Task

SPLIT = ("forward_seconds", "backward_seconds", "update_seconds", "refresh_seconds")

COLUMNS = {
    "optimizer": "label of the run",
    "method": "name of the optimizer",
    "seed": "of initialisation and batches",
    "epoch": "epochs done; 0 is before the first step",
    "step": "steps done",
    "lr": "learning rate of the epoch",
    "train_loss": "mean over the batches of the epoch, each before its step",
    "test_loss": "mean over the test set after the epoch",
    "accuracy": "share of right answers on the test set",
    "rmse": "root mean squared error on the test set, in the units of the source",
    "perplexity": "exp(test_loss)",
    "bleu": "score of greedy translations of the test set, 0 to 100, of lower-case words",
    "clipped_share": "share of the epoch's steps that kl_clip or max_norm shortened; a step that "
    "kl_clip shortens is as long at any larger lr",
    "seconds_per_step": "forward, backward and step; medians over the timed steps so far of each "
    "kind (ordinary, statistics due, basis due, ...), by the kind's share of them",
    "forward_seconds": "time of a step's forward, with the loss; mean over the timed steps so far",
    "backward_seconds": "time of a step's backward, with the recording of an optimizer's hooks",
    "update_seconds": "time of the optimizer's part of a step, inverses included",
    "refresh_seconds": "time of a step that makes an inverse anew, median; empty where none is",
    "timed_steps": "steps so far without the first 2 of a process; where none is left, "
    "seconds_per_step is of those",
    "sgd_seconds_per_step": "SGD with momentum on the same model, between the steps so far; median",
    "ratio_to_sgd": "seconds_per_step / sgd_seconds_per_step; of sgd itself, the clock's noise",
    "train_seconds": "seconds in steps so far, without evaluation",
    "cpu_seconds_per_step": "seconds_per_step of the processor: of all threads of this process, "
    "which other processes disturb less than a clock; empty on a GPU",
    "cpu_ratio_to_sgd": "cpu_seconds_per_step over that of the reference SGD",
    "train_cpu_seconds": "seconds of the processor in steps so far",
    "peak_memory_bytes": "peak of the allocator (GPU) or of the process (Linux) in the epoch",
    "state_bytes": "tensors in the optimizer's state_dict",
    "covered_share": "share of the trainable parameters that have a block; the rest takes plain "
    "steps; empty for an optimizer without blocks",
    "fisher_type": "labels of the gradients that blocks are made of; empty where none is recorded",
}


class Results:
    """The measurements of a run so far: `rows`, `curve`, `comparisons` and `summary()`."""

    def __init__(self, task: Task, records: list[Record]) -> None:
        self.settings, self.records = task.settings, records
        self.card, self.metric = task.card, task.metric
        self.higher_is_better = task.metric in HIGHER_IS_BETTER
        self.steps_per_epoch, self.batch_size = task.steps_per_epoch, task.batch_size
        self.examples = len(task.x)
        self.interrupted = False

    @property
    def rows(self) -> pd.DataFrame:
        """One row per optimizer, seed and epoch."""
        frame = pd.DataFrame([row for record in self.records for row in record.rows])
        return frame.reindex(columns=[name for name in COLUMNS if name in frame])

    @property
    def curve(self) -> pd.DataFrame:
        """The training loss, some 20 times per epoch."""
        return pd.DataFrame([point for record in self.records for point in record.curve])

    @property
    def comparisons(self) -> pd.DataFrame:
        """The optimizers' blocks against the exact ones, in the columns of `fl.compare`."""
        return pd.DataFrame([row for record in self.records for row in record.comparisons])

    @property
    def succeeded(self) -> bool:
        """Whether anything was trained to its end."""
        return any(record.status == "done" for record in self.records)

    @property
    def failures(self) -> list[Record]:
        """Runs that ended in an error that nobody foresaw."""
        return [record for record in self.records if record.status == "failed"]

    def summary(self) -> pd.DataFrame:
        """One row per optimizer, the best first, then those without a result and why.

        The metric at the last and at the best epoch, mean and deviation over the finished seeds. It
        is also given at equal time, the time of the fastest optimizer. The cost of a step is the
        median over each kind of step, weighted by the kind's share. Its ratio divides by the median
        of the reference SGD in the same row; for SGD itself it shows the clock's noise. Both are
        medians over the seeds. No ratio below `FEWEST` timed steps.
        """
        found = [self._summary(entry.label) for entry in self.settings.entries]
        frame = pd.DataFrame(found)
        if "final" in frame:
            frame["at_equal_time"] = frame["optimizer"].map(self._at_equal_time())
        if "final" not in frame:
            return frame
        return frame.sort_values(
            "final", ascending=not self.higher_is_better, na_position="last", ignore_index=True
        )

    def _at_equal_time(self) -> pd.Series:
        """The metric of each at the last epoch within the seconds that the fastest took for all."""
        done = {(r.entry.label, r.seed) for r in self.records if r.status == "done"}
        rows = self.rows
        mine = [key in done for key in zip(rows["optimizer"], rows["seed"], strict=True)]
        rows = rows[mine].fillna({"train_seconds": 0.0})
        by = rows.groupby(["optimizer", "seed"])
        least = by["train_seconds"].last().groupby("optimizer").mean().min()
        there = rows[rows["train_seconds"] <= least].groupby(["optimizer", "seed"])[self.metric]
        return there.last().groupby("optimizer").mean()

    @property
    def untimed(self) -> str:
        """Why some of the summary have no ratio to SGD; "" where all have one."""
        summary = self.summary()
        if "final" not in summary or not (summary["timed_steps"] < FEWEST).any():
            return ""
        return (
            f"×SGD is empty where fewer than {FEWEST} steps were timed; the first {WARM_UP} of a "
            "run are not: give more --epochs or --examples, or a smaller --batch-size"
        )

    def _summary(self, label: str) -> dict[str, Any]:
        mine = [record for record in self.records if record.entry.label == label]
        done = [record for record in mine if record.status == "done"]
        odd = [record for record in mine if record.status != "done"]
        notes = [record.note for record in odd or mine if record.note]
        row: dict[str, Any] = {
            "optimizer": label,
            "seeds": len(done),
            "status": ", ".join(dict.fromkeys(record.status for record in [*odd, *done])),
            "stopped_at": next((r.stopped_at for r in odd if r.stopped_at is not None), None),
            "layer": next((r.layer for r in odd if r.layer), ""),
            "note": notes[0] if notes else "",  # other seeds have similar notes
        }
        if not done:
            return row
        # a folder of an earlier version has fewer columns
        rows = pd.DataFrame([r for record in done for r in record.rows], columns=list(COLUMNS))
        by_seed = rows.groupby("seed")[self.metric]
        final = by_seed.last()
        best = by_seed.max() if self.higher_is_better else by_seed.min()
        last = rows.groupby("seed").last()
        epochs = rows[rows["epoch"] > 0]
        timed = int(last["timed_steps"].astype(float).fillna(last["step"]).sum())
        per_step, sgd = last["seconds_per_step"].median(), last["sgd_seconds_per_step"].median()
        return row | {
            "final": final.mean(),
            "final_sd": final.std() if len(final) > 1 else math.nan,
            "best": best.mean(),
            "best_sd": best.std() if len(best) > 1 else math.nan,
            "train_loss": last["train_loss"].mean(),
            # as NGM's tables have it: the mean of the seeds' logarithms
            "log_train_loss": np.log(last["train_loss"].astype(float)).mean(),
            "test_loss": last["test_loss"].mean(),
            "seconds_per_step": per_step,
            "seconds_per_epoch": per_step * self.steps_per_epoch,
            **{name: last[name].astype(float).median() for name in SPLIT},
            "timed_steps": timed,
            "sgd_seconds_per_step": sgd,
            "ratio_to_sgd": per_step / sgd if timed >= FEWEST else math.nan,
            "clipped_share": epochs["clipped_share"].astype(float).mean(),
            "peak_memory_bytes": rows["peak_memory_bytes"].max(),
            "state_bytes": rows["state_bytes"].max(),
            "covered_share": last["covered_share"].astype(float).min(),
            "fisher_type": str(last["fisher_type"].fillna("").iloc[0]),
        }

    @property
    def covered(self) -> str:
        """How many parameters have a block: a sentence for the table of `summary`; "" for none."""
        summary = self.summary()
        if "covered_share" not in summary:
            return ""
        known = summary.dropna(subset=["covered_share"])
        parts = []
        for (share, kind), mine in known.groupby(["covered_share", "fisher_type"], sort=False):
            labels = f" ({kind} Fisher)" if kind else ""
            parts.append(f"{share:.1%} by {', '.join(mine['optimizer'])}{labels}")
        return f"Parameters with a block: {'; '.join(parts)}." if parts else ""

    def reaching(self, target: float) -> pd.DataFrame:
        """Where each optimizer first has the metric: epoch, step, seconds; means over the seeds.

        `reached` counts the seeds that came so far; an optimizer with none has NaN.
        """
        found = []
        for label in dict.fromkeys(record.entry.label for record in self.records):
            mine = self.rows[self.rows["optimizer"] == label]
            there = (
                mine[self.metric] >= target
                if self.higher_is_better
                else mine[self.metric] <= target
            )
            first = mine[there].groupby("seed")[["epoch", "step", "train_seconds"]].first()
            found.append(
                {"optimizer": label, "reached": len(first), "of": mine["seed"].nunique()}
                | first.mean().to_dict()
            )
        return pd.DataFrame(found).sort_values(
            ["reached", "train_seconds"], ascending=[False, True], ignore_index=True
        )

    def write_config(self, folder: Path, status: str) -> None:
        """`config.json`: what reruns it, and what it ran on."""
        config = {
            "command": "train",
            "status": status,
            "settings": self.settings.to_json(),
            "metric": self.metric,
            "data": {"name": self.card.name, "sha256": self.card.sha256},
        }
        RunDir(folder).write_config(config)

    def write(self, folder: Path) -> None:
        """`rows`, `curve`, `comparisons` and `summary` as csv and Parquet."""
        tables = {
            "rows": self.rows,
            "curve": self.curve,
            "comparisons": self.comparisons,
            "summary": self.summary(),
        }
        for name, frame in tables.items():
            if len(frame):
                RunDir(folder).write_table(name, frame)
