"""Padding: what a batch holds beside its real positions changes no number."""

import pytest
import torch
import torch.nn.functional as F
from references import randn, relative
from torch import nn

import fisherlab as fl
from fisherlab.blocks import Outer
from fisherlab.extract import CaptureError, capture

M, T, D, C = 6, 4, 5, 3
CE = nn.CrossEntropyLoss()
PADS = [3, 21]
LENGTHS = torch.tensor([4, 1, 2, 4, 2, 1])


class Pooled(nn.Module):
    """A mean over the real positions, with the mask inside the model."""

    def __init__(self, activation=torch.tanh):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.o, self.activation = nn.Linear(D, 4), nn.Linear(4, C), activation
        self.double()

    def forward(self, x, mask):
        hidden = self.activation(self.a(x)) * mask[..., None]
        return self.o(hidden.sum(1) / mask.sum(1, keepdim=True))


class Causal(nn.Module):
    """Scores of every token from it and those before it."""

    def __init__(self, last=False):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.o, self.last = nn.Linear(D, 4), nn.Linear(4, C), last
        self.double()

    def forward(self, x):
        f = self.o(torch.tanh(self.a(x)).cumsum(1))
        return f if self.last else f.movedim(-1, 1)


def sequences(pad=0, lengths=None):
    """Inputs, the mask and one label per example; padding is noise, not zero."""
    x = randn(M, T, D, seed=1)
    mask = torch.ones(M, T, dtype=torch.bool)
    if lengths is not None:
        mask = torch.arange(T) < lengths[:, None]
        x = torch.where(mask[..., None], x, randn(M, T, D, seed=2))
    x = torch.cat([x, 7 * randn(M, pad, D, seed=3)], 1)
    mask = torch.cat([mask, torch.zeros(M, pad, dtype=torch.bool)], 1)
    return x, mask, torch.arange(M) % C


def tokens(pad=0, lengths=LENGTHS):
    x, mask, _ = sequences(pad, lengths)
    y = torch.arange(M * x.shape[1]).view(M, -1).remainder(C)
    y[:, :T] = torch.arange(M * T).view(M, T) % C
    return x, mask, y


def block(layer):
    return Outer(layer.inputs, layer.output_gradients).dense()


def measured(table):
    """Every number of a table that is no time and no size."""
    skipped = [
        "build_seconds",
        "decompose_seconds",
        "shared_seconds",
        "solve_seconds",
        "memory_bytes",
        "formed_bytes",
        "note",
    ]
    return table.frame.drop(columns=skipped).select_dtypes("number")


# No method sees padding


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["equal", "ragged"])
def test_padding_inside_the_model_moves_no_method(lengths):
    model = Pooled()
    methods = [n for n in fl.approximations.names() if n not in ("kbfgs", "sngd")]
    tables = []
    for pad in (0, *PADS):
        x, mask, y = sequences(pad, lengths)
        table = fl.compare(model, CE, (x, mask.double()), y, approximations=methods)
        tables.append(measured(table))
    for table in tables[1:]:
        difference = (table - tables[0]).abs() / (1 + tables[0].abs())
        # eigenvectors of an empty space are no numbers of the block
        assert difference.drop(columns="diagonalisation").max().max() < 1e-8


@pytest.mark.parametrize("how", ["ignore_index", "mask"])
def test_ignored_tokens_move_no_method(how):
    model, tables = Causal(), []
    for pad in (0, *PADS):
        x, mask, y = tokens(pad)
        options = {"approximations": ["kfac", "kfac_reduce", "tkfac", "tkfac_expand", "ekfac"]}
        options["fisher_type"] = "exact"
        if how == "mask":
            options |= {"mask": mask}
        else:
            y = y.masked_fill(~mask, -100)
        tables.append(measured(fl.compare(model, CE, x, y, **options)))
    for table in tables[1:]:
        assert ((table - tables[0]).abs() / (1 + tables[0].abs())).max().max() < 1e-8


