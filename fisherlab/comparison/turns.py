"""A comparison of a few layers at a time: each captured, measured and dropped before the next."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pandas as pd

from fisherlab.comparison.request import Request
from fisherlab.comparison.run import Progress, measured
from fisherlab.comparison.table import COLUMNS, Comparison, Interrupted
from fisherlab.extract.geometry import NoBlock
from fisherlab.extract.select import chosen, weights_of


def in_turns(request: Request, layers_at_once: int, progress: Progress | None) -> Comparison:
    """The table of all layers, of which memory holds `layers_at_once` together.

    Every turn repeats the forward and backward passes, with the same draws.

    Raises:
        Interrupted: Ctrl-C; it holds what was measured.
        NoBlock: no layer has a block.
    """
    options, generator = request.options, request.options["generator"]
    names, _ = chosen(weights_of(request.model), options["layers"], options["skip"])
    given = options["skip"]
    skip = [] if given is None else [given] if isinstance(given, str) else list(given)
    state = end = generator.get_state()
    # a bias is captured with its weight, in one block or in two
    units: dict[str, list[str]] = {}
    for name in names:
        owner = name.rpartition(".")[0]
        units.setdefault(owner if owner in names else name, []).append(name)
    layers = list(units.values())
    tables: list[Comparison] = []
    refused: dict[str, str] = {}
    for start in range(0, len(layers), layers_at_once):
        ours = {name for unit in layers[start : start + layers_at_once] for name in unit}
        others = [name for name in names if name not in ours]
        turn = replace(request, options={**options, "skip": [*skip, *others] or None})
        generator.set_state(state)
        try:
            tables.append(measured(turn, turn.samples(), progress))
            end = generator.get_state()
        except NoBlock as error:
            refused |= {name: why for name, why in error.reasons.items() if name in ours}
        except Interrupted as stop:
            raise Interrupted(_joined([*tables, stop.comparison], refused)) from None
    generator.set_state(end)
    if not tables:
        raise NoBlock(refused)
    return _joined(tables, refused)


def _joined(tables: list[Comparison], refused: dict[str, str]) -> Comparison:
    """The tables as one, with what is true of all layers together in its config."""
    frame = pd.concat([table.frame for table in tables if len(table.frame)], ignore_index=True)
    configs = [table.config for table in tables]
    parameters: dict[str, Any] = dict(configs[0]["parameters"])
    parameters["covered"] = sum(config["parameters"]["covered"] for config in configs)
    skipped = {k: v for config in configs for k, v in config["skipped"].items()} | refused
    config = configs[0] | {"parameters": parameters, "skipped": skipped}
    return Comparison(frame[COLUMNS], config)
