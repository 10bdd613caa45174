"""Optimizers, slow and dense: what each method's step is on a two-layer perceptron, in float64.

Written from the formulas alone. Inputs `a` `[n, i]` (last column 1) and output gradients `g`
`[n, o]` of the per-example loss are written out by hand, every block is a dense matrix over
`vec [W b]` (row-major), and every running mean is a loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

DECAY = 0.95
# By default everything is refreshed at each of the first steps; then bases rest until step 100.
WARMUP = 20


def perceptron(inputs: int = 64, hidden: int = 8, outputs: int = 10) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs)
        return nn.Sequential(*layers).double()


def weights(model: nn.Module) -> Tensor:
    """Every parameter in one vector."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def pairs(model: nn.Sequential, x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    """`(a, g)` of both layers for softmax cross entropy, by hand."""
    with torch.no_grad():
        first, _, second = model
        ones = x.new_ones(len(x), 1)
        s = x @ first.weight.T + first.bias
        h = s.clamp(min=0)
        p = (h @ second.weight.T + second.bias).softmax(1)
        g2 = p - nn.functional.one_hot(y, p.shape[1])
        g1 = (g2 @ second.weight) * (s > 0)
        return [(torch.cat([x, ones], 1), g1), (torch.cat([h, ones], 1), g2)]


def gradient(a: Tensor, g: Tensor) -> Tensor:
    return g.T @ a / len(a)


def power(S: Tensor, exponent: float) -> Tensor:
    values, Q = torch.linalg.eigh((S + S.T) / 2)
    return Q @ torch.diag(values**exponent) @ Q.T


def eye(n: int) -> Tensor:
    return torch.eye(n, dtype=torch.float64)


def columns(a: Tensor, g: Tensor) -> Tensor:
    """`U` `[o i, n]`."""
    return torch.stack([torch.outer(x, z).flatten() for x, z in zip(g, a, strict=True)], 1)


def exact(a: Tensor, g: Tensor) -> Tensor:
    U = columns(a, g)
    return U @ U.T / len(a)


def mean(
    history: list[tuple[Tensor, Tensor]], statistic: Callable, every: int, decay: float = DECAY
) -> Tensor:
    """The decayed mean of a per-batch mean, of the warm-up and of every so many steps."""
    total, weight = torch.zeros(()), 0.0
    for step, (a, g) in enumerate(history):
        if step < WARMUP or step % every == 0:
            total = decay * total + len(a) * statistic(a, g)
            weight = decay * weight + len(a)
    return total / weight


def geometric(F: Tensor, share: float) -> Tensor:
    """A share of the geometric mean of the trace and the mean eigenvalue."""
    return share * (F.trace() * F.trace() / len(F)).sqrt()


def inverse(F: Tensor, share: float) -> Tensor:
    """`(F + lambda I)^{-1}`."""
    return torch.linalg.inv(F + geometric(F, share) * eye(len(F)))


def kfac(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    return g.T @ g / len(a), a.T @ a / len(a)


def running_kfac(history: list) -> tuple[Tensor, Tensor]:
    G = mean(history, lambda a, g: kfac(a, g)[0], 10)
    return G, mean(history, lambda a, g: kfac(a, g)[1], 10)


def running_tkfac(history: list) -> tuple[Tensor, Tensor]:
    """The means are those of the sums; the trace is taken out of them."""

    def moment(equation: str) -> Tensor:
        def statistic(a: Tensor, g: Tensor) -> Tensor:
            D = torch.einsum("no,ni->noi", g, a)
            return torch.einsum(equation, D, D) / len(a)

        return mean(history, statistic, 10)

    left, right = moment("noi,npi->op"), moment("noi,noj->ij")
    return left / left.trace().sqrt(), right / left.trace().sqrt()


def factored(G: Tensor, A: Tensor, share: float, pi: float | None) -> Tensor:
    damping = float(share * G.trace() * A.trace() / math.sqrt(len(G) * len(A)))
    pi = pi or math.sqrt((A.trace() / len(A)) / (G.trace() / len(G)))
    root = math.sqrt(damping)
    damped_G, damped_A = G + root / pi * eye(len(G)), A + root * pi * eye(len(A))
    return torch.kron(torch.linalg.inv(damped_G), torch.linalg.inv(damped_A))


def corrected(history: list, factors: Callable, share: float) -> Tensor:
    """EKFAC, TEKFAC: eigenvalues averaged over time, carried over from each basis to the next."""
    Q, total, weight = torch.zeros(()), torch.zeros(()), 0.0
    for step, (a, g) in enumerate(history):
        if step < WARMUP:
            new = torch.kron(*(torch.linalg.eigh(side)[1] for side in factors(history[: step + 1])))
            total = (new.T @ Q).square() @ total if step else torch.zeros(len(new)).double()
            Q = new
        if step < WARMUP or step % 10 == 0:
            total = DECAY * total + (Q.T @ columns(a, g)).square().sum(1)
            weight = DECAY * weight + len(a)
    spectrum = total / weight
    damping = share * spectrum.sum() / math.sqrt(len(spectrum))
    return Q @ torch.diag(1 / (spectrum + damping)) @ Q.T


def rank_one(history: list, decay: float = DECAY) -> tuple[Tensor, Tensor]:
    g = mean(history, lambda a, g: g.mean(0), 1, decay)
    return g, mean(history, lambda a, g: a.mean(0), 1, decay)


def eva(history: list, damping: float) -> Tensor:
    v = torch.kron(*rank_one(history, 0.05))
    return torch.linalg.inv(torch.outer(v, v) + damping * eye(len(v)))


def ifang(history: list, damping: float) -> Tensor:
    sides = (torch.outer(v, v) + damping * eye(len(v)) for v in rank_one(history))
    return torch.kron(*(torch.linalg.inv(side) for side in sides))


def shampoo(a: Tensor, g: Tensor, share: float) -> Tensor:
    D = gradient(a, g)
    L, R = D @ D.T, D.T @ D
    # tr L^{1/2} = tr R^{1/2} = sum of the singular values of D
    damping = share * torch.linalg.svdvals(D).sum() ** 2 / D.numel()
    return torch.kron(*(power(S + damping * eye(len(S)), -0.25) for S in (L, R)))


def inverse_of(S: Tensor) -> Tensor:
    return torch.linalg.inv(S + 1e-3 * S.trace() / len(S) * eye(len(S)))


def kl_shampoo(D: Tensor, G: Tensor | None, A: Tensor | None, past: float) -> list[Tensor]:
    o, i = D.shape
    if G is None or A is None:
        root = D.norm()
        G, A = D @ D.T / root, D.T @ D / root
    new = D @ inverse_of(A) @ D.T / i, D.T @ inverse_of(G) @ D / o
    return [past * old + (1 - past) * x for old, x in zip((G, A), new, strict=True)]


def dykaf(D: Tensor, G: Tensor | None, A: Tensor | None, past: float) -> list[Tensor]:
    """The split step on the rearranged matrix `p vec(G) vec(A)^T + q R(vec D vec D^T)`."""
    if G is None or A is None:
        G, A = eye(D.shape[0]), eye(D.shape[1])
    R = past * torch.outer(G.flatten(), A.flatten())
    R = R + (1 - past) * torch.einsum("oi,pj->opij", D, D).reshape(R.shape)
    u, v = R @ A.flatten() / A.norm(), R.T @ G.flatten() / G.norm()
    u, v = u / u.norm(), v / v.norm()
    # the past is seen through its own projection on both, the batch through both at once
    return [(u @ R @ v).sqrt() * x.view_as(S) for x, S in ((u, G), (v, A))]


def recursive(step: Callable, history: list) -> Tensor:
    """`G (x) A` of batches' mean gradients, each moving both factors."""
    factors, count = [None, None], 0.0
    for a, g in history:
        past = DECAY * count / (DECAY * count + len(a))
        factors, count = step(gradient(a, g), *factors, past), DECAY * count + len(a)
    return torch.kron(*factors)


