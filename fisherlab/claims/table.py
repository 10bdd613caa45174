"""`verify`: every claim tried, and the table of verdicts."""

from __future__ import annotations

import json
import math
import time
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from fisherlab import doors, whole
from fisherlab.blocks import BlockError
from fisherlab.claims import base, real, search
from fisherlab.claims.base import (
    CLAIM,
    CONTRAST,
    EXTENSION,
    HOLDS,
    REFUTED,
    UNDECIDED,
    Case,
    Claim,
    ClaimError,
)
from fisherlab.extract.isolation import streams_kept

# Draws per wanted trial, where many fail a claim's assumption.
DRAWS = 30
# Cases of a claim from which counterexamples are hunted.
HUNTS = 4
COLUMNS = (
    "claim",
    "kind",
    "paper",
    "source",
    "holds",
    "expected",
    "verdict",
    "margin",
    "trials",
    "seconds",
    "counterexample",
    "numbers",
    "note",
)
NOUNS = {CLAIM: "claim{} of the papers", EXTENSION: "extension{}", CONTRAST: "contrast{}"}


@dataclass
class Trials:
    """The outcome of one claim: margins, both sides where they are numbers, the worst case."""

    claim: Claim
    margins: list[float] = field(default_factory=list)
    pairs: list[tuple[float, float]] = field(default_factory=list)
    case: Case | None = None
    left: Any = None
    right: Any = None
    # the smallest counterexample, of what is refuted
    smallest: Case | None = None
    # the cases nearest to a violation, sides relative to the larger: where hunts start
    nearest: list[tuple[float, Case]] = field(default_factory=list)

    def add(self, case: Case) -> None:
        """Try the claim on one more case."""
        try:
            left, right = self.claim.values(case)
            margin = float(self.claim.compare(left, right))
        except (torch.linalg.LinAlgError, BlockError):
            left, right, margin = math.nan, math.nan, math.nan
        if _is_number(left) and _is_number(right):
            self.pairs.append((float(left), float(right)))
            near = search.relative(self.claim, float(left), float(right))
            closer = sorted([*self.nearest, (near, case)], key=lambda pair: pair[0])
            self.nearest = [pair for pair in closer[:HUNTS] if pair[0] < math.inf]
        if self.case is None or margin < min(self.margins, default=math.inf):
            self.case, self.left, self.right = case, left, right
        self.margins.append(margin)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) or (isinstance(value, Tensor) and value.ndim == 0)


# A row of the table, and what was seen.
Verdict = tuple[dict[str, Any], Trials]


