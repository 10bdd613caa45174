"""The Fisher matrix of a whole network, exact, from the sum of its layers' Gram matrices."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from fisherlab import doors
from fisherlab.blocks import BlockError
from fisherlab.blocks.numerics import check_damping, cholesky, eigh, sum_of
from fisherlab.extract import LayerCapture
from fisherlab.network.base import NetworkMatrix, Weights, check_captures


class NetworkFisher(NetworkMatrix):
    """`F = (1/M) U U^T`, `U = [U_1; ...; U_L]` of all layers, blocks between layers included.

    Its nonzero spectrum is that of `(1/M) sum_l U_l^T U_l`, a matrix of the columns alone.

    Args:
        captures: `fl.capture(...)` of one batch, or some of its layers. A grouped convolution has a
            capture per group.

    Raises:
        BlockError: there are no layers, or they have different columns.

    Example:
        >>> import torch, fisherlab as fl
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
        >>> x, y = torch.ones(5, 4), torch.tensor([0, 1, 0, 1, 0])
        >>> F = fl.network.NetworkFisher(fl.capture(model, nn.CrossEntropyLoss(), x, y))
        >>> F.size, len(F.eigenvalues())
        (23, 10)
    """

    def __init__(self, captures: Mapping[str, LayerCapture]) -> None:
        check_captures(captures)
        self.layers = dict(captures)
        first = next(iter(self.layers.values()))
        sizes = {name: layer.columns.sizes for name, layer in self.layers.items()}
        counted = {layer.examples for layer in self.layers.values()}
        if len(set(sizes.values())) > 1 or len(counted) > 1:
            raise BlockError(
                f"the layers have different columns, (vectors, examples) {sizes}: capture them "
                "together, in one batch"
            )
        self.columns = {name: layer.columns for name, layer in self.layers.items()}
        self.examples = float(first.examples)
        self.shapes = {name: layer.shape for name, layer in self.layers.items()}
        self.dtype, self.device = first.dtype, first.device

    @cached_property
    def gram(self) -> Tensor:
        """`sum_l U_l^T U_l`, `[R, R]` float64."""
        return sum_of(layer.gram().double() for layer in self.layers.values())

    @cached_property
    def _eigh(self) -> tuple[Tensor, Tensor]:
        values, vectors = eigh(self.gram / self.examples, "joint Gram matrix")
        return values.flip(0).clamp(min=0), vectors.flip(1)

    def __matmul__(self, V: Mapping[str, Tensor]) -> Weights:
        self.check(V)
        return self._combined(self._projected(V) / self.examples)

    def _projected(self, V: Mapping[str, Tensor]) -> Tensor:
        """`U^T vec(V)`, `[m, n]` float64."""
        return sum_of(of.project(V[name], exact=True) for name, of in self.columns.items())

    def _combined(self, coefficients: Tensor) -> Weights:
        return {
            name: of.combine(coefficients, exact=True).to(of.dtype)
            for name, of in self.columns.items()
        }

    def solve(self, V: Mapping[str, Tensor], damping: float) -> Weights:
        """`(F + damping I)^{-1} vec(V)`, by Woodbury's identity.

        Raises:
            BlockError: the damping is not positive: F has rank R at most.
        """
        self.check(V)
        damping = check_damping(damping, self.dtype)
        if damping == 0:
            raise BlockError("the whole Fisher is singular, so its inverse needs damping > 0")
        projected = self._projected(V)
        eye = torch.eye(len(self.gram), dtype=torch.float64, device=self.device)
        factor = cholesky(self.gram + self.examples * damping * eye, "joint Gram matrix")
        c = torch.cholesky_solve(projected.reshape(-1, 1), factor).view_as(projected)
        inside = self._combined(c)
        return {name: (V[name] - inside[name]) / damping for name in self.shapes}

    def attained(
        self, step: Mapping[str, Tensor], gradient: Mapping[str, Tensor], damping: float
    ) -> Tensor:
        """Share of the quadratic model's decrease that a step reaches, at its best length.

            (g^T d)^2 / (d^T F_l d) / (g^T F_l^{-1} g),   F_l = F + damping I

        1 is the natural gradient of all layers jointly. With `d` the layers' own natural gradients,
        `{name: fl.Exact()(layer).solve(g, damping)}`, it is what ignoring the blocks between layers
        leaves: the layerwise oracle of 2510.09378. An approximation's gap to it is the difference
        of both shares. The paper measures iterations of training instead.

        Args:
            step: `d` by layer, of any length and sign.
            gradient: `g` by layer.
            damping: lambda, absolute, positive.

        Returns:
            0-d float64 in [0, 1]; 0 for a step of length 0.

        Raises:
            BlockError: layers or shapes differ, or the damping is not positive.
        """
        best = self.flat(self.solve(gradient, damping)).double()
        d, g = self.flat(step).double(), self.flat(gradient).double()
        curved = self.flat(self @ step).double() + damping * d
        bounds = (d @ curved) * (g @ best)
        return torch.where(bounds > 0, (g @ d) ** 2 / bounds, 0).clamp(max=1)

    def trace(self) -> Tensor:
        """`tr F`, 0-d float64."""
        return self.gram.trace() / self.examples

    def squared_norm(self) -> Tensor:
        """`||F||_F^2`, 0-d float64."""
        return self.gram.square().sum() / self.examples**2

    def eigenvalues(self) -> Tensor:
        """The `min(R, N)` largest eigenvalues, descending; the others are 0."""
        return self._eigh[0][: self.size]

    def leading(self, k: int, which: str = "LA", tol: float = 0.0) -> tuple[Tensor, list[Weights]]:
        """The k largest eigenvalues and unit eigenvectors by layer, from the Gram matrix.

        Raises:
            BlockError: `which` is another end than "LA", for which every other eigenvalue is 0.
        """
        if which != "LA":
            raise BlockError("the whole Fisher has no end but 'LA': its other eigenvalues are 0")
        values, W = self._eigh
        rounding = len(values) * torch.finfo(torch.float64).eps * values[0]
        k = min(doors.count(k, "k", error=BlockError), int((values > rounding).sum()))
        vectors = []
        for value, w in zip(values[:k], W.mT[:k], strict=True):
            shape = next(iter(self.columns.values())).sizes
            vectors.append(self._combined((w / (self.examples * value).sqrt()).view(shape)))
        return values[:k], vectors
