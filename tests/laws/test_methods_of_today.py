"""SOAP, Muon and the KL-optimal product: formulas, exact cases, what the papers say they are."""

import math

import pytest
import torch
from references import randn, relative
from torch import Tensor, nn

import fisherlab as fl
from fisherlab.approximations import Running
from fisherlab.blocks import BlockError
from fisherlab.blocks.basis import matrix_of
from fisherlab.extract import Geometry, LayerCapture
from fisherlab.optim import OptimizerError
from fisherlab.optim.readings import read
from fisherlab.testing import check_approximation, check_block
from fisherlab.testing.cases import captured

CE = nn.CrossEntropyLoss()


def columns(layer) -> Tensor:
    """Per-example gradients `[n, o, i]` of all output vectors, by a loop."""
    a, g = layer.inputs, layer.output_gradients
    return torch.stack([g[k, n].T @ a[n] for k in range(len(g)) for n in range(len(a))])


def stein(X: Tensor, F: Tensor) -> float:
    """`tr(X^{-1} F) + log det X`, by Cholesky."""
    C = torch.linalg.cholesky(X)
    return float(torch.cholesky_solve(F, C).trace() + 2 * C.diagonal().log().sum())


# SOAP's approximation


@pytest.mark.parametrize("kind", ["full", "positions", "conv"])
def test_soap_is_diagonal_in_the_eigenbasis_of_shampoos_factors(kind):
    layer = captured(kind)
    D = columns(layer)
    L, R = torch.einsum("noi,npi->op", D, D), torch.einsum("noi,noj->ij", D, D)
    block = fl.SOAP()(layer)
    Q_L, Q_R = matrix_of(block.Q_G), matrix_of(block.Q_A)
    for Q, S in ((Q_L, L), (Q_R, R)):
        rotated = Q.T @ S @ Q
        assert relative(rotated, rotated.diagonal().diag()) < 1e-12
        assert relative(Q @ rotated @ Q.T, S) < 1e-12
    V = torch.einsum("op,noi,ij->npj", Q_L, D, Q_R).square().sum(0) / layer.examples
    assert relative(block.spectrum, V) < 1e-12


def test_soap_of_per_example_gradients_is_tekfac():
    for kind in ("full", "thin", "positions", "conv"):
        layer = captured(kind)
        assert relative(fl.SOAP()(layer).dense(), fl.TEKFAC()(layer).dense()) < 1e-12


def test_soap_of_the_gradient_is_what_one_batch_shows():
    layer = captured("full")
    block = fl.SOAP(fl.Shampoo(statistics="gradient"))(layer)
    D = layer.gradient
    U, s, Vh = torch.linalg.svd(D, full_matrices=False)
    # in the singular vectors of D the gradient is diagonal
    U, Vh, s = U[:, s > 1e-12 * s[0]], Vh[s > 1e-12 * s[0]], s[s > 1e-12 * s[0]]
    expected = sum(
        s[k] ** 2 * torch.outer(v := torch.outer(U[:, k], Vh[k]).flatten(), v)
        for k in range(len(s))
    )
    assert relative(block.dense(), expected) < 1e-9
    step = fl.SOAP(fl.Shampoo(statistics="gradient")).damped(block, 0.01).dense()
    assert (
        relative(step @ step, torch.linalg.inv(block.dense() + 0.01 * torch.eye(15).double()))
        < 1e-9
    )


# SOAP's optimizer


