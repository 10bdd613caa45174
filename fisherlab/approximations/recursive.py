"""Kronecker products that each batch moves: their own past takes the place of its sums."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fisherlab import doors
from fisherlab.approximations.base import Approximation
from fisherlab.approximations.means import Sums
from fisherlab.blocks import Block, BlockError, Kronecker
from fisherlab.blocks.contractions import left_moment, right_moment
from fisherlab.blocks.factor import Dense
from fisherlab.blocks.numerics import sum_of, symmetrise
from fisherlab.extract import LayerCapture
from fisherlab.extract.joint import one_sample
from fisherlab.statistics import COLUMNS

STATISTICS = ("per_example", "gradient")


class BatchProducts:
    """A batch's block `F` times a Kronecker product, one side at a time; F is never formed.

        F A = (1/M) sum D A D^T,   F^T G = (1/M) sum D^T G D

    Args:
        layers: captures of one layer, whole batches or chunks of one.
        gradient: whether `D` is the mean gradient of each capture, in place of each example's.
        reduce: adds sums of all ranks.
    """

    def __init__(
        self,
        layers: Sequence[LayerCapture],
        gradient: bool = False,
        reduce: Callable[[Sums], Sums] | None = None,
    ) -> None:
        self.layers, self.gradient = one_sample(layers), gradient
        self.reduce = reduce
        self.shape = self.layers[0].shape
        like = self.layers[0].gradient if gradient else self.layers[0].columns.a
        self.dtype, self.device = like.dtype, like.device
        counted = torch.tensor(
            sum(x.examples for x in self.layers), dtype=torch.float64, device="cpu"
        )
        self.examples = float(self._reduced(count=counted)["count"])

    def _reduced(self, **sums: Tensor) -> Sums:
        return sums if self.reduce is None else self.reduce(sums)

    def __call__(self, G: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
        """`(1/M) sum D A D^T` `[o, o]` and `(1/M) sum D^T G D` `[i, i]`, symmetric."""
        sums = self._reduced(
            left=sum_of([self._left(x, A) for x in self.layers]),
            right=sum_of([self._right(x, G) for x in self.layers]),
        )
        left, right = (symmetrise(sums[key]) / self.examples for key in ("left", "right"))
        return left, right

    def inner(self, G: Tensor, A: Tensor) -> Tensor:
        """`<F, G (x) A>`, 0-d."""
        left = self._reduced(left=sum_of([self._left(x, A) for x in self.layers]))["left"]
        return (left * G).sum() / self.examples

    def _left(self, layer: LayerCapture, A: Tensor) -> Tensor:
        if self.gradient:
            return layer.examples * layer.gradient @ A @ layer.gradient.mT
        columns = layer.columns.apart
        return left_moment(columns.a, columns.g, A)

    def _right(self, layer: LayerCapture, G: Tensor) -> Tensor:
        if self.gradient:
            return layer.examples * layer.gradient.mT @ G @ layer.gradient
        columns = layer.columns.apart
        return right_moment(columns.a, columns.g, G)


@dataclass(frozen=True)
class Recursive(Approximation):
    """`F ~ G (x) A`, where each batch moves `(G, A)` and sums of batches do not exist.

    `Running` gives `step` the share that the past has, that of an average with its `decay`. One
    batch is a first step. All ranks take the same step.

    Args:
        statistics: "per_example": `F` has per-example gradients. "gradient": `F` has a batch's mean
            gradient at the observed labels, as the papers' optimizers do.

    Raises:
        BlockError: an option is unknown.
    """

    exponent = -0.5
    additive = False
    recursive = True
    statistics: str = "per_example"

    def __post_init__(self) -> None:
        if not isinstance(self.statistics, str) or self.statistics not in STATISTICS:
            known, got = " or ".join(map(repr, STATISTICS)), doors.said(self.statistics)
            raise BlockError(f"{type(self).__name__}'s statistics is {known}, got {got}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"gradient"}) if self.statistics == "gradient" else COLUMNS

    def advance(
        self,
        layers: Sequence[LayerCapture],
        previous: Sums,
        weigh: Callable[[float], float],
        reduce: Callable[[Sums], Sums] | None = None,
    ) -> tuple[Sums, float]:
        """The factors after a batch, and its examples.

        Args:
            layers: the batch, whole or in chunks.
            previous: the factors before it; empty before the first.
            weigh: the share of the past, of the batch's examples.
            reduce: adds sums of all ranks.
        """
        F = BatchProducts(layers, self.statistics == "gradient", reduce)
        if not previous:
            G, A = self.start(F)
        else:
            G, A = self.step(F, previous["G"], previous["A"], weigh(F.examples))
        return {"G": G, "A": A}, F.examples

    @abstractmethod
    def start(self, F: BatchProducts) -> tuple[Tensor, Tensor]:
        """`G` and `A` of the first batch."""

    @abstractmethod
    def step(self, F: BatchProducts, G: Tensor, A: Tensor, past: float) -> tuple[Tensor, Tensor]:
        """`G` and `A` after a batch, where the past has the share `past` in [0, 1]."""

    def factors(self, state: Sums) -> Block:
        """The block of the factors."""
        return Kronecker(Dense(state["G"]), Dense(state["A"]))

    def of_batch(self, layers: tuple[LayerCapture, ...]) -> Block:
        return self.factors(self.advance(layers, {}, lambda _: 0.0)[0])


def trace_kept(F: BatchProducts) -> tuple[Tensor, Tensor]:
    """`L / sqrt(tr F)` and `R / sqrt(tr F)` of both partial traces: TKFAC's product."""
    o, i = F.shape
    eye_G, eye_A = (torch.eye(d, dtype=F.dtype, device=F.device) for d in (o, i))
    L, R = F(eye_G, eye_A)
    scale = L.trace().rsqrt().nan_to_num(posinf=0.0)
    return L * scale, R * scale
