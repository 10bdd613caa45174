"""Training side by side: resumed runs, divergence, refusals, the table, what is measured."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
from contextlib import suppress
from functools import cache, reduce
from operator import getitem
from pathlib import Path
from unittest.mock import Mock

import pandas as pd
import pytest
import torch
from pandas.testing import assert_frame_equal
from torch import nn

from fisherlab import optim, whole
from fisherlab.blocks import BlockError
from fisherlab.experiments import checkpoint
from fisherlab.experiments.columns import steady
from fisherlab.experiments.training import Settings, SettingsError, Watch, entries, train
from fisherlab.experiments.training.cost import Clock, SGDReference, due
from fisherlab.experiments.training.divergence import blame, weight_norms
from fisherlab.experiments.training.record import Record
from fisherlab.experiments.training.run import Run
from fisherlab.experiments.training.task import Task
from fisherlab.forms import form_of

TINY = {"data": "digits", "hidden": (4,), "examples": 192, "test_examples": 50, "batch_size": 64}


def settings(wanted, assignments=(), **options):
    return Settings(**{**TINY, "entries": entries(wanted, assignments), "epochs": 2, **options})


def assert_same(results, others):
    assert_frame_equal(steady(results.rows), steady(others.rows), check_exact=True)
    assert_frame_equal(steady(results.curve), steady(others.curve), check_exact=True)


class Interrupt(Watch):
    """Ctrl-C after so many steps."""

    def __init__(self, steps):
        self.steps = steps

    def stepped(self, loss):
        self.steps -= 1
        if self.steps == 0:
            raise KeyboardInterrupt


# Resume ------------------------------------------------------------------------------------------


ADAPTIVE = ["lm.damping=levenberg_marquardt(0.3)", "lm.statistics_every=1", "lm.basis_every=1"]


@cache
def task():
    return Task(settings("sgd", schedule="cosine"))


@pytest.mark.parametrize("name", [*optim.names(), "lm=kfac"])
def test_every_optimizer_goes_on_from_a_checkpoint_bit_for_bit(name, tmp_path):
    (entry,) = entries(name, ADAPTIVE if name == "lm=kfac" else ())
    reference = SGDReference(task().model(0), task().criterion())
    whole, resumed = Record(entry, 0), Record(entry, 0)
    run = Run(task(), whole)
    try:
        run.train_epoch(reference, lambda loss: None)
    except BlockError as error:
        assert "refused above" in str(error)
        return
    whole.save(tmp_path, task().settings, run.state())
    again = Run(task(), resumed)
    again.load(resumed.restore(tmp_path, task().settings))
    for going_on in (run, again):
        going_on.train_epoch(reference, lambda loss: None)
    rows = [steady(pd.DataFrame(record.rows)) for record in (whole, resumed)]
    assert_frame_equal(*rows, check_exact=True)
    ours, theirs = run.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path):
    s = settings("kfac,fngd", schedule="cosine")
    whole = train(s, tmp_path / "whole")
    first = train(s, tmp_path / "cut", watch=Interrupt(5))
    assert first.interrupted and first.rows["epoch"].max() == 1
    resumed = train(s, tmp_path / "cut")
    assert not resumed.interrupted
    assert_same(resumed, whole)


class Interrupted:
    """A stream in whose third write, or read, Ctrl-C comes, or another error."""

    def __init__(self, stream, error=KeyboardInterrupt):
        self.stream, self.error, self.calls = stream, error, 0

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.stream.close()

    def called(self):
        self.calls += 1
        if self.calls == 3:
            raise self.error

    def write(self, content):
        self.called()
        return self.stream.write(content)

    def read(self, *size):
        self.called()
        return self.stream.read(*size)

    def readinto(self, buffer):
        self.called()
        return self.stream.readinto(buffer)


def test_ctrl_c_while_a_checkpoint_is_written_is_no_full_disk(tmp_path, monkeypatch):
    s = settings("sgd,kfac")
    opened, streams = Path.open, []

    def open_(path, *args, **options):
        stream = opened(path, *args, **options)
        if "checkpoints" not in path.parts:
            return stream
        streams.append(stream)
        return Interrupted(stream) if len(streams) == 2 else stream

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", open_)
        first = train(s, tmp_path / "cut")
    # the checkpoint of the first epoch was lost, and no other optimizer begun
    assert first.interrupted and len(streams) == 2
    assert [record.status for record in first.records] == ["interrupted"] * 2
    assert not first.records[1].rows and not list(tmp_path.rglob(".*.part"))
    assert_same(train(s, tmp_path / "cut"), train(s, tmp_path / "whole"))


def test_a_disk_that_is_full_once_is_no_bug_of_the_method(tmp_path, monkeypatch):
    s, opened, streams = settings("sgd,kfac"), Path.open, []
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def open_(path, *args, **options):
        stream = opened(path, *args, **options)
        if "checkpoints" not in path.parts:
            return stream
        streams.append(path)
        return Interrupted(stream, full) if len(streams) == 2 else stream

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", open_)
        with pytest.raises(OSError, match=r"No space left on device.*sgd-seed0\.pt") as error:
            train(s, tmp_path / "cut")
    # no other optimizer was begun; the one at hand goes on from the checkpoint before
    assert error.value.errno == errno.ENOSPC and len(streams) == 2
    assert not list(tmp_path.rglob(".*.part"))
    assert_same(train(s, tmp_path / "cut"), train(s, tmp_path / "whole"))


def test_ctrl_c_while_a_checkpoint_is_read_is_no_damage(tmp_path, monkeypatch):
    path = tmp_path / "state.pt"
    checkpoint.save(path, {"w": torch.ones(9)})
    for reads in range(90):
        with path.open("rb") as stream, monkeypatch.context() as patch:
            interrupted = Interrupted(stream)
            interrupted.calls = 2 - reads
            patch.setattr(Path, "open", Mock(return_value=interrupted))
            try:
                checkpoint.load(path)
            except KeyboardInterrupt:
                continue
        break
    assert 2 < reads < 89  # as many as a whole file takes


KILLED = """
import os, signal, sys, torch
from fisherlab.experiments.training import Settings, Watch, train
from pathlib import Path
from unittest.mock import Mock

