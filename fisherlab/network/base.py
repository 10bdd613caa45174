"""`NetworkMatrix`: a symmetric matrix on the weights of several layers, by products alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fisherlab import doors
from fisherlab.blocks import BlockError
from fisherlab.blocks.numerics import check_dense, symmetrise
from fisherlab.extract.joint import check_layers

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

Weights = dict[str, Tensor]


def check_captures(captures: object) -> None:
    """Refuse what is no dict of captures, at least one."""
    if not isinstance(captures, Mapping) or not captures:
        raise BlockError(f"captures must be those of fl.capture, got {doors.said(captures)}")
    check_layers(list(captures.values()))


class NetworkMatrix(ABC):
    """A symmetric matrix that acts on `{name: [o, i]}`, one weight per layer; never formed.

    As a vector of length N, the layers follow each other in the order of `shapes`, each row by row.
    """

    shapes: dict[str, tuple[int, ...]]
    dtype: torch.dtype
    device: torch.device

    @abstractmethod
    def __matmul__(self, V: Mapping[str, Tensor]) -> Weights:
        """The product with one weight per layer."""

    @property
    def size(self) -> int:
        """N, the parameters of all layers."""
        return sum(int(np.prod(shape)) for shape in self.shapes.values())

    def flat(self, V: Mapping[str, Tensor]) -> Tensor:
        """The layers' weights as one vector `[N]`."""
        self.check(V)
        return torch.cat([V[name].flatten() for name in self.shapes])

    def split(self, vector: Tensor) -> Weights:
        """One vector `[N]` as the layers' weights."""
        doors.tensor(vector, "vector", ndim=(1,), error=BlockError)
        sizes = [int(np.prod(shape)) for shape in self.shapes.values()]
        if len(vector) != sum(sizes):
            raise BlockError(f"vector must have {sum(sizes)} entries, got {len(vector)}")
        pieces = zip(self.shapes.items(), vector.split(sizes), strict=True)
        return {name: piece.reshape(shape) for (name, shape), piece in pieces}

    def check(self, V: Mapping[str, Tensor]) -> None:
        """Refuse weights of other layers or shapes.

        Raises:
            BlockError: they differ; the message names the layer.
        """
        if not isinstance(V, Mapping):
            raise BlockError(f"V must be a dict of layer -> weight, got {doors.said(V)}")
        if set(V) != set(self.shapes):
            raise BlockError(
                f"V has the layers {sorted(V)}, this {type(self).__name__} has "
                f"{sorted(self.shapes)}"
            )
        for name, shape in self.shapes.items():
            doors.tensor(V[name], f"V[{name!r}]", error=BlockError)
            if tuple(V[name].shape) != tuple(shape):
                raise BlockError(
                    f"V[{name!r}] must have the shape {tuple(shape)}, got {doors.said(V[name])}"
                )
            if V[name].dtype != self.dtype or V[name].device != self.device:
                raise BlockError(
                    f"V[{name!r}] must be {self.dtype} on {self.device}, got {V[name].dtype} on "
                    f"{V[name].device}"
                )

    def dense(self) -> Tensor:
        """The matrix `[N, N]`; raises `BlockTooLarge` past the memory budget."""
        check_dense(self.size, self.dtype, self.device, type(self).__name__)
        eye = torch.eye(self.size, dtype=self.dtype, device=self.device)
        rows = [torch.cat([x.flatten() for x in (self @ self.split(e)).values()]) for e in eye]
        return symmetrise(torch.stack(rows))

    def as_linear_operator(self) -> LinearOperator:
        """The matrix as a SciPy `LinearOperator` on vectors of length N."""
        from scipy.sparse.linalg import LinearOperator

        def matvec(v: np.ndarray) -> np.ndarray:
            vector = torch.as_tensor(np.ascontiguousarray(v.reshape(-1)), device="cpu")
            found = self @ self.split(vector.to(self.device, self.dtype))
            return torch.cat([x.flatten() for x in found.values()]).cpu().numpy()

        dtype = torch.empty(0, dtype=self.dtype, device="cpu").numpy().dtype
        return LinearOperator((self.size,) * 2, matvec=matvec, rmatvec=matvec, dtype=dtype)

    def leading(self, k: int, which: str = "LA", tol: float = 0.0) -> tuple[Tensor, list[Weights]]:
        """Eigenpairs by SciPy's `eigsh`, from a fixed start.

        Args:
            k: how many.
            which: "LA" the largest, "SA" the smallest, "LM" the largest in size.
            tol: relative accuracy of the eigenvalues; 0: of the precision.

        Returns:
            The eigenvalues `[k]`, the largest first, and the eigenvectors by layer.
        """
        from scipy.sparse.linalg import eigsh

        k = min(doors.count(k, "k", error=BlockError), self.size - 1)
        doors.choice(which, "which", ("LA", "SA", "LM"), error=BlockError)
        tol = doors.number(tol, "tol", least=0.0, error=BlockError)
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(self.size, generator=generator, dtype=torch.float64, device="cpu")
        operator = self.as_linear_operator()
        values, vectors = eigsh(
            operator, k=k, which=which, tol=tol, v0=start.numpy().astype(operator.dtype)
        )
        order = np.argsort(values)[::-1].copy()
        found = torch.as_tensor(vectors[:, order].T.copy(), dtype=self.dtype, device=self.device)
        largest = torch.as_tensor(values[order].copy(), device="cpu").double()
        return largest, [self.split(v) for v in found]
