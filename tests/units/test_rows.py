"""Rows find their examples, whatever is checked; passes that write, positions that cancel."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fisherlab as fl
from fisherlab.extract import CaptureError

CE, MSE = nn.CrossEntropyLoss(), nn.MSELoss()


def randn(*shape, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draw, dtype=torch.float64)


def expected(model, loss, x, y, weight):
    """The gradient of each example's own loss, by a pass of this example alone."""
    rows, leaves = range(len(x)), [weight, *model.parameters()]
    losses = [loss(model(x[n : n + 1].clone()), y[n : n + 1]) for n in rows]
    return torch.stack([torch.autograd.grad(each, leaves)[0] for each in losses])


def at_labels(layer):
    return torch.einsum("nto,nti->noi", layer.label_gradients, layer.inputs)


class LowRank(nn.Module):
    """Its one row `u V` serves every example."""

    def __init__(self, seed):
        super().__init__()
        self.u, self.v = nn.Parameter(randn(1, 2, seed=seed)), nn.Parameter(randn(2, 1, seed=9))

    def forward(self, x):
        return F.linear(x, self.u @ self.v)


@pytest.mark.parametrize("n", [2, 3, 5])
def test_a_row_that_several_examples_make_is_none_of_them(n):
    # of one feature: the sum of codes is the code of an example in one of 25 cases, by chance
    for seed in range(25):
        x, y = randn(n, 1, seed=seed), randn(n, 1, seed=seed + 99)
        with pytest.raises(CaptureError, match="one row serves several examples"):
            fl.capture(LowRank(seed), MSE, x, y, layers=["v"])


class Attention(nn.Module):
    """torch's own, which multiplies `[t, n, d]`."""

    def __init__(self, t):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.last, self.t = nn.Linear(4, 3), t

    def forward(self, x):
        h = x.view(len(x), self.t, 4)
        return self.last(self.attention(h, h, h)[0][:, 0])


def attention(t=3):
    torch.manual_seed(0)
    return Attention(t).double()


@pytest.mark.parametrize("check", ["full", "gradient", "off"])
def test_as_many_positions_as_examples_at_any_check(check):
    model, x, y = attention(), randn(3, 12), torch.arange(3)
    layer = fl.capture(model, CE, x, y, check=check)["attention.in_proj_weight"]
    true = expected(model, CE, x, y, model.attention.in_proj_weight)
    assert (at_labels(layer)[..., :4] - true).norm() < 1e-12 * true.norm()


