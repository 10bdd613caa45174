"""`fisherlab sweep`: the choice, its notes, and points that several processes share."""

import json
import math
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace

import pandas as pd
import pytest
from typer.testing import CliRunner

from fisherlab import cli
from fisherlab.experiments import pages, study, sweep, training
from fisherlab.experiments.rundir import RunDir
from fisherlab.experiments.space import Point, Range
from fisherlab.experiments.training import Settings, SettingsError

pytestmark = pytest.mark.usefixtures("no_pictures")

SHORT = "--hidden 4 --examples 192 --validation 50 --epochs 1 --final-epochs 1 --seeds 1"


def typed(*words):
    words = [word for text in words for word in text.split()]
    return CliRunner().invoke(cli.app, ["sweep", "--data", "digits", "--batch-size", "64", *words])


@pytest.fixture
def loop(monkeypatch):
    """A machine without Optuna: a loop over the grid."""
    monkeypatch.setattr(study, "installed", lambda: False)


def point(label, options, losses=(), **more):
    return Point(label, label.partition("-")[0], options, "done", losses=losses, **more)


def search(tried, grid=None, **more):
    return sweep.Search(Settings(), grid or {}, "accuracy", tried, **more)


# The choice --------------------------------------------------------------------------------------


def test_a_grid_is_every_combination():
    grid = sweep.grid(["kfac.lr=0.1,0.2,0.3", "kfac.damping=relative(1),gram_norm(2)"], "kfac,sgd")
    points = sweep.points("kfac,sgd", grid)
    assert [p.label for p in points] == [*(f"kfac-{k}" for k in range(1, 7)), "sgd-1"]
    assert points[1].options == {"lr": "0.1", "damping": "gram_norm(2)"}


def test_a_sweep_chooses_on_held_out_examples_and_tests_the_best(tmp_path, loop):
    result = typed(
        "--hidden 8 --examples 640 --validation 200 --epochs 2 --final-epochs 2 --seeds 2",
        "--optimizer sgd,adam --grid sgd.lr=1e-6,0.1,1e9 --grid adam.lr=1e-3,1e-2",
        f"--out {tmp_path}",
    )
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "sweep.json").read_text())
    table = {row["optimizer"]: row for row in found["table"]}
    assert table["sgd"]["options"] == "lr=0.1" and table["sgd"]["points"] == 3
    assert table["sgd"]["at_the_edge"] == "" and table["sgd"]["seeds"] == 2
    tried = {row["label"]: row for row in found["tried"]}
    assert list(tried) == ["sgd-1", "sgd-2", "sgd-3", "adam-1", "adam-2"]
    assert tried["sgd-3"]["status"] == "diverged" and tried["sgd-3"]["value"] is None
    rows = pd.read_parquet(tmp_path / "search" / "sgd-2" / "rows.parquet")
    best = max(tried[f"sgd-{k}"]["value"] for k in (1, 2))
    assert table["sgd"]["validation"] == rows["accuracy"].iloc[-1] == best
    page = (tmp_path / "sweep.md").read_text()
    assert f"| sgd | 3 | lr=0.1 |  | {table['sgd']['validation']} |" in page
    assert f"{table['sgd']['final']:.4f} ± {table['sgd']['final_sd']:.4f} (2 seeds)" in page
    final = Settings.load(tmp_path / "final")
    assert final.validation is None and final.seeds == (0, 1) and final.examples is None
    assert {str(entry) for entry in final.entries} == {
        "sgd (lr=0.1)",
        f"adam ({table['adam']['options']})",
    }
    report = (tmp_path / "report.html").read_text()
    assert "ends best, with accuracy" in report and "sgd-3" in report
    found["table"][0]["options"] = ""  # as where no grid names the optimizer
    (tmp_path / "sweep.json").write_text(json.dumps(found))
    said = next(iter(pages.of_sweep(RunDir(tmp_path)))).text
    assert f"{found['table'][0]['optimizer']}: defaults" in " ".join(said)


