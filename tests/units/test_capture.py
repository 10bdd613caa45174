"""Captures of every kind of layer against dense autograd; the model comes back untouched."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from references import Reference, randn, relative
from torch import nn

from fisherlab import comparison, optim
from fisherlab.blocks import Outer
from fisherlab.extract import CaptureError, capture, support
from fisherlab.extract.fisher import FISHER_TYPES

# torch's own, about copies in its convolution
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")
BOTH = ("hooks", "backpack")
CE = nn.CrossEntropyLoss()


def behind(*layers, shape, classes=3, n=3):
    """The layers, flattened into a linear map to class scores, with a batch and labels."""
    torch.manual_seed(0)
    body = nn.Sequential(*layers).double().eval()
    x = randn(n, *shape)
    model = body.append(nn.Flatten()).append(nn.Linear(body(x).shape[1], classes).double())
    return model, x, torch.arange(n) % classes


def conv(layer, shape):
    """A convolution between others, so that gradients pass through it."""
    kind = type(layer)
    first = kind(shape[0], layer.in_channels, 1)
    return behind(first, nn.Tanh(), layer, nn.Sigmoid(), shape=shape)


def frozen_bias(model, x, y, name):
    model.get_submodule(name).bias.requires_grad_(False)
    return model, x, y


class Recurrent(nn.Module):
    """One map called three times, another on positions."""

    def __init__(self):
        super().__init__()
        self.map, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        h = x
        for _ in range(3):
            h = torch.tanh(self.map(h)) + x
        return self.head(h)


class Tied(nn.Module):
    """Two linear maps, one weight."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.second.weight, self.second.bias = self.first.weight, self.first.bias

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Block(nn.Module):
    """LayerNorm, GELU, a functional residual, attention of positions, keyword arguments."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(4), nn.Linear(4, 6), nn.Linear(6, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = x + self.down(input=F.gelu(self.up(self.norm(x))))
        x = (x @ x.mT).softmax(-1) @ x
        return self.head(x.mean(1))


class Overwriting(nn.Module):
    """Functional in-place activations behind the layer."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        h = self.first(x)
        return self.head(h.mul_(2.0).relu_())


def model_of(kind, *shape):
    torch.manual_seed(0)
    return kind().double(), randn(3, *shape), torch.tensor([0, 2, 1])


