"""Block-tridiagonal KFAC: which matrix it is, and when it gains over block-diagonal KFAC."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from fisherlab.claims.base import EXTENSION, REFUTED, AtMost, Case, Claim, Identity
from fisherlab.claims.instances import (
    captured,
    criterion_of,
    integer,
    log_uniform,
    model_of,
    network_case,
    normal,
    without_one,
)
from fisherlab.extract import capture
from fisherlab.network import Tridiagonal


class _Chain(Claim):
    """Inputs and output gradients of all layers of a network without branches, and a damping."""

    trials = 8
    source = "KFAC section 4.3"

    def draw(self, generator: torch.Generator, size: float) -> Case:
        case = network_case(generator, max(size, 0.6), examples=(3, 12), positions=1)
        arguments = model_of(case), criterion_of(case), case["x"], case["y"]
        found = list(capture(*arguments, fisher_type="exact").values())
        return {
            "a": [layer.inputs for layer in found],
            "g": [layer.output_gradients for layer in found],
            "damping": case["damping"],
            "v": normal(generator, sum(math.prod(layer.shape) for layer in found)),
        }

    def assume(self, case: Case) -> bool:
        return len(case["a"]) > 2

    def smaller(self, case: Case) -> Iterator[Case]:
        for keep in without_one(len(case["a"][0])):
            yield {
                **case,
                "a": [a[keep] for a in case["a"]],
                "g": [g[:, keep] for g in case["g"]],
            }

    def matrix(self, case: Case) -> Tridiagonal:
        """FisherLab's."""
        layers = [captured({"a": a, "g": g}) for a, g in zip(case["a"], case["g"], strict=True)]
        return Tridiagonal({f"{k}": x for k, x in enumerate(layers)}, case["damping"])

    def inverse(self, case: Case) -> Tensor:
        """FisherLab's, `[N, N]`."""
        X = self.matrix(case)
        return torch.stack(
            [X.flat(X.solve(X.split(e))) for e in torch.eye(len(case["v"])).double()]
        )


def factors(case: Case) -> list[list[tuple[Tensor, Tensor]]]:
    """`G_kl` and `A_kl` of all pairs of layers, the damping in those of a layer with itself."""
    a, M = [x[:, 0] for x in case["a"]], len(case["a"][0])
    g = [y.flatten(0, 2) for y in case["g"]]
    found = [[(x.mT @ y / M, u.mT @ v / M) for y, v in zip(g, a, strict=True)]
             for x, u in zip(g, a, strict=True)]  # fmt: skip
    root = math.sqrt(case["damping"])
    for k, row in enumerate(found):
        G, A = row[k]
        pi = float((A.diagonal().mean() / G.diagonal().mean()).sqrt())
        eyes = (torch.eye(len(S), dtype=S.dtype) for S in (G, A))
        row[k] = (G + root / pi * next(eyes), A + pi * root * next(eyes))
    return found


def joined(case: Case) -> list[list[Tensor]]:
    """The blocks `G_kl (x) A_kl` of the matrix that the paper starts from."""
    return [[torch.kron(G, A) for G, A in row] for row in factors(case)]


def filled(blocks: list[list[Tensor]], parts: dict[tuple[int, ...], float]) -> Tensor:
    """Weighed inverses of the matrix's parts, each at the layers of its key, summed."""
    ends = [0, *itertools.accumulate(len(row[0]) for row in blocks)]
    total = torch.zeros(ends[-1], ends[-1], dtype=torch.float64)
    for layers, weight in parts.items():
        part = torch.cat([torch.cat([blocks[k][j] for j in layers], 1) for k in layers])
        at = slice(ends[layers[0]], ends[layers[-1] + 1])
        total[at, at] += weight * torch.linalg.inv(part)
    return total


class TridiagonalMatrix(_Chain, Identity, name="tridiagonal_kfac_has_a_tridiagonal_inverse"):
    """It has KFAC's blocks on and beside the diagonal, and an inverse without any others.

    A Markov chain's precision is that of its neighbours less that of each layer they share.
    """

    latex = r"\hat F^{-1} = \sum_k \tilde F_{\{k, k+1\}}^{-1} - \sum_{1 < k < L} \tilde F_{kk}^{-1}"

    def left(self, case: Case) -> Tensor:
        X = self.matrix(case)
        return X.flat(X.solve(X.split(case["v"])))

    def right(self, case: Case) -> Tensor:
        last = len(case["a"]) - 1
        parts: dict[tuple[int, ...], float] = {(k, k + 1): 1.0 for k in range(last)}
        parts |= {(k,): -1.0 for k in range(1, last)}
        return filled(joined(case), parts) @ case["v"]


def divergence(inverse: Tensor, F: Tensor) -> float:
    """`tr(X^{-1} F) - log det(X^{-1} F) - N`."""
    ratio = inverse @ F
    return float(ratio.trace() - torch.linalg.slogdet(ratio)[1]) - len(F)


class TridiagonalGain(_Chain, AtMost, name="tridiagonal_kfac_is_nearer_in_kl_than_block_diagonal"):
    """In KL it is nearer than its diagonal blocks to all of KFAC's blocks, those far apart too."""

    kind = EXTENSION
    latex = (
        r"\mathrm{KL}(\tilde F, \hat F) \le \mathrm{KL}(\tilde F, \breve F),\ "
        r"\tilde F_{kl} = G_{kl} \otimes A_{kl}"
    )
    sides = ("block-tridiagonal", "block-diagonal")

    def target(self, case: Case) -> Tensor:
        """The matrix that both approximate."""
        return torch.cat([torch.cat(row, 1) for row in joined(case)])

    def left(self, case: Case) -> float:
        return divergence(self.inverse(case), self.target(case))

    def right(self, case: Case) -> float:
        blocks = joined(case)
        alone = filled(blocks, {(k,): 1.0 for k in range(len(blocks))})
        return divergence(alone, self.target(case))


class TridiagonalOfFisher(TridiagonalGain, name="tridiagonal_kfac_is_nearer_in_kl_to_the_fisher"):
    """In KL it is nearer than its diagonal blocks to the whole damped Fisher itself."""

    latex = r"\mathrm{KL}(F + \lambda I, \hat F) \le \mathrm{KL}(F + \lambda I, \breve F)"
    expected = REFUTED
    trials = 24
    effort = 15
    free: ClassVar[tuple[str, ...]] = ("a", "g")

    def draw(self, generator: torch.Generator, size: float) -> Case:
        """Inputs and gradients of three layers, independent of each other."""
        M, d = integer(generator, 4, 12, size), integer(generator, 2, 3, size)
        a, g = ([normal(generator, *lead, M, 1, d) for _ in range(3)] for lead in ((), (1,)))
        damping = log_uniform(generator, 1e-3, 1.0)
        return {"a": a, "g": g, "damping": damping, "v": normal(generator, 3 * d * d)}

    def target(self, case: Case) -> Tensor:
        D = [
            torch.einsum("mnto,nti->mnoi", g, a).flatten(0, 1).flatten(1)
            for a, g in zip(case["a"], case["g"], strict=True)
        ]
        U = torch.cat(D, 1)
        F = U.mT @ U / len(case["a"][0])
        return F + case["damping"] * torch.eye(len(F), dtype=F.dtype)
