"""A folder that holds one run: refused if another is in it, and readable at any moment."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from fisherlab import comparison, doors, whole
from fisherlab.experiments.typed import TYPED
from fisherlab.metrics import GramStudy

CONFIG = "config.json"
FIGURES = "figures"
REPORT = "report.html"
GRAMS = "grams.npz"
COUNTEREXAMPLES = "counterexamples"


# Entries of a config.json that pages and commands read.
FORM: dict[str, type] = {
    **dict.fromkeys(("command", "title", "status"), str),
    **dict.fromkeys(("settings", "grid", "typed", "versions"), dict),
    "notes": list,
}


class RunDirError(ValueError):
    """A folder that cannot take a run, or holds none."""


class RunDir:
    """The folder of one run; every file in it is whole or absent."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = doors.place(folder, "folder", error=RunDirError)
        self._held: whole.Held | None = None

    def check(self, overwrite: bool = False, tables: tuple[str, ...] = ()) -> None:
        """Refuse a folder that is a file, or holds a run that may not be overwritten."""
        if self.folder.exists() and not self.folder.is_dir():
            raise RunDirError(f"{self.folder} is a file; name a folder for the run")
        there = [path.name for path in self._files(tables) if path.exists()]
        if there and not overwrite:
            raise RunDirError(
                f"{self.folder} already holds a run ({', '.join(there)}); "
                "pass --overwrite to replace it, or another --out"
            )

    def check_command(self, command: str) -> None:
        """Refuse a folder that holds a run of another command, whose config it would replace."""
        if (self.folder / CONFIG).is_file():
            there = self.config.get("command", command)
            if there != command:
                raise RunDirError(
                    f"{self.folder} holds a run of `fisherlab {there}`; give another folder"
                )

    def begin(self, config: dict[str, Any], tables: tuple[str, ...] = ()) -> None:
        """Clear what an earlier run left, and write down what this one is before it starts."""
        self._held = whole.hold(self.folder)
        whole.sweep_parts(self.folder)
        for path in self._files(tables):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        self.write_config({**config, "status": "running"})

    def write_config(self, config: dict[str, Any]) -> None:
        """`config.json`: what reruns the run, on what it ran, and how it ended."""
        typed = {} if (told := TYPED.get()) is None else {"typed": told}
        content = json.dumps(config | typed | {"versions": versions()}, indent=2, default=str)
        whole.write(self.folder / CONFIG, content + "\n")

    def write_table(self, name: str, frame: pd.DataFrame) -> None:
        """`name.csv` and `name.parquet`."""
        whole.write(self.folder / f"{name}.csv", frame.to_csv(index=False))
        whole.write_table(self.folder / f"{name}.parquet", frame)

    def write_grams(self, studies: Mapping[int, GramStudy]) -> None:
        """`grams.npz`: the Gram matrices of the batch by training step."""
        arrays: dict[str, Any] = {
            f"{step}/{name}": array
            for step, study in studies.items()
            for name, array in study.arrays().items()
        }
        write = lambda stream: np.savez_compressed(stream, **arrays)  # noqa: E731
        whole.write(self.folder / GRAMS, write)

    def grams(self) -> dict[int, GramStudy]:
        """The studies that `write_grams` wrote, by step; nothing where it was not called."""
        path = self.folder / GRAMS
        if not path.is_file():
            return {}
        return whole.read(path, _studies, "file of Gram matrices", RunDirError)

    @property
    def config(self) -> dict[str, Any]:
        """The content of `config.json`; `RunDirError` where there is none."""
        path = self.folder / CONFIG
        if not path.is_file():
            raise RunDirError(f"{self.folder} holds no run: there is no {CONFIG} in it")
        found = whole.read_json(path, RunDirError)
        for key, kind in FORM.items():
            nothing = found.get(key) is None and (key not in found or kind is str)
            if not nothing and not isinstance(found[key], kind):
                raise RunDirError(
                    f"{path} is damaged: its {key!r} is {doors.said(found[key])}, no "
                    f"{kind.__name__}; run it again"
                )
        return found

    def table(self, name: str) -> pd.DataFrame | None:
        """A table of the run; None if it has not been written."""
        path = self.folder / f"{name}.parquet"
        if not path.is_file():
            return None
        return whole.read_table(path, RunDirError)

    def _files(self, tables: tuple[str, ...]) -> list[Path]:
        names = [f"{name}{end}" for name in tables for end in (".csv", ".parquet", ".json")]
        others = (GRAMS, REPORT, FIGURES, COUNTEREXAMPLES)
        return [self.folder / name for name in (CONFIG, *names, *others)]


def _studies(path: Path) -> dict[int, GramStudy]:
    steps: dict[int, dict[str, np.ndarray]] = {}
    with np.load(path, allow_pickle=False) as arrays:
        for key in arrays:
            step, name = key.split("/")
            steps.setdefault(int(step), {})[name] = arrays[key]
    return {step: GramStudy.of_arrays(steps[step]) for step in sorted(steps)}


def versions() -> dict[str, str]:
    """The versions and the machine that numbers depend on."""
    return comparison.versions() | {
        "numpy": np.__version__,
        "pandas": pd.__version__,
        "machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
    }
