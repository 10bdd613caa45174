"""Outputs: the one tensor that a criterion sees in what a model returns, and its own loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def output_of(returned: Any, key: str = "logits") -> Any:
    """The tensor itself, `.logits` of an object or `["logits"]` of a mapping; else unchanged."""
    if isinstance(returned, Mapping) and key in returned:
        return returned[key]
    try:
        return getattr(returned, key, returned)
    except KeyError:  # an object whose attributes are entries
        return returned


def loss_of(returned: Any) -> Any:
    """The tensor itself, `.loss` of an object or `["loss"]` of a mapping; else unchanged."""
    return output_of(returned, "loss")
