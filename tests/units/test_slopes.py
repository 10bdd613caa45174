"""`nu` of every map against hand-written forwards: one rule for capture, optimizer, network."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from references import randn, relative
from torch import Tensor, nn
from torch.nn.utils import parametrize

import fisherlab as fl
from fisherlab.extract import CaptureError

CE = nn.CrossEntropyLoss()
Y = torch.arange(6) % 3


class Cube(torch.autograd.Function):
    """A function of the user's own, with a backward of its own."""

    @staticmethod
    def forward(ctx, s):
        ctx.save_for_backward(s)
        return s**3

    @staticmethod
    def backward(ctx, g):
        (s,) = ctx.saved_tensors
        return 3 * s**2 * g


class Swish(nn.Module):
    """`s sigmoid(beta s)`, beta learned per unit."""

    def __init__(self):
        super().__init__()
        self.beta = nn.Parameter(torch.tensor([0.5, 1.0, 1.5, 2.0]))

    def forward(self, s):
        return s * torch.sigmoid(self.beta * s)


def gelu_by_hand(s):
    return 0.5 * s * (1 + torch.tanh(math.sqrt(2 / math.pi) * (s + 0.044715 * s**3)))


# modules, in place or not, and functions
MODULES = [
    nn.ReLU(), nn.SELU(), nn.CELU(0.5), nn.ReLU6(), nn.Hardtanh(-0.5, 0.7), nn.Mish(),
    nn.Hardswish(), nn.Softsign(), nn.PReLU(4), nn.Tanhshrink(), nn.Tanh(), nn.Sigmoid(),
    nn.ELU(0.3), nn.GELU(), nn.GELU(approximate="tanh"), nn.SiLU(), nn.LeakyReLU(0.2),
    nn.Softplus(2.0), nn.LogSigmoid(), nn.Hardsigmoid(), nn.Softshrink(0.1), nn.Hardshrink(0.1),
    nn.Threshold(0.1, 0.2), nn.RReLU().eval(), Swish(),
]  # fmt: skip
IN_PLACE = [nn.ReLU(True), nn.ELU(0.3, True), nn.SiLU(True), nn.LeakyReLU(0.2, True),
            nn.Hardtanh(-0.5, 0.7, True), nn.Threshold(0.1, 0.2, True), nn.CELU(0.5, True),
            nn.Mish(True), nn.ReLU6(True)]  # fmt: skip
FUNCTIONS = {
    "torch.relu": torch.relu, "torch.tanh": torch.tanh, "torch.sin": torch.sin,
    "F.gelu": F.gelu, "F.relu_": F.relu_, "clamp": lambda s: s.clamp(min=0),
    "maximum": lambda s: torch.maximum(s, torch.zeros(())), "square": torch.square,
    "squared relu": lambda s: F.relu(s).square(), "swish": lambda s: s * torch.sigmoid(s),
    "swish in another shape": lambda s: s * torch.sigmoid(s.view(-1, 2, 2)).view_as(s),
    "gelu by hand": gelu_by_hand, "sigmoid by hand": lambda s: 1 / (1 + torch.exp(-s)),
    "by cases": lambda s: torch.where(s > 0, s, 0.3 * s), "softsign": lambda s: s / (1 + s.abs()),
    "sum of two": lambda s: F.relu(s) - 0.2 * F.relu(-s), "custom": Cube.apply,
    "scaled": lambda s: torch.tanh(0.5 * s), "tanh in place": lambda s: s.tanh_(),
    "scaled in place": lambda s: s.mul_(2).relu_(), "cos of a copy": lambda s: s.clone().cos(),
}  # fmt: skip
EVERY = {str(f): f for f in MODULES} | {f"{f} ": f for f in IN_PLACE} | FUNCTIONS


def derivative(f, z: Tensor) -> Tensor:
    """`f'(z)` by central differences, 1e-9 exact, one element at a time."""
    h = 1e-5
    with torch.no_grad():
        return (f(z + h) - f(z - h)) / (2 * h)


def slope_of(model, x, name="0", y=Y) -> float:
    return float(fl.capture(model, CE, x, y[: len(x)])[name].activation_slope)


