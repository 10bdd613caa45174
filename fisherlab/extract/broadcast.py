"""Rows that broadcasting gives to every example: the positions of a sequence, one row for all.

    s[n] = x[n] + p          p = W a, one row; its gradient per example is that of the sum s

Such a call is moved behind the sum, where each example has a row of its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.autograd.graph import GradientEdge

from fisherlab.extract.slopes import _name, _sorted
from fisherlab.extract.tape import Recorded


def users_of(output: Tensor) -> dict[tuple[Any, int], list[Any]]:
    """The nodes behind each edge `(node, number)` of a graph, once for each use."""
    users: dict[tuple[Any, int], list[Any]] = defaultdict(list)
    for node in _sorted([output.grad_fn]):
        for source, number in node.next_functions:
            if source is not None:
                users[source, number].append(node)
    return users


def spread(outputs: Tensor, calls: Sequence[Recorded], n: int) -> None:
    """Move calls of one row behind the sum that broadcasts it; calls with another use stay."""
    found = [c for c in calls if len(c.output) != n or c.geometry.lookup is not None]
    found = [c for c in found if c.geometry.conv is None and c.geometry.transposed is None]
    if not found:
        return
    users = users_of(outputs)
    for call in found:
        node = _only(users, call)
        if node is None or _name(node) != "Add":
            continue
        second = node.next_functions[0] != (call.edge.node, call.edge.output_nr)
        if second and node._saved_alpha != 1:
            continue
        wide, own = tuple(node._input_metadata[0].shape), tuple(call.output.shape)
        lead = len(wide) - len(own)
        if wide == own or (1,) * lead + own != (1, *wide[1:]):
            continue
        x = call.raw_input
        call.raw_input = x[(None,) * lead].expand(wide[0], *(-1,) * (x.ndim + lead - 1))
        call.output, call.edge = call.output.expand(wide), GradientEdge(node, 0)


def _only(users: dict[tuple[Any, int], list[Any]], call: Recorded) -> Any:
    """The only node that uses a call's output, and moves the call's edge to copies; or None."""
    while True:
        found = users[call.edge.node, call.edge.output_nr]
        if len(found) != 1:
            return None
        if _name(found[0]) != "Clone":
            return found[0]
        call.edge = GradientEdge(found[0], 0)
