"""Checkpoints: tensors, numbers and strings in files that are whole or absent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fisherlab import whole
from fisherlab.forms import form_of

# In a checkpoint, so that a later layout is not taken for this one.
FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or is not of the run it is asked for."""


def save(path: Path, state: dict[str, Any]) -> None:
    """Write dicts, lists, numbers, strings and tensors, and nothing that needs pickle to run."""
    seal = form_of(state, exact=True)  # of what the checksums of tensors do not hold together
    whole.write_tensors(path, {"format": FORMAT, "seal": seal, **state})


def load(path: Path, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Read what `save` wrote; `CheckpointError` for anything else."""
    unreadable = f"{path} is not a readable checkpoint; delete it to start that run again"
    try:
        with whole.cause_kept():
            state = whole.read_tensors(path, device)
    except Exception as error:  # zip and pickle readers have many types
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise CheckpointError(f"{unreadable} ({type(error).__name__})") from error
    if not isinstance(state, dict) or state.pop("format", None) != FORMAT:
        raise CheckpointError(unreadable)
    seal = state.pop("seal", None)
    if seal not in (None, form_of(state, exact=True)):  # one of an earlier version has none
        raise CheckpointError(
            f"{path} is not what was written there; delete it to start that run again"
        )
    return state
