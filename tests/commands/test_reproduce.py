"""The papers' tables and figures: what is named, what is set, what a verdict says, resuming."""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from pandas.testing import assert_frame_equal
from torch import nn
from typer.testing import CliRunner

import fisherlab as fl
from fisherlab.cli import app
from fisherlab.commands import reproducing
from fisherlab.commands.reproduce import LISTING
from fisherlab.experiments import reproduce as papers
from fisherlab.experiments.columns import steady
from fisherlab.experiments.reproduce import catalogue, drawn, outcome, plan, runs, workers
from fisherlab.experiments.reproduce import presets as page_of_presets
from fisherlab.experiments.reproduce.item import Arm, Cell, Experiment, Item, Number, Order, Size
from fisherlab.experiments.training import Entry, Settings, SettingsError, Watch
from fisherlab.experiments.training.entries import entries, make
from fisherlab.experiments.training.settings import schedule_of
from fisherlab.experiments.training.worker import trained
from fisherlab.optim.presets import NOT_YET, PAPER, SOURCES, inferred, stated

ROOT = Path(__file__).parents[2]
CRITERION = nn.CrossEntropyLoss()

# What there is -----------------------------------------------------------------------------------

# Counted in the papers: tables, figures.
COUNTS = {"ang": (1, 3), "tekfac": (5, 4), "sngd": (5, 8), "fngd": (5, 9), "ngm": (1, 5)}


def test_every_table_and_figure_is_named_and_runs_or_says_why_not():
    for paper, (tables, figures) in COUNTS.items():
        keys = {re.sub("[a-z]$", "", item.key) for item in papers.items(paper)}
        wanted = {f"table{k + 1}" for k in range(tables)} | {f"fig{k + 1}" for k in range(figures)}
        assert keys == wanted, paper
    assert (catalogue.numbered("table"), catalogue.numbered("figure")) == (17, 29)
    for item in papers.ITEMS:
        assert item.runnable or item.why, item.name
        if item.runnable:
            assert all(papers.cost(item, scale) > 0 for scale in papers.SCALES), item.name


def test_all_of_it_takes_minutes_at_scale_minutes():
    seen = {(i.paper, i.experiment.key if i.experiment else i.key): i for i in papers.ITEMS}
    assert sum(papers.cost(item, "minutes") for item in seen.values()) < 40 * 60


def test_experiments_have_keys_of_their_own():
    # two experiments in one folder would refuse each other's runs
    found = {}
    for item in papers.ITEMS:
        if item.experiment:
            key = item.paper, item.experiment.key
            assert found.setdefault(key, item.experiment) is item.experiment


def test_stand_ins_are_named():
    for item in papers.ITEMS:
        for cell in item.experiment.cells if item.experiment else ():
            subset = cell.data.value in ("cifar10", "cifar100")
            assert not (subset or cell.data.source == "inferred") or cell.stand_in, cell.name


# What is set -------------------------------------------------------------------------------------

