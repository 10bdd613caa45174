"""Layers of every kind with the pairs `a`, `g` of each, made apart from FisherLab."""

from functools import cache

import pytest
import torch
from dense import pairs
from references import randn
from torch import nn

from fisherlab.extract import capture, fisher

CE, MSE = nn.CrossEntropyLoss(), nn.MSELoss()
FISHER_TYPES = ("exact", "mc", "empirical")


class Recurrent(nn.Module):
    """One map called three times: three positions."""

    def __init__(self):
        super().__init__()
        self.map, self.head = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        h = x
        for _ in range(3):
            h = torch.tanh(self.map(h)) + x
        return self.head(h)


def dead(layer):
    """A layer whose units never fire."""
    with torch.no_grad():
        layer.bias.fill_(-100.0)
    return layer


def small_image(layer):
    return [nn.Conv2d(1, 2, 1), nn.Sigmoid(), layer, nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)]


# name -> (layers, shape of x, layer, activation it feeds, criterion)
CASES = {
    "linear": (lambda: [nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)], (7, 6), "0", torch.tanh, CE),
    "head": (lambda: [nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)], (9, 6), "2", None, CE),
    "positions": (
        lambda: [nn.Linear(4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(15, 3)],
        (6, 5, 4), "0", torch.relu, CE,
    ),
    "conv": (
        lambda: small_image(nn.Conv2d(2, 3, 2, stride=2, padding=1)),
        (5, 1, 4, 4), "2", torch.tanh, CE,
    ),
    "groups": (
        lambda: small_image(nn.Conv2d(2, 4, 2, groups=2)), (5, 1, 4, 4), "2:1", torch.tanh, MSE,
    ),
    "conv without bias": (
        lambda: small_image(nn.Conv2d(2, 3, 3, bias=False)), (4, 1, 4, 5), "2", torch.tanh, MSE,
    ),
    "without bias": (
        lambda: [nn.Linear(5, 4, bias=False), nn.ELU(), nn.Linear(4, 2)],
        (8, 5), "0", nn.functional.elu, MSE,
    ),
    "fewer examples than inputs": (
        lambda: [nn.Linear(12, 5), nn.Sigmoid(), nn.Linear(5, 2)], (2, 12), "0", torch.sigmoid, CE,
    ),
    "one example": (
        lambda: [nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)], (1, 5), "0", torch.tanh, CE,
    ),
    "one image": (lambda: small_image(nn.Conv2d(2, 3, 2)), (1, 1, 3, 3), "2", torch.tanh, CE),
    "duplicates": (
        lambda: [nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)], (6, 5), "0", torch.tanh, CE,
    ),
    "zero gradients": (
        lambda: [dead(nn.Linear(5, 4)), nn.ReLU(), nn.Linear(4, 3)], (6, 5), "0", torch.relu, CE,
    ),
    "called three times": (Recurrent, (5, 3), "map", torch.tanh, CE),
}  # fmt: skip


@cache
def problem(case):
    """The model, criterion, batch and labels of a case."""
    layers, shape, _, _, criterion = CASES[case]
    torch.manual_seed(0)
    made = layers()
    model = (made if isinstance(made, nn.Module) else nn.Sequential(*made)).double().eval()
    x = randn(*shape)
    if case == "duplicates":
        x[3:] = x[:3]
    outputs = model(x).detach()
    y = torch.arange(len(x)) % outputs.shape[1]
    if criterion is MSE:
        y = randn(*outputs.shape, seed=1)
    return model, criterion, x, y


@cache
def found_and_expected(case, fisher_type):
    """The capture of a case and, apart from it, its pairs; of mc with the same drawn labels."""
    model, criterion, x, y = problem(case)
    name, activation = CASES[case][2:4]
    draws, draw = [], fisher.draw_labels
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fisher, "draw_labels", lambda *a: draws.append(draw(*a)) or draws[-1])
        layers = capture(model, criterion, x, y, fisher_type=fisher_type, mc_samples=2)
    layer, _, group = name.partition(":")
    p = pairs(model, criterion, x, y, layer, fisher_type, draws, int(group or 0), activation)
    return layers[name], p