def test_factors_are_means_over_real_positions():
    model, (x, mask, y) = Pooled(), sequences(4, LENGTHS)
    layer = capture(model, CE, (x, mask.double()), y)["a"]
    means = torch.zeros(D + 1, D + 1, dtype=torch.float64)
    reduced, total = torch.zeros_like(means), torch.zeros(D + 1, dtype=torch.float64)
    literal = torch.zeros(4, 4, dtype=torch.float64)
    for n in range(M):
        a = torch.cat([x[n], torch.ones(len(x[n]), 1)], 1)[mask[n]]
        g = layer.output_gradients[:, n][:, mask[n]]
        second = a.mT @ a / len(a)
        means += second / M
        reduced += torch.outer(a.mean(0), a.mean(0)) / M
        total += a.mean(0) / M
        literal += second.trace() * torch.einsum("mto,mtp->op", g, g) / M
    G = torch.einsum("mnto,mntp->op", layer.output_gradients, layer.output_gradients) / M
    kfac, reduce = fl.KFAC()(layer), fl.KFACReduce()(layer)
    assert relative(kfac.dense(), torch.kron(G, means)) < 1e-12
    g = layer.output_gradients.sum(2)
    assert (
        relative(reduce.dense(), torch.kron(torch.einsum("mno,mnp->op", g, g) / M, reduced)) < 1e-12
    )
    assert relative(layer.mean_input_sum / M, total) < 1e-12
    assert relative(layer.input_moment / (M * layer.positions), means) < 1e-12
    # TKFAC's literal left factor, up to its trace
    left = fl.TKFACExpand()(layer).dense().view(4, D + 1, 4, D + 1).diagonal(dim1=1, dim2=3).sum(-1)
    assert relative(left / left.trace(), literal / literal.trace()) < 1e-12


@pytest.mark.parametrize("method", ["kfac", "kfac_reduce", "tkfac", "tkfac_expand", "ekfac", "eva"])
def test_one_padded_batch_is_its_batches_of_equal_length(method):
    model, (x, mask, y) = Pooled(), sequences(0, LENGTHS)
    make = fl.approximations.get(method)()
    whole = make(capture(model, CE, (x, mask.double()), y)["a"])
    parts = []
    for length in LENGTHS.unique():
        rows = LENGTHS == length
        cut = x[rows][:, :length], mask[rows][:, :length].double()
        parts.append(capture(model, CE, cut, y[rows])["a"])
    assert relative(make(*parts).dense(), whole.dense()) < 1e-10


def test_chunks_of_a_budget_are_the_whole():
    model, (x, mask, y) = Pooled(), sequences(4, LENGTHS)
    layer = capture(model, CE, (x, mask.double()), y)["a"]
    for method in ("kfac", "kfac_reduce", "tkfac_expand"):
        make = fl.approximations.get(method)()
        parts = list(layer.chunks(2000))
        assert len(parts) > 2
        assert relative(make(*parts).dense(), make(layer).dense()) < 1e-12


@pytest.mark.parametrize("method", ["kfac", "tkfac", "ekfac", "eva"])
@pytest.mark.parametrize("fisher_type", ["empirical", "exact"])
def test_the_optimizers_have_the_same_factors(method, fisher_type):
    blocks = []
    for pad in (0, *PADS):
        x, mask, y = tokens(pad)
        y = y.masked_fill(~mask, -100)
        model, criterion = Causal(), nn.CrossEntropyLoss()
        make = fl.approximations.get(method)()
        opt = fl.optim.NaturalGradient(
            model, make, criterion=criterion, fisher_type=fisher_type, lr=0.0, damping=1.0
        )
        criterion(model(x), y).backward()
        opt.step()
        blocks.append(opt.blocks()["a"].dense())
        expected = make(capture(Causal(), criterion, x, y, fisher_type=fisher_type)["a"])
        assert relative(blocks[-1], expected.dense()) < 1e-10
        opt.zero_grad()
        opt.remove()
    assert all(relative(found, blocks[0]) < 1e-10 for found in blocks[1:])


