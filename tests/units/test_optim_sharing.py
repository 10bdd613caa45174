"""FNGD's shared coefficients and SNGD's reconstructed network."""

import copy

import pytest
import torch
import torch.nn.functional as F
from optim_references import columns, gradient, pairs, perceptron
from torch import Tensor, nn

import fisherlab as fl
from fisherlab.optim.roots import by_eigh, denman_beavers, newton_schulz, nystroem


def batches(count: int, n: int = 12) -> list[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(3 * n, 6, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 4, (3 * n,), generator=generator)
    parts = [torch.randperm(3 * n, generator=generator)[:n] for _ in range(count)]
    return [(x[part], y[part], part) for part in parts]


def step(model: nn.Module, optimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def coefficients(a: Tensor, g: Tensor, alpha: float) -> Tensor:
    """`M v`, `v = lambda (M lambda I + K)^{-1} 1`.      FNGD (9), (14)."""
    U = columns(a, g)
    K, M = U.T @ U, len(a)
    damping = alpha * K.norm()
    matrix = M * damping * torch.eye(M, dtype=torch.float64) + K
    return M * damping * torch.linalg.solve(matrix, torch.ones(M, dtype=torch.float64))


@pytest.mark.parametrize("share", ["position", "example"])
def test_second_phase_weighs_with_the_mean_of_the_first(share: str) -> None:
    model = perceptron(6, 5, 4)
    optimizer = fl.optim.create(
        "fngd", model, share=share, coefficient_steps=4, lr=0.1, momentum=0.0, alpha=1e-3
    )
    sums, counts = [torch.zeros(36).double() for _ in range(2)], torch.zeros(36)
    data = batches(6)
    for x, y, part in data[:4]:
        slots = part if share == "example" else torch.arange(12)
        for total, (a, g) in zip(sums, pairs(model, x, y), strict=True):
            total[slots] += coefficients(a, g, 1e-3)
        counts[slots] += 1
        optimizer.set_batch(part)
        step(model, optimizer, x, y)
    for size in (12, 7):
        x, y, part = (t[:size] for t in data[4])
        slots = part if share == "example" else torch.arange(size)
        expected = []
        for total, (a, g) in zip(sums, pairs(model, x, y), strict=True):
            mean = total / counts.clamp(min=1)
            mean[counts == 0] = mean[counts > 0].mean()
            expected.append(gradient(a, g * mean[slots, None]))
        optimizer.set_batch(part)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        for layer, matrix in zip(model[::2], expected, strict=True):
            torch.testing.assert_close(layer.weight.grad, matrix[:, :-1])
            torch.testing.assert_close(layer.bias.grad, matrix[:, -1])
        optimizer.step()
    table = optimizer.summary()
    means = [optimizer.coefficients()[name].mean().item() for name in ("0", "2")]
    assert table["factor"].tolist() == pytest.approx(means)


def test_only_the_layer_s_own_gradient_is_weighted() -> None:
    model, plain = perceptron(6, 5, 4), perceptron(6, 5, 4)
    optimizer = fl.optim.create("tengrad", model)
    gradients = []
    for one in (model, plain):
        x = batches(1)[0][0].clone().requires_grad_()
        F.cross_entropy(one(x), batches(1)[0][1]).backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)
    assert not torch.allclose(model[0].weight.grad, plain[0].weight.grad)
    optimizer.remove()


def test_a_flat_run_says_once_that_it_is_sgd() -> None:
    model = perceptron(6, 5, 4)
    optimizer = fl.optim.create("fngd", model, coefficient_steps=2, alpha=10.0)
    x, y, _ = batches(1)[0]
    step(model, optimizer, x, y)
    with pytest.warns(UserWarning, match="this is SGD with a per-layer factor"):
        step(model, optimizer, x, y)
    step(model, optimizer, x, y)


def matrix(condition: float) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(9, 9, generator=generator, dtype=torch.float64)).Q
    return Q * torch.logspace(0, -torch.log10(torch.tensor(condition)), 9).double() * 7 @ Q.T


