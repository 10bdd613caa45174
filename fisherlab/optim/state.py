"""The format that a `state_dict` states, and which formats are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fisherlab import doors
from fisherlab.forms import form_of, is_finite

# Format 1, without a number, kept the running means of an optimizer and of its blocks apart.
FORMAT = 2


def sealed(state: dict[str, Any]) -> dict[str, Any]:
    """The state with the form of each of its parts: keys, shapes and dtypes, not the numbers."""
    return {**state, "form": {key: form_of(value, dtypes=True) for key, value in state.items()}}


def generator_state(state: Mapping[str, Any]) -> Tensor:
    """The state of the generator that a state holds.

    Raises:
        ValueError: it holds none.
    """
    found = state.get("generator")
    if not isinstance(found, Tensor) or found.dtype != torch.uint8:
        raise ValueError(
            f"this state is damaged: generator is no state of a torch.Generator but "
            f"{doors.said(found)}; nothing was loaded"
        )
    return found.cpu()


def check_params(group: Mapping[str, Any]) -> None:
    """Refuse a saved parameter group whose `params` are no list of numbers.

    Raises:
        ValueError: the message says what they are.
    """
    params = group.get("params")
    if not isinstance(params, list) or not all(isinstance(index, int) for index in params):
        raise ValueError(
            "this state is damaged: the params of a group are a list of whole numbers, got "
            f"{doors.said(params)}; nothing was loaded"
        )


def state_of(state: Any, index: int) -> Mapping[str, Any]:
    """The saved state of a parameter; empty where it has none.

    Raises:
        ValueError: the states, or that of the parameter, are no dict.
    """
    found = state.get(index, {}) if isinstance(state, Mapping) else state
    if not isinstance(found, Mapping):
        raise ValueError(
            f"this state is damaged: that of parameter {index} is no dict but {doors.said(found)}; "
            "nothing was loaded"
        )
    return found


def check_form(state: Mapping[str, Any]) -> None:
    """Refuse a part that has another form than when it was saved.

    A check that can say more precisely what a state has comes before this one.

    Raises:
        ValueError: the state is damaged, or has NaN or inf; the message names the parts.
    """
    if wrong := sorted(key for key, value in state.items() if not is_finite(value)):
        raise ValueError(
            f"this state holds NaN or inf, or tensors that are sparse or without numbers, in "
            f"{', '.join(wrong)}: no later step would be right; load one from before; nothing was "
            "loaded"
        )
    if "form" not in state:  # an earlier version saved none
        return
    saved = state["form"]
    if not isinstance(saved, Mapping):
        raise ValueError("this state is damaged: form is no dict; nothing was loaded")
    # an earlier version saved the form without dtypes
    parts = {
        key: (form_of(value, dtypes=True), form_of(value))
        for key, value in state.items()
        if key != "form"
    }
    damaged = sorted(key for key in {*saved, *parts} if saved.get(key) not in parts.get(key, ()))
    if damaged:
        raise ValueError(
            f"this state is damaged: {', '.join(damaged)} {'has' if len(damaged) == 1 else 'have'} "
            "not the form that was saved, with its keys, shapes and dtypes; load it as it was "
            "saved, or from another file; nothing was loaded"
        )


def check_state(state: Any, kind: str, method: str) -> None:
    """Refuse a state that is not of this format, or of another method.

    Args:
        state: what `state_dict` returned.
        kind: the key that every state has, and what writes it.
        method: what the state must be of.

    Raises:
        ValueError: the state cannot be read; the message names what it is.
    """
    if not isinstance(state, Mapping):
        raise ValueError(
            f"a state is the dict that state_dict() returned, got {doors.said(state)}; nothing was "
            "loaded"
        )
    if not isinstance(state.get("method"), str):
        raise ValueError(f"this state was not saved by a FisherLab {kind}: it names no method")
    found = state.get("format", 1)
    if not doors.is_whole(found):
        raise ValueError(
            f"this state is damaged: its format is a whole number, got {doors.said(found)}; "
            "nothing was loaded"
        )
    if found != FORMAT:
        when = "an earlier" if found < FORMAT else "a later"
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