PADDINGS = ("zeros", "reflect", "replicate", "circular")
KINDS = {
    "linear": lambda: behind(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), shape=(4,)),
    "linear leading": lambda: behind(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2), shape=(2, 3, 3)),
    "linear no bias": lambda: behind(nn.Linear(4, 5, bias=False), nn.Tanh(), shape=(4,)),
    "frozen bias": lambda: frozen_bias(*behind(nn.Linear(4, 5), nn.Tanh(), shape=(4,)), "0"),
    "frozen conv bias": lambda: frozen_bias(*conv(nn.Conv1d(2, 3, 2), (2, 5)), "2"),
    "batch norm": lambda: behind(
        nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), shape=(2, 5, 5)
    ),
    "pools": lambda: behind(
        nn.Conv1d(1, 3, 2), nn.AvgPool1d(2), nn.LeakyReLU(), nn.AdaptiveAvgPool1d(3), shape=(1, 9)
    ),
    "pads": lambda: behind(
        nn.Linear(4, 6), nn.Unflatten(1, (2, 3, 1)), nn.ZeroPad2d(1), nn.Conv2d(2, 2, 3), shape=(4,)
    ),
    "volume": lambda: behind(
        nn.Conv3d(1, 2, 2), nn.Tanh(), nn.MaxPool3d(2, 1), nn.AvgPool3d(1), shape=(1, 3, 4, 3)
    ),
    "identities": lambda: behind(
        nn.Linear(4, 5), nn.Dropout(0.4), nn.Identity(), nn.Flatten(), nn.ELU(), shape=(4,)
    ),
    "conv1d": lambda: conv(nn.Conv1d(2, 3, 3, stride=2, padding=1, dilation=2), (2, 8)),
    "conv2d": lambda: conv(
        nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (2, 5, 4)
    ),
    "conv3d": lambda: conv(nn.Conv3d(1, 2, 2, stride=(1, 2, 1), padding=1), (1, 2, 3, 2)),
    "conv no bias": lambda: conv(nn.Conv2d(2, 3, 2, bias=False), (2, 3, 3)),
    "stride leaves a rest": lambda: conv(nn.Conv2d(1, 2, 2, stride=3), (1, 7, 6)),
    "groups 1d": lambda: conv(nn.Conv1d(4, 6, 2, groups=2), (2, 4)),
    "groups 2d": lambda: conv(nn.Conv2d(4, 2, 2, groups=2, stride=2, padding=1), (2, 3, 3)),
    "groups 3d": lambda: conv(nn.Conv3d(2, 2, 2, groups=2, bias=False), (2, 2, 3, 2)),
    "depthwise": lambda: conv(nn.Conv2d(3, 6, 3, groups=3, padding=1, dilation=2), (2, 4, 4)),
}
# what BackPACK does not take
HOOKS_ONLY = {
    "same": lambda: conv(nn.Conv2d(2, 3, (2, 3), padding="same", dilation=(1, 2)), (2, 4, 4)),
    "same 1d": lambda: conv(nn.Conv1d(2, 2, 4, padding="same"), (2, 6)),
    "valid": lambda: conv(nn.Conv2d(2, 3, 2, padding="valid"), (2, 3, 3)),
    "same circular": lambda: conv(
        nn.Conv1d(2, 2, 4, padding="same", padding_mode="circular"), (2, 6)
    ),
    "in-place relu": lambda: behind(
        nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 4), nn.ReLU(True), shape=(4,)
    ),
    "in-place relu on positions": lambda: behind(
        nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2), shape=(2, 3)
    ),
    "gelu": lambda: behind(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 4), shape=(4,)),
    "layer norm": lambda: behind(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 4), shape=(4,)),
    "called several times": lambda: model_of(Recurrent, 4),
    "tied": lambda: model_of(Tied, 4),
    "transformer": lambda: model_of(Block, 2, 4),
    "in-place functions": lambda: model_of(Overwriting, 4),
} | {
    f"{mode} {dims}d": lambda mode=mode, dims=dims: conv(
        [nn.Conv1d, nn.Conv2d, nn.Conv3d][dims - 1](1, 2, 2, padding=1, padding_mode=mode),
        (1, 3, 2, 3)[: dims + 1],
    )
    for mode in PADDINGS[1:]
    for dims in (1, 2, 3)
}
CASES = [(kind, backend) for kind in KINDS for backend in BOTH]
CASES += [(kind, "hooks") for kind in HOOKS_ONLY]


def expected_blocks(model, x, y, name, layer, fisher_type):
    name, _, group = name.partition(":")
    module = model.get_submodule(name)
    o = layer.shape[0]
    rows = (int(group) * o, (int(group) + 1) * o) if group else (None, None)
    bias = module.bias if module.bias is not None and module.bias.requires_grad else None
    reference = Reference(model, CE, x, y, module.weight, bias, rows)
    return getattr(reference, fisher_type)(), reference.gradients().mean(0)


@pytest.mark.parametrize("fisher_type", ["exact", "empirical"])
@pytest.mark.parametrize(("kind", "backend"), CASES)
def test_every_kind_of_layer_against_dense_autograd(kind, backend, fisher_type):
    model, x, y = (KINDS | HOOKS_ONLY)[kind]()
    layers = capture(model, CE, x, y, fisher_type=fisher_type, backend=backend)
    assert len(layers) > 1
    for name, layer in layers.items():
        block, gradient = expected_blocks(model, x, y, name, layer, fisher_type)
        found = Outer(layer.inputs, layer.output_gradients).dense()
        assert found.dtype == torch.float64
        assert relative(found, block) < 1e-10, name
        assert relative(layer.gradient.flatten(), gradient) < 1e-10, name


