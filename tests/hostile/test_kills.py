"""Commands that are killed at random, begun again, and end with what they give unharmed."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from conftest import THEIRS

from fisherlab.experiments.columns import steady

ROOT = Path(__file__).parents[2]
TRAIN = ["train", "--data", "digits", "--model", "mlp", "--optimizer", "kfac,sgd", "--epochs", "2"]
COMPARE = ["compare", "--data", "digits", "--model", "mlp", "--epochs", "1", "--overwrite"]
SWEEP = ["sweep", "--data", "digits", "--model", "mlp", "--optimizer", "sgd", "--epochs", "1"]
VERIFY = ["verify", "kfac_keeps_the_trace", "tekfac_keeps_the_trace", "--overwrite"]
# a command, the option that names its folder, and the tables that are compared
COMMANDS = {
    "train": ([*TRAIN, "--out"], ["rows.csv", "curve.csv", "summary.csv"]),
    "compare": ([*COMPARE, "--approximations", "kfac,ekfac", "--out"], ["comparison.csv"]),
    "sweep": ([*SWEEP, "--grid", "sgd.lr=0.1,0.01", "--out"], ["final/rows.csv"]),
    "verify": ([*VERIFY, "--out"], ["claims.parquet"]),
    "reproduce": (["reproduce", "ang", "fig2", "--out"], ["verdicts.csv"]),
}
# of each command and of its report: 50 in all
KILLS, REPORTS = 7, 3


class Killer:
    """Runs commands, with a folder of their own for temporary files, and kills some."""

    def __init__(self, folder: Path, draw: random.Random) -> None:
        self.temporary, self.draw = folder, draw
        folder.mkdir()

    def run(self, words: list[str], after: float | None = None) -> int:
        """The exit code; a command that is still running `after` some seconds is killed."""
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(self.temporary)}
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
        return job.returncode

    def kill(self, words: list[str], seconds: float) -> int:
        """The exit code of a command that is killed at a random moment of its seconds."""
        return self.run(words, self.draw.uniform(0.2, 1.0) * seconds)


def table(path: Path) -> pd.DataFrame:
    return steady(pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path))


def files(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_that_is_killed_ends_as_it_would_have(name: str, tmp_path: Path) -> None:
    words, tables = COMMANDS[name]
    killer = Killer(tmp_path / "temporary", random.Random(name))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    begun = time.monotonic()
    code = killer.run([*words, str(whole)])
    seconds = time.monotonic() - begun
    assert code in (0, 1)

    def ended() -> None:
        """The run is what it is without a kill, to the last bit."""
        for path in tables:
            found, wanted = table(killed / path), table(whole / path)
            if name == "verify":  # the digits that rounding leaves, which no run repeats
                pd.testing.assert_series_equal(found.pop("margin"), wanted.pop("margin"), atol=0.5)
            pd.testing.assert_frame_equal(found, wanted, check_exact=True)
        assert files(killed) == files(whole)

    kills = 0
    while kills < KILLS:
        found = killer.kill([*words, str(killed)], seconds)
        if found == -signal.SIGKILL:
            kills += 1
            continue
        assert found == code
        ended()
        shutil.rmtree(killed)
    assert killer.run([*words, str(killed)]) == code
    ended()
    begun = time.monotonic()
    assert killer.run(["report", str(whole)]) == 0
    seconds = time.monotonic() - begun
    kills = 0
    for _ in range(10 * REPORTS):
        kills += killer.kill(["report", str(killed)], seconds) == -signal.SIGKILL
        if kills == REPORTS:
            break
    assert kills == REPORTS
    assert killer.run(["report", str(killed)]) == 0
    ended()
    left = [path.name for path in killer.temporary.iterdir()]
    assert not [name for name in left if not name.startswith(THEIRS)]
