"""Energies of gradients in a Kronecker basis, and beside a thin one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fisherlab.blocks.base import Block
from fisherlab.blocks.basis import Basis, Coordinates
from fisherlab.blocks.columns import Columns
from fisherlab.blocks.eigen import Eigen
from fisherlab.blocks.kronecker import Kronecker
from fisherlab.blocks.numerics import BlockError

# Tensors by name, and the bases of both sides.
Found = dict[str, Any]
# Options that `Eigen` takes besides a spectrum.
TAILS = ("tail_G", "tail_A", "tail")


def basis_of(product: Block) -> Found:
    """Eigenvalues and vectors of both factors; a side in its own coordinates has no vectors.

    Raises:
        BlockError: the block is no Kronecker product.
    """
    if not isinstance(product, Kronecker):
        raise BlockError(
            f"eigenvalues are corrected in the basis of a Kronecker product: {product!r}"
        )
    (l_G, Q_G), (l_A, Q_A) = product.spectra
    bases = {"Q_G": Q_G, "Q_A": Q_A}
    kept = {key: Q for key, Q in bases.items() if not isinstance(Q, Coordinates)}
    return {**kept, "l_G": l_G, "l_A": l_A}


def bases(basis: Found) -> tuple[Basis, Basis]:
    """`Q_G` and `Q_A` of what `basis_of` made."""
    Q_G, Q_A = (
        basis[f"Q_{s}"] if f"Q_{s}" in basis else Coordinates(basis[f"l_{s}"]) for s in "GA"
    )
    return Q_G, Q_A


def energies(columns: Columns, Q_G: Basis, Q_A: Basis) -> Found:
    """`sum (Q_G^T D Q_A)^2` entrywise as "spectrum", and the `TAILS` that a thin basis leaves.

    The tails are the energy beside the basis for each direction missing; 0 for the batch that the
    basis is of.
    """
    inside = columns.rotated_squares(Q_G, Q_A)
    found = {"spectrum": inside.to(columns.dtype)}
    thin = Q_A.shape[1] < len(Q_A) or Q_G.shape[1] < len(Q_G)
    return found | _complement(columns, Q_G, Q_A, inside) if thin else found


def gradient_energies(D: Tensor, examples: float, Q_G: Basis, Q_A: Basis) -> Found:
    """`M (Q_G^T D Q_A)^2` entrywise as "spectrum", of the mean gradient `D` of `M` examples."""
    return {"spectrum": examples * (Q_G.mT @ (D @ Q_A)).square()}


def carried(spectrum: Tensor, old: Found, new: Found) -> Tensor:
    """`(Q_G'^T Q_G)^2 spectrum ((Q_A'^T Q_A)^2)^T`, entrywise squares: energies in a new basis."""
    R_G, R_A = ((to.mT @ Q).square() for to, Q in zip(bases(new), bases(old), strict=True))
    return R_G @ spectrum @ R_A.mT


def corrected(basis: Found, found: Found) -> Eigen:
    """The block of means of `energies` in a basis; of its own eigenvalues before there are any."""
    own = basis["l_G"].clamp(min=0)[:, None] * basis["l_A"].clamp(min=0)
    spectrum = found.get("spectrum", own)
    tails = {key: x.to(spectrum) for key, x in found.items() if key in TAILS and x.any()}
    block = Eigen(basis.get("Q_G"), basis.get("Q_A"), spectrum, **tails)
    return block.of_factors(basis["l_G"], basis["l_A"])


def _complement(columns: Columns, Q_G: Basis, Q_A: Basis, inside: Tensor) -> Found:
    missing_A, missing_G = len(Q_A) - Q_A.shape[1], len(Q_G) - Q_G.shape[1]
    rows, cols, within = inside.sum(1), inside.sum(0), inside.sum()
    total = columns.energies.sum()
    rows_all, cols_all = rows, cols
    if total - within <= 1e3 * torch.finfo(columns.dtype).eps * total:
        rest = torch.zeros_like(total)
    else:
        if missing_A:
            rows_all = columns.left_diagonal(Q_G)
        if missing_G:
            cols_all = columns.right_diagonal(Q_A)
        rest = total - rows_all.sum() - cols_all.sum() + within
    found: Found = {}
    if missing_A:
        found["tail_G"] = (rows_all - rows).clamp(min=0) / missing_A
    if missing_G:
        found["tail_A"] = (cols_all - cols).clamp(min=0) / missing_G
    if missing_A and missing_G:
        found["tail"] = rest.clamp(min=0) / (missing_A * missing_G)
    return found
