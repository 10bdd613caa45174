"""Blocks of every kind of use that a parameter has, against autograd one example at a time."""

import pytest
import torch
import torch.nn.functional as F
from test_tape import CE, TYPES, check
from torch import Tensor, nn

import fisherlab as fl

D = torch.float64


class Net(nn.Module):
    """`function(net, x)` with parameters of some shapes, between two linear maps."""

    def __init__(self, function, i=4, o=4, **shapes):
        super().__init__()
        self.function = function
        self.first, self.last = nn.Linear(5, i), nn.Linear(o, 3)
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape)))

    def forward(self, x):
        h = torch.tanh(self.function(self, torch.tanh(self.first(x))))
        return self.last(h if h.ndim == 2 else h.mean(1))


def positions(h: Tensor) -> Tensor:
    """`[n, 3, d]` from `[n, d]`."""
    return torch.stack([h, 2 * h, h.sin()], 1)


def cut(W: Tensor) -> Tensor:
    """A copy that is changed in place."""
    W = W.clone()
    W[0] = 0
    return W


HEADS = {"W": (4, 2, 3), "V": (2, 3, 4)}
MAPS = {
    "W x of columns": (lambda m, h: (m.W @ h.T).T, {"W": (4, 4)}),
    "W^T x of columns": (lambda m, h: torch.mm(m.W.T, h.T).T, {"W": (4, 4)}),
    "W x of channels": (lambda m, h: (m.W @ positions(h).mT).mT, {"W": (4, 4)}),
    "x W": (lambda m, h: torch.mm(h, m.W), {"W": (4, 4)}),
    "a stack of one": (lambda m, h: positions(h) @ m.W, {"W": (1, 4, 4)}),
    "expanded": (lambda m, h: torch.bmm(positions(h), m.W.expand(len(h), 4, 4)), {"W": (4, 4)}),
    "expanded, W x": (lambda m, h: (m.W.expand(6, 4, 4) @ positions(h).mT).mT, {"W": (4, 4)}),
    "einsum": (lambda m, h: torch.einsum("ni,io->no", h, m.W), {"W": (4, 4)}),
    "weight first": (lambda m, h: torch.einsum("oi,nti->nto", m.W, positions(h)), {"W": (4, 4)}),
    "einsum, columns": (lambda m, h: torch.einsum("ni,oi->on", h, m.W).T, {"W": (4, 4)}),
    "any axes": (lambda m, h: torch.einsum("...i,oi->...o", positions(h), m.W), {"W": (4, 4)}),
    "einsum, transposed": (lambda m, h: torch.einsum("ni,oi->no", h, m.W.T), {"W": (4, 4)}),
    "einsum, time first": (
        lambda m, h: torch.einsum("tni,io->tno", positions(h).transpose(0, 1), m.W).mean(0),
        {"W": (4, 4)},
    ),
    "einsum, heads": (
        lambda m, h: torch.einsum(
            "nthd,hde->nte", torch.tanh(torch.einsum("nti,ihd->nthd", positions(h), m.W)), m.V
        ),
        HEADS,
    ),
    "equalised": (lambda m, h: F.linear(h, m.W * 0.5), {"W": (4, 4)}),
    "negative and shifted": (lambda m, h: F.linear(h, 1 - m.W / 3), {"W": (4, 4)}),
    "scaled transpose": (lambda m, h: F.linear(h, 2 * m.W.T), {"W": (4, 4)}),
    "a copy": (lambda m, h: F.linear(h, m.W.clone()), {"W": (4, 4)}),
}  # fmt: skip
VECTORS = {
    "1 + w of a norm": (lambda m, h: F.rms_norm(h, (4,)) * (1 + m.w), {"w": (4,)}),
    "scaled factor": (lambda m, h: h * (m.w / 3), {"w": (4,)}),
    "one number": (lambda m, h: h * m.w + m.v, {"w": (), "v": (1,)}),
    "a column as factors": (lambda m, h: h * (1.0 * m.w.flatten()), {"w": (4, 1)}),
    "bias by hand": (lambda m, h: h @ h.T.detach() @ h + m.w, {"w": (4,)}),
    "subtracted": (lambda m, h: h - m.w - 2 * m.v, {"w": (4,), "v": (1, 4)}),
    "subtracted from": (lambda m, h: m.w - h, {"w": (1, 4)}),
    "in place": (lambda m, h: (2 * h).add_(m.w, alpha=0.5), {"w": (4,)}),
    "positions": (lambda m, h: positions(h) + m.w, {"w": (1, 3, 4)}),
    "positions without an axis": (lambda m, h: positions(h) + m.w, {"w": (3, 4)}),
    "some positions": (lambda m, h: positions(h) + m.w[:, 1:4], {"w": (1, 5, 4)}),
    "class token": (
        lambda m, h: torch.cat([m.w.expand(len(h), -1, -1), positions(h)], 1),
        {"w": (1, 1, 4)},
    ),
    "class vector": (
        lambda m, h: torch.cat([m.w.expand(len(h), 1, -1), positions(h)], 1),
        {"w": (4,)},
    ),
    "heads, time first": (
        lambda m, h: (
            torch.tanh(positions(h).transpose(0, 1).unflatten(2, (2, 2)) + m.w).flatten(2).mean(0)
        ),
        {"w": (2, 2)},
    ),
}
ROWS = {"one row": (1, 3), "no axis": (3,)}
LEFT_OUT = {
    "sum of two": (lambda m, h: F.linear(h, m.W + m.V), {"W": (4, 4), "V": (4, 4)}, "add"),
    "masked": (lambda m, h: F.linear(h, m.W * torch.eye(4, dtype=D)), {"W": (4, 4)}, "mul"),
    "changed copy": (lambda m, h: F.linear(h, cut(m.W)), {"W": (4, 4)}, "in place"),
    "squared": (lambda m, h: torch.einsum("ni,ij,nj->ni", h, m.W, h), {"W": (4, 4)}, "einsum"),
    "summed rows": (
        lambda m, h: h + torch.einsum("ni,io->o", h.detach(), m.W),
        {"W": (4, 4)},
        "einsum",
    ),
}


