"""The format that a `state_dict` states, and which formats are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# Format 1, without a number, kept the running means of an optimizer and of its blocks apart.
FORMAT = 2


def check_state(state: Mapping[str, Any], kind: str, method: str) -> None:
    """Refuse a state that is not of this format, or of another method.

    Args:
        state: what `state_dict` returned.
        kind: the key that every state has, and what writes it.
        method: what the state must be of.

    Raises:
        ValueError: the state cannot be read; the message names what it is.
    """
    if "method" not in state:
        raise ValueError(f"this state was not saved by a FisherLab {kind}: it names no method")
    found = state.get("format", 1)
    if found != FORMAT:
        when = "an earlier" if isinstance(found, int) and found < FORMAT else "a later"
        raise ValueError(
            f"this state of {state['method']} has format {found}, which {when} version of "
            f"FisherLab wrote; this one reads format {FORMAT}. Resume with that version, or start "
            f"the {kind} anew; nothing was loaded"
        )
    if state["method"] != method:
        raise ValueError(f"this state is of {state['method']}, and this {kind} is {method}")


def placed(state: Any, device: torch.device) -> Any:
    """A state whose tensors, at any depth of its dicts and lists, are on the device."""
    if isinstance(state, Tensor):
        return state.to(device)
    if isinstance(state, Mapping):
        return {key: placed(value, device) for key, value in state.items()}
    return [placed(value, device) for value in state] if isinstance(state, list) else state
