"""The page of a `fisherlab verify`: every claim with its verdict, statement and picture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from fisherlab import whole
from fisherlab.claims import KINDS, PAPERS, Verdicts
from fisherlab.claims.table import summary
from fisherlab.experiments.report import Picture, Section, Table, sections
from fisherlab.experiments.rundir import FIGURES, RunDir, RunDirError
from fisherlab.plots import claims as pictures
from fisherlab.plots import theme

SHOWN = ["claim", "verdict", "kind", "source", "expected", "margin", "trials", "seconds", "note"]
MEANING = {
    "claim": "name of the claim: `fl.claims.get(name)`",
    "kind": "; ".join(f"{kind}: {meaning}" for kind, meaning in KINDS.items()),
    "source": "paper and equation",
    "verdict": "holds, refuted by a counterexample, or undecided within rounding",
    "expected": "the verdict on record",
    "margin": "the smallest over the trials: positive where the claim is true",
    "trials": "cases tried",
    "seconds": "time of all trials",
    "note": "what else was seen",
}


def write(run: RunDir, table: Verdicts) -> None:
    """The tables, the counterexamples and the pictures, in the folder of a run."""
    table.save(run.folder)
    folder = run.folder / FIGURES
    whole.write(folder / "verdicts.png", pictures.verdicts(table).png(theme.DPI))
    for name in pictures.worth_drawing(table):
        whole.write(folder / f"{name}.png", pictures.claim(table, name).png(theme.DPI))


@sections("verify")
def of_verify(run: RunDir) -> Iterator[Section]:
    """An overview, then the claims of each paper."""
    path = run.folder / "claims.json"
    if not path.is_file():
        raise RunDirError(f"{run.folder} holds a verification without claims; run it again")
    rows = whole.read_json(path, RunDirError)["claims"]
    frame = pd.DataFrame(rows)
    if "kind" not in frame:
        raise RunDirError(f"{run.folder} holds claims without their kinds; run it again")
    overview = _picture(run.folder, "verdicts", "Verdicts of each paper's claims, and of ours.")
    yield Section(
        "Verdicts",
        [
            f"{summary(frame)}. An extension is ours; a contrast is what the paper itself denies.",
            "Each refuted claim has its smallest counterexample in counterexamples/; "
            "fl.claims.load reads it.",
        ],
        [Table(frame[SHOWN], "All claims; a heading sorts.", MEANING)],
        overview,
        found=1,
    )
    for paper, claims in frame.groupby("paper", sort=False):
        for row in claims.to_dict("records"):
            caption = f"{row['source']}: {row['statement']}"
            yield Section(
                f"{PAPERS.get(paper, paper)}: {row['claim'].replace('_', ' ')}",
                _sentences(row),
                pictures=_picture(run.folder, row["claim"], caption),
            )


def _picture(folder: Path, name: str, caption: str) -> list[Picture]:
    """The picture of a claim, where it has one."""
    path = folder / FIGURES / f"{name}.png"
    return [Picture(path, caption)] if path.is_file() else []


def _sentences(row: dict[str, Any]) -> list[str]:
    found = [
        row["statement"],
        f"{row['kind'].capitalize()}: {KINDS[row['kind']]}.",
        f"Verdict: {row['verdict']}, smallest margin {_number(row['margin'])}",
    ]
    found[-1] += f" over {row['trials']} trials" + (f"; {row['note']}." if row["note"] else ".")
    if row["assumption"]:
        found.append(f"Assumed: {row['assumption']}.")
    if row["outside"]:
        found.append(f"Tried without it: {row['outside'].replace('_', ' ')}.")
    if row["counterexample"]:
        found.append(f"Counterexample of {row['numbers']:,} numbers: {row['counterexample']}.")
    return found


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3g}"