class DenseSOAP:
    """The paper's algorithm on one weight as matrices on `vec W`, with the eigenvectors of L, R."""

    def __init__(self, o: int, i: int) -> None:
        self.M, self.V, self.t = torch.zeros(o * i).double(), torch.zeros(o * i).double(), 0
        self.L, self.R = torch.zeros(o, o).double(), torch.zeros(i, i).double()
        self.Q = torch.eye(o * i).double()

    def step(self, W: Tensor, G: Tensor) -> Tensor:
        self.t += 1
        self.M = 0.95 * self.M + 0.05 * G.flatten()
        self.V = 0.95 * self.V + 0.05 * (self.Q.T @ G.flatten()) ** 2
        share = 1 - 0.95**self.t
        d = self.Q @ (self.Q.T @ self.M / share / ((self.V / share).sqrt() + 1e-8))
        W = (1 - 3e-3 * 0.01) * W - 3e-3 * d.view_as(W)
        self.L = 0.95 * self.L + 0.05 * G @ G.T
        self.R = 0.95 * self.R + 0.05 * G.T @ G
        if self.t == 1 or self.t % 10 == 0:
            new = torch.kron(torch.linalg.eigh(self.L)[1], torch.linalg.eigh(self.R)[1])
            self.V = (new.T @ self.Q).square() @ self.V
            self.Q = new
        return W


def test_soap_steps_as_written_out_densely():
    model = nn.Linear(5, 4).double()
    optimizer = fl.optim.create("soap", model)
    W, reference = model.weight.detach().clone(), DenseSOAP(4, 5)
    for step in range(25):
        gradient = randn(4, 5, seed=step)
        model.weight.grad, model.bias.grad = gradient.clone(), randn(4, seed=step)
        optimizer.step()
        W = reference.step(W, gradient)
        assert relative(model.weight.detach(), W) < 1e-10
    state = optimizer.state[model.weight]
    for Q in (state["Q_L"], state["Q_R"]):
        assert relative(Q.T @ Q, torch.eye(len(Q)).double()) < 1e-12
    # the basis is of the factors at step 20, the factors are of step 25
    assert relative(state["L"], reference.L) < 1e-12 and relative(state["R"], reference.R) < 1e-12


def test_soap_before_a_basis_and_of_a_vector_is_adam():
    model, other = nn.Linear(5, 4).double(), nn.Linear(5, 4).double()
    other.load_state_dict(model.state_dict())
    ours = fl.optim.SOAP(model.parameters(), lr=0.01, largest_factor=0)
    theirs = torch.optim.AdamW(other.parameters(), 0.01, (0.95, 0.95), 1e-8, 0.01)
    for step in range(12):
        for net, optimizer in ((model, ours), (other, theirs)):
            for k, p in enumerate(net.parameters()):
                p.grad = randn(*p.shape, seed=10 * step + k)
            optimizer.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert relative(p.detach(), q.detach()) < 1e-12


def test_soap_refuses_before_anything_moves():
    model = nn.Linear(3, 2)
    optimizer = fl.optim.create("soap", model)
    before = model.weight.detach().clone()
    model.weight.grad, model.bias.grad = torch.ones(2, 3), torch.full((2,), math.nan)
    with pytest.raises(OptimizerError, match="NaN or inf"):
        optimizer.step()
    assert torch.equal(model.weight, before) and not optimizer.state
    for options in ({"lr": -1.0}, {"betas": (1.0, 0.9)}, {"basis_every": 0}, {"eps": math.nan}):
        with pytest.raises(ValueError, match=next(iter(options))):
            fl.optim.create("soap", model, **options)


# Muon


def test_muon_is_torchs_muon_of_matrices_and_adamw_of_the_rest():
    def net() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return nn.Sequential(
                nn.Embedding(7, 8), nn.Flatten(), nn.Linear(16, 9), nn.LayerNorm(9),
                nn.Unflatten(1, (1, 3, 3)), nn.Conv2d(1, 2, 2), nn.Flatten(), nn.Linear(8, 3),
            )  # fmt: skip

    model, other = net(), net()
    ours = fl.optim.create("muon", model, lr=0.01)
    matrices = [other[2].weight, other[7].weight]
    rest = [p for p in other.parameters() if all(p is not m for m in matrices)]
    muon = torch.optim.Muon(matrices, 0.01, 0.01, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, 0.01)
    schedule = torch.optim.lr_scheduler.StepLR(ours, 3, 0.5)
    for step in range(6):
        x = torch.randint(7, (5, 2), generator=torch.Generator().manual_seed(step))
        for net_, optimizers in ((model, [ours]), (other, [muon, adamw])):
            net_.zero_grad()
            CE(net_(x), torch.arange(5) % 3).backward()
            for optimizer in optimizers:
                optimizer.step()
        schedule.step()
        if step == 2:
            for optimizer in (muon, adamw):
                optimizer.param_groups[0]["lr"] *= 0.5
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    rules = {g["rule"]: len(g["params"]) for g in ours.param_groups}
    assert rules == {"muon": 2, "adamw": len(rest)}