def net(function, **shapes):
    torch.manual_seed(0)
    return Net(function, **shapes).double()


def batch(n=6):
    x = torch.randn(n, 5, generator=torch.Generator().manual_seed(1), dtype=D)
    return x, torch.arange(n) % 3


@pytest.mark.parametrize("kind", [*MAPS, *VECTORS])
def test_products_and_terms(kind):
    function, shapes = (MAPS | VECTORS)[kind]
    x, y = batch()
    model = net(function, **shapes)
    if kind == "bias by hand":
        function = model.function = lambda m, h: 2 * h + m.w
    found = check(model, x, y, ["first", *shapes, "last"], share=1.0)
    assert all((found[name].geometry.in_features > 1) == (kind in MAPS) for name in shapes)


@pytest.mark.parametrize("fisher_type", TYPES)
@pytest.mark.parametrize("n", [3, 6])
@pytest.mark.parametrize("kind", ROWS)
def test_positions_of_an_embedding(kind, n, fisher_type):
    """As many positions as examples are no examples."""
    x, y = batch(n)
    model = net(lambda m, h: positions(h) + m.e(torch.arange(3).view(ROWS[kind])))
    model.e = nn.Embedding(5, 4, dtype=D)
    check(model, x, y, ["first", "e", "last"], fisher_type=fisher_type, share=1.0)


def test_a_map_of_one_row_for_all():
    x, y = batch()
    model = net(lambda m, h: positions(h) + m.p(torch.arange(12, dtype=D).view(1, 3, 4)))
    model.p = nn.Linear(4, 4, dtype=D)
    check(model, x, y, ["first", "p", "last"], share=1.0)


@pytest.mark.parametrize("kind", LEFT_OUT)
@pytest.mark.parametrize("check", ["full", "gradient", "off"])
def test_other_uses_are_left_out(kind, check):
    function, shapes, why = LEFT_OUT[kind]
    x, y = batch()
    captured = fl.capture(net(function, **shapes), CE, x, y, check=check)
    assert set(captured) == {"first", "last"}
    assert all(why in captured.report.skipped[name] for name in shapes)


FUNCTIONS = {
    "instance norm": lambda: nn.InstanceNorm1d(2, affine=True),
    "instance norm, running": lambda: nn.InstanceNorm1d(2, affine=True, track_running_stats=True),
    "prelu": lambda: nn.PReLU(),
    "prelu of channels": lambda: nn.PReLU(2),
}


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_functions_of_channels(kind):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 6), nn.Unflatten(1, (2, 3)), FUNCTIONS[kind](), nn.Flatten(), nn.Linear(6, 3)
    )
    check(model.double().eval(), *batch(), ["0", "2", "4"], share=1.0)


BIASES = {
    "of a transposed convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 5)), nn.ConvTranspose1d(1, 2, 2), nn.Flatten(), nn.Linear(12, 3)
    ),
    "of frozen weights": lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)),
    "of a norm alone": lambda: nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3)),
    "of a convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)
    ),
}


@pytest.mark.parametrize("kind", BIASES)
def test_biases_without_their_weight(kind):
    torch.manual_seed(0)
    model = BIASES[kind]().double()
    if "transposed" not in kind:
        for name, p in model.named_parameters():
            p.requires_grad_(name.endswith("bias") or "2" in name)
    if "frozen" in kind:
        model[2].weight.requires_grad_(False)
    names = [name for name in ("0.bias", "1.bias") if name in dict(model.named_parameters())]
    check(model, *batch(), names, share=1.0)


def test_the_second_bias_of_a_weight_is_a_block_of_its_own():
    torch.manual_seed(0)
    one, two = nn.Linear(5, 5), nn.Linear(5, 5)
    two.weight = one.weight
    model = nn.Sequential(one, nn.Tanh(), two, nn.Tanh(), nn.Linear(5, 3)).double()
    found = check(model, *batch(), ["0", "2.bias", "4"], share=1.0)
    assert list(found) == ["0", "2.bias", "4"]
