"""The captures that a comparison is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fisherlab.blocks import Dense
from fisherlab.distributed import Ranks
from fisherlab.extract import Captures
from fisherlab.extract.joint import shared_out


@dataclass(frozen=True)
class Samples:
    """Captures, one per batch.

    Methods are made of `captures` and measured against `target` (None: the same). `held_out` are
    other examples, or None. `hessians` by layer replace a target.
    """

    captures: list[Captures]
    target: list[Captures] | None = None
    held_out: list[Captures] | None = None
    hessians: dict[str, Dense] | None = None

    def shared_out(self, ranks: Ranks, owners: Mapping[str, int]) -> Samples:
        """The layers of this rank, whole, and none of the others'."""

        def mine(batches: list[Captures] | None) -> list[Captures] | None:
            return batches and [shared_out(batch, ranks, owners) for batch in batches]

        return Samples(mine(self.captures) or [], mine(self.target), mine(self.held_out))


def by_layer(captures: Captures) -> dict[str, list[str]]:
    """LayerMeasurement names and the captures (groups) that each consists of."""
    found: dict[str, list[str]] = {}
    for key, layer in captures.items():
        found.setdefault(layer.name, []).append(key)
    return found
