"""How fast a preconditioner ages: an old state's block against today's exact one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from fisherlab.blocks import Block
from fisherlab.metrics.entry import entered
from fisherlab.metrics.frobenius import cosine, relative_error


@entered
def staleness(
    states: Mapping[int, Block], exact: Mapping[int, Block]
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """`||X_t - F_{t+k}|| / ||F_{t+k}||` of blocks that were made k steps ago.

    It answers how large `basis_every` may be.

    Args:
        states: one layer's approximate blocks by the step that made them, as `opt.blocks()` hands
            out.
        exact: the exact blocks of the same layer by step.

    Yields:
        `(made at, age, relative error, cosine)`: two counts of steps and two 0-d float64.
    """
    for made, X in sorted(states.items()):
        for step, F in sorted(exact.items()):
            if step >= made:
                yield made, step - made, relative_error(X, F), cosine(X, F)
