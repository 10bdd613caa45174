"""Two processes give what one gives for the joint batch; what cannot work together is refused."""

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import ranks
import torch
from torch import multiprocessing, nn
from typer.testing import CliRunner

import fisherlab as fl
from fisherlab.cli import app
from fisherlab.optim import NaturalGradient

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each rank found."""
    folder = tmp_path_factory.mktemp("ranks")
    return found_by(ranks.WORLD, folder)


def found_by(world, folder):
    multiprocessing.spawn(ranks.work, (str(folder), world), nprocs=world)
    return [torch.load(folder / f"{r}.pt", weights_only=False) for r in range(world)]


@pytest.fixture(scope="module")
def alone():
    return ranks.comparisons()


def test_ranks_add_gather_broadcast_and_share(found):
    for rank, one in enumerate(found):
        pieces = one["pieces"]
        assert pieces["sum"]["x"].tolist() == [3.0, 3.0] and pieces["sum"]["n"] == 6
        assert pieces["sum"]["x"].dtype == torch.float32
        assert pieces["gather"].tolist() == [[0, 1, 1]] * 2
        assert pieces["to"].tolist() == ([0, 1] if rank == 1 else [0])
        assert pieces["broadcast"]["a"][0].tolist() == [[1.0] * 3] * 2
        assert pieces["broadcast"]["a"][1] == "text" and pieces["broadcast"]["b"] == 1
        assert pieces["owners"] == {"a": 0, "b": 1, "c": 1, "d": 1}
    assert [one["pieces"]["rows"] for one in found] == [slice(0, 3), slice(3, 7)]


@pytest.mark.parametrize("cut", ranks.CUTS)
@pytest.mark.parametrize("kind", ["exact", "mc", "empirical"])
def test_compare_of_shards_is_that_of_the_joint_batch(found, alone, kind, cut):
    expected = alone[f"{kind}-{cut}"]
    clocks = ["build_seconds", "decompose_seconds", "shared_seconds", "solve_seconds"]
    for one in found:
        frame = one["comparisons"][f"{kind}-{cut}"]
        assert list(frame["layer"]) == list(expected["layer"])
        for column in expected.columns.drop(clocks):
            ours, theirs = frame[column], expected[column]
            if ours.dtype.kind != "f":
                assert list(ours) == list(theirs), column
                continue
            assert (ours.isna() == theirs.isna()).all(), column
            gap = ((ours - theirs).abs() / theirs.abs().clip(lower=1.0)).max()
            assert not gap > 1e-10, (column, gap)


@pytest.mark.parametrize("name", ranks.OPTIMIZERS)
def test_ddp_steps_are_those_of_the_joint_batch(found, name):
    expected = ranks.trained(name)
    moved = (expected - torch.cat([p.flatten() for p in ranks.net().parameters()])).abs().max()
    assert moved > 1e-3
    for one in found:
        assert (one["trained"][name] - expected).abs().max() < 1e-10
        assert torch.equal(one["trained"][name], found[0]["trained"][name])


@pytest.mark.slow
def test_four_ranks_are_one_process(alone, tmp_path):
    found = found_by(4, tmp_path)
    for kind in ("exact", "mc", "empirical"):
        for cut in ranks.CUTS:
            test_compare_of_shards_is_that_of_the_joint_batch(found, alone, kind, cut)
    for name in ranks.OPTIMIZERS:
        test_ddp_steps_are_those_of_the_joint_batch(found, name)


def test_unequal_batches_with_scaled_losses_take_the_joint_step(found):
    model = ranks.net()
    opt = NaturalGradient(model, fl.KFAC(), lr=0.1, damping=0.1)
    x, y = ranks.data(n=8)
    nn.functional.cross_entropy(model(x), y).backward()
    opt.step()
    expected = torch.cat([p.detach().flatten() for p in model.parameters()])
    for one in found:
        assert (one["scaled"] - expected).abs().max() < 1e-10


@pytest.mark.parametrize(
    ("case", "parts"),
    [
        ("other weights", ["'0.weight' is of one value on rank 0 and of another on rank 1"]),
        ("other version", ["run different versions: fisherlab", "on rank 0", "on rank 1"]),
        ("changed since", ["'0.bias' is of one value on rank 0 and of another on rank 1"]),
        ("other shapes", ["'4.weight' is (5, 12)", "on rank 0 and (4, 12)", "on rank 1"]),
        ("other dampings", ["different comparisons: dampings 0.1 on rank 0 and 0.2 on rank 1"]),
        ("other seed", ["different comparisons: generator", "on rank 0", "on rank 1"]),
        ("other criterion", ["different comparisons: criterion", "label_smoothing=0.1) on rank 1"]),
        ("other module", ["different models: module '1' Tanh(", "on rank 0 and ReLU("]),
        ("other order", ["layers in different orders: ['a.weight', ", "on rank 1"]),
        ("other class", ["different optimizers: the class NaturalGradient on rank 0 and TENGraD"]),
        ("other method", ["different optimizers: approximation KFAC(", "rank 0 and EKFAC("]),
        ("other layers", ["different optimizers: skip None on rank 0 and ['4'] on rank 1"]),
        ("other checkpoint", ["different optimizers: steps 0 on rank 0 and 1 on rank 1"]),
        ("other way", ["rank 0 is at layer 'b' of step 0", "rank 1 at layer 'a' of step 0"]),
        ("no example in a step", ["rank 1 has no example", "give every rank at least one"]),
        ("no example in a backward", ["rank 1 has no example", "give every rank at least one"]),
        ("no example in the second phase", ["rank 1 has no example", "no parameter was changed"]),
        ("no example of an expert", ["rank 0 is at layer 'expert'", "rank 1 at the end of a pass"]),
        ("unequal in the second phase", ["1/14 on rank 0 and 1/10 on rank 1", "drop_last"]),
        ("reconstructed", ["a reconstructed network is not data-parallel", "fl.SNGD()"]),
        ("loaders", ["[1, 2] batches", "the same number"]),
        ("not parallel", ["KBFGSOptimizer is not data-parallel", "NaturalGradient"]),
        ("fsdp", ["parameter '0.weight' is sharded (FSDP)", "DistributedDataParallel"]),
        (
            "unequal kfac",
            ["DDP averages ranks, not examples", "1/5 on rank 0 and 1/3 on rank 1", "drop_last"],
        ),
        ("unequal tengrad", ["DDP averages ranks, not examples"]),
    ],
)
def test_ranks_that_cannot_work_together_are_refused(found, case, parts):
    for one in found:
        message = one["refused"][case]
        assert all(part in message for part in parts), message


def test_a_rank_that_is_late_is_named_within_the_timeout_of_the_group(found):
    said = found[0]["late"]
    assert "died, is late" in said and "rank 0 waited" in said and "Ranks 1 failed" in said


@pytest.mark.parametrize(
    ("case", "doing", "said"),
    [
        ("bad batch", "checking its batch", "x has NaN or inf entries, first in row 2"),
        ("no example", "checking its batch", "x is an empty batch"),
        ("nan outputs", "comparing", "the model's outputs have NaN or inf entries"),
    ],
)
def test_a_failure_on_one_rank_stops_every_rank_and_is_named(found, case, doing, said):
    first, second = (one["refused"][case] for one in found)
    assert first == f"rank 1 failed while {doing}: CaptureError: {second}"
    assert second.startswith(said)


def test_without_a_process_group_there_are_no_ranks(monkeypatch):
    for name in ("WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    assert fl.distributed.Ranks.current() is None
    assert fl.distributed.start() is None


def torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*command, "--nproc-per-node", "2", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_job_with_its_name(tmp_path):
    script = tmp_path / "job.py"
    script.write_text(
        "import fisherlab as fl\n"
        "ranks = fl.distributed.start()\n"
        "if ranks.index == 1:\n    raise SystemExit(3)\n"
        "ranks.objects(0)\n"
    )
    job = torchrun(script)
    assert job.returncode != 0
    assert "rank      : 1" in job.stderr and "exitcode  : 3" in job.stderr


@pytest.mark.slow
def test_the_command_under_torchrun_is_the_command(tmp_path):
    options = (
        "compare --approximations kfac,ekfac --epochs 0 --at start --compare-examples 33".split()
    )
    options += ["--reference", "40", "--dampings", "0.1", "--out"]
    one, two = tmp_path / "one", tmp_path / "two"
    job = torchrun("-m", "fisherlab", *options, two)
    assert job.returncode == 0, job.stderr
    assert job.stdout.count("report:") == 1  # one rank speaks
    alone = CliRunner().invoke(app, [*options, str(one)])
    assert alone.exit_code == 0, alone.output
    ours, theirs = (pd.read_csv(folder / "comparison.csv") for folder in (one, two))
    for column in ("relative_error", "population_error", "trace_ratio", "direction_cosine"):
        assert (ours[column] - theirs[column]).abs().max() < 1e-8, column