@pytest.mark.parametrize("fisher_type", FISHER_TYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_backends_agree(kind, fisher_type):
    model, x, y = KINDS[kind]()
    hooks, backpack = (
        capture(model, CE, x, y, fisher_type=fisher_type, backend=backend, kinds=("map",))
        for backend in BOTH
    )
    assert hooks.keys() == backpack.keys()
    for name, layer in hooks.items():
        for field in ("inputs", "output_gradients", "label_gradients", "outputs", "gradient"):
            one, other = getattr(layer, field), getattr(backpack[name], field)
            assert one.shape == other.shape
            assert relative(other, one) < 1e-12, (name, field)
        assert torch.allclose(layer.slopes, backpack[name].slopes, rtol=1e-14, atol=0)
        assert layer.without_slope == backpack[name].without_slope


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("kind", "backend"), CASES)
def test_the_pairs_sum_to_the_gradient_of_torch(kind, backend, reduction):
    """`sum_n sum_t g a^T = M .grad` under a mean, `.grad` under a sum."""
    model, x, y = (KINDS | HOOKS_ONLY)[kind]()
    criterion = nn.CrossEntropyLoss(reduction=reduction)
    layers = capture(model, criterion, x, y, fisher_type="empirical", backend=backend)
    criterion(model(x), y).backward()
    scale = 1 if reduction == "mean" else len(y)
    for name in {name.partition(":")[0] for name in layers}:
        module = model.get_submodule(name)
        parts = [layer.gradient for key, layer in layers.items() if key.partition(":")[0] == name]
        found = torch.cat(parts) * scale
        width = module.weight[0].numel()
        weight = module.weight.grad.reshape(len(module.weight), -1)
        assert relative(found[:, :width], weight) < 1e-12
        if module.bias is not None and module.bias.requires_grad:
            assert relative(found[:, width], module.bias.grad) < 1e-12


def test_groups_are_named_and_cover_the_layer():
    model, x, y = KINDS["depthwise"]()
    layers = capture(model, CE, x, y)
    assert list(layers) == ["0", "2:0", "2:1", "2:2", "5"]
    assert layers["2:1"].shape == (2, 10)
    assert layers["2:1"].name == "2"


def test_tied_and_repeated_layers_join_their_positions():
    model, x, y = HOOKS_ONLY["tied"]()
    layers = capture(model, CE, x, y)
    assert list(layers) == ["first", "head"]
    assert layers["first"].positions == 2
    assert capture(model, CE, x, y, layers="first")["first"].positions == 2
    model, x, y = HOOKS_ONLY["called several times"]()
    assert capture(model, CE, x, y)["map"].inputs.shape == (3, 3, 5)


@settings(max_examples=15, deadline=None)
@given(
    n=st.integers(1, 4),
    channels=st.integers(1, 2),
    groups=st.integers(1, 2),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    bias=st.booleans(),
    backend=st.sampled_from(BOTH),
)
def test_convolutions_of_any_shape(
    n, channels, groups, kernel, stride, padding, dilation, size, bias, backend
):
    assume(all(s + 2 * padding > dilation * (k - 1) for s, k in zip(size, kernel, strict=True)))
    layer = nn.Conv2d(
        groups * channels, 2 * groups, kernel, stride, padding, dilation, groups, bias
    )
    model, x, y = behind(nn.Conv2d(1, groups * channels, 1), layer, shape=(1, *size), n=n)
    layers = capture(model, CE, x, y, fisher_type="empirical", backend=backend)
    for name, captured in layers.items():
        block, gradient = expected_blocks(model, x, y, name, captured, "empirical")
        found = Outer(captured.inputs, captured.output_gradients).dense()
        assert relative(found, block) < 1e-10
        assert relative(captured.gradient.flatten(), gradient) < 1e-10


@settings(max_examples=10, deadline=None)
@given(
    n=st.integers(1, 5),
    axes=st.lists(st.integers(1, 3), max_size=3),
    width=st.integers(1, 9),
    duplicates=st.booleans(),
    backend=st.sampled_from(BOTH),
)
def test_linear_maps_over_any_axes(n, axes, width, duplicates, backend):
    """More and fewer examples than features, equal rows, a batch of one, many positions."""
    model, x, y = behind(nn.Linear(width, 3), nn.ReLU(), shape=(*axes, width), n=n)
    if duplicates:
        x, y = x[:1].expand_as(x), y[:1].expand_as(y)
    layers = capture(model, CE, x, y, backend=backend)
    for name, layer in layers.items():
        block, _ = expected_blocks(model, x, y, name, layer, "exact")
        assert relative(Outer(layer.inputs, layer.output_gradients).dense(), block) < 1e-10


