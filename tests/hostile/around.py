"""What stands around: audit, Monitor and the adapters, with junk in place of each argument."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import fisherlab as fl
from fisherlab import blocks
from hostile import junk
from hostile.judge import Case
from hostile.optimizers import batch, net

CRITERION = nn.CrossEntropyLoss()


def trained(draw: random.Random) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    model, (x, y) = net(draw.randrange(99)), batch(draw)
    optimizer = torch.optim.Adam(model.parameters())
    CRITERION(model(x), y).backward()
    optimizer.step()
    return model, optimizer, (x, y)


def audit(draw: random.Random) -> Case:
    """A junk argument; or none: the reading is that of Adam's second moment."""
    model, optimizer, (x, y) = trained(draw)
    good = {"optimizer": optimizer, "model": model, "criterion": CRITERION, "x": x, "y": y}
    key = draw.choice(["", *good, "approximations"])
    if not key:
        wanted = optimizer.state[model[0].weight]["exp_avg_sq"] / (1 - 0.999)

        def check(table: Any) -> str:
            row = table.frame[table.frame["approximation"] == "Adam square"].iloc[0]
            captured = fl.capture(model, CRITERION, x, y)["0"]
            bias = optimizer.state[model[0].bias]["exp_avg_sq"] / (1 - 0.999)
            X = blocks.Diagonal(torch.cat([wanted, bias[:, None]], 1))
            expected = fl.metrics.cosine(X, fl.Exact()(captured)).item()
            away = abs(row["cosine"] - expected)
            return "" if away < 1e-9 else f"cosine off by {away:.1e}"

        return Case("audit", lambda: fl.audit(**good), check, (), model)
    bad = {
        "optimizer": lambda: junk.anything(draw),
        "model": lambda: junk.anything(draw, nn.Module),
        # without a criterion the outputs are losses; a module or a function may be one
        "criterion": lambda: draw.choice(["kfac", 1.5, [], {}, torch.ones(3)]),
        "x": lambda: junk.tensor(draw, x),
        "y": lambda: draw.choice(["kfac", 1.5, {}, object(), torch.ones(8, 2, 2), y[:3]]),
        "approximations": lambda: draw.choice(["kfca", 1.5, [3], {"a": 3}, object(), x]),
    }[key]()
    sparse = isinstance(bad, torch.Tensor) and bad.layout == torch.sparse_coo

    def same(table: Any) -> str:
        """A layer takes sparse inputs; they are those of the dense ones."""
        wanted = fl.audit(**good).frame.cosine
        away = float((table.frame.cosine - wanted).abs().max())
        return "" if away < 1e-9 else f"cosine off by {away:.1e}"

    return Case(
        f"audit({key}={str(bad)[:30]})",
        lambda: fl.audit(**{**good, key: bad}),
        same if key == "x" and sparse else None,
    )


def monitor(draw: random.Random) -> Case:
    """A junk option, or a junk batch."""
    model, optimizer, (x, y) = trained(draw)
    options: dict[str, Callable[[], object]] = {
        "every": lambda: junk.count(draw),
        "examples": lambda: junk.count(draw),
        "damping": lambda: junk.number(draw, zero=True),
        "fisher_type": lambda: draw.choice(["kfac", 1.5, [], "Exact"]),
        "log": lambda: draw.choice(["kfac", 1.5, [], lambda: None]),
        "optimizer": lambda: junk.anything(draw),
        "model": lambda: junk.anything(draw, nn.Module),
        "criterion": lambda: draw.choice(["kfac", 1.5, [], torch.ones(3)]),
        "x": lambda: draw.choice([None, "kfac", 1.5, [], torch.ones(()), x[:0]]),
        "y": lambda: draw.choice([None, "kfac", 1.5, [], torch.ones(()), y[:3]]),
    }
    key = draw.choice(list(options))
    bad = options[key]()
    good = {"optimizer": optimizer, "model": model, "criterion": CRITERION, "every": 1}
    given = {"x": x, "y": y}

    def call() -> object:
        taken = {**good, **({} if key in given else {key: bad})}
        watch = fl.Monitor(**taken)
        return watch(**{**given, **({key: bad} if key in given else {})})

    return Case(f"Monitor({key}={str(bad)[:30]})", call, None, (), model)


def adapters(draw: random.Random) -> Case:
    """A junk argument of what takes and gives other libraries' numbers."""
    bad = junk.anything(draw)
    model, block = nn.Linear(2, 2), blocks.Kronecker(torch.eye(2), torch.eye(3))
    covariances = {
        "gradient_covariance": {"0": torch.eye(2)},
        "activation_covariance": {"0": torch.eye(3)},
        "num_activation_covariance_processed": {"0": torch.tensor([4])},
    }
    calls: dict[str, Callable[[], object]] = {
        "to_backpack(block)": lambda: fl.adapters.to_backpack(bad),
        "to_backpack(bias)": lambda: fl.adapters.to_backpack(block, no_flag),
        "from_backpack(model)": lambda: fl.adapters.from_backpack(no_model),
        "from_backpack(quantity)": lambda: fl.adapters.from_backpack(model, bad),
        "curvlinops(method)": lambda: fl.adapters.curvlinops(no_method),
        "from_kronfluence(factors)": lambda: fl.adapters.from_kronfluence(bad, 4),
        "from_kronfluence(examples)": lambda: fl.adapters.from_kronfluence(covariances, no_count),
        "to_kronfluence(block)": lambda: fl.adapters.to_kronfluence(bad),
        "to_kronfluence(positions)": lambda: fl.adapters.to_kronfluence(block, no_count),
        "from_nngeometry(model)": lambda: fl.adapters.from_nngeometry(bad, no_model),
        "to_curvlinops(blocks)": lambda: fl.adapters.to_curvlinops(no_dict, bad),
    }
    no_flag, no_model = junk.anything(draw, bool), junk.anything(draw, nn.Module)
    no_count, no_dict = junk.count(draw), junk.anything(draw, dict)
    no_method = "kafc" if isinstance(bad, str) else bad
    name = draw.choice(list(calls))
    return Case(f"{name} = {str(bad)[:30]}", calls[name], None)


def case(seed: int) -> Case:
    draw = random.Random(seed)
    return draw.choice([audit, monitor, adapters, adapters])(draw)
