"""A capture proves itself: what breaks its two laws is left out by name, never measured."""

import math
import operator
import warnings

import pytest
import torch
import torch.nn.functional as F
from test_tape import Functional, Squashed, hooked
from torch import nn

import fisherlab as fl
from fisherlab.extract import CaptureError
from fisherlab.extract.isolation import isolated

CE = nn.CrossEntropyLoss()
TYPES = ("exact", "mc", "empirical")


class Masked(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight * (torch.arange(20).view(4, 5) % 2), self.bias)


class Standardised(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


class Penalised(nn.Module):
    """The weight is in the outputs by another way than its product."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x))) * (1 + self.a.weight.square().sum())


class TwoBiases(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.c, self.b = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.c.weight = self.a.weight

    def forward(self, x):
        return self.b(torch.tanh(self.c(torch.tanh(self.a(x)))))


class HandNorm(nn.Module):
    """Batch normalisation that no module type shows."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        s = self.a(x)
        return self.b(torch.tanh((s - s.mean(0)) / s.std(0)))


class Graph(nn.Module):
    """Rows are nodes; a node sees its neighbour."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        hidden = torch.tanh(self.a(x))
        return self.b(hidden + hidden.roll(1, 0))


class TimeFirst(nn.Module):
    """As many time steps as examples, time in front."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        steps = x[:, None] * torch.linspace(0.5, 1.5, len(x)).to(x)[None, :, None]
        return self.b(torch.tanh(self.a(steps.transpose(0, 1))).mean(0))


def convolutional(first):
    return nn.Sequential(
        nn.Unflatten(1, (1, 1, 5)), first, nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)
    )


PRODUCTS = {
    "masked weight": (lambda: nn.Sequential(Masked(5, 4), nn.Tanh(), nn.Linear(4, 3)), "0", "mul"),
    "standardised": (lambda: convolutional(Standardised(1, 2, (1, 3))), "1", "mean, sub"),
    "penalised": (Penalised, "a", "it is used by square as well"),
}
ROWS = {
    "batch norm by hand": (HandNorm, "a", "not one example each"),
    "graph": (Graph, "a", "not one example each"),
}
# what the modules do not show, and the functions do
SEEN = {
    "activation inside": lambda: nn.Sequential(Squashed(5, 4), nn.Linear(4, 3)),
    "functional use": Functional,
    "two biases": TwoBiases,
    "hook": hooked,
    "time first": TimeFirst,
}


def batch(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 5, generator=generator).to(dtype), torch.arange(6) % 3


def made(make, dtype=torch.float64):
    torch.manual_seed(0)
    model = make()
    model(torch.zeros(6, 5))
    return model.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("fisher_type", TYPES)
@pytest.mark.parametrize("kind", PRODUCTS | ROWS)
def test_a_layer_that_breaks_a_law_is_left_out_by_name(kind, fisher_type, dtype):
    make, name, wanted = (PRODUCTS | ROWS)[kind]
    model, (x, y) = made(make, dtype), batch(dtype)
    captured = fl.capture(model, CE, x, y, fisher_type=fisher_type)
    assert name not in captured
    assert wanted in captured.report.skipped[name]
    with pytest.raises(KeyError, match=wanted):
        captured[name]
    with pytest.raises(CaptureError, match=f"layer {name!r}: .*{wanted}"):
        fl.capture(model, CE, x, y, fisher_type=fisher_type, layers=[name])
    table = fl.compare(model, CE, x, y, fisher_type=fisher_type, approximations=["kfac"])
    assert set(table.frame.layer) == {each for each in captured if not each.endswith("bias")}
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("kind", [*PRODUCTS, *ROWS, *SEEN])
def test_layers_that_are_kept_are_right(kind):
    make = SEEN[kind] if kind in SEEN else (PRODUCTS | ROWS)[kind][0]
    model, (x, y) = made(make), batch()
    captured = fl.capture(model, CE, x, y)
    assert len(captured) >= 1 + (kind in SEEN)
    CE(model(x), y).backward()
    for name, layer in captured.items():
        if name.endswith(".bias"):  # of a weight without a block
            expected = model.get_parameter(name).grad[:, None]
        else:
            module = model.get_submodule(name)
            expected = torch.cat([module.weight.grad.flatten(1), module.bias.grad[:, None]], 1)
        assert (layer.gradient - expected).norm() < 1e-12 * (1 + expected.norm()), name


