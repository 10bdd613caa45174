"""Our matrices as operators of curvlinops, which estimates traces, densities and diagonals."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fisherlab import doors
from fisherlab.adapters.library import AdapterError, library
from fisherlab.blocks import Block


def as_curvlinops_operator(matrix: Any) -> Any:
    """A block, or a matrix of a network, as a self-adjoint `PyTorchLinearOperator` on `[N]`.

        operator = fl.adapters.as_curvlinops_operator(fl.network.NetworkHessian(model, loss, x, y))
        curvlinops.hutchpp_trace(operator, num_matvecs=300)
        curvlinops.lanczos_approximate_spectrum(operator, ncv=50)

    Args:
        matrix: a block of `fl.blocks`, a `fl.network.NetworkFisher`, `NetworkHessian` or
            `Tridiagonal`.

    Returns:
        The operator, with the precision and device of the matrix.

    Raises:
        AdapterError: curvlinops is not installed, or the matrix is another.
    """
    of_network = all(hasattr(matrix, name) for name in ("split", "flat", "size"))
    if not (isinstance(matrix, Block) or of_network):
        raise AdapterError(
            f"as_curvlinops_operator takes a block or a matrix of a network, got "
            f"{doors.said(matrix)}"
        )
    theirs = library("curvlinops._torch_base").PyTorchLinearOperator

    class Operator(theirs):  # type: ignore[misc, valid-type]
        """Products with vectors of length N."""

        SELF_ADJOINT = True
        device, dtype = matrix.device, matrix.dtype

        def _matmat(self, X: list[Tensor]) -> list[Tensor]:
            rows = X[0].mT
            if isinstance(matrix, Block):
                found = matrix @ rows.reshape(-1, *matrix.shape)
                return [found.reshape(len(rows), -1).mT]
            return [torch.stack([matrix.flat(matrix @ matrix.split(v)) for v in rows], 1)]

    shape = [(matrix.size,)]
    return Operator(shape, shape)
