"""Options in a file, and a run again from its folder."""

import json
from shutil import copytree

import pandas as pd
import pytest
from pandas.testing import assert_frame_equal
from typer.testing import CliRunner

from fisherlab.cli import app
from fisherlab.experiments.columns import steady
from fisherlab.experiments.training import Settings, entries, train

pytestmark = pytest.mark.usefixtures("no_pictures")

TINY = "--hidden 4,4 --examples 192 --test-examples 50 --batch-size 64 --epochs 2"
TOML = """
data = "digits"
optimizer = ["sgd", "slow=sgd"]
hidden = [4, 4]
examples = 192
test-examples = 50
batch_size = 64
epochs = 1

[set.slow]
lr = 0.001
[set.sgd]
nesterov = true
"""


def call(*words):
    return CliRunner().invoke(app, [part for word in words for part in str(word).split()])


def rows(folder, name="rows"):
    return steady(pd.read_parquet(folder / f"{name}.parquet"))


def test_a_run_of_train_again_has_the_same_rows(tmp_path):
    first = tmp_path / "a"
    done = call("train --optimizer sgd,kfac --set kfac.lr=0.02", TINY, "--out", first)
    assert done.exit_code == 0, done.output
    again = call("rerun", first, "--out", tmp_path / "b")
    assert again.exit_code == 0, again.output
    assert_frame_equal(rows(first), rows(tmp_path / "b"), check_exact=True)
    third = call("rerun", tmp_path / "b")  # the folder of a rerun can be rerun, next to it
    assert third.exit_code == 0, third.output
    assert_frame_equal(rows(first), rows(tmp_path / "b-rerun"), check_exact=True)


def test_a_run_of_a_program_too(tmp_path):
    options = {"hidden": (4,), "examples": 64, "test_examples": 20, "batch_size": 32, "epochs": 1}
    train(Settings(entries=entries("sgd"), **options), tmp_path / "a")
    assert call("rerun", tmp_path / "a").exit_code == 0
    assert_frame_equal(rows(tmp_path / "a"), rows(tmp_path / "a-rerun"), check_exact=True)


def test_a_comparison_again(tmp_path):
    words = "--approximations kfac,tkfac --model mlp --hidden 4 --batch-size 32 --epochs 0"
    done = call("compare --data digits", words, "--out", tmp_path / "a")
    assert done.exit_code == 0, done.output
    assert call("rerun", tmp_path / "a").exit_code == 0
    one, two = (rows(tmp_path / name, "comparison") for name in ("a", "a-rerun"))
    seconds = [name for name in one if "seconds" in name]
    assert_frame_equal(one.drop(columns=seconds), two.drop(columns=seconds), check_exact=True)


def test_a_rerun_asks_before_it_replaces_what_is_there(tmp_path):
    words = "--approximations kfac --model mlp --hidden 4 --batch-size 32 --epochs 0"
    # typed with --overwrite, which was of its own folder
    done = call("compare --data digits --overwrite", words, "--out", tmp_path / "a")
    assert done.exit_code == 0, done.output
    copytree(tmp_path / "a", tmp_path / "a-rerun")
    before = (tmp_path / "a-rerun" / "comparison.csv").stat().st_mtime_ns
    refused = call("rerun", tmp_path / "a")
    assert refused.exit_code == 2 and "pass --overwrite" in refused.output
    assert (tmp_path / "a-rerun" / "comparison.csv").stat().st_mtime_ns == before
    assert call("rerun", tmp_path / "a", "--overwrite").exit_code == 0
    assert (tmp_path / "a-rerun" / "comparison.csv").stat().st_mtime_ns > before


def test_a_run_that_goes_on_with_its_folder_is_not_said_to_be_replaced(tmp_path):
    options = {"hidden": (4,), "examples": 64, "test_examples": 20, "batch_size": 32, "epochs": 1}
    train(Settings(entries=entries("sgd"), **options), tmp_path / "hand")
    words = "train --data digits --optimizer sgd --hidden 4 --examples 64 --epochs 1 --out"
    assert call(words, tmp_path / "typed").exit_code == 0
    for name in ("hand", "typed"):
        refused = call("rerun", tmp_path / name, "--overwrite")
        assert refused.exit_code == 2 and "name another --out" in refused.output
        assert not (tmp_path / f"{name}-rerun").exists()