def test_a_choice_that_diverges_at_full_length_has_no_result(tmp_path, monkeypatch, loop):
    wild = (training.Entry("sgd", "sgd", {"lr": "1e9"}),)

    def diverging(settings, folder, *, watch):
        settings = replace(settings, entries=wild) if folder.name == "final" else settings
        return training.train(settings, folder, watch=watch)

    monkeypatch.setattr(sweep, "train", diverging)
    result = typed(SHORT, f"--optimizer sgd --grid sgd.lr=0.1 --out {tmp_path}")
    assert result.exit_code == 1 and "no point came to its end" in result.output
    (row,) = json.loads((tmp_path / "sweep.json").read_text())["table"]
    assert row["seeds"] == 0 and math.isnan(row["final"]) and row["validation"] is not None
    assert (tmp_path / "sweep.md").read_text().rstrip().endswith("| - |")
    assert "No optimizer came to its end" in (tmp_path / "report.html").read_text()


def test_no_other_command_takes_the_folder_of_a_running_search(tmp_path, monkeypatch, loop):
    options = {"hidden": (4,), "examples": 64, "validation": 50, "epochs": 1}
    other = Settings(**{**options, "validation": None})
    tried = []

    def train(settings, folder, *, watch):
        if not tried:
            with pytest.raises(SettingsError, match="holds a run of `fisherlab sweep`"):
                training.train(other, tmp_path)
        tried.append(folder.name)
        return training.train(settings, folder, watch=watch)

    monkeypatch.setattr(sweep, "train", train)
    found = sweep.grid(["sgd.lr=0.1"], "sgd")
    sweep.sweep(Settings(**options), "sgd", found, tmp_path, final={"seeds": (0,)})
    assert tried == ["sgd-1", "final"] and RunDir(tmp_path).config["status"] == "complete"


def test_a_choice_at_the_end_of_its_grid_is_said():
    grid = {"sgd": {"lr": ["0.1", "0.2", "0.3"], "momentum": ["0", "0.9"]}}
    entry = training.Entry("sgd", "sgd", {"lr": "0.3", "momentum": "0.9"})
    assert search([], grid).edges(entry) == ["lr"]
    grid["sgd"] = {"lr": Range(1e-3, 1.0), "momentum": Range(0.0, 0.9)}
    for lr, momentum, at in (("0.9", "0.5", ["lr"]), ("0.5", "0.001", ["momentum"])):
        entry = training.Entry("sgd", "sgd", {"lr": lr, "momentum": momentum})
        assert search([], grid).edges(entry) == at


def test_points_that_were_one_run_are_said_with_the_reason(tmp_path, loop):
    result = typed(
        SHORT,
        "--final-examples 128 --grid kfac.lr=0.03,0.1 --grid sgd.lr=0.01,0.1",
        f"--grid sgd.nesterov=false --grid kfac.kl_clip=1e-9 --out {tmp_path}",
    )
    assert result.exit_code == 0, result.output
    note = (
        "kfac: lr=0.03 and lr=0.1 gave the same run: kl_clip shortened every step; "
        "pass kl_clip=none or search it"
    )
    assert note in result.stdout and "sgd: lr" not in result.stdout
    page = (tmp_path / "sweep.md").read_text()
    assert note in page and "(1 seed) |" in page and "nan" not in page
    assert json.loads((tmp_path / "sweep.json").read_text())["notes"] == [note]


def test_a_point_that_lost_a_seed_is_no_other_points_run():
    one, two = [[1.0, 2.0]] * 2, [[1.0, 2.0 + 1e-5]] * 2
    tried = [point("a-1", {"lr": "1"}, one), point("a-2", {"lr": "2"}, two)]
    assert "the losses of every epoch agree" in search(tried).notes[0]
    assert not search([tried[0], point("a-2", {"lr": "2"}, two[:1])]).notes
    assert not search([tried[0], point("b-1", {"lr": "2"}, two)]).notes


def test_a_point_far_above_its_first_loss_ends_there(tmp_path, loop):
    options = {"hidden": (8,), "examples": 256, "validation": 100, "batch_size": 64, "epochs": 5}
    final = {"epochs": 1, "seeds": (0,)}
    found = sweep.grid(["sgd.lr=0.1,10"], "sgd")
    got = sweep.sweep(Settings(**options), "sgd", found, tmp_path, final=final)
    good, bad = got.tried
    assert bad.status == "diverged" and bad.value is None and "before the first step" in bad.note
    rows = pd.read_parquet(tmp_path / "search" / "sgd-2" / "rows.parquet")
    first, last = rows.iloc[0], rows.iloc[-1]
    assert 0 < last["epoch"] < 5 and last["train_loss"] < 1e4 * first["test_loss"]
    assert min(last["train_loss"], last["test_loss"]) > 2 * first["test_loss"]
    assert good.status == "done" and len(good.losses) == 5