# What counts


def test_an_example_without_any_gradient_counts():
    model, (x, _, y) = Causal(), tokens(0, None)
    y[2] = -100
    layer = capture(model, CE, x, y)["a"]
    assert layer.counted is None
    a = torch.cat([x, torch.ones(M, T, 1)], 2).flatten(0, 1)
    assert relative(layer.input_moment, a.mT @ a) < 1e-12


def test_maxima_and_dead_units_of_a_convolution_count():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, C)
    ).double()
    layer = capture(model, CE, randn(M, 1, 4, 4), torch.arange(M) % C)["0"]
    assert (layer.output_gradients == 0).all(3).all(0).any()
    assert layer.counted is None


def test_a_gradient_of_the_labels_alone_counts():
    """Columns vanish where the model is certain; the loss of a wrong label does not."""
    model, (x, _, y) = Causal(), tokens(0, None)
    with torch.no_grad():
        model.o.bias += torch.tensor([0.0, 2000.0, 0.0])
    layer = capture(model, CE, x, torch.zeros_like(y).index_fill(1, torch.tensor([3]), 1))["a"]
    assert not layer.output_gradients.any()
    loss = CE(model(x), torch.zeros_like(y).index_fill(1, torch.tensor([3]), 1))
    (weight,) = torch.autograd.grad(loss, model.a.weight)
    assert relative(layer.gradient[:, :-1], weight) < 1e-10


# mask=


@pytest.mark.parametrize("fisher_type", ["exact", "mc", "empirical"])
@pytest.mark.parametrize("last", [False, True])
def test_a_mask_is_the_loss_without_masked_tokens(fisher_type, last):
    model, (x, mask, y) = Causal(last), tokens(2)
    found = capture(model, CE, x, y, mask=mask, fisher_type=fisher_type)
    expected = capture(model, CE, x, y.masked_fill(~mask, -100), fisher_type=fisher_type)
    for name in expected:
        assert relative(found[name].output_gradients, expected[name].output_gradients) < 1e-14
        assert relative(found[name].label_gradients, expected[name].label_gradients) < 1e-14
        assert found[name].term_scale == expected[name].term_scale


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_mask_of_regressed_positions_against_dense_autograd(first, reduction):
    model, (x, mask, _) = Causal(not first), tokens(3)
    outputs = model(x)
    y = randn(*outputs.shape, seed=5)
    spread = mask[:, None] if first else mask[..., None]
    Z = C * mask.sum() / M if reduction == "mean" else 1
    weight, H, E = model.a.weight, 0, 0
    for n in range(M):
        f = model(x[n : n + 1])
        terms = (f - y[n : n + 1]).square() * spread[n : n + 1]
        (D_n,) = torch.autograd.grad(terms.sum() / Z, weight, retain_graph=True)
        E = E + torch.outer(D_n.flatten(), D_n.flatten()) / M
        for value, real in zip(f.flatten(), spread[n].expand_as(f[0]).flatten(), strict=True):
            (J,) = torch.autograd.grad(value, weight, retain_graph=True)
            H = H + real * 2 * torch.outer(J.flatten(), J.flatten()) / (M * Z)
    for fisher_type, expected in (("exact", H), ("empirical", E)):
        layer = capture(
            model, nn.MSELoss(reduction=reduction), x, y, mask=mask, fisher_type=fisher_type
        )["a"]
        found = block(layer).view(4, D + 1, 4, D + 1)[:, :-1, :, :-1].reshape(4 * D, 4 * D)
        assert relative(found, expected) < 1e-10


