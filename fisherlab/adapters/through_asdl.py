"""ASDL: the Kronecker factors of its Fisher as blocks of ours.

Its losses are sums, and it divides by `data_size`: `B = (1/N) sum g g^T` is ours. `A` of a
convolution is `(1/NS) sum a a^T`, ours; `A` of a `nn.Linear` with inputs `[n, s, i]` is
`(1/N) sum a a^T`, `S` times ours. Weight and bias are apart, and a bias has `B` alone.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from fisherlab import doors
from fisherlab.adapters.library import AdapterError, library
from fisherlab.blocks import Block, ColumnSum, Kronecker


def from_asdl(
    model: nn.Module, positions: Mapping[str, int] | None = None, attribute: str = "fisher"
) -> dict[str, Block]:
    """The blocks of the factors that a `FisherMaker` with shape "kron" left at the modules.

    Args:
        model: the model of the maker, after `forward_and_backward`.
        positions: by name, the positions `S` of layers `nn.Linear` over sequences, whose `A` is
            then divided by `S`; a layer that is left out has one position.
        attribute: `fisher_attr` of the maker's configuration.

    Returns:
        Blocks on `[W | b]` by layer, in the scale of ours; weight and bias are independent parts.

    Raises:
        AdapterError: ASDL is not installed, no module has the factors, or `positions` names
            another layer.
        TypeError: the model is no module.
    """
    doors.module(model)
    library("asdl")
    given = dict(positions or {})
    found: dict[str, Block] = {}
    for name, module in model.named_modules():
        kron = getattr(getattr(module, attribute, None), "kron", None)
        if kron is None or kron.A is None or kron.B is None:
            continue
        S = doors.count(given.pop(name, 1), f"positions[{name!r}]")
        weight = Kronecker(kron.B, kron.A / S)
        bias = getattr(module, "bias", None)
        alone = Kronecker(kron.B, kron.B.new_ones(1, 1))
        found[name] = weight if bias is None else ColumnSum([weight, alone])
    if not found:
        raise AdapterError(
            f"no module of this {type(model).__name__} has Kronecker factors at {attribute!r}: "
            "make them by FisherConfig(..., fisher_shapes=[SHAPE_KRON], data_size=N) first"
        )
    if given:
        raise AdapterError(f"positions names {sorted(given)}, the factors are of {sorted(found)}")
    return found
