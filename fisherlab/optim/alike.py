"""Ranks that train with one and the same optimizer, or are told in what theirs differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from typing import Any

import torch

from fisherlab.distributed import Ranks, in_words
from fisherlab.optim.coverage import Coverage

KINDS = (bool, int, float, str, torch.Generator, type(None))


def options_of(*parts: Any) -> dict[str, str]:
    """Public attributes that are numbers, words, flags, dataclasses or generators, in words.

    Args:
        parts: an optimizer, its preconditioner, its recorder; None has none.
    """
    return {
        name: in_words(value)
        for part in parts
        if part is not None
        for name, value in vars(part).items()
        if not name.startswith("_") and (isinstance(value, KINDS) or is_dataclass(value))
    }


def groups_of(coverage: Coverage) -> dict[str, str]:
    """The options of the parameter groups, and the layers that were asked for, in words."""
    groups = {
        f"{key} of group {k}": in_words(value)
        for k, group in enumerate(coverage.groups)
        for key, value in group.items()
        if key not in ("params", "param_names")
    }
    return {**groups, **{n: in_words(v) for n, v in coverage.asked.items()}}


class Agreement:
    """Whether the ranks were seen to have one and the same optimizer; they are asked once."""

    def __init__(self) -> None:
        self._asked = False

    def check(self, ranks: Ranks | None, options: Callable[[], Mapping[str, str]]) -> None:
        """Refuse ranks whose optimizers differ, as `check_alike` does, at the first call."""
        if ranks is not None and not self._asked:
            check_alike(ranks, options())
        self._asked = True


def check_alike(ranks: Ranks, options: Mapping[str, str]) -> None:
    """Refuse ranks whose optimizers differ.

    Raises:
        RankError: an option differs; the message names it and the ranks.
    """
    ranks.check_same(
        options, "have different optimizers", "make all with the same options, of one checkpoint"
    )