def test_a_mask_of_a_convolution_leaves_its_positions_out():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.o = nn.Conv1d(D, 4, 1), nn.Linear(4, C)

        def forward(self, x, mask):
            h = torch.tanh(self.a(x.mT)) * mask[:, None]
            return self.o(h.sum(2) / mask.sum(1, keepdim=True))

    model, traces = Net().double(), []
    for pad in (0, 5):
        x, mask, y = sequences(pad, LENGTHS)
        layer = capture(model, CE, (x, mask.double()), y, mask=mask)["a"]
        traces.append(fl.KFAC()(layer).trace().item())
    x, mask, y = sequences(5, LENGTHS)
    linear = Pooled()
    linear.a.weight.data, linear.a.bias.data = model.a.weight.data[..., 0], model.a.bias.data
    linear.o = model.o
    expected = fl.KFAC()(capture(linear, CE, (x, mask.double()), y)["a"]).trace().item()
    assert traces == pytest.approx([expected, expected], rel=1e-12)


def test_a_model_that_uses_masked_positions_is_left_out_by_name():
    model, (x, mask, y) = Pooled(), sequences(2)
    everywhere = torch.ones_like(mask).double()
    layers = capture(model, CE, (x, everywhere), y, mask=mask)
    assert list(layers) == ["o"]
    assert "12 masked positions have a gradient" in layers.report.skipped["a"]
    with pytest.raises(CaptureError, match="layer 'a': 12 masked positions have a gradient"):
        capture(model, CE, (x, everywhere), y, mask=mask, layers=["a"])


def test_a_mask_by_name_in_dict_batches_and_loaders():
    model, batches = Pooled(), []
    for pad in (0, 3):
        x, mask, y = sequences(pad, LENGTHS)
        batches.append({"x": x, "mask": mask.long(), "labels": y})
    one = fl.compare(model, CE, batches[:1] * 2, mask="mask", approximations=["kfac"])
    two = fl.compare(model, CE, batches, mask="mask", approximations=["kfac"], reference=batches)
    error = one.frame["relative_error"] - two.frame["relative_error"]
    assert error.abs().max() < 1e-10
    with pytest.raises(ValueError, match="a mask tensor is that of one batch"):
        fl.compare(model, CE, batches, mask=batches[0]["mask"])
    with pytest.raises(CaptureError, match="mask 'attention_mask' names an entry"):
        fl.compare(model, CE, batches, mask="attention_mask")


def test_masks_that_cannot_be_read_are_refused():
    model, (x, mask, y) = Causal(True), tokens(1)
    for wrong, message in (
        (mask.double(), "mask is torch.float64; pass a bool tensor"),
        (mask[:, 0], "at least two axes"),
        (mask[:3], r"mask has shape \(3, 5\)"),
        (mask & False, "mask is False everywhere"),
        (mask[:, :2], "fits the positions of no layer"),
        ("mask", "names an entry of a mapping"),
    ):
        with pytest.raises(CaptureError, match=message):
            capture(model, CE, x, y, mask=wrong)
    targets = randn(M, 5, C)

    def square(f, t):
        return F.mse_loss(f, t)

    square.reduction = "mean"
    with pytest.raises(CaptureError, match="mask needs the loss terms of square"):
        capture(model, square, x, targets, mask=mask, fisher_type="empirical")
    flat = nn.Sequential(nn.Linear(D, 4), nn.Flatten(), nn.Linear(20, 5)).double()
    with pytest.raises(CaptureError, match="leave open which axes are positions"):
        capture(flat, nn.MSELoss(), x, randn(M, 5), mask=mask)


