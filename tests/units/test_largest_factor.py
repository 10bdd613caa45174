"""Kronecker factors larger than `largest_factor` are replaced by their diagonals, and said so."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fisherlab as fl

NAMES = ["kfac", "kfac_reduce", "tkfac", "tkfac_expand", "ekfac", "tekfac", "shampoo"]


def model() -> nn.Module:
    """Two positions in the first layer, one in the second, and nine outputs."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Linear(4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6, 9)
        return nn.Sequential(*layers).double()


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 2, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 9, (5,), generator=generator)


def stepped(net: nn.Module, name: str, largest: int, **options) -> fl.optim.NaturalGradient:
    x, y = batch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = fl.optim.NaturalGradient(
            net,
            fl.approximations.get(name)(),
            lr=0.1,
            damping=0.1,
            largest_factor=largest,
            **options,
        )
    F.cross_entropy(net(x), y).backward()
    optimizer.step()
    return optimizer


def as_diagonal(factor: Tensor, largest: int) -> Tensor:
    return factor.diagonal().diag() if len(factor) > largest else factor


def vectors(factor: Tensor, largest: int) -> Tensor:
    d = len(factor)
    if d > largest:
        return torch.eye(d).double()
    return torch.linalg.eigh(factor).eigenvectors.contiguous()


@pytest.mark.parametrize("largest", [0, 4, 8])
@pytest.mark.parametrize("name", NAMES)
def test_blocks_are_those_of_the_diagonals(name: str, largest: int) -> None:
    """8: the last layer's outputs; 4: its inputs too, and the first layer's; 0: everything."""
    net = model()
    layers = fl.capture(net, nn.CrossEntropyLoss(), *batch(), fisher_type="empirical")
    found = stepped(net, name, largest).blocks()
    for layer in layers:
        factors = {"ekfac": "kfac", "tekfac": "tkfac"}.get(name, name)
        whole = fl.approximations.get(factors)()(layers[layer])
        if name in ("ekfac", "tekfac"):
            Q = torch.kron(vectors(whole.G, largest), vectors(whole.A, largest))
            exact = fl.Exact()(layers[layer]).dense()
            expected = Q @ (Q.mT @ exact @ Q).diagonal().diag() @ Q.mT
        elif name == "shampoo":
            L, R = (as_diagonal(side, largest) for side in whole.moments)
            expected = torch.kron(root(L), root(R))
        else:
            expected = torch.kron(as_diagonal(whole.G, largest), as_diagonal(whole.A, largest))
        error = (found[layer].dense() - expected).norm() / expected.norm()
        assert error < 1e-7, (layer, error)


def root(S: Tensor) -> Tensor:
    values, Q = torch.linalg.eigh(S)
    return Q * values.clamp(min=0).sqrt() @ Q.mT


@pytest.mark.parametrize("placement", ["tikhonov", "factored", "factorwise"])
def test_the_step_is_the_damped_inverse(placement: str) -> None:
    net = model()
    before = copy.deepcopy(net)
    gradient = stepped_gradient(before)
    approximation = fl.KFAC(placement=placement)
    with pytest.warns(UserWarning, match=r"largest_factor=8 .* '3': output side \(9\)$"):
        optimizer = fl.optim.NaturalGradient(
            net, approximation, lr=0.1, damping=0.1, largest_factor=8
        )
    x, y = batch()
    F.cross_entropy(net(x), y).backward()
    optimizer.step()
    moved = torch.cat(
        [net[3].weight - before[3].weight, (net[3].bias - before[3].bias)[:, None]], 1
    )
    X = optimizer.blocks()["3"]
    G, A = X.G, X.A
    assert torch.equal(G, G.diagonal().diag())
    eyes = torch.eye(9).double(), torch.eye(7).double()
    if placement == "tikhonov":
        inverse = torch.linalg.inv(torch.kron(G, A) + 0.1 * torch.eye(63).double())
    else:
        pi = ((A.trace() / 7) / (G.trace() / 9)).sqrt()
        left, right = (0.1, 0.1) if placement == "factorwise" else (0.1**0.5 / pi, 0.1**0.5 * pi)
        pair = G + left * eyes[0], A + right * eyes[1]
        inverse = torch.kron(*(torch.linalg.inv(side) for side in pair))
    expected = -0.1 * (inverse @ gradient.flatten()).view(9, 7)
    assert (moved - expected).norm() < 1e-9 * expected.norm()


def stepped_gradient(net: nn.Module) -> Tensor:
    x, y = batch()
    F.cross_entropy(net(x), y).backward()
    return torch.cat([net[3].weight.grad, net[3].bias.grad[:, None]], 1)


@pytest.mark.parametrize("name", [*NAMES, "sngd"])
def test_no_matrix_of_that_size_is_kept_and_a_run_resumes(name: str) -> None:
    once, twice = model(), model()
    options = {"statistics_every": 1, "basis_every": 2}
    one, two = (stepped(net, name, 5, **options) for net in (once, twice))
    state, parts = two.state_dict(), two.preconditioner.curvature.parts.values()
    sides = {len(t) for part in parts for t in part.running.sums.values() if t.ndim == 2}
    assert max(sides, default=0) <= 5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        two = fl.optim.NaturalGradient(
            twice, fl.approximations.get(name)(), lr=0.1, damping=0.1, largest_factor=5, **options
        )
    two.load_state_dict(state)
    x, y = batch()
    for _ in range(3):
        for net, optimizer in ((once, one), (twice, two)):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
    for p, q in zip(once.parameters(), twice.parameters(), strict=True):
        assert torch.equal(p, q)


def test_summary_and_support_name_the_sides() -> None:
    optimizer = stepped(model(), "kfac", 5)
    table = optimizer.summary().set_index("layer")["diagonal_factors"]
    assert table.to_dict() == {"0": "", "3": "output side (9), input side (7)"}
    frame = fl.support(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 9000)), torch.ones(1, 3))
    assert list(frame["diagonal_factors"]) == ["", "output side (9000)"]


def test_shampoo_of_the_mean_gradient() -> None:
    net = model()
    with pytest.warns(UserWarning, match="output side"):
        optimizer = fl.optim.create("shampoo", net, largest_factor=8)
    D = stepped_gradient(net)
    optimizer.step()
    block = optimizer.blocks()["3"]
    assert torch.allclose(block.G, D.square().sum(1).sqrt().diag())


def test_a_negative_size_is_refused() -> None:
    message = r"largest_factor, which counts rows, must be a whole number >= 0, got -1 \(int\)"
    with pytest.raises(ValueError, match=message):
        fl.optim.create("kfac", model(), largest_factor=-1)
