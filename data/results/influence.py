"""Which block predicts what leaving examples out does: retraining a pooled transformer decides.

    python data/results/influence.py [SEEDS]

A classifier with one attention block is trained on digits, and then on, with and without each of
some random tenths of its examples. Predicted is the change of each unseen example's loss,

    (1/n) sum_{k left out} <g_unseen, (X + lambda)^{-1} g_k>,   summed over the maps of the block,

with X a block of each map, made of all training examples, and lambda a share of `tr F / N`. The
score is the rank correlation of predicted and true changes over the groups, the linear
datamodelling score of Park et al. 2023, a mean over the unseen examples. Rows go to influence.csv.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd
import torch
from scipy.stats import rankdata
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

import fisherlab as fl
from fisherlab.blocks.contractions import per_example
from fisherlab.models.attention import Classifier

EXAMPLES, UNSEEN, GROUPS, RATE, DECAY = 150, 50, 24, 5e-3, 1e-2
# steps to the first optimum, and from there to that without a group
STEPS, FURTHER = 300, 80
SHARES = (0.001, 0.01, 0.1, 1.0)
METHODS = {
    "identity": None,
    "kfac": fl.KFAC(),
    "ekfac": fl.EKFAC(),
    "tkfac": fl.TKFAC(),
    "tekfac": fl.TEKFAC(),
    "kronecker_optimal": fl.KroneckerOptimal(),
    "exact": fl.Exact(),
}


def trained(
    model: nn.Module, x: Tensor, y: Tensor, weights: Tensor, steps: int
) -> dict[str, Tensor]:
    """Parameters `[k, ...]` of a copy per row of weights, all from the model's, by full batches."""
    params, buffers = stack_module_state([model] * len(weights))
    params = {name: p.detach().clone() for name, p in params.items()}

    def loss(one: dict[str, Tensor], buffer: dict[str, Tensor], w: Tensor) -> Tensor:
        outputs = functional_call(model, (one, buffer), (x,))
        decay = sum((p**2).sum() for p in one.values())
        return (w * nn.functional.cross_entropy(outputs, y, reduction="none")).mean() + (
            DECAY * decay / 2
        )

    slopes = vmap(grad(loss))
    first = {name: torch.zeros_like(p) for name, p in params.items()}
    second = {name: torch.zeros_like(p) for name, p in params.items()}
    for step in range(1, steps + 1):
        rate = RATE * min(1.0, 2 * (1 - step / (steps + 1)))
        for name, g in slopes(params, buffers, weights).items():
            first[name].lerp_(g, 0.1)
            second[name].lerp_(g**2, 0.01)
            size = (second[name] / (1 - 0.99**step)).sqrt() + 1e-8
            params[name] = params[name] - rate * first[name] / (1 - 0.9**step) / size
    return params


def losses(model: nn.Module, params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    """`[k, q]` of every copy and example."""
    outputs = vmap(lambda one: functional_call(model, one, (x,)))(params)
    return torch.stack([nn.functional.cross_entropy(o, y, reduction="none") for o in outputs])


def take(model: nn.Module, params: dict[str, Tensor]) -> None:
    """Give a model the parameters of the first copy."""
    model.load_state_dict({name: p[0] for name, p in params.items()})


def gradients(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """`[n, o, i]` at the observed labels, of the maps of the attention block."""
    criterion = nn.CrossEntropyLoss()
    found = fl.capture(model, criterion, x, y, fisher_type="empirical", kinds=("map",))
    return {
        name: per_example(layer.columns.a, layer.columns.g)[0]
        for name, layer in found.items()
        if layer.positions > 1
    }


def measured(pooling: str, seed: int) -> list[dict[str, object]]:
    """The rows of one network."""
    data = fl.datasets.load("digits").train.tensors
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(data[0]), generator=generator)[: EXAMPLES + UNSEEN]
    x, y = data[0][rows].double(), data[1][rows]
    (x, x_q), (y, y_q) = (z.split([EXAMPLES, UNSEEN]) for z in (x, y))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = Classifier(8, 8, 10, 12, pooling).double()
    weights = torch.ones(GROUPS + 1, EXAMPLES, dtype=torch.float64)
    for row in weights[1:]:
        row[torch.randperm(EXAMPLES, generator=generator)[: EXAMPLES // 10]] = 0
    take(model, trained(model, x, y, weights[:1], STEPS))
    params = trained(model, x, y, weights, FURTHER)
    found = losses(model, params, x_q, y_q)
    truth = (found[1:] - found[0]).detach()
    take(model, params)
    ours, theirs = gradients(model, x, y), gradients(model, x_q, y_q)
    layers = fl.capture(model, nn.CrossEntropyLoss(), x, y, kinds=("map",))
    out = 1 - weights[1:]
    result = []
    for name, method in METHODS.items():
        errors = []
        blocks = {}
        for key in ours:
            F = fl.Exact()(layers[key])
            blocks[key] = F if method is None else method(layers[key])
            errors.append(float(fl.metrics.relative_error(blocks[key], F)))
        for share in SHARES:
            scores = torch.zeros(UNSEEN, EXAMPLES, dtype=torch.float64)
            for key, block in blocks.items():
                F = fl.Exact()(layers[key])
                damping = share * float(F.trace()) / F.size
                P = theirs[key] if method is None else block.solve(theirs[key], damping)
                scores += P.flatten(1) @ ours[key].flatten(1).T / EXAMPLES
            predicted = out @ scores.T
            one, other = (torch.as_tensor(rankdata(v, axis=0)) for v in (predicted, truth))
            one, other = one - one.mean(0), other - other.mean(0)
            rank = (one * other).sum(0) / (one.norm(dim=0) * other.norm(dim=0))
            result.append(
                {
                    "pooling": pooling,
                    "seed": seed,
                    "method": name,
                    "share": share,
                    "score": float(rank.mean()),
                    "error": pd.Series(errors).median(),
                    "loss": float(
                        losses(model, {k: p[:1] for k, p in params.items()}, x, y).mean()
                    ),
                }
            )
            if method is None:
                break
    return result


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """The best share of each method, and the difference of its score to KFAC's over networks."""
    best = rows.loc[rows.groupby(["pooling", "seed", "method"])["score"].idxmax()]
    wide = best.pivot(index=["pooling", "seed"], columns="method", values="score")
    errors = best.groupby("method")["error"].median()
    found = []
    for name in METHODS:
        gain = wide[name] - wide["kfac"]
        found.append(
            {
                "method": name,
                "median error in sample": errors[name],
                "score": wide[name].mean(),
                "minus KFAC's": gain.mean(),
                "standard error": gain.std() / len(gain) ** 0.5,
                "networks": len(gain),
            }
        )
    return pd.DataFrame(found).set_index("method")


if __name__ == "__main__":
    seeds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    path, every = Path(__file__).with_suffix(".csv"), []
    for seed in range(seeds):
        for pooling in ("mean", "token"):
            every += measured(pooling, seed)
            pd.DataFrame(every).to_csv(path, index=False, float_format="%.5g")
    print(table(pd.DataFrame(every)).to_string(float_format="%.3f"))
