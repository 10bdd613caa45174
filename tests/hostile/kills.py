"""Commands that are ended from outside at random, begun again, and held to what they give unharmed.

`PYTHONPATH=tests python -m hostile.kills 2> kills.log` runs a campaign, of which `--page kills.log`
prints the page. Two unharmed runs say which files hold clocks; the others are compared by bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from conftest import THEIRS

from fisherlab.experiments.columns import CLOCKS, steady

ROOT = Path(__file__).parents[2]
NET = "--data iris --model mlp --hidden 8"
COMPARED = "--epochs 1 --at end --compare-examples 8 --reference 16 --dampings 0.1"
COMMANDS = {
    "train": f"train {NET} --optimizer kfac,sgd --epochs 4 --out run",
    "sweep": f"sweep {NET} --optimizer sgd --grid sgd.lr=0.1,0.01 --epochs 1 --validation 30 "
    "--final-epochs 2 --seeds 2 --out run",
    "compare": f"compare {NET} {COMPARED} --approximations kfac,ekfac --overwrite --out run",
    "reproduce": "reproduce ang fig2 --out run",
    "reproduce --jobs 2": "reproduce ngm fig2b --jobs 2 --out run",
    "verify": "verify kfac_keeps_the_trace tekfac_keeps_the_trace --overwrite --out run",
    "report": "report run",
}
# what a command needs in its folder before it begins
BEFORE = {"report": COMMANDS["compare"]}
# a drawn signal, with the exit codes that it may leave
SIGNALS = {
    signal.SIGKILL: (-signal.SIGKILL,),
    signal.SIGTERM: (143,),
    signal.SIGINT: (130,),
}
# the last run of a killed folder may take this long before it counts as stuck
STUCK = 1800.0


@dataclass(frozen=True)
class Killed:
    """One kill: the drawn signal and moment, what had been written, and how it all ended."""

    command: str
    seed: int
    signal: str
    share: float  # of the unharmed run's seconds, when the signal came
    at: str  # imports, running or writing
    code: int
    said: str
    fault: str  # "" where nothing was lost

    def __str__(self) -> str:
        where = f"{self.signal} at {self.share:.0%} ({self.at})"
        return f"{self.command} seed {self.seed}: {where}: {self.fault or 'identical'}"


class Folder:
    """A folder in which a command runs as `run`, with temporary files of its own."""

    def __init__(self, path: Path) -> None:
        self.path, self.run = path, path / "run"
        self.temporary = path / "temporary"
        self.temporary.mkdir(parents=True)

    def start(self, words: str) -> subprocess.Popen[str]:
        environment = {**os.environ, "TMPDIR": str(self.temporary), "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        return subprocess.Popen(
            [sys.executable, "-m", "fisherlab", *words.split()],
            cwd=self.path,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self, words: str) -> tuple[int, str]:
        """The exit code of a run that nobody disturbs, and what it said last."""
        job = self.start(words)
        said = job.communicate(timeout=STUCK)[1]
        return job.returncode, said

    def files(self) -> dict[str, Path]:
        found = {str(p.relative_to(self.path)): p for p in self.path.rglob("*") if p.is_file()}
        return {name: path for name, path in found.items() if THEIRS[0] not in name}

    def clear(self) -> None:
        shutil.rmtree(self.path)


class Campaign:
    """The kills of one command."""

    def __init__(self, command: str, folder: Path) -> None:
        self.command, self.words, self.folder = command, COMMANDS[command], folder
        self.before = None
        if command in BEFORE:
            self.before = Folder(folder / "before")
            code, said = self.before.finish(BEFORE[command])
            assert code == 0, said
        twins = [self.fresh(name) for name in ("whole", "twin")]
        begun = time.monotonic()
        self.code, said = twins[0].finish(self.words)
        self.seconds = time.monotonic() - begun
        assert self.code in (0, 1), said
        twins[1].finish(self.words)
        one, two = twins[0].files(), twins[1].files()
        assert one.keys() == two.keys()
        self.whole, self.clocked = one, set()
        for name in one:
            if one[name].read_bytes() != two[name].read_bytes():
                self.clocked.add(name)
                assert steady_view(one[name]) == steady_view(two[name]), name

    def fresh(self, name: str) -> Folder:
        found = Folder(self.folder / name)
        if self.before is not None:
            shutil.copytree(self.before.run, found.run)
        return found

    def kill(self, seed: int) -> Killed:
        """One run, ended at a random moment, and its fault once the command has run again."""
        draw = random.Random(f"{self.command} {seed}")
        sent = draw.choices(list(SIGNALS), (6, 1, 1))[0]
        in_a_write = draw.random() < 0.3
        for _ in range(20):
            folder = self.fresh(f"seed{seed}")
            job, begun = folder.start(self.words), time.monotonic()
            if in_a_write:
                ended = _until_a_write(job, folder, draw.randrange(12))
            else:
                ended = _until(job, draw.random() * self.seconds)
            if not ended:
                job.send_signal(sent)
                break
            job.communicate()
            folder.clear()
        share = (time.monotonic() - begun) / self.seconds
        parts = any(".part" in name for name in folder.files())
        at = "writing" if parts else "running" if _has_begun(folder, self.before) else "imports"
        said = job.communicate(timeout=STUCK)[1]
        faults = [*self.ended(job.returncode, sent, said)]
        code, told = folder.finish(self.words)
        if code != self.code:
            faults.append(f"the next run ended with {code}: {told[-300:]}")
        faults += self.differences(folder)
        if not faults:
            folder.clear()
        return Killed(
            self.command, seed, sent.name, share, at, job.returncode, said, "; ".join(faults)
        )

    def ended(self, code: int, sent: signal.Signals, said: str) -> Iterator[str]:
        """Faults of the way in which the run ended."""
        if sent is signal.SIGKILL or code == self.code:
            return
        if code not in SIGNALS[sent]:
            yield f"{sent.name} left exit code {code}: {said[-300:]}"
        if "Traceback" in said or not said.strip():
            yield f"{sent.name} said {said[-300:]!r}"

    def differences(self, folder: Folder) -> Iterator[str]:
        """Files that are others than those of an unharmed run."""
        mine = folder.files()
        if lost := sorted(self.whole.keys() - mine.keys()):
            yield f"lost: {', '.join(lost)}"
        if left := sorted(mine.keys() - self.whole.keys()):
            yield f"left over: {', '.join(left)}"
        for name in sorted(mine.keys() & self.whole.keys()):
            view = steady_view if name in self.clocked else Path.read_bytes
            if view(mine[name]) != view(self.whole[name]):
                yield f"{name} is another"


def _until(job: subprocess.Popen[str], seconds: float) -> bool:
    """Whether the job ended by itself within some seconds."""
    try:
        job.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _until_a_write(job: subprocess.Popen[str], folder: Folder, number: int) -> bool:
    """Whether the job ended by itself before its write of this number had begun."""
    seen: set[str] = set()
    while job.poll() is None:
        for path in folder.run.rglob("*"):
            if path.name.endswith((".part", "-journal", "-wal")):
                seen.add(f"{path} {path.stat().st_ino if path.exists() else 0}")
        if len(seen) > number:
            return False
        time.sleep(0.001)
    return True


def _has_begun(folder: Folder, before: Folder | None) -> bool:
    return folder.run.exists() and (before is None or folder.files() != before.files())


def steady_view(path: Path) -> Any:
    """The content of a file without its clocks, in a form that `==` compares."""
    if path.suffix in (".csv", ".parquet"):
        frame = pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)
        return steady(frame).to_json(double_precision=15, orient="split")
    if path.suffix == ".pt":
        return _plain(torch.load(path, weights_only=True))
    if path.suffix == ".json":
        return _plain(json.loads(path.read_text()))
    if path.suffix == ".db":
        with sqlite3.connect(path) as database:
            (sound,) = database.execute("PRAGMA integrity_check").fetchone()
            rows = database.execute(
                "SELECT value_json FROM trial_user_attributes WHERE key='point'"
            )
            return sound, sorted(row[0] for row in rows)
    if path.suffix in (".html", ".md"):  # pictures and numbers may be clocks
        text = re.sub(r"base64,[^\"]+", "", path.read_text())
        return re.sub(r"[\d.,e+–-]+", "#", re.sub(r"data-key=\"[^\"]*\"", "", text))
    return path.read_bytes()[:4]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: _plain(each)
            for key, each in value.items()
            if key not in ("clock", "cpu", "seal") and not any(word in str(key) for word in CLOCKS)
        }
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.tolist()
    return "nan" if value != value else value


def killed(command: str, seeds: range, folder: Path) -> list[Killed]:
    """The kills of one command, each printed."""
    campaign = Campaign(command, folder)
    found = []
    for seed in seeds:
        found.append(campaign.kill(seed))
        print(found[-1], file=sys.stderr, flush=True)
    return found


LINE = re.compile(
    r"(?P<command>.+) seed \d+: (?P<signal>SIG\w+) at \d+% \((?P<at>\w+)\): (?P<end>.+)"
)
RANKS = re.compile(r"(?P<world>\d) ranks, (?P<what>\w+), seed \d+: (?P<end>.+)")
PAGE = """\
# Kills

