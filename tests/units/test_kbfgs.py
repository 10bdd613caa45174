"""K-BFGS where its pairs are short or cancel: the numbers of exact arithmetic, in any precision."""

import math

import pytest
import torch
from torch import Tensor, nn

import fisherlab as fl
from fisherlab.approximations import Means
from fisherlab.approximations.kbfgs import bfgs

MU = math.sqrt(0.3)


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def kept(H: Tensor, s: Tensor, y: Tensor) -> Tensor:
    """BFGS as printed, in float64."""
    left = torch.eye(len(s)).double() - torch.outer(s, y) / (s @ y)
    return left @ H @ left.T + torch.outer(s, s) / (s @ y)


def basis(means, previous=None):
    """The basis of means by the names of their statistics."""
    method = fl.KBFGS()
    named = {S: means[key] for key, S in method.statistics_by_name.items()}
    return method.basis(Means(named.__getitem__, 1, (4, 4)), previous)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("length", [1.0, 1e-9, 1e-16, 1e-21])
@pytest.mark.parametrize("sign", [1, -1])
def test_an_update_does_not_depend_on_the_length_of_the_pair(length, sign, dtype):
    """`s, y -> c s, c y` changes no product: squares of 1e-21 leave float32, quotients do not."""
    A = randn(9, 4, seed=1).T @ randn(9, 4, seed=1) / 9
    a, s, y = randn(4, seed=2), randn(4, seed=3), randn(4, seed=4)
    y = sign * (s @ y).sign() * y
    means = {"A": A, "a": a, "s": s, "y": y, "g": 1e-3 * y, "length": torch.tensor(9.0).double()}
    expected = basis(means)["H_g"]
    scaled = {key: (length * means[key]).to(dtype) for key in ("s", "y", "g", "length")}
    found = basis({**scaled, "A": A.to(dtype), "a": a.to(dtype)})["H_g"]
    assert (expected - torch.eye(4)).norm() > 0.1
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    H = torch.eye(4).double() + A
    y = y if s @ y > 0 else -y
    found = bfgs(H.to(dtype), (length * s).to(dtype), (length * y).to(dtype))
    torch.testing.assert_close(found.double(), kept(H, s, y), rtol=1e-4, atol=1e-4)


def steps(model: nn.Module, x: Tensor, labels: Tensor, count: int):
    """The optimizer after some steps, and the mean outputs of layer "0" around each."""
    criterion = nn.CrossEntropyLoss()
    optimizer = fl.optim.create("kbfgs", model, criterion=criterion)
    means: list[Tensor] = []
    first = model.get_submodule("0")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = criterion(model(x), labels)
        loss.backward()
        means.append(first(x).detach().double().mean(0))
        return loss

    for _ in range(count):
        optimizer.step(closure)
    return optimizer, means


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_mean_gradient_that_cancels_counts_as_zero(dtype):
    """In front of a batch norm it is 0 whatever the weights: `y = 0` is damped to `mu s`.

    Its rounding instead has a direction, which the first damping would turn `s` into.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3))
    x, labels = randn(12, 5, seed=1).to(dtype), torch.arange(12) % 3
    optimizer, (before, after) = steps(model.to(dtype), x, labels, 1)
    s = after - before
    expected = torch.eye(4).double() + (1 / MU - 1) * torch.outer(s, s) / (s @ s)
    found = optimizer.preconditioner.curvature.parts["0"].running.basis["H_g"].double()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_mean_input_that_cancels_counts_as_zero(dtype):
    """Centred inputs without a bias give `H_a` no pair: it stays as it was."""
    x = randn(24, 5, seed=1).to(dtype)
    x = x - x.mean(0)
    held = {"H_a": (torch.eye(5) + x.T @ x).to(dtype), "H_g": torch.eye(4, dtype=dtype)}
    rest = {key: randn(4, seed=k).to(dtype) for k, key in enumerate("syg")}
    means = {"A": x.T @ x / 24, "a": x.mean(0), "length": torch.ones((), dtype=dtype), **rest}
    assert means["a"].norm() > 0
    assert torch.equal(basis(means, held)["H_a"], held["H_a"])


@pytest.mark.parametrize("kind", ["mlp", "resnet20", "transformer"])
def test_steps_in_float32_are_those_in_float64(kind):
    """Keys of attention and convolutions before batch norms have mean gradients of rounding."""
    found = []
    for dtype in (torch.float64, torch.float32):
        torch.manual_seed(0)
        if kind == "transformer":
            model = fl.models.create(kind, num_classes=7, width=0.02, layers=1, heads=2)
            x = torch.randint(0, 7, (4, 6), generator=torch.Generator().manual_seed(1))
            labels = torch.randint(0, 7, (4, 3), generator=torch.Generator().manual_seed(13))
        else:
            options = {"width": 0.125} if kind == "resnet20" else {"hidden": (6,)}
            model = fl.models.create(kind, num_classes=3, input_size=(1, 8, 8), **options)
            x, labels = randn(8, 1, 8, 8, seed=1).to(dtype), torch.arange(8) % 3
        model = model.to(dtype)
        criterion = nn.CrossEntropyLoss()
        optimizer = fl.optim.create("kbfgs", model, criterion=criterion, lr=0.03)
        start = [p.detach().clone() for p in model.parameters()]

        def closure() -> Tensor:
            optimizer.zero_grad()  # noqa: B023
            loss = criterion(model(x), labels)  # noqa: B023
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)
        moves = [(p - q).detach().double() for p, q in zip(model.parameters(), start, strict=True)]
        found.append(torch.cat([move.flatten() for move in moves]))
    exact, single = found
    assert (single - exact).norm() < 1e-3 * exact.norm()
