"""Models, losses and batches as users bring them: each works, or the message names the cause."""

import copy
import re
from collections import UserDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from references import randn
from torch import nn

import fisherlab as fl
from fisherlab.extract import CaptureError, capture

N, CE = 6, nn.CrossEntropyLoss()
X, Y = randn(N, 5, seed=1), torch.arange(N) % 3


def net(outputs=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, outputs)).double()


def gradients(loss, *parameters):
    """Of each example's loss `loss(n)`, `[n, numbers]`, one example at a time."""
    rows = []
    for n in range(N):
        parts = torch.autograd.grad(loss(n), parameters)
        rows.append(torch.cat([part.reshape(len(parameters[0]), -1) for part in parts], 1))
    return torch.stack(rows)


def off(layer, expected):
    """How far the captured per-example gradients are from `[n, o, i]`, relative."""
    return float((layer.per_example_gradients()[0] - expected).norm() / expected.norm())


def state(model):
    tensors = {k: (v.dtype, v.clone()) for k, v in model.state_dict().items()}
    return tensors, [m.training for m in model.modules()]


def same(one, two):
    (a, flags), (b, others) = one, two
    return flags == others and all(
        a[k][0] == b[k][0] and torch.equal(a[k][1], b[k][1]) for k in a.keys() | b.keys()
    )


# Precision ------------------------------------------------------------------------------------


