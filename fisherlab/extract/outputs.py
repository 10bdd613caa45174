"""Outputs: the one tensor that a criterion sees, in whatever a model returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def output_of(returned: Any) -> Any:
    """The tensor itself, `.logits` of an object or `["logits"]` of a mapping; else unchanged."""
    if isinstance(returned, Mapping) and "logits" in returned:
        return returned["logits"]
    return getattr(returned, "logits", returned)