# Copied from the papers: batch, epochs, and what else they state.
STATED = {
    ("tekfac", "methods", "cifar10-resnet20"): (128, 100, {"schedule": "steps(0.4,0.8)"}),
    ("tekfac", "methods", "svhn-vgg16"): (128, 40, {"schedule": "steps(0.5)", "augment": False}),
    ("sngd", "mnist", "mnist-mlp"): (50, 100, {"hidden": (80, 80)}),
    ("sngd", "cifar10", "cifar10-mlp"): (50, 100, {"hidden": (80, 80)}),
    ("sngd", "ptb", "lstm-3"): (20, 100, {"layers": 3}),
    ("fngd", "curves", "resnet32"): (128, 200, {"schedule": "step"}),  # its first arm is SGD-m
    ("fngd", "multi30k", "multi30k"): (64, 100, {"layers": 6}),
    ("ngm", "sets", "weather-32x16x16"): (128, 20, {"hidden": (32, 16, 16)}),
    ("ngm", "sets", "ecoli-4"): (128, 150, {"hidden": (4,)}),
    ("ngm", "scaling", "layers-4"): (128, 1, {"hidden": (20, 20, 20, 20)}),
}
# By paper, experiment and arm: the options that the runs are given beyond the preset's.
OPTIONS = {
    ("tekfac", "methods", "sgdm"): {"momentum": 0.9},
    ("tekfac", "methods", "tekfac"): {"lr": 1e-3},
    ("tekfac", "vartheta", "vartheta-100"): {"lr": 1e-3, "damping": "trace(100)"},
    ("tekfac", "rates", "lr-0.1"): {"lr": 0.1, "damping": "trace(0.01)"},
    ("sngd", "mnist", "sgd"): {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3},
    ("sngd", "mnist", "sngd"): {"lr": 0.1},
    ("sngd", "mnist", "adam"): {"lr": 1e-3},
    ("fngd", "ablation", "no_damping_rule"): {"alpha": None, "damping": 0.3},
    ("fngd", "damping", "kfac-0.008"): {"damping": 0.008, "placement": "eigenvalue"},
    ("fngd", "damping", "fngd-0.008"): {"alpha": 0.008},
    ("ang", "cifar", "sgd"): {"lr": 0.01},
    ("ang", "cifar", "strategy1"): {"lr": 0.005, "curve": "concave"},
    ("ngm", "sets", "sgd"): {"momentum": 0.0},
}
PRESET = {
    "tengrad": {"momentum": 0.0, "kl_clip": None, "warmup": 0},
    "tekfac": {"momentum": 0.9, "decay": 0.95, "statistics_every": 50, "basis_every": 50},
    "tkfac": {"momentum": 0.9, "decay": 0.95, "statistics_every": 50, "basis_every": 200},
    "kfac": {"statistics_every": 10, "basis_every": 100},
    "shampoo": {"statistics_every": 10, "basis_every": 100},
    "sngd": {"lr": 0.1, "weight_decay": 1e-3, "decay": 0.995, "every": 100, "eps": 1e-4},
    "ang": {"lr": 0.005, "placement": "factorwise", "kl_clip": None},
}
EXPERIMENTS = {(i.paper, i.experiment.key): i.experiment for i in papers.ITEMS if i.experiment}


def planned(key, cell):
    return next(p for p in plan.planned(EXPERIMENTS[key], "paper") if p.cell.name == cell)


@pytest.mark.parametrize("key", STATED, ids=" ".join)
def test_runs_at_scale_paper_have_the_papers_settings(key):
    *of, cell = key
    batch, epochs, others = STATED[key]
    settings = planned(tuple(of), cell).settings
    assert (settings.batch_size, settings.epochs) == (batch, epochs)
    assert {name: getattr(settings, name) for name in others} == others
    assert settings.width == 1.0
    assert settings.examples is None or key[1] == "scaling"  # whose loss nobody reads


def test_arms_have_the_papers_options():
    for (paper, key, label), wanted in OPTIONS.items():
        found = plan.planned(EXPERIMENTS[paper, key], "paper")
        entry = next(e for p in found for e in p.settings.entries if e.label == label)
        assert {name: entry.options[name] for name in wanted} == wanted, label
    for name, wanted in PRESET.items():
        assert {option: PAPER[name][option].value for option in wanted} == wanted, name


def test_second_order_methods_get_half_of_sgds_epochs_in_fngd_at_every_scale():
    for scale in papers.SCALES:
        plans = plan.planned(EXPERIMENTS["fngd", "curves"], scale, only=("resnet32",))
        epochs = {arm.label: p.settings.epochs for p in plans for arm in p.arms}
        assert epochs["sgdm"] == 2 * epochs["fngd"] == 2 * epochs["kfac"]


def test_truncated_kfac_switches_at_the_papers_epochs():
    (found,) = plan.planned(EXPERIMENTS["ang", "cifar"], "paper", only=("cifar10",))
    per_epoch = 9_990 // 128
    steps = {e.label: e.options.get("switch_step") for e in found.settings.entries}
    assert [steps[f"truncated{k}"] for k in (30, 60, 90)] == [k * per_epoch for k in (30, 60, 90)]


def test_every_setting_says_who_says_so():
    for item in filter(lambda item: item.experiment, papers.ITEMS):
        frame = papers.settings_of(item, "paper")
        assert set(frame["source"]) <= set(SOURCES) and frame["where or why"].all(), item.name


