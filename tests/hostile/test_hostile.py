"""No hostile input gives a wrong number, an internal error, or a changed world."""

from __future__ import annotations

import importlib

import pytest

from hostile import KINDS
from hostile.judge import judged

# about 300 cases in the suite, the share of each kind by what a case costs
FEW = {
    "blocks": 80,
    "metrics": 80,
    "capture": 70,
    "optimizers": 50,
    "scales": 20,
    "files": 10,
    "around": 30,
    "library": 60,
    "commands": 20,
}


def bad(kind: str, seeds: range) -> list[str]:
    module = importlib.import_module(f"hostile.{kind}")
    found = [(seed, judged(module.case(seed))) for seed in seeds]
    return [f"seed {seed}: {v.label}: {v.outcome}: {v.detail}" for seed, v in found if not v.good]


@pytest.mark.parametrize("kind", KINDS)
def test_every_case_ends_well(kind: str) -> None:
    assert not bad(kind, range(FEW[kind]))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
@pytest.mark.parametrize("kind", KINDS)
def test_many_cases_end_well(kind: str, part: int) -> None:
    each = 5000 // len(KINDS) // 10
    start = 1_000_000 + part * each
    assert not bad(kind, range(start, start + each))