def test_muon_takes_groups_and_options_of_the_rest():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[1].parameters()}]
    optimizer = fl.optim.create("muon", model, params=groups, lr=0.02, rest={"betas": (0.8, 0.9)})
    found = [(g["rule"], g["lr"], g.get("betas")) for g in optimizer.param_groups]
    assert found == [
        ("muon", 0.1, None), ("muon", 0.02, None), ("adamw", 0.1, (0.8, 0.9)),
        ("adamw", 0.02, (0.8, 0.9)),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="function mine is not supported"):
        fl.optim.create("muon", model, adjust_lr_fn="mine")


# the KL-optimal product


@pytest.mark.parametrize("kind", ["full", "padded", "no bias"])
def test_kl_optimal_product_is_stationary_and_no_rival_is_below(kind):
    layer = captured(kind)
    D = columns(layer).flatten(1)
    F = D.T @ D / layer.examples
    block = fl.KLOptimal()(layer)
    least = stein(block.dense(), F)
    rivals = (fl.KFAC(), fl.TKFAC(), fl.KroneckerOptimal(), fl.KFACReduce(), fl.Shampoo())
    for rival in rivals:
        X = rival(layer).dense()
        if torch.linalg.eigvalsh(X)[0] > 0:
            assert least <= stein(X, F), rival
    G, A = (S.clone().requires_grad_() for S in (block.G, block.A))
    X = torch.kron(G, A)
    loss = torch.linalg.solve(X, F).trace() + torch.linalg.slogdet(X)[1]
    gradients = torch.autograd.grad(loss, (G, A))
    for gradient, S in zip(gradients, (block.G, block.A), strict=True):
        # in the metric of the factor, where the Stein loss has the same curvature everywhere
        assert (S @ gradient).norm() < 1e-8


def of_columns(a: Tensor, g: Tensor):
    """A capture of a layer without a bias: inputs `[n, i]`, output gradients `[n, o]`."""
    geometry = Geometry(a.shape[1], g.shape[1], bias=False)
    return LayerCapture("0", "Linear", geometry, (a,), (g[None],), (g,))


def test_kl_optimal_gradient_vanishes_where_the_factors_are_well_conditioned():
    layer = of_columns(randn(200, 4, seed=1), randn(200, 3))
    block = fl.KLOptimal()(layer)
    D = columns(layer).flatten(1)
    G, A = (S.clone().requires_grad_() for S in (block.G, block.A))
    X = torch.kron(G, A)
    loss = torch.linalg.solve(X, D.T @ D / 200).trace() + torch.linalg.slogdet(X)[1]
    assert all(x.norm() < 1e-8 for x in torch.autograd.grad(loss, (G, A)))


def test_kl_optimal_of_a_product_is_the_product():
    """Every pair of a row of each side: the block is `G (x) A`."""
    U, V = randn(3, 3), randn(5, 5, seed=1)
    layer = of_columns(V.repeat(3, 1), U.repeat_interleave(5, 0))
    F = torch.kron(U.T @ U, V.T @ V) / 15
    assert relative(fl.Exact()(layer).dense(), F) < 1e-12
    assert relative(fl.KLOptimal()(layer).dense(), F) < 1e-10