def test_every_arm_makes_an_optimizer():
    seen = set()
    for experiment in EXPERIMENTS.values():
        for arm in experiment.arms:
            of = arm.name, arm.preset, *arm.options
            if of not in seen:
                seen.add(of)
                options = {name: given.value for name, given in arm.options.items()}
                entry = Entry("a", arm.name, {"preset": arm.preset, "lr": 0.1, **options})
                make(entry, nn.Sequential(nn.Linear(2, 2)), CRITERION, steps_per_epoch=2, epochs=2)


# Learning rates ----------------------------------------------------------------------------------


def test_rates_are_chosen_on_held_out_examples_with_one_budget_for_all():
    experiment = EXPERIMENTS["sngd", "mnist"]
    assert not list(plan.searches(experiment, "minutes"))
    found = list(plan.searches(experiment, "hours"))
    assert {arm.label for _, arm in found} == {arm.label for arm in experiment.arms}
    budgets = {
        (p.settings.epochs, p.settings.validation, p.settings.seeds, len(p.settings.entries))
        for p, _ in found
    }
    assert budgets == {(4, 6_000, (0,), 7)}
    rates = [[e.options["lr"] for e in p.settings.entries] for p, _ in found]
    assert rates == [[1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0]] * len(found)


# Verdicts ----------------------------------------------------------------------------------------


def frame(**values):
    """Rows of two epochs: the last accuracy of each seed."""
    rows = [
        {"optimizer": arm, "seed": seed, "epoch": epoch, "step": epoch, "accuracy": epoch * value}
        for arm, seeds in values.items()
        for seed, value in enumerate(seeds)
        for epoch in (0, 1)
    ]
    return pd.DataFrame(rows)


def item(reported=None, orders=()):
    numbers = {arm: Number(*pair) for arm, pair in (reported or {}).items()}
    return Item("tekfac", "table9", "", None, reported={"c": numbers}, orders=orders)


def verdict(of, scale="paper", stand_ins=(), **values):
    table = outcome.measured(of, {"c": frame(**values)})
    return outcome.judged(of, table, scale, list(stand_ins))


PAIR = {"a": (90.0, 0.1), "b": (80.0, 0.1)}


def test_verdict_follows_the_order_and_its_certainty():
    sure = {"a": (0.70, 0.71, 0.72), "b": (0.50, 0.51, 0.52)}
    assert verdict(item(PAIR), **sure).verdict == "reproduced"
    assert verdict(item(PAIR), a=sure["b"], b=sure["a"]).verdict == "not reproduced"
    assert verdict(item(PAIR), a=(0.7,), b=(0.5,)).verdict == "undecided"  # one seed
    assert verdict(item(PAIR), a=(0.4, 0.9), b=(0.5, 0.6)).verdict == "undecided"
    assert verdict(item(PAIR), stand_ins=["x"], **sure).verdict == "reproduced on a stand-in"
    three = item({**PAIR, "c": (70.0, 0.1)})
    mixed = verdict(three, a=sure["a"], b=sure["b"], c=(0.60, 0.61, 0.62))
    assert mixed.verdict == "order differs"
    assert "of 3 pairs that the paper orders, 2 are so here" in mixed.because


def test_nets_that_learned_nothing_have_no_order():
    low = {"a": (0.14, 0.145), "b": (0.05, 0.051)}
    assert outcome.untaught(item(PAIR), {"c": frame(**low)}) == ["c"]
    table = outcome.measured(item(PAIR), {"c": frame(**low)})
    assert outcome.judged(item(PAIR), table, "paper", [], ["c"]).verdict == "undecided"
    assert not outcome.untaught(item(PAIR), {"c": frame(a=(0.7,), b=(0.1,))})


def test_what_an_untaught_net_says_is_asked_by_the_metric_of_its_cell():
    def of(quantity, rows):
        return outcome.untaught(replace(item(PAIR), quantity=quantity), {"c": pd.DataFrame(rows)})

    run = {"optimizer": "a", "seed": 0}
    low = [run | {"accuracy": a} for a in (0.1, 0.2)]
    assert of("train_loss", low) == of("seconds_to_target", low) == ["c"]
    assert of("seconds_per_epoch", low) == []  # a step costs what it costs
    words = [run | {"accuracy": 0.0, "perplexity": p} for p in (8_000.0, 500.0)]
    assert of("perplexity", words) == ["c"]
    assert of("perplexity", [*words, run | {"accuracy": 0.1, "perplexity": 300.0}]) == []
    sentences = [run | {"bleu": b, "perplexity": 10.0} for b in (math.nan, 1.2)]
    assert of("bleu", sentences) == ["c"] and of("log_train_loss", [run | {"rmse": 1.0}]) == []