@pytest.mark.parametrize("method", ["kfac", "kfac_reduce", "tkfac_expand", "eva"])
def test_dead_positions_count_and_padding_behind_a_rectifier_does_not(method):
    """All four units of several real positions are negative; their inputs are in the factor."""
    x, mask, y = sequences(0, LENGTHS)
    blocks, weights = [], Pooled(torch.relu)
    with torch.no_grad():
        weights.a.bias -= 0.9
    dead = (weights.a(x) <= 0).all(2) & mask
    assert dead.any()
    make, criterion = fl.approximations.get(method)(), nn.CrossEntropyLoss()
    for pad in (0, *PADS):
        x, mask, y = sequences(pad, LENGTHS)
        layer = capture(weights, criterion, (x, mask.double()), y, fisher_type="empirical")["a"]
        assert torch.equal(layer.counted, mask)
        blocks.append(make(layer).dense())
        opt = fl.optim.NaturalGradient(weights, make, criterion=criterion, lr=0.0, damping=1.0)
        criterion(weights(x, mask.double()), y).backward()
        opt.step()
        assert relative(opt.blocks()["a"].dense(), blocks[-1]) < 1e-10
        opt.zero_grad()
        opt.remove()
    assert all(relative(found, blocks[0]) < 1e-10 for found in blocks)


class Heads(nn.Module):
    """A layer with three positions of its own, which are no tokens; scores of tokens, or of all."""

    def __init__(self, tokens):
        super().__init__()
        self.a, self.h, self.o = nn.Linear(D, 6), nn.Linear(2, 2), nn.Linear(6, C)
        self.tokens = tokens
        self.double()

    def forward(self, x):
        a = torch.tanh(self.a(x))
        s = self.h(a.mean(1).unflatten(1, (3, 2))).flatten(1)
        return self.o(a + s[:, None]).mT if self.tokens else self.o(a.mean(1) + s)


@pytest.mark.parametrize("tokens", [True, False])
def test_a_mask_of_another_length_fits_no_layer_by_chance(tokens):
    model, mask = Heads(tokens), torch.tensor([[True, True, False]] * M)
    x, y = randn(M, T, D), torch.arange(M * T).view(M, T) % C
    with pytest.raises(CaptureError, match=r"of no layer .* have a gradient \('h'\)"):
        capture(model, CE, x, y if tokens else y[:, 0], mask=mask)


def test_a_mask_as_wide_as_a_transposed_role_fits_nothing():
    # its unit vectors are six, one per column of the tied weight, and no positions
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(C, 6).double()

        def forward(self, x):
            return F.linear(self.words(x).cumsum(1), self.words.weight).mT

    x, mask = torch.arange(M * T).view(M, T) % C, torch.tensor([[True] * 5 + [False]] * M)
    with pytest.raises(CaptureError, match=r"\(6, 6\) fits the positions of no layer"):
        capture(Tied(), CE, x, x, mask=mask)


def test_a_layer_without_any_gradient_proves_no_mask():
    model, mask = Heads(True), torch.tensor([[True, True, False]] * M)
    x, y = randn(M, T, D), torch.arange(M * T).view(M, T) % C

    def forward(model, x):
        a = torch.tanh(model.a(x))
        return model.o(a + 0 * model.h(a.mean(1).unflatten(1, (3, 2))).flatten(1)[:, None]).mT

    with pytest.raises(CaptureError, match="fits the positions of no layer"):
        capture(model, CE, x, y, mask=mask, forward=forward)


def test_a_mask_of_means_and_variances_is_refused():
    model = nn.Sequential(nn.Linear(D, 4), nn.Softplus()).double()
    x, y = randn(M, 2, D), randn(M, 1, 4)
    mask = torch.tensor([[True, False]] * M)
    with pytest.raises(CaptureError, match="fits no axes of the loss terms of GaussianNLLLoss"):
        capture(model, nn.GaussianNLLLoss(), x, y, mask=mask)
    pixels = torch.arange(4) < torch.tensor([4, 1, 2, 4, 2, 1])[:, None]
    found = capture(model, nn.GaussianNLLLoss(), x, y, mask=pixels, fisher_type="empirical")
    f = model(x).detach().requires_grad_()
    mean, variance = f.chunk(2, 1)
    loss = 0.5 * (variance.log() + (mean - y) ** 2 / variance) * pixels[:, None]
    (expected,) = torch.autograd.grad(loss.sum() * M / pixels.sum(), f)
    slope = 1 - torch.exp(-model(x).detach())
    assert relative(found["0"].label_gradients, expected * slope) < 1e-12
