"""Methods that a user writes: what they define is what is measured, by whichever way."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import fisherlab as fl
from fisherlab.approximations import Running
from fisherlab.approximations.base import _REGISTRY, Approximation
from fisherlab.blocks import Kronecker, RowBlocks
from fisherlab.blocks.contractions import second_moment

DAMPING = 1e-2
THIN = pytest.mark.parametrize("thin", [True, False], ids=["few examples", "many examples"])


@pytest.fixture(autouse=True)
def registry():
    known = dict(_REGISTRY)
    yield
    _REGISTRY.clear()
    _REGISTRY.update(known)


def problem(thin):
    """A model of two layers and a batch that spans less than the inputs, or all of them."""
    generator = torch.Generator().manual_seed(3)
    n = 8 if thin else 60
    x = torch.rand(n, 20, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (n,), generator=generator)
    model = nn.Sequential(nn.Linear(20, 40), nn.Tanh(), nn.Linear(40, 3)).double()
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.copy_(
                torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 4
            )
    return model, x, y


def dense_factors(model, x, y):
    """`a` `[n, i]` and `g` `[m, n, o]` of the first layer, by autograd of each log-probability."""
    hidden = model[0](x)
    outputs = model[2](model[1](hidden))
    p = outputs.softmax(1).detach()
    # the columns sqrt(p_c) (e_c - p) of a root of diag(p) - p p^T
    roots = [p[:, c : c + 1].sqrt() * (torch.eye(3).double()[c] - p) for c in range(3)]
    g = [torch.autograd.grad(outputs, hidden, root, retain_graph=True)[0] for root in roots]
    return torch.cat([x, torch.ones(len(x), 1).double()], 1), torch.stack(g)


def ways(method, model, x, y):
    """The block by one batch, by chunks, by running means and by captures of halves."""

    def capture(part):
        return fl.capture(model, nn.CrossEntropyLoss(), x[part], y[part])["0"]

    whole, half = capture(slice(None)), len(x) // 2
    halves = capture(slice(half)), capture(slice(half, None))
    running = Running(method, decay=0.0)
    running.update(*halves)
    running.refresh_basis()
    running.correct(*halves)
    return whole, {
        "one batch": method(whole),
        "two captures": method(*halves),
        "running": running.block(),
    }


def check(method, truth, model, x, y):
    """Every way gives the dense truth, and the table measures it."""
    layer, blocks = ways(method, model, x, y)
    for way, block in blocks.items():
        assert (block.dense() - truth).norm() < 1e-10 * truth.norm(), way
        inverse = block.power(-1, DAMPING) @ layer.gradient
        wanted = torch.linalg.solve(
            truth + DAMPING * torch.eye(len(truth)).double(), layer.gradient.flatten()
        )
        assert (inverse.flatten() - wanted).norm() < 1e-9 * wanted.norm(), way
    F = fl.Exact()(layer).dense()
    row = fl.compare(
        model, nn.CrossEntropyLoss(), x, y, approximations={"own": method}, layers=["0"]
    ).frame.iloc[0]
    error = (truth - F).norm() / F.norm()
    assert row.relative_error == pytest.approx(float(error), rel=1e-9)
    assert row.trace_ratio == pytest.approx(float(truth.trace() / F.trace()), rel=1e-9)


@THIN
@pytest.mark.parametrize("key", ["A", "right", "M"])
def test_a_sum_may_have_any_name_and_any_range(key, thin):
    @dataclass(frozen=True)
    class Ridge(Approximation, name="own_ridge"):
        """KFAC with a prior in the input factor, which the inputs do not span."""

        def sums(self, layer):
            A = layer.input_moment / layer.positions
            prior = 0.5 * layer.examples * torch.eye(len(A), dtype=A.dtype)
            return {"G": second_moment(layer.output_gradients), key: A + prior}

        def block(self, means, basis, corrections):
            return Kronecker(means["G"], means[key])

    model, x, y = problem(thin)
    a, g = dense_factors(model, x, y)
    A = a.mT @ a / len(x) + 0.5 * torch.eye(21).double()
    G = torch.einsum("mno,mnp->op", g, g) / len(x)
    check(Ridge(), torch.kron(G, A), model, x, y)


def weighted_sums(self, layer):
    """KFAC's sums, with inputs that count by their example's gradient."""
    a, g = layer.inputs[:, 0], layer.output_gradients[:, :, 0]
    A = torch.einsum("n,ni,nj->ij", 1 + g.square().sum((0, 2)), a, a)
    return {"A": A, "G": fl.KFAC.sums(self, layer)["G"]}


class Weighted(fl.KFAC):
    sums = weighted_sums


class Mixin:
    sums = weighted_sums


class Mixed(Mixin, fl.KFAC):
    pass


def weighted_truth(model, x, y):
    a, g = dense_factors(model, x, y)
    A = torch.einsum("n,ni,nj->ij", 1 + g.square().sum((0, 2)), a, a) / len(x)
    return A, torch.einsum("mno,mnp->op", g, g) / len(x), a, g


@THIN
@pytest.mark.parametrize("kind", [Weighted, Mixed])
def test_a_subclass_of_kfac_that_redefines_its_sums_is_measured_by_them(thin, kind):
    model, x, y = problem(thin)
    A, G, _, _ = weighted_truth(model, x, y)
    check(kind(), torch.kron(G, A), model, x, y)


@THIN
def test_eigenvalues_are_corrected_in_the_basis_of_a_users_factors(thin):
    model, x, y = problem(thin)
    A, G, a, g = weighted_truth(model, x, y)
    Q_A, Q_G = torch.linalg.eigh(A)[1], torch.linalg.eigh(G)[1]
    D = torch.einsum("mno,ni->mnoi", g, a).flatten(0, 1)
    spectrum = (Q_G.mT @ D @ Q_A).square().sum(0) / len(x)
    Q = torch.kron(Q_G, Q_A)
    truth = Q * spectrum.flatten() @ Q.mT
    _, blocks = ways(fl.EKFAC(factors=Weighted()), model, x, y)
    for way, block in blocks.items():
        # the null space of a factor has no basis of its own, but no gradient has energy there
        assert (block.dense() - truth).norm() < 1e-9 * truth.norm(), way


@THIN
def test_a_subclass_of_shampoo_that_redefines_its_sums_is_measured_by_them(thin):
    class Doubled(fl.Shampoo):
        def sums(self, layer):
            sums = super().sums(layer)
            return {"left": 4 * sums["left"], "right": 9 * sums["right"]}

    model, x, y = problem(thin)
    layer, blocks = ways(Doubled(), model, x, y)
    trace = fl.Shampoo()(layer).trace()
    for way, block in blocks.items():
        assert block.trace() == pytest.approx(float(6 * trace), rel=1e-6), way


def test_a_subclass_of_mini_block_is_measured_by_its_own_sums_and_block():
    class Doubled(fl.MiniBlock):
        def sums(self, layer):
            return {"blocks": 2 * super().sums(layer)["blocks"]}

    class Shared(fl.MiniBlock):
        def block(self, means, basis, corrections):
            block = super().block(means, basis, corrections)
            return type(block)(block.blocks.mean(0, keepdim=True).expand_as(block.blocks), None)

    model, x, y = problem(True)
    layer, blocks = ways(Doubled(), model, x, y)
    plain = fl.MiniBlock()(layer)
    assert isinstance(plain, RowBlocks)  # the shortcut that the subclasses must not take
    for way, block in blocks.items():
        assert (block.dense() - 2 * plain.dense()).norm() < 1e-12 * plain.dense().norm(), way
    o, i = layer.shape
    rows = plain.dense().reshape(o, i, o, i).diagonal(dim1=0, dim2=2).mean(2)
    truth = torch.kron(torch.eye(o).double(), rows)
    _, blocks = ways(Shared(), model, x, y)
    for way, block in blocks.items():
        assert (block.dense() - truth).norm() < 1e-12 * truth.norm(), way


def test_of_an_oversized_factor_the_diagonal_of_a_users_sum_is_kept():
    class Doubled(fl.KFAC):
        def sums(self, layer):
            sums = super().sums(layer)
            return {"A": 2 * sums["A"], "G": sums["G"]}

    model, x, y = problem(True)
    layer = fl.capture(model, nn.CrossEntropyLoss(), x, y)["0"]
    a, g = dense_factors(model, x, y)
    A, G = 2 * a.square().mean(0), torch.einsum("mno,mnp->op", g, g) / len(x)
    running = Running(Doubled(), decay=0.0, largest_factor=20)
    running.update(layer)
    truth = torch.kron(G.diagonal().diag(), A.diag())
    assert (running.block().dense() - truth).norm() < 1e-12 * truth.norm()
