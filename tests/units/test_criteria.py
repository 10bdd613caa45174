"""Criteria by exact type, and those of the user: proven at each capture, held against autograd."""

import math

import pytest
import torch
import torch.nn.functional as F
from references import Reference, randn, relative
from torch import nn

import fisherlab as fl
from fisherlab.blocks import Outer
from fisherlab.extract import CaptureError, capture, criteria, fisher
from fisherlab.extract.criteria import is_a, rules_of

M, D, C = 5, 4, 3


class Temperature(nn.CrossEntropyLoss):
    def forward(self, f, y):
        return super().forward(f / 4, y)


class Centred(nn.CrossEntropyLoss):
    """Examples interact."""

    def forward(self, f, y):
        return super().forward(f - f.mean(0), y)


class Smoothed(nn.CrossEntropyLoss):
    """A constructor and nothing else."""

    def __init__(self):
        super().__init__(label_smoothing=0.1)


def problem(*tail, outputs=C, classes=True):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, outputs), *tail).double()
    y = torch.arange(M) % C if classes else randn(M, outputs, seed=2)
    return model, randn(M, D, seed=1), y


def block(layer):
    return Outer(layer.inputs, layer.output_gradients).dense()


def reference(model, criterion, x, y, name="0"):
    layer = model.get_submodule(name)
    return Reference(model, criterion, x, y, layer.weight, layer.bias)


# Known by exact type


@pytest.mark.parametrize("kind", [Temperature, Centred])
def test_a_subclass_with_its_own_forward_is_another_loss(kind):
    model, x, y = problem()
    for fisher_type in ("exact", "mc"):
        with pytest.raises(
            CaptureError, match=f"{kind.__name__} (overrides parts of CrossE|is not a mean)"
        ):
            capture(model, kind(), x, y, fisher_type=fisher_type)
    assert not is_a(kind(), nn.CrossEntropyLoss)


def test_a_subclass_with_its_own_forward_is_empirical_with_a_note():
    model, x, y = problem()
    table = fl.compare(model, Temperature(), x, y, approximations=["kfac"])
    assert set(table.frame["fisher_type"]) == {"empirical"}
    assert "the empirical one: Temperature overrides parts" in table.note
    expected = reference(model, Temperature(), x, y).empirical()
    layers = capture(model, Temperature(), x, y, fisher_type="empirical")
    assert relative(block(layers["0"]), expected) < 1e-10
    with pytest.raises(CaptureError, match="Centred is not a mean of per-example losses"):
        capture(model, Centred(), x, y, fisher_type="empirical")


def test_a_known_criterion_has_no_note():
    model, x, y = problem()
    table = fl.compare(model, nn.CrossEntropyLoss(), x, y, approximations=["kfac"])
    assert "empirical" not in table.note


def test_a_subclass_that_overrides_nothing_is_its_parent():
    model, x, y = problem()
    layers = capture(model, Smoothed(), x, y)
    expected = reference(model, nn.CrossEntropyLoss(label_smoothing=0.1), x, y).exact()
    assert relative(block(layers["0"]), expected) < 1e-10


def test_a_forward_of_the_object_s_own_makes_it_another_loss():
    criterion = nn.CrossEntropyLoss()
    criterion.forward = lambda f, y: F.cross_entropy(f / 4, y)
    assert rules_of(criterion) is None


@pytest.mark.parametrize("kind", [Temperature, nn.HuberLoss])
def test_optimizers_refuse_columns_of_an_unknown_criterion(kind):
    model, x, y = problem(classes=kind is Temperature)
    criterion = kind()
    opt = fl.optim.create("kfac", model, criterion=criterion, fisher_type="mc")
    with pytest.raises(CaptureError, match=f"fisher_type='mc' needs .*{kind.__name__}"):
        criterion(model(x), y).backward()
    opt.remove()


# NLLLoss


def test_nll_of_log_probabilities_is_cross_entropy():
    model, x, y = problem()
    bare, ended = (model, nn.CrossEntropyLoss()), (nn.Sequential(*model, nn.LogSoftmax(1)),)
    for options in ({}, {"weight": torch.tensor([0.5, 1.0, 3.0]).double()}, {"ignore_index": 1}):
        for fisher_type in ("exact", "empirical"):
            expected = capture(
                bare[0], nn.CrossEntropyLoss(**options), x, y, fisher_type=fisher_type
            )
            found = capture(ended[0], nn.NLLLoss(**options), x, y, fisher_type=fisher_type)
            dense = getattr(reference(model, nn.CrossEntropyLoss(**options), x, y), fisher_type)()
            assert relative(block(found["0"]), block(expected["0"])) < 1e-12
            assert relative(block(found["0"]), dense) < 1e-10


