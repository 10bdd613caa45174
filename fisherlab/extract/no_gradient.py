"""Graphs of a user's forward pass through which no gradient can be asked for."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

REENTRANT = (
    "the model calls torch.utils.checkpoint in its reentrant form, through which autograd gives no "
    "gradient at a layer's output: pass use_reentrant=False to checkpoint"
)
# autograd's words for a function that it differentiates once only
_ONCE = ("is not implemented", "once_differentiable")
# autograd's words for a graph that was changed or freed, or has no such leaf
_SAID = (
    "modified by an inplace operation",
    "through the graph a second time",
    "not require grad",
)


def _in_backward(error: BaseException) -> bool:
    """Whether torch raised an error while it went back through a graph."""
    frames = traceback.extract_tb(error.__traceback__)
    return any(frame.name == "_engine_run_backward" for frame in frames)


@contextmanager
def no_gradient_named(error: type[Exception]) -> Iterator[None]:
    """Raise `error` with the cause where torch refuses the gradients of a user's graph."""
    try:
        yield
    except RuntimeError as raised:
        said = str(raised).replace("\n", " ")
        if "use_reentrant" in said:
            raise error(REENTRANT) from raised
        if not any(words in said for words in _SAID):
            if not _in_backward(raised) or isinstance(raised, torch.OutOfMemoryError):
                raise
            if any(words in said for words in _ONCE):
                raise error(
                    f"the model or its loss lacks a derivative that is asked for: {said[:200]}; "
                    "call another function there"
                ) from raised
            raise error(
                f"a backward pass of the model fails, as its loss.backward() does: {said[:200]}"
            ) from raised
        raise error(
            f"the forward pass leaves a graph without the gradients of its layers: {said[:200]}; "
            "change no tensor in place and no requires_grad in forward, and call no backward there"
        ) from raised
