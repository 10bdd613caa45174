"""The pages of a comparison and of a training run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd

from fisherlab import plots, whole
from fisherlab.comparison import Comparison
from fisherlab.experiments import findings
from fisherlab.experiments.columns import MEANING
from fisherlab.experiments.report import Picture, Section, Table, picture, sections
from fisherlab.experiments.rundir import FIGURES, RunDir, RunDirError
from fisherlab.experiments.training import COLUMNS
from fisherlab.experiments.training.task import HIGHER_IS_BETTER

PICTURES = {
    "error": "Error of every approximation over the layers, from input to output.",
    "trace_ratio": "Trace of every approximation over the trace of the exact block.",
    "direction": "Cosine between the damped step of every approximation and the exact one.",
    "training": "The error over training, layer by layer.",
    "off_diagonal_mass": "Share of F that no eigenvalues in an approximation's basis can express.",
    "cost": "Time to build a block and solve with it, against its error.",
}

CURVATURE = {
    "gram_matrices": "Correlation of the per-example gradients at the last step, by class.",
    "gram_similarity": "Which layers see the examples alike (FNGD fig. 3, for all layers).",
    "layer_masses": "Blocks between layers, which every block-diagonal approximation drops.",
}


@sections("compare")
def of_compare(run: RunDir) -> Iterator[Section]:
    """The finding, the pictures, the layers."""
    frame = run.table("comparison")
    if frame is None or not len(frame):
        raise RunDirError(f"{run.folder} holds a comparison without rows; run it again")
    table = Comparison(frame, run.config)
    summary = table.summary().reset_index()
    last = frame[frame["step"] == frame["step"].max()]
    yield Section(
        "Which approximation is nearest",
        [
            *findings.nearest(table),
            _what(frame, run.config),
            *table.about.split("\n"),
            *filter(None, [table.note]),
        ],
        [Table(summary, "Median over layers and seeds at the last step, the nearest first.")],
        [picture(run, "error", table.plot("error"), PICTURES["error"])],
        found=len(findings.nearest(table)),
    )
    shown = {name: text for name, text in PICTURES.items() if _drawable(name, frame)}
    del shown["error"]
    yield Section(
        "Pictures",
        ["Each is also in the folder as PNG and PDF."],
        pictures=[picture(run, n, table.plot(n), text) for n, text in shown.items()],
    )
    yield from _curvature(run)
    columns = ["layer", "approximation", table.leading]
    columns += [c for c in ("relative_error", "population_error") if c != table.leading]
    columns += ["population_error_se", "population_error_low", "population_error_high"]
    columns += ["optimality_gap", "trace_ratio", "cosine", "diagonalisation", "subspace_overlap"]
    columns += ["layer_type", "n_parameters"]
    columns += ["build_seconds", "decompose_seconds", "shared_seconds", "memory_bytes"]
    columns += ["formed_bytes", "note"]
    by_layer = last.drop_duplicates(["layer", "approximation", "seed"])[columns]
    caption = "Every layer at the last step (first seed first); all rows are in comparison.csv."
    yield Section("Layer by layer", tables=[Table(by_layer.dropna(axis=1, how="all"), caption)])
    steps = ["layer", "approximation", "damping_relative", "direction_cosine"]
    steps += ["direction_error", "quadratic_decrease", "quadratic_decrease_scaled", "stein_loss"]
    steps += ["condition", "solve_seconds", "placement", "seed"]
    caption = "The damped natural gradient at the last step, per damping."
    yield Section("The damped step", tables=[Table(last[steps], caption)])
    meaning = pd.DataFrame(MEANING.items(), columns=["column", "meaning"])
    yield Section("Every column of comparison.csv", tables=[Table(meaning, meaning={})])


def _curvature(run: RunDir) -> Iterator[Section]:
    """The Gram matrices of the batch, where the run kept them."""
    studies = run.grams()
    if not studies:
        return
    last = studies[max(studies)]
    shown = [picture(run, n, getattr(plots, n)(last), text) for n, text in CURVATURE.items()]
    if len(studies) > 1:
        figure = plots.gram_over_training(studies)
        text = "How the correlations move while the network is trained."
        shown.append(picture(run, "gram_over_training", figure, text))
    similar = {"Adjacent layers'": float(last.adjacent), "other pairs'": float(last.apart)}
    alike = [f"{pair} Gram correlations have similarity {value:.2f}; "
             for pair, value in similar.items() if value == value]  # fmt: skip
    found = (
        f"{''.join(alike)}{float(last.dropped):.0%} of the Fisher matrix's mass "
        "lies between layers. Empirical Fisher of the batch, first seed, last step."
    )
    yield Section("Examples and layers", [found], pictures=shown)


def _drawable(name: str, frame: pd.DataFrame) -> bool:
    """Whether a picture has anything to show: one step is no training, one damping no curve."""
    alone = {"training": "step", "direction": "damping_relative"}
    return name not in alone or frame[alone[name]].nunique() > 1


def _what(frame: pd.DataFrame, config: dict[str, Any]) -> str:
    settings = config.get("settings", {})
    return (
        f"Model {settings.get('model')} on {settings.get('data')}, measured at training "
        f"{_listed('step', frame['step'])}: {_counted('layer', frame)}, "
        f"{_counted('approximation', frame)}, {_listed('seed', frame['seed'])}."
    )


def _listed(word: str, values: pd.Series) -> str:
    """`"step 3"`, `"steps 0, 3"`."""
    found = sorted(values.unique())
    return f"{word}{'s' if len(found) > 1 else ''} {', '.join(map(str, found))}"


def _counted(column: str, frame: pd.DataFrame) -> str:
    """`"1 layer"`, `"2 layers"`."""
    count = frame[column].nunique()
    return f"{count} {column}{'s' if count != 1 else ''}"


RESULTS = ["optimizer", "final", "final_sd", "best", "best_sd", "train_loss", "test_loss"]
RESULTS += ["ratio_to_sgd", "clipped_share", "seconds_per_step", "seeds", "status"]
SUMMARY = {
    **COLUMNS,
    "final": "the metric at the last epoch, mean over seeds",
    "final_sd": "its standard deviation over seeds; empty for one",
    "best": "the metric at each seed's best epoch, mean over seeds",
    "best_sd": "its standard deviation over seeds",
    "seeds": "runs that came to their end",
    "status": "done, diverged, failed, ...: the worst of the seeds first",
}


def _results_first(summary: pd.DataFrame) -> pd.DataFrame:
    """The summary, results in front, without columns that hold nothing."""
    filled = summary.loc[:, ~(summary.isna() | (summary == "")).all()]
    return filled[[*(c for c in RESULTS if c in filled), *(c for c in filled if c not in RESULTS)]]


TRAINING = {
    "curves": "Training loss and test metric against steps (left) and against time (right).",
    "cost": "The end result of each optimizer, and the price of its step.",
    "comparisons": "The optimizers' own blocks against the exact ones, over training.",
}


@sections("train")
def of_train(run: RunDir) -> Iterator[Section]:
    """The summary, the pictures, and the row of every epoch."""
    summary, rows = run.table("summary"), run.table("rows")
    if summary is None or rows is None:
        raise RunDirError(f"{run.folder} holds a training run without an epoch; run it again")
    metric = run.config.get("metric", "metric")
    yield Section(
        "Which optimizer is best",
        [
            *findings.best_optimizer(summary, metric),
            f"“final” and “best” are {metric} on the test set, at the last and at the best epoch.",
        ],
        [Table(_results_first(summary), "Mean over seeds, the best first.", SUMMARY)],
        [
            Picture(path, text)
            for name, text in TRAINING.items()
            if (path := run.folder / f"{name}.png").is_file()
        ],
        found=len(findings.best_optimizer(summary, metric)),
    )
    yield Section("Every epoch", tables=[Table(rows, "All rows are in rows.csv.", COLUMNS)])


@sections("sweep")
def of_sweep(run: RunDir) -> Iterator[Section]:
    """The choice from the grids, its result on the test set, and every point tried."""
    path = run.folder / "sweep.json"
    if not path.is_file():
        raise RunDirError(f"{run.folder} holds a search without a choice; run it again")
    found = whole.read_json(path, RunDirError)
    table, metric = pd.DataFrame(found["table"]), found["metric"]
    table["options"] = table["options"].replace("", "defaults")
    chosen = table["optimizer"] + ": " + table["options"]
    text = [f"Chosen by the {metric} on held-out training examples: {'; '.join(chosen)}."]
    if "final" in table:
        ended = table.sort_values("final", ascending=metric not in HIGHER_IS_BETTER)
        text = [*findings.best_optimizer(ended, metric), *text]
    tried = pd.DataFrame(found["tried"])
    tried["optimizer"] = tried["name"]
    shown = _searched(run, tried, found)
    curves = run.folder / "final" / "curves.png"
    if curves.is_file():
        shown.insert(0, Picture(curves, TRAINING["curves"]))
    yield Section(
        "Which settings are best",
        [*text, *found["notes"]],
        [Table(table, f"{metric.capitalize()}: held out, then on the test set.", CHOSEN)],
        shown[:1],
        found=len(text),
    )
    yield Section("Option by option", pictures=shown[1:])
    tried["options"] = [
        ", ".join(f"{option}={value}" for option, value in options.items()) or "defaults"
        for options in tried["options"]
    ]
    tried = tried[["label", "options", "value", "status", "note"]]
    yield Section("Every point", tables=[Table(tried, f"The {metric} on held-out examples.", {})])


def _searched(run: RunDir, tried: pd.DataFrame, found: dict[str, Any]) -> list[Picture]:
    """The effect of an option on the metric, where more than one value of one was tried."""
    shown = []
    moved = tried.groupby("optimizer")["options"].agg(lambda all: len({str(o) for o in all}) > 1)
    if moved.any():
        figure = plots.search_slices(tried, found["metric"])
        shown.append(picture(run, "slices", figure, SEARCH["slices"]))
    if found["importance"]:
        figure = plots.search_importance(found["importance"])
        shown.append(picture(run, "importance", figure, SEARCH["importance"]))
    return shown


SEARCH = {
    "slices": "The metric on held-out examples over each option; every point is in every panel.",
    "importance": "Share of the metric's variance among the points that an option explains (fANOVA "
    "on Optuna's trees); a few points tell little.",
}
CHOSEN = {
    **SUMMARY,
    "options": "the chosen point of the grid",
    "at_the_edge": "options chosen at an end of their grid: a wider one may find better",
    "points": "points of the grid",
    "validation": "the metric on held-out training examples, by which the point was chosen",
}


@sections("bench")
def of_bench(run: RunDir) -> Iterator[Section]:
    """Each part: its picture and its table."""
    for name, title in BENCH.items():
        frame = run.table(name)
        if frame is None:
            continue
        path = run.folder / FIGURES / f"{name}.png"
        text = []
        if "of_reach" in frame and (known := frame["of_reach"].dropna()).size:
            text = [f"{int((known <= 1).sum())} of {known.size} rows reach what was to be reached."]
        shown = [Picture(path, title)] if path.is_file() else []
        yield Section(title, text, [Table(frame.dropna(axis=1, how="all"), title, {})], shown)


BENCH = {
    "capture": "Capture and Gram matrices, multiples of one forward and backward",
    "build": "Approximations of one batch, multiples of one forward and backward",
    "compare": "Whole comparisons",
    "optim": "Training steps, multiples of SGD's",
    "scaling": "Fitted exponents of time and memory",
    "sizes": "Comparisons of every weight, multiples of one forward and backward",
}
