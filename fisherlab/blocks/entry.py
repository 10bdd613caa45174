"""One place checks the arguments of a block's public methods, for every form, a user's own too.

`guard` puts a door in front of each method of `DOORS` that a class defines. Inside a method nothing
is checked again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from fisherlab import doors
from fisherlab.blocks.basis import Coordinates, Thin
from fisherlab.blocks.numerics import BlockError, check_damping, check_exponent


def guard(form: type) -> None:
    """Put the doors in front of the methods that a class of blocks defines itself."""
    for name, door in DOORS.items():
        method = form.__dict__.get(name)
        if callable(method) and not getattr(method, "__isabstractmethod__", False):
            setattr(form, name, door(method))


def check_other(block: Any, other: object, what: str = "other") -> None:
    """Refuse what is no block on the same weight."""
    # a block is known by what it does: the class is defined further down the imports
    if not hasattr(other, "rotated_diagonal"):
        raise BlockError(f"{what} must be a block of fl.blocks, got {doors.said(other)}")
    shape = getattr(other, "shape", None)
    if shape != block.shape:
        raise BlockError(f"blocks of shapes {block.shape} and {shape} have no product")


def check_shape(shape: object) -> tuple[int, int]:
    """The shape `(o, i)` of a weight as two whole numbers."""
    if not isinstance(shape, tuple | list) or len(shape) != 2:
        raise BlockError(f"shape must be (o, i), that of a weight, got {doors.said(shape)}")
    o, i = (doors.count(size, "each of shape", error=BlockError) for size in shape)
    return o, i


def _weights(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def entered(self: Any, V: Tensor) -> Any:
        self.check(V)
        return method(self, V)

    return entered


def _power(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def entered(self: Any, exponent: float, damping: float = 0.0) -> Any:
        return method(self, check_exponent(exponent), check_damping(damping, self.dtype))

    return entered


def _solve(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def entered(self: Any, V: Tensor, damping: float) -> Any:
        self.check(V)
        return method(self, V, check_damping(damping, self.dtype))

    return entered


def _logdet(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def entered(self: Any, damping: float) -> Any:
        return method(self, check_damping(damping, self.dtype))

    return entered


def _leading(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def entered(self: Any, k: int) -> Any:
        return method(self, doors.count(k, "k", error=BlockError))

    return entered


def _other(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def entered(self: Any, other: Any) -> Any:
        check_other(self, other)
        return method(self, other)

    return entered


def _columns(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def entered(self: Any, a: Tensor, g: Tensor) -> Any:
        check_columns(a, g, self.shape)
        return method(self, a, g)

    return entered


def _bases(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def entered(self: Any, Q_G: Any, Q_A: Any) -> Any:
        for Q, what, length in ((Q_G, "Q_G", self.shape[0]), (Q_A, "Q_A", self.shape[1])):
            if not isinstance(Q, Thin | Coordinates):
                doors.tensor(Q, what, ndim=(2,), error=BlockError)
            if len(Q) != length:
                raise BlockError(f"{what} must have {length} rows, got {tuple(Q.shape)}")
        return method(self, Q_G, Q_A)

    return entered


def _sample(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def entered(self: Any, damping: float, generator: Any = None) -> Any:
        if generator is not None and not isinstance(generator, torch.Generator):
            raise BlockError(
                f"generator must be a torch.Generator or None, got {doors.said(generator)}"
            )
        return method(self, check_damping(damping, self.dtype), generator)

    return entered


def check_columns(a: object, g: object, shape: tuple[int, int] | None = None) -> None:
    """Refuse what are no inputs `[n, t, i]` and output gradients `[m, n, t, o]` of a weight."""
    one = doors.tensor(a, "a", full=True, error=BlockError)
    two = doors.tensor(g, "g", full=True, error=BlockError)
    alike = one.ndim == 3 and two.ndim == 4 and one.shape[:2] == two.shape[1:3] and len(one) > 0
    if not alike or (shape is not None and (two.shape[-1], one.shape[-1]) != tuple(shape)):
        of = "" if shape is None else f" for a weight {tuple(shape)}"
        raise BlockError(
            f"columns are a [n, t, i] and g [m, n, t, o] of n >= 1 examples{of}, got "
            f"{tuple(one.shape)} and {tuple(two.shape)}"
        )
    if one.dtype != two.dtype:
        raise BlockError(f"a and g must have one dtype, got {one.dtype} and {two.dtype}")


DOORS = {
    "__matmul__": _weights,
    "quadratic": _weights,
    "power": _power,
    "solve": _solve,
    "logdet": _logdet,
    "leading": _leading,
    "leading_values": _leading,
    "leading_factors": _leading,
    "inner": _other,
    "diagonal_of": _other,
    "chosen": _other,
    "column_quadratics": _columns,
    "rotated_diagonal": _bases,
    "sample": _sample,
}