def test_cells_that_learned_nothing_are_not_asked():
    rows = {
        "c": frame(a=(0.70, 0.71, 0.72), b=(0.50, 0.51, 0.52)),
        "d": frame(a=(0.10, 0.11, 0.10), b=(0.13, 0.14, 0.13)),  # the other way round
    }
    both = replace(item(), orders=(Order("a", "b"),))
    short = outcome.untaught(both, rows)
    table = outcome.measured(both, rows)
    found = outcome.judged(both, table, "paper", [], short)
    assert short == ["d"] and found.verdict == "reproduced"
    assert found.because.endswith("too short to judge: d")
    assert outcome.judged(both, table, "paper", []).verdict == "not reproduced"


def test_text_claims_are_pairs_too_and_close_numbers_of_the_paper_are_not():
    close = item({"a": (90.0, 0.3), "b": (90.1, 0.3)}, (Order("b", "c"),))
    assert outcome.expected(close, ["c"]) == [Order("b", "c", "c")]


def test_difference_is_in_standard_errors_of_both():
    found = outcome.measured(item(PAIR), {"c": frame(a=(0.8, 0.9), b=(0.8,))})
    sd = math.sqrt(2 * 5.0**2)  # of 80 and 90
    wanted = (85.0 - 90.0) / math.sqrt(sd**2 / 2 + 0.1**2 / 3)
    assert found["difference_se"].iloc[0] == pytest.approx(wanted)
    assert math.isnan(found["difference_se"].iloc[1])  # one seed
    laid = outcome.laid_out(item(PAIR), found)
    assert laid.loc[0, "c"] == f"85.00 ± 7.07 (paper 90 ± 0.1; {wanted:+.1f} s.e.)"


def test_an_arm_that_diverged_decides_nothing():
    rows = frame(a=(0.70, 0.71), b=(0.50, 0.51))
    rows.attrs = {"missing": {"b": "diverged: at step 3"}}
    table = outcome.measured(item(PAIR), {"c": rows})
    assert outcome.judged(item(PAIR), table, "paper", []).verdict == "undecided"


# Running and resuming ----------------------------------------------------------------------------

CELL = Cell("digits", inferred("digits", "tiny"), stated("mlp", "x"), {"hidden": stated((4,), "x")})
TINY = Item(
    "ngm",
    "table1",
    "tiny",
    Experiment(
        "ngm",
        "tiny",
        (CELL,),
        (
            Arm("sgd", "sgd", stated(0.1, "x"), preset="stable"),
            Arm("tengrad", "tengrad", stated(0.1, "x")),
        ),
        {"batch_size": stated(64, "x"), "epochs": stated(2, "x"), "repeats": stated(2, "x")},
        {"minutes": Size(examples=192, test_examples=50)},
    ),
    reported={"digits": {"sgd": Number(90.0), "tengrad": Number(95.0)}},
)


class Stop(papers.Listener):
    """Ctrl-C after so many steps."""

    def __init__(self, steps):
        self.steps = steps

    def watch(self, plan):
        stop = self

        class Steps(Watch):
            def stepped(self, loss):
                stop.steps -= 1
                if stop.steps == 0:
                    raise KeyboardInterrupt

        return Steps()


def rows_of(folder):
    return steady(pd.read_parquet(folder / "rows.parquet"))


TWO = replace(
    TINY,
    experiment=replace(
        TINY.experiment,
        key="two",
        cells=(CELL, replace(CELL, name="iris", data=inferred("iris", "tiny"))),
        settings={**TINY.experiment.settings, "epochs": stated(3, "x")},
    ),
)


class StopAfterOne(papers.Listener):
    """Ctrl-C when the first of the workers has ended with a folder."""

    def worked(self, plan, status, left):
        assert (status, left) == ("complete", 1)
        raise KeyboardInterrupt


