"""Whether the nearer block predicts better: retraining judges influence, held-out labels Laplace.

    python data/results/influence.py         measures what is missing, then page and picture
    python data/results/influence.py page    writes page and picture of the rows that are there

Networks: a transformer with one block, pooled by mean or token, and an MLP, four seeds each, on 150
digits. Blocks X: of every layer with weights, made of all training examples.

Influence. Each network is trained on, with and without each of some random tenths of its examples,
by minibatches in two orders. Predicted is the change of each unseen example's loss,

    (1/n) sum_{k left out} <g_unseen, (X + lambda)^{-1} g_k>,   summed over layers.

The score is the rank correlation of predicted and true changes over the groups, a mean over unseen
examples: the linear datamodelling score of Park et al. 2023. The truth is the mean of both orders;
the correlation of the one with the other, stepped up to their mean, bounds every score.

Laplace. The weights are `N(w, (n (X + lambda))^{-1})`, layer by layer. The network is linear in
them, so that the outputs are normal; their softmax is averaged over draws. Judged are the negative
log likelihood and the calibration error on unseen examples.

Lambda is that of the objective, its weight decay, or the one best on all other networks.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import rankdata
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, stack_module_state, vmap

import fisherlab as fl
from fisherlab import whole
from fisherlab.blocks import Block
from fisherlab.blocks.contractions import per_example
from fisherlab.models.attention import Classifier

ROWS = Path(__file__).with_suffix(".parquet")
PAGE, PICTURE = ROWS.with_suffix(".md"), ROWS.with_suffix(".png")
EXAMPLES, UNSEEN, JUDGED = 150, 300, 60
GROUPS, ORDERS, BATCH = 12, 2, 50
RATE, DECAY = 5e-3, 1e-2
# steps to the first optimum, and from there to that without a group
STEPS, FURTHER = 250, 80
# multiples of the weight decay
LAMBDAS = (0.1, 1.0, 10.0, 100.0, 1000.0)
DRAWS = 256
METHODS = {
    "identity": None,
    "diagonal": fl.Diagonal(),
    "kfac": fl.KFAC(),
    "ekfac": fl.EKFAC(),
    "tkfac": fl.TKFAC(),
    "tekfac": fl.TEKFAC(),
    "exact": fl.Exact(),
}
BASE, PRODUCTS = "kfac", ["kfac", "ekfac", "tkfac", "tekfac"]
UNIT = ["network", "seed"]
COMMAND = "python data/results/influence.py"
NETWORKS = [(kind, seed) for seed in range(4) for kind in ("mean", "token", "mlp")]
Weights = dict[str, Tensor]


def made(kind: str, seed: int) -> nn.Module:
    """A network of a kind."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if kind == "mlp":
            layers = nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 10)
            return nn.Sequential(nn.Flatten(), *layers).double()
        return Classifier(8, 8, 10, 8, kind).double()