def network_slopes(model: nn.Module, x: Tensor) -> dict[str, float]:
    """`nu` of the reconstructed network: `G = nu A` after one pass without memory."""
    twin = copy.deepcopy(model)
    fl.optim.reconstruct(twin, decay=0.0, method="eigh")
    seen = {}
    for name, (module, _) in fl.optim.sngd.local_fishers(twin).items():
        module.training = True  # with batch norms in evaluation, as the capture has them
        module.register_forward_hook(
            lambda m, a, s, name=name: seen.setdefault(name, []).append((m, a[0].detach()))
        )
    twin(x)
    found = {}
    for name, (module, fisher) in fl.optim.sngd.local_fishers(twin).items():
        if isinstance(module, nn.Linear):
            rows = torch.cat([a.reshape(-1, a.shape[-1]) for _, a in seen[name]])
        else:
            ((_, image),) = seen[name]
            options = {"padding": module.padding, "stride": module.stride}
            rows = F.unfold(image, module.kernel_size, **options).mT.flatten(0, 1)
        if module.bias is not None:
            rows = F.pad(rows, (0, 1), value=1.0)
        A = rows.mT @ rows / len(rows)
        found[name] = float(fisher.G.trace() / A.trace())
        assert relative(fisher.G, found[name] * A) < 1e-12
    return found


class Applied(nn.Module):
    """Two maps with a function in between, or whatever `join` makes of the first."""

    def __init__(self, join, width=4):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.join, self.last = nn.Linear(5, 4), join, nn.Linear(width, 3)
        self.double()

    def forward(self, x):
        return self.last(self.join(self.first(x)))


@pytest.mark.parametrize("name", EVERY)
def test_nu_is_the_mean_derivative_of_the_function_fed(name):
    f = EVERY[name]
    model, x = Applied(f), randn(6, 5)
    s = F.linear(x, model.first.weight, model.first.bias).detach()
    expected = float(derivative(lambda z: model.join(z.clone()), s).mean().detach())
    found = slope_of(model, x, "first")
    # torch's own hardsigmoid has 1/6 in float32
    assert found == pytest.approx(expected, abs=2e-8 if "Hardsigmoid" in name else 2e-9), name
    assert slope_of(model, x, "last") == 1
    network = network_slopes(model, x)
    assert network["first"] == pytest.approx(found, rel=1e-12)
    assert network["last"] == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("inplace", [False, True])
def test_outputs_are_pre_activations_whatever_follows_in_place(inplace):
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(inplace), nn.Linear(4, 3)).double()
    x = randn(6, 5)
    layer = fl.capture(model, CE, x, Y)["0"]
    expected = F.linear(x, model[0].weight, model[0].bias)
    assert relative(layer.outputs[:, 0], expected.detach()) < 1e-15
    assert (layer.outputs < 0).any()


def test_kbfgs_is_the_same_with_an_activation_in_place():
    ends = []
    for inplace in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(inplace), nn.Linear(4, 3)).double()
        optimizer = fl.optim.create("kbfgs", model)
        for k in range(6):
            x = randn(6, 5, seed=k)

            def closure(model=model, optimizer=optimizer, x=x):
                optimizer.zero_grad()
                loss = CE(model(x), Y)
                loss.backward()
                return loss

            optimizer.step(closure)
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*ends)


class RootMeanSquare(nn.Module):
    """A normalisation by hand: its square is a statistic, not what the map feeds."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor([0.5, 1.0, 2.0, 3.0]))

    def forward(self, s):
        return self.gain * s * torch.rsqrt(s.pow(2).mean(-1, keepdim=True) + 1e-5)


class BatchByHand(nn.Module):
    """Batch normalisation in evaluation, by hand."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor([0.5, 1.0, 2.0, 3.0]))
        self.shift = nn.Parameter(torch.tensor([0.1, -0.2, 0.3, 0.0]))
        self.register_buffer("mean", torch.tensor([0.3, 0.1, -0.2, 0.0]))
        self.register_buffer("var", torch.tensor([0.5, 2.0, 1.0, 0.3]))

    def forward(self, s):
        return self.gain * ((s - self.mean) / (self.var + 1e-5).sqrt()) + self.shift