@pytest.mark.parametrize("kind", ROWS)
def test_the_check_of_gradients_alone_does_not_see_rows(kind):
    make, name, _ = ROWS[kind]
    model, (x, y) = made(make), batch()
    assert name in fl.capture(model, CE, x, y, check="gradient")


@pytest.mark.parametrize("check", ["full", "gradient", "off"])
def test_a_weight_with_another_use_is_left_out_at_any_check(check):
    model, (x, y) = made(Penalised), batch()
    captured = fl.capture(model, CE, x, y, check=check)
    assert list(captured) == ["b"] and "used by square" in captured.report.skipped["a"]


def test_an_unknown_check_is_refused():
    model, (x, y) = made(Graph), batch()
    with pytest.raises(CaptureError, match="unknown check 'half'; one of full, gradient, off"):
        fl.capture(model, CE, x, y, check="half")


def test_a_model_without_one_right_layer_is_refused_with_every_reason():
    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(5, 3)

        def forward(self, x):
            return self.a(x) + self.a(x).mean(0)

    x, y = batch()
    with pytest.raises(CaptureError, match="no layer of this model has a block: 'a': its rows"):
        fl.capture(made(Mean), CE, x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_a_right_capture_passes_at_any_scale(scale, dtype):
    torch.manual_seed(0)
    models = [
        nn.Sequential(nn.Linear(5, 300), nn.ReLU(), nn.Linear(300, 3)),
        convolutional(nn.Conv2d(1, 4, (1, 3), padding=(0, 1), stride=2, padding_mode="circular")),
        nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(5, 4)), nn.Linear(4, 3)),
        nn.Sequential(
            nn.Unflatten(1, (5, 1)), nn.Conv1d(5, 10, 1, groups=5), nn.Flatten(), nn.Linear(10, 3)
        ),
    ]
    x, y = batch(dtype)
    for model in models:
        model(torch.zeros(6, 5))
        captured = fl.capture(model.to(dtype), CE, scale * x, y)
        broken = [why for why in captured.report.skipped.values() if "its " in why or "off" in why]
        assert not broken and len(captured) >= 2


def test_a_gradient_of_rounding_raises_no_alarm():
    # two examples whose gradients cancel: the sum is rounding, its terms are not
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 2)).double()
    x = torch.randn(1, 5).double().expand(2, 5)
    with torch.no_grad():
        model[1].weight.copy_(model[1].weight[:1].expand(2, 4))
        model[1].bias.zero_()
    captured = fl.capture(model, CE, x, torch.tensor([0, 1]))
    assert captured["0"].gradient.norm() < 1e-15 and not captured.report.skipped


def test_a_random_forward_pass_is_refused_though_no_dropout_module_is_active():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.i, self.o = nn.Linear(5, 4), nn.Linear(4, 3)
            self.a = nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True)

        def forward(self, x):
            h = self.i(x)[:, None].expand(-1, 3, -1)
            return self.o(self.a(h, h, h)[0].mean(1))

    model, (x, y) = made(Attention), batch()
    with pytest.raises(CaptureError, match="draws random numbers"):
        fl.capture(model.train(), CE, x, y)
    assert "i" in fl.capture(model, CE, x, y, check="gradient")
    assert "i" in fl.capture(model.eval(), CE, x, y)


