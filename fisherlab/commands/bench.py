"""`fisherlab bench`: what the library costs, beside one ordinary step and other libraries."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

from fisherlab.commands import options
from fisherlab.commands.common import Code, UserError, bar, known, leave, once, say, show
from fisherlab.heap import keep_freed_memory

DEFAULT = ("capture", "build", "compare", "optim", "scaling")
# with what takes a quarter of an hour, 10 GiB and other libraries
PARTS = (*DEFAULT, "sizes")
SHOWN = ["network", "work", "fisher_type", "by", "ratio", "spread", "reach", "of_reach"]
SHOWN += ["seconds", "explained", "limit", "note"]
IN_SECONDS = ["network", "work", "fisher_type", "seconds", "reach_seconds", "of_reach"]
INTERVALS = ["statistics_every", "basis_every", "statistics_examples"]
OF_PART = {
    "compare": [*IN_SECONDS, "ratio", "peak_GiB", "note"],
    "optim": ["network", "work", "ratio", "spread", "reach", "of_reach", *INTERVALS, "seconds"],
    "sizes": [*IN_SECONDS, "cpu_seconds", "ratio", "peak_GiB", "process_GiB", "blocks", "covered"],
}
TITLES = {
    "capture": "Capture and Gram matrices, multiples of one forward + backward",
    "build": "Approximations of one batch, multiples of one forward + backward",
    "compare": "Whole comparisons",
    "optim": "Training steps, multiples of SGD's",
    "scaling": "Fitted exponents",
    "sizes": "Comparisons of every weight: CPU seconds in multiples of one forward + backward",
}
QUICK = "--quick: sizes too small to measure at, so ratios are rough and fitted exponents are noise"
KEPT = "freed memory is kept for the next call, of every library alike (fl.keep_freed_memory)"
# A part may end late by a row that takes longer than those before it.
MINUTES = 8.0
PATH = Path  # typer reads the annotation


def bench(
    parts: Annotated[
        list[str] | None,
        typer.Argument(help="capture, build, compare, optim, scaling: all; or sizes."),
    ] = None,
    device: options.Device = "cpu",
    peers: Annotated[bool, typer.Option(help="Measure other libraries where installed.")] = True,
    repeats: Annotated[int | None, typer.Option(help="Pairs per row; default 7.")] = None,
    quick: Annotated[bool, typer.Option(help="Small models: to try it, not to measure.")] = False,
    minutes: Annotated[
        float, typer.Option(help="Time for all parts together, in equal shares of what is left.")
    ] = MINUTES,
    resume: Annotated[bool, typer.Option(help="Measure what the folder lacks.")] = False,
    out: Annotated[PATH | None, typer.Option("--out", "-o", help="Folder; runs/bench.")] = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Measure time and memory in pairs, each call beside an ordinary step.

    Prints a table; the folder gets bench.json, tables and pictures, each row as it is measured.
    The table also lists faster peers, missed targets, and the limiting resource. If time runs
    out, the missing rows are named; --resume measures them.

    Examples:

        fisherlab bench --quick
        fisherlab bench optim --device cuda --out runs/bench-gpu
    """
    chosen = [known("part", part, PARTS) for part in once(parts or DEFAULT)]
    if repeats is not None and repeats < 1:
        raise UserError(f"--repeats is at least 1, got {repeats}")
    if not 0 < minutes < math.inf:
        raise UserError(f"--minutes is a positive number, got {minutes}")
    if resume and overwrite:
        raise UserError("--resume keeps what the folder holds, --overwrite drops it: pass one")
    from fisherlab.experiments.bench import record, sizes
    from fisherlab.experiments.bench.setting import Setting
    from fisherlab.experiments.rundir import RunDir
    from fisherlab.experiments.training.settings import check_device

    place = check_device(device)
    if "sizes" in chosen and not quick:
        sizes.check()
    rundir = RunDir(out or PATH("runs/bench"))
    settings = {
        "device": device,
        "peers": peers,
        "repeats": repeats,
        "quick": quick,
    }
    if resume:
        _check_same(rundir.config["settings"], settings)
    else:
        rundir.check(overwrite, PARTS)
    notes = [QUICK] if quick else []
    if keep_freed_memory():  # the process is ours
        notes.append(KEPT)
    config: dict[str, Any] = {"command": "bench", "settings": settings, "notes": notes}
    if not resume:
        rundir.begin(config, PARTS)
    status, end = "complete", time.monotonic() + 60 * minutes
    with bar(len(chosen), "bench") as progress:
        setting = Setting(place, quick, peers, repeats, progress.set_postfix_str)
        try:
            for k, part in enumerate(chosen):
                now = time.monotonic()
                setting.part(now + (end - now) / (len(chosen) - k))
                frame = record.measure(part, setting, rundir)
                if len(frame):
                    show(_shown(part, frame), TITLES[part], wrap=("work", "note", "limit"))
                progress.update(1)
        except KeyboardInterrupt:
            status = "interrupted"
    if setting.left:
        notes.append(
            f"no time for {len(setting.left)} rows: take --resume, or more --minutes; not "
            f"measured: {', '.join(setting.left)}"
        )
    record.finish(rundir, config | {"status": status}, setting)
    from fisherlab.experiments import pages, report  # noqa: F401  pages: what it shows

    for said in notes:
        say(said)
    typer.echo(f"report: {report.write(rundir)}")
    if status == "interrupted":
        leave(Code.INTERRUPTED, "interrupted; --resume goes on behind the last row")


def _check_same(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to put rows of other settings into one table."""
    changed = [f"{key} {before.get(key)!r} there, {now[key]!r} here" for key in now]
    changed = [text for key, text in zip(now, changed, strict=True) if before.get(key) != now[key]]
    if changed:
        raise UserError(
            f"this folder was measured with other settings: {'; '.join(changed)}; "
            "pass them again, or another --out"
        )


def _shown(part: str, frame: pd.DataFrame) -> pd.DataFrame:
    if part == "scaling":
        return _exponents(frame)
    frame = frame.copy()
    frame["spread"] = [f"{a:.2f}-{b:.2f}" for a, b in zip(frame.lowest, frame.highest, strict=True)]
    for name in ("peak", "process"):
        if f"{name}_bytes" in frame:
            frame[f"{name}_GiB"] = frame[f"{name}_bytes"] / 2**30
    columns = [name for name in OF_PART.get(part, SHOWN) if name in frame]
    kept = [name for name in columns if name != "note" or frame["note"].any()]
    return frame[kept]


def _exponents(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per method and axis: the exponents with their standard errors."""
    once = frame.drop_duplicates(["method", "axis"])
    table = once[["method", "axis"]].copy()
    for key in ("seconds", "peak_bytes", "operations"):
        pairs = zip(once[f"{key}_exponent"], once[f"{key}_exponent_error"], strict=True)
        table[key.replace("peak_bytes", "memory")] = [f"{e:.2f} ± {s:.2f}" for e, s in pairs]
    return table
