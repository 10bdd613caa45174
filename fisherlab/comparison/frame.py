"""What every approximation of a layer is measured against: the exact block, gradient, steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from torch import Tensor

from fisherlab.blocks import Block, DirectSum, Outer
from fisherlab.blocks.columns import Columns


@contextmanager
def remembering(method: str, *blocks: Block) -> Iterator[None]:
    """Let blocks' `power` or `inner` remember its results: several measures ask for the same."""
    free = {id(block): block for block in blocks if method not in vars(block)}.values()
    for block in free:
        vars(block)[method] = cache(getattr(block, method))
    try:
        yield
    finally:
        for block in free:
            del vars(block)[method]


class Frame:
    """The exact block, its gradient and its natural-gradient steps."""

    def __init__(self, F: Outer | DirectSum, gradient: Tensor) -> None:
        self.F, self.gradient = F, gradient.to(F.dtype)
        self._steps: dict[float, Tensor] = {}
        self._inside: Inside | None = None

    def inside(self) -> Inside | None:
        """The same in a space that holds every input, where that has clearly fewer dimensions."""
        V = self.F.of.input_space if isinstance(self.F, Outer) else None
        F = None if V is None else self.F.within(V)
        if not isinstance(F, Outer) or V is None:
            return None
        self._inside = Inside(F, self.gradient @ V, V)
        # what is the same in both; an inverse, which cancels, needs the Gram matrix of its own
        Columns.energies.remember(self.F.of, F.energies())
        Columns.gram_eigen.remember(self.F.of, F.of.gram_eigen)
        Outer._squared_norm.remember(self.F, F.squared_norm())
        return self._inside

    def step(self, damping: float) -> Tensor:
        """`-(F + damping I)^{-1} g`, which every approximation is compared with."""
        if damping not in self._steps:
            if self._inside is None:
                self._steps[damping] = -self.F.solve(self.gradient, damping)
            else:
                self._steps[damping] = self._inside.step(damping) @ self._inside.V.mT
        return self._steps[damping]


class Inside(Frame):
    """A frame in coordinates of the inputs, along the orthonormal columns of `V` `[i, r]`."""

    def __init__(self, F: Outer, gradient: Tensor, V: Tensor) -> None:
        super().__init__(F, gradient)
        self.V = V
