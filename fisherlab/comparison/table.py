"""`Comparison`: the table of measurements, its summary, its files."""

from __future__ import annotations

import html
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

import fisherlab
from fisherlab import doors, whole
from fisherlab.comparison import display
from fisherlab.comparison.orders import order_counts, paired, unseen_values
from fisherlab.metrics.population import UNKNOWN
from fisherlab.names import nearest, unknown

# Share of ||F||^2 that is sampling noise, above which the in-sample error misleads.
NOISY = 0.2

IDENTITY = ["layer", "layer_type", "n_parameters", "approximation", "fisher_type", "examples"]
IDENTITY += ["reference_examples", "reference_fisher_type", "seed", "step", "dtype"]
IDENTITY += ["damping", "damping_relative", "placement"]
MEASURES = ["relative_error", "population_error", "population_error_se"]
MEASURES += ["population_error_low", "population_error_high"]
MEASURES += [f"population_cosine{end}" for end in ("", "_low", "_high")]
MEASURES += [f"population_trace_ratio{end}" for end in ("", "_low", "_high")]
MEASURES += ["diagonal_share", "optimality_gap"]
MEASURES += ["trace_ratio", "cosine", "scaled_error", "diagonalisation"]
MEASURES += ["subspace_overlap", "direction_cosine", "direction_error", "quadratic_decrease"]
MEASURES += ["quadratic_decrease_scaled", "stein_loss", "condition", "build_seconds"]
MEASURES += [
    "decompose_seconds",
    "shared_seconds",
    "solve_seconds",
    "memory_bytes",
    "formed_bytes",
    "clamped",
]
COLUMNS = [*IDENTITY, *MEASURES, "note"]

# The columns that a table is read by.
READ = ["layer", "approximation", "fisher_type", "examples", "dtype", "seed", "step", "note"]
READ += ["reference_examples", "reference_fisher_type", "relative_error", "population_error"]
READ += ["diagonal_share"]

# How a row says that its eigenbasis is no basis of its own.
CHOSEN = (
    "F has energy in a null space of its factors, or in one of equal eigenvalues, where the "
    "eigensolver picks the basis: no diagonalisation, and corrected eigenvalues are of that basis"
)
# How it says that a subspace of F or of its own is none.
NO_GAP = "no gap beyond rounding behind its leading eigenvalues or those of F: no subspace_overlap"
# How a row says that it has no numbers.
OVERFLOW = "numbers pass the range of the dtype: rescale inputs or targets, or measure in float64"
# How a row says that its numbers need float64.
ROUNDING = "lies in eigenvalues below float32 rounding: measure a float64 model"
# And how the worth of its step does.
STEP_ROUNDING = (
    "may be the rounding of a float32 gradient, divided by the damping: measure a float64 model"
)


