"""Where an approximation is exact, and where it is ordered: a wrong scale cannot hide there."""

import dataclasses

import dense
import pytest
import torch
from formulas import CASES, FISHER_TYPES, found_and_expected
from hypothesis import given, settings
from hypothesis import strategies as st
from references import randn, relative
from torch import nn

import fisherlab as fl
from fisherlab.extract import capture

CE, MSE = nn.CrossEntropyLoss(), nn.MSELoss()
KRONECKER = ("kfac", "kfac_reduce", "tkfac", "tkfac_expand", "shampoo", "sngd", "eva")


def error(name, layer):
    return fl.metrics.relative_error(fl.approximations.get(name)()(layer), fl.Exact()(layer)).item()


def net(*layers, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(*layers).double()


# --- exact ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fisher_type", FISHER_TYPES)
def test_one_example_at_one_position(fisher_type):
    """`F = (sum_m g g^T) (x) a a^T`, a Kronecker product; Shampoo's squared form is TKFAC."""
    layer, p = found_and_expected("one example", fisher_type)
    F = dense.exact(p)
    names = ["kfac", "kfac_reduce", "ekfac", "tkfac", "tkfac_expand", "tekfac"]
    names += ["kronecker_optimal", "kronecker_sum"]
    for name in names:
        assert relative(fl.approximations.get(name)()(layer).dense(), F) < 1e-10, name
        assert error(name, layer) < 1e-10, name
    if fisher_type == "empirical":
        assert relative(fl.Eva()(layer).dense(), F) < 1e-10


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_kfac_of_a_deep_linear_network_with_squared_error(bias, reduction):
    """The Jacobian behind a layer is one for all examples, so `G` does not depend on `a`."""
    model = net(nn.Linear(5, 4, bias), nn.Linear(4, 6, bias), nn.Linear(6, 2, bias))
    x, y = randn(7, 5), randn(7, 2, seed=1)
    for layer in capture(model, nn.MSELoss(reduction=reduction), x, y).values():
        for name in ("kfac", "kfac_reduce", "ekfac", "tkfac", "tekfac", "kronecker_optimal"):
            assert error(name, layer) < 1e-10, name


class Expanded(nn.Module):
    """Outputs at every position: every position is a loss term of its own."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.two(self.one(x))


class Reduced(Expanded):
    """The mean over positions before the last layer."""

    def forward(self, x):
        return self.two(self.one(x).mean(1))


def test_expand_and_reduce_are_exact_in_their_own_settings():
    """Eschenhagen et al. 2023, deep linear networks with squared error."""
    x = randn(6, 5, 4)
    for kind, target, exact, other in (
        (Expanded, (6, 5, 2), "kfac", "kfac_reduce"),
        (Reduced, (6, 2), "kfac_reduce", "kfac"),
    ):
        torch.manual_seed(0)
        layers = capture(kind().double(), MSE, x, randn(*target, seed=1))
        assert error(exact, layers["one"]) < 1e-10
        assert error(other, layers["one"]) > 0.1


def test_a_convolution_that_is_pooled_by_the_mean_is_exact_under_reduce():
    model = net(nn.Conv2d(2, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    layer = capture(model, MSE, randn(5, 2, 4, 4), randn(5, 2, seed=1))["0"]
    assert error("kfac_reduce", layer) < 1e-10


@pytest.mark.parametrize("fisher_type", FISHER_TYPES)
def test_the_diagonal_form_of_one_input_and_the_block_form_of_one_output(fisher_type):
    """One row is one mini-block; with one input and one output everything is a number."""
    y = torch.zeros(6, 1).double()
    model = net(nn.Linear(3, 1))
    layer = capture(model, MSE, randn(6, 3), y, fisher_type=fisher_type)["0"]
    assert error("mini_block", layer) < 1e-12
    model = net(nn.Linear(1, 1, bias=False))
    layer = capture(model, MSE, randn(6, 1), y, fisher_type=fisher_type)["0"]
    for name in ("diagonal", "mini_block", "ekfac", "tkfac", "tekfac", "kronecker_optimal"):
        assert error(name, layer) < 1e-12, name


# --- one position ---------------------------------------------------------------------------------

FLAT = ("linear", "head", "without bias", "fewer examples than inputs", "duplicates")


@pytest.mark.parametrize("fisher_type", FISHER_TYPES)
@pytest.mark.parametrize("case", FLAT)
def test_at_one_position_the_two_readings_of_a_paper_are_one(case, fisher_type):
    """expand = reduce, partial traces = the paper's literal `E[tr(Gamma) Lambda] / E[..]`."""
    layer, p = found_and_expected(case, fisher_type)
    assert relative(fl.KFACReduce()(layer).dense(), fl.KFAC()(layer).dense()) < 1e-12
    assert relative(fl.TKFACExpand()(layer).dense(), fl.TKFAC()(layer).dense()) < 1e-12
    Lambda = [torch.outer(a, a) for a in p.a[:, 0]]
    Gamma = [dense.moment(p.g[:, n]) for n in range(p.M)]
    sigma = sum(L.trace() * G.trace() for L, G in zip(Lambda, Gamma, strict=True)) / p.M
    Phi = sum(G.trace() * L for L, G in zip(Lambda, Gamma, strict=True)) / p.M / sigma
    Psi = sum(L.trace() * G for L, G in zip(Lambda, Gamma, strict=True)) / p.M / sigma
    assert relative(fl.TKFAC()(layer).dense(), sigma * torch.kron(Psi, Phi)) < 1e-12
    # KFAC's trace error is a covariance of traces
    a, g = torch.stack([L.trace() for L in Lambda]), torch.stack([G.trace() for G in Gamma])
    covariance = (a * g).mean() - a.mean() * g.mean()
    trace = fl.Exact()(layer).trace()
    assert float(trace - fl.KFAC()(layer).trace()) == pytest.approx(float(covariance), abs=1e-14)


def test_kfac_is_tkfac_when_the_traces_are_uncorrelated():
    """Inputs and gradients each of one length; scale included."""
    x = nn.functional.normalize(randn(8, 5), dim=1)
    layer = capture(net(nn.Linear(5, 4)), nn.CrossEntropyLoss(), x, torch.zeros(8).long())["0"]
    (raw,) = layer.raw_output_gradients
    raw /= raw.square().sum((0, 2), keepdim=True).sqrt()
    assert relative(fl.KFAC()(layer).dense(), fl.TKFAC()(layer).dense()) < 1e-12


# --- identities -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fisher_type", FISHER_TYPES)
@pytest.mark.parametrize("case", [c for c in CASES if c != "zero gradients"])
def test_traces_norms_and_half_steps(case, fisher_type):
    layer, p = found_and_expected(case, fisher_type)
    F, dense_F = fl.Exact()(layer), dense.exact(p)
    for name in ("tkfac", "ekfac", "tekfac", "diagonal", "mini_block"):
        ratio = fl.metrics.trace_ratio(fl.approximations.get(name)()(layer), F)
        assert float(ratio) == pytest.approx(1, abs=1e-12), name
    # ||F|| and tr F of the Gram matrix
    U = p.D.flatten(1).mT
    K = U.mT @ U
    assert float(F.squared_norm()) == pytest.approx(float((K / p.M).square().sum()), rel=1e-10)
    assert float(F.squared_norm()) == pytest.approx(float(dense_F.square().sum()), rel=1e-10)
    assert float(F.trace()) == pytest.approx(float(K.trace() / p.M), rel=1e-12)
    # TKFAC's factors are the half-steps from the identity of the optimal product's iteration
    o, i = F.shape
    R = dense_F.view(o, i, o, i)
    left, right = torch.einsum("oipi->op", R), torch.einsum("oioj->ij", R)
    assert relative(fl.TKFAC()(layer).dense(), torch.kron(left, right) / dense_F.trace()) < 1e-10
    # Pythagoras in an eigenbasis with optimal scaling, and on the diagonal and the mini-blocks
    for name in ("ekfac", "tekfac", "diagonal", "mini_block"):
        X = fl.approximations.get(name)()(layer)
        missing = (F.squared_norm() - X.squared_norm()).clamp(min=0) / F.squared_norm()
        assert error(name, layer) ** 2 == pytest.approx(float(missing), abs=1e-12), name
    # the best product leaves ||F||^2 - sigma_1^2 of the rearrangement
    _, S, _ = dense.rearranged(p)
    best = (1 - S[0] ** 2 / S.square().sum()).clamp(min=0)
    assert error("kronecker_optimal", layer) ** 2 == pytest.approx(float(best), abs=1e-12)


# --- orders ---------------------------------------------------------------------------------------


def ordered(layer):
    """Nothing that is a Kronecker product beats the best one; a corrected spectrum never hurts."""
    F = fl.Exact()(layer)
    if not F.squared_norm() > 1e-200:
        return  # a saturated softmax: the squares of such gradients are denormal numbers
    # a layer that feeds no element-wise function has no SNGD
    names = [n for n in KRONECKER if n != "sngd" or not layer.without_slope]
    found = {name: error(name, layer) for name in names}
    found |= {name: error(name, layer) for name in ("ekfac", "tekfac")}
    found |= {name: error(name, layer) for name in ("kronecker_optimal", "kronecker_sum")}
    slack = 1e-9
    assert found["ekfac"] <= found["kfac"] + slack
    assert found["tekfac"] <= found["tkfac"] + slack
    for name in names:
        assert found["kronecker_optimal"] <= found[name] + slack, name
    assert found["kronecker_sum"] <= found["kronecker_optimal"] + slack
    optimal = fl.KroneckerOptimal()(layer)
    for factor in (optimal.G, optimal.A):
        values = torch.linalg.eigvalsh(factor)
        assert values[0] >= -1e-9 * values[-1].clamp(min=1e-300)


@pytest.mark.parametrize("fisher_type", FISHER_TYPES)
@pytest.mark.parametrize("case", CASES)
def test_orders(case, fisher_type):
    ordered(found_and_expected(case, fisher_type)[0])


@st.composite
def captures(draw):
    """A layer of any kind the capture takes: shapes, positions, bias, criterion, Fisher type."""
    n, t = draw(st.integers(1, 8)), draw(st.integers(1, 4))
    i, o, classes = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(2, 3))
    bias, seed = draw(st.booleans()), draw(st.integers(0, 10**6))
    kind = draw(st.sampled_from(["linear", "sequence", "conv"]))
    activation = draw(st.sampled_from([nn.ReLU, nn.Tanh, nn.Identity]))
    torch.manual_seed(seed)
    if kind == "linear":
        shape, layers = (i,), [nn.Linear(i, o, bias), activation(), nn.Linear(o, classes)]
    elif kind == "sequence":
        shape = (t, i)
        layers = [nn.Linear(i, o, bias), activation(), nn.Flatten(), nn.Linear(o * t, classes)]
    else:
        groups = draw(st.integers(1, 2))
        stride, padding = draw(st.integers(1, 2)), draw(st.integers(0, 1))
        options = {"stride": stride, "padding": padding, "groups": groups, "bias": bias}
        conv = nn.Conv1d(i * groups, o * groups, draw(st.integers(1, 2)), **options)
        shape = (i * groups, t + 1)
        width = conv(torch.zeros(1, *shape)).flatten(1).shape[1]
        layers = [conv, activation(), nn.Flatten(), nn.Linear(width, classes)]
    model = nn.Sequential(*layers).double()
    scale = 10.0 ** draw(st.integers(-3, 3))
    x = scale * randn(n, *shape, seed=seed)
    criterion, fisher_type = draw(st.sampled_from([CE, MSE])), draw(st.sampled_from(FISHER_TYPES))
    y = torch.arange(n) % classes if criterion is CE else randn(n, classes, seed=seed + 1)
    return capture(model, criterion, x, y, fisher_type=fisher_type)