folder, moment = Path(sys.argv[1]), sys.argv[2]
steps, saves = 0, 0

def die():
    os.kill(os.getpid(), signal.SIGKILL)

class Kill(Watch):
    def stepped(self, loss):
        global steps
        steps += 1
        if moment == "step" and steps == 5:
            die()

save = torch.save
def half(state, stream):
    global saves
    saves += 1
    if moment == "save" and saves == 3:
        stream.write(b"PK half of a file")
        stream.flush()
        die()
    save(state, stream)
torch.save = half
train(Settings.load(folder.parent / "whole"), folder, watch=Kill())
"""


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A run that nothing killed, in folder `whole`, and the folder that it lies in."""
    folder = tmp_path_factory.mktemp("killed")
    return train(settings("kfac,sgd", epochs=3), folder / "whole"), folder


@pytest.mark.parametrize("moment", ["step", "save"])
def test_a_killed_run_loses_at_most_the_current_epoch(moment, unbroken):
    s, (whole, folder) = settings("kfac,sgd", epochs=3), unbroken
    killed = folder / moment
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, killed, moment],
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert ended.returncode == -signal.SIGKILL
    left = Record(s.entries[0], 0)
    left.restore(killed, s)
    assert [row["epoch"] for row in left.rows] == [0, 1]  # both died within the second epoch
    parts = list((killed).rglob("*.part"))
    assert len(parts) == (moment == "save")
    resumed = train(s, killed)
    assert_same(resumed, whole)
    assert not list((killed).rglob("*.part"))


def test_a_finished_run_is_taken_over_as_it_is(tmp_path):
    s = settings("sgd")
    first, steps = train(s, tmp_path), []
    watch = Watch()
    watch.stepped = steps.append
    again = train(s, tmp_path, watch=watch)
    assert not steps
    assert_frame_equal(again.rows, first.rows)


def test_more_epochs_go_on_from_the_checkpoint(tmp_path):
    whole = train(settings("sgd,kfac,fngd", epochs=3), tmp_path / "whole")
    train(settings("sgd,kfac,fngd", epochs=1), tmp_path / "longer")
    watch, steps = Watch(), []
    watch.stepped = steps.append
    longer = train(settings("sgd,kfac,fngd", epochs=3), tmp_path / "longer", watch=watch)
    assert len(steps) == 3 * 2 * longer.steps_per_epoch
    assert_same(longer, whole)
    assert {record.status for record in longer.records} == {"done"}