def test_kl_optimal_without_a_ridge_refuses_where_there_is_no_optimum():
    """No column at one of four pairs: one factor's ratio grows for ever."""
    eye = torch.eye(2, dtype=torch.float64)
    layer = of_columns(eye[[0, 1, 0]], eye[[0, 0, 1]])
    with pytest.raises(BlockError, match=r"runs into a singular one.*pass a ridge"):
        fl.KLOptimal(ridge=0.0)(layer)
    with pytest.raises(BlockError, match=r"has not settled after 5 alternations.*pass a ridge"):
        fl.KLOptimal(ridge=0.0, iterations=5)(layer)
    assert torch.isfinite(fl.KLOptimal()(layer).dense()).all()
    with pytest.raises(BlockError, match="ridge"):
        fl.KLOptimal(ridge=-1.0)
    with pytest.raises(BlockError, match="iterations"):
        fl.KLOptimal(iterations=0)


# their running forms


def batches(count: int = 12, n: int = 20) -> list[LayerCapture]:
    return [of_columns(randn(n, 4, seed=k), randn(n, 3, seed=100 + k)) for k in range(count)]


def running(approximation, layers, decay: float = 0.9) -> tuple[Tensor, Tensor]:
    means = Running(approximation, decay)
    for layer in layers:
        means.update(layer)
        means.refresh_basis()
        means.correct(layer)
    block = means.block()
    return block.G, block.A


def block_of(layer: LayerCapture) -> Tensor:
    D = columns(layer).flatten(1)
    return (D.T @ D / layer.examples).view(3, 4, 3, 4)


def past_of(step: int, decay: float = 0.9) -> float:
    """The weight of all batches before, of equal sizes, under an average."""
    count = sum(decay**k for k in range(step + 1))
    return 1 - 1 / count


def test_kl_shampoo_runs_as_written_out():
    """Dense: both partial traces of F against the inverse of the other factor, from the old."""
    layers, G, A = batches(), None, None
    for step, layer in enumerate(layers):
        F = block_of(layer)
        if G is None:
            G, A = torch.einsum("oipi->op", F), torch.einsum("oioj->ij", F)
            G, A = G / G.trace().sqrt(), A / A.trace().sqrt()
        P, Q = (
            torch.linalg.inv(S + 1e-3 * S.diagonal().mean() * torch.eye(len(S)).double())
            for S in (G, A)
        )
        past = past_of(step)
        G = past * G + (1 - past) * torch.einsum("oipj,ij->op", F, Q) / 4
        A = past * A + (1 - past) * torch.einsum("oipj,op->ij", F, P) / 3
    found = running(fl.KLShampoo(), layers)
    assert relative(found[0], G) < 1e-12 and relative(found[1], A) < 1e-12


def test_dykaf_runs_as_written_out():
    """Dense: the integrator of a matrix of rank one, on the rearranged average."""
    u, s, v = torch.eye(3).double().flatten(), 0.0, torch.eye(4).double().flatten()
    layers = batches()
    for step, layer in enumerate(layers):
        R = block_of(layer).permute(0, 2, 1, 3).reshape(9, 16)
        target = past_of(step) * s * torch.outer(u, v) + (1 - past_of(step)) * R
        K, L = target @ v, target.T @ u
        u, v = K / K.norm(), L / L.norm()
        s = u @ target @ v
    G, A = running(fl.DyKAF(), layers)
    expected = s * torch.kron(u.view(3, 3), v.view(4, 4))
    assert relative(torch.kron(G, A), expected) < 1e-12
    assert float(G.norm()) == pytest.approx(float(A.norm()), rel=1e-12)


@pytest.mark.parametrize(
    ("moving", "resting", "bound"),
    [(fl.KLShampoo(ridge=1e-14), fl.KLOptimal(), 1e-9), (fl.DyKAF(), fl.KroneckerOptimal(), 1e-9)],
)
def test_on_one_block_the_running_forms_end_in_the_optimum(moving, resting, bound):
    layer = of_columns(randn(200, 4, seed=1), randn(200, 3))
    found = torch.kron(*running(moving, [layer] * 80, decay=0.5))
    assert relative(found, resting(layer).dense()) < bound