class Verdicts:
    """The table of a `verify`: a row per claim, the smallest counterexample of each refuted.

    Its `repr` counts by kind: only a refuted "claim" is an error of a paper. `frame` has the least
    margin of each claim, `margins` that of every case.

    Args:
        verdicts: the rows and trials.
        on: "dataset:model", if the cases are of a real network.
    """

    def __init__(self, verdicts: Iterable[Verdict], on: str = "") -> None:
        pairs = list(verdicts) if isinstance(verdicts, Iterable) else [verdicts]
        for pair in pairs:
            if not isinstance(pair, tuple) or not isinstance(pair[-1], Trials):
                raise ClaimError(f"verdicts must be those of `tried`, got {doors.said(pair)}")
        doors.name(on, "on", error=ClaimError)
        self.frame = pd.DataFrame([row for row, _ in pairs], columns=list(COLUMNS))
        self.trials = {row["claim"]: found for row, found in pairs}
        self.on = on

    @property
    def unexpected(self) -> list[str]:
        """Claims whose verdict contradicts the one on record; an undecided claim contradicts none.

        On a real network a claim that is refuted elsewhere may well hold: only one that is on
        record as true can be contradicted there.
        """
        frame = self.frame
        wrong = (frame.verdict != frame.expected) & (frame.verdict != UNDECIDED)
        if self.on:
            wrong &= (frame.expected == HOLDS) & (frame.verdict == REFUTED)
        return list(frame.claim[wrong])

    @property
    def margins(self) -> pd.DataFrame:
        """Every case that was tried: `claim`, `trial`, `margin` (negative: violated).

        `left` and `right` are the sides of the claim where both are numbers, else NaN.
        """
        rows: list[tuple[str, int, float, float, float]] = []
        for name, found in self.trials.items():
            numbers = len(found.pairs) == len(found.margins)
            sides = found.pairs if numbers else [(math.nan, math.nan)] * len(found.margins)
            pairs = enumerate(zip(found.margins, sides, strict=True))
            rows += [(name, trial, margin, *pair) for trial, (margin, pair) in pairs]
        return pd.DataFrame(rows, columns=["claim", "trial", "margin", "left", "right"])

    def counterexample(self, name: str) -> Case | None:
        """The smallest counterexample found to a claim, or None."""
        doors.name(name, "name", error=ClaimError)
        if name not in self.trials:
            raise ClaimError(f"{name!r} was not tried; tried: {', '.join(self.trials)}")
        return self.trials[name].smallest

    def save(self, folder: str | Path) -> Path:
        """Write claims.json, claims.parquet and counterexamples/NAME.pt; returns the folder."""
        folder = doors.place(folder, "folder", error=ClaimError)
        for row in self.frame.itertuples():
            if (case := self.trials[row.claim].smallest) is not None:
                whole.write_tensors(folder / row.counterexample, case)
        whole.write_table(folder / "claims.parquet", self.frame)
        # JSON has no NaN
        rows = self.frame.astype(object).where(self.frame.notna(), None).to_dict("records")
        records = [{**row, **_described(base.get(row["claim"]))} for row in rows]
        text = json.dumps({"on": self.on, "claims": records}, indent=1, default=str)
        whole.write(folder / "claims.json", text)
        return folder

    def _repr_html_(self) -> str:
        shown = self.frame.drop(columns=["counterexample"])
        return shown.to_html(index=False, float_format=lambda v: f"{v:.3g}")

    def __repr__(self) -> str:
        wrong = self.unexpected
        decided = "the decided ones" if (self.frame.verdict == UNDECIDED).any() else "all"
        tail = f"not as on record: {', '.join(wrong)}" if wrong else f"{decided} as on record"
        return f"Verdicts({summary(self.frame)}; {tail})"


def summary(frame: pd.DataFrame) -> str:
    """How many statements of each kind have each verdict, refuted claims of the papers first."""
    parts = []
    for kind, noun in NOUNS.items():
        counts = frame.verdict[frame.kind == kind].value_counts().to_dict()
        found: list[str] = []
        for verdict in (v for v in (REFUTED, HOLDS, UNDECIDED) if v in counts):
            n = counts[verdict]
            what = "" if found else " " + noun.format("" if n == 1 else "s")
            verb = "hold" if verdict == HOLDS and n > 1 else verdict
            found.append(f"{n}{what} {verb}")
        parts.append(", ".join(found))
    return "; ".join(filter(None, parts)) or "none tried"


def _described(claim: Claim) -> dict[str, str]:
    return {
        "statement": claim.statement,
        "latex": claim.latex,
        "assumption": claim.assumption,
        "outside": claim.outside,
    }


def load(path: str | Path) -> Case:
    """A saved counterexample: `fl.claims.get(name).margin(fl.claims.load(path))` is its margin.

    Args:
        path: a file that a run of `fisherlab verify` wrote.

    Returns:
        The case.
    """
    return whole.read(doors.place(path, "path"), whole.read_tensors, "saved counterexample")


def chosen(names: str | Iterable[str] | None) -> list[str]:
    """The claims of names, of the keys of papers, or all."""
    if names is None:
        return base.names()
    several = list(names) if isinstance(names, list | tuple | set) else [names]
    wanted = [doors.name(name, "each of names", error=ClaimError) for name in several]
    papers: dict[str, list[str]] = {}
    for name in base.names():
        papers.setdefault(base.get(name).paper.lower(), []).append(name)
    found = [name for want in wanted for name in papers.get(want.lower()) or [base.get(want).name]]
    return list(dict.fromkeys(found))