@pytest.mark.parametrize(
    ("wanted", "options", "planned"),
    [
        ("sgd", {"schedule": "cosine"}, "schedule cosine"),
        ("sgd,ang,truncated_kfac", {}, r"ang \(total_steps\), truncated_kfac \(switch_step\)"),
    ],
)
def test_epochs_that_were_planned_do_not_go_on(wanted, options, planned, tmp_path):
    train(settings(wanted, epochs=1, **options), tmp_path)
    with pytest.raises(
        SettingsError, match=f"epochs 1, not 2.*planned for that length by {planned}"
    ):
        train(settings(wanted, epochs=2, **options), tmp_path)


def test_a_folder_of_another_run_is_refused(tmp_path):
    train(settings("sgd", epochs=2), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for other, said in (({"epochs": 1}, "epochs 2, not 1"), ({"width": 2.0}, "width 1.0, not 2.0")):
        with pytest.raises(SettingsError, match=said):
            train(settings("sgd", **other), tmp_path)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_a_damaged_checkpoint_is_named(tmp_path, monkeypatch):
    s = settings("sgd", epochs=1)
    path = tmp_path / train(s, tmp_path).records[0].path
    state = checkpoint.load(path)
    checkpoint.save(path, {key: state[key] for key in state if key not in ("rows", "settings")})
    with pytest.raises(checkpoint.CheckpointError, match=r"sgd-seed0\.pt lacks rows, settings"):
        train(s, tmp_path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(checkpoint.CheckpointError, match=r"sgd-seed0\.pt is not a readable"):
        train(s, tmp_path)
    # a place that is none, to which torch's reader seeks
    monkeypatch.setattr(whole, "read_tensors", Mock(side_effect=OSError(22, "Invalid argument")))
    with pytest.raises(checkpoint.CheckpointError, match=r"sgd-seed0\.pt is not a readable"):
        train(s, tmp_path)
    (tmp_path / "config.json").write_bytes(b'{"command": "\x80"}')
    with pytest.raises(SettingsError, match=r"config\.json is damaged"):
        train(s, tmp_path)


def test_no_flipped_bit_of_a_checkpoint_is_read_as_another_number(tmp_path):
    path = tmp_path / train(settings("sgd", epochs=1), tmp_path).records[0].path
    content, state = path.read_bytes(), checkpoint.load(path)
    seal = form_of(state, exact=True)
    for place in range(0, len(content), len(content) // 300):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with suppress(checkpoint.CheckpointError):  # else it is in a place that no reader asks for
            found = checkpoint.load(path)
            assert form_of(found, exact=True) == seal
            ours, theirs = (s["training"]["model"] for s in (state, found))
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def changed(state, place, value):
    """The state with another value at a place."""
    *inside, last = place
    holder = reduce(getitem, inside, state)
    holder[last] = value


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("rows", 0, "accuracy"), "high", "rows cannot be of sgd"),
        (("rows", 1, "optimizer"), "adam", "rows cannot be of sgd"),
        (("rows",), [], "status cannot be of sgd"),
        (("curve", 0, "train_loss"), None, "curve cannot be of sgd"),
        (("comparisons",), [{}], "comparisons cannot be of sgd"),
        (("note",), 3, "note cannot be of sgd"),
        (("seed",), 1, "seed cannot be of sgd with seed 0"),
        (("settings", "dtype"), 3, "the settings of a training run"),
        (("training", "epoch"), "1", "epoch must be a whole number"),
        (("training", "clock", "timed"), {"": ["x"]}, "cannot be gone on from"),
        (("training", "model"), {}, "cannot be gone on from"),
        (("training", "optimizer"), [], "cannot be gone on from"),
    ],
)
def test_a_forged_checkpoint_is_refused_and_stays(place, value, said, tmp_path):
    path = tmp_path / train(settings("sgd", epochs=1), tmp_path).records[0].path
    state = checkpoint.load(path)
    # by torch: what was sealed is another state; by our own function: it cannot be of that run
    sealed = torch.load(path, weights_only=True)
    for write, forged, why in ((torch.save, sealed, "not what was written"), (None, state, said)):
        changed(forged, place, value)
        (write or (lambda state, path: checkpoint.save(path, state)))(forged, path)
        before = path.read_bytes()
        with pytest.raises(ValueError, match=rf"sgd-seed0\.pt.*{why}.*(delete|restore) it"):
            train(settings("sgd", epochs=2), tmp_path)
        assert path.read_bytes() == before


