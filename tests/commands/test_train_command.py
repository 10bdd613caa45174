"""`fisherlab train` as a user types it: exit codes, the table, files."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from fisherlab import cli, optim
from fisherlab.commands import common
from fisherlab.experiments.training import Settings

pytestmark = pytest.mark.usefixtures("no_pictures")

TINY = "--data digits --hidden 4 --examples 192 --batch-size 64 --test-examples 50".split()


def typed(*words):
    return CliRunner().invoke(cli.app, [word for text in words for word in text.split()])


def run(command, folder, *words):
    return typed(
        command, " ".join(w for w in TINY if command == "train"), *words, f"--out {folder}"
    )


def test_train_prints_a_table_and_leaves_pictures(tmp_path):
    words = ("--optimizer wild=sgd,kfac,fngd --control --epochs 2 --seeds 2", "--lr 0.05")
    rest = ("--set wild.lr=1e9 --compare-every 2 --compare-examples 16",)
    result = run("train", tmp_path, *words, *rest)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    for name in ("wild", "kfac", "fngd", "kfac_control", "fngd_control"):
        assert any(name in line.split() for line in lines)
    assert "±" in result.stdout and "×SGD" in result.stdout
    assert "wild (diverged): step 1, layer" in result.stdout
    assert "[10/10] fngd_control, seed 1: done" in result.stderr
    assert "with 64 of 192 training examples" in " ".join(result.stdout.split())
    assert "100.0% by " in result.stdout and "(empirical Fisher)" in result.stdout
    for name in ("curves", "cost", "comparisons"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "fngd_control" in (tmp_path / "report.html").read_text()
    assert _config(tmp_path)["status"] == "complete"
    options = {e["label"]: e["options"] for e in _config(tmp_path)["settings"]["entries"]}
    assert options["kfac"]["lr"] == 0.05 and options["wild"]["lr"] == "1e9"
    # again: what is there is shown, nothing is trained
    before = pd.read_parquet(tmp_path / "rows.parquet")
    again = run("train", tmp_path, *words, *rest)
    assert again.exit_code == 0 and again.stdout == result.stdout
    assert pd.read_parquet(tmp_path / "rows.parquet").equals(before)


def test_train_prints_the_share_of_shortened_steps(tmp_path):
    words = "--optimizer tight=kfac,free=kfac,sgd --set tight.kl_clip=1e-9 --set free.kl_clip=none"
    result = run("train", tmp_path, words, "--epochs 1")
    rows = {line.split()[0]: line for line in result.stdout.splitlines() if "%" in line}
    assert "100 %" in rows["tight"] and " 0 %" in rows["free"]
    said = [line for line in result.stdout.splitlines() if "kl_clip" in line]
    assert said == [
        "tight: the learning rate had no effect: kl_clip shortened 100 % of the steps, and one "
        "that kl_clip shortens is as long at any larger lr, whatever --schedule says; "
        "--set tight.kl_clip=none frees it"
    ]
    assert result.stdout.startswith(said[0])


def test_a_bound_of_the_norm_is_no_word_against_the_learning_rate(tmp_path):
    result = run(
        "train",
        tmp_path,
        "--optimizer kfac --set kfac.kl_clip=none --epochs 1",
        "--set kfac.max_norm=1e-9",
    )
    assert result.stdout.startswith("kfac: max_norm shortened 100 % of the steps\n")


def test_a_table_without_ratios_says_why_and_has_no_panel_of_them(tmp_path):
    result = run("train", tmp_path, "--optimizer sgd,exact --epochs 1")
    assert result.exit_code == 0, result.output
    assert "×SGD is empty where fewer than 8 steps were timed" in result.stdout


@pytest.mark.parametrize(
    ("model", "data", "fits"),
    [("lstm", "digits", "ptb"), ("transformer", "iris", "multi30k")],
)
def test_support_of_a_model_on_data_that_does_not_fit_is_2(model, data, fits):
    result = typed(f"support --model {model} --data {data}")
    assert result.exit_code == 2
    assert f"model '{model}' does not take '{data}'" in result.stderr
    assert result.stderr.endswith(f"it takes --data {fits}\n")


def _config(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--optimizer kfca", "did you mean 'kfac'"),
        ("--data digit", "did you mean 'digits'"),
        ("--model mpl", "did you mean 'mlp'"),
        ("--set kfac.lr", "OPTIMIZER.OPTION=VALUE"),
        ("--set kfac.lrr=1", "did you mean 'lr'"),
        ("--lr -1", "lr"),
        ("--optimizer sgd --lr nan", "sgd (lr=nan): lr must be a finite number"),
        ("--optimizer sgd --set sgd.lr=fast", "lr must be a finite number >= 0, got 'fast'"),
        ("--epochs 0", "epochs is at least 1"),
        ("--seeds 0", "--seeds"),
        ("--hidden a,b", "--hidden"),
        ("--hidden=-3", "hidden must hold positive widths"),
        ("--hidden 16777216,16777216", "out of memory"),
        ("--seed 1099511627776", "a seed is a whole number below 2^40"),
        ("--device nowhere", "nowhere"),
        ("--optimizer sgd --control", "--control"),
    ],
)
def test_mistakes_exit_with_2_and_leave_nothing(words, message, tmp_path):
    result = run("train", tmp_path / "run", words)
    assert result.exit_code == 2
    assert message in result.stderr and "Traceback" not in result.output
    assert not (tmp_path / "run").exists()


def test_a_file_is_no_run_folder(tmp_path):
    (tmp_path / "run").write_text("mine")
    result = run("train", tmp_path / "run", "--optimizer sgd")
    assert result.exit_code == 2 and (tmp_path / "run").read_text() == "mine"


@pytest.mark.parametrize(
    "words",
    ["reproduce ang fig2", "sweep --data iris --optimizer sgd --grid sgd.lr=0.1,1 --validation 9"],
)
def test_no_other_command_takes_the_config_of_a_run(words, tmp_path):
    config = json.dumps({"command": "train", "settings": Settings(data="iris").to_json()})
    (tmp_path / "config.json").write_text(config)
    ended = CliRunner().invoke(cli.app, [*words.split(), "--out", str(tmp_path)])
    assert ended.exit_code == 2
    assert "holds a run of `fisherlab train`; give another folder" in ended.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert (tmp_path / "config.json").read_text() == config


def test_another_run_in_the_folder_is_named(tmp_path):
    config = {"command": "compare", "settings": {"data": "digits"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    said = run("train", tmp_path, "--optimizer sgd").stderr
    assert "holds a run of `fisherlab compare`; give another folder" in said
    config = {"command": "train", "settings": Settings(data="iris").to_json()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    said = run("train", tmp_path, "--data iris --optimizer kfac,adam --lr 0.1").stderr
    assert "optimizers sgd, not kfac (lr=0.1)+adam (lr=0.1)" in said


def test_the_log_of_a_failure_is_gone_once_it_succeeded(tmp_path, monkeypatch):
    def broken(self, closure=None):
        raise RuntimeError("oops")

    with monkeypatch.context() as patch:
        patch.setattr(optim.FNGD, "step", broken)
        assert run("train", tmp_path, "--optimizer fngd,sgd --epochs 1").exit_code == 70
    assert "oops" in (tmp_path / "failures.log").read_text()
    assert run("train", tmp_path, "--optimizer fngd,sgd --epochs 1").exit_code == 0
    assert not (tmp_path / "failures.log").exists()


def test_nothing_succeeded_is_1(tmp_path):
    result = run("train", tmp_path, "--optimizer sgd --lr 1e9 --epochs 1")
    assert result.exit_code == 1 and "diverged" in result.stdout


def test_ctrl_c_is_130_and_keeps_the_results(tmp_path):
    command = [sys.executable, "-c", "from fisherlab.cli import main; main()", "train", *TINY]
    command += ["--optimizer", "sgd,kfac", "--epochs", "100000", "--out", str(tmp_path)]
    process = subprocess.Popen(
        command,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    checkpoint = tmp_path / "checkpoints" / "sgd-seed0.pt"
    for _ in range(1200):
        if checkpoint.exists():
            break
        try:
            process.wait(0.1)
        except subprocess.TimeoutExpired:
            continue
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "interrupted" in err and "Traceback" not in err and "interrupted" in out
    rows = pd.read_parquet(tmp_path / "rows.parquet")
    assert set(rows["optimizer"]) == {"sgd"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_that_a_destructor_dropped_comes_again(number, capfd):
    """A `report` that SIGTERM met there printed a traceback, and went on to its end."""

    class Ends:
        def __del__(self):
            signal.raise_signal(number)

    before = signal.signal(number, signal.default_int_handler)
    hook = sys.unraisablehook
    with pytest.raises(KeyboardInterrupt), common.CtrlC():
        Ends()
        time.sleep(60)  # the signal ends it
    assert common.CtrlC.code == 128 + number and sys.unraisablehook is hook
    assert capfd.readouterr().err == ""
    signal.signal(number, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_that_somebody_swallowed_is_raised_at_the_next_step(number):
    # a shell starts what runs in its background with interrupts ignored
    before = signal.signal(number, signal.default_int_handler)
    with common.CtrlC() as interrupt:
        interrupt.check()
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(number)
        with pytest.raises(KeyboardInterrupt):
            interrupt.check()
        interrupt.check()
    assert signal.getsignal(number) is signal.default_int_handler
    signal.signal(number, before)