def test_a_killed_item_goes_on_to_the_same_rows_and_files(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "items", lambda paper, key: [TWO])
    monkeypatch.setattr(catalogue, "ITEMS", (TWO,))
    call = lambda **more: fl.reproduce("ngm", "table1", out=tmp_path / "a", **more)  # noqa: E731
    with pytest.raises(KeyboardInterrupt):
        call(listener=Stop(8))
    with pytest.raises(KeyboardInterrupt):
        call(listener=StopAfterOne(), jobs=2)
    folder = tmp_path / "a" / "minutes" / "ngm"
    assert not list(folder.glob("table1.*"))  # the parent alone writes tables
    found = call()
    runs.trained(TWO.experiment, "minutes", tmp_path / "b", papers.Listener())
    for cell in "digits", "iris":
        (wanted,) = (tmp_path / "b").rglob(f"two/{cell}")
        assert_frame_equal(rows_of(folder / "two" / cell), rows_of(wanted), check_exact=True)
    plans = plan.planned(TWO.experiment, "minutes")
    assert all(workers.complete(p, folder / "two" / p.folder) for p in plans)
    assert found["verdict"].iloc[0] in ("reproduced", "undecided", "not reproduced")
    table = pd.read_parquet(folder / "table1.parquet")
    assert list(table["seeds"]) == [2] * 4 and list(table["paper"][:2]) == [90.0, 95.0]
    assert {p.suffix for p in folder.glob("table1.*")} == {
        *(".csv", ".parquet", ".md", ".json", ".png", ".pdf")
    }
    text = (folder / "table1.md").read_text(encoding="utf-8")
    assert "| tengrad | kl_clip | None | inferred | no clipping is described |" in text
    assert "## At equal time" in text
    page = (tmp_path / "a" / "report.html").read_text(encoding="utf-8")
    assert "ngm table1, scale minutes: tiny" in page
    row = json.loads((folder / "table1.json").read_text(encoding="utf-8"))
    assert row["verdict"] == found["verdict"].iloc[0]


def test_a_worker_says_why_it_does_not_train(tmp_path):
    (found,) = plan.planned(TINY.experiment, "minutes")
    other = replace(found.settings, batch_size=32)
    config = {"command": "train", "status": "running", "settings": other.to_json()}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert not workers.complete(found, tmp_path)
    job = {"settings": found.settings.to_json(), "folder": str(tmp_path)}
    assert "batch_size 32, not 64" in trained(job, Watch())["refused"]
    with pytest.raises(papers.ReproduceError, match="jobs must be a whole number >= 1, got 0"):
        fl.reproduce("ngm", "table1", out=tmp_path, jobs=0)


def test_controls_stand_beside_their_arms_and_change_nothing_else(tmp_path):
    experiment = replace(TINY.experiment, sizes={"minutes": Size(1, 128, 50)})
    without = runs.trained(experiment, "minutes", tmp_path, papers.Listener())
    rows = runs.trained(experiment, "minutes", tmp_path, papers.Listener(), control=True)
    (beside,) = [
        p for p in plan.planned(experiment, "minutes", control=True) if p.folder.endswith("control")
    ]
    assert beside.settings.entries[0].options["control"] is True
    assert [arm.label for arm in beside.arms] == ["tengrad_control"]  # SGD has no step lengths
    frame = rows["digits"]
    last = frame.groupby("optimizer")["train_loss"].last()
    assert last["tengrad_control"] != last["tengrad"]
    of = replace(TINY, quantity="log_train_loss")
    table = outcome.measured(of, rows)
    assert list(table["control_of"]) == ["", "", "tengrad"]
    alone = outcome.measured(of, without)
    assert_frame_equal(table[:2][list(alone)], alone)
    assert (
        outcome.judged(of, table, "paper", []).because
        == outcome.judged(of, alone, "paper", []).because
    )


def test_searches_give_a_control_the_grid_of_its_arm():
    found = plan.searches(EXPERIMENTS["tekfac", "methods"], "hours", ("cifar10-resnet20",), True)
    grids = {arm.label: [e.options["lr"] for e in p.settings.entries] for p, arm in found}
    assert grids["tekfac_control"] == grids["tekfac"] and "adam_control" not in grids


