"""The README's picture: a LeNet of MNIST, in sample and on unseen examples.

`python docs/hero.py` makes it anew.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch

import fisherlab as fl

METHODS = {
    "kronecker_optimal": "best Kronecker product",
    "tekfac": "TEKFAC",
    "tkfac": "TKFAC",
    "ekfac": "EKFAC",
    "kfac": "KFAC",
    "eva": "Eva",
    "diagonal": "diagonal",
}
LAYERS = ("convolution 1", "convolution 2", "linear 1", "linear 2", "linear 3")
STEPS, BATCH, UNSEEN = 200, 64, 512
INK, QUIET, UNSEEN_INK = "#1b1f3b", "#9aa0a6", "#c2410c"


def trained() -> tuple[torch.nn.Module, torch.utils.data.TensorDataset]:
    """A LeNet after 200 steps of SGD, and MNIST's test set."""
    data = fl.datasets.load("mnist")
    torch.manual_seed(0)
    model = fl.models.create("lenet", num_classes=10, input_size=data.card.input_shape)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    loader = torch.utils.data.DataLoader(data.train, batch_size=128, shuffle=True)
    for _, (x, y) in zip(range(STEPS), loader, strict=False):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.double().eval(), data.test


def measured() -> pd.DataFrame:
    """Errors of every method in every layer, in sample and against the population."""
    model, test = trained()
    x, y = test[: BATCH + UNSEEN]
    x = x.double()
    table = fl.compare(
        model,
        torch.nn.CrossEntropyLoss(),
        x[:BATCH],
        y[:BATCH],
        approximations=list(METHODS),
        reference=(x[BATCH:], y[BATCH:]),
        dampings=1e-2,
    )
    return table.frame


def drawn(frame: pd.DataFrame) -> plt.Figure:
    """A row per method, a panel per layer; full dots in sample, hollow ones on unseen examples."""
    names = list(dict.fromkeys(frame["layer"]))
    figure, panels = plt.subplots(1, len(names), figsize=(10.5, 3.1), sharey=True, sharex=True)
    for panel, name, title in zip(panels, names, LAYERS, strict=True):
        rows = frame[frame["layer"] == name].set_index("approximation").loc[list(METHODS)]
        for place, (_, row) in enumerate(rows.iterrows()):
            seen, unseen = row["relative_error"], row["population_error"]
            panel.plot([seen, unseen], [place] * 2, color=QUIET, lw=1.2, zorder=1)
            low, high = row["population_error_low"], row["population_error_high"]
            panel.plot([low, high], [place] * 2, color=UNSEEN_INK, lw=4, alpha=0.2, zorder=0)
            panel.scatter(seen, place, s=34, color=INK, zorder=3)
            panel.scatter(unseen, place, s=34, facecolor="white", edgecolor=UNSEEN_INK, zorder=2)
        panel.set_title(title, fontsize=10)
        panel.set_xlim(0, 1.3)
        panel.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
        panel.grid(axis="x", color="#e5e7eb", lw=0.8)
        panel.tick_params(length=0)
        panel.spines[:].set_visible(False)
    panels[0].set_yticks(range(len(METHODS)), METHODS.values())
    panels[0].invert_yaxis()
    figure.supxlabel(r"relative error  $\|X - F\|_F / \|F\|_F$", fontsize=10)
    handles = [
        plt.Line2D([], [], marker="o", ls="", color=INK, label=f"on its own {BATCH} examples"),
        plt.Line2D(
            [],
            [],
            marker="o",
            ls="",
            markerfacecolor="white",
            markeredgecolor=UNSEEN_INK,
            label=f"on unseen examples ({UNSEEN:,}), with a 95 % interval",
        ),
    ]
    figure.legend(handles=handles, ncols=2, loc="upper right", frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 0.93))
    return figure


if __name__ == "__main__":
    frame = measured()
    print(frame.pivot(index="approximation", columns="layer", values="relative_error").round(3))
    print(frame.pivot(index="approximation", columns="layer", values="population_error").round(3))
    drawn(frame).savefig(Path(__file__).parent / "images" / "hero.png", dpi=160)
