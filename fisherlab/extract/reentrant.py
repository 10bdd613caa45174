"""Reentrant checkpointing, through which no gradient at a layer's output can be asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

REENTRANT = (
    "the model calls torch.utils.checkpoint in its reentrant form, through which autograd gives no "
    "gradient at a layer's output: pass use_reentrant=False to checkpoint"
)


@contextmanager
def reentrant_named(error: type[Exception]) -> Iterator[None]:
    """Raise `error` with the cause where torch refuses the gradients of a checkpointed segment."""
    try:
        yield
    except RuntimeError as raised:
        if "use_reentrant" not in str(raised):
            raise
        raise error(REENTRANT) from raised
