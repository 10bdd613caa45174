"""Blocks as nested dictionaries of tensors and numbers: no pickle, dtypes kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fisherlab import doors
from fisherlab.blocks.base import Block, Dense, Powered
from fisherlab.blocks.diagonal import Diagonal
from fisherlab.blocks.direct_sum import DirectSum
from fisherlab.blocks.eigen import Eigen
from fisherlab.blocks.from_inverse import FromInverse
from fisherlab.blocks.kronecker import Kronecker, KroneckerSum
from fisherlab.blocks.mini_block import MiniBlock, RowBlocks
from fisherlab.blocks.numerics import BlockError
from fisherlab.blocks.outer import Outer, OuterSum

_FIELDS: dict[type[Block], tuple[str, ...]] = {
    Dense: ("matrix", "shape"),
    Diagonal: ("entries",),
    DirectSum: ("parts",),
    Eigen: ("Q_G", "Q_A", "spectrum", "tail_G", "tail_A", "tail"),
    FromInverse: ("inverse",),
    Kronecker: ("G", "A"),
    KroneckerSum: ("G", "A"),
    MiniBlock: ("blocks", "bias"),
    Outer: ("a", "g", "core", "shift"),
    Powered: ("_powers", "_vectors", "shape"),
    # the core last: an earlier version saved it in the place of its eigenpairs
    OuterSum: ("a", "g", "W", "d", "shift", "orthonormal", "core"),
    RowBlocks: ("a", "g", "scale"),
}
_FORMS = {form.__name__: form for form in _FIELDS}


def remembers(*fields: str) -> Callable[[type[Block]], type[Block]]:
    """A form of its own, made of these fields: what `damped` needs besides its base's."""

    def enter(form: type[Block]) -> type[Block]:
        _FIELDS[form] = fields
        _FORMS[form.__name__] = form
        return form

    return enter


def to_dict(block: Block) -> dict[str, Any]:
    """The form's name and its tensors.

    Args:
        block: a block; a subclass that `remembers` nothing is saved as its base.

    Returns:
        A dict of tensors, numbers and strings for `torch.save` and `from_dict`.

    Example:
        >>> import torch
        >>> from fisherlab import blocks
        >>> F = blocks.Diagonal(torch.tensor([[2.0, 3.0]]))
        >>> blocks.from_dict(blocks.to_dict(F)).dense().tolist()
        [[2.0, 0.0], [0.0, 3.0]]
    """
    if not isinstance(block, Block):
        raise BlockError(f"block must be a block of fl.blocks, got {doors.said(block)}")
    form = next((form for form in type(block).__mro__ if form in _FIELDS), None)
    if form is None:
        known = ", ".join(_FORMS)
        raise BlockError(f"a {type(block).__name__} cannot be saved; one of {known} can")
    state: dict[str, Any] = {"form": form.__name__}
    for name in _FIELDS[form]:
        value = block.saved(name)
        if isinstance(value, Block):
            value = to_dict(value)
        elif isinstance(value, tuple) and value and isinstance(value[0], Block):
            value = [to_dict(part) for part in value]
        state[name] = value
    return state


def cast(block: Block, dtype: torch.dtype) -> Block:
    """The same block with its tensors in another floating dtype."""

    def converted(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: converted(part) for key, part in value.items()}
        if isinstance(value, list):
            return [converted(part) for part in value]
        return value.to(dtype) if isinstance(value, Tensor) else value

    return from_dict(converted(to_dict(block)))


def from_dict(state: dict[str, Any]) -> Block:
    """The block that `to_dict` described.

    Args:
        state: a result of `to_dict`.

    Returns:
        A block of the same form with equal tensors.

    Raises:
        BlockError: the form is unknown, or its parts do not fit together.
    """
    if not isinstance(state, Mapping) or "form" not in state:
        raise BlockError(f"state must be a dict made by to_dict, got {doors.said(state)}")
    form = _FORMS[doors.choice(state["form"], "block form", _FORMS, error=BlockError)]
    values = []
    for name in _FIELDS[form]:
        value = state.get(name)
        if isinstance(value, dict):
            value = from_dict(value)
        elif isinstance(value, list):
            value = [from_dict(part) for part in value]
        values.append(value)
    made: Callable[..., Block] = getattr(form, "of_saved", form)
    return made(*values).look()
