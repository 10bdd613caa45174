"""One place checks the arguments of a block's public methods, for every form, a user's own too.

`guard` puts a door in front of each method of `DOORS` that a class defines. Inside a method nothing
is checked again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from fisherlab import doors
from fisherlab.blocks.basis import Coordinates, Thin
from fisherlab.blocks.contractions import evened
from fisherlab.blocks.numerics import (
    BlockError,
    are_near,
    check_damping,
    check_exponent,
    units,
)
from fisherlab.casting import uncasting


def guard(form: type, doors: Mapping[str, Callable[..., Any]] | None = None) -> None:
    """Put the doors in front of the methods that a class defines itself; None: those of blocks.

    Behind a door autocast is off.
    """
    for name, door in (DOORS if doors is None else doors).items():
        method = form.__dict__.get(name)
        if callable(method) and not getattr(method, "__isabstractmethod__", False):
            setattr(form, name, uncasting(door(method)))


def unchecked(method: Callable[..., Any]) -> Callable[..., Any]:
    """The door of a method that takes nothing to check."""
    return method


def check_other(block: Any, other: object, what: str = "other") -> None:
    """Refuse what is no block on the same weight."""
    # a block is known by what it does: the class is defined further down the imports
    if isinstance(other, type) or not hasattr(other, "rotated_diagonal"):
        raise BlockError(f"{what} must be a block of fl.blocks, got {doors.said(other)}")
    shape = getattr(other, "shape", None)
    if shape != block.shape:
        raise BlockError(
            f"blocks of shapes {block.shape} and {shape} have no product; pass {what} of one weight"
        )


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
        # quadratic forms are fourth powers: they are those of gradients near 1
        a, g = evened(a, g)
        if are_near(g, (-2, -1)):
            return method(self, a, g)
        g, r = units(g, (-2, -1))
        return method(self, a, g) * r[..., 0, 0].double().square()

    return entered


def _bases(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def entered(self: Any, Q_G: Any, Q_A: Any) -> Any:
        for Q, what, length in ((Q_G, "Q_G", self.shape[0]), (Q_A, "Q_A", self.shape[1])):
            if not isinstance(Q, Thin | Coordinates):
                _check_side(self, Q, what)
            if len(Q) != length:
                raise BlockError(f"{what} must have {length} rows, got {tuple(Q.shape)}")
        if Q_G.dtype != Q_A.dtype:
            raise BlockError(f"Q_G and Q_A must have one dtype, got {Q_G.dtype} and {Q_A.dtype}")
        if not (Q_G.shape[1] and Q_A.shape[1]):
            none = Q_G.shape[1], Q_A.shape[1]
            return torch.zeros(none, dtype=torch.float64, device=self.device)
        return method(self, Q_G, Q_A)

    return entered


def _check_side(block: Any, Q: Tensor, what: str) -> None:
    """Refuse what is no matrix of the block's kind."""
    doors.tensor(Q, what, ndim=(2,), error=BlockError)
    if Q.device != block.device:
        raise BlockError(f"{what} must be on {block.device} as the block is, got {Q.device}")


def _products(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def entered(self: Any, k: int, q_G: Tensor, q_A: Tensor) -> Any:
        _check_side(self, q_G, "q_G")
        _check_side(self, q_A, "q_A")
        for q, what, length in ((q_G, "q_G", self.shape[0]), (q_A, "q_A", self.shape[1])):
            if q.shape != (length, q_A.shape[1]):
                raise BlockError(
                    f"{what} must be [{length}, j], as many columns as q_A, got {tuple(q.shape)}"
                )
        return method(self, doors.count(k, "k", error=BlockError), q_G, q_A)

    return entered


def _rows(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def entered(self: Any, budget: int | None = None) -> Any:
        known = None if budget is None else doors.count(budget, "budget", error=BlockError)
        return method(self, known)

    return entered


def _rotated(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def entered(self: Any, rotated: Tensor) -> Any:
        check_rotated(self, rotated)
        return method(self, rotated)

    return entered


def check_rotated(block: Any, rotated: object) -> None:
    """Refuse what are no weights in the bases of a block of eigenvalues."""
    found = doors.tensor(rotated, "rotated", error=BlockError)
    if found.shape[-2:] != block.spectrum.shape:
        o, i = block.spectrum.shape
        raise BlockError(f"rotated must be [..., {o}, {i}], got {tuple(found.shape)}")
    if found.dtype != block.dtype or found.device != block.device:
        raise BlockError(
            f"rotated must be {block.dtype} on {block.device}, got {doors.said(found)}"
        )


def _given_columns(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def entered(self: Any, columns: Any) -> Any:
        check_held(columns, self.shape)
        return method(self, columns)

    return entered


def check_held(columns: Any, shape: tuple[int, int] | None = None) -> None:
    """Refuse what are no columns of a weight, known by what they do."""
    if isinstance(columns, type) or not hasattr(columns, "grouped_moments"):
        raise BlockError(f"columns must be those of an exact block, got {doors.said(columns)}")
    if shape is not None and tuple(columns.shape) != tuple(shape):
        raise BlockError(f"columns must be of a weight {shape}, got {columns.shape}")


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
    "without_rounding": _weights,
    "in_bases": _weights,
    "from_bases": _rotated,
    "rows": _rows,
    "leading_products": _products,
    "inner_with_columns": _given_columns,
    "power": _power,
    "solve": _solve,
    "logdet": _logdet,
    "leading": _leading,
    "leading_values": _leading,
    "leading_factors": _leading,
    "inner": _other,
    "inner_with_rotated": _other,
    "diagonal_of": _other,
    "chosen": _other,
    "column_quadratics": _columns,
    "rotated_diagonal": _bases,
    "sample": _sample,
    **dict.fromkeys(("dense", "diagonal", "trace", "squared_norm", "eigenvalues"), unchecked),
}
