"""Checks of the public metrics' arguments, by name, once, where they enter."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial, wraps
from typing import Any, TypeVar

from torch import Tensor, nn

from fisherlab import doors
from fisherlab.blocks import Block, Outer
from fisherlab.casting import uncasting

Measure = TypeVar("Measure", bound=Callable[..., Any])


def entered(measure: Measure) -> Measure:
    """The metric with a door for each argument that has one, by its annotation or its name.

    Two blocks have to be on one weight. A metric that calls another passes its door again, which
    costs microseconds.

    Raises:
        ValueError, TypeError: an argument is not what its name says.
    """
    checks = [
        (position, name, door)
        for position, (name, parameter) in enumerate(inspect.signature(measure).parameters.items())
        if (door := NAMES.get(name) or KINDS.get(parameter.annotation))
    ]

    @uncasting
    @wraps(measure)
    def checked(*args: Any, **named: Any) -> Any:
        given, options, found = doors.passed(checks, args, named)
        _check_pair(found)
        return measure(*given, **options)

    return checked  # type: ignore[return-value]


def _check_pair(found: Mapping[str, Any]) -> None:
    blocks = {name: value for name, value in found.items() if isinstance(value, Block)}
    blocks |= {f"blocks[{k}]": value for k, value in enumerate(found.get("blocks", ()))}
    if len({value.shape for value in blocks.values()}) > 1:
        shapes = ", ".join(f"{name} {value.shape}" for name, value in blocks.items())
        raise ValueError(f"the blocks are on different weights: {shapes}; pass those of one layer")
    if len({value.device for value in blocks.values()}) > 1:
        devices = ", ".join(f"{name} {value.device}" for name, value in blocks.items())
        raise ValueError(f"the blocks are on different devices: {devices}")
    if "reference" in found and len({value.dtype for value in blocks.values()}) > 1:
        dtypes = ", ".join(f"{name} {value.dtype}" for name, value in blocks.items())
        raise ValueError(f"the blocks are in different dtypes: {dtypes}; make both in one")
    weights = {k: found[k] for k in ("gradient", "exact") if isinstance(found.get(k), Tensor)}
    for name, weight in weights.items():
        for value in blocks.values():
            if tuple(weight.shape) != tuple(value.shape):
                raise ValueError(
                    f"{name} must be that of one weight {value.shape}, got {doors.said(weight)}"
                )


def _block(value: object, what: str) -> None:
    if not isinstance(value, Block):
        raise TypeError(f"{what} must be a block of fl.blocks, got {doors.said(value)}")


def _optional_block(value: object, what: str) -> None:
    if value is not None:
        _block(value, what)


def _exact(value: object, what: str) -> None:
    if not isinstance(value, Outer):
        raise TypeError(f"{what} must be an exact block, as captured; got {doors.said(value)}")


def _blocks(value: object, what: str) -> None:
    if not isinstance(value, Sequence) or not value:
        raise TypeError(f"{what} must be a list of blocks, got {doors.said(value)}")
    for position, block in enumerate(value):
        _block(block, f"{what}[{position}]")


def _layers(value: object, what: str) -> None:
    if not isinstance(value, Mapping):
        raise TypeError(f"{what} must be a dict of name -> block, got {doors.said(value)}")
    if not value:
        raise ValueError(f"{what} must have a layer, got an empty dict")
    for name, layer in value.items():
        _with_gram(layer, f"{what}[{name!r}]")


def _with_gram(value: object, what: str) -> None:
    if isinstance(value, type) or not callable(getattr(value, "gram", None)):
        raise TypeError(
            f"{what} must have a Gram matrix, as an exact block or a capture has; got "
            f"{doors.said(value)}"
        )


def _with_eigenvalues(value: object, what: str) -> None:
    if isinstance(value, type) or not callable(getattr(value, "eigenvalues", None)):
        raise TypeError(
            f"{what} must be a block or the Fisher of a network, got {doors.said(value)}"
        )


def _states(value: object, what: str) -> None:
    if not isinstance(value, Mapping):
        raise TypeError(f"{what} must be a dict of step -> block, got {doors.said(value)}")
    for step, block in value.items():
        doors.count(step, f"each step of {what}", 0)
        _block(block, f"{what}[{step!r}]")


def _labels(value: object, what: str) -> None:
    lazy = isinstance(value, Tensor) and nn.parameter.is_lazy(value)
    if not isinstance(value, Tensor) or lazy or value.ndim != 1:
        raise ValueError(f"{what} must be a tensor [M] of classes, got {doors.said(value)}")


def _square(value: object, what: str) -> None:
    matrix = doors.tensor(value, what, ndim=(2,))
    if len(matrix) != matrix.shape[1] or not len(matrix):
        raise ValueError(f"{what} must be a square matrix, got {doors.said(value)}")


def _squares(value: object, what: str) -> None:
    if isinstance(value, Tensor):
        value = list(doors.tensor(value, what, ndim=(3,)))
    found = doors.listed(value, what)
    if not found:
        raise ValueError(f"{what} must be a list of square matrices, got {doors.said(value)}")
    for position, matrix in enumerate(found):
        _square(matrix, f"{what}[{position}]")
    if len({matrix.shape for matrix in found}) > 1:
        raise ValueError(f"{what} must be matrices of one size, got {doors.said(value)}")


def _some(value: object, what: str, least: float) -> list[float]:
    found = doors.numbers(value, what, least=least)
    if not found:
        raise ValueError(f"{what} must have a number, got {doors.said(value)}")
    return found


# checks by annotation
KINDS: dict[str, Callable[[Any, str], object]] = {
    "Block": _block,
    "Block | None": _optional_block,
    "Outer": _exact,
    "HasGram": _with_gram,
    "HasEigenvalues": _with_eigenvalues,
    "Sequence[Block]": _blocks,
    "Mapping[str, HasGram]": _layers,
    "Mapping[int, Block]": _states,
    "Sequence[float]": doors.numbers,
    "bool": doors.flag,
    "Tensor | None": doors.optional(partial(doors.tensor, ndim=(2,))),
    "Mapping[str, np.ndarray]": partial(doors.instance, kind=Mapping, wanted="a dict of arrays"),
}
# checks by name: numbers and tensors of one annotation mean several things
NAMES: dict[str, Callable[[Any, str], object]] = {
    "gradient": partial(doors.tensor, ndim=(2,)),
    "damping": partial(doors.number, least=0.0),
    "dampings": partial(_some, least=0.0),
    "k": partial(doors.count, least=0),
    "rtol": partial(doors.number, least=0.0),
    "alpha": partial(doors.number, above=0.0),
    "examples": doors.count,
    "labels": _labels,
    "correlation": _square,
    "one": _square,
    "two": _square,
    "masses": _square,
    "similarities": _square,
    "correlations": _squares,
    "values": partial(doors.tensor, ndim=(1,)),
    "grid": partial(doors.tensor, ndim=(1,)),
    "width": partial(doors.number, above=0.0),
    "coefficients": partial(doors.tensor, ndim=(1,)),
    "shared": partial(doors.tensor, ndim=(1,)),
}