@dataclass
class Comparison:
    """A table of measurements: one row per layer x approximation x damping.

    `relative_error = ||X - F|| / ||F||` is in sample; `population_error` is against held-out
    examples.

    Args:
        frame: the rows; `note` has the warnings.
        config: states what was measured, and reruns it.
    """

    frame: pd.DataFrame
    config: dict[str, Any] = field(default_factory=dict)
    # the share of each unseen example in each approximation's error, for `order` and `orders`
    unseen: pd.DataFrame = field(default_factory=lambda: unseen_values([]), repr=False)

    def __post_init__(self) -> None:
        """Refuse what is no table."""
        if not isinstance(self.frame, pd.DataFrame):
            raise ValueError(f"frame must be a DataFrame, got {doors.said(self.frame)}")
        missing = [name for name in ("layer", "approximation") if name not in self.frame]
        if len(self.frame.columns) and missing:
            raise ValueError(
                f"frame must be that of a comparison; it has no column {', '.join(missing)}"
            )
        # a column that an earlier version did not measure is not known
        lost = [name for name in READ if name not in self.frame]
        if lost:
            self.frame = self.frame.reindex(columns=[*self.frame.columns, *lost])
        if not isinstance(self.config, Mapping):
            raise ValueError(f"config must be a dict, got {doors.said(self.config)}")
        if not isinstance(self.unseen, pd.DataFrame) or "approximation" not in self.unseen:
            raise ValueError(
                f"unseen must be that of a comparison, a DataFrame, got {doors.said(self.unseen)}"
            )

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
    def about(self) -> str:
        """Summary: Fisher type, draws, examples, layers, parameters, what was skipped."""
        if not len(self.frame):
            return ""
        return "\n".join(filter(None, (self._fisher, self._coverage, self._skipped)))

    @property
    def _fisher(self) -> str:
        def listed(column: str) -> str:
            return joined(self.frame[column].dropna().unique())

        drawn = "mc" in self.frame["fisher_type"].unique()
        draws = self.config.get("mc_samples") if drawn else None
        text = f"Fisher type {listed('fisher_type')}"
        if draws is not None:
            text += f" with {joined(draws)} draw{'s' * (draws != 1)} per example"
        text += f", {listed('examples')} examples, {listed('dtype')}"
        held_out, other = listed("reference_examples"), listed("reference_fisher_type")
        if held_out:
            text += f"; {held_out} unseen examples for the population error"
        if other == "hessian":
            text += "; measured against the Hessian of the loss of the same examples"
        elif other == "ggn":
            text += "; measured against the Gauss-Newton matrix of the same examples"
        elif other not in ("", listed("fisher_type")):
            text += f"; measured against the {other} Fisher of the same examples"
        if drawn and self.config.get("fisher_type_asked") is False:
            text += (
                ". Above 20 outputs this is the default; fisher_type='exact', or more mc_samples, "
                "has less noise"
            )
        return text + "."

    @property
    def _coverage(self) -> str:
        layers = self.frame["layer"].nunique()
        text = f"{layers} layer{'s' * (layers != 1)}"
        found = self.config.get("parameters", {})
        trained, covered = (found.get(part) for part in ("trained", "covered"))
        if not isinstance(trained, int) or not isinstance(covered, int):
            return f"{text}."  # it is of several models, or of an earlier version
        share = f"{covered / trained:.0%}" if trained else "none"
        return f"{text} with {covered:,} of {trained:,} trainable parameters ({share})."

    @property
    def _skipped(self) -> str:
        """Layers without a block, by reason."""
        reasons: dict[str, list[str]] = {}
        for layer, why in (self.config.get("skipped") or {}).items():
            reasons.setdefault(joined(why), []).append(layer)
        found = [f"{_few(layers)} ({why})" for why, layers in reasons.items()]
        return f"Skipped: {'; '.join(found)}." if found else ""

    @property
    def note(self) -> str:
        """The facts that a reader needs before the first number."""
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
        """A sentence on the population errors for which the held-out examples are too few."""
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
            f"Of {', '.join(names)}, part of the trace or of the step {ROUNDING} (see `note`, "
            f"{layers} layer{'s' * (layers > 1)})."
        )

    @property
    def _noise(self) -> str:
        """A warning on in-sample errors of a batch of few examples."""
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
        orders = self.orders()
        if len(orders):
            counts = order_counts(orders, int(last["step"].max()))
            table.insert(min(2, len(table.columns)), "order", counts.reindex(table.index))
        # where everything was refused there is no error to sort by
        return table.sort_values(self.leading) if self.leading in table else table

    def orders(self, nearest: str | None = None) -> pd.DataFrame:
        """Whether each approximation is told apart from the nearest one by the unseen examples.

        A row per layer, seed, step and approximation against `nearest`, by default the one with the
        smallest median population error. `difference` is that of the two squared population errors,
        from the same examples. `low` and `high` are its 95 % interval, `verdict` is that of
        `order`. Without unseen examples the frame has no rows.

        Raises:
            ValueError: `nearest` was not measured against unseen examples.
        """
        names = list(self.unseen["approximation"].unique())
        if nearest is None:
            # a table made of rows alone has no values of single examples
            last = self.frame[self.frame["step"] == self.frame["step"].max()]
            last = last[last["approximation"].isin(names)]
            medians = last.groupby("approximation")["population_error"].median().dropna()
            if medians.empty:
                return paired(self.unseen, [])
            nearest = str(medians.idxmin())
        self._check_unseen(nearest)
        return paired(self.unseen, [(name, nearest) for name in names if name != nearest])

    def order(self, first: str, second: str) -> pd.DataFrame:
        """Which of two approximations is nearer to the population's block, layer by layer.

        `difference = (||X - E F||^2 - ||Y - E F||^2) / ||E F||^2`, X the first, Y the second,
        paired by example. `verdict` says of the first that it is "nearer", "further", the "same"
        block, or that the order is "not resolved", where the 95 % interval holds 0.

        Raises:
            ValueError: one of them was not measured against unseen examples.
        """
        for name in (first, second):
            self._check_unseen(name)
        return paired(self.unseen, [(first, second)])

    def _check_unseen(self, name: str) -> None:
        names = list(self.unseen["approximation"].unique())
        if not names:
            raise ValueError(
                "an order is told by unseen examples, and the table has none: pass `reference=`"
            )
        if not isinstance(name, str) or name not in names:
            given = name if isinstance(name, str) else doors.said(name)
            raise ValueError(unknown("approximation", given, names))

    def save(self, folder: str | Path) -> Path:
        """Write `comparison.csv`, `comparison.parquet` and `config.json` into a folder.

        `unseen.parquet` holds what `orders` is made of, where there are unseen examples.

        A folder that a command wrote is refused: its figures and page would be of another table.
        """
        folder = doors.place(folder, "folder")
        if _is_of_a_command(folder / "config.json"):
            raise FileExistsError(
                f"{folder} is the folder of a `fisherlab` run, whose figures and report would stay "
                "behind; save the table into another folder"
            )
        folder.mkdir(parents=True, exist_ok=True)
        config = json.dumps(self.config, indent=2, default=str)
        whole.write(folder / "comparison.csv", self.frame.to_csv(index=False))
        whole.write_table(folder / "comparison.parquet", self.frame)
        (folder / "unseen.parquet").unlink(missing_ok=True)
        if len(self.unseen):
            whole.write_table(folder / "unseen.parquet", self.unseen)
        whole.write(folder / "config.json", config)
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Comparison:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: a file of it is missing.
            ValueError: one is damaged.
        """
        folder = doors.place(folder, "folder")
        if not (folder / "comparison.parquet").is_file():
            raise FileNotFoundError(
                f"{folder} holds no comparison.parquet, which `save` writes into a folder"
            )
        frame = whole.read_table(folder / "comparison.parquet")
        if "approximation" not in frame or "layer" not in frame:
            raise ValueError(f"{folder / 'comparison.parquet'} is no comparison: it has no layers")
        config = whole.read_json(folder / "config.json")
        values = unseen_values([])
        if (unseen := folder / "unseen.parquet").is_file():
            values = whole.read_table(unseen)
        return cls(frame, config, values)

    @classmethod
    def concat(cls, tables: Sequence[Comparison]) -> Comparison:
        """Several comparisons (steps of a training run, seeds) as one.

        In `config` a value that differs is a list of them all.
        """
        several = list(tables) if isinstance(tables, Sequence) else []
        if not several or not all(isinstance(table, Comparison) for table in several):
            raise ValueError(f"tables must be a list of comparisons, got {doors.said(tables)}")
        frame = pd.concat([table.frame for table in tables], ignore_index=True)
        unseen = [table.unseen for table in tables if len(table.unseen)]
        values = pd.concat(unseen, ignore_index=True) if unseen else unseen_values([])
        return cls(frame, _merged([table.config for table in tables]), values)

    def plot(self, kind: str = "error", **options: Any) -> Any:
        """A figure by name: any function of `fl.plots` whose first argument is a `table`."""
        # loaded when called: a table does not depend on its pictures
        plots: Any = fisherlab.plots
        known = [name for name in plots.__all__ if _takes_a_table(getattr(plots, name))]
        if not isinstance(kind, str) or kind not in known:
            if not isinstance(kind, str):
                raise ValueError(f"kind must name a picture of a table, got {doors.said(kind)}")
            other = f" (fl.plots.{kind} draws other data)" if kind in plots.__all__ else ""
            near = nearest(kind, known, known)
            raise ValueError(f"no picture of a table is named {kind!r}{other}; nearest: {near}")
        return getattr(plots, kind)(self, **options)

    def _repr_html_(self) -> str:
        lines = [f"{self._medians}.", *self.about.split("\n"), self.note]
        said = "<br>".join(html.escape(line) for line in lines if line)
        return display.table_html(said, self.summary())

    def __repr__(self) -> str:
        summary = self.summary()
        columns = display.first_columns(summary)
        first = [name for name in columns if name != display.ORDER][:4]
        first += [name for name in columns if name == display.ORDER]
        counted = [name for name in (f"{column} known" for column in first) if name in summary]
        text = summary[[*first, *counted]].to_string(
            float_format=lambda v: f"{v:.4f}", line_width=80
        )
        left = len(summary.columns) - len(first) - len(counted)
        more = f"{self._medians}; {left} more columns: .summary()" if left else self._medians
        return "\n".join(filter(None, (self.about, self.note, text, more)))

    @property
    def _medians(self) -> str:
        """Over what a number of the summary is the median."""
        frame = self.frame
        parts = []
        for column in ("layer", "seed"):
            count = frame[column].nunique()
            parts += [f"{count} {column}s"] if count > 1 else []
        over = f"medians over {' and '.join(parts)}" if parts else "one layer"
        steps = frame["step"].unique()
        text = f"{self.config['model']}: {over}" if "model" in self.config else over.capitalize()
        return f"{text} at step {steps.max()}" if len(steps) and steps.max() else text


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a comparison.

    Args:
        comparison: the table of the layers that were measured before it.
    """

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


def noted(*texts: str | None) -> str:
    """The notes of a row as one."""
    return "; ".join(filter(None, texts))


def joined(values: Any) -> str:
    """A value, or several of them, as a sentence names them."""
    if isinstance(values, str) or not hasattr(values, "__iter__"):
        values = [values]
    texts = [f"{value:,.10g}" if isinstance(value, float) else str(value) for value in values]
    return " and ".join(filter(None, (", ".join(texts[:-1]), *texts[-1:])))


def _few(names: Sequence[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _merged(configs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One config of several: a value where they agree, else the list of all; dicts by key."""
    found: dict[str, Any] = {}
    for key in dict.fromkeys(key for config in configs for key in config):
        values = [config[key] for config in configs if key in config]
        if all(value == values[0] for value in values):
            found[key] = values[0]
        elif all(isinstance(value, dict) for value in values):
            found[key] = _merged(values)
        else:
            every = [v for value in values for v in (value if isinstance(value, list) else [value])]
            found[key] = [v for k, v in enumerate(every) if v not in every[:k]]
    return found


def _is_of_a_command(config: Path) -> bool:
    try:
        return "command" in json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def _takes_a_table(function: Any) -> bool:
    return callable(function) and next(iter(inspect.signature(function).parameters), "") == "table"
