"""Files: damaged, of other versions, on a full or read-only disk, with odd names and markup."""

from __future__ import annotations

import copy
import errno
import functools
import pickle
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any
from unittest import mock

import pandas as pd
import torch
from torch import nn

import fisherlab as fl
from fisherlab import whole
from fisherlab.comparison import Comparison
from fisherlab.experiments import checkpoint, report
from fisherlab.experiments.rundir import RunDir
from hostile.judge import Case

EXECUTED: list[bool] = []


class Bomb:
    """A pickle that runs code when it is read."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        return EXECUTED.append, (True,)


@functools.cache
def table() -> Comparison:
    state = torch.get_rng_state()
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    torch.set_rng_state(state)
    y = torch.arange(4) % 2
    return fl.compare(model, nn.CrossEntropyLoss(), x, y, approximations=["kfac", "diagonal"])


def harmed(draw: random.Random, content: bytes) -> bytes:
    """Truncated, bit-flipped, emptied, or another file altogether."""
    how = draw.choice(["cut", "flip", "flip", "empty", "text", "binary", "json"])
    if how == "cut":
        return content[: draw.randrange(max(1, len(content) - 1))]
    if how == "flip":
        flipped = bytearray(content)
        for _ in range(draw.choice([1, 3, 20])):
            flipped[draw.randrange(len(flipped))] ^= 1 << draw.randrange(8)
        return bytes(flipped)
    others = {"empty": b"", "text": b"not a table", "binary": bytes(range(256)), "json": b"[1, 2]"}
    return others[how]


def in_folder(act: Callable[[Path], object]) -> object:
    """What it makes of a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        return act(Path(folder))


def damaged(draw: random.Random) -> Case:
    """A file of a run is damaged: refused by name, or read as it stands."""
    name = draw.choice(["comparison.parquet", "config.json", "checkpoint", "claim", "run", "page"])

    def call() -> object:
        return in_folder(lambda folder: read(folder, name, draw))

    return Case(f"damaged {name}", call, lambda found: "" if found is not None else "?")


def read(folder: Path, name: str, draw: random.Random) -> object:
    run = RunDir(folder)
    if name in ("checkpoint", "claim"):
        path = folder / "state.pt"
        checkpoint.save(path, {"weight": torch.ones(3), "step": 3})
        path.write_bytes(harmed(draw, path.read_bytes()))
        return checkpoint.load(path) if name == "checkpoint" else fl.claims.load(path)
    if name in ("run", "page"):
        run.begin({"command": "other", "settings": {}})
        run.write_table("comparison", table().frame)
        path = folder / draw.choice(["config.json", "comparison.parquet"])
        path.write_bytes(harmed(draw, path.read_bytes()))
        return report.page([run]) if name == "page" else (run.config, run.table("comparison"))
    table().save(folder)
    path = folder / name
    path.write_bytes(harmed(draw, path.read_bytes()))
    return Comparison.load(folder)


def bombs(draw: random.Random) -> Case:
    """A pickle in place of a checkpoint is not executed."""

    def call() -> object:
        def act(folder: Path) -> object:
            path = folder / "state.pt"
            if draw.random() < 0.5:
                path.write_bytes(pickle.dumps(Bomb()))
            else:
                torch.save({"format": 1, "weight": Bomb()}, path)
            reader = draw.choice([checkpoint.load, fl.claims.load])
            return reader(path)

        EXECUTED.clear()
        return in_folder(act)

    def after(error: BaseException | None) -> str:
        return "the pickle was executed" if EXECUTED else ""

    return Case("a pickle that runs code", call, None, after=after)


class Full:
    """A stream onto a disk that is full after some bytes."""

    def __init__(self, stream: IO[bytes], left: int) -> None:
        self.stream, self.left = stream, left

    def __enter__(self) -> Full:
        return self

    def __exit__(self, *error: object) -> None:
        self.stream.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, content: bytes) -> int:
        self.left -= len(content)
        if self.left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.stream.write(content)


def disks(draw: random.Random) -> Case:
    """A full disk: the error names the file, the old one is whole, nothing else is left."""
    what = draw.choice(["table", "comparison", "checkpoint", "page", "config"])
    left = draw.choice([0, 10, 100])
    complaints: list[str] = []
    opened = Path.open

    def full(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        stream = opened(path, mode, *args, **options)
        return Full(stream, left) if path.suffix == ".part" else stream

    def act(folder: Path) -> object:
        run = RunDir(folder)
        run.begin({"command": "other", "settings": {}})
        run.write_table("comparison", table().frame)
        checkpoint.save(folder / "state.pt", {"step": 1})
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        acts: dict[str, Callable[[], object]] = {
            "table": lambda: run.write_table("comparison", table().frame),
            "config": lambda: run.write_config({"command": "x"}),
            "checkpoint": lambda: checkpoint.save(folder / "state.pt", {"w": torch.ones(99)}),
            "page": lambda: report.write(run),
            "comparison": lambda: whole.write(folder / "comparison.csv", "x" * 1000),
        }
        try:
            with mock.patch.object(Path, "open", full):
                return acts[what]()
        finally:
            now = {path.name: path.read_bytes() for path in folder.iterdir()}
            if now != before:
                complaints.append(f"changed: {[k for k in now if now[k] != before.get(k)]}")

    def after(error: BaseException | None) -> str:
        if complaints:
            return complaints[0]
        if not isinstance(error, OSError) or not error.filename:
            return f"{error!r} names no file"
        return ""

    return Case(f"full disk, {what}", lambda: in_folder(act), None, after=after)


ODD = ("<b>x</b>", "a b", "ü", "a'b\"c", "&amp;", "<script>alert(1)</script>", "%s{}")


def names(draw: random.Random) -> Case:
    """Odd names of folders, titles, layers and methods."""
    odd = draw.choice(ODD)

    def act(folder: Path) -> object:
        run = RunDir(folder / odd.replace("/", "_"))
        run.begin({"command": "other", "title": odd, "settings": {odd: odd}, "notes": [odd]})
        frame = table().frame.assign(layer=odd, approximation=odd, note=odd)
        run.write_table("comparison", frame)
        text = report.write(run).read_text(encoding="utf-8")
        assert not list(run.folder.glob(".*.part"))
        again = Comparison.load(Comparison(frame).save(folder / "saved"))
        pd.testing.assert_frame_equal(again.frame, frame)
        markup = Comparison(frame)._repr_html_()
        return text + (markup or "")

    def check(found: object) -> str:
        return f"{odd} as it is" if "<" in odd and odd in str(found) else ""

    return Case(f"names such as {odd}", lambda: in_folder(act), check)


def copies(draw: random.Random) -> Case:
    """A comparison through a folder and back is the same bytes."""

    def act(folder: Path) -> object:
        one = copy.deepcopy(table()).save(folder / "a")
        two = Comparison.load(one).save(folder / "b")
        return all(
            (one / name).read_bytes() == (two / name).read_bytes()
            for name in ("comparison.csv", "config.json")
        )

    return Case("saved, read, saved", lambda: in_folder(act), lambda same: "" if same else "other")


def case(seed: int) -> Case:
    draw = random.Random(seed)
    return draw.choice([damaged, damaged, bombs, disks, names, copies])(draw)