WRONG = {
    "--grid kfac=1": "--grid takes",
    "--grid adam.lr=1": "--grid takes",
    "--grid kfac.lrr=1": "lr",
    "--grid kfac.lr=1..0.1": "the lower end first",
    "--grid kfac.lr=0.1..1": "--sampler tpe",
    "--grid kfac.lr=1 --trials 3": "--trials goes with --sampler tpe",
    "--grid kfac.lr=1 --sampler tpe": "--trials goes with --sampler tpe",
    "--grid kfac.lr=1 --sampler tpa": "did you mean 'tpe'",
    "--grid kfac.lr=1..2 --sampler tpe --trials 2": "pip install 'fisherlab[sweep]'",
    "--grid kfac.lr=1 --final-examples 0": "of the chosen points: examples is at least 1",
    "--grid kfac.lr=1,2 --storage sqlite:///x.db": "pip install 'fisherlab[sweep]'",
}


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_search_is_2(words, tmp_path, loop):
    result = typed(f"--optimizer kfac {words} --out {tmp_path / 'run'}")
    assert result.exit_code == 2 and WRONG[words] in result.output
    assert not (tmp_path / "run").exists()


# Points by Optuna --------------------------------------------------------------------------------

needs_optuna = pytest.mark.skipif(not study.installed(), reason="Optuna is not installed")
LR = {"lr": ["0.1", "0.2", "0.3"], "momentum": ["0", "0.9"]}
RANGES = {"lr": Range(1e-3, 1.0), "batch": Range(1, 8), "kind": ["a", "b"]}


def test_a_search_says_network_and_data_as_train_does(monkeypatch):
    asked = []

    def search(settings, *rest, **more):
        asked.append(settings)
        raise SettingsError("enough")

    monkeypatch.setattr("fisherlab.commands.sweep.search", search)
    words = "--data ptb --model lstm --depth 2 --batch-norm --dtype float64 --no-carry".split()
    for said, carries in ((words, False), (words[:-1], True)):
        CliRunner().invoke(cli.app, ["sweep", "--grid", "kfac.lr=0.1", *said])
        settings = asked.pop()
        assert (settings.carry, settings.layers, settings.batch_norm) == (carries, 2, True)
        assert settings.dtype == "float64" and not settings.augment


def opened(folder, space=LR, trials=None, higher_is_better=True):
    url = study.url_of(folder, None)
    return study.Study(url, "sgd", space, {}, higher_is_better=higher_is_better, trials=trials)


@pytest.fixture
def trained(monkeypatch):
    """A function that trains a point in no time, and the options that it was called with."""
    # the options of these spaces are nobody's
    make = lambda label, name, options: (training.Entry(label, name, options),)  # noqa: E731
    monkeypatch.setattr(study, "entry_of", make)
    calls = []

    def train(entry, report):
        calls.append(dict(entry.options))
        report(0.5, 1)
        value = -((float(entry.options["lr"]) - 0.2) ** 2)
        return Point(entry.label, "sgd", entry.options, "done", value=value, losses=[[1.0, 1.0]])

    return train, calls


@needs_optuna
def test_a_study_of_a_grid_has_every_combination_once_and_tells_what_matters(tmp_path, trained):
    train, calls = trained
    space = {"lr": ["0.1", "0.2", "0.3", "0.4"], "momentum": ["0", "0.5", "0.9"]}
    mine = opened(tmp_path, space)
    mine.run(train)
    labels = [f"sgd-{k}" for k in range(1, 13)]
    assert [point.label for point in mine.points] == labels
    wanted = [(a, b) for a in space["lr"] for b in space["momentum"]]
    assert [tuple(point.options.values()) for point in mine.points] == wanted
    assert len(calls) == 12 and mine.elsewhere == 0
    shares = mine.importance()  # the metric is a function of lr alone
    assert shares["lr"] > 0.95 and abs(sum(shares.values()) - 1) < 1e-9
    again = opened(tmp_path, space)
    again.run(train)
    assert len(calls) == 12 and again.points == mine.points
    alone = opened(tmp_path, {"lr": ["0.1"]}, trials=5)  # one point is all there is
    alone.run(train)
    assert len(calls) == 13 and len(alone.points) == 1 and not alone.elsewhere
    other = opened(tmp_path)  # another grid in the same file is another study
    assert not other.points and other.importance() == {}


