"""Ranks that train with one and the same optimizer, or are told in what theirs differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any

import torch

from fisherlab.distributed import Ranks, in_words

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


def check_alike(ranks: Ranks, options: Mapping[str, str]) -> None:
    """Refuse ranks whose optimizers differ.

    Raises:
        RankError: an option differs; the message names it and the ranks.
    """
    ranks.check_same(
        options, "have different optimizers", "make all with the same options, of one checkpoint"
    )
