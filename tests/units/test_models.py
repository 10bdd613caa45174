"""Models: sizes, initialisation, what a capture sees of them, and refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fisherlab import models
from fisherlab.extract import capture
from fisherlab.models import ModelError

SEQUENCES = ("lstm", "transformer")
UNNORMED = ("autoencoder", "lenet", "transformer")
# The smallest of each, and one example's shape.
SMALL = {
    "mlp": ({"input_size": (1, 8, 8), "width": 0.2}, (1, 8, 8)),
    "autoencoder": ({"input_size": (1, 8, 8), "width": 0.02}, (1, 8, 8)),
    "lenet": ({"input_size": (1, 8, 8), "width": 0.2}, (1, 8, 8)),
    "vgg11": ({"input_size": (3, 8, 8), "width": 0.05}, (3, 8, 8)),
    "vgg16": ({"input_size": (3, 8, 8), "width": 0.05}, (3, 8, 8)),
    "resnet20": ({"width": 0.2}, (3, 8, 8)),
    "resnet32": ({"width": 0.2}, (3, 8, 8)),
    "resnet18": ({"width": 0.05}, (3, 8, 8)),
    "resnet34": ({"width": 0.05}, (3, 8, 8)),
    "resnet50": ({"width": 0.03}, (3, 8, 8)),
    "resnet110": ({"width": 0.1}, (3, 8, 8)),
    "lstm": ({"width": 0.03, "layers": 1}, (4,)),
    "transformer": ({"width": 0.02, "layers": 1, "heads": 2}, (8,)),
}


def small(name, **options):
    arguments, shape = SMALL[name]
    model = models.create(name, num_classes=7, **arguments | options).double().eval()
    generator = torch.Generator().manual_seed(0)
    if name in SEQUENCES:
        x = torch.randint(1, 7, (3, *shape), generator=generator)
        labels = torch.randint(7, (3, 4), generator=generator)
    else:
        x = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
        labels = torch.arange(3)
    return model, x, labels


def n_parameters(model):
    return sum(p.numel() for p in model.parameters())


def test_every_model_is_tried_here():
    assert set(SMALL) == set(models.names())


@pytest.mark.parametrize("name", SMALL)
def test_outputs_have_one_score_per_class(name):
    model, x, _ = small(name)
    expected = {"autoencoder": (3, 64), "lstm": (3, 7, 4), "transformer": (3, 7, 4)}
    assert model(x).shape == expected.get(name, (3, 7))


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("batch_norm", [True, False])
def test_a_capture_sees_every_linear_map(name, batch_norm):
    if batch_norm and name in UNNORMED:
        with pytest.raises(ModelError, match=f"{name} has no batch norm.*take lstm, mlp, resnet"):
            small(name, batch_norm=True)
        return
    model, x, labels = small(name, batch_norm=batch_norm)
    assert batch_norm == any("BatchNorm" in type(m).__name__ for m in model.modules())
    criterion = nn.CrossEntropyLoss()
    if name == "autoencoder":
        criterion, labels = nn.MSELoss(), x.flatten(1)
    layers = capture(model, criterion, x, labels, fisher_type="empirical", kinds=("map",))
    maps = {n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    assert set(layers) == maps
    gradients = torch.autograd.grad(criterion(model(x), labels), list(model.parameters()))
    by_name = dict(zip((n for n, _ in model.named_parameters()), gradients, strict=True))
    for layer in maps:
        weight = by_name[f"{layer}.weight"].flatten(1)
        got = layers[layer].gradient[:, : weight.shape[1]]
        torch.testing.assert_close(got, weight, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["mlp", "lenet", "autoencoder", "vgg11", "vgg16"])
def test_plain_models_are_sequentials_of_modules(name):
    model, _, _ = small(name)
    assert type(model) is nn.Sequential
    assert all(not list(layer.children()) for layer in model)


@pytest.mark.parametrize("name", SMALL)
def test_no_module_works_in_place_or_twice(name):
    model, x, _ = small(name)
    calls = []
    for module in model.modules():
        assert not getattr(module, "inplace", False)
        if not list(module.children()) and not isinstance(module, nn.Embedding):
            module.register_forward_hook(lambda module, *_: calls.append(module))
    model(x)
    recurrent = [m.recurrent for m in model.modules() if hasattr(m, "recurrent")]
    repeated = {m for m in calls if calls.count(m) > 1}
    assert repeated == set(recurrent)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("resnet20", 0.27),
        ("resnet32", 0.47),
        ("resnet18", 11.17),
        ("resnet50", 23.52),
        ("resnet110", 1.73),
    ],
)
def test_published_sizes(name, millions):
    assert round(n_parameters(models.create(name)) / 1e6, 2) == millions


def test_sizes_by_hand():
    lenet = models.create("lenet")
    assert [m.in_features for m in lenet if isinstance(m, nn.Linear)] == [2048, 120, 84]
    assert [m.out_channels for m in lenet if isinstance(m, nn.Conv2d)] == [16, 32]
    mnist = models.create("lenet", in_channels=1, input_size=28)
    assert mnist(torch.zeros(1, 1, 28, 28)).shape == (1, 10)
    mlp = models.create("mlp", input_size=(3, 32, 32), hidden=(512, 512))
    assert n_parameters(mlp) == 3073 * 512 + 513 * 512 + 513 * 10
    default = models.create("mlp", input_size=64)
    assert n_parameters(default) == 65 * 64 + 65 * 64 + 65 * 10
    assert n_parameters(models.create("mlp", input_size=30, num_classes=2, hidden=())) == 62
    coder = models.create("autoencoder", input_size=(1, 28, 28))
    widths = [m.out_features for m in coder if isinstance(m, nn.Linear)]
    assert widths == [1000, 500, 250, 30, 250, 500, 1000, 784]
    convolutions = [m for m in models.create("vgg16", width=0.1) if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 13


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (2, 5, 9)])
@pytest.mark.parametrize("name", ["mlp", "lenet", "vgg11", "resnet20", "autoencoder"])
def test_the_shape_of_one_example_is_enough(name, shape):
    model = models.create(name, input_size=shape, width=0.1).eval()
    assert model(torch.zeros(2, *shape)).shape[0] == 2


def test_lstm_layer_is_torchs():
    from fisherlab.models.sequence import LSTMLayer

    ours, theirs = LSTMLayer(3, 5).double(), nn.LSTM(3, 5, batch_first=True).double()
    with torch.no_grad():
        theirs.weight_ih_l0.copy_(ours.input.weight)
        theirs.weight_hh_l0.copy_(ours.recurrent.weight)
        theirs.bias_ih_l0.copy_(ours.input.bias)
        theirs.bias_hh_l0.zero_()
    x = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x)[0])


def test_attention_is_torchs():
    from fisherlab.models.sequence import Attention

    ours = Attention(8, 2).double()
    theirs = nn.MultiheadAttention(8, 2, batch_first=True).double()
    with torch.no_grad():
        maps = [ours.q, ours.k, ours.v]
        theirs.in_proj_weight.copy_(torch.cat([m.weight for m in maps]))
        theirs.in_proj_bias.copy_(torch.cat([m.bias for m in maps]))
        theirs.out_proj.load_state_dict(ours.out.state_dict())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 8, generator=generator, dtype=torch.float64)
    context = torch.randn(2, 5, 8, generator=generator, dtype=torch.float64)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    expected, _ = theirs(x, context, context, key_padding_mask=padding)
    torch.testing.assert_close(ours(x, context, padding[:, None, None, :]), expected)


def test_language_models_do_not_look_ahead():
    for name in SEQUENCES:
        model, x, _ = small(name)
        later = x.clone()
        later[:, -1] = (x[:, -1] + 1) % 6 + 1
        changed = (model(x) - model(later)).abs().amax((0, 1))
        assert changed[-1] > 0
        assert not changed[:-1].any()


def test_transformer_ignores_padding_of_the_source():
    model, x, _ = small("transformer")
    x[:, 2:4] = 0
    longer = torch.cat([x[:, :4], torch.zeros(3, 2, dtype=torch.long), x[:, 4:], x[:, -2:]], 1)
    torch.testing.assert_close(model(longer)[..., :4], model(x))
    assert torch.isfinite(model(torch.zeros_like(x))).all()


@pytest.mark.parametrize("name", SMALL)
def test_initialisation_is_the_generators_alone(name):
    def weights(seed, noise):
        torch.manual_seed(noise)
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        before = torch.get_rng_state()
        model = models.create(name, generator=generator, **SMALL[name][0])
        assert torch.equal(before, torch.get_rng_state())
        return torch.cat([p.flatten() for p in model.parameters()])

    assert torch.equal(weights(3, noise=0), weights(3, noise=1))
    assert torch.equal(weights(None, noise=0), weights(0, noise=1))
    assert not torch.equal(weights(3, noise=0), weights(4, noise=0))


def test_one_generator_makes_different_models_in_turn():
    generator = torch.Generator().manual_seed(0)
    first, second = (models.create("mlp", input_size=4, generator=generator) for _ in range(2))
    assert not torch.equal(first[1].weight, second[1].weight)


def test_weights_have_torchs_scale():
    weight = models.create("mlp", input_size=400, hidden=(300,))[1].weight
    assert weight.abs().max() <= 1 / 20
    torch.testing.assert_close(weight.std().item(), 1 / (20 * 3**0.5), rtol=0.01, atol=0)


@settings(deadline=None)  # a busy machine is no failure
@given(st.floats(0.01, 2.0), st.sampled_from(["mlp", "lenet"]))
def test_any_width_makes_a_model(width, name):
    model = models.create(name, input_size=(1, 8, 8), width=width)
    assert model(torch.zeros(1, 1, 8, 8)).shape == (1, 10)


@pytest.mark.parametrize("activation", ["tanh", "sigmoid", "gelu", "identity"])
def test_activations(activation):
    model = models.create("lenet", activation=activation)
    assert not any(isinstance(m, nn.ReLU) for m in model.modules())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "resnet_20"}, "did you mean 'resnet20'"),
        ({"name": "zzz"}, "Known: autoencoder, lenet, lstm, mlp"),
        ({"name": "mlp"}, "mlp needs input_size"),
        ({"name": "mlp", "input_size": 4, "activation": "rellu"}, "did you mean 'relu'"),
        ({"name": "mlp", "input_size": 4, "hiden": (3,)}, "did you mean 'hidden'"),
        ({"name": "lenet", "hidden": (3,)}, "unknown lenet option 'hidden'"),
        ({"name": "lenet", "widht": 2}, "did you mean 'width'"),
        ({"name": "mlp", "input_size": 4, "hidden": (3, 0)}, "hidden must hold positive"),
        ({"name": "mlp", "input_size": (1, 2, 3, 4)}, r"got \(1, 2, 3, 4\)"),
        ({"name": "mlp", "input_size": -4}, "input_size must be"),
        ({"name": "lenet", "in_channels": 1, "input_size": (2, 8, 8)}, "contradicts"),
        ({"name": "lenet", "input_size": 3}, "3 x 3 is below 4 x 4"),
        ({"name": "resnet20", "input_size": (30,)}, "takes images"),
        ({"name": "lenet", "num_classes": 0}, "num_classes must be a whole number >= 1, got 0"),
        ({"name": "lenet", "width": 0.0}, "width must be a finite number > 0"),
        ({"name": "lstm", "layers": 0}, "layers must be positive, got 0"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        models.create(**arguments)


def test_a_batch_of_odd_length_is_refused():
    with pytest.raises(ModelError, match=r"shape \(2, 5\)"):
        small("transformer")[0](torch.ones(2, 5, dtype=torch.long))