@needs_optuna
def test_a_stopped_search_by_tpe_goes_on_as_it_would_have(tmp_path, trained):
    train, calls = trained
    whole = opened(tmp_path / "whole", RANGES, trials=12)
    whole.run(train)
    expected, calls[:] = list(calls), []

    def stopped(entry, report):
        if len(calls) == 10:
            raise KeyboardInterrupt
        return train(entry, report)

    with pytest.raises(KeyboardInterrupt):
        opened(tmp_path / "parts", RANGES, trials=12).run(stopped)
    parts = opened(tmp_path / "parts", RANGES, trials=12)
    assert parts.elsewhere == 1  # the one that was stopped waits
    parts.run(train)
    assert calls == expected
    assert len({point.label for point in parts.points}) == 12
    for options in calls:
        assert 1e-3 <= float(options["lr"]) <= 1 and 1 <= int(options["batch"]) <= 8


@needs_optuna
@pytest.mark.filterwarnings("ignore:Heartbeat of storage")
@pytest.mark.parametrize("space, trials", [(LR, None), (RANGES, 6)])
def test_points_of_a_killed_worker_are_taken_over_and_those_of_another_machine_left(
    tmp_path, trained, space, trials
):
    train, calls = trained
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    mine = opened(tmp_path, space, trials)
    for worker in ([socket.gethostname(), gone.pid], ["another", 1]):
        trial = mine.study.ask()
        trial.set_user_attr("worker", worker)
        trial.set_user_attr("number", trial.number)
        for option, values in space.items():
            if isinstance(values, list):
                trial.suggest_categorical(option, values)
    mine.run(train)
    assert len(calls) == 5 and mine.elsewhere == 1
    assert len({tuple(options.values()) for options in calls}) == 5
    assert len({point.label for point in mine.points}) == 5
    if trials:  # the point of the killed one keeps its label, and so its checkpoint
        assert mine.points[0].label == "sgd-1"


@needs_optuna
@pytest.mark.filterwarnings("ignore:Heartbeat of storage")
@pytest.mark.parametrize("killed", ["gone", "reused", "unnamed"])
def test_the_last_point_of_a_killed_worker_is_taken_over(tmp_path, trained, killed, monkeypatch):
    """Its number is nobody's, or that of this process, or it was killed before it wrote one."""
    monkeypatch.setattr(study, "NAMED", 0.01)
    train, calls = trained
    whole = opened(tmp_path / "whole")
    whole.run(train)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    mine = opened(tmp_path)

    def stopped(entry, report):
        if len(calls) == 2 * len(mine.grid) - 1:
            raise KeyboardInterrupt
        return train(entry, report)

    with pytest.raises(KeyboardInterrupt):
        mine.run(stopped)
    trial = mine.study.ask()  # the last one, which waits
    if killed != "unnamed":
        process = os.getpid() if killed == "reused" else gone.pid
        trial.set_user_attr("worker", [socket.gethostname(), process])
    mine.run(train)
    assert mine.points == whole.points and not mine.elsewhere


@needs_optuna
@pytest.mark.parametrize("when", ["before", "after", "interrupted", "told"])
def test_a_point_that_was_taken_over_from_a_silent_worker_ends_nothing(
    tmp_path, trained, when, monkeypatch
):
    """Optuna said "Cannot tell a FAIL trial" to the worker that was silent."""
    from optuna.trial import Trial, TrialState

    train, calls = trained
    mine, other, silences = opened(tmp_path), opened(tmp_path), [when]

    def silent(now):
        """Another worker takes the point that is running over, once."""
        if now in silences:
            silences.remove(now)
            (trial,) = other._of(TrialState.RUNNING)
            study.again(other.study, trial)
            other._fail(trial)
            return True
        return False

    def slow(entry, report):
        silent("before")
        point = train(entry, report)
        silent("after")
        if silent("interrupted"):
            raise KeyboardInterrupt
        return point

    def noted(trial, key, value):
        noting(trial, key, value)
        if key == "point":
            silent("told")

    noting = Trial.set_user_attr
    monkeypatch.setattr(Trial, "set_user_attr", noted)
    if when == "interrupted":
        with pytest.raises(KeyboardInterrupt):
            mine.run(slow)
    mine.run(slow)
    assert len(calls) == len(mine.grid) + 1 and len(mine.points) == len(mine.grid)
    assert not (silences or mine.elsewhere)


