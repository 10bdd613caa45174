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
# Roots of second moments.
ROOTS = {"shampoo"}
KINDS = ["linear", "conv", "thin linear", "thin conv"]


def problem(kind):
    """A model of two layers, a batch of 12 and the Fisher type.

    The batch spans clearly less than the inputs and the outputs of a thin first layer.
    """
    generator = torch.Generator().manual_seed(0)
    first, size, channels, image = {
        "linear": (nn.Linear(4, 3), 24, 2, (4, 4)),
        "conv": (nn.Conv2d(2, 3, 3, padding=1), 48, 2, (4, 4)),
        "thin linear": (nn.Linear(20, 56), 56, 1, (1, 20)),
        "thin conv": (nn.Conv2d(4, 36, 3), 72, 4, (3, 4)),
    }[kind]
    x = torch.rand(12, channels, *image, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (12,), generator=generator)
    model = nn.Sequential(first, nn.Sigmoid(), nn.Flatten(), nn.Linear(size, 3)).double()
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model, x, y, "empirical" if kind == "thin conv" else "exact"


def layers(*parts, kind="linear"):
    """Captures of parts of the batch, of the first layer."""
    model, x, y, which = problem(kind)
    criterion = nn.CrossEntropyLoss()
    found = [fl.capture(model, criterion, x[p], y[p], fisher_type=which)["0"] for p in parts]
    assert all(layer.few_inputs and layer.few_gradients for layer in found) == ("thin" in kind)
    return found


@pytest.mark.parametrize("kind", KINDS)
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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_what_it_preconditions_with_is_symmetric_and_positive(name, kind):
    (layer,) = layers(slice(None), kind=kind)
    approximation = fl.approximations.get(name)()
    dense = approximation.damped(approximation(layer), DAMPING).dense()
    assert (dense - dense.mT).norm() < 1e-10 * dense.norm()
    assert torch.linalg.eigvalsh(dense)[0] > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ADDITIVE)
def test_parts_of_a_batch_are_the_batch(name, kind):
    approximation = fl.approximations.get(name)()
    (whole,) = layers(slice(None), kind=kind)
    parts = layers(slice(0, 5), slice(5, 6), slice(6, 12), kind=kind)
    one, other = approximation(whole).dense(), approximation(*parts).dense()
    # a root divides the rounding of an eigenvalue by twice its own root
    bound = 1e-10 if name in ROOTS else 1e-12
    assert (one - other).norm() < bound * one.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_a_comparison_measures_the_dense_blocks(kind):
    model, x, y, which = problem(kind)
    (layer,) = layers(slice(None), kind=kind)
    F = fl.Exact()(layer).dense()
    rows = fl.compare(
        model,
        nn.CrossEntropyLoss(),
        x,
        y,
        fisher_type=which,
        layers=["0"],
        approximations=NAMES,
        dampings=[DAMPING],
    ).frame.set_index("approximation")
    for name in NAMES:
        X = fl.approximations.get(name)()(layer).dense()
        row, error = rows.loc[name], (X - F).norm() / F.norm()
        assert abs(row.relative_error - error) < 1e-7 * (1 + error), name
        assert abs(row.trace_ratio - X.trace() / F.trace()) < 1e-9, name


@pytest.mark.parametrize("name", NAMES)
def test_equal_ones_are_equal_and_share_work(name):
    kind = fl.approximations.get(name)
    assert kind() == kind() and hash(kind()) == hash(kind())
    assert kind.name == name and kind.__doc__