class FirstStep(nn.Module):
    """Time in front, and only its first step is read."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x.view(len(x), 3, 4).transpose(0, 1)))[0])


def test_labels_that_send_nothing_back_prove_nothing():
    # two of three examples are fitted: the rows of the first step look like those of example 0
    torch.manual_seed(0)
    model, x = FirstStep().double(), randn(3, 12)
    y = model(x).detach()
    y[0] += 1
    layer = fl.capture(model, MSE, x, y, fisher_type="exact")["first"]
    weight = model.first.weight
    columns = [expected(model, lambda f, _, k=k: f[0, k], x, y, weight) for k in range(2)]
    true, found = torch.stack(columns).flatten(2), layer.per_example_gradients()[..., :4].flatten(2)
    true, found = (torch.einsum("mnp,mnq->pq", D, D) / 3 for D in (true, found))
    assert (found - true).norm() < 1e-12 * true.norm()


@pytest.mark.parametrize("wrapped", [lambda x: x, lambda x: (x,), lambda x: {"input": x}])
def test_a_model_that_writes_into_its_input_gets_a_copy(wrapped):
    torch.manual_seed(0)
    model = nn.Sequential(nn.SiLU(inplace=True), nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    model, x, y = model.double(), randn(5, 3), torch.arange(5) % 2
    before, batch = x.clone(), wrapped(x)
    true = expected(model, CE, x, y, model[1].weight)
    for _ in range(2):
        layer = fl.capture(model, CE, batch, y)["1"]
        assert (at_labels(layer)[..., :3] - true).norm() < 1e-12 * true.norm()
    one = fl.compare(model, CE, batch, y, approximations=["kfac"]).frame
    two = fl.compare(model, CE, batch, y, approximations=["kfac"], layers_at_once=1).frame
    assert one.relative_error.tolist() == pytest.approx(two.relative_error.tolist(), rel=1e-12)
    assert torch.equal(x, before)


@pytest.mark.parametrize("role", ["outputs", "labels"])
def test_a_criterion_that_writes_is_refused_and_nothing_is_written(role):
    def loss(outputs, y):
        changed = outputs if role == "outputs" else y
        changed -= 1
        return F.cross_entropy(outputs, y)

    loss.reduction = "mean"
    y = torch.tensor([1, 1, 1])
    with pytest.raises(CaptureError, match=f"writes into the {role}.*out of place"):
        fl.capture(nn.Linear(3, 2).double(), loss, randn(3, 3), y, fisher_type="empirical")
    assert y.tolist() == [1, 1, 1]


class Scaled(torch.autograd.Function):
    """Arguments that are no tensors, on both sides of the one that is."""

    @staticmethod
    def forward(ctx, before, x, after):
        ctx.by = before * after
        return x * ctx.by

    @staticmethod
    def backward(ctx, g):
        return None, g * ctx.by, None


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.last(torch.tanh(Scaled.apply(2.0, self.first(x), 0.25)))


def test_a_function_of_ones_own_with_numbers_has_a_slope():
    torch.manual_seed(0)
    model, x, y = Custom().double(), randn(5, 3), torch.arange(5) % 2
    layer = fl.capture(model, CE, x, y)["first"]
    true = expected(model, CE, x, y, model.first.weight)
    assert (at_labels(layer)[..., :3] - true).norm() < 1e-12 * true.norm()
    slope = 0.5 * (1 - torch.tanh(0.5 * model.first(x)) ** 2)
    assert layer.activation_slope == pytest.approx(slope.mean().item(), rel=1e-12)


def test_a_backward_pass_that_is_not_there_is_named():
    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.tanh()

    class Model(nn.Linear):
        def forward(self, x):
            return Forward.apply(super().forward(x))

    with pytest.raises(CaptureError, match="a backward pass of the model fails.*must implement"):
        fl.capture(Model(3, 2), CE, randn(5, 3).float(), torch.arange(5) % 2)


def test_an_embedding_scaled_by_frequency_has_no_block_even_without_a_proof():
    words = nn.Embedding(5, 3, scale_grad_by_freq=True)
    model = nn.Sequential(words, nn.Flatten(), nn.Linear(6, 2))
    x = torch.tensor([[0, 1], [2, 2]])
    for check in ("full", "off"):
        captures = fl.capture(model, CE, x, torch.tensor([0, 1]), check=check)
        assert [*captures] == ["2"]
        assert "used by embedding, no product" in captures.report.skipped["0"]


def test_scores_in_the_last_axis_behind_batch_norm():
    # its kernel on the CPU misreads a gradient whose strides are those of classes in front
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, (1, 2)), nn.BatchNorm2d(2, affine=False), nn.Softplus())
    model, x = model.double().eval(), randn(3, 1, 1, 5)
    y, weight = torch.arange(6).view(3, 2, 1) % 4, torch.tensor([1.2, 0.1, 1.9, 1.1]).double()
    layer = fl.capture(model, nn.CrossEntropyLoss(weight=weight), x, y)["0"]

    def loss(f, labels):
        scores = f.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
        return -3 * (scores * weight[labels]).sum() / weight[y].sum()

    true = expected(model, loss, x, y, model[0].weight).flatten(2)
    assert (at_labels(layer)[..., :2] - true).norm() < 1e-12 * true.norm()


@pytest.mark.parametrize("groups", [1, 2])
def test_group_norm_of_channels_last(groups):
    # its kernel on the CPU ends the process where the gradient of the weight alone is asked for
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 2, 2), nn.GroupNorm(groups, 2), nn.Flatten(), nn.Linear(8, 2)
    )
    model, x, y = model.double(), randn(3, 1, 3, 3), torch.tensor([0, 1, 1])
    batch = x.to(memory_format=torch.channels_last)
    model[0].register_forward_hook(lambda _, __, h: h.contiguous(memory_format=torch.channels_last))
    layer = fl.capture(model, CE, batch, y, kinds=["factors"])["1"]
    true = expected(model, CE, x, y, model[1].weight)
    assert (at_labels(layer)[..., 0] - true).norm() < 1e-12 * true.norm()


def test_backpack_behind_an_operation_that_is_no_module():
    class Unflatten(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(2, 6), nn.Flatten()

        def forward(self, x):
            return self.last(self.first(x).unflatten(1, (3, 2)))

    y = torch.zeros(2, 6, dtype=torch.float64)
    with pytest.raises(CaptureError, match=r"'first' have shape \(7, 2, 3, 2\).*backend='hooks'"):
        fl.capture(Unflatten().double(), MSE, randn(2, 2), y, backend="backpack")


def test_the_mean_input_of_calls_of_which_one_adds_the_bias():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.map, self.last = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x):
            return self.last(F.linear(torch.tanh(self.map(x)), self.map.weight.T))

    torch.manual_seed(0)
    layer = fl.capture(Tied().double(), CE, randn(5, 3), torch.arange(5) % 2)["map"]
    a, g = layer.inputs.mean((0, 1)), layer.label_gradients.sum(1).mean(0)
    assert torch.allclose(layer.mean_input_sum / 5, a, rtol=1e-12)
    true = torch.kron(g.outer(g), a.outer(a))
    assert (fl.Eva()(layer).dense() - true).norm() < 1e-12 * true.norm()


def cancelling(dtype):
    """Two positions nearly alike whose output gradients are opposite: `D` is `g (a_1 - a_2)`."""
    x = 3e4 * randn(6, 1, 5) + randn(6, 2, 5, seed=1)
    model = nn.Sequential(nn.Linear(5, 4, bias=False), nn.Flatten(), nn.Linear(8, 3))
    with torch.no_grad():
        model[0].weight.copy_(1e-4 * randn(4, 5, seed=2))
        W = randn(3, 4, seed=3)
        model[2].weight.copy_(torch.cat([W, -W], 1))
        model[2].bias.zero_()
    return model.to(dtype), x.to(dtype)


@pytest.mark.parametrize("name", ["tkfac", "tekfac", "shampoo", "kronecker_optimal", "dykaf"])
def test_positions_that_cancel_keep_the_digits_of_their_gradients(name):
    model, x = cancelling(torch.float32)
    capture = fl.capture(model, CE, x, torch.arange(6) % 3, layers=["0"])["0"]
    exact = capture.map(torch.Tensor.double)
    found, true = (fl.approximations.get(name)()(layer).dense() for layer in (capture, exact))
    assert (found - true).norm() < 1e-2 * true.norm()
    found, true = (fl.Exact()(layer).trace() for layer in (capture, exact))
    assert found == pytest.approx(float(true), rel=1e-2)


def test_gradients_that_are_rounding_are_noted():
    model, x = cancelling(torch.float32)
    x = x[:, :1].expand(-1, 2, -1) * torch.tensor([1.0, 1.0 + 2e-7])[:, None]
    table = fl.compare(model, CE, x, torch.arange(6) % 3, approximations=["kfac"], layers=["0"])
    assert table.frame.note.str.contains("of its gradients may be rounding: its positions").all()


def test_a_stein_loss_below_zero_is_no_number():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))
    y = torch.arange(64) % 3
    x, options = (
        randn(64, 8).float(),
        {"layers": ["0"], "approximations": ["mini_block", "nystrom"]},
    )
    for damping in (1e-7, 1e-6, 1e-1):
        frame = fl.compare(model, CE, x, y, dampings=damping, **options).frame
        for loss, note in zip(frame.stein_loss, frame.note, strict=True):
            assert loss > -1e-3 or "rounded by more than this damping" in note
