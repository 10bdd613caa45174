"""How many numbers a step reads of the device: each read waits for all the work before it."""

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fisherlab as fl

# of six layers: at a step that refreshes all, and at an ordinary one
READS = {
    "kfac": (28, 2),
    "ekfac": (40, 2),
    "tkfac": (22, 2),
    "tekfac": (40, 2),
    "eva": (39, 2),
    "diagonal": (16, 2),
    "sngd": (28, 2),
    "shampoo": (56, 1),
    "fngd": (13, 13),
    "ngd_smw": (13, 13),
    "tengrad": (8, 8),
}


class Numbers(TorchDispatchMode):
    """Counts numbers that are read one by one."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


class Lists(TorchFunctionMode):
    """Counts lists that are read as a whole."""

    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.Tensor.tolist
        return func(*args, **(kwargs or {}))


def reads(name, layers):
    torch.manual_seed(0)
    hidden = [module for _ in range(layers - 1) for module in (nn.Linear(12, 12), nn.Tanh())]
    model = nn.Sequential(*hidden, nn.Linear(12, 4))
    x, y = torch.randn(16, 12), torch.arange(16) % 4
    every = {"schedule": fl.optim.Schedule(statistics=5, basis=5)}
    options = {} if name in ("fngd", "ngd_smw", "tengrad") else every
    optimizer = fl.optim.create(name, model, **options)
    found = []
    for _ in range(8):
        with Numbers() as numbers, Lists() as lists:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        found.append(numbers.count + lists.count)
    return found[5], found[7]


@pytest.mark.parametrize("name", READS)
def test_a_step_reads_few_numbers(name):
    assert reads(name, 6) == READS[name]
