"""Methods that a user writes: what they define is what is measured, by whichever way."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

import fisherlab as fl
from fisherlab.approximations import Memo, Running
from fisherlab.approximations.base import _REGISTRY, Approximation
from fisherlab.blocks import BlockError, Kronecker, RowBlocks
from fisherlab.statistics import (
    GroupedMoment,
    InputMoment,
    LeftMoment,
    OutputMoment,
    RightMoment,
    RowMoments,
    Statistic,
)

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


class Ridge(Statistic):
    """The inputs' moment with a prior, which the inputs do not span."""

    side = "input"

    def total(self, layer):
        A = layer.input_moment / layer.positions
        return A + 0.5 * layer.examples * torch.eye(len(A), dtype=A.dtype)


def ridge_of_kfac():
    return fl.KFAC(A=Ridge())


def ridge_of_its_own():
    @dataclass(frozen=True)
    class Own(Approximation, name="own_ridge"):
        """KFAC with a prior in the input factor."""

        right: Statistic = Ridge()
        G: Statistic = OutputMoment()

        def block(self, mean, shape):
            return Kronecker(mean(self.G), mean(self.right))

    return Own()


def ridge_in_the_block():
    class Own(fl.KFAC):
        def block(self, mean, shape):
            return Kronecker(mean(self.G), mean(self.A) + 0.5 * torch.eye(shape[1]).double())

    return Own()


@THIN
@pytest.mark.parametrize("make", [ridge_of_kfac, ridge_of_its_own, ridge_in_the_block])
def test_a_sum_may_have_any_name_and_any_range(make, thin):
    model, x, y = problem(thin)
    a, g = dense_factors(model, x, y)
    A = a.mT @ a / len(x) + 0.5 * torch.eye(21).double()
    G = torch.einsum("mno,mnp->op", g, g) / len(x)
    check(make(), torch.kron(G, A), model, x, y)


class Weighted(InputMoment):
    """KFAC's inputs, counted by their example's gradient."""

    def total(self, layer):
        a, g = layer.inputs[:, 0], layer.output_gradients[:, :, 0]
        return torch.einsum("n,ni,nj->ij", 1 + g.square().sum((0, 2)), a, a)


@dataclass(frozen=True)
class Decorated(fl.KFAC):
    A: Statistic = Weighted()


class Plain(fl.KFAC):
    A = Weighted()


class Annotated(fl.KFAC):
    A: Statistic = Weighted()


class Mixin:
    A = Weighted()


class Mixed(Mixin, fl.KFAC):
    pass


class Child(Plain):
    pass


KINDS = [Decorated, Plain, Annotated, Mixed, Child, lambda: fl.KFAC(A=Weighted())]


def weighted_truth(model, x, y):
    a, g = dense_factors(model, x, y)
    A = torch.einsum("n,ni,nj->ij", 1 + g.square().sum((0, 2)), a, a) / len(x)
    return A, torch.einsum("mno,mnp->op", g, g) / len(x), a, g


@THIN
@pytest.mark.parametrize("kind", KINDS)
def test_a_statistic_of_kfac_is_replaced_with_all_its_views(thin, kind):
    model, x, y = problem(thin)
    A, G, _, _ = weighted_truth(model, x, y)
    check(kind(), torch.kron(G, A), model, x, y)


@pytest.mark.parametrize("kind", KINDS)
def test_an_optimizer_steps_with_the_statistic(kind):
    model, x, y = problem(True)
    A, G, _, _ = weighted_truth(model, x, y)
    optimizer = fl.optim.NaturalGradient(
        model, kind(), lr=0.1, damping=DAMPING, fisher_type="exact"
    )
    nn.CrossEntropyLoss()(model(x), y).backward()
    optimizer.step()
    found = optimizer.blocks()["0"].dense()
    assert (found - torch.kron(G, A)).norm() < 1e-10 * found.norm()


@THIN
def test_eigenvalues_are_corrected_in_the_basis_of_a_users_factors(thin):
    model, x, y = problem(thin)
    A, G, a, g = weighted_truth(model, x, y)
    Q_A, Q_G = torch.linalg.eigh(A)[1], torch.linalg.eigh(G)[1]
    D = torch.einsum("mno,ni->mnoi", g, a).flatten(0, 1)
    spectrum = (Q_G.mT @ D @ Q_A).square().sum(0) / len(x)
    Q = torch.kron(Q_G, Q_A)
    truth = Q * spectrum.flatten() @ Q.mT
    _, blocks = ways(fl.EKFAC(factors=Decorated()), model, x, y)
    for way, block in blocks.items():
        # the null space of a factor has no basis of its own, but no gradient has energy there
        assert (block.dense() - truth).norm() < 1e-9 * truth.norm(), way


class FourLeft(LeftMoment):
    def total(self, layer):
        return 4 * super().total(layer)