class Adapter(nn.Module):
    """A frozen bfloat16 map with a float32 low-rank addition and head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.Linear(5, 4).bfloat16().requires_grad_(False)
        self.down, self.up = nn.Linear(5, 2, bias=False), nn.Linear(2, 4, bias=False)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        base = self.base(x.bfloat16()).float()
        return self.head(torch.tanh(base + self.up(self.down(x))))


def test_a_frozen_half_precision_base_under_float32_adapters():
    model, x = Adapter(), X.float()
    captured = capture(model, CE, x, Y, fisher_type="empirical")
    assert set(captured) == {"down", "up", "head"}
    assert captured.report.skipped["base"] == "its weight is frozen"
    for name, layer in captured.items():
        loss = lambda n: CE(model(x[n : n + 1]), Y[n : n + 1])  # noqa: E731
        expected = gradients(loss, *getattr(model, name).parameters())
        assert layer.dtype == torch.float32
        assert off(layer, expected) < 1e-5
    frame = fl.compare(model, CE, x, Y, approximations=["kfac"]).frame
    assert frame["relative_error"].notna().all()


@pytest.mark.parametrize("fisher_type", ["exact", "empirical"])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_captured_in_float32(kind, fisher_type):
    model = net().to(kind)
    wide = copy.deepcopy(model).float()
    loss = CE(model(X.to(kind)), Y)
    loss.backward(retain_graph=True)
    kept, grad, before = list(model.parameters()), model[0].weight.grad, state(model)
    captured = capture(model, CE, X.to(kind), Y, fisher_type=fisher_type)
    expected = capture(wide, CE, X.to(kind).float(), Y, fisher_type=fisher_type)
    assert "float32" in captured.report.reason
    for name in expected:
        assert torch.equal(
            captured[name].per_example_gradients(), expected[name].per_example_gradients()
        )
    weighted = nn.CrossEntropyLoss(weight=torch.ones(3).to(kind))
    again = capture(model, weighted, X.to(kind), Y, fisher_type=fisher_type)
    assert torch.equal(again["0"].gradient, captured["0"].gradient)
    assert weighted.weight.dtype == kind
    # the model, and a graph that was made before, are as they were
    assert same(before, state(model)) and model[0].weight.grad is grad
    assert all(a is b for a, b in zip(kept, model.parameters(), strict=True))
    loss.backward()


def test_half_precision_weights_of_a_model_that_casts_are_left_out_by_name():
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3).bfloat16())
    before = state(model)

    def forward(m, x):
        return m[1](m[0](x).bfloat16())

    captured = capture(model, CE, X.float(), Y, forward=forward)
    assert set(captured) == {"0"}
    assert "torch.bfloat16, and the model does not run in float32" in captured.report.skipped["1"]
    with pytest.raises(CaptureError, match="'1'.*does not run in float32"):
        capture(model, CE, X.float(), Y, forward=forward, layers=["1"])
    assert same(before, state(model))


def test_inputs_of_another_dtype_are_refused_only_if_the_model_fails_on_them():
    with pytest.raises(CaptureError, match="x is torch.float32 and the model torch.float64; conv"):
        capture(net(), CE, X.float(), Y)
    captured = capture(net(), CE, X.float(), Y, forward=lambda m, x: m(x.double()))
    expected = capture(net(), CE, X.float().double(), Y)
    for name in expected:
        assert torch.equal(
            captured[name].per_example_gradients(), expected[name].per_example_gradients()
        )


class Odd(nn.Module):
    """A weight of another kind of number in front of an ordinary head."""

    def __init__(self, weight, trainable):
        super().__init__()
        self.w = nn.Parameter(weight, requires_grad=trainable)
        self.h = nn.Linear(4, 3)

    def forward(self, x):
        return self.h(F.linear(x.to(self.w.dtype), self.w).abs().float())


@pytest.mark.parametrize("trainable", [True, False])
def test_complex_weights_are_left_out_by_name(trainable):
    model = Odd(torch.randn(4, 5, dtype=torch.cfloat), trainable)
    captured = capture(model, CE, X.float(), Y)
    assert set(captured) == {"h"}
    rows = fl.support(model, X.float()).set_index("layer")
    assert rows.loc["w", "status"] == "plain gradient" and rows.loc["h", "status"] == "exact"
    if trainable:
        assert "torch.complex64" in captured.report.skipped["w"]
        with pytest.raises(CaptureError, match="'w' has no block: its weight is torch.complex64"):
            capture(model, CE, X.float(), Y, layers=["w"])
    with pytest.raises(CaptureError, match="the outputs are torch.complex64; return real"):
        capture(model, CE, X.float(), Y, forward=lambda m, x: m(x) * 1j)


def test_integer_weights_hinder_nobody():
    model = Odd(torch.ones(4, 5, dtype=torch.int8), False)
    assert set(capture(model, CE, 10 * X.float(), Y)) == {"h"}


def test_a_model_without_parameters():
    # as are the layers that torch's dynamic quantisation makes
    model = nn.Sequential(nn.Tanh())
    assert "layer" in fl.support(model, X).columns
    with pytest.raises(CaptureError, match="no trainable weight that a product uses"):
        capture(model, CE, X, Y)


# Losses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.int64, torch.bool])
def test_bce_with_whole_targets(kind):
    y = (Y[:, None] > 0).to(kind)
    with pytest.raises(CaptureError, match=r"targets are torch.*takes floating targets: y.float\("):
        capture(net(1), nn.BCEWithLogitsLoss(), X, y)


def test_a_criterion_that_fails_is_named_with_its_arguments():
    def named(*, input, target):
        return F.cross_entropy(input, target)

    named.reduction = "mean"
    with pytest.raises(CaptureError, match=r"named failed as criterion\(outputs, y\).*\(6, 3\)"):
        capture(net(), named, X, Y, fisher_type="empirical")
    with pytest.raises(CaptureError, match="criterion is None; pass a loss.*loss_scale='mean'"):
        capture(net(), None, X, Y)


class Own(nn.Module):
    """A model that returns its loss."""

    def __init__(self, reduction="mean"):
        super().__init__()
        self.net, self.reduction = net(), reduction

    def forward(self, x, labels):
        return F.cross_entropy(self.net(x), labels, reduction=self.reduction)


class Found(UserDict):
    """An output with its loss and its scores, as transformers returns."""

    loss = property(lambda self: self["loss"])
    logits = property(lambda self: self["logits"])


BATCH = {"x": X, "labels": Y}


def test_a_model_that_returns_its_loss_is_told_from_one_of_outputs():
    model = Own()
    with pytest.raises(CaptureError, match="returned one number, its loss; pass.*forward="):
        capture(model, CE, X, Y, forward=lambda m, x: m(x, Y))
    captured = capture(model, CE, X, Y, forward=lambda m, x: m.net(x))
    assert set(captured) == {"net.0", "net.2"}


@pytest.mark.parametrize(
    ("reduction", "scale"), [("mean", "mean"), ("sum", "sum"), ("none", "mean"), ("none", "sum")]
)
@pytest.mark.parametrize("check", ["full", "gradient", "off"])
def test_a_loss_inside_the_model(reduction, scale, check):
    model = Own(reduction)
    captured = capture(model, None, BATCH, loss_scale=scale, check=check)
    assert set(captured) == {"net.0", "net.2"}
    for k in (0, 2):
        loss = lambda n: CE(model.net(X[n : n + 1]), Y[n : n + 1])  # noqa: E731
        layer = captured[f"net.{k}"]
        assert layer.fisher_type == "empirical"
        assert off(layer, gradients(loss, *model.net[k].parameters())) < 1e-12


def test_a_mean_over_tokens_inside_the_model():
    x, y = randn(N, 4, 5, seed=2), torch.arange(4 * N).reshape(N, 4) % 3
    y[:3, 1:] = -100
    model, counted = net(), int((y != -100).sum())

    def forward(m, batch):
        scores = m(batch["x"]).transpose(1, 2)
        return Found(loss=F.cross_entropy(scores, batch["labels"]), logits=scores)

    def loss(n):
        scores = model(x[n : n + 1]).transpose(1, 2)
        return F.cross_entropy(scores, y[n : n + 1], reduction="sum") * N / counted

    batch = {"x": x, "labels": y}
    captured = capture(model, None, batch, loss_scale="mean", forward=forward)
    assert off(captured["0"], gradients(loss, *model[0].parameters())) < 1e-12
    # the same object has the outputs for a criterion
    assert set(capture(model, CE, batch, y, forward=forward)) == {"0", "2"}
    with pytest.raises(CaptureError, match="no sum over examples"):
        capture(model, None, batch, loss_scale="sum", forward=forward)


def interacting(m, b):
    f = m.net(b["x"])
    return F.cross_entropy(f, b["labels"]) + f.mean(0).square().sum()


def turned(m, b):
    return F.cross_entropy(m.net(b["x"].flip(0)), b["labels"].flip(0))


def time_first(m, b):
    f = m.net(b["x"].expand(4, *b["x"].shape) * torch.arange(1, 5)[:, None, None])
    return F.cross_entropy(f.mean(0), b["labels"])


@pytest.mark.parametrize("forward", [interacting, turned, time_first])
def test_a_number_whose_rows_are_not_the_examples_has_no_block(forward):
    with pytest.raises(CaptureError, match="rows are not.*return the loss of every example"):
        capture(Own(), None, BATCH, loss_scale="mean", forward=forward)


@pytest.mark.parametrize(("reduction", "scale"), [("mean", "sum"), ("sum", "mean")])
def test_a_wrong_statement_of_the_scale_is_refused(reduction, scale):
    with pytest.raises(CaptureError, match=f"own loss is no {scale} over examples: half of the"):
        capture(Own(reduction), None, BATCH, loss_scale=scale)


@pytest.mark.parametrize("alone", range(N))
def test_a_scale_is_proven_by_the_examples_that_have_a_gradient(alone):
    """All labels but one are ignored; either half of the batch may hold that one."""
    batch = BATCH | {"labels": torch.where(torch.arange(N) == alone, Y, -100)}

    def losses(m, b):
        return F.cross_entropy(m.net(b["x"]), b["labels"], reduction="none")

    with pytest.raises(CaptureError, match="no mean over examples: half of the batch"):
        capture(Own(), None, batch, loss_scale="mean", forward=lambda m, b: losses(m, b).sum())
    with pytest.raises(CaptureError, match="no sum over examples: half of the batch"):
        capture(Own(), None, batch, loss_scale="sum", forward=lambda m, b: losses(m, b).mean())
    model, options = Own(), {"loss_scale": "mean", "forward": lambda m, b: losses(m, b).mean()}
    layers = capture(model, None, batch, **options)
    (gradient,) = torch.autograd.grad(losses(model, batch).mean(), model.net[0].weight)
    assert torch.allclose(layers["net.0"].gradient[:, :-1], gradient)


def test_the_largest_loss_of_a_batch_is_no_sum():
    def forward(m, b):
        return F.cross_entropy(m.net(b["x"]), b["labels"], reduction="none").max()

    with pytest.raises(CaptureError, match="half the batch gives them other gradients"):
        capture(Own(), None, BATCH, loss_scale="sum", forward=forward)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_scale": "average"}, "unknown loss_scale 'average'; one of mean, sum"),
        ({"loss_scale": "mean", "fisher_type": "exact"}, "empirical Fisher"),
        ({"loss_scale": "mean", "backend": "backpack"}, "empirical Fisher of the hooks backend"),
        ({"loss_scale": "mean", "criterion": CE}, "pass None as criterion"),
        ({"loss_scale": "mean", "y": Y}, "leave y out"),
    ],
)
def test_what_does_not_go_with_a_loss_inside_the_model(options, message):
    options = {"criterion": None} | options
    with pytest.raises(CaptureError, match=message):
        capture(Own(), x=BATCH, **options)
    with pytest.raises(CaptureError, match=r"own loss has shape \(6, 3\) for 6 examples"):
        capture(Own(), None, BATCH, loss_scale="mean", forward=lambda m, b: m.net(b["x"]))


def test_compare_takes_a_loss_inside_the_model():
    def errors(model, criterion, *batch, **options):
        table = fl.compare(model, criterion, *batch, approximations=["kfac", "tkfac"], **options)
        return table.frame["relative_error"].to_numpy()

    expected = errors(Own().net, CE, X, Y, fisher_type="empirical")
    for reduction, scale in (("mean", "mean"), ("sum", "sum"), ("none", "mean")):
        found = errors(Own(reduction), None, BATCH, loss_scale=scale)
        np.testing.assert_allclose(found, expected, rtol=1e-10)
    halves = [{k: v[s] for k, v in BATCH.items()} for s in (slice(0, 2), slice(2, N))]
    found = errors(Own("none"), None, halves, loss_scale="mean")
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    with pytest.raises(ValueError, match="several batches have no common mean as numbers"):
        errors(Own("mean"), None, halves, loss_scale="mean")


# Models ---------------------------------------------------------------------------------------


class Under(nn.Module):
    """A body under a guard, and a head outside it."""

    def __init__(self, guard, whole=False):
        super().__init__()
        self.n, self.h, self.guard, self.whole = net(4), nn.Linear(4, 3).double(), guard, whole

    def forward(self, x):
        with self.guard():
            hidden = self.n(x)
            if self.whole:
                return self.h(hidden)
        return self.h(hidden.clone())


def test_outputs_without_a_graph():
    cause = "outputs carry no graph: forward detaches them"
    with pytest.raises(CaptureError, match=cause):
        capture(net(), CE, X, Y, forward=lambda m, x: m(x).detach())
    for guard in (torch.no_grad, torch.inference_mode):
        with pytest.raises(CaptureError, match=f"{cause}.*without a graph: h, h.bias, n.0"):
            capture(Under(guard, whole=True), CE, X, Y)


def test_layers_under_no_grad_are_left_out_for_that_reason():
    model = Under(torch.no_grad)
    captured = capture(model, CE, X, Y)
    assert set(captured) == {"h"}
    rows = fl.support(model, X).set_index("layer")
    for name in ("n.0", "n.0.bias", "n.2"):
        assert "no graph (no_grad" in captured.report.skipped[name]
        assert "no graph (no_grad" in rows.loc[name, "reason"]


@pytest.mark.parametrize("lazy", [lambda: nn.LazyLinear(3), lambda: nn.LazyBatchNorm1d()])
def test_lazy_layers_are_refused_and_stay_as_they_are(lazy):
    model = nn.Sequential(nn.Linear(5, 3), lazy()).eval()
    draws = torch.get_rng_state()
    for call in (
        lambda: capture(model, CE, X.float(), Y),
        lambda: fl.compare(model, CE, X.float(), Y),
        lambda: fl.support(model, X.float()),
    ):
        with pytest.raises(CaptureError, match=r"'1.*not initialised.*call the model once"):
            call()
    assert any(nn.parameter.is_lazy(p) for p in model.parameters())
    assert torch.equal(draws, torch.get_rng_state())


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_zero_width_layers_are_left_out():
    model = net().append(nn.Linear(3, 0).double()).append(nn.Linear(0, 3).double())
    captured = capture(model, CE, X, Y)
    assert set(captured) == {"0", "2", "4.bias"}
    assert captured.report.skipped["3"] == "its weight has no entries, shape (0, 3)"
    rows = fl.support(model, X).set_index("layer")
    assert rows.loc["4", "reason"] == "its weight has no entries, shape (3, 0)"
    with pytest.raises(CaptureError, match="'4' has no block: its weight has no entries"):
        capture(model, CE, X, Y, layers=["4"])


class Two(nn.Module):
    """Two outputs, as of an actor and a critic."""

    def __init__(self):
        super().__init__()
        self.n = net()

    def forward(self, x):
        return self.n(x), x


def test_a_model_of_several_outputs():
    with pytest.raises(CaptureError, match="the model returned tuple.*forward=lambda"):
        capture(Two(), CE, X, Y)
    assert set(capture(Two(), CE, X, Y, forward=lambda m, x: m(x)[0])) == {"n.0", "n.2"}
    assert (fl.support(Two(), X)["status"] == "exact").all()


def test_sparse_embeddings():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 5, sparse=True), nn.Flatten(), nn.Linear(10, 3)).double()
    x = torch.tensor([[0, 1], [2, 2], [3, 6], [1, 0], [5, 5], [6, 1]])
    captured = capture(model, CE, x, Y, fisher_type="empirical")
    dense = copy.deepcopy(model)
    dense[0].sparse = False
    loss = lambda n: CE(dense(x[n : n + 1]), Y[n : n + 1])  # noqa: E731
    expected = gradients(loss, dense[0].weight).mT
    assert off(captured["0"], expected) < 1e-12
    bag = nn.Sequential(nn.EmbeddingBag(7, 5, mode="sum", sparse=True), nn.Linear(5, 3))
    assert "embedding_bag" in capture(bag, CE, x, Y).report.skipped["0"]


def test_compiled_models_are_seen_as_the_python_they_were_made_of():
    plain, expected = net(), capture(net(), CE, X, Y)
    whole = torch.compile(net(), backend="eager")
    whole(X)
    own = net()
    own.compile(backend="eager")
    part = net()
    part[0] = torch.compile(part[0], backend="eager", fullgraph=True)
    for model in (whole, own, part):
        captured = capture(model, CE, X, Y)
        assert len(fl.support(model, X)) == 2
        for layer, other in zip(captured.values(), expected.values(), strict=True):
            assert torch.equal(layer.per_example_gradients(), other.per_example_gradients())
    assert torch.equal(whole(X), plain(X))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("make", [torch.jit.script, lambda m: torch.jit.trace(m, X)])
def test_scripted_modules_are_left_out_for_their_true_reason(make):
    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = make(net(5)), net()

        def forward(self, x):
            return self.b(self.a(x))

    captured = capture(Part(), CE, X, Y)
    assert set(captured) == {"b.0", "b.2"}
    assert "inside a scripted or traced module" in captured.report.skipped["a.0"]
    assert "scripted" in fl.support(Part(), X).set_index("layer").loc["a.0", "reason"]
    with pytest.raises(CaptureError, match="scripted or traced module"):
        capture(make(net()), CE, X, Y)


def test_a_forward_in_several_calls():
    model = net()
    captured = capture(
        model,
        CE,
        X,
        Y,
        fisher_type="empirical",
        forward=lambda m, x: torch.cat([m(x[:1]), m(x[1:4]), m(x[4:])]),
    )
    for k in (0, 2):
        loss = lambda n: CE(model(X[n : n + 1]), Y[n : n + 1])  # noqa: E731
        expected = gradients(loss, *model[k].parameters())
        assert off(captured[str(k)], expected) < 1e-12


# Names, labels and batches --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": "encoder.*"}, "no layer 'encoder"),
        ({"layers": []}, "layers= names no layer"),
        ({"layers": [0]}, "takes names or patterns of layers; got int"),
        ({"layers": [nn.Linear(5, 4)]}, "takes names or patterns of layers; got Linear"),
        ({"layers": "0.bias"}, "'0.bias': it is a bias of '0' and has no block of its own"),
        ({"skip": "encoder.*"}, "means no layer of this model"),
        ({"skip": "*"}, "leaves no layer to capture"),
    ],
)
def test_patterns_that_mean_nothing(options, message):
    with pytest.raises(CaptureError, match=re.escape(message)):
        capture(net(), CE, X, Y, **options)
    with pytest.raises(CaptureError, match=re.escape(message)):
        fl.compare(net(), CE, X, Y, approximations=["kfac"], **options)


def test_names_of_parameters_and_of_frozen_layers():
    model = net()
    assert set(capture(model, CE, X, Y, layers=["0.weight"])) == {"0"}
    model[0].requires_grad_(False)
    with pytest.raises(CaptureError, match=r"every layer that layers='0\*' means is frozen"):
        capture(model, CE, X, Y, layers="0*")


@pytest.mark.parametrize(
    ("y", "forward", "message"),
    [
        (F.one_hot(Y, 3), None, r"one-hot; pass class indices, y.argmax\(1\)"),
        (Y, lambda m, x: m(x)[:, 0], r"\(6,\) have no class axis"),
        (Y, lambda m, x: m(x).repeat(2, 1), "12 rows for 6 labels.*reshape them"),
    ],
)
def test_labels_that_do_not_fit(y, forward, message):
    with pytest.raises(CaptureError, match=message):
        capture(net(), CE, X, y, forward=forward)


def test_batches_of_other_types():
    expected = capture(net(), CE, X, Y)["0"].per_example_gradients()
    captured = capture(net(), CE, UserDict(input=X, labels=Y))
    assert torch.equal(captured["0"].per_example_gradients(), expected)
    for batch in ((X, Y.numpy()), [X, Y.tolist()], {"input": X, "labels": Y.numpy()}):
        for measure in (capture, fl.compare):
            with pytest.raises(CaptureError, match=r"y is no tensor.*torch.as_tensor\(y\)"):
                measure(net(), CE, batch)
    with pytest.raises(CaptureError, match=r"does not take 6 arguments.*torch.stack\(x\)"):
        capture(net(), CE, list(X), Y)
    with pytest.raises(CaptureError, match=r"does not take the arguments \['x'\]"):
        capture(net(), CE, {"x": X, "labels": Y})
    data = torch.utils.data.TensorDataset(X, Y)
    with pytest.raises(ValueError, match="a loader of.*got TensorDataset"):
        fl.compare(net(), CE, data)
    with pytest.raises(CaptureError, match="loader pass one batch, or fl.compare the loader"):
        capture(net(), CE, torch.utils.data.DataLoader(data, 2))


def test_support_refuses_what_the_model_cannot_take():
    with pytest.raises(CaptureError, match=r"x is no tensor but ndarray; pass torch.as_tensor\(x"):
        fl.support(net(), X.numpy())
    with pytest.raises(CaptureError, match="x is torch.float32 and the model torch.float64"):
        fl.support(net(), X.float())
    with pytest.raises(CaptureError, match="does not take 6 arguments"):
        fl.support(net(), list(X))
    rows = fl.support(net(), X.float(), forward=lambda m, x: m(x.double()))
    assert (rows["status"] == "exact").all()


def test_support_moves_no_flag_and_no_number():
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3))
    model.train()
    model[1].eval()
    before = state(model)
    fl.support(model, X.float())
    assert same(before, state(model))
    with pytest.raises(CaptureError):
        fl.support(model, X.float().numpy())
    assert same(before, state(model))


LARGE = {"input_ids": torch.zeros(64, 64), "mask": list(range(1000))}


@pytest.mark.parametrize("argument", ["criterion", "generator", "fisher_type", "loss_scale"])
def test_a_batch_in_place_of_another_argument_is_named_in_a_few_words(argument):
    given = {"criterion": nn.CrossEntropyLoss(), argument: LARGE}
    with pytest.raises(fl.CaptureError, match=argument) as refused:
        fl.capture(nn.Linear(3, 2), x=torch.zeros(2, 3), y=torch.zeros(2).long(), **given)
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("kfac", ["nonfinite", "clip", "schedule", "fisher_type", "weight_decay_placement"]),
        ("ang", ["scope", "amplitude"]),
        ("ngd", ["scope", "form"]),
        ("fngd", ["share"]),
    ],
)
def test_an_optimizer_names_such_an_option_in_a_few_words(name, options):
    for option in options:
        with pytest.raises((TypeError, ValueError), match=option) as refused:
            fl.optim.create(name, nn.Linear(3, 2), **{option: LARGE})
        assert len(str(refused.value)) < 300, option
