"""The Nystrom approximation: a block sketched by its products with a few random directions."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from fisherlab import doors
from fisherlab.approximations.base import BY_OPTION, Approximation
from fisherlab.approximations.means import Means
from fisherlab.blocks import Block, BlockError, Leading, Outer
from fisherlab.blocks.numerics import cholesky, normal, qr, svd
from fisherlab.extract import LayerCapture
from fisherlab.statistics import Statistic


def directions(shape: tuple[int, int], rank: int, seed: int) -> Tensor:
    """`W`, orthonormal random directions `[k, o, i]` in float64, `k <= o i`."""
    size = shape[0] * shape[1]
    generator = torch.Generator().manual_seed(seed)
    draws = normal(generator, min(rank, size), size)
    return qr(draws.mT, "random directions")[0].mT.reshape(-1, *shape)


@dataclass(frozen=True, eq=False)
class Sketch(Statistic):
    """`sum D <D, W>`, `[k, o, i]`: the block's products with random directions."""

    columnwise = True
    rank: int = 16
    seed: int = 0

    def total(self, layer: LayerCapture) -> Tensor:
        W = directions(layer.shape, self.rank, self.seed).to(layer.device, layer.dtype)
        return Outer.over(layer.columns, 1.0) @ W


@dataclass(frozen=True)
class Nystrom(Approximation, name="nystrom"):
    """`F ~ (F W) (W^T F W)^+ (F W)^T`, `W` k random directions.      Frangella et al. 2023.

    It is F itself where F has rank k at most, and never above F: `F - X` is positive semi-definite.
    More directions are the same and further ones, which only bring it nearer.
    `F W` is a sum over examples, so that batches, ranks and running means add up. A shift of
    `eps ||F W||` goes in before the Cholesky factor and out after the singular values.

    Args:
        rank: the number of directions, k.
        seed: of the directions, which are the same for every batch.
        sketch: statistic of `F W` `[k, o, i]`; default: given by `rank` and `seed`.

    Raises:
        BlockError: an option is out of its range.
    """

    rank: int = 16
    seed: int = 0
    _: KW_ONLY
    sketch: Statistic = BY_OPTION

    def __post_init__(self) -> None:
        doors.count(self.rank, "rank of Nystrom", error=BlockError)
        doors.count(self.seed, "seed of Nystrom", 0, error=BlockError)
        given = getattr(self.sketch, "rank", self.rank), getattr(self.sketch, "seed", self.seed)
        choices = {pair: {"sketch": Sketch(*pair)} for pair in (given, self.directions)}
        self._choose("directions", choices)

    @property
    def directions(self) -> tuple[int, int]:
        """`rank` and `seed`."""
        return self.rank, self.seed

    def block(self, mean: Means, shape: tuple[int, int]) -> Block:
        Y = mean(self.sketch)
        W = directions(shape, self.rank, self.seed).to(Y.device).flatten(1)
        found = Y.double().flatten(1)
        shift = torch.finfo(Y.dtype).eps * found.norm()
        if not shift > 0:
            return Leading(torch.zeros_like(Y[:0]), Y.new_zeros(0))
        found = found + shift * W
        L = cholesky(found @ W.mT, "core of the Nystrom approximation")
        # rows of B: B^T B is the approximation of F + shift I, alg. 2.1
        B = torch.linalg.solve_triangular(L, found, upper=False)
        _, sizes, vectors = svd(B, "Nystrom approximation")
        values = (sizes.square() - shift).clamp(min=0)
        return Leading(vectors.view(-1, *shape).to(Y.dtype), values.to(Y.dtype))