WORKER = """
import os, sys, time
from pathlib import Path
from fisherlab.experiments import study
from fisherlab.experiments.space import Point

def slow(entry, report):
    time.sleep(0.3)
    note = str(os.getpid())
    return Point(entry.label, "sgd", entry.options, "done", note, 1.0, [[1.0, 1.0]])

def opened(folder):
    space = {"lr": [f"0.{k}" for k in range(1, 10)]}
    url = study.url_of(Path(folder), None)
    return study.Study(url, "sgd", space, {}, higher_is_better=True, trials=None)
"""


@needs_optuna
def test_two_processes_share_one_file(tmp_path):
    exec(WORKER, here := {})
    code = WORKER + "\nopened(sys.argv[1]).run(slow)"
    words = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(words) as other:
        mine = here["opened"](tmp_path)
        until = time.monotonic() + 120
        while not mine.elsewhere and time.monotonic() < until:
            time.sleep(0.05)
        mine.run(here["slow"])
        assert other.wait(60) == 0
    workers = Counter(point.note for point in mine.points)
    assert set(workers) == {str(other.pid), str(os.getpid())}
    assert sum(workers.values()) == 9 and mine.elsewhere == 0
    ended = [trial for trial in mine.study.trials if "point" in trial.user_attrs]
    assert len(ended) == 9  # no point was trained twice


@needs_optuna
def test_a_search_by_tpe_leaves_a_page_and_its_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "FEWEST", 3)
    words = (
        SHORT,
        "--optimizer sgd --sampler tpe --trials 3 --grid sgd.lr=1e-3..1",
        f"--grid sgd.momentum=0..0.95 --out {tmp_path}",
    )
    result = typed(*words)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "sweep.json").read_text())
    assert len(found["tried"]) == 3 and set(found["importance"]["sgd"]) == {"lr", "momentum"}
    assert found["grid"] == {"sgd": {"lr": "0.001..1", "momentum": "0..0.95"}}
    assert found["table"][0]["validation"] == max(row["value"] for row in found["tried"])
    report = (tmp_path / "report.html").read_text()
    assert "Option by option" in report and "sgd-3" in report
    for name in ("slices", "importance"):
        assert (tmp_path / "figures" / f"{name}.png").is_file()
    # again: what is there is shown, nothing is trained
    checkpoints = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.pt")}
    again = typed(*words)
    assert again.exit_code == 0 and again.stdout == result.stdout
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.pt")} == checkpoints


@needs_optuna
def test_workers_that_make_the_tables_at_once_both_have_them(tmp_path, monkeypatch):
    import optuna
    from sqlalchemy.exc import IntegrityError

    real, failures = optuna.storages.RDBStorage.__init__, [2]

    def begin(self, *args, **kwargs):
        if failures[0]:
            failures[0] -= 1
            raise IntegrityError("INSERT", {}, Exception("UNIQUE constraint failed"))
        real(self, *args, **kwargs)

    monkeypatch.setattr(optuna.storages.RDBStorage, "__init__", begin)
    monkeypatch.setattr(study.time, "sleep", lambda seconds: None)
    assert opened(tmp_path).elsewhere == 0
    failures[0] = 9
    with pytest.raises(SettingsError, match="UNIQUE constraint failed; try again, or give another"):
        opened(tmp_path)


@needs_optuna
def test_a_file_that_is_no_database_is_refused_and_no_password_is_written(tmp_path):
    (tmp_path / study.FILE).write_bytes(b"not a database" * 100)
    with pytest.raises(SettingsError, match=r"study\.db is no database for a search"):
        opened(tmp_path)
    words = f"--optimizer sgd --grid sgd.lr=0.1,0.2 {SHORT} --out {tmp_path / 'run'}"
    url = "postgresql+nothing://me:secret@machine/studies"
    result = typed(words, f"--storage {url}")
    assert result.exit_code == 2 and "postgresql+nothing://me:***@machine" in result.output
    assert study.shown("mysql://me:a:b@c@machine/x") == "mysql://me:***@machine/x"
    result = typed(words, f"--storage sqlite:///{tmp_path}/shared.db")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "shared.db").is_file() and not (tmp_path / "run" / study.FILE).exists()
    assert not [p for p in tmp_path.rglob("*.json") if "secret" in p.read_text()]
