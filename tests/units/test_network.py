"""Matrices over all layers: against dense float64 matrices of the whole network."""

from itertools import pairwise

import pytest
import torch
from references import randn, relative
from torch import Tensor, nn

import fisherlab as fl
from fisherlab.blocks import BlockError
from fisherlab.network import NetworkFisher, NetworkHessian, Tridiagonal

CE, MSE = nn.CrossEntropyLoss(), nn.MSELoss()


def net(*sizes: int, seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = []
        for inputs, outputs in pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), nn.Tanh()]
        return nn.Sequential(*layers[:-1]).double()


def captures(model: nn.Module, n: int, **options):
    width = model[0].in_features
    x, y = randn(n, width), torch.arange(n) % 3
    return fl.capture(model, CE, x, y, **options), x, y


def whole(layers) -> Tensor:
    """`U` `[N, R]` of all layers, column by column."""
    found = []
    for layer in layers.values():
        a, g = layer.inputs, layer.output_gradients
        D = [g[m, k].T @ a[k] for m in range(len(g)) for k in range(len(a))]
        found.append(torch.stack(D).flatten(1).T)
    return torch.cat(found)


@pytest.mark.parametrize("n", [4, 60])
def test_the_whole_fisher_is_the_dense_one(n):
    layers, *_ = captures(net(4, 3, 3), n)
    F, U = NetworkFisher(layers), whole(layers)
    dense = U @ U.T / n
    assert relative(F.dense(), dense) < 1e-12
    values = torch.linalg.eigvalsh(dense).flip(0)
    assert relative(F.eigenvalues(), values[: len(F.eigenvalues())]) < 1e-12
    assert len(F.eigenvalues()) == min(3 * n, F.size) and F.size == 27
    assert float(F.trace()) == pytest.approx(float(dense.trace()), rel=1e-12)
    assert float(F.squared_norm()) == pytest.approx(float(dense.square().sum()), rel=1e-12)
    V = F.split(randn(F.size, seed=1))
    damped = dense + 0.1 * torch.eye(F.size).double()
    assert relative(F.flat(F.solve(V, 0.1)), torch.linalg.solve(damped, F.flat(V))) < 1e-10
    top, vectors = F.leading(3)
    for value, vector in zip(top, vectors, strict=True):
        v = F.flat(vector)
        assert float(v.norm()) == pytest.approx(1, abs=1e-10)
        assert relative(dense @ v, value * v) < 1e-9
    by_scipy, _ = fl.network.base.NetworkMatrix.leading(F, 3)
    assert relative(by_scipy, values[:3]) < 1e-10
    grid = torch.linspace(-0.05, float(values[0]), 40).double()
    found = fl.metrics.spectral_density(F, grid, 0.02)
    expected = torch.distributions.Normal(values, 0.02).log_prob(grid[:, None]).exp().mean(1)
    assert relative(found, expected) < 1e-10


def test_the_layerwise_oracle_is_between_an_approximation_and_the_whole():
    layers, *_ = captures(net(4, 3, 3), 40)
    F, damping = NetworkFisher(layers), 0.01
    gradient = {name: layer.gradient for name, layer in layers.items()}
    steps = {"whole": F.solve(gradient, damping), "gradient": gradient}
    for name, method in {"oracle": fl.Exact(), "KFAC": fl.KFAC()}.items():
        steps[name] = {
            key: method(layer).solve(gradient[key], damping) for key, layer in layers.items()
        }
    found = {name: float(F.attained(step, gradient, damping)) for name, step in steps.items()}
    U, g = whole(layers), F.flat(gradient)
    damped = U @ U.T / 40 + damping * torch.eye(27).double()
    for name, step in steps.items():
        d = F.flat(step)
        length = (g @ d) / (d @ damped @ d)
        model = length * (g @ d) - length**2 * (d @ damped @ d) / 2
        best = g @ torch.linalg.solve(damped, g) / 2
        assert found[name] == pytest.approx(float(model / best), rel=1e-9)
    assert found["gradient"] < found["KFAC"] < found["oracle"] < found["whole"]
    assert found["whole"] == pytest.approx(1, abs=1e-12)
    assert float(F.attained({k: 0 * v for k, v in gradient.items()}, gradient, damping)) == 0


