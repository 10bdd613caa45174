"""The cost of one approximation: capture, statistics, damped inverse and one product."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from fisherlab import approximations
from fisherlab.experiments.bench import peers
from fisherlab.experiments.bench.setting import Network, Row, Setting, measured
from fisherlab.extract import capture
from fisherlab.extract.fisher import FISHER_TYPES

# The reach for the exact, the MC and the empirical Fisher, by network and method.
INVERSE_REACH: dict[str, dict[str, tuple[float | None, ...]]] = {
    "lenet": {
        "kfac": (6.5, 3.3, 3.3),
        "ekfac": (12.0, 5.5, 5.5),
        "tkfac": (None, None, None),
        "tekfac": (None, None, None),
    },
    "mlp": {
        "kfac": (9.0, 3.5, 3.5),
        "ekfac": (12.0, 4.0, 4.0),
        "tkfac": (None, None, None),
        "tekfac": (12.0, 4.0, 4.0),
    },
}
PRODUCT_REACH = {"lenet": {"kfac": (5.0, 1.9, 1.9)}}


def build(network: Network, name: str, fisher_type: str, inverse: bool) -> None:
    """One batch from the forward pass to `(F~ + lambda I)^{-1} g` or `F~ g` of every layer."""
    approximation = approximations.get(name)()
    layers = capture(
        network.model, network.criterion, network.x, network.y, fisher_type=fisher_type
    )
    for key, layer in layers.items():
        block = approximation(layer)
        if inverse:
            damping = peers.DAMPING * block.trace().item() / block.size
            block = approximation.damped(block, damping)
        block @ network.gradients[key]


def rows(setting: Setting) -> Iterator[Row]:
    """Damped inverse and product, then the product alone."""
    for inverse, reaches in ((True, INVERSE_REACH), (False, PRODUCT_REACH)):
        for model, methods in reaches.items():
            network = setting.network(model)
            for method, reach in methods.items():
                work = f"{method.upper()} {'damped inverse + product' if inverse else 'product'}"
                for fisher_type, target in zip(FISHER_TYPES, reach, strict=True):
                    run = partial(build, network, method, fisher_type, inverse)
                    yield Row(work, network, run, fisher_type, reach=target)
                    if setting.peers:
                        others = peers.builds(network, method, fisher_type, inverse)
                        for peer, call in others.items():
                            yield Row(work, network, call, fisher_type, peer)


def run(setting: Setting) -> Iterator[dict[str, Any]]:
    """The records of this part of the bench, as they are measured."""
    with torch.random.fork_rng(devices=[]):
        yield from measured(rows(setting), setting)
