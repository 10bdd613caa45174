"""Graphs of a user's forward pass through which no gradient can be asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

REENTRANT = (
    "the model calls torch.utils.checkpoint in its reentrant form, through which autograd gives no "
    "gradient at a layer's output: pass use_reentrant=False to checkpoint"
)
# autograd's words for a graph that was changed or freed, or has no such leaf
_SAID = (
    "modified by an inplace operation",
    "through the graph a second time",
    "not require grad",
)


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
            raise
        raise error(
            f"the forward pass leaves a graph without the gradients of its layers: {said[:200]}; "
            "change no tensor in place and no requires_grad in forward, and call no backward there"
        ) from raised
