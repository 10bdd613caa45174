"""Right-hand sides: definitions written out with autograd and dense matrices, no FisherLab."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad, jacrev, vjp, vmap
from torch.nn import functional as F

from fisherlab.claims.base import Case
from fisherlab.claims.instances import joint, labels, layer_of, model_of


class Layered:
    """The network as a function of one layer's `[W | b]`, flattened row by row.

    Products with matrices of second derivatives are taken along the probes `V`, `[k, o, i]`.
    """

    def __init__(self, case: Case, layer: str | None = None) -> None:
        self.model, name = model_of(case).requires_grad_(False), layer or layer_of(case)
        self.x, self.y, self.criterion = case["x"], case["y"], case["criterion"]
        module: Any = self.model.get_submodule(name)
        self.names = [f"{name}.weight"] + ([f"{name}.bias"] if module.bias is not None else [])
        self.weight_shape = module.weight.shape
        W = joint(self.model, name)
        self.theta, self.shape = W.flatten(), W.shape
        self.f = self.outputs(self.theta)

    def parameters(self, theta: Tensor) -> dict[str, Tensor]:
        """The module's own tensors for a flat `[W | b]`."""
        W = theta.view(self.shape)
        found = {self.names[0]: W[:, : math.prod(self.weight_shape[1:])].view(self.weight_shape)}
        return found | ({self.names[1]: W[:, -1]} if len(self.names) == 2 else {})

    def outputs(self, theta: Tensor) -> Tensor:
        """`f(x)` `[n, c]`."""
        return functional_call(self.model, self.parameters(theta), (self.x,))

    def log_likelihood(self, theta: Tensor, y: Tensor) -> Tensor:
        """`log p(y | x)` of every example, `[n]`, up to a constant."""
        return log_likelihood(self.criterion, self.outputs(theta), y)

    def gradient(self) -> Tensor:
        """Gradient of the mean negative log-likelihood at the observed labels, `[o, i]`."""
        return -grad(lambda t: self.log_likelihood(t, self.y).mean())(self.theta).view(self.shape)

    def scores(self, y: Tensor) -> Tensor:
        """`grad log p(y_n | x_n)` of every example, `[n, N]`."""
        back = vjp(lambda theta: self.log_likelihood(theta, y), self.theta)[1]
        return vmap(lambda row: back(row)[0])(torch.eye(len(y), dtype=self.theta.dtype))

    def hessian_product(self, function: Callable[[Tensor], Tensor], V: Tensor) -> Tensor:
        """`H V` of a scalar function of theta at the network's own."""
        # backwards twice: forward mode would compile torch's decompositions first
        products = [grad(lambda t, v=v: grad(function)(t) @ v.flatten())(self.theta) for v in V]
        return torch.stack(products).view_as(V)

    def expected_loss(self, theta: Tensor) -> Tensor:
        """`-E_{y ~ p}[log p_theta(y)]`, `p` that of the network's own theta; mean over examples."""
        terms = [w @ self.log_likelihood(theta, y) for y, w in labels(self.criterion, self.f)]
        return -torch.stack(terms).sum() / len(self.x)

    def divergence(self, theta: Tensor) -> Tensor:
        """`KL(p || p_theta)`, `p` that of the network's own theta; mean over examples."""
        return divergence(self.criterion, self.f, self.outputs(theta)).mean()

    def expected_outer(self, V: Tensor, scale: float = 1.0) -> Tensor:
        """`(1/M) sum_n E[score score^T] V`, the score times `scale`."""
        total = torch.zeros_like(V)
        for y, weight in labels(self.criterion, self.f):
            s = scale * self.scores(y)
            total += ((V.flatten(1) @ s.mT) * weight @ s).view_as(V)
        return total / len(self.x)

    def gauss_newton(self, V: Tensor) -> Tensor:
        """`(1/M) sum_n J_n^T (Hessian of -log p in f) J_n V`."""
        back = vjp(self.outputs, self.theta)[1]

        def negative(row: Tensor, y: Tensor) -> Tensor:
            return -log_likelihood(self.criterion, row[None], y[None])[0]

        H = vmap(jacrev(jacrev(negative)))(self.f, self.y)
        # J v is the derivative of J^T u in u
        forward = vjp(lambda u: back(u)[0], torch.zeros_like(self.f))[1]
        along = [forward(v.flatten())[0] for v in V]
        products = [back(torch.einsum("ncd,nd->nc", H, Jv))[0] for Jv in along]
        return torch.stack(products).view_as(V) / len(self.x)