def mini_block(a: Tensor, g: Tensor) -> Tensor:
    o, i = g.shape[1], a.shape[1]
    F = exact(a, g).view(o, i, o, i)
    return torch.block_diag(*(F[k, :, k] for k in range(o)))


def kronecker_terms(a: Tensor, g: Tensor, terms: int) -> Tensor:
    """The best sum of Kronecker products, from the SVD of Van Loan's rearrangement."""
    o, i = g.shape[1], a.shape[1]
    rearranged = exact(a, g).view(o, i, o, i).permute(0, 2, 1, 3).reshape(o * o, i * i)
    left, sizes, right = torch.linalg.svd(rearranged, full_matrices=False)
    products = (
        sizes[k] * torch.kron(left[:, k].view(o, o), right[k].view(i, i)) for k in range(terms)
    )
    return sum(products, torch.zeros(o * i, o * i, dtype=torch.float64))


def nystrom(F: Tensor, rank: int) -> Tensor:
    draws = torch.randn(
        rank, len(F), generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    W = torch.linalg.qr(draws.T)[0]
    Y = F @ W
    return Y @ torch.linalg.pinv(W.T @ Y, hermitian=True, rtol=1e-12) @ Y.T


def kl_product(a: Tensor, g: Tensor) -> Tensor:
    """`argmin tr((G (x) A)^{-1} F_l) + log det(G (x) A)` in the spans of the partial traces."""
    o, i = g.shape[1], a.shape[1]
    F = exact(a, g).view(o, i, o, i)
    spans = []
    for moment in (torch.einsum("oipi->op", F), torch.einsum("oioj->ij", F)):
        values, Q = torch.linalg.eigh(moment)
        spans.append(Q[:, values > 1e-12 * values[-1]])
    lift = torch.kron(*spans)
    inside = lift.T @ F.reshape(o * i, -1) @ lift
    o, i = (V.shape[1] for V in spans)
    if torch.linalg.matrix_rank(inside, hermitian=True) < len(inside):
        inside = inside + 1e-3 * inside.trace() / len(inside) * eye(len(inside))
    inside, A = inside.view(o, i, o, i), eye(i)
    for _ in range(1000):
        G = torch.einsum("oipj,ij->op", inside, torch.linalg.inv(A)) / i
        A = torch.einsum("oipj,op->ij", inside, torch.linalg.inv(G)) / o
    return lift @ torch.kron(G, A) @ lift.T


def clamped_inverse(F: Tensor, share: float) -> Tensor:
    values, Q = torch.linalg.eigh((F + F.T) / 2)
    return Q @ torch.diag(1 / (values.clamp(min=0) + geometric(F, share))) @ Q.T


def smw(a: Tensor, g: Tensor, alpha: float) -> Tensor:
    """`lambda (F + lambda I)^{-1}`, `lambda = alpha ||U^T U||`.      FNGD (9), (14), folded."""
    U = columns(a, g)
    damping = alpha * (U.T @ U).norm()
    return damping * torch.linalg.inv(exact(a, g) + damping * eye(len(U)))


def blend(d: Tensor, t: Tensor, progress: float) -> Tensor:
    """ANG (6), (7) with the concave schedule."""
    s = (1 - math.exp(-5 * progress)) / (1 - math.exp(-5))
    rho, size = d.norm(), t.norm()
    omega = torch.arccos((d @ t) / (rho * size))
    unit = torch.sin((1 - s) * omega) * d / rho + torch.sin(s * omega) * t / size
    return rho * unit / torch.sin(omega)


@dataclass
class Steps:
    """The dense directions of every named optimizer, from the pairs of all steps so far."""

    histories: list[list[tuple[Tensor, Tensor]]] = field(default_factory=lambda: [[], []])
    slopes: list[list[float]] = field(default_factory=lambda: [[], []])

    def observe(self, model: nn.Sequential, x: Tensor, y: Tensor) -> None:
        both = pairs(model, x, y)
        for history, pair in zip(self.histories, both, strict=True):
            history.append(pair)
        self.slopes[0].append((both[1][0][:, :-1] > 0).double().mean().item())
        self.slopes[1].append(1.0)

    def gradients(self) -> list[Tensor]:
        return [gradient(*history[-1]) for history in self.histories]

    def directions(self, name: str) -> list[Tensor]:
        """One `[o, i]` per layer, before clipping."""
        gradients = self.gradients()
        if name in ("ngd", "ngd_dense"):
            flat = self._joint() @ torch.cat([v.flatten() for v in gradients])
            parts = flat.split([v.numel() for v in gradients])
            return [part.view_as(v) for part, v in zip(parts, gradients, strict=True)]
        found = []
        for layer, v in enumerate(gradients):
            d = self._preconditioner(name, layer) @ v.flatten()
            if name in ("ang", "ifang"):
                d = blend(d, v.flatten(), (len(self.histories[0]) - 1) / 999)
            if name == "shampoo":
                d = d * v.norm() / d.norm()
            found.append(d.view_as(v))
        return found

    def _joint(self) -> Tensor:
        now = [history[-1] for history in self.histories]
        U = torch.cat([columns(*pair) for pair in now])
        F = U @ U.T / len(now[0][0])
        damping = []
        for a, g in now:
            block = exact(a, g)
            damping.append(geometric(block, 1.0) * torch.ones(len(block)))
        return torch.linalg.inv(F + torch.diag(torch.cat(damping).double()))

    def _preconditioner(self, name: str, layer: int) -> Tensor:
        history = self.histories[layer]
        # the last inverse is of the end of the warm-up
        (a0, g0), (a, g), settled = history[0], history[-1], history[:WARMUP]
        if name in ("exact", "tengrad", "blockwise_ngd"):
            return inverse(exact(a, g), 0.3)
        if name in ("ngd_smw", "fngd"):
            return smw(a, g, 0.005)
        if name in ("kfac", "truncated_kfac", "ang"):
            return factored(*running_kfac(settled), 0.005 if name == "ang" else 0.02, None)
        if name == "kfac_reduce":
            return inverse(torch.kron(*running_kfac(settled)), 0.03)
        if name == "tkfac":
            return factored(*running_tkfac(settled), 0.02, 1.0)
        if name == "tkfac_expand":
            return inverse(torch.kron(*running_tkfac(settled)), 0.03)
        if name == "ekfac":
            return corrected(history, running_kfac, 0.03)
        if name == "tekfac":
            return corrected(history, running_tkfac, 0.03)
        if name == "eva":
            return eva(history, 0.07)
        if name == "ifang":
            return ifang(history, 0.2)
        if name == "sngd":
            A = mean(settled, lambda a, g: a.T @ a / len(a), 10, decay=0.995)
            return inverse(torch.kron(eye(g0.shape[1]), self._slope(layer) * A), 0.005)
        if name == "shampoo":
            return shampoo(a0, g0, 1e-4)
        if name in ("kl_shampoo", "dykaf"):
            F = recursive({"kl_shampoo": kl_shampoo, "dykaf": dykaf}[name], settled)
            share = {"kl_shampoo": 1e-2, "dykaf": 1.0}[name]
            return power(F + share * F.trace() / len(F) * eye(len(F)), -0.5)
        if name == "nystrom":
            return inverse(nystrom(mean(settled, exact, 10), 16), 0.3)
        if name == "diagonal":
            F = mean(settled, exact, 10)
            return inverse(torch.diag(F.diagonal()), 0.1)
        if name == "mini_block":
            return inverse(mean(settled, mini_block, 10), 0.03)
        if name == "kronecker_optimal":
            return inverse(kronecker_terms(a, g, 1), 0.1)
        if name == "kl_optimal":
            return inverse(kl_product(a, g), 0.1)
        if name == "kronecker_sum":
            return clamped_inverse(kronecker_terms(a, g, 2), 0.3)
        raise KeyError(f"no dense reference of optimizer {name!r}: write one")

    def _slope(self, layer: int) -> float:
        """Its mean over the warm-up, with SNGD's decay."""
        total = weight = 0.0
        for slope in self.slopes[layer][:WARMUP]:
            total, weight = 0.995 * total + slope, 0.995 * weight + 1
        return total / weight
