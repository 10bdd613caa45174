"""Counterexamples: hunted by moving a case towards its worst, and cut down to the smallest."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fisherlab.blocks import BlockError
from fisherlab.claims.base import AtMost, Case, Claim, Usually

# Margins looked at while cutting down.
CUT = 150


def margin_of(claim: Claim, case: Case) -> float:
    """The margin; NaN where a matrix of the case cannot be factored."""
    try:
        return claim.margin(case)
    except (torch.linalg.LinAlgError, BlockError):
        return math.nan


def hunted(claim: Claim) -> bool:
    """Whether a margin says how near a case is to a counterexample, so that it can be followed."""
    return isinstance(claim, AtMost) and not isinstance(claim, Usually) and bool(claim.free)


def hunt(
    claim: Claim, case: Case, generator: torch.Generator, evaluations: int | None = None
) -> tuple[Case, float]:
    """The case with its free tensors moved at random, every move towards a violation kept.

    The search follows the difference of the sides relative to the larger side, so it does not end
    where both vanish. The size of the moves follows their success, as in a (1 + 1) evolution
    strategy. Returns the last case and its margin.
    """
    size, lowest = 0.3, _relative(claim, case)
    for _ in range(evaluations or claim.effort):
        if lowest < -claim.clear:
            break
        moved = {key: _moved(case[key], size, generator) for key in claim.free if key in case}
        trial = {**case, **moved}
        found = _relative(claim, trial) if claim.assume(trial) else math.inf
        if found < lowest:
            case, lowest, size = trial, found, size * 1.5
        else:
            # one success in five keeps the size
            size *= 0.9
    return case, margin_of(claim, case)


def _relative(claim: Claim, case: Case) -> float:
    try:
        return relative(claim, *map(float, claim.values(case)))
    except (torch.linalg.LinAlgError, BlockError):
        return math.inf


def relative(claim: Claim, left: float, right: float) -> float:
    """The difference of two numbers relative to the larger; inf where only rounding is left."""
    larger = max(abs(left), abs(right))
    return (right - left) / larger if larger > 1e-3 * getattr(claim, "scale", 0.0) else math.inf


def _moved(value: Any, size: float, generator: torch.Generator) -> Any:
    if isinstance(value, list):
        return [_moved(part, size, generator) for part in value]
    scale = value.square().mean().sqrt()
    noise = torch.randn(value.shape, generator=generator, dtype=value.dtype)
    # some numbers much, the others not at all
    chosen = torch.rand(value.shape, generator=generator) < 0.5
    return value + size * scale * noise * chosen


def smallest(claim: Claim, case: Case, evaluations: int = CUT) -> tuple[Case, float]:
    """The case with less in it, and with shorter numbers, for as long as it is a counterexample."""
    margin = margin_of(claim, case)
    enough = -max(claim.noise, min(-margin / 2, claim.clear))
    left = evaluations
    progress = True
    while progress and left > 0:
        progress = False
        for trial in claim.smaller(case):
            left -= 1
            found = margin_of(claim, trial) if claim.assume(trial) else math.nan
            if found < enough:
                case, margin, progress = trial, found, True
                break
            if left <= 0:
                break
    for trial in _rounded(claim, case):
        found = margin_of(claim, trial) if claim.assume(trial) else math.nan
        if found < enough:
            return trial, found
    return case, margin


def _rounded(claim: Claim, case: Case) -> Iterator[Case]:
    """The free tensors with one, two, three decimals."""
    keys = [key for key in claim.free if key in case]
    for decimals in (0, 1, 2, 3) if keys else ():
        yield {**case, **{key: _round(case[key], decimals) for key in keys}}


def _round(value: Any, decimals: int) -> Any:
    if isinstance(value, list):
        return [_round(part, decimals) for part in value]
    return value.round(decimals=decimals)


def numbers_in(case: Case) -> int:
    """How many numbers the tensors of a case hold."""

    def count(value: object) -> int:
        if isinstance(value, Tensor):
            return value.numel()
        if isinstance(value, dict):
            return sum(map(count, value.values()))
        return sum(map(count, value)) if isinstance(value, list | tuple) else 0

    return count(case)
