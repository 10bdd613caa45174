"""`Means`: the means of one layer's statistics, as the methods that name them ask for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import copy
from typing import TYPE_CHECKING

from torch import Tensor

from fisherlab import doors
from fisherlab.blocks import Block, BlockError
from fisherlab.blocks.entry import check_shape
from fisherlab.blocks.factor import Factor, factor_of
from fisherlab.blocks.work import once
from fisherlab.statistics import Statistic, View

if TYPE_CHECKING:
    from fisherlab.approximations.base import Approximation

Sums = dict[str, Tensor]


def add(terms: Iterable[Mapping[str, Tensor]]) -> Sums:
    """Entrywise sum of dictionaries with the same keys; a key of one term keeps its own tensor."""
    total: Sums = {}
    for term in terms:
        for key, value in term.items():
            if key in total:
                total[key] = total[key] + value
            else:
                total[key] = value
    return total


def divide(sums: Sums, count: float | Tensor) -> Sums:
    """The means: every sum over the number of loss terms it covers."""
    return {key: value / count for key, value in sums.items()}


def check_approximation(approximation: object) -> None:
    """Refuse what is no method, known by what it does: its class is further down the imports."""
    if isinstance(approximation, type) or not hasattr(approximation, "statistics_by_name"):
        raise BlockError(
            f"approximation must be one such as fl.KFAC(), got {doors.said(approximation)}"
        )


class _Named(dict[str, Tensor]):
    """A basis that says what it lacks."""

    def __missing__(self, key: str) -> Tensor:
        raise BlockError(
            f"the mean has no basis with {key!r}: pass mean.given(method.basis(mean), corrections)"
        )


class Means:
    """`mean(S)`: the total of a statistic over the number of loss terms, as a tensor.

    Every mean, and every block that needs nothing else, is made once for all methods. `basis` and
    `corrections` are those of the method at hand.

    Args:
        total: the total of a statistic, as a tensor or a cheaper view.
        count: the number of loss terms.
        shape: `(o, i)` of the weight.
    """

    def __init__(
        self, total: Callable[[Statistic], Tensor | View], count: float, shape: tuple[int, int]
    ) -> None:
        if not callable(total) or isinstance(total, type):
            raise BlockError(
                f"total must be callable, as total(statistic); got {doors.said(total)}"
            )
        if not isinstance(count, Tensor) or count.ndim:
            count = doors.number(count, "count", least=0.0, error=BlockError)
        self._total, self.count, self.shape = total, count, check_shape(shape)
        self._views: dict[Statistic, Tensor | View] = {}
        self._factors: dict[Statistic, Factor] = {}
        self._blocks: dict[Approximation, Block] = {}
        self._reader: Approximation | None = None
        self._named: frozenset[Statistic] = frozenset()
        self.basis: Sums = {}
        self.corrections: Sums = {}

    def read_by(self, approximation: Approximation) -> Means:
        """The same means for one method, which gets those of its own statistics."""
        check_approximation(approximation)
        other = copy(self)
        other._reader, other.basis, other.corrections = approximation, _Named(), {}
        other._named = frozenset(approximation.statistics_by_name.values())
        return other

    def given(self, basis: Sums, corrections: Sums) -> Means:
        """The same means, with a basis and the means of the corrections in it."""
        for sums, what in ((basis, "basis"), (corrections, "corrections")):
            if not isinstance(sums, Mapping):
                raise BlockError(f"{what} must be a dict of tensors, got {doors.said(sums)}")
        other = copy(self)
        other.basis, other.corrections = _Named(basis), corrections
        return other

    def __call__(self, statistic: Statistic) -> Tensor:
        view = self.view(statistic)
        return view if isinstance(view, Tensor) else view.formed()

    def view(self, statistic: Statistic) -> Tensor | View:
        """A mean in the fewest numbers known: as rows where these are few, else the tensor.

        Raises:
            BlockError: the statistic is none, or no field of the method.
        """
        if not isinstance(statistic, Statistic):
            raise BlockError(f"statistic must be a Statistic, got {doors.said(statistic)}")
        if self._reader is not None and statistic not in self._named:
            raise BlockError(
                f"{type(self._reader).__name__} asks for the mean of {statistic!r}, which is none "
                "of its fields: name it as one, so that it is collected"
            )
        return once(self._views, statistic, lambda: self._mean(statistic))

    def _mean(self, statistic: Statistic) -> Tensor | View:
        total = self._total(statistic)
        return total / self.count if isinstance(total, Tensor) else total.scaled(1 / self.count)

    def factor(self, statistic: Statistic) -> Factor:
        """A mean as a factor of a Kronecker product, as rows where these are few.

        All methods get the same factor and share its decomposition.
        """
        view = self.view(statistic)
        if isinstance(view, Factor):
            return view
        S = view if isinstance(view, Tensor) else view.formed()
        return once(self._factors, statistic, lambda: factor_of(S, f"the mean of {statistic!r}"))

    def block(self, approximation: Approximation) -> Block:
        """The block of a method that needs nothing but its means and their basis; made once."""
        check_approximation(approximation)
        return once(self._blocks, approximation, lambda: self._block(approximation))

    def _block(self, approximation: Approximation) -> Block:
        mean = self.read_by(approximation)
        mean.basis = approximation.basis(mean)
        return approximation.block(mean, self.shape)