@settings(max_examples=40)
@given(captures())
def test_orders_and_traces_over_everything_a_capture_takes(layers):
    for layer in layers.values():
        ordered(layer)
        F = fl.Exact()(layer)
        if not F.squared_norm() > 1e-200:
            continue
        for name in ("tkfac", "ekfac", "tekfac"):
            X = fl.approximations.get(name)()(layer)
            ratio = float(fl.metrics.trace_ratio(X, F))
            assert ratio == pytest.approx(1, abs=1e-10), name


@settings(max_examples=15)
@given(captures(), st.randoms(use_true_random=False), st.sampled_from([0.01, 3.0]))
def test_a_permuted_batch_and_scaled_gradients(layers, random, c):
    """The order of examples does not matter; gradients times c are blocks times c^2."""
    for layer in layers.values():
        order = list(range(int(layer.examples)))
        random.shuffle(order)
        permuted = layer.part(order)
        gradients = tuple(c * x for x in layer.raw_output_gradients)
        scaled = dataclasses.replace(layer, raw_output_gradients=gradients)
        for name in ("kfac", "kfac_reduce", "tkfac", "ekfac", "tekfac", "diagonal", "mini_block"):
            X = fl.approximations.get(name)()
            whole = X(layer).dense()
            assert relative(X(permuted).dense(), whole) < 1e-8, name
            assert relative(X(scaled).dense(), c * c * whole) < 1e-8, name