def test_a_forward_pass_may_draw_numbers_that_change_nothing():
    class Draws(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 0 * torch.rand(())

    x, y = batch()
    assert "0" in fl.capture(made(lambda: nn.Sequential(Draws(5, 3))), CE, x, y)


class Counting(nn.Module):
    """Buffers that a forward pass updates: one in place, one replaced."""

    def __init__(self):
        super().__init__()
        self.l, self.o = nn.Linear(5, 4), nn.Linear(4, 3)
        self.register_buffer("ema", torch.zeros(4))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        hidden = self.l(x)
        self.ema.mul_(0.9).add_(0.1 * hidden.detach().mean(0))
        self.count = self.count + 1
        return self.o(hidden)


@pytest.mark.parametrize(
    "make",
    [
        Counting,
        lambda: nn.Sequential(torch.nn.utils.spectral_norm(nn.Linear(5, 4)), nn.Linear(4, 3)),
        lambda: nn.Sequential(
            nn.utils.parametrizations.spectral_norm(nn.Linear(5, 4)), nn.Linear(4, 3)
        ),
    ],
    ids=["own buffers", "spectral norm by hooks", "spectral norm by parametrization"],
)
def test_buffers_and_training_flags_come_back(make):
    model, (x, y) = made(make), batch()
    for k, module in enumerate(model.modules()):
        module.training = k % 2 == 0
    flags = [module.training for module in model.modules()]
    buffers = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
    assert buffers
    fl.capture(model, CE, x, y)
    fl.support(model, x)
    with pytest.raises(CaptureError):
        fl.capture(model, CE, x, torch.full_like(y, 7))
    assert [module.training for module in model.modules()] == flags
    for name, buffer in model.named_buffers():
        same, before = buffers[name]
        assert buffer is same and torch.equal(buffer, before), name


class Stateful(nn.Module):
    """State of every kind in attributes that are no buffers."""

    def __init__(self):
        super().__init__()
        self.l, self.o = nn.Linear(5, 4), nn.Linear(4, 3)
        self.calls, self.seen, self.cache = 0, [], {"nested": [0]}
        self.ema, self.hidden = torch.zeros(4), None

    def forward(self, x):
        self.calls += 1
        self.seen.append(self.calls)
        self.cache["nested"][0] = self.cache["last"] = self.calls
        hidden = self.l(x)
        self.ema.mul_(0.9).add_(0.1 * hidden.detach().mean(0))
        self.hidden = hidden.detach() if self.hidden is None else self.hidden + hidden.detach()
        if self.calls == 2:
            self.register_buffer("late", torch.zeros(2))
            self.scale, self.act = nn.Parameter(torch.zeros(2)), nn.Tanh()
        return self.o(hidden)

    def state(self):
        names = [name for name, _ in (*self.named_parameters(), *self.named_buffers())]
        numbers = self.calls, [*self.seen], self.cache["nested"][0], self.cache["last"]
        return numbers, self.ema.tolist(), self.hidden.tolist(), names, [*self.children()]


def test_state_in_attributes_and_containers_comes_back():
    model, (x, y) = made(Stateful), batch()
    model(x)
    before, containers = model.state(), (model.seen, model.cache, model.ema)
    fl.capture(model, CE, x, y)
    fl.support(model, x)
    assert model.state() == before
    assert all(map(operator.is_, containers, (model.seen, model.cache, model.ema)))


def test_buffers_of_nan_and_sparse_ones_are_kept_without_a_word(recwarn):
    class Graph(nn.Linear):
        def __init__(self):
            super().__init__(5, 3)
            self.register_buffer("edges", torch.eye(6).to_sparse())
            self.register_buffer("unset", torch.tensor([math.nan]))

        def forward(self, x):
            return torch.sparse.mm(self.edges, super().forward(x))

    model, (x, y) = made(Graph), batch()
    assert "graph" in fl.capture(model, CE, x, y)
    assert model.unset._version == model.edges._version == 0
    with torch.no_grad():
        model.weight[0, 0] = math.nan
    fl.support(model, x)
    assert not recwarn


def test_embeddings_that_a_pass_rescales_come_back():
    model = nn.Sequential(nn.Embedding(7, 4, max_norm=0.5), nn.Flatten(), nn.Linear(8, 3)).double()
    before = model[0].weight.detach().clone()
    x, y = torch.arange(12).view(6, 2) % 7, torch.arange(6) % 3
    found = fl.capture(model, CE, x, y)["2"]
    fl.network.NetworkHessian(model, CE, x, y)
    fl.support(model, x)
    assert torch.equal(model[0].weight, before)
    model(x)  # torch's own pass writes
    assert not torch.equal(model[0].weight, before)
    assert torch.equal(found.label_gradients, fl.capture(model, CE, x, y)["2"].label_gradients)


def test_a_pass_that_writes_into_its_weights_is_said():
    class Clipped(nn.Linear):
        def forward(self, x):
            with torch.no_grad():
                self.weight.clamp_(-0.1, 0.1)
            return super().forward(x)

    with pytest.warns(UserWarning, match="the forward pass writes into the parameter weight"):
        fl.capture(Clipped(5, 3).double(), CE, *batch())


def test_a_block_of_a_computed_weight_is_none_of_its_parameters():
    norm = nn.utils.parametrizations.weight_norm
    model = nn.Sequential(norm(nn.Linear(5, 4)), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = batch()
    report = fl.capture(model, CE, x, y).report
    assert (report.trained, report.covered) == (sum(p.numel() for p in model.parameters()), 4 + 15)
    parts = {name for name, _ in model.named_parameters() if "parametrizations" in name}
    assert set(report.skipped) == parts and len(parts) == 2
    reasons = fl.support(model, x).set_index("layer")["reason"]
    assert "its weight is computed" in reasons["0"] and reasons["2"] == ""


def test_a_graph_that_holds_buffers_survives_a_capture_between_its_passes():
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double().eval()
    x, y = batch()
    loss = CE(model(x), y)
    fl.capture(model, CE, 2 * x, y)
    loss.backward()
    assert model[0].weight.grad.norm() > 0


def test_statistics_of_a_batch_norm_in_training_come_back():
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)).double().train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with isolated(model, batch()[0]):
        model(batch()[0])
        assert not torch.equal(model[1].running_mean, before["1.running_mean"])
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