class NineRight(RightMoment):
    def total(self, layer):
        return 9 * super().total(layer)


@THIN
def test_statistics_of_shampoo_are_replaced(thin):
    model, x, y = problem(thin)
    layer, blocks = ways(fl.Shampoo(left=FourLeft(), right=NineRight()), model, x, y)
    trace = fl.Shampoo()(layer).trace()
    for way, block in blocks.items():
        assert block.trace() == pytest.approx(float(6 * trace), rel=1e-6), way


def test_mini_block_is_measured_by_its_own_statistic_and_block():
    class Twice(GroupedMoment):
        def total(self, layer):
            return 2 * super().total(layer)

    class Shared(fl.MiniBlock):
        def block(self, mean, shape):
            block = super().block(mean, shape)
            return fl.blocks.MiniBlock(block.blocks.mean(0, keepdim=True).expand_as(block.blocks))

    model, x, y = problem(True)
    layer, blocks = ways(fl.MiniBlock(blocks=Twice()), model, x, y)
    plain = fl.MiniBlock()(layer)
    assert isinstance(plain, RowBlocks)  # of the view that the subclass must not take
    assert isinstance(GroupedMoment().rows(layer), RowMoments) and Twice().rows(layer) is None
    for way, block in blocks.items():
        assert (block.dense() - 2 * plain.dense()).norm() < 1e-12 * plain.dense().norm(), way
    o, i = layer.shape
    rows = plain.dense().reshape(o, i, o, i).diagonal(dim1=0, dim2=2).mean(2)
    truth = torch.kron(torch.eye(o).double(), rows)
    _, blocks = ways(Shared(), model, x, y)
    for way, block in blocks.items():
        assert (block.dense() - truth).norm() < 1e-12 * truth.norm(), way


class Twice(InputMoment):
    def total(self, layer):
        return 2 * super().total(layer)


def test_of_an_oversized_factor_the_diagonal_of_a_users_sum_is_kept():
    model, x, y = problem(True)
    layer = fl.capture(model, nn.CrossEntropyLoss(), x, y)["0"]
    a, g = dense_factors(model, x, y)
    A, G = 2 * a.square().mean(0), torch.einsum("mno,mnp->op", g, g) / len(x)
    running = Running(fl.KFAC(A=Twice()), decay=0.0, largest_factor=20)
    running.update(layer)
    truth = torch.kron(G.diagonal().diag(), A.diag())
    assert (running.block().dense() - truth).norm() < 1e-12 * truth.norm()


def test_a_mean_that_no_field_names_is_refused_everywhere():
    class Unnamed(Approximation):
        A: Statistic = InputMoment()

        def block(self, mean, shape):
            return Kronecker(mean(OutputMoment()), mean(self.A))

    model, x, y = problem(True)
    layer = fl.capture(model, nn.CrossEntropyLoss(), x, y)["0"]
    running = Running(Unnamed())
    running.update(layer)
    for make in (lambda: Unnamed()(layer), running.block):
        with pytest.raises(BlockError, match=r"Unnamed asks for the mean of OutputMoment\(\)"):
            make()


@pytest.mark.parametrize("old", ["sums", "moments", "diagonals", "of_whole"])
def test_a_method_of_the_contract_before_is_refused(old):
    with pytest.raises(TypeError, match=f"Old defines {old}, which nothing calls"):
        type("Old", (fl.KFAC,), {old: lambda self, layer: {}})


def test_an_option_and_the_statistic_of_another_are_refused():
    for make, message in (
        (lambda: replace(fl.KFAC(), weight_sharing="reduce"), "follows from weight_sharing"),
        (lambda: replace(fl.TKFAC(), weight_sharing="expand"), "follows from weight_sharing"),
        (lambda: replace(fl.Shampoo(), statistics="gradient"), "follows from statistics"),
        (lambda: replace(fl.IFANG(rows=2), rows=3), "follows from rows"),
    ):
        with pytest.raises(BlockError, match=message):
            make()


def test_a_memory_budget_does_not_split_an_example_of_a_users_sum():
    x = torch.rand(5, 3, 4, generator=torch.Generator().manual_seed(0)).double()
    model = nn.Sequential(nn.Linear(4, 3), nn.Flatten(), nn.Linear(9, 3)).double()
    layer = fl.capture(model, nn.CrossEntropyLoss(), x, torch.arange(5) % 3)["0"]
    size = layer.positions * sum(layer.shape) * 8
    assert len(list(layer.chunks(size))) == 15 and len(list(layer.chunks(size, whole=True))) == 5
    block = Memo([layer], size).block(fl.KFAC(A=Twice()))
    truth = 2 * fl.KFAC()(layer).dense()
    assert (block.dense() - truth).norm() < 1e-12 * truth.norm()
