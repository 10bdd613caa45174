"""The cost of a capture: a and g of every layer, and the Gram matrices made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fisherlab.experiments.bench import peers
from fisherlab.experiments.bench.setting import Network, Row, Setting, measured
from fisherlab.extract import Captures, capture

GRAM_REACH = {"mlp": 0.85, "lenet": 2.0}
CHECKED = ("mlp", "lenet", "resnet20")
CAPTURE_REACH = {"empirical": 1.0, "exact": 3.4}


def _of(network: Network, **options: Any) -> Callable[[], Captures]:
    """The capture of a network's batch, to be called."""
    return partial(capture, network.model, network.criterion, network.x, network.y, **options)


def grams(network: Network) -> list[Tensor]:
    """The Gram matrix of every layer, from the factors."""
    layers = _of(network, fisher_type="empirical", kinds=("map",))()
    return [layer.gram() for layer in layers.values()]


def rows(setting: Setting) -> Iterator[Row]:
    """Gram matrices of the MLP and LeNet, the capture alone by both backends, and its proof."""
    for name, reach in GRAM_REACH.items():
        network = setting.network(name)
        work = "Gram matrices"
        yield Row(work, network, partial(grams, network), "empirical", reach=reach)
        if setting.peers:
            for peer, run in peers.grams(network).items():
                yield Row(work, network, run, "empirical", peer)
    network = setting.network("lenet")
    for fisher_type, reach in CAPTURE_REACH.items():
        for backend in ("hooks", "backpack"):
            run = _of(network, fisher_type=fisher_type, backend=backend)
            yield Row(f"capture, {backend}", network, run, fisher_type, reach=reach)
    for name in CHECKED[:1] if setting.quick else CHECKED:
        network = setting.network(name)
        for check in ("off", "full"):
            run = _of(network, fisher_type="empirical", check=check)
            yield Row(f"capture, check {check}", network, run, "empirical")


def run(setting: Setting) -> Iterator[dict[str, Any]]:
    """The records of this part of the bench, as they are measured."""
    with torch.random.fork_rng(devices=[]):
        yield from measured(rows(setting), setting)
