"""Approximations of a Fisher block, slow and dense, from docs/explain/methods.md 3 alone.

`Pairs` are what a layer sees, by autograd for one example at a time; every reference is a function
of them and returns the `[o i, o i]` matrix. Nothing here calls FisherLab.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from references import Reference, _terms
from torch import Tensor, nn
from torch.autograd.functional import hessian


@dataclass(eq=False)
class Pairs:
    """One layer on one batch: `s[n,t] = W a[n,t]`, a trailing 1 for the bias."""

    a: Tensor  # [n, t, i]
    g: Tensor  # [m, n, t, o], of the per-example loss, columns scaled
    label_g: Tensor  # [n, t, o]
    slope: float  # nu, the mean derivative of the activation the layer feeds
    kernel: int | None = None  # numbers per kernel of a convolution
    bias: bool = True

    @property
    def M(self) -> int:
        return len(self.a)

    @property
    def T(self) -> int:
        return self.a.shape[1]

    @property
    def D(self) -> Tensor:
        """`sum_t g a^T`, `[r, o, i]`, as loops."""
        m, n, t, _ = self.g.shape
        return torch.stack(
            [
                sum(torch.outer(self.g[j, k, s], self.a[k, s]) for s in range(t))
                for j in range(m)
                for k in range(n)
            ]
        )

    @property
    def gradient(self) -> Tensor:
        """The gradient of the mean loss at the observed labels."""
        return torch.einsum("nto,nti->oi", self.label_g, self.a) / self.M


def output_vectors(reference: Reference, n: int, output: Tensor, fisher_type: str, draws) -> Tensor:
    """Rows `v` with `sum v v^T = H_n`, `[m, outputs]`."""
    if fisher_type == "exact":
        H = hessian(lambda f: reference._loss(n, f), output)
        values, Q = torch.linalg.eigh(H.reshape(output.numel(), -1))
        return (Q * values.clamp(min=0).sqrt()).mT
    free = output.clone().requires_grad_()
    if fisher_type == "empirical":
        return torch.autograd.grad(reference._loss(n, free), free)[0].reshape(1, -1)
    scale = math.sqrt(reference.scale / len(draws))
    rows = []
    for labels in draws:
        terms = _terms(reference.criterion, free[None], labels[n : n + 1])
        rows.append(scale * torch.autograd.grad(terms.sum(), free)[0].flatten())
    return torch.stack(rows)


def pairs(model, criterion, x, y, name, fisher_type, draws=(), group=0, activation=None) -> Pairs:
    """The pairs of the layer `name` (its `group`), one example and one output vector at a time."""
    layer = model.get_submodule(name)
    reference = Reference(model, criterion, x, y, layer.weight, layer.bias)
    inputs, gradients, at_labels, slopes = [], [], [], []
    for n in range(len(x)):
        calls = []
        hook = layer.register_forward_hook(lambda _, i, o, calls=calls: calls.append((i[0], o)))
        output = model(x[n : n + 1])
        hook.remove()
        sees, makes = zip(*calls, strict=True)

        def back(v, output=output, makes=makes):
            parts = torch.autograd.grad(output, makes, v.view_as(output), retain_graph=True)
            return torch.cat([positions(layer, part, group) for part in parts])

        fixed = reference.outputs[n]
        vectors = output_vectors(reference, n, fixed, fisher_type, draws)
        gradients.append(torch.stack([back(v) for v in vectors]))
        observed = output_vectors(reference, n, fixed, "empirical", ())
        at_labels.append(back(observed[0]))
        inputs.append(torch.cat([patches(layer, part, group) for part in sees]))
        for part in makes:
            free = part.detach().requires_grad_()
            slopes.append(
                torch.ones(())
                if activation is None
                else torch.autograd.grad(activation(free).sum(), free)[0].mean()
            )
    conv = isinstance(layer, nn.Conv2d)
    return Pairs(
        torch.stack(inputs).detach(),
        torch.stack(gradients, 1),
        torch.stack(at_labels),
        float(torch.stack(slopes).double().mean()),
        math.prod(layer.kernel_size) if conv else None,
        layer.bias is not None,
    )


def patches(layer: nn.Module, raw: Tensor, group: int) -> Tensor:
    """The inputs of one example as rows `[t, i]`."""
    if isinstance(layer, nn.Conv2d):
        channels = raw.shape[1] // layer.groups
        raw = raw[:, group * channels : (group + 1) * channels]
        options = {"padding": layer.padding, "stride": layer.stride, "dilation": layer.dilation}
        rows = F.unfold(raw, layer.kernel_size, **options)[0].mT
    else:
        rows = raw.reshape(-1, raw.shape[-1])
    return rows if layer.bias is None else F.pad(rows, (0, 1), value=1.0)


def positions(layer: nn.Module, raw: Tensor, group: int) -> Tensor:
    """An output gradient of one example as rows `[t, o]`."""
    if isinstance(layer, nn.Conv2d):
        channels = raw.shape[1] // layer.groups
        return raw[0, group * channels : (group + 1) * channels].flatten(1).mT
    return raw.reshape(-1, raw.shape[-1])


# --- the references: name -> function of pairs ----------------------------------------------------

REFERENCES: dict[str, Callable[[Pairs], Tensor]] = {}


def reference(make: Callable[[Pairs], Tensor]) -> Callable[[Pairs], Tensor]:
    REFERENCES[make.__name__] = make
    return make


def moment(rows: Tensor) -> Tensor:
    """`sum v v^T` over all but the last axis."""
    flat = rows.reshape(-1, rows.shape[-1])
    return flat.mT @ flat


@reference
def exact(p: Pairs) -> Tensor:
    return moment(p.D.flatten(1)) / p.M


@reference
def diagonal(p: Pairs) -> Tensor:
    return torch.diag(exact(p).diagonal())


def kfac_factors(p: Pairs) -> tuple[Tensor, Tensor]:
    return moment(p.g) / p.M, moment(p.a) / (p.M * p.T)


@reference
def kfac(p: Pairs) -> Tensor:
    return torch.kron(*kfac_factors(p))


@reference
def kfac_reduce(p: Pairs) -> Tensor:
    return torch.kron(moment(p.g.sum(2)) / p.M, moment(p.a.mean(1)) / p.M)


def tkfac_sides(p: Pairs) -> tuple[Tensor, Tensor, Tensor]:
    """`sum D D^T`, `sum D^T D`, `sum ||D||^2`."""
    D = p.D
    return sum(d @ d.mT for d in D), sum(d.mT @ d for d in D), sum((d * d).sum() for d in D)


@reference
def tkfac(p: Pairs) -> Tensor:
    left, right, total = tkfac_sides(p)
    if total == 0:
        return torch.kron(left, right)
    sigma, Psi, Phi = total / p.M, left / total, right / total
    return sigma * torch.kron(Psi, Phi)


@reference
def tkfac_expand(p: Pairs) -> Tensor:
    inputs = torch.stack([moment(p.a[n]) for n in range(p.M)])  # Lambda_n
    outputs = torch.stack([moment(p.g[:, n]) for n in range(p.M)])  # Gamma_n
    trace_a, trace_g = inputs.diagonal(0, 1, 2).sum(1), outputs.diagonal(0, 1, 2).sum(1)
    total = (trace_a * trace_g).sum()
    left = (trace_a[:, None, None] * outputs).sum(0)
    right = (trace_g[:, None, None] * inputs).sum(0)
    if total == 0:
        return torch.kron(left, right)
    return total / (p.M * p.T) * torch.kron(left / total, right / total)


def corrected(F: Tensor, G: Tensor, A: Tensor) -> Tensor:
    """`Q diag(Q^T F Q) Q^T` in the Kronecker eigenbasis."""
    Q = torch.kron(torch.linalg.eigh(G).eigenvectors, torch.linalg.eigh(A).eigenvectors)
    return Q @ torch.diag((Q.mT @ F @ Q).diagonal()) @ Q.mT


@reference
def ekfac(p: Pairs) -> Tensor:
    return corrected(exact(p), *kfac_factors(p))


@reference
def tekfac(p: Pairs) -> Tensor:
    left, right, _ = tkfac_sides(p)
    return corrected(exact(p), left, right)


def mean_vectors(p: Pairs) -> tuple[Tensor, Tensor]:
    return p.label_g.sum(1).mean(0), p.a.mean((0, 1))


@reference
def eva(p: Pairs) -> Tensor:
    g, a = mean_vectors(p)
    return torch.kron(torch.outer(g, g), torch.outer(a, a))


@reference
def ifang(p: Pairs) -> Tensor:
    return eva(p)


def ifang_inverse(p: Pairs, damping: float) -> Tensor:
    """ANG (11)-(14): the inverse of `(lambda I + g g^T) (x) (lambda I + a a^T)`."""
    sides = [damping * torch.eye(len(v)).double() + torch.outer(v, v) for v in mean_vectors(p)]
    return torch.linalg.inv(torch.kron(*sides))


def root(S: Tensor) -> Tensor:
    values, Q = torch.linalg.eigh(S)
    values = torch.where(values > 1e-12 * values.max(), values, torch.zeros_like(values))
    return (Q * values.sqrt()) @ Q.mT


@reference
def shampoo(p: Pairs) -> Tensor:
    left, right, _ = tkfac_sides(p)
    return torch.kron(root(left / p.M), root(right / p.M))


@reference
def sngd(p: Pairs) -> Tensor:
    _, A = kfac_factors(p)
    return torch.kron(torch.eye(p.g.shape[-1]).double(), p.slope * A)


@reference
def mini_block(p: Pairs) -> Tensor:
    """The restriction of `F` to one row, or to one kernel and to one bias, of the weight."""
    o, i = p.g.shape[-1], p.a.shape[-1]
    size = i if p.kernel is None else p.kernel
    column = torch.arange(i) // size
    if p.kernel is not None and p.bias:
        column[-1] = -1
    cell = (torch.arange(o)[:, None] * (2 * i) + column).flatten()
    return exact(p) * (cell[:, None] == cell)


@reference
def kl_shampoo(p: Pairs) -> Tensor:
    """One step of both factors from `L (x) R / tr F`, each inverse with 1e-3 of its mean on it."""
    left, right, total = tkfac_sides(p)
    if total == 0:
        return torch.kron(left, right)
    root = (total / p.M).sqrt()
    G, A = (
        torch.linalg.inv(S + 1e-3 * S.trace() / len(S) * torch.eye(len(S)).double())
        for S in (left / p.M / root, right / p.M / root)
    )
    D = p.D
    new = sum(d @ A @ d.mT for d in D) / p.M, sum(d.mT @ G @ d for d in D) / p.M
    return torch.kron(new[0] / len(A), new[1] / len(G))


@reference
def dykaf(p: Pairs) -> Tensor:
    """`L (x) R` with the scale of the least `||F - s L (x) R||`."""
    X, F = torch.kron(*tkfac_sides(p)[:2]), exact(p)
    return X * ((X * F).sum() / (X * X).sum().clamp(min=1e-300))


@reference
def nystrom(p: Pairs) -> Tensor:
    F = exact(p)
    draws = torch.randn(
        min(16, len(F)), len(F), generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    W = torch.linalg.qr(draws.T)[0]
    Y = F @ W
    return Y @ torch.linalg.pinv(W.T @ Y, hermitian=True, rtol=1e-12) @ Y.T


def rearranged(p: Pairs) -> tuple[Tensor, Tensor, Tensor]:
    """Singular value decomposition of Van Loan and Pitsianis' rearrangement of `F`."""
    o, i = p.g.shape[-1], p.a.shape[-1]
    R = exact(p).view(o, i, o, i).permute(0, 2, 1, 3).reshape(o * o, i * i)
    return torch.linalg.svd(R, full_matrices=False)


def kronecker_terms(p: Pairs, k: int) -> Tensor:
    U, S, V = rearranged(p)
    o, i = p.g.shape[-1], p.a.shape[-1]
    return sum(
        S[j] * torch.kron(U[:, j].reshape(o, o).contiguous(), V[j].reshape(i, i).contiguous())
        for j in range(k)
    )


@reference
def kronecker_optimal(p: Pairs) -> Tensor:
    return kronecker_terms(p, 1)


@reference
def kronecker_sum(p: Pairs) -> Tensor:
    return kronecker_terms(p, 2)
