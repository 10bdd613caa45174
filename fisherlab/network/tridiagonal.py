"""Block-tridiagonal KFAC: each layer given the next one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

from fisherlab import doors
from fisherlab.approximations.damping import trace_ratio_pi
from fisherlab.blocks import BlockError, Kronecker
from fisherlab.blocks.numerics import cholesky, eigh, symmetrise
from fisherlab.extract import LayerCapture
from fisherlab.network.base import NetworkMatrix, Weights, check_captures


class Tridiagonal(NetworkMatrix):
    """`F^{-1} ~ X^T diag(S_1^{-1} ... S_L^{-1}) X`.      Martens & Grosse 2015, section 4.3.

    With `F_kl = G_kl (x) A_kl`, `G_kl = (1/M) sum g_k g_l^T` and `A_kl = (1/M) sum a_k a_l^T`:

        P_k = F_{k,k+1} F_{k+1,k+1}^{-1},   X = I - P_k above its diagonal
        S_k = F_kk - P_k F_{k+1,k+1} P_k^T,   S_L = F_LL

    The matrix has KFAC's blocks on its diagonal and beside it, and an inverse without any others.
    Layers follow each other as in the captures, as a network without branches calls them.
    `F_kk` has the damping in its factors, `G + sqrt(lambda)/pi I` and `A + pi sqrt(lambda) I` with
    `pi^2 = (tr A / i) / (tr G / o)`, section 6.3. It couples layers, so it is a matrix of the
    network and no approximation of one block.

    Args:
        captures: `fl.capture(...)` of one batch; each layer is fully connected and called once.
        damping: lambda, absolute, positive.

    Raises:
        BlockError: a layer is shared over positions, as a convolution is, or the damping is not
            positive.
    """

    def __init__(self, captures: Mapping[str, LayerCapture], damping: float) -> None:
        check_captures(captures)
        damping = doors.number(damping, "damping", above=0.0, error=BlockError)
        self.damping, layers = damping, list(captures.values())
        for layer in layers:
            if layer.positions != 1 or not layer.whole or layer.counted is not None:
                raise BlockError(
                    f"layer {layer.name!r} is shared over {layer.positions} positions; section 4.3 "
                    "is of fully-connected layers, and positions of two layers have no pairs"
                )
            if layer.columns.sizes != layers[0].columns.sizes:
                raise BlockError(f"layer {layer.name!r} has other columns: capture them together")
        self.shapes = {name: layer.shape for name, layer in captures.items()}
        self.dtype, self.device = layers[0].dtype, layers[0].device
        a = [layer.columns.a[:, 0].double() for layer in layers]
        g = [layer.columns.g[:, :, 0].double().flatten(0, 1) for layer in layers]
        M = float(layers[0].examples)
        factors = [
            _damped(x.mT @ x / M, y.mT @ y / M, math.sqrt(damping))
            for x, y in zip(a, g, strict=True)
        ]
        self._G, self._A = ([pair[side] for pair in factors] for side in (1, 0))
        # each layer given the next: P_k as the factors of its Kronecker product
        self._P = [
            (
                _divided(g[k].mT @ g[k + 1] / M, self._G[k + 1], "output"),
                _divided(a[k].mT @ a[k + 1] / M, self._A[k + 1], "input"),
            )
            for k in range(len(layers) - 1)
        ]
        self._S = [
            _Difference(
                self._G[k], self._A[k], *(_around(P, S) for P, S in zip(pair, after, strict=True))
            )
            for k, (pair, after) in enumerate(
                zip(self._P, zip(self._G[1:], self._A[1:], strict=True), strict=True)
            )
        ]
        last = (torch.zeros_like(S) for S in (self._G[-1], self._A[-1]))
        self._S.append(_Difference(self._G[-1], self._A[-1], *last))

    def solve(self, V: Mapping[str, Tensor]) -> Weights:
        """The product with the inverse: KFAC's step, each layer's corrected by its neighbours."""
        self.check(V)
        v = [V[name].double() for name in self.shapes]
        u = [x - _times(P, y) for (x, y), P in zip(pairwise(v), self._P, strict=True)] + [v[-1]]
        w = [S.solve(x) for S, x in zip(self._S, u, strict=True)]
        found = [w[0]] + [
            y - _transposed(P, x) for (x, y), P in zip(pairwise(w), self._P, strict=True)
        ]
        return self._named(found)

    def __matmul__(self, V: Mapping[str, Tensor]) -> Weights:
        self.check(V)
        v = [V[name].double() for name in self.shapes]
        p = [v[0]]
        for x, P in zip(v[1:], self._P, strict=True):
            p.append(x + _transposed(P, p[-1]))
        found = [S @ x for S, x in zip(self._S, p, strict=True)]
        for k in reversed(range(len(self._P))):
            found[k] = found[k] + _times(self._P[k], found[k + 1])
        return self._named(found)

    def _named(self, found: list[Tensor]) -> Weights:
        return {name: x.to(self.dtype) for name, x in zip(self.shapes, found, strict=True)}


class _Difference:
    """`G (x) A - C (x) D` with `C <= G` and `D <= A`, and its inverse.      Appendix B."""

    def __init__(self, G: Tensor, A: Tensor, C: Tensor, D: Tensor) -> None:
        self.terms = (G, A, C, D)
        self.K_G, s_G = _whitened(G, C)
        self.K_A, s_A = _whitened(A, D)
        self.values = 1 - torch.outer(s_G, s_A)

    def __matmul__(self, V: Tensor) -> Tensor:
        G, A, C, D = self.terms
        return G @ V @ A - C @ V @ D

    def solve(self, V: Tensor) -> Tensor:
        """`K_G ((K_G^T V K_A) / (1 - s_G s_A^T)) K_A^T`."""
        return self.K_G @ ((self.K_G.mT @ V @ self.K_A) / self.values) @ self.K_A.mT


def _whitened(S: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """`K` and `s` with `K^T S K = I` and `K^T C K = diag(s)`."""
    L = cholesky(S, "factor of block-tridiagonal KFAC")
    half = torch.linalg.solve_triangular(L, C, upper=False)
    inside = torch.linalg.solve_triangular(L, half.mT, upper=False)
    s, E = eigh(symmetrise(inside), "factor of block-tridiagonal KFAC")
    return torch.linalg.solve_triangular(L.mT, E, upper=True), s


def _damped(A: Tensor, G: Tensor, root: float) -> tuple[Tensor, Tensor]:
    """`A + pi root I` and `G + root / pi I`; `pi` from both traces."""
    pi = trace_ratio_pi(Kronecker(symmetrise(G), symmetrise(A)))
    eye_A, eye_G = (torch.eye(len(S), dtype=S.dtype, device=S.device) for S in (A, G))
    return symmetrise(A) + pi * root * eye_A, symmetrise(G) + root / pi * eye_G


def _divided(cross: Tensor, S: Tensor, side: str) -> Tensor:
    """`X S^{-1}`."""
    return torch.cholesky_solve(cross.mT, cholesky(S, f"{side} factor")).mT


def _around(P: Tensor, S: Tensor) -> Tensor:
    return symmetrise(P @ S @ P.mT)


def _times(P: tuple[Tensor, Tensor], V: Tensor) -> Tensor:
    return P[0] @ V @ P[1].mT


def _transposed(P: tuple[Tensor, Tensor], V: Tensor) -> Tensor:
    return P[0].mT @ V @ P[1]
