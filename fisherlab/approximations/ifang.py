"""IFANG: the rows of a batch reduced to few, with the damping inside the factors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from fisherlab.approximations.base import Means
from fisherlab.approximations.eva import Eva, LowRank
from fisherlab.blocks import Block, Eigen
from fisherlab.blocks.numerics import BlockError, check_damping
from fisherlab.blocks.serialise import remembers
from fisherlab.extract import LayerCapture


@dataclass(frozen=True)
class IFANG(Eva, name="ifang"):
    """`(lambda I + G)^{-1} (x) (lambda I + A)^{-1}` preconditions.      ANG (11)-(14), 2.3, Alg. 1.

        G = (1/s') sum_k g~_k g~_k^T,   A = (1/s') sum_k a~_k a~_k^T

    `rows` is s': the batch in s' contiguous groups, `a~_k = mean_{n,t} a` and
    `g~_k = mean_n sum_t g` those of group k. With one row, Alg. 1, the inverse needs no more than
    a scalar, and undamped it is Eva's block; with as many rows as examples it is KFAC's, in the
    reduce setting. Over time each row is averaged with its predecessors, which draws them together:
    `decay=0` is the paper's, of one batch.
    """

    rows: int = 1

    def __post_init__(self) -> None:
        if int(self.rows) != self.rows or self.rows < 1:
            raise BlockError(f"rows counts the groups of a batch, at least 1; got {self.rows!r}")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return Eva.needs if self.rows == 1 else frozenset({"inputs", "label_gradients"})

    @property
    def placement(self) -> str:
        return "factorwise"

    def sums(self, layer: LayerCapture) -> dict[str, Tensor]:
        if self.rows == 1:
            return super().sums(layer)
        # what division by all examples makes the mean over a group's own
        groups = [
            {
                key: layer.examples / part.examples * value
                for key, value in Eva.sums(self, part).items()
            }
            for part in self._groups(layer)
        ]
        return {key: torch.stack([group[key] for group in groups]) for key in ("a", "g")}

    def _groups(self, layer: LayerCapture) -> Iterator[LayerCapture]:
        n = len(layer.raw_inputs[0])
        if n < self.rows:
            raise BlockError(
                f"IFANG(rows={self.rows}) of layer {layer.name!r} needs as many examples in a "
                f"batch or chunk, got {n}"
            )
        starts = [k * n // self.rows for k in range(self.rows + 1)]
        return (layer.part(slice(*ends)) for ends in pairwise(starts))

    def block(
        self, means: Means, basis: dict[str, Tensor], corrections: dict[str, Tensor]
    ) -> Block:
        if self.rows == 1:
            block = super().block(means, basis, corrections)
            assert isinstance(block, Eigen)
            energies = [means[key].square().sum().reshape(1) for key in ("g", "a")]
            return _Pair(block.Q_G, block.Q_A, *energies)
        (Q_G, g), (Q_A, a) = _principal(means["g"]), _principal(means["a"])
        return _Pair(Q_G, Q_A, g, a)

    def damped(self, block: Block, damping: float) -> Block:
        damping = check_damping(damping)
        assert isinstance(block, _Pair)
        if damping == 0:
            raise BlockError(
                f"IFANG's factors have rank {self.rows} at most, so their inverse needs damping > 0"
            )
        along_G, along_A = damping + block.g_energies, damping + block.a_energies
        return Eigen(
            block.Q_G,
            block.Q_A,
            torch.outer(along_G, along_A).reciprocal(),
            (damping * along_G).reciprocal(),
            (damping * along_A).reciprocal(),
            block.spectrum.new_tensor(damping**-2),
        )


def _principal(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors and eigenvalues of `(1/s') R^T R` within the span of the rows, `[s', i]`."""
    _, sizes, directions = torch.linalg.svd(rows, full_matrices=False)
    return directions.mT, sizes.square() / len(rows)


@remembers("Q_G", "Q_A", "g_energies", "a_energies")
class _Pair(LowRank):
    """A product of two factors in their eigenvectors, which remembers their eigenvalues apart."""

    def __init__(self, Q_G: Tensor, Q_A: Tensor, g: Tensor, a: Tensor) -> None:
        super().__init__(Q_G, Q_A, torch.outer(g, a))
        self.g_energies, self.a_energies = g, a
