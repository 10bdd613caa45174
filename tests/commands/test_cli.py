"""The command line: what it leaves behind, and what it says when something is wrong."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import quicken
from typer.testing import CliRunner

import fisherlab as fl
from fisherlab import approximations, comparison
from fisherlab.cli import COMMANDS, app, command
from fisherlab.commands import common
from fisherlab.experiments import rundir, training
from fisherlab.experiments.sweep import grid
from fisherlab.experiments.training.task import Task

pytestmark = pytest.mark.usefixtures("no_pictures")

TINY = ["--data", "iris", "--hidden", "4", "--compare-examples", "8", "--reference", "16"]
TINY += ["--epochs", "2", "-a", "exact,kfac,tekfac", "--dampings", "0.01,0.1"]


def call(*words):
    """The result of a command; `output` is what both streams say."""
    return CliRunner().invoke(app, [str(word) for word in words], terminal_width=200)


def refused(*words):
    """The message of a command that must end as the user's mistake, without a traceback."""
    result = call(*words)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return re.sub(r"[│\s]+", " ", result.output)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "out"
    with pytest.MonkeyPatch.context() as patch:
        quicken(patch)
        result = call("compare", *TINY, "--out", folder)
    assert result.exit_code == 0, result.output
    return folder, result.output


# compare -----------------------------------------------------------------------------------------


def test_compare_leaves_tables_pictures_and_a_page(run):
    folder, output = run
    frame = pd.read_parquet(folder / "comparison.parquet")
    assert list(frame.columns) == comparison.COLUMNS
    # 2 layers, 3 approximations, 2 dampings; start, middle and end of 2 epochs of 1 step
    assert len(frame) == 2 * 3 * 2 * 3
    assert sorted(frame["step"].unique()) == [0, 1, 2]
    assert len(pd.read_csv(folder / "comparison.csv")) == len(frame)
    for name in ("error", "trace_ratio", "direction", "training", "cost"):
        assert (folder / "figures" / f"{name}.png").stat().st_size > 5000
        assert (folder / "figures" / f"{name}.pdf").is_file()
    config = json.loads((folder / "config.json").read_text())
    assert config["status"] == "complete"
    assert config["settings"]["approximations"] == ["exact", "kfac", "tekfac"]
    assert config["versions"]["torch"] == torch.__version__
    assert "tekfac" in output and "report.html" in output
    first, second = output.splitlines()[:2]
    assert first == (
        "Fisher type exact, 8 examples, float64; 16 unseen examples for the population error."
    )
    assert second == "2 layers with 35 of 35 trainable parameters (100%)."
    page = (folder / "report.html").read_text()
    assert page.index(first) < page.index(second) < page.index("<table")
    assert not list(folder.rglob("*.part"))


def test_an_approximation_that_no_layer_takes_is_explained(tmp_path):
    words = ["compare", *TINY, "-a", "kfac,kbfgs", "--epochs", "0", "--out", tmp_path / "out"]
    result = call(*words)
    assert result.exit_code == 0, result.output
    assert "kbfgs: K-BFGS needs layer" in result.output
    assert result.output.count("kbfgs: ") == 1 and "kfac: " not in result.output


def test_compare_measures_what_the_library_does(run):
    folder, _ = run
    frame = pd.read_parquet(folder / "comparison.parquet")
    assert frame["dtype"].unique() == ["float64"]
    exact = frame[frame["approximation"] == "exact"]
    assert exact["relative_error"].max() < 1e-12
    start = frame[(frame["step"] == 0) & (frame["approximation"] == "kfac")]

    dataset = fl.datasets.load("iris")
    x, y = dataset.train.tensors
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    model = fl.models.create(
        "mlp",
        num_classes=3,
        input_size=(4,),
        hidden=(4,),
        generator=torch.Generator().manual_seed(0),
    ).double()
    x, y = x[order[:8]].double(), y[order[:8]]
    table = fl.compare(model, torch.nn.CrossEntropyLoss(), x, y, approximations=["kfac"])
    ours = table.frame.drop_duplicates("layer").set_index("layer")["relative_error"]
    theirs = start.drop_duplicates("layer").set_index("layer")["relative_error"]
    pd.testing.assert_series_equal(ours, theirs, rtol=1e-12)


