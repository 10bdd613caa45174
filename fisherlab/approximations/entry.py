"""One place checks the arguments of an approximation's public methods, a user's own too."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from fisherlab import doors
from fisherlab.approximations.damping import check_block, pairs_of
from fisherlab.approximations.means import Means
from fisherlab.blocks import BlockError
from fisherlab.blocks.entry import check_shape, unchecked
from fisherlab.blocks.numerics import check_damping
from fisherlab.extract.joint import check_layers


def _damped(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def entered(self: Any, block: Any, damping: Any) -> Any:
        return method(self, block, check_damping(damping, check_block(block).dtype))

    return entered


def _damped_each(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def entered(self: Any, blocks: Any, dampings: Any) -> Any:
        pairs = pairs_of(blocks, dampings)
        return method(self, [block for block, _ in pairs], [damping for _, damping in pairs])

    return entered


def _of_batch(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def entered(self: Any, layers: Any) -> Any:
        return method(self, check_layers(layers))

    return entered


def _means(mean: Any) -> Means:
    """Refuse what are no means of a layer."""
    if not isinstance(mean, Means):
        raise BlockError(f"mean must be the Means of a layer, got {doors.said(mean)}")
    return mean


def _basis(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def entered(self: Any, mean: Any, *previous: Any) -> Any:
        return method(self, _means(mean), *previous)

    return entered


def _block(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def entered(self: Any, mean: Any, shape: Any) -> Any:
        return method(self, _means(mean), check_shape(shape))

    return entered


DOORS = {
    "damped": _damped,
    "damped_each": _damped_each,
    "of_batch": _of_batch,
    "basis": _basis,
    "block": _block,
    **dict.fromkeys(("__call__", "corrections", "carry"), unchecked),
}
