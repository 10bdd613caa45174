"""Laws of every registered approximation, so that a new file is tested by being there."""

import pytest
import torch
from torch import nn

import fisherlab as fl

NAMES = [n for n in fl.approximations.names() if "pair" not in fl.approximations.get(n)().needs]
ADDITIVE = [name for name in NAMES if fl.approximations.get(name)().additive]
DAMPING = 0.1
# The best sum of Kronecker products has negative eigenvalues; its powers leave them out.
INDEFINITE = {"kronecker_sum"}


def layers(*parts, kind="linear"):
    """Captures of parts of one batch of 12, of a layer that is the first of two."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(12, 2, 4, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (12,), generator=generator)
    first = nn.Conv2d(2, 3, 3, padding=1) if kind == "conv" else nn.Linear(4, 3)
    size = 48 if kind == "conv" else 24
    model = nn.Sequential(first, nn.Sigmoid(), nn.Flatten(), nn.Linear(size, 3)).double()
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return [fl.capture(model, nn.CrossEntropyLoss(), x[p], y[p])["0"] for p in parts]


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("name", NAMES)
def test_a_block_is_symmetric_and_positive(name, kind):
    (layer,) = layers(slice(None), kind=kind)
    block = fl.approximations.get(name)()(layer)
    dense = block.dense()
    assert block.shape == layer.shape and dense.dtype == torch.float64
    assert torch.equal(dense, dense.mT) or (dense - dense.mT).norm() < 1e-12 * dense.norm()
    values = torch.linalg.eigvalsh(dense)
    assert values[-1] > 0
    assert name in INDEFINITE or values[0] > -1e-10 * values[-1]


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("name", NAMES)
def test_what_it_preconditions_with_is_symmetric_and_positive(name, kind):
    (layer,) = layers(slice(None), kind=kind)
    approximation = fl.approximations.get(name)()
    dense = approximation.damped(approximation(layer), DAMPING).dense()
    assert (dense - dense.mT).norm() < 1e-10 * dense.norm()
    assert torch.linalg.eigvalsh(dense)[0] > 0


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("name", ADDITIVE)
def test_parts_of_a_batch_are_the_batch(name, kind):
    approximation = fl.approximations.get(name)()
    (whole,) = layers(slice(None), kind=kind)
    parts = layers(slice(0, 5), slice(5, 6), slice(6, 12), kind=kind)
    one, other = approximation(whole).dense(), approximation(*parts).dense()
    assert (one - other).norm() < 1e-12 * one.norm()


@pytest.mark.parametrize("name", NAMES)
def test_equal_ones_are_equal_and_share_work(name):
    kind = fl.approximations.get(name)
    assert kind() == kind() and hash(kind()) == hash(kind())
    assert kind.name == name and kind.__doc__
