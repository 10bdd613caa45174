"""The stored parts of a reproduction: its small files, and a page of the docs with every verdict.

python -m fisherlab.experiments.reproduce.summary OUT data/results/reproduce docs/reproduce.md
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pandas as pd

from fisherlab import whole
from fisherlab.experiments.reproduce.catalogue import ITEMS, numbered
from fisherlab.experiments.reproduce.item import SCALES
from fisherlab.experiments.reproduce.outcome import has_equal_time, laid_out
from fisherlab.experiments.reproduce.runs import markdown_table, verdicts

KEPT = (".md", ".csv", ".parquet", ".json", ".png")
HEAD = """# Reproduction: the papers' tables and figures

    fisherlab reproduce --list
    fisherlab reproduce ngm table1
    fisherlab reproduce sngd --scale hours

`fisherlab reproduce [PAPER [ITEM]]` (`fl.reproduce`) runs a table or a figure and sets the paper's
numbers beside ours. Every setting is labelled *stated*, *from the authors' code* or *inferred*;
every method is [as its paper has it](presets.md). An interrupted command goes on where it was.
`--jobs 2` trains in two processes of one thread. `--control` adds SGD with the step lengths of each
preconditioner, layer by layer, after as many tried learning rates.

At scale `minutes` nets, data and epochs are small and no learning rate is chosen: the paper's own,
or the middle of its grid. At `hours` and `paper` each arm tries the paper's grid on held-out
examples, with one budget for all. **Verdicts at scale minutes are of that scale: they confirm or
contradict no paper.**

* *reproduced*: every pair of methods that the paper orders is in that order (Welch's t over the
  seeds, 95 %). *order differs*: some are the other way round. *not reproduced*: most are.
* *undecided*: none is contradicted, and some are open: one seed, a method that diverged, or
  differences within their error. *cannot be run here*: the reason follows.
* *at equal time*: the same orders, each method at the seconds that the fastest took for all of its
  epochs, on the line between two of its own. Seconds are the processor's where they were counted.
* *on a stand-in*: the data or the model is another than the paper's, and the item says which.
"""


def page(out: Path) -> str:
    """The page of the docs."""
    names = ("paper", "item", "title", "scale", "verdict", "because", "at_equal_time")
    titles = {(item.paper, item.key): item.title for item in ITEMS}
    table = pd.DataFrame(
        [
            {n: row.get(n, "") for n in names} | {"title": _title(row, titles)}
            for row in verdicts(out)
        ]
    )
    lines = [HEAD, f"## All {numbered('table')} tables and {numbered('figure')} figures", ""]
    lines += [markdown_table(table), ""]
    for item in (item for item in ITEMS if item.experiment is not None and item.kind == "table"):
        for scale in SCALES:
            path = out / scale / item.paper / f"{item.key}.parquet"
            if path.is_file():
                table = whole.read_table(path)
                lines += [f"## {item.name}, scale {scale}: {item.title}", ""]
                lines += [markdown_table(laid_out(item, table)), ""]
                if has_equal_time(table):
                    equal = laid_out(item, table, "at_equal_time")
                    lines += ["At equal time:", "", markdown_table(equal), ""]
    return "\n".join(lines).rstrip() + "\n"


def keep(out: Path, folder: Path) -> None:
    """Copy the small files of a folder of results; runs and checkpoints stay behind."""
    for scale in SCALES:
        for paper in sorted({item.paper for item in ITEMS}):
            for path in sorted((out / scale / paper).glob("*")):
                if path.is_file() and path.suffix in KEPT:
                    to = folder / scale / paper
                    to.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, to / path.name)


def _title(row: dict[str, Any], titles: dict[tuple[str, str], str]) -> str:
    return titles[row["paper"], row["item"]]


if __name__ == "__main__":
    keep(Path(sys.argv[1]), Path(sys.argv[2]))
    whole.write(Path(sys.argv[3]), page(Path(sys.argv[2])))