@pytest.mark.parametrize("backend", BOTH)
def test_zero_gradients_give_a_zero_block(backend):
    model, x, _ = behind(nn.Linear(4, 5), nn.Tanh(), shape=(4,))
    y = model(x).detach()
    empirical = capture(model, nn.MSELoss(), x, y, fisher_type="empirical", backend=backend)
    assert all(layer.output_gradients.abs().max() == 0 for layer in empirical.values())
    exact = capture(model, nn.MSELoss(), x, y, backend=backend)
    for layer in exact.values():
        assert layer.output_gradients.abs().max() > 0
        assert layer.label_gradients.abs().max() == 0


def test_a_layer_behind_dead_units_has_a_zero_block():
    model, x, y = behind(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2), shape=(4,))
    with torch.no_grad():
        model[0].bias -= 1000
    for backend in BOTH:
        assert capture(model, CE, x, y, backend=backend)["0"].output_gradients.abs().max() == 0


def test_dict_tuple_and_object_models():
    class Scores:
        def __init__(self, logits):
            self.logits = logits

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.map = nn.Linear(4, 3)

        def forward(self, left, right):
            return Scores(self.map(left + right))

    torch.manual_seed(0)
    model, x, y = Two().double(), randn(3, 4), torch.tensor([0, 1, 2])
    one = capture(model, CE, {"left": x, "right": x}, y)["map"]
    other = capture(model, CE, (x, x), y, backend="backpack")["map"]
    assert torch.equal(one.inputs[:, 0, :4], 2 * x)
    assert relative(other.output_gradients, one.output_gradients) < 1e-14


def test_activation_slope_is_the_mean_derivative_where_the_activation_is_evaluated():
    model, x, y = behind(nn.Linear(4, 5), nn.ReLU(True), nn.Linear(5, 4), nn.Tanh(), shape=(4,))
    layers = capture(model, CE, x, y)
    s = F.linear(x, model[0].weight, model[0].bias)
    t = model[2](s.relu())
    assert layers["0"].activation_slope == (s > 0).double().mean()
    assert relative(layers["2"].activation_slope, (1 - t.tanh() ** 2).mean().detach()) < 1e-14
    assert layers["5"].activation_slope == 1
    model, x, y = HOOKS_ONLY["in-place relu on positions"]()
    slope = capture(model, CE, x, y)["0"].activation_slope
    assert slope == (F.linear(x, model[0].weight, model[0].bias) > 0).double().mean()


def test_chunks_add_up_to_the_whole():
    model, x, y = KINDS["conv2d"]()
    layer = capture(model, CE, x, y)["2"]
    whole = Outer(layer.inputs, layer.output_gradients, core=1.0).dense()
    for memory in (2_000, 4_000, 10_000, None):
        parts = list(layer.chunks(memory))
        total = sum(Outer(p.inputs, p.output_gradients, core=1.0).dense() for p in parts)
        assert relative(total, whole) < 1e-12
        assert sum(p.examples for p in parts) == pytest.approx(len(y))
    with pytest.raises(CaptureError, match="layer '2' needs .* bytes"):
        list(layer.chunks(100))


def test_flattened_positions_are_given_back_to_their_examples():
    class Flattening(nn.Module):
        def __init__(self):
            super().__init__()
            self.map, self.head = nn.Linear(4, 5), nn.Linear(10, 3)

        def forward(self, x):
            return self.head(self.map(x.reshape(-1, 4)).reshape(len(x), -1))

    model, x, y = model_of(Flattening, 2, 4)
    layer = capture(model, CE, x, y)["map"]
    assert layer.positions == 2
    assert relative(layer.inputs[..., :4], x) == 0


