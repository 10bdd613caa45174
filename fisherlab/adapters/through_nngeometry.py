"""NNGeometry: its KFAC, EKFAC, diagonal and dense blocks as blocks of ours.

`PMatKFAC` keeps `A` times `sqrt(C)` and `G` over `sqrt(C)`, `C` the columns of the square root that
it takes: the product is ours. `variant="regression"` takes the identity as covariance, so that its
matrices are `C/2` times those of `nn.MSELoss` under a mean.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fisherlab import doors
from fisherlab.adapters.library import AdapterError, library
from fisherlab.blocks import Block, Dense, Diagonal, Eigen, Kronecker


def from_nngeometry(matrix: Any, model: nn.Module) -> dict[str, Block]:
    """The blocks of a `PMatKFAC`, `PMatEKFAC`, `PMatDiag` or `PMatBlockDiag`, by layer.

    `kron(G, A)` on `[W | b]`, the scale as NNGeometry's function of the outputs has it. The rows of
    a dense block are brought from `[vec W, b]` into the order of ours.

    Args:
        matrix: the matrix; an EKFAC whose diagonal was updated, which `update_diag` does.
        model: the model that it is of.

    Returns:
        Blocks on `[W | b]` by layer.

    Raises:
        AdapterError: NNGeometry is not installed, or the representation is another.
        TypeError: the model is no module.
    """
    doors.module(model)
    pspace = library("nngeometry.object")
    kinds = {"PMatKFAC": _kfac, "PMatEKFAC": _ekfac, "PMatDiag": _diagonal, "PMatBlockDiag": _dense}
    make = kinds.get(type(matrix).__name__)
    if make is None or not isinstance(matrix, getattr(pspace, type(matrix).__name__)):
        raise AdapterError(
            f"from_nngeometry takes {', '.join(kinds)}, got a {type(matrix).__name__}"
        )
    layers = matrix.generator.layer_collection.layers
    modules = matrix.generator.layer_collection.get_layerid_module_maps(model)[0]
    names = {id(module): name for name, module in model.named_modules()}
    found = {}
    for key in layers:
        module = modules[key]
        if getattr(module, "weight", None) is not None and module.weight.ndim > 1:
            found[names[id(module)]] = make(matrix, key, module)
    return found


def _shape(module: Any) -> tuple[int, int]:
    o = len(module.weight)
    return o, module.weight[0].numel() + (module.bias is not None)


def _kfac(matrix: Any, key: Any, module: Any) -> Block:
    A, G = matrix.data[key]
    return Kronecker(G, A)


def _ekfac(matrix: Any, key: Any, module: Any) -> Block:
    vectors, values = matrix.data
    Q_A, Q_G = vectors[key]
    return Eigen(Q_G, Q_A, values[key].reshape(_shape(module)))


def order(shape: tuple[int, int], bias: bool) -> Tensor:
    """Where each entry of our `[W | b]` lies in `[vec W, b]`."""
    o, i = shape
    if not bias:
        return torch.arange(o * i)
    weights = torch.arange(o * (i - 1)).view(o, i - 1)
    return torch.cat([weights, o * (i - 1) + torch.arange(o)[:, None]], 1).flatten()


def _diagonal(matrix: Any, key: Any, module: Any) -> Block:
    leaves = [x for x in matrix.data[key] if x is not None]
    parts = [leaves[0].flatten(1), *(x[:, None] for x in leaves[1:])]
    return Diagonal(torch.cat(parts, 1))


def _dense(matrix: Any, key: Any, module: Any) -> Block:
    shape = _shape(module)
    where = order(shape, module.bias is not None)
    return Dense(matrix.data[key][where][:, where], shape)
