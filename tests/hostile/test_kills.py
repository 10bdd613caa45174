"""Commands that are killed at random, begun again, and end with what they give unharmed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parents[2]
TRAIN = ["train", "--data", "digits", "--model", "mlp", "--optimizer", "kfac,sgd", "--epochs", "2"]
COMPARE = ["compare", "--data", "digits", "--model", "mlp", "--epochs", "1", "--overwrite"]
SWEEP = ["sweep", "--data", "digits", "--model", "mlp", "--optimizer", "sgd", "--epochs", "1"]
VERIFY = ["verify", "tekfac", "--trials", "10", "--overwrite"]
# a command, the option that names its folder, and the tables that are compared
COMMANDS = {
    "train": ([*TRAIN, "--out"], ["rows.csv", "summary.csv"]),
    "compare": ([*COMPARE, "--approximations", "kfac,ekfac", "--out"], ["comparison.csv"]),
    "sweep": ([*SWEEP, "--grid", "sgd.lr=0.1,0.01", "--out"], ["final/rows.csv"]),
    "verify": ([*VERIFY, "--out"], ["claims.parquet"]),
    "reproduce": (["reproduce", "ang", "fig2", "--out"], ["verdicts.csv"]),
}
KILLS = 5


def ended(words: list[str], temporary: Path, after: float | None = None) -> tuple[int, float]:
    """The exit code of a command and its seconds; it is killed `after` some."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(temporary)}
    start = time.monotonic()
    job = subprocess.Popen(
        [sys.executable, "-m", "fisherlab", *words],
        env=environment | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        job.wait(after)
    except subprocess.TimeoutExpired:
        job.send_signal(signal.SIGKILL)
        job.wait()
    return job.returncode, time.monotonic() - start


# of columns that hold seconds, or ratios of them
CLOCKS = ("second", "_ms", "time", "ratio_to_sgd")


def table(path: Path) -> pd.DataFrame:
    """A table without its clocks."""
    frame = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
    clocks = [name for name in frame if any(w in name for w in CLOCKS)]
    return frame.drop(columns=clocks)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_that_is_killed_ends_as_it_would_have(name: str, tmp_path: Path) -> None:
    words, tables = COMMANDS[name]
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    code, seconds = ended([*words, str(whole)], temporary)
    assert code in (0, 1)
    draw = random.Random(name)
    for _ in range(KILLS):
        ended([*words, str(killed)], temporary, draw.uniform(0.1, 1.0) * seconds)
        ended(["report", str(killed)], temporary, draw.uniform(0.1, 1.0) * seconds)
    assert ended([*words, str(killed)], temporary)[0] == code
    for path in tables:
        pd.testing.assert_frame_equal(table(killed / path), table(whole / path))
    assert ended(["report", str(killed)], temporary)[0] == 0
    assert not list(killed.rglob("*.part"))
    left = [path.name for path in temporary.iterdir()]
    assert not left
    files = [{p.relative_to(f) for p in f.rglob("*") if p.is_file()} for f in (killed, whole)]
    assert files[0] >= files[1]