def verify(
    names: str | Iterable[str] | None = None,
    seed: int = 0,
    trials: int | None = None,
    *,
    on: str | None = None,
) -> Verdicts:
    """Try claims on random cases, and return their verdicts.

    A claim's cases depend on `seed` and its name alone.

    Args:
        names: claims or papers (`"tekfac"`); None: all.
        seed: seed of the random cases.
        trials: cases per claim; None: each claim's own number.
        on: "dataset:model", for cases of a real network at several training steps instead of random
            ones. Claims that cannot be asked of it are left out.

    Returns:
        A row per claim, with the smallest counterexample of each refuted one.

    Raises:
        ClaimError: the name is unknown, or `trials` is below 1.
    """
    return Verdicts(tried(chosen(names), seed, trials, on), "" if on is None else on)


def tried(
    names: Iterable[str], seed: int = 0, trials: int | None = None, on: str | None = None
) -> Iterator[Verdict]:
    """The verdicts of `verify`, one by one; what is asked for is refused here, before the first."""
    if trials is not None:
        trials = doors.count(trials, "trials", error=ClaimError)
    doors.number(doors.count(seed, "seed", -(2**63), error=ClaimError), "seed", below=2.0**63,
                 error=ClaimError)  # fmt: skip
    if on is not None:
        doors.name(on, "on", error=ClaimError)
    with streams_kept():
        reals = None if on is None else list(real.real_cases(on, seed))
    return _tried(names, seed, trials, reals)


def _tried(
    names: Iterable[str], seed: int, trials: int | None, reals: list[Case] | None
) -> Iterator[Verdict]:
    for name in names:
        claim = base.get(name)
        # a generator takes 32 bits of its seed
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        start = time.perf_counter()
        # a claim may build modules, which draw weights
        with streams_kept():
            torch.default_generator.manual_seed(generator.initial_seed())
            cases = _adapted(claim, reals, generator) if reals is not None else None
            if cases is not None and not cases:
                continue
            found = _try(claim, cases, trials or claim.trials, generator)
            row = _judged(claim, found, generator)
        yield {**row, "seconds": time.perf_counter() - start}, found


def _adapted(claim: Claim, reals: list[Case], generator: torch.Generator) -> list[Case]:
    found = (claim.adapt(case, generator) for case in reals)
    return [case for case in found if case is not None and claim.assume(case)]


def _try(claim: Claim, cases: list[Case] | None, trials: int, generator: torch.Generator) -> Trials:
    found = Trials(claim)
    if cases is not None:
        for case in cases:
            found.add(case)
        return found
    for _ in range(DRAWS * trials):
        # from the smallest cases to the largest
        case = claim.draw(generator, len(found.margins) / max(1, trials - 1))
        if claim.assume(case):
            found.add(case)
        if len(found.margins) == trials:
            return found
    raise ClaimError(
        f"{claim.name}: {len(found.margins)} of {DRAWS * trials} cases meet its assumption "
        f"({claim.assumption}); {trials} are needed"
    )


def _judged(claim: Claim, found: Trials, generator: torch.Generator) -> dict[str, Any]:
    verdict, margin, note = claim.verdict(found.margins)
    if verdict == HOLDS and search.hunted(claim):
        for _, near in found.nearest:
            case, lowest = search.hunt(claim, near, generator)
            if lowest < min(found.margins):
                found.add(case)
            if lowest < -claim.noise:
                break
        verdict, margin, note = claim.verdict(found.margins)
        if verdict == REFUTED:
            note = "violated by a case that was hunted down, by none that was drawn"
    path, numbers = "", 0
    if verdict == REFUTED and found.case is not None and min(found.margins) < -claim.noise:
        found.smallest, _ = search.smallest(claim, found.case)
        path, numbers = f"counterexamples/{claim.name}.pt", search.numbers_in(found.smallest)
    return {
        "claim": claim.name,
        "kind": claim.kind,
        "paper": claim.paper,
        "source": claim.source,
        "holds": verdict == HOLDS,
        "expected": claim.expected,
        "verdict": verdict,
        "margin": margin,
        "trials": len(found.margins),
        "counterexample": path,
        "numbers": numbers,
        "note": note,
    }