Commands and ranks that are ended from outside at random moments, begun again, and compared with an
unharmed run. Files are compared by their bytes; where two unharmed runs differ, without their
clocks (`fisherlab.experiments.columns.CLOCKS`). Nothing may be left over: no half-written file, no
lock, no journal of a database.

## Commands

SIGKILL at any moment; SIGTERM and SIGINT end with 143 and 130, a message, and what was done.

| command | kills | before a file | running | writing | of it SIGTERM, SIGINT | identical |
| --- | ---: | ---: | ---: | ---: | ---: | ---: |
{commands}

{faults}

## Ranks

One rank of a gloo job is killed before, in or after one of its collectives. The others name it, and
the job begun again goes on from its checkpoint to the same parameters: to the bits with two ranks,
to a rounding with four, whose gradients DDP adds in an order that a restart changes.

| ranks | kills | identical | of |
| ---: | ---: | ---: | --- |
{ranks}

`PYTHONPATH=tests python -m hostile.kills` and `python -m hostile.deaths` write the log of a
campaign; `python -m hostile.kills --page LOG` makes this page of it.
"""


def page(log: str) -> str:
    """The page of the docs, from the lines of campaigns."""
    kills = [found.groupdict() for line in log.splitlines() if (found := LINE.fullmatch(line))]
    died = [found.groupdict() for line in log.splitlines() if (found := RANKS.fullmatch(line))]
    rows: dict[str, list[str]] = {"commands": [], "ranks": []}
    for command in [*COMMANDS, None]:
        mine = [kill for kill in kills if command in (None, kill["command"])]
        at, signals = (Counter(kill[key] for kill in mine) for key in ("at", "signal"))
        identical = sum(kill["end"] == "identical" for kill in mine)
        numbers = [len(mine), at["imports"], at["running"], at["writing"]]
        numbers += [len(mine) - signals["SIGKILL"], identical]
        rows["commands"].append(f"| {command or 'all'} | {' | '.join(map(str, numbers))} |")
    for world in sorted({death["world"] for death in died}):
        ours = [death for death in died if death["world"] == world]
        identical = sum(death["end"] == "identical" for death in ours)
        works = ", ".join(sorted({death["what"] for death in ours}))
        rows["ranks"].append(f"| {world} | {len(ours)} | {identical} | {works} |")
    faults = [f"* {kill['command']}, {kill['signal']}: {kill['end'][:160]}" for kill in kills
              if kill["end"] != "identical"]  # fmt: skip
    rows["faults"] = ["What was not identical, as that run said it:", "", *faults] if faults else []
    return PAGE.format(**{name: "\n".join(lines) for name, lines in rows.items()})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=8, help="of each command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commands", nargs="*", default=COMMANDS)
    parser.add_argument("--folder", type=Path, help="keeps what ended badly")
    parser.add_argument("--page", type=Path, help="print the page of this log, and kill nothing")
    asked = parser.parse_args()
    if asked.page is not None:
        print(page(asked.page.read_text()), end="")
        return
    folder = asked.folder or Path(tempfile.mkdtemp())
    for command in asked.commands:
        killed(command, range(asked.seed, asked.seed + asked.kills), folder / command)


if __name__ == "__main__":
    main()