@pytest.mark.parametrize("condition", [10.0, 1e4])
@pytest.mark.parametrize("method", [newton_schulz, denman_beavers, by_eigh])
def test_roots(method, condition: float) -> None:
    S = matrix(condition)
    roots = method(S)
    torch.testing.assert_close(roots.root @ roots.root, S, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(roots.root @ roots.inverse, torch.eye(9).double(), atol=1e-6, rtol=0)


def test_newton_schulz_without_scaling_fails_above_three() -> None:
    """SNGD (15) as printed."""
    S = matrix(10.0)
    unscaled = newton_schulz(S, scale=False)
    assert not torch.allclose(unscaled.root @ unscaled.root, S, rtol=1e-3)


def test_nystroem_is_exact_on_a_low_rank_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    thin = torch.randn(9, 3, generator=generator, dtype=torch.float64)
    S = thin @ thin.T + 0.1 * torch.eye(9).double()
    roots = nystroem(S, 3, 0.1)
    torch.testing.assert_close(roots.root @ roots.root, S)
    torch.testing.assert_close(roots.root @ roots.inverse, torch.eye(9).double())


def conv_net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(27, 4)
        ).double()


@pytest.mark.parametrize("method", ["newton_schulz", "denman_beavers", "eigh", "nystroem"])
def test_reconstruct_refresh_restore_keep_the_function(method: str) -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(8, 1, 3, 3, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 4, (8,), generator=generator)
    model = conv_net()
    keys, before = list(model.state_dict()), model(x).detach()
    parameters = [id(p) for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    fl.optim.reconstruct(model, optimizer=optimizer, every=3, method=method, decay=0.9)
    torch.testing.assert_close(model(x), before)
    assert sorted(id(p) for p in model.parameters()) == sorted(parameters)
    for _ in range(2):
        step(model, optimizer, x, y)
    outputs = model(x).detach()
    fl.optim.refresh(model, optimizer)
    torch.testing.assert_close(model(x).detach(), outputs, rtol=1e-6, atol=1e-7)
    for _ in range(4):
        step(model, optimizer, x, y)
    model.eval()
    outputs = model(x).detach()
    fl.optim.restore(model)
    assert sorted(model.state_dict()) == sorted(keys)
    torch.testing.assert_close(model(x).detach(), outputs, rtol=1e-8, atol=1e-9)
    assert not any(m._forward_hooks for m in model.modules())


def test_a_refresh_carries_the_velocity_of_the_weights() -> None:
    """With the gradient at zero, W moves on as if there had been no refresh."""
    x, y, _ = batches(1)[0]
    moves = []
    for refreshed in (False, True):
        model = perceptron(6, 5, 4)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        fl.optim.reconstruct(model, decay=0.5, method="eigh")
        model(x)
        fl.optim.refresh(model, optimizer)
        step(model, optimizer, x, y)
        if refreshed:
            fl.optim.refresh(model, optimizer)
        before = model[0].weight.detach().clone()
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        moves.append(model[0].weight.detach() - before)
    torch.testing.assert_close(moves[0], moves[1], rtol=1e-8, atol=1e-12)
    assert moves[0].norm() > 1e-6


def test_trace_rule_scales_the_fully_connected_layers() -> None:
    """TEKFAC (3.4), (3.5): beta is the largest lambda of the convolutions."""
    from fisherlab.approximations.damping import trace

    model, twin = conv_net(), conv_net()
    rule = trace(1e-2, {"0"}, constant=1e-2)
    optimizer = fl.optim.NaturalGradient(model, fl.TEKFAC(), lr=0.1, damping=rule, momentum=0.0)
    x = torch.randn(8, 1, 3, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    y = torch.arange(8) % 4
    before = copy.deepcopy(model[3].weight.detach())
    F.cross_entropy(twin(x), y).backward()
    step(model, optimizer, x, y)
    blocks = optimizer.blocks()
    beta = max(blocks["0"].trace().item(), 1e-2) / blocks["0"].size
    assert optimizer.preconditioner.curvature.dampings["0"] == pytest.approx(beta)
    V = torch.cat([twin[3].weight.grad, twin[3].bias.grad[:, None]], 1)
    expected = 0.1 * blocks["3"].solve(V, 1e-2)[:, :-1] / beta
    torch.testing.assert_close(before - model[3].weight.detach(), expected)


def two_branches() -> nn.Module:
    """Two convolutions of unlike scale and two fully-connected layers."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        layers = [nn.Conv2d(1, 4, 2), nn.ReLU(), nn.Conv2d(4, 4, 2, groups=2), nn.Flatten()]
        return nn.Sequential(*layers, nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4)).double()


def in_groups(model: nn.Module, split: list[list[int]]) -> list[dict]:
    return [{"params": [p for k in part for p in model[k].parameters()]} for part in split]


@pytest.mark.parametrize("fc_expansion", [True, False])
@pytest.mark.parametrize("split", [[[0, 2, 4, 6]], [[0, 2], [4, 6]], [[6, 0], [4], [2]]])
def test_beta_is_the_largest_lambda_of_any_group_s_convolutions(
    split: list[list[int]], fc_expansion: bool
) -> None:
    from fisherlab.approximations.damping import trace

    model, twin = two_branches(), two_branches()
    rule = trace(1e3, {"0", "2"}, constant=0.02, fc_expansion=fc_expansion)
    optimizer = fl.optim.NaturalGradient(
        model, fl.Exact(), params=in_groups(model, split), lr=0.1, damping=rule, momentum=0.0,
        statistics_every=1, basis_every=1,
    )  # fmt: skip
    x = 5 * torch.randn(8, 1, 3, 3, generator=torch.Generator().manual_seed(2)).double()
    y = torch.arange(8) % 4
    before = copy.deepcopy(model.state_dict())
    step(model, optimizer, x, y)
    rows: dict[str, list[Tensor]] = {"0": [], "2": [], "4": [], "6": []}
    for k in range(8):
        twin.zero_grad()
        F.cross_entropy(twin(x[k : k + 1]), y[k : k + 1]).backward()
        for name, found in rows.items():
            layer = twin[int(name)]
            found.append(torch.cat([layer.weight.grad.flatten(1), layer.bias.grad[:, None]], 1))
    D = {name: torch.stack(found) for name, found in rows.items()}
    # the trace of each convolution's block is below vartheta = 1000
    lambdas = {n: 1e3 / D[n][0].numel() for n in ("0", "2")}
    assert all(D[n].square().sum() / 8 < 1e3 for n in lambdas)
    beta = max(lambdas.values()) if fc_expansion else 1.0
    table = optimizer.summary().set_index("layer")
    for name in ("4", "6"):
        U = D[name].flatten(1)
        block = beta * (U.T @ U / 8 + 0.02 * torch.eye(U.shape[1]).double())
        expected = 0.1 * torch.linalg.solve(block, U.mean(0)).view_as(D[name][0])
        moved = torch.cat(
            [before[f"{name}.weight"] - model[int(name)].weight.detach(),
             (before[f"{name}.bias"] - model[int(name)].bias.detach())[:, None]], 1,
        )  # fmt: skip
        assert (moved - expected).norm() < 1e-9 * expected.norm()
        assert table.loc[name, "beta"] == pytest.approx(beta)
    assert table.loc["0", "beta"] == table.loc["2", "beta"] == 1.0


@pytest.mark.parametrize("name", ["ngd", "blockwise_ngd", "tengrad"])
def test_methods_without_beta_refuse_a_rule_that_has_one(name: str) -> None:
    from fisherlab.approximations.damping import trace

    with pytest.raises(ValueError, match=r"by beta, which (NGD|TENGraD) does not.*fc_expansion"):
        fl.optim.create(name, conv_net(), damping=trace(1e-2, {"0"}))
    model = conv_net()
    rule = trace(1e-2, {"0"}, fc_expansion=False)
    optimizer = fl.optim.create(name, model, damping=rule)
    step(model, optimizer, torch.ones(4, 1, 3, 3).double(), torch.arange(4))
