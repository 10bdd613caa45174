"""`docs/presets.md`: every difference between a method as its paper has it and our defaults.

python -m fisherlab.experiments.reproduce.presets docs/presets.md
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pandas as pd

from fisherlab import whole
from fisherlab.optim.create import default
from fisherlab.optim.presets import NOT_YET, PAPER

HEAD = """# Presets: a method as its paper has it

`fl.optim.create(name, model, preset="paper")` is the method without what the default,
`preset="stable"`, adds so that it trains small nets as it comes: no clipping, no warm-up, the
paper's damping and its placement, labels, intervals, means and momentum. Options override both.

Every row is a difference. *stated*: the paper says so. *from the authors' code*: only the code
that the paper names does. *inferred*: neither does, and the reason stands beside it. Methods
without a row are the same in both. `python -m fisherlab.experiments.reproduce.presets` makes this
page.
"""
TAIL = """
## What the paper's preset does not reach

"""


def differences() -> pd.DataFrame:
    """One row per method and option that differ between the two presets."""
    rows = [
        {
            "method": name,
            "option": option,
            "stable": said(stable),
            "paper": said(given.value),
            "source": given.source,
            "where or why": given.why,
        }
        for name, options in PAPER.items()
        for option, given in options.items()
        if said(stable := default(name, option)) != said(given.value)
    ]
    return pd.DataFrame(rows)


def said(value: Any) -> str:
    """An option's value in words."""
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def page() -> str:
    """The page as Markdown."""
    frame = differences()
    rows = [list(frame.columns), ["---"] * len(frame.columns), *frame.to_numpy().tolist()]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    rest = "\n".join(f"* `{name}`: {text}" for name, text in NOT_YET.items())
    return f"{HEAD}\n{table}\n{TAIL}{rest}\n"


if __name__ == "__main__":
    whole.write(Path(sys.argv[1]), page())