def test_a_folder_that_holds_a_run_is_refused_and_left_alone(run):
    folder, _ = run
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    said = refused("compare", *TINY, "--out", folder)
    assert "already holds a run" in said and "--overwrite" in said
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_overwrite_replaces_the_run_and_leaves_other_files(tmp_path):
    words = ["compare", *TINY, "--epochs", "0", "-a", "kfac", "--out", tmp_path]
    (tmp_path / "notes.txt").write_text("mine")
    assert call(*words).exit_code == 0
    stale = tmp_path / "figures" / "stale.png"
    stale.write_bytes(b"")
    assert call(*words, "--overwrite").exit_code == 0
    assert not stale.exists() and (tmp_path / "notes.txt").read_text() == "mine"


def test_a_new_run_of_verify_has_no_counterexample_of_the_old_one(tmp_path):
    old = tmp_path / "counterexamples" / "old_claim.pt"
    old.parent.mkdir()
    for path in (old, tmp_path / "claims.json", tmp_path / "notes.txt"):
        path.write_text("of the run before")
    words = ["verify", "kfac_keeps_the_trace", "--trials", "1", "--out", tmp_path]
    assert "claims.json" in refused(*words)
    assert call(*words, "--overwrite").exit_code == 0
    assert not old.exists() and (tmp_path / "notes.txt").exists()
    assert "of the run" not in (tmp_path / "claims.json").read_text()


WRONG = {
    "data": (["--data", "digit"], "unknown data set 'digit'; did you mean 'digits'?"),
    "model": (["--model", "resnet2"], "or 'resnet20'"),
    "approximation": (["-a", "kfca"], "unknown approximation 'kfca'; did you mean 'kfac'"),
    "empty list": (["-a", ","], "no approximation given"),
    "layer": (["--layers", "33"], "list all"),
    "fisher type": (["--fisher-type", "exakt"], "did you mean 'exact'?"),
    "dtype": (["--dtype", "float16"], "Known: float32, float64"),
    "device": (["--device", "cuda:77"], "device 'cuda:77' cannot be used here"),
    "optimizer": (["--optimizer", "adm"], "did you mean 'adam'"),
    "dampings": (["--dampings", "0.1,x"], "--dampings takes numbers"),
    "negative damping": (["--dampings", "-1"], "dampings are positive"),
    "seeds": (["--seeds", "1.5"], "--seeds takes whole numbers"),
    "count of seeds": (["--seeds", "9" * 30], "a count from 1 to 100,000"),
    "seed": (["--seeds", f"{2**40},"], "a seed is a whole number below 2^40"),
    "width": (["--width", "1e300"], "4 features times the width 1e+300 are more than 16,777,216"),
    "step": (["--at", "9999"], "--at 9999, but 2 epochs have"),
    "moment": (["--at", "later"], "start, middle or end; got 'later'"),
    "batch": (["--compare-examples", "500"], "training set has 120"),
    "no batch": (["--compare-examples", "0"], "at least 1"),
    "memory": (["--memory", "many"], "such as 800M or 2G"),
    "epochs": (["--epochs", "-1"], "epochs >= 0"),
    "activation": (["--activation", "rely"], "did you mean 'relu'"),
    "misfit": (["--model", "lenet", "--hidden", "4"], "lenet"),
    "option": (["--dampening", "1"], "No such option"),
}


@pytest.mark.parametrize("command", ["compare", "train", "sweep", "bench"])
def test_an_unknown_device_is_named_in_one_line(command, tmp_path):
    words = ["--grid", "sgd.lr=0.1"] if command == "sweep" else []
    said = refused(command, *words, "--device", "gpu:0", "--out", tmp_path / "out")
    assert said.strip() == "error: unknown device 'gpu:0'; take cpu, cuda, cuda:1 or mps"
    assert not (tmp_path / "out").exists()