class Opaque(torch.autograd.Function):
    """The identity, of which no graph says that it keeps examples apart."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g


class Cancelling(nn.Module):
    """`h` of the positions, a small difference of large terms, whose gradients cancel."""

    def __init__(self, mixing=False):
        super().__init__()
        self.a, self.b, self.mixing = nn.Linear(5, 4), nn.Linear(4, 3), mixing

    def forward(self, x):
        h = self.a(x.transpose(0, 1))  # positions first: the rows must be asked for
        h = Opaque.apply(3e6 * h) - Opaque.apply(2999999.0 * h)
        return self.b(torch.tanh(h - h.mean(1, keepdim=True) if self.mixing else h).mean(0))


@pytest.mark.parametrize("mixing", [False, True])
def test_rows_whose_gradients_cancel_are_known_by_halves(mixing):
    """Rounding hid the codes: a layer of one row per example was called one of several."""
    torch.manual_seed(0)
    x, y = torch.randn(64, 2, 5), torch.arange(64) % 3
    found = fl.capture(Cancelling(mixing), nn.CrossEntropyLoss(), x, y, fisher_type="empirical")
    assert ("a" in found) is not mixing
    if mixing:
        assert "not one example each" in found.report.skipped["a"]


def test_buffers_and_flags_of_a_scripted_module_come_back():
    with warnings.catch_warnings(action="ignore"):
        scripted = torch.jit.script(Counting().double())
    model, (x, _) = nn.Sequential(scripted, nn.BatchNorm1d(3)).double(), batch()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with isolated(model, x):
        model(x)
        assert not torch.equal(scripted.ema, before["0.ema"])
        model.eval()
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert all(module.training for module in model.modules())