def test_nll_draws_what_cross_entropy_draws():
    model, x, y = problem()
    ended = nn.Sequential(*model, nn.LogSoftmax(1))
    one = capture(model, nn.CrossEntropyLoss(), x, y, fisher_type="mc", mc_samples=4)
    two = capture(ended, nn.NLLLoss(), x, y, fisher_type="mc", mc_samples=4)
    assert relative(two["0"].output_gradients, one["0"].output_gradients) < 1e-12
    assert relative(two["2"].output_gradients, one["2"].output_gradients) < 1e-12


@pytest.mark.parametrize("name", ["kfac", "tekfac"])
def test_nll_compares_and_trains_as_cross_entropy(name):
    model, x, y = problem()
    ended = nn.Sequential(*model, nn.LogSoftmax(1))
    one = fl.compare(model, nn.CrossEntropyLoss(), x, y, approximations=[name]).frame
    two = fl.compare(ended, nn.NLLLoss(), x, y, approximations=[name]).frame
    assert set(two["fisher_type"]) == {"exact"}
    assert abs(one["relative_error"] - two["relative_error"]).max() < 1e-10
    blocks = []
    for net, criterion in ((model, nn.CrossEntropyLoss()), (ended, nn.NLLLoss())):
        opt = fl.optim.create(name, net, criterion=criterion, fisher_type="exact", lr=0.0)
        criterion(net(x), y).backward()
        opt.step()
        blocks.append(opt.blocks()["0"].dense())
        opt.zero_grad()
        opt.remove()
    assert relative(blocks[1], blocks[0]) < 1e-10


def test_nll_of_other_outputs_is_empirical_with_a_note():
    model, x, y = problem()
    table = fl.compare(model, nn.NLLLoss(), x, y, approximations=["kfac"])
    assert set(table.frame["fisher_type"]) == {"empirical"}
    assert "NLLLoss is a log-likelihood only of log-probabilities" in table.note
    for fisher_type in ("exact", "mc"):
        with pytest.raises(CaptureError, match="NLLLoss is a log-likelihood only .*log_softmax"):
            capture(model, nn.NLLLoss(), x, y, fisher_type=fisher_type)


# Counts, means with variances


def fisher_by_quadrature(model, criterion, x, nodes):
    """`(1/M) sum_n c E[s s^T]`, `s = d sum_j l_nj / dw` at the nodes of `y_j`, by autograd."""
    weight = model[0].weight
    total = torch.zeros(weight.numel(), weight.numel(), dtype=torch.float64)
    for n in range(M):
        f = model(x[n : n + 1])
        rows = []
        for output in f.flatten():
            (row,) = torch.autograd.grad(output, weight, retain_graph=True)
            rows.append(row.flatten())
        J = torch.stack(rows)
        H = torch.zeros(len(J), len(J), dtype=torch.float64)
        # terms are independent and their scores have mean zero: second moments add up
        for y, p in nodes(f.detach()):
            free = f.detach().requires_grad_()
            for j in range(y.numel()):
                (s,) = torch.autograd.grad(criterion(free, y, j), free)
                H += p.flatten()[j] * torch.outer(s.flatten(), s.flatten())
        total += J.mT @ H @ J / M
    return total


def poisson_nodes(log_input):
    def nodes(f):
        rate = f.exp() if log_input else f
        for k in range(80):
            p = (k * rate.log() - rate - math.lgamma(k + 1)).exp()
            yield torch.full_like(f, k), p

    return nodes