def test_a_bench_that_was_resumed_can_be_rerun(tmp_path, monkeypatch):
    from fisherlab.experiments.bench import record, sizes

    monkeypatch.setitem(record.PARTS, "compare", lambda setting: iter(()))
    monkeypatch.setattr(sizes, "check", lambda: None)
    words = "bench compare --quick --no-peers --repeats 1 --out"
    for more in ("", "--resume"):
        assert call(words, tmp_path / "a", more).exit_code == 0
    assert call("rerun", tmp_path / "a").exit_code == 0


def test_what_cannot_be_rerun_says_so(tmp_path):
    (tmp_path / "config.json").write_text('{"command": "compare", "settings": {}}')
    refused = call("rerun", tmp_path)
    assert refused.exit_code == 2 and "not written by the command line" in refused.output
    nothing = call("rerun", tmp_path / "none")
    assert nothing.exit_code == 2 and "is not a folder" in nothing.output


def test_options_of_a_file_are_those_typed(tmp_path):
    (tmp_path / "a.toml").write_text(TOML)
    done = call("train --config", tmp_path / "a.toml", "--epochs 2 --out", tmp_path / "a")
    assert done.exit_code == 0, done.output
    found = Settings.load(tmp_path / "a")
    assert (found.hidden, found.examples, found.test_examples) == ((4, 4), 192, 50)
    assert found.epochs == 2  # typed, so it wins
    options = {entry.label: entry.options for entry in found.entries}
    assert options == {"sgd": {"nesterov": "True"}, "slow": {"lr": "0.001"}}
    told = call("train --config", tmp_path / "a" / "config.json", "--out", tmp_path / "b")
    assert told.exit_code == 0, told.output
    assert Settings.load(tmp_path / "b") == found


WRONG = [
    ("a.toml", "epoch = 2", "unknown option 'epoch'; did you mean 'epochs'"),
    ("a.toml", "config = 'b'", "unknown option 'config'"),
    ("a.toml", "epochs = ", "Invalid value"),
    ("a.toml", "epochs = 'two'", "unable to parse string as an integer"),
    ("a.toml", "epochs = 2.5", "unable to parse string as an integer"),
    ("a.toml", "control = 1", "control must be True or False, got 1 (int)"),
    ("a.json", "{}", "no config.json of a run"),
    ("a.json", json.dumps({"typed": {"command": "compare", "options": {}}}), "fisherlab compare"),
]


@pytest.mark.parametrize(("name", "text", "said"), WRONG)
def test_a_wrong_file_is_refused(name, text, said, tmp_path):
    (tmp_path / name).write_text(text)
    refused = call("train --config", tmp_path / name, "--out", tmp_path / "x")
    assert refused.exit_code == 2 and not (tmp_path / "x").exists()
    assert said in " ".join(refused.output.replace("│", " ").split())


def test_an_option_that_was_not_typed_is_none_of_the_file(tmp_path):
    told = {"command": "verify", "options": {"names": None, "trials": None, "seed": 0}}
    (tmp_path / "config.json").write_text(json.dumps({"typed": told}))
    done = call("verify --list --config", tmp_path / "config.json")
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("command", "option", "value", "said"),
    [
        ("compare", "lr", "fast", "'--lr'"),
        ("compare", "layers", -1, "no layer '-1'"),
        ("bench", "repeats", "x", "'--repeats'"),
        ("train", "seeds", ["a", "b"], "--seeds takes whole numbers"),
        ("verify", "trials", {}, "'--trials'"),
        ("sweep", "later", 1, "unknown option 'later'"),
    ],
)
def test_a_damaged_option_is_refused_as_if_it_was_typed(command, option, value, said, tmp_path):
    told = {"command": command, "options": {option: value}}
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_text(json.dumps({"command": command, "typed": told}))
    refused = call("rerun", tmp_path / "a")
    assert refused.exit_code == 2 and not (tmp_path / "a-rerun").exists()
    assert said in " ".join(refused.output.replace("│", " ").split())
