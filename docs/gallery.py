"""The pictures of docs/pictures.md that no notebook draws, from two small runs on digits.

`python docs/gallery.py` makes them anew.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import fisherlab as fl
from fisherlab.comparison import Comparison
from fisherlab.experiments.rundir import RunDir

IMAGES = Path(__file__).parent / "images"
DPI = 100  # 690 pixels across


def run(command: str, folder: Path, *options: str) -> RunDir:
    """A command of the command line, and the folder that it leaves."""
    call = [sys.executable, "-m", "fisherlab", command, "--data", "digits", *options]
    subprocess.run([*call, "--out", str(folder)], check=True)
    return RunDir(folder)


def draw(compared: RunDir, trained: RunDir) -> None:
    """One picture per function, under its name."""
    table = Comparison(compared.table("comparison"), compared.config)
    rows, curve = trained.table("rows"), trained.table("curve")
    figures = {
        "trace_ratio": fl.plots.trace_ratio(table),
        "cost": fl.plots.cost(table),
        "dropped_over_training": fl.plots.dropped_over_training(compared.grams()),
        "training_curves": fl.plots.training_curves(rows, curve, "accuracy"),
        "training_cost": fl.plots.training_cost(trained.table("summary"), "accuracy"),
    }
    for name, figure in figures.items():
        (IMAGES / f"{name}.png").write_bytes(figure.png(DPI))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        methods = "kfac,tekfac,ekfac,tkfac,shampoo,adam,sgd"
        draw(
            run("compare", Path(folder, "compare")),
            run("train", Path(folder, "train"), "--optimizer", methods, "--seeds", "2"),
        )