def test_at_equal_time_a_slow_arm_counts_as_far_as_it_came():
    rows = pd.DataFrame(
        {"optimizer": arm, "seed": seed, "epoch": epoch, "step": epoch}
        | {"accuracy": 0.1 + 0.2 * epoch + 0.01 * seed + 0.1 * (arm == "slow") * (epoch > 0)}
        | {"train_seconds": each * epoch if epoch else math.nan}
        for arm, each in (("fast", 1.0), ("slow", 2.0))
        for seed in (0, 1)
        for epoch in range(5)
    )
    of = item({"slow": (90.0, 0.1), "fast": (80.0, 0.1)})
    table = outcome.measured(of, {"c": rows})
    assert list(table["ours"]) == pytest.approx([90.5, 100.5])
    assert list(table["at_equal_time"]) == pytest.approx([90.5, 60.5])  # two of its epochs
    found = outcome.judged(of, table, "paper", [], clock=outcome.clock({"c": rows}))
    assert found.verdict == "reproduced" and "clock" not in found.because
    assert found.at_equal_time.startswith("not reproduced: of 1 pairs")
    assert found.at_equal_time.endswith("whatever else the machine did is in them")
    equal = outcome.laid_out(of, table, "at_equal_time")
    assert list(equal["c"]) == ["90.50 ± 0.71", "60.50 ± 0.71"]
    # between two epochs: after 3.0 of 2.0 seconds each
    halves = rows[(rows["optimizer"] == "slow") | (rows["epoch"] < 4)]
    table = outcome.measured(of, {"c": halves})
    assert list(table["at_equal_time"]) == pytest.approx([70.5, 50.5])
    # the processor's seconds come first, where every arm has them: there slow is the fast one
    rows["train_cpu_seconds"] = rows["epoch"] * rows["optimizer"].map({"slow": 1.0, "fast": 4.0})
    table = outcome.measured(of, {"c": rows})
    assert list(table["at_equal_time"]) == pytest.approx([30.5, 100.5])
    assert outcome.clock({"c": rows}) == "seconds of the processor, in one process"


def test_a_verdict_on_seconds_says_how_they_were_measured():
    run = {"seed": 0, "epoch": 1, "step": 10}
    rows = pd.DataFrame([
        run | {"optimizer": "a", "seconds_per_step": 1.0, "ratio_to_sgd": 1.0},
        run | {"optimizer": "b", "seconds_per_step": 3.0, "ratio_to_sgd": 3.0},
    ])  # fmt: skip
    of = replace(item(PAIR), quantity="seconds_per_epoch")
    table = outcome.measured(of, {"c": rows})
    found = outcome.judged(of, table, "paper", [], clock=outcome.clock({"c": rows}))
    assert list(table["ours"]) == [10.0, 30.0] and not found.at_equal_time
    assert "one clock measured the seconds" in found.because
    processor = {"train_cpu_seconds": 1.0, "cpu_seconds_per_step": 2.0, "cpu_ratio_to_sgd": 4.0}
    rows = rows.assign(**processor)
    assert list(outcome.measured(of, {"c": rows})["ours"]) == [20.0, 20.0]
    ratios = outcome.measured(replace(of, quantity="ratio_to_sgd"), {"c": rows})
    assert list(ratios["ours"]) == [4.0, 4.0]


def test_the_list_is_that_of_the_items():
    said = "python -m fisherlab.commands.reproduce"
    assert json.loads(LISTING.read_text("utf-8")) == reproducing.listing(papers.items()), said