def trained(
    model: nn.Module, x: Tensor, y: Tensor, weights: Tensor, orders: list[Tensor]
) -> Weights:
    """Parameters `[k, ...]`, a copy per row of weights and order, all from the model's, by Adam.

    Args:
        model: where all copies start.
        x: examples.
        y: labels.
        weights: `[c, n]` of the examples in each copy's loss.
        orders: per order the rows of each step, `[steps, b]`; copies of an order are neighbours.
    """
    params, _ = stack_module_state([model] * (len(weights) * len(orders)))
    params = {name: p.detach().clone() for name, p in params.items()}
    weights = weights.repeat(len(orders), 1)

    def loss(one: Weights, x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        outputs = functional_call(model, one, (x,))
        decay = torch.stack([(p**2).sum() for p in one.values()]).sum()
        return (w * nn.functional.cross_entropy(outputs, y, reduction="none")).mean() + (
            DECAY * decay / 2
        )

    slopes = vmap(grad(loss))
    first = {name: torch.zeros_like(p) for name, p in params.items()}
    second = {name: torch.zeros_like(p) for name, p in params.items()}
    steps = len(orders[0])
    for step in range(1, steps + 1):
        rows = torch.stack([order[step - 1] for order in orders])
        rows = rows.repeat_interleave(len(weights) // len(orders), 0)
        rate = RATE * min(1.0, 2 * (1 - step / (steps + 1)))
        found = slopes(params, x[rows], y[rows], weights.gather(1, rows))
        for name, g in found.items():
            first[name].lerp_(g, 0.1)
            second[name].lerp_(g**2, 0.01)
            size = (second[name] / (1 - 0.99**step)).sqrt() + 1e-8
            params[name] -= rate * first[name] / (1 - 0.9**step) / size
    return params


def order(steps: int, generator: torch.Generator) -> Tensor:
    """Rows of each step: epochs of shuffled batches, `[steps, b]`."""
    epochs = -(-steps * BATCH // EXAMPLES)
    rows = [torch.randperm(EXAMPLES, generator=generator) for _ in range(epochs)]
    return torch.cat(rows)[: steps * BATCH].view(steps, BATCH)


def losses(model: nn.Module, params: Weights, x: Tensor, y: Tensor) -> Tensor:
    """`[k, q]` of every copy and example."""
    outputs = vmap(lambda one: functional_call(model, one, (x,)))(params)
    return torch.stack([nn.functional.cross_entropy(o, y, reduction="none") for o in outputs])


def jacobians(model: nn.Module, names: list[str], x: Tensor) -> Weights:
    """`[q, c, o, i]` of the outputs in each layer's `[weight | bias]`."""
    layers: dict[str, nn.Module] = {name: model.get_submodule(name) for name in names}
    params = {
        f"{name}.{part}": p.detach()
        for name, layer in layers.items()
        for part, p in layer.named_parameters(recurse=False)
    }

    def outputs(one: Weights, row: Tensor) -> Tensor:
        return functional_call(model, one, (row[None],))[0]

    found = vmap(jacrev(outputs), (None, 0), chunk_size=50)(params, x)
    joint = {}
    for name in names:
        W = found[f"{name}.weight"].flatten(3)
        bias = found.get(f"{name}.bias")
        joint[name] = (W if bias is None else torch.cat([W, bias[..., None]], 3)).detach()
    return joint


def correlations(one: Tensor, other: Tensor) -> Tensor:
    """The rank correlation over groups, `[g, q]` each, of every unseen example."""
    ranks = (torch.as_tensor(rankdata(v, axis=0)) for v in (one, other))
    a, b = (r - r.mean(0) for r in ranks)
    return (a * b).sum(0) / (a.norm(dim=0) * b.norm(dim=0))


def judged(f: Tensor, covariance: Tensor, y: Tensor) -> tuple[float, float]:
    """The negative log likelihood and the calibration error of ten bins of a predictive."""
    draw = torch.Generator().manual_seed(0)
    z = torch.randn(DRAWS, *f.shape, dtype=f.dtype, generator=draw)
    eye = torch.eye(f.shape[1], dtype=f.dtype)
    scale = covariance.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    L = torch.linalg.cholesky(covariance + (1e-10 * scale + 1e-14) * eye)
    p = (f + torch.einsum("qcd,sqd->sqc", L, z)).softmax(2).mean(0)
    sure, guess = p.max(1)
    bins = (10 * sure).long().clamp(max=9)
    right = (guess == y).double()
    gaps = [(right - sure)[bins == k].sum().abs() for k in range(10)]
    return float(-p.gather(1, y[:, None]).log().mean()), float(torch.stack(gaps).sum() / len(y))


def measured(kind: str, seed: int) -> Iterator[dict[str, object]]:
    """The rows of one network."""
    data = fl.datasets.load("digits").train.tensors
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(data[0]), generator=generator)[: EXAMPLES + UNSEEN]
    x, y = data[0][rows].double(), data[1][rows]
    (x, x_q), (y, y_q) = (z.split([EXAMPLES, UNSEEN]) for z in (x, y))
    model = made(kind, seed)
    everything = torch.ones(1, EXAMPLES, dtype=torch.float64)
    weights = everything.repeat(GROUPS + 1, 1)
    for row in weights[1:]:
        row[torch.randperm(EXAMPLES, generator=generator)[: EXAMPLES // 10]] = 0
    start = trained(model, x, y, everything, [order(STEPS, generator)])
    model.load_state_dict({name: p[0] for name, p in start.items()})
    orders = [order(FURTHER, generator) for _ in range(ORDERS)]
    params = trained(model, x, y, weights, orders)
    found = losses(model, params, x_q[:JUDGED], y_q[:JUDGED]).detach()
    found = found.view(ORDERS, GROUPS + 1, JUDGED)
    changes = found[:, 1:] - found[:, :1]
    truth, halves = changes.mean(0), correlations(changes[0], changes[1]).mean()
    reached = {
        name: p.view(ORDERS, GROUPS + 1, *p.shape[1:])[:, 0].mean(0) for name, p in params.items()
    }
    model.load_state_dict(reached)
    criterion = nn.CrossEntropyLoss()
    layers = fl.capture(model, criterion, x, y, kinds=("map",))
    ours, theirs = (
        {
            name: per_example(layer.columns.a, layer.columns.g)[0]
            for name, layer in fl.capture(
                model, criterion, *batch, fisher_type="empirical", kinds=("map",)
            ).items()
        }
        for batch in ((x, y), (x_q[:JUDGED], y_q[:JUDGED]))
    )
    J = jacobians(model, list(layers), x_q)
    with torch.no_grad():
        f = model(x_q)
        loss = float(criterion(model(x), y))
    facts = {"network": kind, "seed": seed, "loss": loss, "halves": float(halves)}
    zero = torch.zeros(UNSEEN, 10, 10, dtype=torch.float64)
    nll, calibration = judged(f, zero, y_q)
    yield {**facts, "method": "map", "multiple": 0.0, "nll": nll, "calibration": calibration}
    out = 1 - weights[1:]
    dense = {k: fl.Exact()(layer).dense() for k, layer in layers.items()}
    for name, method in METHODS.items():
        blocks = {k: method(layer) for k, layer in layers.items() if method is not None}
        errors = [float((X.dense() - dense[k]).norm() / dense[k].norm()) for k, X in blocks.items()]
        solvers = {k: solver(name, blocks.get(k), dense[k]) for k in layers}
        for multiple in LAMBDAS:
            scores = torch.zeros(JUDGED, EXAMPLES, dtype=torch.float64)
            covariance = zero.clone()
            for k, solve in solvers.items():
                P = solve(theirs[k], multiple * DECAY)
                scores += P.flatten(1) @ ours[k].flatten(1).T / EXAMPLES
                S = solve(J[k].flatten(0, 1), multiple * DECAY).view_as(J[k])
                covariance += J[k].flatten(2) @ S.flatten(2).mT / EXAMPLES
            nll, calibration = judged(f, (covariance + covariance.mT) / 2, y_q)
            yield {
                **facts,
                "method": name,
                "multiple": multiple,
                "error": float(np.median(errors)) if errors else math.nan,
                "score": float(correlations(out @ scores.T, truth).mean()),
                "nll": nll,
                "calibration": calibration,
            }


def solver(name: str, X: Block | None, F: Tensor) -> Callable[[Tensor, float], Tensor]:
    """`V, lambda -> (X + lambda)^{-1} V`; of "exact" by F's eigenvectors, fewer than columns."""
    if X is None:
        return lambda V, damping: V / damping
    if name != "exact":
        return X.solve
    values, Q = torch.linalg.eigh(F)
    return lambda V, damping: (V.flatten(1) @ Q / (values.clamp(min=0) + damping) @ Q.T).view_as(V)


def measure() -> None:
    """Add the rows of the networks that are missing, one file write per network."""
    torch.set_num_threads(1)
    rows = [whole.read_table(ROWS)] if ROWS.is_file() else []
    done = {pair for part in rows for pair in zip(part["network"], part["seed"], strict=True)}
    for kind, seed in NETWORKS:
        if (kind, seed) in done:
            continue
        start = time.process_time()
        rows.append(pd.DataFrame(list(measured(kind, seed))))
        whole.write_table(ROWS, pd.concat(rows, ignore_index=True))
        print(f"{kind}, seed {seed}: {time.process_time() - start:.0f} s of the processor")


def best(rows: pd.DataFrame, value: str, most: bool) -> pd.DataFrame:
    """A network's value of each method, at the multiple that is best on all other networks."""
    table = rows.pivot_table(index=UNIT, columns=["method", "multiple"], values=value)
    found = {}
    for name in METHODS:
        values = table[name].to_numpy()
        others = (values.sum(0) - values) * (1 if most else -1)
        found[name] = values[np.arange(len(values)), others.argmax(1)]
    return pd.DataFrame(found, index=table.index)


def own(rows: pd.DataFrame, value: str) -> pd.DataFrame:
    """A network's value of each method, at the weight decay itself."""
    rows = rows[rows["multiple"] == 1]
    return rows.pivot_table(index=UNIT, columns="method", values=value).reindex(
        columns=list(METHODS)
    )


def interval(values: pd.Series) -> tuple[float, float, float]:
    """The mean over networks and its 95 % interval, by a bootstrap over networks."""
    numbers = values.to_numpy()
    draws = np.random.default_rng(0).integers(len(numbers), size=(4000, len(numbers)))
    low, high = np.quantile(numbers[draws].mean(1), (0.025, 0.975))
    return float(numbers.mean()), float(low), float(high)


def said(values: pd.Series, digits: int = 3) -> str:
    """The mean and its interval in print."""
    value, low, high = interval(values)
    return f"{value:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"


def verdict(gains: pd.Series, better: int) -> str:
    """Whether the interval of a paired difference leaves out 0."""
    _, low, high = interval(gains)
    if low <= 0 <= high:
        return "order not resolved"
    return "better" if np.sign(low) == better else "worse"


SCORES = {
    "score": ("Influence", "rank correlation with retraining", 1),
    "nll": ("Laplace", "negative log likelihood", -1),
    "calibration": ("Laplace", "calibration error", -1),
}


def page(rows: pd.DataFrame) -> str:
    """The page as Markdown."""
    networks = rows.drop_duplicates(UNIT)
    counts = networks.groupby("network").size()
    kinds = ", ".join(f"{number} {kind}" for kind, number in counts.items())
    half = networks["halves"]
    both = 2 * half / (1 + half)
    lines = [
        "# Does the nearer block predict better?",
        "",
        f"{len(networks)} networks on {EXAMPLES} digits ({kinds}), each retrained without each of "
        f"{GROUPS} random tenths of its",
        f"examples, in {ORDERS} orders of minibatches. Two orders agree at a rank correlation of "
        f"{half.mean():.2f} ({half.min():.2f} to {half.max():.2f}), so their",
        f"mean, which is the truth here, is known to {both.mean():.2f}. Blocks are of every layer "
        "with weights, damped by the objective's",
        f"weight decay, {DECAY:g}, or by its best multiple on all *other* networks. Intervals are "
        "95 % ones, by a bootstrap over networks,",
        f"which are few and small. `{COMMAND}` measures the rows beside this page and writes it.",
        "",
        "![Scores and likelihoods of the methods](influence.png)",
    ]
    for value, (title, what, better) in SCORES.items():
        lines += ["", f"## {title}: {what}", ""]
        if title == "Laplace":
            plain = rows[rows["method"] == "map"].set_index(UNIT)[value].mean()
            lines += [f"The network without a posterior has {plain:.3f}.", ""]
        head = ["method", "at the weight decay", "minus KFAC's", "verdict"]
        head += ["at the best multiple", "minus KFAC's", "verdict"]
        lines += [f"| {' | '.join(head)} |", f"| {' | '.join('---' for _ in head)} |"]
        tables = own(rows, value), best(rows, value, better > 0)
        for name in METHODS:
            cells = [name]
            for table in tables:
                gain = table[name] - table[BASE]
                cells.append(said(table[name]).replace("+", ""))
                cells += ["-", "-"] if name == BASE else [said(gain), verdict(gain, better)]
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "## Influence, by network", "", *_by_network(rows)]
    lines += ["", "## Is the nearer of two methods the better one?", "", *_nearer(rows), ""]
    return "\n".join(lines)


def _by_network(rows: pd.DataFrame) -> Iterator[str]:
    """KFAC's score and what others gain on each kind of network, at the weight decay."""
    scores = own(rows, "score")
    others = [name for name in METHODS if name in PRODUCTS and name != BASE] + ["exact"]
    head = ["network", BASE, *(f"{name} minus KFAC's" for name in others)]
    yield f"| {' | '.join(head)} |"
    yield f"| {' | '.join('---' for _ in head)} |"
    for kind, group in scores.groupby(level="network"):
        gains = (said(group[name] - group[BASE]) for name in others)
        yield f"| {' | '.join([str(kind), said(group[BASE]).replace('+', ''), *gains])} |"


def _nearer(rows: pd.DataFrame) -> Iterator[str]:
    """The share of pairs of Kronecker methods of which the nearer one predicts better."""
    yield (
        "Pairs of KFAC, EKFAC, TKFAC and TEKFAC on one network. Nearer is a smaller median error "
        "over layers, in sample. Half of the pairs is chance.\n"
    )
    errors = own(rows, "error")[PRODUCTS]
    for value, (title, what, better) in SCORES.items():
        for label, table in (("the weight decay", own(rows, value)),
                             ("the best multiple", best(rows, value, better > 0))):  # fmt: skip
            shares = []
            for unit in errors.index:
                e, v = errors.loc[unit].to_numpy(), better * table.loc[unit, PRODUCTS].to_numpy()
                pairs = [(i, j) for i in range(len(e)) for j in range(i)]
                shares.append(np.mean([(e[i] < e[j]) == (v[i] > v[j]) for i, j in pairs]))
            share, low, high = interval(pd.Series(shares))
            found = "the nearer is better" if low > 0.5 else "the nearer is worse"
            found = "not resolved from chance" if low <= 0.5 <= high else found
            yield (
                f"* {title}, {what}, at {label}: {share:.0%} ({low:.0%} to {high:.0%}) of the "
                f"pairs: {found}"
            )


def picture(rows: pd.DataFrame) -> None:
    """Each method's mean and interval over networks, at the best multiple."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    for ax, (value, (title, what, better)) in zip(
        figure.subplots(1, 3), SCORES.items(), strict=True
    ):
        for table, mark, shift, label in (
            (own(rows, value), "o", -0.12, "at the weight decay"),
            (best(rows, value, better > 0), "s", 0.12, "at the best multiple of other networks"),
        ):
            found = np.array([interval(table[name]) for name in METHODS])
            at = np.arange(len(METHODS)) + shift
            spread = np.abs(found[:, 1:] - found[:, :1]).T
            ax.errorbar(found[:, 0], at, xerr=spread, fmt=mark, ms=4, capsize=2, label=label)
        if title == "Laplace":
            plain = rows[rows["method"] == "map"][value].mean()
            ax.axvline(plain, color="0.4", ls=":", label="without a posterior")
        ax.set_yticks(range(len(METHODS)), METHODS if value == "score" else [""] * len(METHODS))
        ax.invert_yaxis()
        ax.set_title(f"{title}: {what}", fontsize=10)
        ax.set_xlabel("more is better" if better > 0 else "less is better")
    figure.axes[1].legend(fontsize=7)
    figure.savefig(PICTURE, dpi=110)


if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["page"]):
        sys.exit(__doc__)
    if not sys.argv[1:]:
        measure()
    rows = whole.read_table(ROWS)
    PAGE.write_text(page(rows))
    picture(rows)
