"""BackPACK: the factors and diagonals that it leaves at the parameters, as blocks of ours.

`p.kflr = [B, A]` of a `nn.Linear` with inputs `[n, i]` has the scale of ours; weight and bias are
apart. For a convolution it is `A = (1/N) sum_n sum_s a a^T`, `S` times KFAC-expand's, beside
KFAC-reduce's `B`: neither KFC nor KFAC-reduce.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fisherlab import doors
from fisherlab.adapters.library import AdapterError, check_method, library
from fisherlab.blocks import Block, ColumnSum, Diagonal, Kronecker

FACTORS = ("kfac", "kflr", "kfra")
DIAGONALS = ("diag_ggn_exact", "diag_ggn_mc", "diag_h", "sum_grad_squared")


def from_backpack(model: nn.Module, quantity: str = "kflr") -> dict[str, Block]:
    """The blocks that a backward pass inside `backpack(...)` left at the parameters of a model.

    Numbers are BackPACK's own; for a mean-reduced loss they are per example, like ours.
    `sum_grad_squared` is a sum over examples of squared gradients that carry `1/N`. A caller who
    knows `N` multiplies by `N` for the scale of ours.

    Args:
        model: the extended model.
        quantity: "kfac", "kflr", "kfra", "diag_ggn_exact", "diag_ggn_mc", "diag_h" or
            "sum_grad_squared", the name of the attribute.

    Returns:
        Blocks on `[W | b]` by layer; weight and bias are independent parts.

    Raises:
        AdapterError: BackPACK is not installed, or no parameter has the quantity.
        ValueError, TypeError: the quantity is unknown, or the model no module.
    """
    doors.module(model)
    check_method(quantity, (*FACTORS, *DIAGONALS), "BackPACK")
    library("backpack")
    found: dict[str, Block] = {}
    for name, module in model.named_modules():
        parts = [getattr(module, leaf, None) for leaf in ("weight", "bias")]
        values = [getattr(p, quantity, None) for p in parts if isinstance(p, nn.Parameter)]
        if values and values[0] is not None:
            blocks = [_block(value, k) for k, value in enumerate(values) if value is not None]
            found[name] = blocks[0] if len(blocks) == 1 else ColumnSum(blocks)
    if not found:
        raise AdapterError(
            f"no parameter of this {type(model).__name__} has {quantity!r}: call backward() of an "
            f"extended model inside `with backpack(...)` of that extension first"
        )
    return found


def _block(value: Any, place: int) -> Block:
    if isinstance(value, Tensor):
        return Diagonal(value.flatten(1) if not place else value.flatten()[:, None])
    if len(value) == 1:
        return Kronecker(value[0], value[0].new_ones(1, 1))
    B, A = value
    return Kronecker(B, A)


def to_backpack(block: Kronecker, bias: bool = True) -> tuple[list[Tensor], list[Tensor]]:
    """`[B, A]` of a weight and `[B]` of its bias, as `p.kflr` has them, of a block on `[W | b]`.

    The last column of `A`, which couples weight and bias, is left out. `B` of the bias is scaled by
    the last entry of `A`, which is 1 where all positions count.

    Args:
        block: a Kronecker product.
        bias: whether its last column is a bias.

    Returns:
        The lists of the weight and of the bias, the latter empty without one.

    Raises:
        AdapterError: the block is another.
        ValueError: `bias` is no flag, or the block has the column of a bias only.
    """
    if not isinstance(block, Kronecker):
        raise AdapterError(f"to_backpack takes a Kronecker product, got {doors.said(block)}")
    doors.flag(bias, "bias")
    if bias and block.shape[1] < 2:
        raise ValueError(f"a weight {block.shape} has no bias beside it; pass bias=False")
    if not bias:
        return [block.G, block.A], []
    return [block.G, block.A[:-1, :-1]], [block.G * block.A[-1, -1]]