NORMS = {
    "batch norm": lambda: nn.BatchNorm1d(4),
    "layer norm": lambda: nn.LayerNorm(4),
    "group norm": lambda: nn.GroupNorm(2, 4),
    "RMS norm": lambda: nn.RMSNorm(4),
    "RMS norm by hand": RootMeanSquare,
    "batch norm by hand": BatchByHand,
}


@pytest.mark.parametrize("kind", NORMS)
def test_behind_a_normalisation_the_function_is_evaluated_there(kind):
    norm = NORMS[kind]().double().eval()
    if isinstance(norm, nn.BatchNorm1d):
        norm.running_mean += randn(4, seed=3)
        norm.running_var += randn(4, seed=4).square()
    with torch.no_grad():
        for seed, p in enumerate(norm.parameters()):
            p.add_(0.3 * randn(*p.shape, seed=seed))
    model, x = Applied(nn.Sequential(norm, nn.Tanh())).eval(), randn(6, 5)
    z = norm(model.first(x)).detach()
    expected = float((1 - z.tanh() ** 2).mean().detach())
    assert slope_of(model, x, "first") == pytest.approx(expected, rel=1e-13)
    assert network_slopes(model, x)["first"] == pytest.approx(expected, rel=1e-12)


def test_after_a_residual_sum_the_function_is_that_of_the_sum():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.one, self.two = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
            self.norm, self.short, self.last = (
                nn.BatchNorm2d(3),
                nn.Conv2d(2, 3, 1),
                nn.Linear(3, 3),
            )

        def forward(self, x):
            h = self.norm(self.two(torch.relu(self.one(x))))
            h += self.short(x)
            return self.last(F.silu(h, inplace=True).mean((2, 3)))

    model, x = Residual().double().eval(), randn(6, 2, 4, 4)
    first = model.one(x)
    z = (model.norm(model.two(first.relu())) + model.short(x)).detach().requires_grad_()
    outer = float(torch.autograd.grad((z * z.sigmoid()).sum(), z)[0].mean())
    inner = float((first > 0).double().mean())
    layers = fl.capture(model, CE, x, Y)
    for name, expected in {"one": inner, "two": outer, "short": outer, "last": 1.0}.items():
        assert float(layers[name].activation_slope) == pytest.approx(expected, rel=1e-13)
    network = network_slopes(model, x)
    assert network == pytest.approx({"one": inner, "two": outer, "short": outer, "last": 1.0})