def log_likelihood(criterion: str, f: Tensor, y: Tensor) -> Tensor:
    """The criterion as a likelihood: categorical, normal of variance 1/2, Bernoulli."""
    if criterion == "cross_entropy":
        return f.log_softmax(1).gather(1, y[:, None])[:, 0]
    if criterion == "squared_error":
        return -(f - y).square().sum(1)
    return (y * F.logsigmoid(f) + (1 - y) * F.logsigmoid(-f)).sum(1)


def divergence(criterion: str, old: Tensor, new: Tensor) -> Tensor:
    """`KL(p_old || p_new)` of every example, `[n]`."""
    if criterion == "cross_entropy":
        p, q = old.log_softmax(1), new.log_softmax(1)
        return (p.exp() * (p - q)).sum(1)
    if criterion == "squared_error":
        return (old - new).square().sum(1)
    on = old.sigmoid() * (F.logsigmoid(old) - F.logsigmoid(new))
    off = (-old).sigmoid() * (F.logsigmoid(-old) - F.logsigmoid(-new))
    return (on + off).sum(1)


def gradients(case: Case) -> Tensor:
    """`D[r]`, `[r, o, i]`: every per-example gradient of a layer case, by the definition."""
    return torch.einsum("mnto,nti->mnoi", case["g"], case["a"]).flatten(0, 1)


def block(case: Case) -> Tensor:
    """`F = (1/M) sum_r vec(D_r) vec(D_r)^T`, `[N, N]`."""
    U = gradients(case).flatten(1)
    return U.mT @ U / len(case["a"])


def block_product(case: Case, V: Tensor) -> Tensor:
    """`F V`."""
    D = gradients(case)
    return torch.einsum("roi,kpj,rpj->koi", D, V, D) / len(case["a"])


def shifted(S: Tensor, damping: float | Tensor) -> Tensor:
    """`S + damping I`."""
    return S + damping * torch.eye(len(S), dtype=S.dtype)


def damped_solve(case: Case, damping: float, V: Tensor) -> Tensor:
    """`(F + damping I)^{-1} V` from the dense matrix, or by its eigenvectors from an SVD of `U`."""
    U = gradients(case).flatten(1)
    if U.shape[1] <= 500:
        return torch.linalg.solve(shifted(block(case), damping), V.flatten(1).mT).mT.view_as(V)
    _, sizes, Q = torch.linalg.svd(U / math.sqrt(len(case["a"])), full_matrices=False)
    inside = V.flatten(1) @ Q.mT
    change = inside * (1 / (sizes.square() + damping) - 1 / damping)
    return (V.flatten(1) / damping + change @ Q).view_as(V)


def kfac(case: Case) -> tuple[Tensor, Tensor]:
    """`G, A` of KFAC-expand."""
    a, g = case["a"], case["g"]
    A = torch.einsum("nti,ntj->ij", a, a) / (a.shape[0] * a.shape[1])
    return torch.einsum("mnto,mntp->op", g, g) / a.shape[0], A


def moments(case: Case) -> tuple[Tensor, Tensor]:
    """`L = (1/M) sum D D^T` and `R = (1/M) sum D^T D`."""
    D, M = gradients(case), len(case["a"])
    return torch.einsum("roi,rpi->op", D, D) / M, torch.einsum("roi,roj->ij", D, D) / M


def tkfac(case: Case) -> tuple[Tensor, Tensor]:
    """`sigma Psi` and `Phi` with partial traces."""
    L, R = moments(case)
    return L, R / R.trace().clamp(min=1e-300)


def root(S: Tensor, exponent: float) -> Tensor:
    """A power of a symmetric positive definite matrix, by its eigenvectors."""
    values, Q = torch.linalg.eigh(S)
    return Q * values**exponent @ Q.mT


def product_error(case: Case, G: Tensor, A: Tensor) -> float:
    """`||F - G (x) A|| / ||F||`: the difference itself where it fits, else from its three terms."""
    D, M = gradients(case), len(case["a"])
    if D[0].numel() <= 400:
        F = block(case)
        return float((F - torch.kron(G, A)).norm() / F.norm())
    U = D.flatten(1)
    squared = (U @ U.mT).square().sum() / M**2
    cross = (torch.matmul(G @ D, A) * D).sum() / M
    error = squared - 2 * cross + (G.norm() * A.norm()) ** 2
    return float((error.clamp(min=0) / squared).sqrt())


def rearranged(case: Case) -> Tensor:
    """Van Loan and Pitsianis' `R(F)` `[o^2, i^2]`: `R(G (x) A) = vec(G) vec(A)^T`."""
    D = gradients(case)
    o, i = D.shape[1:]
    F = block(case).view(o, i, o, i)
    return F.permute(0, 2, 1, 3).reshape(o * o, i * i)
