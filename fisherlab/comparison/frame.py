"""What every approximation of a layer is measured against: the exact block, gradient, steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fisherlab.blocks import Block, DirectSum, Outer, contractions
from fisherlab.blocks.columns import Columns
from fisherlab.metrics.direction import Step


@contextmanager
def remembering(method: str, *objects: Block | Columns) -> Iterator[None]:
    """Let a method remember its results: several measures ask for the same."""
    free = {id(item): item for item in objects if method not in vars(item)}.values()
    for item in free:
        vars(item)[method] = cache(getattr(item, method))
    try:
        yield
    finally:
        for item in free:
            del vars(item)[method]


class Frame:
    """The exact block, its gradient and its natural-gradient steps."""

    def __init__(self, F: Outer | DirectSum, gradient: Tensor) -> None:
        self.F, self.gradient = F, gradient.to(F.dtype)
        self._steps: dict[float, Tensor] = {}
        self._added: list[tuple[dict[str, Any], Tensor, float]] = []
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

    def add(self, row: dict[str, Any], ours: Tensor, damping: float) -> None:
        """A step whose worth is still missing in its row."""
        self._added.append((row, ours, damping))
        if sum(d.nbytes for _, d, _ in self._added) > contractions.WORKSPACE // 4:
            self.complete()

    def complete(self) -> None:
        """Fill in what the added steps are worth, in one pass over the gradients for all of them.

        As formed gradients, their products with b steps cost m n o i (t + b).
        """
        if not self._added:
            return
        quadratics = self.F.quadratic(torch.stack([ours for _, ours, _ in self._added]))
        for (row, ours, damping), quadratic in zip(self._added, quadratics, strict=True):
            step = Step.of(ours, self.step(damping), self.gradient, quadratic, damping)
            row |= {
                "direction_cosine": step.cosine.item(),
                "direction_error": step.error.item(),
                "quadratic_decrease": step.decrease.item(),
                "quadratic_decrease_scaled": step.decrease_scaled.item(),
            }
        self._added.clear()

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