def test_an_option_means_the_same_in_every_command():
    said: dict[str, set[str]] = {}
    for name in COMMANDS:
        made = command(name)
        for one in getattr(made, "commands", {"": made}).values():
            for option in one.params:
                said.setdefault(option.opts[0], set()).add(option.help.rstrip("."))
    # one optimizer or several, of what the folder is, of what the case is; the approximations to
    # compare, or those that an atlas has besides its own
    differ = {
        "--approximations",
        "--optimizer",
        "--out",
        "--set",
        "--epochs",
        "--list",
        "--seed",
        "--examples",
    }
    assert {option for option, texts in said.items() if len(texts) > 1} <= differ


def test_seeds_are_counted_or_named():
    assert common.seeds_of("3") == (0, 1, 2) and common.seeds_of("2", 5) == (5, 6)
    assert common.seeds_of("0,4,4") == (0, 4) and common.seeds_of("7,") == (7,)
    with pytest.raises(common.UserError, match="from 1 to 100,000, or a list such as 0,4,7"):
        common.seeds_of("0")


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_named_before_anything_is_written(case, tmp_path):
    words, message = WRONG[case]
    out = tmp_path / "out"
    said = refused("compare", *TINY, *words, "--out", out)
    assert message in said, said
    assert not out.exists()


def test_a_batch_larger_than_the_data(tmp_path):
    small = ["--data", "iris", "--compare-examples", "500", "--out", tmp_path / "out"]
    assert "a batch of 500 and 0 unseen examples of 'iris'" in refused("compare", *small)


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "file").write_text("")
    assert "is a file" in refused("compare", *TINY, "--out", tmp_path / "file")


def test_a_corrupt_data_file(tmp_path, monkeypatch):
    card = fl.datasets.card("ecoli")
    path = tmp_path / card.files[0].path
    path.parent.mkdir()
    path.write_text("truncated")
    monkeypatch.setenv("FISHERLAB_DATA", str(tmp_path))
    said = refused("compare", "--data", "ecoli", "--out", tmp_path / "out")
    assert "corrupt or truncated" in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["nan", "label"])
def test_bad_numbers_in_the_data(what, tmp_path, monkeypatch):
    placed = Task._placed

    def spoiled(self, tensors):
        x, y = placed(self, tensors)
        if what == "nan":
            x[2:] = torch.nan
        else:
            y[2:] = 7
        return x, y

    monkeypatch.setattr(Task, "_placed", spoiled)
    said = refused("compare", *TINY, "--out", tmp_path / "out")
    assert ("NaN or inf" if what == "nan" else "7") in said
    assert not (tmp_path / "out").exists()


def interrupting(after, number=signal.SIGINT):
    """A progress bar whose user presses Ctrl-C after so many layers, over all bars together."""
    seen = 0

    def progress(names, title=""):
        nonlocal seen
        for name in names:
            if seen == after:
                signal.raise_signal(number)
            seen += 1
            yield name

    return progress


