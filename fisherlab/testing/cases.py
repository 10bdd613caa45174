"""The layers that a law is tried on: small models whose first layer is captured."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from fisherlab.extract import LayerCapture, capture


class ClassesFirst(nn.Module):
    """Class scores of a sequence, as the cross entropy takes them: classes before positions."""

    def forward(self, x: Tensor) -> Tensor:
        """`[n, t, c]` to `[n, c, t]`."""
        return x.transpose(1, 2)


# first layer, shape of an example, examples
FIRST: dict[str, tuple[type[nn.Module], dict[str, int], tuple[int, ...], int]] = {
    "full": (nn.Linear, {"in_features": 4, "out_features": 3}, (4,), 24),
    "thin": (nn.Linear, {"in_features": 12, "out_features": 14}, (12,), 3),
    "positions": (nn.Linear, {"in_features": 5, "out_features": 4}, (3, 5), 9),
    "thin positions": (nn.Linear, {"in_features": 13, "out_features": 18}, (2, 13), 2),
    "conv": (
        nn.Conv2d,
        {"in_channels": 2, "out_channels": 3, "kernel_size": 3, "padding": 1},
        (2, 4, 4),
        7,
    ),
    "thin conv": (
        nn.Conv2d,
        {"in_channels": 2, "out_channels": 36, "kernel_size": 3},
        (2, 3, 4),
        4,
    ),
    "groups": (
        nn.Conv2d,
        {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "groups": 2},
        (4, 4, 4),
        5,
    ),
    "padded": (nn.Linear, {"in_features": 5, "out_features": 3}, (4, 5), 6),
    "no bias": (nn.Linear, {"in_features": 5, "out_features": 3, "bias": 0}, (5,), 8),
}
CLASSES = 3


@dataclass(frozen=True)
class Problem:
    """A model whose first layer, called "0", is of one kind; a batch, and its loss."""

    kind: str
    model: nn.Sequential
    criterion: nn.Module
    x: Tensor
    y: Tensor

    @property
    def label(self) -> str:
        """The kind and the precision, for messages."""
        return f"{self.kind}, {str(self.x.dtype).removeprefix('torch.')}"

    def captured(self, part: slice = slice(None), layer: str = "0") -> LayerCapture:
        """The exact Fisher block's columns of one layer, of a part of the batch."""
        found = capture(self.model, self.criterion, self.x[part].clone(), self.y[part])
        # for a grouped convolution, the first group
        return next(x for key, x in found.items() if key.split(":")[0].split(" ")[0] == layer)


@cache
def problem(kind: str, dtype: torch.dtype = torch.float64) -> Problem:
    """The problem of a kind in `FIRST`; "thin": the batch spans less than inputs and outputs."""
    make, options, shape, n = FIRST[kind]
    first = make(**options)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(n, *shape, generator=generator, dtype=torch.float64).to(dtype)
    if kind == "padded":
        model = nn.Sequential(first, nn.Tanh(), nn.Linear(3, CLASSES), ClassesFirst())
        y = torch.randint(CLASSES, (n, 4), generator=generator)
        # labels that the loss ignores: positions that no sum may count
        y[0, 2:] = y[3, 1:] = -100
    else:
        size = first(x[:1].to(torch.float32)).numel()
        model = nn.Sequential(first, nn.Tanh(), nn.Flatten(), nn.Linear(size, CLASSES))
        y = torch.randint(CLASSES, (n,), generator=generator)
    model.to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.rand(p.shape, generator=generator, dtype=torch.float64) - 0.5)
    return Problem(kind, model, nn.CrossEntropyLoss(), x, y)


@cache
def _captured(kind: str, dtype: torch.dtype) -> LayerCapture:
    return problem(kind, dtype).captured()


def captured(kind: str, dtype: torch.dtype = torch.float64) -> LayerCapture:
    """The capture of a problem's whole batch; a copy, which what is tested may change."""
    return _captured(kind, dtype).map(torch.clone)