@pytest.mark.parametrize("log_input", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_poisson_against_all_counts(log_input, reduction):
    model, x, _ = problem(*([] if log_input else [nn.Softplus()]), outputs=2, classes=False)
    y = torch.poisson(torch.ones(M, 2), torch.Generator().manual_seed(0)).double()
    criterion = nn.PoissonNLLLoss(log_input=log_input, reduction=reduction)
    bare = nn.PoissonNLLLoss(log_input=log_input, reduction="none")
    expected = fisher_by_quadrature(
        model, lambda f, y, j: bare(f, y).flatten()[j], x, poisson_nodes(log_input)
    )
    scale = 1 / 2 if reduction == "mean" else 1.0
    found = block(capture(model, criterion, x, y)["0"]).view(4, D + 1, 4, D + 1)[:, :-1, :, :-1]
    assert relative(found.reshape(4 * D, 4 * D), scale * expected) < 1e-7
    gradient = capture(model, criterion, x, y, fisher_type="empirical")
    dense = reference(model, criterion, x, y).empirical()
    assert relative(block(gradient["0"]), dense) < 1e-10
    if log_input:
        exact = capture(model, criterion, x, y)
        assert relative(block(exact["0"]), reference(model, criterion, x, y).exact()) < 1e-10


def test_poisson_of_negative_rates_is_refused():
    model, x, y = problem(outputs=2, classes=False)
    with pytest.raises(CaptureError, match="takes rates, which are positive"):
        capture(model, nn.PoissonNLLLoss(log_input=False), x, y)


class Positive(nn.Module):
    """The second half of axis 1 made positive."""

    def forward(self, f):
        mean, raw = f.chunk(2, 1)
        return torch.cat([mean, F.softplus(raw)], 1)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("flat", [True, False])
def test_gaussian_with_a_variance_of_its_own(reduction, flat):
    d = 1 if flat else 2
    model, x, _ = problem(Positive(), outputs=2 * d, classes=False)
    y = randn(M, d, seed=3).squeeze(1) if flat else randn(M, d, seed=3)
    criterion = nn.GaussianNLLLoss(reduction=reduction)
    bare = nn.GaussianNLLLoss(reduction="none")

    def term(f, y, j):
        return bare(f[:, :d], y, f[:, d:]).flatten()[j]

    def nodes(f):  # Gauss and Hermite's three: exact up to the fifth moment
        for z, p in ((0.0, 2 / 3), (math.sqrt(3), 1 / 6), (-math.sqrt(3), 1 / 6)):
            y = f[:, :d] + z * f[:, d:].sqrt()
            yield y, torch.full_like(y, p)

    expected = fisher_by_quadrature(model, term, x, nodes)
    scale = 1 / d if reduction == "mean" else 1.0
    found = block(capture(model, criterion, x, y)["0"]).view(4, D + 1, 4, D + 1)[:, :-1, :, :-1]
    assert relative(found.reshape(4 * D, 4 * D), scale * expected) < 1e-10
    layers = capture(model, criterion, x, y, fisher_type="empirical")
    outputs = model(x)
    loss = criterion(outputs[:, :d].reshape(y.shape), y, outputs[:, d:].reshape(y.shape))
    (gradient,) = torch.autograd.grad(loss * (1 / M if reduction == "sum" else 1), model[0].weight)
    assert relative(layers["0"].gradient[:, :-1], gradient) < 1e-10


def test_gaussian_of_outputs_without_a_variance_is_refused():
    model, x, y = problem(outputs=3, classes=False)
    with pytest.raises(CaptureError, match="axis 1 of the outputs holds the means, then as many"):
        capture(model, nn.GaussianNLLLoss(), x, y)


def test_drawn_labels_have_the_moments_of_the_model():
    g = torch.Generator().manual_seed(0)
    f = torch.tensor([[0.3, 1.2]], dtype=torch.float64).expand(20000, 2)
    counts = fisher.draw_labels(nn.PoissonNLLLoss(), f, g)
    assert (counts.mean(0) - f[0].exp()).abs().max() < 0.05
    assert (counts.var(0) - f[0].exp()).abs().max() < 0.15
    y = fisher.draw_labels(nn.GaussianNLLLoss(), f, g)
    assert abs(y.mean() - 0.3) < 0.03
    assert abs(y.var() - 1.2) < 0.05
    (scores,) = fisher.output_vectors("mc", nn.GaussianNLLLoss(reduction="sum"), f, y, 1, g)
    found = scores.mT @ scores / len(scores)
    assert (found - torch.diag(torch.tensor([1 / 1.2, 1 / (2 * 1.2**2)]))).abs().max() < 0.03


# The user's own


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(criteria, "_REGISTRY", dict(criteria._REGISTRY))


class LogCosh(nn.Module):
    """A convex loss of torch functions; its mean divides by the number of outputs."""

    def __init__(self, reduction="mean", factor=1.0):
        super().__init__()
        self.reduction, self.factor = reduction, factor

    def terms(self, f, y):
        return self.factor * (f - y).cosh().log()

    def forward(self, f, y):
        terms = self.terms(f, y)
        return terms.mean() if self.reduction == "mean" else terms.sum()


def log_cosh_root(criterion, f, y):
    entries = criterion.factor**0.5 / (f - y).cosh()
    return [entries * F.one_hot(torch.tensor(k), f.shape[1]) for k in range(f.shape[1])]


def log_cosh_terms(criterion, f, y):
    return criterion.terms(f, y)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("given", ["terms", "terms and root"])
def test_a_criterion_of_one_s_own_is_exact(reduction, given, registry):
    model, x, y = problem(classes=False)
    root = log_cosh_root if given == "terms and root" else None
    fl.register_criterion(LogCosh, terms=log_cosh_terms, root=root)
    criterion = LogCosh(reduction, factor=2.0)
    for fisher_type in ("exact", "empirical"):
        layers = capture(model, criterion, x, y, fisher_type=fisher_type)
        expected = getattr(reference(model, criterion, x, y), fisher_type)()
        assert relative(block(layers["0"]), expected) < 1e-9
    table = fl.compare(model, criterion, x, y, approximations=["kfac"])
    assert set(table.frame["fisher_type"]) == {"exact"}
    with pytest.raises(CaptureError, match="LogCosh was registered without `sample`"):
        capture(model, criterion, x, y, fisher_type="mc")


def test_a_sampler_of_one_s_own_gives_cross_entropy_s_draws(registry):
    class Own(nn.Module):
        reduction = "mean"

        def forward(self, f, y):
            return -f.log_softmax(1).gather(1, y[:, None]).mean()

    cross_entropy = rules_of(nn.CrossEntropyLoss())
    fl.register_criterion(Own, sample=cross_entropy.sample)
    model, x, y = problem()
    found = capture(model, Own(), x, y, fisher_type="mc", mc_samples=3)
    expected = capture(model, nn.CrossEntropyLoss(), x, y, fisher_type="mc", mc_samples=3)
    assert relative(found["0"].output_gradients, expected["0"].output_gradients) < 1e-12
    with pytest.raises(CaptureError, match="Own was registered without `root`"):
        capture(model, Own(), x, y)
    opt = fl.optim.create("kfac", model, criterion=(own := Own()), fisher_type="mc")
    own(model(x), y).backward()
    opt.step()
    opt.remove()


def test_a_mean_that_divides_by_weights(registry):
    class Weighted(LogCosh):
        def terms(self, f, y):
            return y.abs() * super().terms(f, y)

        def forward(self, f, y):
            return self.terms(f, y).sum() / y.abs().sum()

    model, x, y = problem(classes=False)
    fl.register_criterion(Weighted, terms=log_cosh_terms, weights=lambda c, f, y: y.abs())
    for fisher_type in ("exact", "empirical"):
        layers = capture(model, Weighted(), x, y, fisher_type=fisher_type)
        expected = getattr(reference(model, Weighted(), x, y), fisher_type)()
        assert relative(block(layers["0"]), expected) < 1e-9
    fl.register_criterion(Weighted, terms=log_cosh_terms)
    with pytest.raises(CaptureError, match="`terms` registered for Weighted .*pass `weights`"):
        capture(model, Weighted(), x, y)


def test_wrong_registrations_are_found_at_the_capture(registry):
    model, x, y = problem(classes=False)
    fl.register_criterion(LogCosh, terms=lambda c, f, y: (f - y).square())
    with pytest.raises(CaptureError, match="gradient of `terms` registered for LogCosh"):
        capture(model, LogCosh(), x, y, fisher_type="empirical")
    fl.register_criterion(
        LogCosh, terms=log_cosh_terms, root=lambda *a: [2 * S for S in log_cosh_root(*a)]
    )
    with pytest.raises(CaptureError, match="`root` registered for LogCosh is none of its Hessian"):
        capture(model, LogCosh(), x, y)
    fl.register_criterion(LogCosh, terms=log_cosh_terms, sample=lambda c, f, g: f[:, 0])
    with pytest.raises(CaptureError, match="drew labels of shape"):
        capture(model, LogCosh(), x, y, fisher_type="mc")
    fl.register_criterion(LogCosh, terms=lambda c, f, y: c.terms(f - f.mean(0), y))
    with pytest.raises(CaptureError, match="LogCosh is not a mean of per-example losses"):
        capture(model, LogCosh(), x, y, fisher_type="empirical")


def test_a_loss_that_is_not_convex_has_no_exact_fisher(registry):
    def bump(f, y):
        return (1 - (-(f - y).square()).exp()).sum(1).mean()

    bump.reduction = "mean"
    fl.register_criterion(bump, terms=lambda c, f, y: (1 - (-(f - y).square()).exp()).sum(1))
    model, x, y = problem(classes=False)
    with pytest.raises(CaptureError, match="bump is not convex in the outputs"):
        capture(model, bump, x, 3 * y)
    layers = capture(model, bump, x, 3 * y, fisher_type="empirical")
    assert relative(block(layers["0"]), reference(model, bump, x, 3 * y).empirical()) < 1e-10


def test_registrations_that_say_nothing_or_too_much():
    with pytest.raises(TypeError, match="register a class of criteria"):
        fl.register_criterion(LogCosh(), terms=log_cosh_terms)
    with pytest.raises(ValueError, match="CrossEntropyLoss is known to FisherLab"):
        fl.register_criterion(nn.CrossEntropyLoss, terms=log_cosh_terms)
    with pytest.raises(ValueError, match="nothing is said about LogCosh"):
        fl.register_criterion(LogCosh)
    with pytest.raises(ValueError, match="pass terms as well"):
        fl.register_criterion(LogCosh, root=log_cosh_root, weights=log_cosh_terms)


# In the optimizers


def traces(model, loss, criterion, fisher_type):
    opt = fl.optim.NaturalGradient(
        model, fl.Exact(), criterion=criterion, fisher_type=fisher_type, lr=0.0, damping=1.0
    )
    try:
        loss().backward()
        opt.step()
        return {name: block.trace().item() for name, block in opt.blocks().items()}
    finally:
        opt.zero_grad()
        opt.remove()


def test_an_optimizer_has_the_fisher_of_weighted_and_ignored_labels():
    model, x, y = problem()
    weight = torch.tensor([0.5, 1.0, 3.0]).double()
    criterion = nn.CrossEntropyLoss(weight, ignore_index=1)
    expected = capture(model, criterion, x, y)
    for call in (lambda f: criterion(f, y), lambda f: criterion(input=f, target=y)):
        found = traces(model, lambda call=call: call(model(x)), criterion, "exact")
        for name, trace in found.items():
            assert trace == pytest.approx(fl.Exact()(expected[name]).trace().item(), rel=1e-10)


def test_an_optimizer_refuses_columns_where_it_cannot_see_ignored_labels():
    model, x, y = problem()
    y = y.clone()
    y[0] = -100
    with pytest.raises(fl.optim.OptimizerError, match="cannot tell which labels are ignored"):
        traces(model, lambda: F.cross_entropy(model(x), y), F.cross_entropy, "exact")
    found = traces(model, lambda: F.cross_entropy(model(x), y), F.cross_entropy, "empirical")
    expected = capture(model, nn.CrossEntropyLoss(), x, y, fisher_type="empirical")
    for name, trace in found.items():
        assert trace == pytest.approx(fl.Exact()(expected[name]).trace().item(), rel=1e-10)


def test_an_optimizer_refuses_columns_of_a_mean_and_a_variance_apart():
    model, x, y = problem(Positive(), outputs=2, classes=False)
    criterion = nn.GaussianNLLLoss()

    def loss():
        mean, variance = model(x).chunk(2, 1)
        return criterion(mean, y[:, :1], variance)

    with pytest.raises(fl.optim.OptimizerError, match="called as criterion"):
        traces(model, loss, criterion, "exact")


def test_two_losses_of_one_output_need_one_hessian():
    model, x, y = problem()
    weighted = nn.CrossEntropyLoss(torch.tensor([0.5, 1.0, 3.0]).double())

    def mixed(criterion):
        f = model(x)
        return 0.7 * criterion(f, y) + 0.3 * criterion(f, (y + 1) % C)

    with pytest.raises(fl.optim.OptimizerError, match="mix the labels before the loss"):
        traces(model, lambda: mixed(weighted), weighted, "exact")
    plain = nn.CrossEntropyLoss()
    found = traces(model, lambda: mixed(plain), plain, "exact")
    expected = capture(model, plain, x, y)
    for name, trace in found.items():
        assert trace == pytest.approx(fl.Exact()(expected[name]).trace().item(), rel=1e-10)


# Classes last


class Tokens(nn.Module):
    """`[n, t, d]` to `[n, t, classes]`, or the classes in axis 1."""

    def __init__(self, last, classes=C, tail=nn.Identity):
        super().__init__()
        torch.manual_seed(0)
        self.map, self.out = nn.Linear(D, 4), nn.Linear(4, classes)
        self.last, self.tail = last, tail
        self.double()

    def forward(self, x):
        f = self.out(torch.tanh(self.map(x)))
        f = f.log_softmax(-1) if self.tail is nn.LogSoftmax else f
        return f if self.last else f.movedim(-1, 1)


@pytest.mark.parametrize("fisher_type", fisher.FISHER_TYPES)
@pytest.mark.parametrize("shape", [(2,), (2, 4)])
def test_classes_last_are_classes_first(fisher_type, shape):
    x, y = randn(M, *shape, D), torch.arange(M * math.prod(shape)).view(M, *shape) % C
    y[0, 0] = -100
    for criterion, tail in ((nn.CrossEntropyLoss(), None), (nn.NLLLoss(), nn.LogSoftmax)):
        first, last = (
            capture(Tokens(k, tail=tail), criterion, x, y, fisher_type=fisher_type)
            for k in (False, True)
        )
        for name in first:
            assert torch.equal(first[name].output_gradients, last[name].output_gradients)
            assert torch.equal(first[name].label_gradients, last[name].label_gradients)
        assert torch.equal(first.outputs, last.outputs)
    tables = [
        fl.compare(Tokens(k, tail=nn.LogSoftmax), nn.NLLLoss(), x, y, approximations=["kfac"])
        for k in (False, True)
    ]
    error = tables[0].frame["relative_error"] - tables[1].frame["relative_error"]
    assert error.abs().max() == 0


def test_as_many_classes_as_positions_are_read_as_torch_reads_them():
    x, y = randn(M, C, D), torch.arange(M * C).view(M, C) % C
    for last in (False, True):
        model, criterion = Tokens(last), nn.CrossEntropyLoss()
        layers = capture(model, criterion, x, y, fisher_type="empirical")
        assert torch.equal(layers.outputs, model(x))
        criterion(model(x), y).backward()
        for name, layer in layers.items():
            weight = model.get_submodule(name).weight
            assert torch.allclose(layer.gradient[:, : weight.shape[1]], weight.grad, atol=1e-12)


class Outputs(dict):
    """An output object of another library: a mapping, its entries attributes too."""

    __getattr__ = dict.__getitem__


class Wrapped(nn.Module):
    def __init__(self, model, kind):
        super().__init__()
        self.model, self.kind = model, kind

    def forward(self, x, scale=1.0):
        f = self.model(x * scale)
        return {"object": Outputs(logits=f), "dict": {"logits": f}, "tuple": (f, x)}[self.kind]


@pytest.mark.parametrize("kind", ["object", "dict", "tuple"])
def test_outputs_in_objects_mappings_and_tuples(kind):
    from collections import UserDict

    model, x, y = problem()
    expected = capture(model, nn.CrossEntropyLoss(), x, y)
    wrapped = Wrapped(model, kind)
    batch = UserDict(x=x, labels=y)
    if kind == "tuple":
        with pytest.raises(
            CaptureError, match=r"the model returned tuple.*wrap the model.*model\(x\)\[0\]"
        ):
            capture(wrapped, nn.CrossEntropyLoss(), batch)
        with pytest.raises(CaptureError, match="forward returned tuple"):
            capture(wrapped, nn.CrossEntropyLoss(), batch, forward=lambda m, x: m(**x))
        forward = lambda m, x: m(**x)[0]  # noqa: E731
    else:
        forward = None
    layers = capture(wrapped, nn.CrossEntropyLoss(), batch, forward=forward)
    assert relative(layers["model.0"].output_gradients, expected["0"].output_gradients) < 1e-14
    for sample in (batch, [batch]):
        table = fl.compare(
            wrapped, nn.CrossEntropyLoss(), sample, approximations=["kfac"], forward=forward
        )
        assert set(table.frame["examples"]) == {M}


@pytest.mark.parametrize("kind", ["object", "dict"])
def test_an_optimizer_reads_outputs_in_objects_and_mappings(kind):
    model, x, y = problem()
    wrapped, criterion = Wrapped(model, kind), nn.CrossEntropyLoss()
    found = traces(wrapped, lambda: F.cross_entropy(wrapped(x)["logits"], y), None, "empirical")
    expected = capture(model, criterion, x, y, fisher_type="empirical")
    assert found["model.0"] == pytest.approx(fl.Exact()(expected["0"]).trace().item(), rel=1e-10)