@pytest.mark.parametrize(
    ("after", "number", "code"), [(1, signal.SIGTERM, 143), (3, signal.SIGINT, 130)]
)
def test_ctrl_c_keeps_the_layers_that_were_measured(after, number, code, tmp_path, monkeypatch):
    monkeypatch.setattr("fisherlab.commands.compare.progress", interrupting(after, number))
    result = call("compare", *TINY, "--out", tmp_path)
    assert result.exit_code == code, result.output
    assert "interrupted" in result.output and "Traceback" not in result.output
    frame = pd.read_csv(tmp_path / "comparison.csv")
    assert len(frame.drop_duplicates(["step", "layer"])) == after
    assert json.loads((tmp_path / "config.json").read_text())["status"] == "interrupted"
    assert "interrupted" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_among_the_imports_ends_the_process_with_its_code(name, code):
    """`named` stands where the first import does."""
    program = (
        "import os, signal, fisherlab.__main__ as entry\n"
        f"entry.named = lambda: os.kill(os.getpid(), signal.{name})\n"
        "entry.main()"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert (ended.returncode, ended.stderr) == (code, b"interrupted\n")


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_while_a_class_is_made_leaves_its_exit_code(name, code, tmp_path):
    """`exec` marks the plain `KeyboardInterrupt`: `python -m` then ended by SIGINT itself."""
    (tmp_path / "stopped.py").write_text(
        "import signal, sys, typer\n"
        "from fisherlab.commands.common import guarded\n"
        "def command():\n"
        f"    exec('signal.raise_signal(signal.{name})')\n"
        "try:\n    guarded(command)()\n"
        "except typer.Exit as end:\n    sys.exit(end.exit_code)\n"
    )
    path = os.pathsep.join([str(tmp_path), str(Path(fl.__file__).parents[1])])
    ended = subprocess.run(
        [sys.executable, "-m", "stopped"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (code, b"interrupted\n")


def test_ctrl_c_before_the_first_layer(tmp_path, monkeypatch):
    monkeypatch.setattr("fisherlab.commands.compare.progress", interrupting(0))
    result = call("compare", *TINY, "--out", tmp_path)
    assert result.exit_code == 130 and "before anything was measured" in result.output


def test_a_file_is_whole_or_absent(tmp_path, monkeypatch):
    folder = rundir.RunDir(tmp_path)
    folder.begin({"command": "compare"}, ("comparison",))

    def fails(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="No space"):
        folder.write_table("comparison", pd.DataFrame({"a": [1]}))
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


# The other commands ------------------------------------------------------------------------------


def test_version_and_help():
    assert call("--version").output.strip() == f"fisherlab {fl.__version__}"
    listed = call("--help").output
    for name in (
        "compare",
        "train",
        "verify",
        "report",
        "data",
        "approximations",
        "support",
        "reproduce",
    ):
        assert name in listed


def test_approximations_are_listed_with_source_and_equation():
    from fisherlab.commands.approximations import table

    frame = table().set_index("name")
    assert list(frame.index) == approximations.names()
    assert "G (x) A" in frame.loc["kfac", "equation"]
    assert "TEKFAC" in frame.loc["tekfac", "source"]
    assert frame.loc["shampoo", "exponent"] == "-0.5"
    result = call("approximations")
    assert result.exit_code == 0 and "kronecker_optimal" in result.output


def test_support_names_every_layer_and_its_reason():
    result = call("support", "--model", "resnet20", "--data", "digits", "--width", "0.25")
    assert result.exit_code == 0
    assert "BatchNorm2d" in result.output and "exact" in result.output
    assert "compare measures 22 of 43 layers" in result.output
    assert "in evaluation mode; Fisher type by default: exact" in result.output
    assert "did you mean" in refused("support", "--model", "resnet21")


def test_data_is_listed_and_a_bundled_set_needs_no_fetch(monkeypatch):
    monkeypatch.delenv("FISHERLAB_DATA", raising=False)
    listed = call("data", "list").output
    assert all(name in listed for name in fl.datasets.names())
    assert "nothing to fetch" in call("data", "fetch", "digits").output
    assert "did you mean 'mnist'" in refused("data", "fetch", "mnits")


# What all commands share -------------------------------------------------------------------------


def ending(error):
    def command():
        raise error

    app = __import__("typer").Typer()
    app.command()(common.guarded(command))
    return CliRunner().invoke(app, [])


def test_a_bug_is_a_short_message_and_a_file_with_the_traceback():
    result = ending(KeyError("surprise"))
    assert result.exit_code == 70 and "Traceback" not in result.output
    log = Path(re.search(r"traceback is in (\S+)", result.output)[1])
    assert "KeyError: 'surprise'" in log.read_text(encoding="utf-8")
    log.unlink()


def test_a_bug_says_its_traceback_where_no_file_can_be_made(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    result = ending(KeyError("surprise"))
    assert result.exit_code == 70 and "KeyError: 'surprise'" in result.output.split("in this")[1]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (common.UserError("wrong"), 2),
        (fl.CaptureError("wrong"), 2),
        (torch.OutOfMemoryError("wrong"), 2),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: something wrong"), 2),
        (PermissionError(13, "wrong", "file"), 2),
        (KeyboardInterrupt("wrong"), 130),
        (KeyboardInterrupt(), 130),
    ],
)
def test_every_end_has_its_code(error, code):
    result = ending(error)
    assert result.exit_code == code and "Traceback" not in result.output
    assert "wrong" in result.output or "interrupted" in result.output


def test_words_numbers_and_sizes():
    assert common.words(" a, b,,a ") == ["a", "b", "a"]
    assert common.numbers("--x", "1e-3, 1", float) == [1e-3, 1.0]
    assert common.several("thing", "b, a,b", ["b", "a"]) == ["b", "a"]
    assert common.several("thing", "all", ["b", "a"]) == ["b", "a"]
    assert [common.size(text) for text in ("512", "2K", "1.5G", None)] == [
        512,
        2048,
        3 * 2**29,
        None,
    ]
    for wrong in ("0", "-1G", "inf", "G", ""):
        with pytest.raises(common.UserError, match="800M"):
            common.size(wrong)


@pytest.mark.parametrize("command", ["train", "sweep", "compare"])
def test_hidden_layers_of_one_width_are_all_built(command, tmp_path):
    hidden = [8, 8, 4, 8]
    words = ["--data", "digits", "--model", "mlp", "--hidden", ",".join(map(str, hidden))]
    more = {
        "train": ["--optimizer", "sgd", "--examples", 64],
        "sweep": ["--optimizer", "sgd", "--examples", 64, "--grid", "sgd.lr=0.1,0.01"],
        "compare": ["-a", "kfac", "--compare-examples", 8, "--reference", 0, "--at", "start"],
    }[command]
    epochs = 0 if command == "compare" else 1
    result = call(command, *words, *more, "--epochs", epochs, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    if command == "compare":
        frame = pd.read_parquet(tmp_path / "run" / "comparison.parquet")
        widths = [64, *hidden, 10]
        expected = [o * (i + 1) for i, o in pairwise(widths)]
        assert list(frame.drop_duplicates("layer")["n_parameters"]) == expected
        return
    (path, *_) = sorted((tmp_path / "run").rglob("*.pt"))
    state = torch.load(path, weights_only=False)["training"]["model"]
    assert [len(b) for name, b in state.items() if name.endswith("bias")] == [*hidden, 10]


def test_lists_in_which_a_second_mention_says_nothing_have_it_once(tmp_path):
    words = ["--layers", "1,1", "--dampings", "0.1,1e-1", "--at", "start,start", "--seeds", "0,0"]
    rest = ["-a", "kfac,kfac", "--epochs", 0, "--reference", 0, "--out", tmp_path / "run"]
    result = call("compare", *TINY, *words, *rest)
    assert result.exit_code == 0, result.output
    assert len(pd.read_parquet(tmp_path / "run" / "comparison.parquet")) == 1
    assert [entry.label for entry in training.entries("kfac, kfac")] == ["kfac"]
    assert grid(["sgd.lr=0.1,0.3, 0.1"], "sgd") == {"sgd": {"lr": ["0.1", "0.3"]}}
    with pytest.raises(training.SettingsError, match="sgd.lr twice"):
        grid(["sgd.lr=0.1", "sgd.lr=0.3"], "sgd")


def test_a_method_that_one_batch_cannot_make_leaves_its_reason_and_no_report(tmp_path):
    done = call("compare", *TINY, "-a", "kbfgs", "--epochs", "0", "--out", tmp_path / "run")
    assert done.exit_code == 1, done.output
    assert "kbfgs:" in done.output and "nothing could be measured" in done.output
    assert not (tmp_path / "run" / "report.html").exists()


BRACKETED = defaultdict(tuple, sweep=("fisherlab[sweep]", "[@SIDE]"), compare=("[@SIDE]",))


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example_and_the_line_of_the_list(name):
    made = command(name)
    for one in getattr(made, "commands", {"": made}).values():
        examples = [line for line in one.help.splitlines() if line.startswith("    fisherlab ")]
        assert examples and max(map(len, examples)) < 78, one.name
        shown = call(*dict.fromkeys((name, one.name)), "--help").output
        assert "<bool>" not in shown
        # brackets of the texts are text, not styles
        assert all(word in " ".join(shown.split()) for word in BRACKETED[name])
    if name != "data":
        assert made.help.startswith(COMMANDS[name])


OWN = """
import torch
import fisherlab as fl

class Half(fl.KFAC, name="half_of_my_kfac"):
    def block(self, mean, shape):
        return super().block(mean, shape)

@fl.models.register("my_net")
def my_net(spec):
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 3))
"""


@pytest.fixture
def restored():
    """The registries as they were, whatever a test brings."""
    registries = (approximations.base._REGISTRY, fl.models.registry._REGISTRY)
    known = [dict(registry) for registry in registries]
    yield
    for registry, before in zip(registries, known, strict=True):
        registry.clear()
        registry.update(before)


def test_a_file_of_the_users_brings_its_model_and_its_method(tmp_path, restored):
    (tmp_path / "my.py").write_text(OWN)
    words = ["compare", *TINY[:2], *TINY[4:-4], "--epochs", "0", "--dampings", "0.1"]
    words += ["-a", "half_of_my_kfac,kfac", "--model", "my_net", "--out", tmp_path / "out"]
    result = call(*words, "--import", tmp_path / "my.py")
    assert result.exit_code == 0, result.output
    frame = pd.read_csv(tmp_path / "out" / "comparison.csv")
    errors = frame.drop_duplicates(["layer", "approximation"]).pivot_table(
        index="layer", columns="approximation", values="relative_error"
    )
    assert len(errors) == 2 and (errors["kfac"] == errors["half_of_my_kfac"]).all()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1\nraise KeyError('gone')", "broken.py, broken.py:2: KeyError: 'gone'"),
        ("def f(:\n", "SyntaxError"),
        (None, "there is no such file"),
    ],
)
def test_a_broken_file_of_the_users_is_named_with_its_line(text, said, tmp_path):
    if text is not None:
        (tmp_path / "broken.py").write_text(text)
    assert said in refused("--import", tmp_path / "broken.py", "support", "--model", "mlp")


def test_options_of_a_method_by_name(tmp_path):
    words = ["compare", *TINY, "-a", "kfac,kfac_reduce,tekfac", "--epochs", "0", "--at", "start"]
    words += ["--set", "kfac.weight_sharing=reduce", "--out", tmp_path / "out"]
    result = call(*words)
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["settings"]["assign"] == ["kfac.weight_sharing=reduce"]
    for wrong, said in (
        ("kfac.weight_sharing=x", "KFAC's weight_sharing is 'expand' or 'reduce', got 'x'"),
        ("kfac.sharing=reduce", "unknown kfac option 'sharing'"),
        ("ekfac.weight_sharing=reduce", "unknown approximation in --set 'ekfac'"),
        ("kfac", "--set takes METHOD.OPTION=VALUE"),
    ):
        given = ["--set", wrong, "-a", "kfac,tekfac", "--out", tmp_path / "no"]
        assert said in refused("compare", *TINY, *given)
    assert not (tmp_path / "no").exists()


def test_an_output_that_lacks_letters_is_no_internal_error():
    words = [sys.executable, "-m", "fisherlab", "reproduce", "--list"]
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=True)
    assert "ngm" in done.stdout and "?" in done.stdout and not done.stderr
