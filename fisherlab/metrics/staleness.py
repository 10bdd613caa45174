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
    """`(made at, age, ||X_t - F_{t+k}|| / ||F_{t+k}||, cosine)` of states.

    `states` are one layer's approximate blocks by the step they were made at (`opt.blocks()`),
    `exact` its exact blocks by step. Answers how large `basis_every` may be.
    """
    for made, X in sorted(states.items()):
        for step, F in sorted(exact.items()):
            if step >= made:
                yield made, step - made, relative_error(X, F), cosine(X, F)
