"""IFANG: the rows of a batch reduced to few, with the damping inside the factors."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from torch import Tensor

from fisherlab import doors
from fisherlab.approximations.base import BY_OPTION
from fisherlab.approximations.damping import check_own
from fisherlab.approximations.eva import Eva, direction
from fisherlab.approximations.means import Means
from fisherlab.blocks import Block
from fisherlab.blocks.low_rank import Pair
from fisherlab.blocks.numerics import BlockError, svd
from fisherlab.statistics import MeanGradient, MeanInput, Statistic


@dataclass(frozen=True)
class IFANG(Eva, name="ifang"):
    """`(lambda I + G)^{-1} (x) (lambda I + A)^{-1}` preconditions.      ANG (11)-(14), 2.3, Alg. 1.

        G = (1/s') sum_k g~_k g~_k^T,   A = (1/s') sum_k a~_k a~_k^T

    `rows` is s': the batch in s' contiguous groups, `a~_k = mean_{n,t} a` and
    `g~_k = mean_n sum_t g` those of group k. With one row (Alg. 1) the inverse needs one scalar,
    and undamped it is Eva's block. With as many rows as examples it is KFAC's block in the reduce
    setting. Over time each row is averaged with its predecessors, which draws them together:
    `decay=0` is the paper's, of one batch.

    Args:
        rows: s', the number of groups.
        a: statistic of the group means `a~_k`; None: their default.
        g: statistic of the group means `g~_k`; None: their default.
    """

    placement = "factorwise"
    rows: int = 1
    _: KW_ONLY
    a: Statistic = BY_OPTION
    g: Statistic = BY_OPTION

    def __post_init__(self) -> None:
        doors.count(self.rows, "rows, which counts the groups of a batch,", error=BlockError)
        others = {getattr(S, "groups", 1) for S in (self.a, self.g)} | {self.rows}
        self._choose("rows", {k: {"a": MeanInput(k), "g": MeanGradient(k)} for k in others})

    def block(self, mean: Means, shape: tuple[int, int]) -> Block:
        (Q_G, g), (Q_A, a) = _principal(mean(self.g)), _principal(mean(self.a))
        return Pair(Q_G, Q_A, g, a)

    def damped(self, block: Block, damping: float) -> Block:
        return check_own(block, Pair, "IFANG").factorwise_inverse(damping, "IFANG")


def _principal(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors and eigenvalues of `(1/s') R^T R` in the span of the rows `[s', d]` or `[d]`."""
    if rows.ndim == 1:
        vector, energy = direction(rows)
        return vector[:, None], energy.reshape(1)
    _, sizes, directions = svd(rows, "rows")
    return directions.mT, sizes.square() / len(rows)