def test_the_list_imports_no_torch():
    code = "import sys; from fisherlab.cli import app; app(standalone_mode=False)"
    code += "; sys.exit('torch' in sys.modules)"
    words = [sys.executable, "-c", code, "reproduce", "ngm", "--list"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "table1" in done.stdout and "fngd" not in done.stdout


def test_the_command_lists_and_refuses(tmp_path):
    call = lambda *a: CliRunner().invoke(app, ["reproduce", *a])  # noqa: E731
    listed = call("--list").output
    assert listed.count("not an experiment") == sum(i.illustration for i in papers.ITEMS) == 10
    assert "cannot be run here" in listed
    for wrong, near in (("ngn",), "ngm"), (("ngm", "table2"), "table1"):
        found = call(*wrong, "--out", str(tmp_path))
        assert found.exit_code == 2 and near in found.output
    assert call("ngm", "--scale", "hour").exit_code == 2
    said = call("ngm", "fig1", "--out", str(tmp_path / "x"))
    assert said.exit_code == 0 and "about" in said.output.splitlines()[0]


def test_the_split_of_a_step_times_each_part_with_padding_in_the_batch():
    model, criterion = nn.Sequential(nn.Linear(3, 4)), nn.CrossEntropyLoss(ignore_index=0)
    x, y = torch.randn(6, 3), torch.tensor([0, 1, 2, 3, 0, 1])
    for method in "sgd", "fngd":
        spent = drawn._split(method, model, x, y, criterion, steps=1)
        assert list(spent) == ["forward", "backward", "step"] and min(spent.values()) > 0


# Presets and schedules ---------------------------------------------------------------------------


def test_the_page_of_presets_has_every_difference():
    text = (ROOT / "docs" / "presets.md").read_text(encoding="utf-8")
    assert text == page_of_presets.page()
    assert set(NOT_YET) <= set(PAPER)


def test_the_papers_ngd_is_the_dense_step_without_clip_and_momentum():
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    criterion = nn.CrossEntropyLoss()
    optimizer = fl.optim.create("ngd", model, preset="paper", lr=0.3)
    for _ in range(5):
        x = torch.randn(6, 3, generator=generator, dtype=torch.float64)
        y = torch.randint(2, (6,), generator=generator)
        before = torch.cat([p.detach().flatten() for p in model.parameters()])
        columns = []
        for n in range(6):
            grads = torch.autograd.grad(
                criterion(model(x[n : n + 1]), y[n : n + 1]), [*model.parameters()]
            )
            columns.append(torch.cat([g.flatten() for g in grads]))
        U = torch.stack(columns, 1)
        F = U @ U.T / 6 + 0.1 * torch.eye(len(U), dtype=U.dtype)
        wanted = before - 0.3 * torch.linalg.solve(F, U.mean(1))
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
        after = torch.cat([p.detach().flatten() for p in model.parameters()])
        torch.testing.assert_close(after, wanted, rtol=1e-9, atol=1e-11)


def test_a_preset_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="unknown preset 'papers'; one of stable, paper"):
        fl.optim.create("kfac", nn.Linear(2, 2), preset="papers")
    default = fl.optim.create("sgd", nn.Linear(2, 2), preset="paper").defaults
    assert default == fl.optim.create("sgd", nn.Linear(2, 2)).defaults


def test_a_preset_and_a_placement_can_be_typed():
    assigned = ["kfac.preset=paper", "kfac.placement=eigenvalue"]
    (entry,) = entries("kfac", assigned)
    made = make(entry, nn.Sequential(nn.Linear(2, 2)), CRITERION, steps_per_epoch=1, epochs=1)
    assert made.approximation.placement == "eigenvalue" and made.clip.kl is None
    with pytest.raises(SettingsError, match="unknown placement 'x'"):
        entries("kfac", ["kfac.placement=x"])
    with pytest.raises(SettingsError, match="placement"):
        entries("ekfac", ["ekfac.placement=eigenvalue"])


def test_a_schedule_may_step_at_given_shares():
    rate = schedule_of("steps(0.4,0.8)")
    wanted = [1.0] * 40 + [0.1] * 40 + [0.01] * 20
    assert [rate(k / 100) for k in range(100)] == pytest.approx(wanted)
    for wrong in "steps", "steps()", "steps(0.4", "steps(2)", "steps(0.4,0.8)":
        options = {"entries": (Entry("sgd", "sgd"),), "schedule": wrong}
        if wrong == "steps(0.4,0.8)":
            Settings(**options)
            continue
        with pytest.raises(SettingsError, match="schedule"):
            Settings(**options)


def test_lengths_of_training_sets_are_of_their_cards():
    limited = Settings(entries=(Entry("sgd", "sgd"),), examples=100, validation=50)
    assert plan.examples_of(limited) == 100
    assert plan.examples_of(replace(limited, examples=None)) == 1_442 - 50
