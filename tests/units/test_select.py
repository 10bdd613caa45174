"""Which modules have a block, and which share one: by the parameter, never by a name or a text."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import fisherlab as fl
from fisherlab.extract import CaptureError

CE = nn.CrossEntropyLoss()


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 5, generator=generator, dtype=torch.float64), torch.arange(6) % 3


class Shared(nn.Module):
    """Two calls of one weight, under names that a user chose."""

    def __init__(self, one, two):
        super().__init__()
        torch.manual_seed(0)
        self.d = nn.ModuleDict({one: nn.Linear(5, 5, bias=False), two: nn.Linear(5, 5, bias=False)})
        self.o, self.names = nn.Linear(5, 3), (one, two)
        self.d[two].weight = self.d[one].weight

    def forward(self, x):
        for name in self.names:
            x = torch.tanh(self.d[name](x))
        return self.o(x)


@pytest.mark.parametrize("names", [("a", "b"), ("it's", "b"), ("'", "''"), ("a'b'", "c")])
def test_a_name_with_quotes_loses_no_tied_call(names):
    x, y = batch()
    model = Shared(*names).double()
    layer = fl.capture(model, CE, x, y)[f"d.{names[0]}"]
    assert layer.positions == 2
    opt = fl.optim.NaturalGradient(model, fl.KFAC(), damping=1.0, lr=0.0)
    CE(model(x), y).backward()
    opt.step()
    gradient = model.d[names[0]].weight.grad
    assert (layer.gradient - gradient).norm() < 1e-12 * gradient.norm()
    assert set(opt.blocks()) == {f"d.{names[0]}", "o"}


class Scale(nn.Module):
    """A residual block with a parameter of its own and no weight."""

    def __init__(self):
        super().__init__()
        self.lin, self.gamma = nn.Linear(5, 5), nn.Parameter(torch.ones(5))

    def forward(self, x):
        return x + self.gamma * torch.tanh(self.lin(x))


class Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


def doubled():
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Linear(5, 3))
    for k in (0, 2):
        parametrize.register_parametrization(model[k], "weight", Double())
    return model


def weight_normed():
    norm = nn.utils.parametrizations.weight_norm
    return nn.Sequential(norm(nn.Linear(5, 5)), nn.Tanh(), norm(nn.Linear(5, 3)))


@pytest.mark.parametrize(
    ("make", "layers"),
    [
        (
            lambda: nn.Sequential(Scale(), Scale(), nn.Linear(5, 3)),
            ["0.gamma", "0.lin", "1.gamma", "1.lin", "2"],
        ),
        (doubled, ["0", "2", "3"]),
        (weight_normed, ["0", "2"]),
    ],
    ids=["modules without a weight", "parametrized", "weight norm"],
)
def test_modules_that_share_nothing_are_not_tied(make, layers):
    x, y = batch()
    for _ in range(3):
        model = make().double()
        captured = fl.capture(model, CE, x, y)
        assert list(captured) == layers
        assert all(layer.positions == 1 for layer in captured.values())


class Embeddings(nn.Module):
    """Two embeddings of one weight, and a head that may share it."""

    def __init__(self, tied_head):
        super().__init__()
        self.e, self.f, self.m = nn.Embedding(5, 4), nn.Embedding(5, 4), nn.Linear(4, 4)
        self.o = nn.Linear(4, 5, bias=False)
        self.f.weight = self.e.weight
        if tied_head:
            self.o.weight = self.e.weight

    def forward(self, tokens):
        return self.o(torch.tanh(self.m(self.e(tokens).mean(1) + self.f(tokens).sum(1))))


@pytest.mark.parametrize("tied_head", [False, True])
def test_a_weight_of_two_kinds_has_one_block_under_its_first_name(tied_head):
    model = Embeddings(tied_head).double()
    tokens, y = torch.arange(12).reshape(6, 2) % 5, torch.arange(6) % 5
    captured = fl.capture(model, CE, tokens, y)
    assert list(captured) == (["e", "m"] if tied_head else ["e", "m", "o"])
    assert captured.report.share == 1
    names = fl.compare(model, CE, tokens, y, approximations=["kfac"]).frame.layer
    assert set(names) == ({"m"} if tied_head else {"m", "o"})
    assert set(fl.optim.create("kfac", model).weights) == set(names)
    if tied_head:
        # any of its names will do
        assert list(fl.capture(model, CE, tokens, y, layers=["o"])) == ["e"]
    CE(model(tokens), y).backward()
    wanted = model.e.weight.grad
    layer = captured["e"]
    assert torch.allclose(layer.gradient, layer.geometry.matrix(wanted), atol=1e-14)


def test_two_convolutions_with_one_weight_have_one_block():
    one, two = nn.Conv1d(1, 1, 3, padding=1), nn.Conv1d(1, 1, 3, padding=1, stride=1)
    two.weight = one.weight
    model = nn.Sequential(nn.Unflatten(1, (1, 5)), one, two, nn.Flatten(), nn.Linear(5, 3)).double()
    x, y = batch()
    captured = fl.capture(model, CE, x, y)
    assert list(captured) == ["1", "2.bias", "4"]
    assert captured["1"].positions == 10
    CE(model(x), y).backward()
    expected = torch.cat([one.weight.grad.flatten(1), one.bias.grad[:, None]], 1)
    assert torch.allclose(captured["1"].gradient, expected, atol=1e-14)


def test_layers_and_skip_are_patterns_and_unknown_ones_are_refused():
    model, (x, y) = doubled().double(), batch()
    assert list(fl.capture(model, CE, x, y, layers="[02]")) == ["0", "2"]
    assert list(fl.capture(model, CE, x, y, skip=["2"])) == ["0", "3"]
    assert set(fl.compare(model, CE, x, y, skip="0", approximations=["kfac"]).frame.layer) == {
        "2",
        "3",
    }
    with pytest.raises(CaptureError, match=r"no layer 'enc\.\*' in this model; nearest"):
        fl.capture(model, CE, x, y, layers="enc.*")
    with pytest.raises(CaptureError, match="skip='7' means no layer"):
        fl.capture(model, CE, x, y, skip="7")
    with pytest.raises(CaptureError, match="kinds are some of map, embedding, factors; got 'map'"):
        fl.capture(model, CE, x, y, kinds="map")
