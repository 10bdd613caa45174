"""A part of the bench measured and written: tables, a picture, and one JSON file of all parts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import pandas as pd

from fisherlab import whole
from fisherlab.experiments.bench import build, capture, compare, optim, scaling, sizes
from fisherlab.experiments.bench.peers import installed
from fisherlab.experiments.bench.setting import Setting, title
from fisherlab.experiments.rundir import FIGURES, RunDir
from fisherlab.plots import bench as pictures
from fisherlab.plots.theme import DPI

PARTS: dict[str, Callable[[Setting], Iterator[dict[str, Any]]]] = {
    "capture": capture.run,
    "build": build.run,
    "compare": compare.run,
    "optim": optim.run,
    "scaling": scaling.run,
    "sizes": sizes.run,
}
JSON = "bench.json"


def measure(part: str, setting: Setting, rundir: RunDir) -> pd.DataFrame:
    """Measure one part, write each row as it is measured, and draw them.

    Rows that the folder holds are kept as they are. Where there was no time for any, the table is
    empty, and nothing is written.
    """
    before = rundir.table(part)
    records = [] if before is None else before.to_dict("records")
    setting.done = {title(record) for record in records}
    for record in PARTS[part](setting):
        records.append(record)
        rundir.write_table(part, pd.DataFrame(records))
    frame = pd.DataFrame(records)
    if frame.empty:
        return frame
    drawn = pictures.scaling(frame) if part == "scaling" else pictures.ratios(frame, part)
    whole.write(rundir.folder / FIGURES / f"{part}.png", drawn.png(DPI))
    return frame


def finish(rundir: RunDir, config: dict[str, Any], setting: Setting) -> None:
    """`config.json`, and `bench.json` with every part that was measured and the machine's rates."""
    machine = asdict(setting.machine)
    rundir.write_config(config | {"machine": machine, "peers": installed()})
    parts = {}
    for part in PARTS:
        table = rundir.table(part)
        if table is not None:
            # through pandas: NaN becomes null, which is what JSON has
            parts[part] = json.loads(table.to_json(orient="records"))
    content = {"machine": machine, "settings": config["settings"], "parts": parts}
    whole.write(rundir.folder / JSON, json.dumps(content, indent=1) + "\n")