def test_a_setting_of_another_type_is_named_with_its_file(tmp_path):
    train(settings("sgd", epochs=1), tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for settings_ in ({**config["settings"], "augment": 1e30}, [1], None):
        path.write_text(json.dumps({**config, "settings": settings_}))
        with pytest.raises(
            SettingsError, match=r"config\.json.*restore it|config\.json is damaged"
        ):
            train(settings("sgd", epochs=1), tmp_path)


def test_a_pipe_in_place_of_a_file_is_not_waited_for(tmp_path):
    s = settings("sgd", epochs=1)
    record = train(s, tmp_path).records[0]
    for name in (record.path, "config.json"):
        (tmp_path / name).unlink()
        os.mkfifo(tmp_path / name)
        with pytest.raises((SettingsError, OSError), match="a pipe or a device") as error:
            train(s, tmp_path)
        assert str(tmp_path / name) in str(error.value)


def test_a_checkpoint_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pwned"),)

    torch.save({"format": 1, "evil": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(checkpoint.CheckpointError):
        checkpoint.load(tmp_path / "evil.pt")
    assert not (tmp_path / "pwned").exists()


# Runs that do not end well -----------------------------------------------------------------------


def test_too_little_memory_is_no_bug_of_the_method(tmp_path, monkeypatch):
    said = "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: ..."
    monkeypatch.setattr(Run, "step", Mock(side_effect=RuntimeError(said)))
    (record,) = train(settings("sgd", epochs=1), tmp_path).records
    assert record.status == "refused" and record.note == said and not record.traceback


def test_a_diverging_run_is_stopped_and_the_others_go_on(tmp_path):
    s = settings("wild=sgd,sgd", ["wild.lr=1e9"], seeds=(0, 1))
    results = train(s, tmp_path)
    table = results.summary().set_index("optimizer")
    assert table.loc["sgd", "status"] == "done" and table.loc["sgd", "seeds"] == 2
    wild = table.loc["wild"]
    assert wild["status"] == "diverged" and wild["seeds"] == 0 and pd.isna(wild["final"])
    assert wild["stopped_at"] == 1 and wild["layer"] in ("1", "3")
    assert f"step 1, layer '{wild['layer']}'" in wild["note"]
    assert results.succeeded
    again = train(s, tmp_path)  # it is not tried again
    assert again.summary().equals(results.summary())


def test_the_layer_that_broke_is_named():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    with torch.no_grad():
        for layer in model:
            layer.weight.copy_(torch.eye(3))
    start, x = weight_norms(model), 2 * torch.ones(2, 3)
    with torch.no_grad():
        model[1].weight *= 50
    assert blame(model, start, x)[0] == "1"
    with torch.no_grad():
        model[1].weight.fill_(3e38)
    layer, why = blame(model, start, x)
    assert layer == "1" and "output is not finite" in why
    with torch.no_grad():
        model[2].bias[0] = float("nan")
    assert blame(model, start, x) == ("2", "its weights or gradients are not finite")


def test_a_gradient_that_is_not_finite_is_a_divergence(tmp_path):
    # float32 overflows in the step itself, so that the next gradient is the first to show it
    s = settings("kfac,sgd", ["kfac.lr=1e30", "kfac.kl_clip=none", "kfac.momentum=0"])
    table = train(s, tmp_path).summary().set_index("optimizer")
    assert table.loc["kfac", "status"] == "diverged" and table.loc["kfac", "layer"]
    assert table.loc["sgd", "status"] == "done"


def test_a_method_that_must_refuse_is_a_row_with_the_reason(tmp_path):
    s = settings("ngd_dense,sgd", hidden=(100,), epochs=1)
    table = train(s, tmp_path).summary()
    refused = table[table["status"] == "refused"]
    assert list(refused["optimizer"]) == ["ngd_dense"]
    assert "refused above" in refused["note"].item()


def test_a_bug_is_told_from_a_refusal(tmp_path, monkeypatch):
    def broken(self, closure=None):
        raise RuntimeError("oops")

    monkeypatch.setattr(optim.FNGD, "step", broken)
    results = train(settings("fngd,sgd", epochs=1), tmp_path)
    (record,) = results.failures
    assert record.entry.name == "fngd" and "oops" in record.traceback
    assert results.succeeded


# What is measured --------------------------------------------------------------------------------


def test_sgd_by_name_is_a_plain_loop(tmp_path):
    s = settings("sgd", ["sgd.lr=0.05", "sgd.momentum=0.5"], seeds=(3,), schedule="step")
    results = train(s, tmp_path)
    t = Task(s)
    model, loss_of = t.model(3), nn.CrossEntropyLoss()
    velocity = [torch.zeros_like(p) for p in model.parameters()]
    for epoch, lr in enumerate([0.05, 0.005]):
        losses = []
        for _, x, y in t.batches(3, epoch):
            loss = loss_of(model(x), y)
            losses.append(loss.item())
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            with torch.no_grad():
                for p, v, g in zip(model.parameters(), velocity, gradients, strict=True):
                    v.mul_(0.5).add_(g)
                    p.sub_(lr * v)
        row = results.rows.iloc[epoch + 1]
        assert row["train_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
        x, y = t.test
        assert row["accuracy"] == (model(x).argmax(1) == y).double().mean().item()
        assert row["lr"] == pytest.approx(lr)


def test_every_optimizer_sees_the_same_model_and_batches(tmp_path):
    s = settings("sgd,adam,kfac", epochs=1, seeds=(0, 1))
    rows = train(s, tmp_path).rows
    before = rows[rows["epoch"] == 0].groupby("seed")["test_loss"]
    assert (before.nunique() == 1).all() and before.first().nunique() == 2
    curve = pd.read_parquet(tmp_path / "curve.parquet")
    first = curve[curve["step"] == 1].groupby("seed")["train_loss"]
    assert (first.nunique() == 1).all() and first.first().nunique() == 2


def test_the_table_is_the_mean_and_deviation_over_seeds(tmp_path):
    results = train(settings("sgd", seeds=(0, 1, 2)), tmp_path)
    (row,) = results.summary().itertuples()
    last = results.rows[results.rows["epoch"] == 2]["accuracy"]
    best = results.rows.groupby("seed")["accuracy"].max()
    assert row.final == pytest.approx(last.mean()) and row.final_sd == pytest.approx(last.std())
    assert row.best == pytest.approx(best.mean()) and row.best_sd == pytest.approx(best.std())
    assert row.seconds_per_epoch == pytest.approx(3 * row.seconds_per_step)
    assert row.state_bytes > 0


def test_the_cost_in_the_table_is_the_quotient_of_its_row(tmp_path):
    results = train(settings("sgd,kfac", epochs=5), tmp_path)
    summary = results.summary().set_index("optimizer")
    assert not results.untimed and (summary["timed_steps"] == 5 * 3 - 2).all()
    assert list(results.rows["timed_steps"].dropna()) == 2 * [1, 4, 7, 10, 13]
    for row in summary.itertuples():
        assert row.ratio_to_sgd == row.seconds_per_step / row.sgd_seconds_per_step
        mine = results.rows[results.rows["optimizer"] == row.Index].dropna(subset=["timed_steps"])
        # of all timed steps together, not of an epoch's few
        assert row.seconds_per_step == mine["seconds_per_step"].iloc[-1]
        assert row.sgd_seconds_per_step == mine["sgd_seconds_per_step"].iloc[-1]


def test_an_optimizer_may_have_epochs_of_its_own(tmp_path):
    s = settings("sgd,long=sgd", ["long.epochs=4"], epochs=2, schedule="step")
    results = train(s, tmp_path)
    rows = results.rows[results.rows["epoch"] > 0].groupby("optimizer")
    assert rows["epoch"].max().to_dict() == {"sgd": 2, "long": 4}
    rates = {name: list(mine["lr"] / mine["lr"].iloc[0]) for name, mine in rows}
    assert rates["sgd"] == pytest.approx([1, 0.1])
    assert rates["long"] == pytest.approx([1, 1, 0.1, 0.01])  # a schedule of its own length
    again = train(s, tmp_path)
    assert_same(again, results)
    for wrong in ("0", "1.5e", "none"):
        with pytest.raises(SettingsError, match="epochs is a whole number >= 1"):
            settings("sgd", [f"sgd.epochs={wrong}"])


def test_the_metric_at_equal_time_is_that_of_the_fastest_s_seconds(tmp_path):
    results = train(settings("sgd,kfac", epochs=3), tmp_path)
    for record in results.records:  # as if kfac took twice as long as sgd
        for row in record.rows[1:]:
            row["train_seconds"] = row["epoch"] * (1.0 if record.entry.name == "sgd" else 2.0)
    summary = results.summary().set_index("optimizer")
    rows = results.rows.set_index(["optimizer", "epoch"])["accuracy"]
    assert summary.loc["sgd", "at_equal_time"] == rows["sgd", 3]
    assert summary.loc["kfac", "at_equal_time"] == rows["kfac", 1]


def test_when_a_target_is_reached_first(tmp_path):
    s = settings("sgd,slow=sgd", ["slow.lr=0"], epochs=10, hidden=(16,), seeds=(0, 1))
    results = train(s, tmp_path)
    of = results.rows[results.rows["optimizer"] == "sgd"].groupby("seed")
    target = of["accuracy"].max().min()
    found = results.reaching(target).set_index("optimizer")
    first = [next(r.step for r in mine.itertuples() if r.accuracy >= target) for _, mine in of]
    assert found.loc["sgd", "reached"] == 2 and found.loc["sgd", "step"] == sum(first) / 2
    assert found.loc["slow", "reached"] == 0 and math.isnan(found.loc["slow", "train_seconds"])


def test_seconds_of_a_step_are_split_and_those_of_a_refresh_told(tmp_path):
    clock = Clock()
    for k in range(8):
        part = {"forward": 1.0, "backward": 2.0, "update": 7.0 if k % 2 else 3.0}
        clock.add(sum(part.values()), "statistics+basis" if k % 2 else "", part)
    assert [clock.part(name) for name in ("forward", "backward", "update")] == [1.0, 2.0, 5.0]
    assert clock.refresh_seconds() == 10.0
    again = Clock()
    again.load(clock.state())
    assert again.part("update") == 5.0 and again.refresh_seconds() == 10.0
    assert math.isnan(Clock().refresh_seconds()) and math.isnan(Clock().part("forward"))
    summary = train(settings("sgd,kfac", epochs=4), tmp_path).summary().set_index("optimizer")
    assert (summary[["forward_seconds", "backward_seconds", "update_seconds"]] > 0).all().all()
    assert math.isnan(summary.loc["sgd", "refresh_seconds"])
    assert summary.loc["kfac", "refresh_seconds"] > 0


def test_sgd_against_itself_costs_1_whatever_interrupts_some_of_its_steps():
    clock = Clock()
    seconds = [1.0, 1.0, 1.0, 50.0, 1.0] * 4  # every fifth step waits for another process
    for one in [9.0, 9.0, *seconds]:
        clock.add(one)
    clock.reference = seconds[:10]
    assert clock.steps == 20 and clock.ratio() == 1.0


def test_a_step_that_refreshes_costs_its_share():
    clock = Clock()
    for one in (0.0, 0.0):
        clock.add(one, "basis")  # cold, not timed
    for k in range(30):
        ordinary = 2.0 if k % 7 else 40.0  # interrupted
        clock.add(*((11.0, "statistics+basis") if k % 10 == 0 else (ordinary, "")))
    clock.reference = [1.0, 1.0, 30.0]
    assert clock.ratio() == pytest.approx(0.9 * 2 + 0.1 * 11)
    again = Clock()
    again.load(clock.state())
    assert again.ratio() == clock.ratio() and again.cold


@pytest.mark.parametrize(
    ("name", "options", "kinds"),
    [
        ("sgd", {}, ["", "", "", "", ""]),
        ("tengrad", {}, ["", "", "", "", ""]),
        ("fngd", {"coefficient_steps": 2}, ["coefficients", "coefficients", "", "", ""]),
        (
            "kfac",
            {"statistics_every": 2, "basis_every": 4},
            ["statistics+basis", "", "statistics", "", "statistics+basis"],
        ),
        (
            "ekfac",
            {"statistics_every": 4, "basis_every": 4, "corrections_every": 3},
            ["statistics+basis+corrections", "", "", "corrections", "statistics+basis"],
        ),
        (
            "truncated_kfac",
            {"statistics_every": 2, "basis_every": 4, "switch_step": 3},
            ["curvature+statistics+basis", "curvature", "curvature+statistics", "", ""],
        ),
    ],
)
def test_an_optimizer_says_what_is_due_at_the_next_step(name, options, kinds):
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    if name in ("kfac", "ekfac", "truncated_kfac"):
        options = {**options, "warmup": 0}
    optimizer = optim.create(name, model, **options)
    found = []
    for _ in kinds:
        found.append(due(optimizer))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(6, 4)), torch.arange(6) % 2).backward()
        optimizer.step()
    assert found == kinds


def test_too_few_steps_have_no_ratio_to_sgd_and_the_reason_is_said(tmp_path):
    results = train(settings("sgd,exact", epochs=1, examples=64), tmp_path)
    summary = results.summary()
    assert summary["ratio_to_sgd"].isna().all() and (summary["timed_steps"] == 0).all()
    assert (summary["seconds_per_step"] > 0).all()
    assert "fewer than 8 steps were timed; the first 2" in results.untimed


def test_the_reference_draws_nothing_and_one_slow_step_does_not_move_it(monkeypatch):
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
    reference = SGDReference(model, nn.MSELoss())
    x, y = torch.zeros(2, 3), torch.zeros(2, 3)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    reference.begin()
    reference.turn(x, y)
    assert torch.equal(torch.rand(3), expected)
    spent = iter([9.0, 0.9, 0.1, 0.1, 9.0, 0.9, 0.2, 2.0])  # the first two of a turn are not timed
    monkeypatch.setattr(reference, "_step", lambda x, y: (step := next(spent), step / 10))
    monkeypatch.setattr("fisherlab.experiments.training.cost.ENOUGH", 100.0)
    reference.begin()
    reference.turn(x, y)
    reference.turn(x, y)
    assert reference.seconds_per_step() == pytest.approx(0.15)
    assert reference.worked == pytest.approx([0.01, 0.01, 0.02, 0.2])


def test_the_share_of_shortened_steps_is_a_column(tmp_path):
    wanted = "kfac,free=kfac,sgd"
    bounds = ["kfac.kl_clip=1e-9", "free.kl_clip=none"]
    results = train(settings(wanted, bounds, epochs=1), tmp_path)
    share = results.summary().set_index("optimizer")["clipped_share"]
    assert share["kfac"] == 1 and share["free"] == 0 and pd.isna(share["sgd"])


def test_a_folder_of_before_these_columns_still_loads(tmp_path):
    s = settings("kfac")
    whole = train(s, tmp_path)
    path = tmp_path / whole.records[0].path
    state = checkpoint.load(path)
    for row in state["rows"]:
        row.pop("clipped_share", None)
        row.pop("timed_steps", None)
    checkpoint.save(path, state)
    (row,) = train(s, tmp_path).summary().itertuples()
    assert row.final == whole.summary().loc[0, "final"] and row.timed_steps == 6
    assert row.seconds_per_step > 0 and pd.isna(row.clipped_share)


def test_the_run_folder_holds_config_and_tables(tmp_path):
    s = settings("sgd,kfac")
    results = train(s, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert Settings.from_json(config["settings"]) == s == Settings.load(tmp_path)
    for name in ("rows", "curve", "summary"):
        frame = pd.read_parquet(tmp_path / f"{name}.parquet")
        assert_frame_equal(
            frame,
            getattr(results, name)() if name == "summary" else getattr(results, name),
            check_dtype=False,
        )


def test_settings_of_lists_are_those_of_tuples():
    listed = Settings(**TINY | {"seeds": [1, 2], "hidden": [8], "entries": [*entries("sgd")]})
    paired = Settings(**TINY | {"seeds": (1, 2), "hidden": (8,), "entries": entries("sgd")})
    assert listed == paired and hash(listed.seeds) == hash((1, 2))


def test_a_checkpoint_of_an_earlier_version_has_fewer_settings(tmp_path):
    of = settings("sgd", epochs=1)
    train(of, tmp_path)
    path = tmp_path / "checkpoints" / "sgd-seed0.pt"
    state = checkpoint.load(path)
    for name in "carry", "compare_examples":
        del state["settings"][name]
    for name in "cpu", "cpu_seconds":
        del state["training"][name]
    checkpoint.save(path, state)
    before = train(of, tmp_path).rows
    rows = train(settings("sgd"), tmp_path).rows
    assert len(before) == 2 and len(rows) == 3
    assert_frame_equal(steady(rows[:2]), steady(before))
    # the processor's seconds of the first epoch are not in the checkpoint
    assert math.isnan(rows["train_cpu_seconds"].iloc[-1]) and rows["train_seconds"].iloc[-1] > 0


def test_fngd_and_its_control_part_after_the_first_epoch(tmp_path):
    s = Settings(**TINY, entries=entries("fngd", control=True), epochs=2)
    rows = train(s, tmp_path).rows.pivot(index="epoch", columns="optimizer", values="train_loss")
    assert rows.loc[1, "fngd"] == rows.loc[1, "fngd_control"]
    assert rows.loc[2, "fngd"] != rows.loc[2, "fngd_control"]


def test_blocks_are_compared_in_mid_training(tmp_path):
    s = settings("kfac,sgd", epochs=2, compare_every=1, compare_examples=16)
    frame = train(s, tmp_path).comparisons
    assert set(frame["optimizer"]) == {"kfac"}  # SGD has no blocks
    assert set(frame["step"]) == {3, 6} and set(frame["layer"]) == {"1", "3"}
    assert frame["relative_error"].between(0, 100).all()
    plain = train(settings("kfac,sgd"), tmp_path / "plain")
    assert_same(train(s, tmp_path), plain)  # measuring changes nothing


# Bad input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "assignments", "message"),
    [
        ("kfca", [], "did you mean 'kfac'"),
        ("kfac", ["kfac.dampning=1"], "did you mean 'damping'"),
        (
            "kfac",
            ["kfac.damping=-1"],
            r"\(damping=-1\): damping, .* must be a finite number >= 0, got -1 \(int\)",
        ),
        ("kfac", ["kfac.damping=relative(-1)"], "relative takes a finite number >= 0"),
        ("kfac", ["tekfac.lr=1"], "unknown optimizer in --set 'tekfac'"),
        ("kfac", ["lr=1"], "OPTIMIZER.OPTION=VALUE"),
        ("sgd", ["sgd.lr=-1"], r"sgd \(lr=-1\): lr must be a finite number >= 0, got -1 \(int\)"),
        ("sgd", ["sgd.lr=fast"], "sgd.lr|sgd \\(lr=fast\\)"),
        ("a=sgd,a=adam", [], "one label"),
    ],
)
def test_a_wrong_optimizer_or_option_is_named(wanted, assignments, message):
    with pytest.raises(SettingsError, match=message):
        entries(wanted, assignments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs is at least 1"),
        ({"seeds": (1, 1)}, "seeds are different"),
        ({"data": "digit"}, "did you mean 'digits'"),
        ({"model": "mpl"}, "did you mean 'mlp'"),
        ({"schedule": "linear"}, "unknown schedule"),
        ({"device": "gpu"}, "device 'gpu'"),
        ({"augment": True, "data": "wine"}, "has none"),
        ({"model": "resnet20", "data": "wine", "hidden": None}, "takes images"),
        ({"model": "lstm", "hidden": None}, "does not take 'digits'"),
        ({"validation": 5000}, "leaves none"),
    ],
)
def test_wrong_settings_are_named_before_anything_is_written(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(settings("sgd", **options), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_options_are_parsed_as_numbers_words_and_rules():
    (entry,) = entries("k=kfac", ["k.damping=relative(0.5)", "k.nesterov=true", "k.lr=1e-2"])
    from fisherlab.experiments.training.entries import make

    model = nn.Sequential(nn.Linear(2, 2))
    optimizer = make(entry, model, nn.CrossEntropyLoss(), steps_per_epoch=1, epochs=1)
    (group,) = optimizer.param_groups
    assert group["lr"] == 0.01 and group["nesterov"] is True and callable(group["damping"])