class Gated(nn.Module):
    """A GRU of two maps: the gates r and u, and a candidate whose recurrent part r scales."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.input, self.recurrent = nn.Linear(5, 12), nn.Linear(4, 12)
        self.last = nn.Linear(4, 3)

    def forward(self, x, seen=None):
        h = x.new_zeros(len(x), 4)
        for step in x.unbind(1):
            a, b, c = self.input(step).chunk(3, 1)
            d, e, f = self.recurrent(h).chunk(3, 1)
            r, u = (a + d).sigmoid(), (b + e).sigmoid()
            n = c + r * f
            if seen is not None:
                seen.append((a + d, b + e, n))
            h = (1 - u) * n.tanh() + u * h
        return self.last(h)


def test_the_gates_of_a_gru_have_a_derivative_each():
    model, x, seen = Gated().double(), randn(6, 3, 5), []
    model(x, seen)
    slopes = [
        (r.sigmoid() * (1 - r.sigmoid()), u.sigmoid() * (1 - u.sigmoid()), 1 - n.tanh() ** 2)
        for r, u, n in seen
    ]
    expected = float(torch.stack([torch.cat(each, 1) for each in slopes]).mean().detach())
    layers = fl.capture(model, CE, x, Y)
    assert float(layers["input"].activation_slope) == pytest.approx(expected, rel=1e-13)
    assert float(layers["recurrent"].activation_slope) == pytest.approx(expected, rel=1e-13)
    network = network_slopes(model, x)
    assert network["input"] == pytest.approx(expected, rel=1e-12)
    assert network["recurrent"] == pytest.approx(expected, rel=1e-12)


def lstm_slope(layer: nn.Module, x: Tensor) -> tuple[float, Tensor]:
    """`nu` of an LSTM by hand: sigmoids for i, f, o, a tanh for g; and the states `h_{t-1}`."""
    H = layer.recurrent.in_features
    h = c = x.new_zeros(len(x), H)
    slopes, states = [], []
    for t in range(x.shape[1]):
        states.append(h)
        s = layer.input(x[:, t]) + h @ layer.recurrent.weight.T
        i, f, g, o = s[:, :H], s[:, H : 2 * H], s[:, 2 * H : 3 * H], s[:, 3 * H :]
        i, f, g, o = 1 / (1 + (-i).exp()), 1 / (1 + (-f).exp()), g.tanh(), 1 / (1 + (-o).exp())
        slopes.append(torch.cat([i * (1 - i), f * (1 - f), 1 - g**2, o * (1 - o)], 1))
        c = f * c + i * g
        h = o * c.tanh()
    return float(torch.stack(slopes).mean().detach()), torch.stack(states, 1)


def test_the_gates_of_an_lstm_and_one_decay_per_batch_of_its_network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = fl.models.create("lstm", num_classes=7, width=0.02, layers=1).double()
    x = torch.randint(0, 7, (4, 6), generator=torch.Generator().manual_seed(1))
    layer = model.layers[0]
    nu, h = lstm_slope(layer, model.embedding(x))
    captured = fl.capture(model, CE, x, torch.roll(x, 1, 1))
    for name in ("layers.0.input", "layers.0.recurrent"):
        assert float(captured[name].activation_slope) == pytest.approx(nu, rel=1e-13)
    assert captured["decoder"].activation_slope == 1
    network = network_slopes(model, x)
    assert network["layers.0.input"] == pytest.approx(nu, rel=1e-12)
    assert network["layers.0.recurrent"] == pytest.approx(nu, rel=1e-12)
    fl.optim.reconstruct(model, decay=0.9)
    model(x)
    rows = h.flatten(0, 1).detach()
    expected = 0.9 * torch.eye(rows.shape[1]).double() + 0.1 * nu * rows.mT @ rows / len(rows)
    assert relative(layer.recurrent.parametrizations.weight[0].fisher.G, expected) < 1e-12


def test_a_layer_that_feeds_two_functions_has_the_mean_of_both():
    def both(s):
        return torch.cat([torch.relu(s), F.gelu(s)], 1)

    model, x = Applied(both, width=8), randn(6, 5)
    s = model.first(x).detach()
    means = [float(derivative(f, s).mean()) for f in (torch.relu, F.gelu)]
    expected = sum(means) / 2
    assert slope_of(model, x, "first") == pytest.approx(expected, abs=2e-9)
    assert network_slopes(model, x)["first"] == pytest.approx(expected, abs=2e-9)


def test_two_calls_with_different_functions_have_the_mean_of_both():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.map, self.last = nn.Linear(5, 5), nn.Linear(5, 3)

        def forward(self, x):
            return self.last(self.map(self.map(x).tanh()).sigmoid())

    model, x = Twice().double(), randn(6, 5)
    one = model.map(x).tanh()
    two = model.map(one).sigmoid()
    expected = float(torch.stack([1 - one**2, two * (1 - two)]).mean().detach())
    assert slope_of(model, x, "map") == pytest.approx(expected, rel=1e-13)
    assert network_slopes(model, x)["map"] == pytest.approx(expected, rel=1e-12)


def test_looked_through_are_shapes_pooling_slices_and_dropout():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)
    ).double()
    x = randn(6, 1, 6, 6)
    expected = float((F.max_pool2d(model[0](x), 2) > 0).double().mean().detach())
    assert slope_of(model, x) == pytest.approx(expected, rel=1e-13)
    rolled = Applied(
        lambda s: torch.stack([s[:, :2], s[:, 2:]], 1).transpose(1, 2).flatten(1).tanh()
    )
    x = randn(6, 5)
    expected = float((1 - rolled.first(x).tanh() ** 2).mean().detach())
    assert slope_of(rolled, x, "first") == pytest.approx(expected, rel=1e-13)


def test_units_that_are_sliced_away_do_not_count():
    model, x = Applied(lambda s: s[:, :3].tanh(), width=3), randn(6, 5)
    expected = float((1 - model.first(x)[:, :3].tanh() ** 2).mean().detach())
    assert slope_of(model, x, "first") == pytest.approx(expected, rel=1e-13)


def test_all_groups_of_a_convolution_have_the_layers_nu():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(4, 4, 1, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3))
    model, x = model.double(), randn(6, 4, 3)
    expected = float((1 - model[0](x).tanh() ** 2).mean().detach())
    layers = fl.capture(model, CE, x, Y)
    for k in (0, 1):
        assert float(layers[f"0:{k}"].activation_slope) == pytest.approx(expected, rel=1e-13)


def test_examples_and_their_parts_have_their_own_mean():
    model, x = Applied(torch.tanh), randn(6, 5)
    layer = fl.capture(model, CE, x, Y)["first"]
    slopes = (1 - model.first(x).tanh() ** 2).detach()
    for part in (slice(0, 2), slice(2, 6)):
        found = layer.part(part).activation_slope
        assert relative(found, slopes[part].mean()) < 1e-14


OUTPUTS = {
    "linear": lambda s: s,
    "another shape": lambda s: s.unflatten(1, (3, 1)).squeeze(2),
    "log softmax": lambda s: s.log_softmax(1),
    "a mean over positions": lambda s: torch.stack([s, s], 1).mean(1),
    "log softmax, transposed": lambda s: s.log_softmax(1).mT.contiguous().mT,
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_the_output_layer_has_the_identity(kind):
    class Classes(nn.Module):
        def __init__(self):
            super().__init__()
            self.map = nn.Linear(5, 3)

        def forward(self, x):
            return OUTPUTS[kind](self.map(x))

    assert slope_of(Classes().double(), randn(6, 5), "map") == 1


def test_an_output_behind_a_sigmoid_has_its_derivative():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 1), nn.Sigmoid()).double(), randn(6, 5)
    p = model(x).detach()
    layer = fl.capture(model, nn.MSELoss(), x, torch.rand(6, 1).double())["0"]
    assert relative(layer.activation_slope, (p * (1 - p)).mean()) < 1e-14


NOTHING = {
    "a linear map": (lambda s: s, 4, "a matrix product"),
    "dropout": (nn.Dropout().eval(), 4, "a matrix product"),
    "softmax": (lambda s: s.softmax(1), 4, "Softmax"),
    "a running sum": (lambda s: s.cumsum(1), 4, "Cumsum"),
    "a sum": (lambda s: s.sum(1, keepdim=True), 1, "Sum"),
    "its own product": (lambda s: (s[:, :, None] @ s[:, None]).flatten(1), 16, "a matrix product"),
    "glu": (lambda s: F.glu(s, 1), 2, "Glu"),
    "a gate for a half": (lambda s: s[:, :2] * s[:, 2:].sigmoid(), 2, "a matrix product"),
}


@pytest.mark.parametrize("kind", NOTHING)
def test_without_an_element_wise_function_nu_is_nan_with_a_reason(kind):
    join, width, where = NOTHING[kind]
    model, x = Applied(join, width), randn(6, 5)
    layer = fl.capture(model, CE, x, Y)["first"]
    assert torch.isnan(layer.activation_slope)
    assert layer.without_slope.startswith("layer 'first' has no slope nu: ")
    assert where in layer.without_slope
    with pytest.raises(fl.blocks.BlockError, match="layer 'first' has no slope nu"):
        fl.SNGD()(layer)


def test_a_comparison_has_a_row_of_nan_with_the_reason():
    model, x = Applied(lambda s: s), randn(6, 5)
    frame = fl.compare(model, CE, x, Y, approximations=["sngd", "kfac"]).frame
    row = frame[(frame.layer == "first") & (frame.approximation == "sngd")].iloc[0]
    assert math.isnan(row.relative_error) and math.isnan(row.cosine)
    assert "layer 'first' has no slope nu" in row.note
    others = frame[(frame.layer != "first") | (frame.approximation != "sngd")]
    assert others.relative_error.notna().all()


def test_the_optimizer_leaves_a_layer_without_nu_to_its_gradient_and_says_so():
    model, x = Applied(lambda s: s), randn(6, 5)
    plain = copy.deepcopy(model)
    optimizer = fl.optim.create("sngd", model, lr=0.1, momentum=0.0, kl_clip=None)
    with pytest.warns(UserWarning, match="take their plain gradients: layer 'first' has no slope"):
        CE(model(x), Y).backward()
    with pytest.warns(UserWarning, match="only .*% of the trainable matrices have a block"):
        optimizer.step()
    CE(plain(x), Y).backward()
    expected = plain.first.weight - 0.1 * plain.first.weight.grad
    assert relative(model.first.weight, expected) < 1e-15
    step = plain.last.weight - model.last.weight
    assert relative(step, 0.1 * plain.last.weight.grad) > 0.1
    assert list(optimizer.blocks()) == ["last"]
    optimizer.zero_grad()
    CE(model(x), Y).backward()  # said once
    optimizer.step()


def test_the_network_leaves_a_layer_without_nu_to_its_gradient_and_says_so():
    model, x = Applied(lambda s: s), randn(6, 5)
    before = model(x).detach()
    fl.optim.reconstruct(model, decay=0.0, method="eigh")
    with pytest.warns(UserWarning, match="keep G = I.*layer 'first' has no slope nu"):
        model(x)
    fl.optim.refresh(model)
    fisher = model.first.parametrizations.weight[0].fisher
    assert torch.equal(fisher.inverse, torch.eye(6).double())
    assert relative(model(x).detach(), before) < 1e-10


def test_activations_override_nu_by_layer():
    model, x = Applied(lambda s: s), randn(6, 5)
    s = model.first(x).detach()
    fl.optim.reconstruct(model, decay=0.0, activations={"first": nn.ReLU(True), "last": None})
    model(x)
    rows = F.pad(x, (0, 1), value=1.0)
    A = rows.mT @ rows / 6
    fisher = model.first.parametrizations.weight[0].fisher
    assert relative(fisher.G, (s > 0).double().mean() * A) < 1e-14
    with pytest.raises(ValueError, match="unknown layer 'fist'; did you mean 'first'"):
        fl.optim.reconstruct(Applied(torch.tanh), activations={"fist": None})


def test_a_copy_of_the_network_learns_by_itself():
    model, x = Applied(torch.tanh), randn(6, 5)
    fl.optim.reconstruct(model, decay=0.5)
    twin = copy.deepcopy(model)
    twin(x)
    G = model.first.parametrizations.weight[0].fisher.G
    assert torch.equal(G, torch.eye(6).double())
    assert not torch.equal(twin.first.parametrizations.weight[0].fisher.G, G)
    fl.optim.restore(twin)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in twin.modules())
    assert parametrize.is_parametrized(model.first, "weight")


def test_a_capture_of_the_network_is_no_training_pass():
    model, x = Applied(torch.tanh), randn(6, 5)
    fl.optim.reconstruct(model, decay=0.5)
    fisher = model.first.parametrizations.weight[0].fisher
    before = fisher.G.clone()
    with pytest.raises(CaptureError):
        fl.capture(model, CE, x, Y, layers=["nothing"])
    fl.capture(model, CE, x, Y)
    assert torch.equal(fisher.G, before)


def test_slopes_are_found_without_running_the_users_hooks():
    model, x, arrived = Applied(torch.tanh), randn(6, 5), []
    model.first.register_forward_hook(lambda m, a, s: s.register_hook(arrived.append) and None)
    fl.optim.reconstruct(model, decay=0.5)
    model(x)
    assert not arrived


def test_the_residual_network_of_the_paper_agrees_layer_by_layer():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = fl.models.create("resnet20", num_classes=3, input_size=(3, 8, 8), width=0.125)
    model, x = model.double().eval(), randn(4, 3, 8, 8)
    captured = fl.capture(model, CE, x, torch.tensor([0, 1, 2, 0]), kinds=("map",))
    network = network_slopes(model, x)
    assert network.keys() == captured.keys()
    for name, layer in captured.items():
        assert network[name] == pytest.approx(float(layer.activation_slope), rel=1e-12)
        assert (network[name] < 1) == (name != "14")


def test_in_autocast_a_node_is_asked_in_its_own_dtype():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.AvgPool2d(2), nn.Tanh(), nn.Flatten())
    model.append(nn.Linear(2, 3))
    x, y = torch.randn(4, 1, 4, 4), torch.arange(4) % 3
    expected = fl.capture(model, CE, x, y)["0"].activation_slope
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = fl.capture(model, CE, x, y)["0"].activation_slope
    assert found == pytest.approx(expected.item(), rel=2e-2)
