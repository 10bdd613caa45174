"""`Comparison`: the table of measurements, its summary, its files."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from fisherlab.metrics.population import UNKNOWN
from fisherlab.names import nearest

# Share of ||F||^2 that is sampling noise, above which the in-sample error misleads.
NOISY = 0.2

IDENTITY = ["layer", "layer_type", "n_parameters", "approximation", "fisher_type", "examples"]
IDENTITY += ["reference_examples", "reference_fisher_type", "seed", "step", "dtype"]
IDENTITY += ["damping", "damping_relative", "placement"]
MEASURES = ["relative_error", "population_error", "population_error_se"]
MEASURES += ["population_error_low", "population_error_high", "diagonal_share", "optimality_gap"]
MEASURES += ["trace_ratio", "cosine", "scaled_error", "diagonalisation"]
MEASURES += ["subspace_overlap", "direction_cosine", "direction_error", "quadratic_decrease"]
MEASURES += ["quadratic_decrease_scaled", "stein_loss", "condition", "build_seconds"]
MEASURES += ["solve_seconds", "memory_bytes", "clamped"]
COLUMNS = [*IDENTITY, *MEASURES, "note"]

# How a row says that its numbers need float64.
ROUNDING = "lies in eigenvalues below float32 rounding: measure a float64 model"


@dataclass
class Comparison:
    """A table of measurements: `frame` has one row per layer x approximation x damping.

    `relative_error = ||X - F|| / ||F||` is in sample; `population_error` against examples the
    approximation has not seen. `config` says what was measured and reruns it; `note` what to mind.
    """

    frame: pd.DataFrame
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def noisy(self) -> bool:
        """Whether more than a fifth of `||F||^2` is sampling noise of the batch."""
        return bool(self.frame["diagonal_share"].median() > NOISY)

    @property
    def leading(self) -> str:
        """The error column that deserves to be read first."""
        known = self.frame["population_error"].notna().any()
        return "population_error" if self.noisy and known else "relative_error"

    @property
    def note(self) -> str:
        """What a reader has to know before the first number."""
        return " ".join(filter(None, (self._type, self._noise, self._unknown, self._rounding)))

    @property
    def _type(self) -> str:
        """Why the Fisher matrix is the empirical one, where nobody asked for it."""
        return str(self.config.get("why_empirical") or "")

    def _noted(self, text: str) -> pd.DataFrame:
        notes = self.frame["note"].fillna("").astype(str)  # a CSV file knows no empty string
        return self.frame[notes.str.contains(text, regex=False)]

    @property
    def _unknown(self) -> str:
        """How many of the population errors the unseen examples are too few for."""
        key = ["layer", "approximation", "seed", "step"]
        missing, every = (len(f.drop_duplicates(key)) for f in (self._noted(UNKNOWN), self.frame))
        if not missing:
            return ""
        return (
            f"{missing} of {every} population errors have too few unseen examples and are left out "
            "of the medians: take more. Their 95 % intervals, population_error_low and _high, say "
            "what is known."
        )

    @property
    def _rounding(self) -> str:
        """Which approximations' numbers need more digits than the model has."""
        rows = self._noted(ROUNDING)
        if not len(rows):
            return ""
        names, layers = rows["approximation"].unique(), rows["layer"].nunique()
        return (
            f"Of {', '.join(names)}, part of the trace {ROUNDING} (see `note`, "
            f"{layers} layer{'s' * (layers > 1)})."
        )

    @property
    def _noise(self) -> str:
        """What a batch of few examples says of its own errors."""
        if not self.noisy:
            return ""
        share = self.frame["diagonal_share"].median()
        text = (
            f"{share:.0%} of ||F||^2 are the examples' own blocks, i.e. sampling noise of "
            "this batch: in-sample errors mostly measure the batch"
        )
        if self.leading == "population_error":
            return text + ", so the table leads with the population error."
        return text + "; pass `reference=` (unseen examples) for the population error."

    def summary(self) -> pd.DataFrame:
        """One row per approximation, the median over layers (and seeds) at the last step.

        Sorted by `leading`; direction cosines get one column per relative damping. Where rows have
        no number, a column beside the median counts those that have: "2 of 3".
        """
        last = self.frame[self.frame["step"] == self.frame["step"].max()]
        columns = [self.leading]
        columns += [c for c in ("relative_error", "population_error") if c not in columns]
        columns += ["optimality_gap", "trace_ratio", "cosine", "scaled_error", "diagonalisation"]
        columns += ["subspace_overlap", "build_seconds"]
        once = last.drop_duplicates(["layer", "approximation", "seed", "step"])
        table = _medians(once, columns)
        for damping, rows in last.groupby("damping_relative"):
            name = f"direction_cosine @ {damping:g}"
            renamed = rows.rename(columns={"direction_cosine": name})
            table = table.join(_medians(renamed, [name]))
        # where everything was refused there is no error to sort by
        return table.sort_values(self.leading) if self.leading in table else table

    def save(self, folder: str | Path) -> Path:
        """Write `comparison.csv`, `comparison.parquet` and `config.json` into a folder.

        A folder that a command wrote is refused: its figures and page would be of another table.
        """
        folder = Path(folder)
        if _is_of_a_command(folder / "config.json"):
            raise FileExistsError(
                f"{folder} is the folder of a `fisherlab` run, whose figures and report would stay "
                "behind; save the table into another folder"
            )
        folder.mkdir(parents=True, exist_ok=True)
        self.frame.to_csv(folder / "comparison.csv", index=False)
        self.frame.to_parquet(folder / "comparison.parquet", index=False)
        (folder / "config.json").write_text(json.dumps(self.config, indent=2, default=str))
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Comparison:
        """Read what `save` wrote."""
        folder = Path(folder)
        if not (folder / "comparison.parquet").is_file():
            raise FileNotFoundError(
                f"{folder} holds no comparison.parquet, which `save` writes into a folder"
            )
        frame = pd.read_parquet(folder / "comparison.parquet")
        return cls(frame, json.loads((folder / "config.json").read_text()))

    @classmethod
    def concat(cls, tables: Sequence[Comparison]) -> Comparison:
        """Several comparisons (steps of a training run, seeds) as one."""
        frame = pd.concat([table.frame for table in tables], ignore_index=True)
        return cls(frame, tables[-1].config if tables else {})

    def plot(self, kind: str = "error", **options: Any) -> Any:
        """A figure by name: any function of `fl.plots` whose first argument is a `table`."""
        # resolved when called: a table does not depend on its pictures
        import importlib

        plots = importlib.import_module("fisherlab.plots")
        known = [name for name in plots.__all__ if _takes_a_table(getattr(plots, name))]
        if kind not in known:
            other = f" (fl.plots.{kind} draws other data)" if kind in plots.__all__ else ""
            near = nearest(kind, known, known)
            raise ValueError(f"no picture of a table is named {kind!r}{other}; nearest: {near}")
        return getattr(plots, kind)(self, **options)

    def _repr_html_(self) -> str:
        styled = self.summary().style.format(precision=4, na_rep="-")
        styled = styled.background_gradient(subset=[self.leading], cmap="Blues_r")
        note = f"<p>{self.note}</p>" if self.note else ""
        return f"{note}{styled.to_html()}"

    def __repr__(self) -> str:
        return f"{self.note}\n{self.summary().to_string(float_format=lambda v: f'{v:.4f}')}".strip()


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a comparison; `comparison` holds the layers that were measured before it."""

    def __init__(self, comparison: Comparison) -> None:
        super().__init__("interrupted; `.comparison` holds the layers measured so far")
        self.comparison = comparison


def _medians(frame: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """Medians by approximation, each with the count of its numbers where some are missing."""
    groups = frame.groupby("approximation")
    parts: list[pd.Series] = []
    for column in columns:
        known, every = groups[column].count(), groups.size()
        if not known.any():
            continue
        parts.append(groups[column].median())
        if (known < every).any():
            parts.append((known.astype(str) + " of " + every.astype(str)).rename(f"{column} known"))
    return pd.concat(parts, axis=1) if parts else pd.DataFrame(index=groups.size().index)


def _is_of_a_command(config: Path) -> bool:
    try:
        return "command" in json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def _takes_a_table(function: Any) -> bool:
    return callable(function) and next(iter(inspect.signature(function).parameters), "") == "table"
