"""A comparison under way: which layer is measured when, where, and what is shown meanwhile."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from threading import Event
from typing import Any

import pandas as pd

from fisherlab import doors
from fisherlab.blocks import contractions
from fisherlab.comparison.measurement import LayerMeasurement
from fisherlab.comparison.orders import unseen_values
from fisherlab.comparison.pool import LayerPool, Rows, Work
from fisherlab.comparison.request import Request
from fisherlab.comparison.samples import Samples, by_layer
from fisherlab.comparison.table import COLUMNS, Comparison, Interrupted
from fisherlab.distributed import jointly
from fisherlab.extract import Captures
from fisherlab.extras import named

Progress = Callable[[Sequence[Any]], Iterable[Any]]


def measured(request: Request, samples: Samples, progress: Progress | None) -> Comparison:
    """Every layer measured, by this process or by the rank that owns it.

    Raises:
        Interrupted: Ctrl-C; it holds what was measured.
    """
    config, ranks = request.config(samples.captures), request.ranks
    names = list(by_layer(samples.captures[0]))
    examples = len(samples.captures[0].labels)
    device = next(iter(samples.captures[0].values())).device
    # costs of all ranks, so that each finds the same owners whatever its shard
    costs = _costs(samples.captures[0], sum(ranks.objects(examples)) if ranks else examples)
    mine = names
    if ranks:
        owners = ranks.owners(costs)
        mine = [name for name in names if owners[name] == ranks.index]
        samples = samples.shared_out(ranks, owners)

    def measure(name: str, stopped: Event) -> Work:
        layer = LayerMeasurement(name, samples, request.memory)
        return (yield from layer.rows(request.makers, request.dampings, request.facts, stopped))

    # `memory` bounds one layer at a time, so layers then run one after another
    pool = LayerPool(
        measure, {name: costs[name] for name in mine}, device, request.memory is not None
    )
    try:
        with (
            contractions.workspace(request.memory),
            jointly(ranks, "measuring its layers"),
            pool,
        ):
            _run(pool, list(request.makers), progress)
    except KeyboardInterrupt:
        raise Interrupted(_table(pool.found, names, config)) from None
    found = pool.found
    if ranks:
        found = {name: rows for part in ranks.objects(found) for name, rows in part.items()}
    return _table(found, names, config)


def _run(pool: LayerPool, methods: list[str], progress: Progress | None) -> None:
    """All work of the pool, one step of the bar after another."""
    work = pool.steps()
    # one piece of work per method, and a last one of what is found of all blocks at once
    pieces = [*methods, "condition"]
    if progress is not None:
        steps = progress(pool.order)
        if not isinstance(steps, Iterable):
            raise ValueError(
                "progress(layers) must return an iterator over the layers, such as tqdm.tqdm, got "
                f"{doors.said(steps)}"
            )
        for _ in steps:
            deque(islice(work, len(pieces)), 0)
        # one that stops early leaves no layer out
        deque(work, 0)
        return
    for _ in notebook_bar([f"{name}: {piece}" for name in pool.order for piece in pieces]):
        next(work, None)


def _table(found: Mapping[str, Rows], names: Sequence[str], config: dict[str, Any]) -> Comparison:
    """The rows, by layer in the order of the model."""
    rows = [row for name in names for row in found.get(name, [])]
    return Comparison(pd.DataFrame(rows, columns=COLUMNS), config, unseen_values(rows))


def notebook_bar(steps: Sequence[str]) -> Iterable[str]:
    """A bar over layers and methods in a notebook or on a terminal; nothing elsewhere.

    Args:
        steps: the names of the steps, in order.

    Returns:
        The same names, as they are taken.
    """
    shell = sys.modules.get("IPython")
    notebook = shell is not None and getattr(shell.get_ipython(), "kernel", None) is not None
    if not notebook and not sys.stderr.isatty():
        return steps
    with named():
        from tqdm.auto import tqdm

    return tqdm(steps, desc="layers and methods", leave=False)


def _costs(captures: Captures, examples: int) -> dict[str, float]:
    """Multiplications that measuring each layer takes, roughly: one pass, the eigenvectors."""
    costs: dict[str, float] = {}
    for layer in captures.values():
        o, i = layer.shape
        columns = examples * layer.columns_per_example * layer.positions
        span = min(i, examples * layer.positions)
        cost = columns * o * i + 10 * (span**2 * i + o**3)
        costs[layer.name] = costs.get(layer.name, 0.0) + cost
    return costs
