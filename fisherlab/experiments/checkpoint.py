"""Files that are whole or absent: written beside, flushed to the disk, renamed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch

# In a checkpoint, so that a later layout is not taken for this one.
FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or is not of the run it is asked for."""


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that takes the place of `path` when the block ends, and only then."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with beside.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        beside.replace(path)
    finally:
        with suppress(FileNotFoundError):
            beside.unlink()


def sweep_parts(folder: Path) -> None:
    """Delete what killed processes left half-written below a folder."""
    for part in folder.rglob(".*.part"):
        part.unlink(missing_ok=True)


def save(path: Path, state: dict[str, Any]) -> None:
    """Write dicts, lists, numbers, strings and tensors, and nothing that needs pickle to run."""
    with replacing(path) as stream:
        torch.save({"format": FORMAT, **state}, stream)


def load(path: Path, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Read what `save` wrote, with `weights_only=True`; `CheckpointError` for anything else."""
    unreadable = f"{path} is not a readable checkpoint; delete it to start that run again"
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch raises what its zip and pickle readers raise
        raise CheckpointError(f"{unreadable} ({type(error).__name__})") from error
    if not isinstance(state, dict) or state.pop("format", None) != FORMAT:
        raise CheckpointError(unreadable)
    return state


def write(path: Path, content: str | Callable[[IO[bytes]], Any]) -> None:
    """Write text, or what a function writes into a binary stream, whole or not at all."""
    with replacing(path) as stream:
        if callable(content):
            content(stream)
        else:
            stream.write(content.encode())