def test_the_whole_fisher_of_one_layer_is_its_block():
    layers, *_ = captures(net(4, 3), 9)
    F, block = NetworkFisher(layers), fl.Exact()(layers["0"])
    assert relative(F.dense(), block.dense()) < 1e-12
    grid = torch.linspace(0, 1, 9).double()
    one, two = (fl.metrics.spectral_density(X, grid, 0.05) for X in (F, block))
    assert relative(one, two) < 1e-10


def test_the_whole_hessian_is_torchs():
    """By autograd, and by central differences: torch 2.13's `func.hessian` errs at a LayerNorm."""
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = randn(7, 3), randn(7, 2, seed=1)
    names, leaves = zip(*model.named_parameters(), strict=True)
    flat = nn.utils.parameters_to_vector(leaves).detach().clone()

    def gradient(vector: Tensor, graph: bool = False) -> Tensor:
        nn.utils.vector_to_parameters(vector.clone(), leaves)
        found = torch.autograd.grad(MSE(model(x), y), leaves, create_graph=graph)
        return torch.cat([g.flatten() for g in found])

    steps = 1e-5 * torch.eye(len(flat)).double()
    differences = [(gradient(flat + e) - gradient(flat - e)) / 2e-5 for e in steps]
    rows = [torch.autograd.grad(g, leaves, retain_graph=True) for g in gradient(flat, graph=True)]
    dense = torch.stack([torch.cat([h.flatten() for h in row]) for row in rows])
    assert relative(dense, torch.stack(differences)) < 1e-7
    for criterion, scale in ((MSE, 1.0), (nn.MSELoss(reduction="sum"), 2.0)):
        # the sum runs over both outputs, the mean of the l_n over examples alone
        H = NetworkHessian(model, criterion, x, y)
        assert relative(H.dense(), scale * dense) < 1e-9
    H, exact = NetworkHessian(model, MSE, x, y), torch.linalg.eigvalsh(dense)
    assert relative(H.leading(3)[0], exact.flip(0)[:3]) < 1e-8
    values, vectors = H.leading(2, "SA")
    assert relative(values, exact[:2].flip(0)) < 1e-8
    v = H.flat(vectors[1])
    assert relative(dense @ v, exact[0] * v) < 1e-6
    assert tuple(H.shapes) == names and all(p.grad is None for p in model.parameters())


def damped_kfac(layers, damping: float) -> tuple[list, dict]:
    """Blocks `F_kl` of all pairs; the factors of the diagonal ones damped."""
    every = list(layers.values())
    a = [layer.inputs[:, 0] for layer in every]
    g = [layer.output_gradients[:, :, 0].flatten(0, 1) for layer in every]
    M, blocks = len(a[0]), {}
    for k in range(len(every)):
        for other in range(len(every)):
            A, G = a[k].T @ a[other] / M, g[k].T @ g[other] / M
            if k == other:
                pi = float((A.trace() / len(A) / (G.trace() / len(G))) ** 0.5)
                A = A + pi * damping**0.5 * torch.eye(len(A)).double()
                G = G + damping**0.5 / pi * torch.eye(len(G)).double()
            blocks[k, other] = torch.kron(G, A)
    return every, blocks


