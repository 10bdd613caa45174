"""NNGeometry: its KFAC, EKFAC, diagonal and dense blocks as blocks of ours.

`PMatKFAC` keeps `A` times `sqrt(C)` and `G` over `sqrt(C)`, `C` the columns of the square root that
it takes: the product is ours. `variant="regression"` takes the identity as covariance, so that its
matrices are `C/2` times those of `nn.MSELoss` under a mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fisherlab import doors
from fisherlab.adapters.library import AdapterError, library
from fisherlab.blocks import Block, Dense, Diagonal, Eigen, Kronecker
from fisherlab.blocks.basis import matrix_of


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


def to_nngeometry(blocks: Mapping[str, Block], like: Any, model: nn.Module) -> Any:
    """Our Kronecker products or eigenbases as a `PMatKFAC` or `PMatEKFAC`, the way back.

    NNGeometry's matrix keeps its generator, which no block of ours has: `like` lends it, and stays
    as it was.

    Args:
        blocks: by layer, for every layer of `like`: products for a `PMatKFAC`, `Q diag Q^T` (as
            those of EKFAC) for a `PMatEKFAC`.
        like: a matrix of NNGeometry on the same model.
        model: the model.

    Returns:
        A new matrix of the kind of `like`, with our numbers.

    Raises:
        AdapterError: NNGeometry is not installed, or layers, kinds or shapes differ.
    """
    if not isinstance(blocks, Mapping):
        raise AdapterError(f"blocks must be a dict of layer -> block, got {doors.said(blocks)}")
    known = from_nngeometry(like, model)
    if set(blocks) != set(known):
        raise AdapterError(
            f"the blocks are of layers {sorted(blocks)}, the matrix is of {sorted(known)}"
        )
    kind = {"PMatKFAC": Kronecker, "PMatEKFAC": Eigen}.get(type(like).__name__)
    if kind is None:
        raise AdapterError(f"to_nngeometry makes PMatKFAC or PMatEKFAC, got {type(like).__name__}")
    for name, block in blocks.items():
        if isinstance(block, Eigen) and block.thin:
            raise AdapterError(
                f"the block of layer {name!r} has a basis of fewer vectors than the layer has "
                "features, and NNGeometry keeps full ones: capture more examples"
            )
        if not isinstance(block, kind) or block.shape != known[name].shape:
            raise AdapterError(
                f"the block of layer {name!r} must be {kind.__name__} {known[name].shape} for a "
                f"{type(like).__name__}, got {block!r}"
            )
    collection = like.generator.layer_collection
    modules = collection.get_layerid_module_maps(model)[0]
    names = {id(module): name for name, module in model.named_modules()}
    ours: dict[Any, Any] = {key: blocks[names[id(modules[key])]] for key in collection.layers}
    if kind is Kronecker:
        data: Any = {key: (block.A, block.G) for key, block in ours.items()}
    else:
        bases = {k: tuple(matrix_of(Q) for Q in (b.Q_A, b.Q_G)) for k, b in ours.items()}
        data = bases, {key: block.spectrum.flatten() for key, block in ours.items()}
    return type(like)(generator=like.generator, data=data)


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
        return torch.arange(o * i, device="cpu")
    weights = torch.arange(o * (i - 1), device="cpu").view(o, i - 1)
    return torch.cat([weights, o * (i - 1) + torch.arange(o, device="cpu")[:, None]], 1).flatten()


def _diagonal(matrix: Any, key: Any, module: Any) -> Block:
    leaves = [x for x in matrix.data[key] if x is not None]
    parts = [leaves[0].flatten(1), *(x[:, None] for x in leaves[1:])]
    return Diagonal(torch.cat(parts, 1))


def _dense(matrix: Any, key: Any, module: Any) -> Block:
    shape = _shape(module)
    where = order(shape, module.bias is not None)
    return Dense(matrix.data[key][where][:, where], shape)