@pytest.mark.parametrize("batch_first", [True, False])
def test_support_counts_the_positions_that_a_capture_has(batch_first):
    """torch's attention puts the positions first, whatever the model does."""

    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.MultiheadAttention(4, 2, batch_first=batch_first)
            self.o = nn.Linear(4, 3)

        def forward(self, x):
            h = x if batch_first else x.transpose(0, 1)
            return self.o(self.a(h, h, h, need_weights=False)[0].mean(int(batch_first)))

    model, x = Attending(), torch.randn(6, 5, 4)
    table = support(model, x).set_index("layer")["positions"]
    layers = capture(model, nn.CrossEntropyLoss(), x, torch.arange(6) % 3)
    assert {name: layer.positions for name, layer in layers.items()} == table.to_dict()


def test_support_names_every_module_with_parameters():
    model, x, _ = HOOKS_ONLY["transformer"]()
    frame = support(model, x).set_index("layer")
    assert list(frame.index) == ["norm", "up", "down", "head"]
    assert frame.loc["norm", "status"] == "exact"
    assert frame.loc["up", "status"] == "exact"
    assert frame.loc["up", "positions"] == 2
    assert list(frame["compare"]) == ["skipped", "exact", "exact", "exact"]
    before = copy.deepcopy(model.state_dict())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("layer", "why"),
    [(nn.BatchNorm1d(4), "call model.eval()"), (nn.Dropout(0.5), "active Dropout")],
)
def test_support_says_that_compare_refuses_training_mode(layer, why):
    model, x, y = nn.Sequential(nn.Linear(3, 4), layer), torch.randn(5, 3), torch.arange(5) % 4
    assert model.training
    with pytest.raises(CaptureError) as refused:
        comparison.compare(model, CE, x, y)
    assert set(support(model, x)["compare"]) == {f"refused: {refused.value}"}
    assert why in str(refused.value) and model.training
    assert support(model.eval(), x)["compare"].iloc[0] == "exact"


@pytest.mark.parametrize("outputs", [20, 21])
def test_support_says_which_fisher_type_compare_takes(outputs):
    model, x = nn.Sequential(nn.Linear(3, outputs)), torch.randn(2, 3)
    (said,) = support(model, x)["compare"]
    table = comparison.compare(model, CE, x, torch.arange(2), approximations=["kfac"])
    assert said.split(",")[0] == table.frame["fisher_type"][0]
    assert said == ("exact" if outputs == 20 else "mc, 1 draw (more than 20 outputs)")


class Checkpointed(nn.Module):
    """A model that recomputes a segment in its backward pass."""

    def __init__(self, reentrant):
        super().__init__()
        self.i, self.h, self.o = nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.reentrant = reentrant

    def forward(self, x):
        def segment(z):
            return torch.tanh(self.h(z))

        z = self.i(x)
        if self.reentrant is None:
            return self.o(segment(z))
        return self.o(torch.utils.checkpoint.checkpoint(segment, z, use_reentrant=self.reentrant))


@pytest.mark.parametrize("fisher_type", FISHER_TYPES)
@pytest.mark.parametrize("check", ["full", "off"])
def test_reentrant_checkpointing_is_refused_by_its_name(fisher_type, check):
    x, y = randn(5, 4), torch.arange(5) % 3
    options = {"fisher_type": fisher_type, "check": check}
    model = Checkpointed(True).double()
    with pytest.raises(CaptureError, match=r"reentrant form.*use_reentrant=False"):
        capture(model, CE, x, y, **options)
    assert all(p.grad is None for p in model.parameters())
    found = []
    for model.reentrant in (False, None):
        found.append(capture(model, CE, x, y, **options))
    for name in ("i", "h", "o"):
        ours, theirs = (layers[name].columns.gram for layers in found)
        assert relative(ours, theirs) < 1e-14


@pytest.mark.parametrize("name", ["kfac", "ngd", "exact"])
def test_an_optimizer_refuses_reentrant_checkpointing_by_its_name(name):
    model, x, y = Checkpointed(True), torch.randn(5, 4), torch.arange(5) % 3
    optimizer = optim.create(name, model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(optim.OptimizerError, match=r"use_reentrant=False"):
        CE(model(x), y).backward()
        optimizer.step()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