@pytest.mark.parametrize("method", [fl.KLShampoo(ridge=1e-14), fl.DyKAF()])
def test_the_first_step_on_a_product_is_the_product(method):
    U, V = randn(3, 3), randn(5, 5, seed=1)
    layer = of_columns(V.repeat(3, 1), U.repeat_interleave(5, 0))
    assert relative(method(layer).dense(), torch.kron(U.T @ U, V.T @ V) / 15) < 1e-10


@pytest.mark.parametrize("kind", [fl.KLShampoo, fl.DyKAF])
def test_the_running_forms_refuse_and_stay_as_they_were(kind):
    with pytest.raises(BlockError, match=r"statistics is 'per_example' or 'gradient', got 'mean'"):
        kind(statistics="mean")
    layers = batches(2)
    means = Running(kind(), largest_factor=3)
    with pytest.raises(BlockError, match="keeps whole factors.*3 outputs and 4 inputs"):
        means.update(layers[0])
    means = Running(kind())
    means.update(layers[0])
    before = {key: value.clone() for key, value in means.sums.items()}
    broken = of_columns(torch.full((2, 4), math.nan).double(), randn(2, 3))
    with pytest.raises(BlockError, match=r"factor|NaN or inf"):
        means.update(broken)
    assert all(torch.equal(before[key], value) for key, value in means.sums.items())
    again = Running(kind())
    again.load_state_dict(means.state_dict())
    means.update(layers[1])
    again.update(layers[1])
    assert torch.equal(means.block().dense(), again.block().dense())
    with pytest.raises(BlockError, match="ridge"):
        fl.KLShampoo(ridge=0.0)


# a sketched block


def test_nystrom_is_the_block_at_its_rank_and_below_it_otherwise():
    layer = captured("full")
    D = columns(layer).flatten(1)
    F = D.T @ D / layer.examples
    assert relative(fl.Nystrom(rank=15)(layer).dense(), F) < 1e-12
    thin = captured("thin")
    D = columns(thin).flatten(1)
    assert relative(fl.Nystrom(rank=9)(thin).dense(), D.T @ D / thin.examples) < 1e-10
    last = None
    for rank in (2, 5, 9):
        X = fl.Nystrom(rank=rank)(layer).dense()
        assert torch.linalg.eigvalsh(F - X)[0] > -1e-12 * F.norm()
        assert torch.linalg.matrix_rank(X, hermitian=True) == rank
        assert last is None or (F - X).norm() < last
        last = (F - X).norm()
    with pytest.raises(BlockError, match="rank of Nystrom must be a whole number >= 1, got 0"):
        fl.Nystrom(rank=0)


# the block of a weight whose columns are apart


def test_a_column_sum_keeps_the_laws_of_a_block():
    G, A, b = randn(9, 3, seed=2), randn(9, 4, seed=3), randn(3, 1, seed=4).abs()
    parts = [fl.blocks.Kronecker(G.T @ G, A.T @ A), fl.blocks.Diagonal(b)]
    block = fl.blocks.ColumnSum(parts)
    F = torch.zeros(3, 5, 3, 5, dtype=torch.float64)
    F[:, :4, :, :4] = torch.kron(G.T @ G, A.T @ A).view(3, 4, 3, 4)
    for row in range(3):
        F[row, 4, row, 4] = b[row, 0]
    check_block(block, F.view(15, 15))
    again = fl.blocks.from_dict(fl.blocks.to_dict(block))
    assert torch.equal(again.dense(), block.dense())
    with pytest.raises(BlockError, match="same number of rows"):
        fl.blocks.ColumnSum([parts[0], fl.blocks.Diagonal(torch.ones(2, 1))])


def test_a_state_of_soap_is_a_block_that_keeps_the_laws():
    model = nn.Linear(4, 3).double()
    optimizer = fl.optim.create("soap", model)
    for step in range(3):
        model.weight.grad, model.bias.grad = randn(3, 4, seed=step), randn(3, seed=step)
        optimizer.step()
    block = read(optimizer, nn.Sequential(model)).blocks["SOAP square"]["0"]
    check_block(block, block.dense())
    check_approximation(fl.SOAP(), layers=("full",))