def test_block_tridiagonal_kfac_is_the_papers():
    layers, *_ = captures(net(4, 3, 5, 3), 30)
    every, F = damped_kfac(layers, 0.05)
    X, L = Tridiagonal(layers, 0.05), len(every)
    sizes = [len(F[k, k]) for k in range(L)]
    Xi, Lambda = torch.eye(sum(sizes)).double(), []
    starts = [sum(sizes[:k]) for k in range(L)]
    for k in range(L):
        S = F[k, k]
        if k < L - 1:
            P = F[k, k + 1] @ torch.linalg.inv(F[k + 1, k + 1])
            at, after = (slice(starts[j], starts[j] + sizes[j]) for j in (k, k + 1))
            Xi[at, after] = -P
            S = S - P @ F[k + 1, k + 1] @ P.T
        Lambda.append(torch.linalg.inv(S))
    inverse = Xi.T @ torch.block_diag(*Lambda) @ Xi
    V = X.split(randn(X.size, seed=2))
    assert relative(X.flat(X.solve(V)), inverse @ X.flat(V)) < 1e-9
    dense = torch.linalg.inv(inverse)
    assert relative(X.dense(), dense) < 1e-9
    for k in range(L):
        at = slice(starts[k], starts[k] + sizes[k])
        assert relative(dense[at, at], F[k, k]) < 1e-9
        if k < L - 1:
            after = slice(starts[k + 1], starts[k + 1] + sizes[k + 1])
            assert relative(dense[at, after], F[k, k + 1]) < 1e-9
    assert float(inverse[: sizes[0], -sizes[-1] :].abs().max()) == 0
    assert float(torch.linalg.eigvalsh(dense)[0]) > 0


def test_block_tridiagonal_kfac_of_two_layers_has_every_block():
    """Two layers have no pair that is left out."""
    layers, *_ = captures(net(4, 3, 3), 30)
    _, F = damped_kfac(layers, 0.1)
    rows = [torch.cat([F[k, other] for other in range(2)], 1) for k in range(2)]
    assert relative(Tridiagonal(layers, 0.1).dense(), torch.cat(rows)) < 1e-10


def test_what_a_matrix_of_a_network_refuses():
    layers, x, y = captures(net(4, 3, 3), 6)
    F = NetworkFisher(layers)
    with pytest.raises(BlockError, match="dict of layer -> weight"):
        F @ torch.ones(3)
    with pytest.raises(BlockError, match=r"V has the layers \['0'\]"):
        F @ {"0": torch.ones(3, 5).double()}
    with pytest.raises(BlockError, match=r"V\['2'\] must have the shape \(3, 4\)"):
        F @ {"0": torch.ones(3, 5).double(), "2": torch.ones(3, 5).double()}
    with pytest.raises(BlockError, match="needs damping > 0"):
        F.solve(F.split(torch.ones(27).double()), 0.0)
    with pytest.raises(BlockError, match="captures must be those of fl.capture"):
        NetworkFisher({})
    other = captures(net(4, 3, 3), 5)[0]
    with pytest.raises(BlockError, match="different columns"):
        NetworkFisher({"a": layers["0"], "b": other["2"]})
    with pytest.raises(BlockError, match="damping"):
        Tridiagonal(layers, 0.0)
    shared = nn.Sequential(nn.Linear(4, 3), nn.Flatten(), nn.Linear(6, 3)).double()
    found = fl.capture(shared, CE, randn(5, 2, 4), torch.arange(5) % 3)
    with pytest.raises(BlockError, match="'0' is shared over 2 positions"):
        Tridiagonal(found, 0.1)
    frozen = net(4, 3).requires_grad_(False)
    with pytest.raises(fl.CaptureError, match="got none"):
        NetworkHessian(frozen, CE, x, y)


def test_curvlinops_estimates_what_is_known():
    curvlinops = pytest.importorskip("curvlinops")
    layers, x, y = captures(net(4, 3, 3), 4)
    F, block = NetworkFisher(layers), fl.KFAC()(layers["0"])
    for matrix in (F, block, NetworkHessian(net(4, 3, 3), CE, x, y)):
        operator = fl.adapters.as_curvlinops_operator(matrix)
        X = randn(matrix.size, 2, seed=3)
        assert relative(operator @ X, matrix.dense() @ X) < 1e-10
    with torch.random.fork_rng():
        torch.manual_seed(0)
        # a third of the products, 8, spans the range of F: the estimate is the trace
        found = curvlinops.hutchpp_trace(fl.adapters.as_curvlinops_operator(F), 24)
    assert float(found) == pytest.approx(float(F.trace()), rel=1e-8)
    with pytest.raises(fl.adapters.AdapterError, match="takes a block or a matrix of a network"):
        fl.adapters.as_curvlinops_operator(torch.eye(3))
