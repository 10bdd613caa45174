"""Optimizers on weights that no known module multiplies, and on rows in any order."""

import copy
import gc
import io
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from test_tape import Conv1D, Plain, RowByRow, TimeFirst, Tokens
from torch import nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

import fisherlab as fl

CE = nn.CrossEntropyLoss()
METHODS = ("kfac", "tekfac", "exact", "fngd", "tengrad", "ngd", "shampoo", "eva", "sngd")


def batch(n=8, width=5):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, width, generator=generator), torch.arange(n) % 3


def trained(model, name, steps=3, x=None, y=None, **options):
    """The optimizer after a few steps on one batch."""
    x, y = batch() if x is None else (x, y)
    optimizer = fl.optim.create(name, model, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        CE(model(x), y).backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("name", METHODS)
def test_single_rows_are_refused_or_left_out_by_name(name):
    model = RowByRow()
    before = copy.deepcopy(model.state_dict())
    if name == "shampoo":  # it sees gradients alone
        trained(model, name)
    elif name in ("eva", "fngd", "tengrad"):
        with pytest.warns(UserWarning, match="plain gradient"):
            optimizer = trained(model, name)
        assert set(optimizer.left_out) >= {"a", "b"}
    else:
        with pytest.raises(fl.optim.OptimizerError, match="'a' received one row without an axis"):
            trained(model, name)
        assert all(torch.equal(p, before[key]) for key, p in model.state_dict().items())


@pytest.mark.parametrize("name", METHODS)
def test_a_transposed_weight_takes_the_linear_layers_steps(name):
    torch.manual_seed(0)
    flipped = nn.Sequential(Conv1D(5, 4), nn.Tanh(), Conv1D(4, 3)).double()
    plain = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    with torch.no_grad():
        for k in (0, 2):
            plain[k].weight.copy_(flipped[k].weight.T)
            plain[k].bias.copy_(flipped[k].bias)
    x, y = batch()
    one, two = (trained(m, name, x=x.double(), y=y) for m in (flipped, plain))
    for k in (0, 2):
        assert torch.allclose(flipped[k].weight.T, plain[k].weight, rtol=0, atol=1e-12)
        assert torch.allclose(flipped[k].bias, plain[k].bias, rtol=0, atol=1e-12)
    assert list(one.weights) == list(two.weights) == ["0", "2"]
    assert one.covered_share == two.covered_share == 1


class BatchFirst(TimeFirst):
    """The same function; the steps are the second axis."""

    def forward(self, x):
        steps = x[:, None] * torch.linspace(0.5, 1.5, self.steps).to(x)[None, :, None]
        return self.b(torch.tanh(self.n(self.a(steps))).mean(1))


@pytest.mark.parametrize("steps", [3, 8])
@pytest.mark.parametrize("name", ["kfac", "ekfac", "exact", "ngd", "diagonal", "fngd", "tengrad"])
def test_time_first_takes_the_steps_of_batch_first(name, steps):
    torch.manual_seed(0)
    first = TimeFirst(steps).double()
    second = BatchFirst(steps).double()
    second.load_state_dict(first.state_dict())
    x, y = batch()
    for model in (first, second):
        trained(model, name, x=x.double(), y=y)
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=0, atol=1e-10)


class Reversed(nn.Module):
    """The rows of the first layer are the examples from the last to the first."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x.flip(0)).flip(0)))


@pytest.mark.parametrize("name", ["fngd", "tengrad"])
def test_weighted_layers_of_other_rows_are_plain_and_say_so(name):
    torch.manual_seed(0)
    model = Reversed()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        optimizer = trained(model, name, steps=1)
    assert "'a' has no block" in str(said[0].message)
    assert "not in the order of the examples" in str(said[0].message)
    assert set(optimizer.left_out) == {"a"}
    again = copy.deepcopy(model)
    x, y = batch()
    optimizer.zero_grad()
    CE(model(x), y).backward()
    CE(again(x), y).backward()
    assert torch.allclose(model.a.weight.grad, again.a.weight.grad)


def test_what_is_no_matrix_is_named_and_the_share_is_stated():
    model, x, y = Tokens(tied=False), torch.randint(7, (4, 3)), torch.arange(4)
    model.norm = nn.LayerNorm(3)
    optimizer = fl.optim.create("kfac", model)
    CE(model.norm(model(x)[:, :3]), y % 3).backward()
    assert "looked up" in optimizer.left_out["e"] and "no matrix" in optimizer.left_out["norm"]
    share = int(100 * optimizer.covered_share)
    assert f"\n{share}% of its trainable parameters have a block; plain" in repr(optimizer)


@pytest.mark.parametrize("name", ["kfac", "fngd", "shampoo"])
def test_a_head_that_is_the_embedding_is_plain_and_named(name):
    torch.manual_seed(0)
    model, x, y = Tokens(tied=True), torch.randint(7, (4, 3)), torch.arange(4)
    optimizer = fl.optim.create(name, model)
    CE(model(x), y).backward()
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        optimizer.step()
    assert list(set(optimizer.weights) - set(optimizer.left_out)) == ["a"]


def test_an_optimizer_of_plain_matrices_says_so_once():
    norm = nn.utils.parametrizations.weight_norm
    model = nn.Sequential(norm(nn.Linear(5, 4)), nn.Tanh(), norm(nn.Linear(4, 3)))
    x, y = batch()
    optimizer = fl.optim.create("kfac", model)
    CE(model(x), y).backward()
    with pytest.warns(UserWarning, match="only 0% of the trainable matrices have a block"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CE(model(x), y).backward()
        optimizer.step()
    assert optimizer.covered_share == 0


@pytest.mark.parametrize("name", ["kfac", "shampoo", "tengrad"])
def test_layers_that_join_later_get_a_block(name):
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    model[0].requires_grad_(False)
    optimizer = trained(model, name, steps=1)
    assert set(optimizer.weights) == {"2"}
    x, y = batch()

    def step():
        optimizer.zero_grad()
        CE(model(x), y).backward()
        optimizer.step()

    model[0].requires_grad_(True)
    step()
    assert set(optimizer.weights) == {"0", "2"}
    head = nn.Linear(3, 3)
    model.extend([nn.Tanh(), head])
    optimizer.add_param_group({"params": head.parameters()})
    step()
    assert set(optimizer.weights) == {"0", "2", "4"}
    if name == "kfac":
        assert set(optimizer.blocks()) == {"0", "2", "4"}


def test_layers_and_skip_choose_the_blocks():
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    assert list(trained(copy.deepcopy(model), "kfac", skip="0").blocks()) == ["2"]
    assert list(trained(copy.deepcopy(model), "kfac", layers=["0"]).blocks()) == ["0"]
    with pytest.raises(ValueError, match=r"no layer 'encoder\.\*' in this model"):
        fl.optim.create("kfac", model, layers="encoder.*")


class Flat(nn.Module):
    """The positions of all examples are the rows of one matrix, as in GPT-2's Conv1D."""

    def __init__(self, flat):
        super().__init__()
        self.flat, self.a, self.b = flat, Conv1D(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        x = torch.stack([x, 2 * x], 1)
        h = F.linear(x, self.a.weight.T, self.a.bias) if not self.flat else self.a(x)
        return self.b(torch.tanh(h)).mean(1)


@pytest.mark.parametrize("name", METHODS)
def test_folded_positions_take_the_steps_of_positions(name):
    torch.manual_seed(0)
    flat = Flat(True).double()
    other = Flat(False).double()
    other.load_state_dict(flat.state_dict())
    x, y = batch()
    for model in (flat, other):
        optimizer = trained(model, name, x=x.double(), y=y)
        assert set(optimizer.weights) == {"a", "b"} and not optimizer.left_out
    for p, q in zip(flat.parameters(), other.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=0, atol=1e-10)


class Outputs(nn.Module):
    """An actor and a critic."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.n = kind, nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))

    def forward(self, x):
        out = self.n(x)
        return {"tuple": (out, x), "dict": {"scores": out, "x": x}, "tensor": out}[self.kind]


@pytest.mark.parametrize("name", ["kfac", "fngd"])
def test_several_outputs_take_the_steps_of_one(name):
    torch.manual_seed(0)
    models = [Outputs(kind) for kind in ("tensor", "tuple", "dict")]
    x, y = batch()
    for model in models:
        model.load_state_dict(models[0].state_dict())
    start = copy.deepcopy(models[0].state_dict())
    for model in models:
        model.load_state_dict(start)
        optimizer = fl.optim.create(name, model)
        for _ in range(2):
            optimizer.zero_grad()
            out = model(x)
            out = (
                out[0] if model.kind == "tuple" else out["scores"] if model.kind == "dict" else out
            )
            CE(out, y).backward()
            optimizer.step()
    for model in models[1:]:
        for p, q in zip(models[0].parameters(), model.parameters(), strict=True):
            assert torch.equal(p, q)


@pytest.mark.parametrize("name", ["kfac", "fngd", "shampoo", "eva", "ngd"])
def test_copies_and_pickles_of_a_model_carry_no_hooks(name):
    model, (x, _) = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), batch()
    optimizer = trained(model, name)
    torch.save(model, io.BytesIO())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other(x).sum().backward()
        assert not _get_current_function_mode_stack()
        with torch.no_grad():
            assert torch.equal(other(x), model(x))
    del optimizer
    gc.collect()
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_an_exception_in_a_forward_leaves_no_tape():
    class Failing(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.fails = nn.Linear(5, 3), False

        def forward(self, x):
            out = self.a(x)
            if self.fails:
                raise ValueError("no")
            return out

    model, (x, y) = Failing(), batch()
    optimizer = trained(model, "kfac", steps=1)
    model.fails = True
    with pytest.raises(ValueError, match="no"):
        model(x)
    assert not _get_current_function_mode_stack()
    model.fails = False
    optimizer.zero_grad()
    CE(model(x), y).backward()
    optimizer.step()


def test_two_on_one_model_leave_no_tape_and_take_the_steps_of_one():
    model, twin = (nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)) for _ in range(2))
    twin.load_state_dict(model.state_dict())
    x, y = batch()
    first, second = (fl.optim.create(name, model) for name in ("kfac", "ekfac"))
    alone = fl.optim.create("kfac", twin)
    for _ in range(3):
        for net, stepping in ((model, first), (twin, alone)):
            stepping.zero_grad()
            CE(net(x), y).backward()
            assert not _get_current_function_mode_stack()
            stepping.step()
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    second.zero_grad()
    CE(model(x), y).backward()
    second.step()
    assert set(second.blocks()) == {"0", "2"}


def test_a_resumed_run_knows_the_weights_that_calls_had_shown():
    torch.manual_seed(0)
    models = [nn.Sequential(Conv1D(5, 4), nn.Tanh(), Plain(4, 3)) for _ in range(2)]
    x, y = batch()
    first = trained(models[0], "kfac", steps=2)
    second = fl.optim.create("kfac", models[1])
    models[1].load_state_dict(models[0].state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for model, optimizer in zip(models, (first, second), strict=True):
        for _ in range(2):
            optimizer.zero_grad()
            CE(model(x), y).backward()
            optimizer.step()
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(p, q)


class Decoder(nn.Module):
    """Convolutions up and down, and torch's own attention."""

    def __init__(self):
        super().__init__()
        self.c, self.t = nn.Conv1d(1, 2, 2), nn.ConvTranspose1d(2, 4, 2)
        self.m, self.o = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        h = torch.tanh(self.t(torch.tanh(self.c(x[:, None])))).mT
        return self.o(self.m(h, h, h)[0].mean(1))


@pytest.mark.parametrize("name", ["kfac", "exact", "shampoo"])
def test_transposed_convolutions_and_attention_have_blocks(name):
    torch.manual_seed(0)
    model, (x, y) = Decoder().double(), batch()
    optimizer = trained(model, name, x=x.double(), y=y)
    assert set(optimizer.weights) == {"c", "t", "m.in_proj_weight", "m.out_proj", "o"}
    assert set(optimizer.left_out) == {"t.bias"}  # its block is another than the weight's
    assert optimizer.covered_share > 0.95
    if name == "exact":
        layer = fl.capture(model, CE, x.double(), y, fisher_type="empirical")["t"]
        optimizer.zero_grad()
        CE(model(x.double()), y).backward()
        assert torch.allclose(optimizer.weights["t"].gradient(), layer.gradient, atol=1e-12)


def test_register_product_makes_a_layer_of_a_users_function():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(x, weight)
            return x @ weight.T

        @staticmethod
        def backward(ctx, g):
            x, weight = ctx.saved_tensors
            return g @ weight, g.T @ x

    product = fl.register_product(Twice.apply)

    class Own(nn.Module):
        def __init__(self, function):
            super().__init__()
            self.W, self.function = nn.Parameter(torch.randn(3, 5)), function

        def forward(self, x):
            return self.function(x, self.W)

    torch.manual_seed(0)
    x, y = batch()
    own, plain = Own(product), Own(F.linear)
    plain.load_state_dict(own.state_dict())
    for model in (own, plain):
        trained(model, "kfac")
    assert torch.allclose(own.W, plain.W, atol=1e-6)
    layers = [fl.capture(model, CE, x, y)["W"] for model in (own, plain)]
    assert torch.allclose(layers[0].gram(), layers[1].gram(), rtol=1e-3)
    with pytest.raises(fl.CaptureError, match="no layer of this model has a block"):
        fl.capture(Own(Twice.apply), CE, x, y)


class Image(nn.Module):
    """A convolution of a row of pixels, called once for each of its options."""

    def __init__(self, *options, **first):
        super().__init__()
        self.c, self.options = nn.Conv1d(1, 1, 3, **first), options
        self.o = nn.LazyLinear(3)

    def forward(self, x):
        x = self.c(x[:, None])
        for option in self.options:
            x = F.conv1d(torch.tanh(x), self.c.weight, self.c.bias, **option)
        return self.o(torch.tanh(x).flatten(1))


def image(*options, **first):
    torch.manual_seed(0)
    model = Image(*options, **first)
    model(batch()[0])
    return model.double()


PLAIN_STEP = {"lr": 0.1, "damping": 0.1, "momentum": 0.0, "kl_clip": None}


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_a_padded_border_is_the_calls_own(mode):
    x, y = batch()
    models = [image(padding=1, padding_mode=mode) for _ in range(2)]
    for name, model in zip(("tengrad", "exact"), models, strict=True):
        trained(model, name, x=x.double(), y=y, **PLAIN_STEP)
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        assert torch.allclose(p, q, rtol=0, atol=1e-12)


@pytest.mark.parametrize("clip", [1e-3, 1.0])
def test_kl_clip_of_a_padded_border(clip):
    x, y = batch()
    models = [image(padding=1, padding_mode="circular") for _ in range(2)]
    for name, model in zip(("tengrad", "exact"), models, strict=True):
        options = {**PLAIN_STEP, "kl_clip": clip, "warmup": 0}
        trained(model, name, x=x.double(), y=y, **options)
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        assert torch.allclose(p, q, rtol=0, atol=1e-12)


def test_a_convolution_called_in_two_ways_is_plain_under_weighted_layers():
    model = image({"stride": 2})
    again, (x, y) = copy.deepcopy(model), batch()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        optimizer = fl.optim.create("tengrad", model, **PLAIN_STEP)
        CE(model(x.double()), y).backward()
    assert "in another way" in str(said[0].message) and set(optimizer.left_out) == {"c"}
    CE(again(x.double()), y).backward()
    assert torch.allclose(model.c.weight.grad, again.c.weight.grad)


def test_a_transposed_convolution_is_plain_under_weighted_layers():
    torch.manual_seed(0)
    model, (x, y) = Decoder(), batch()
    again = copy.deepcopy(model)
    optimizer = fl.optim.create("tengrad", model, **PLAIN_STEP)
    CE(model(x), y).backward()
    CE(again(x), y).backward()
    assert "t" not in optimizer.weights
    assert torch.allclose(model.t.weight.grad, again.t.weight.grad)
    assert not torch.allclose(model.o.weight.grad, again.o.weight.grad)


def test_rows_that_are_no_longer_the_examples_are_refused():
    class Growing(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.steps = nn.Linear(5, 4), nn.Linear(4, 3), 1

        def forward(self, x):
            rows = x.repeat_interleave(self.steps, 0)
            return self.b(torch.tanh(self.a(rows)).view(len(x), self.steps, 4).mean(1))

    model, (x, y) = Growing(), batch()
    optimizer = trained(model, "tengrad", steps=1)
    model.steps = 2
    with pytest.raises(RuntimeError, match="'a' received 16 rows in a batch of 8"):
        CE(model(x), y).backward()
    assert optimizer.steps == 1


class Checkpointed(nn.Module):
    """A parameter that no module of torch multiplies, inside a checkpointed segment."""

    def __init__(self, checkpointed):
        super().__init__()
        torch.manual_seed(0)
        self.checkpointed, self.W = checkpointed, nn.Parameter(torch.randn(4, 4))
        self.first, self.last = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        def inner(h):
            return torch.tanh(F.linear(h, self.W) @ self.W.T)

        h = torch.tanh(self.first(x))
        h = checkpoint(inner, h, use_reentrant=False) if self.checkpointed else inner(h)
        return self.last(h)


@pytest.mark.parametrize("name", ["fngd", "kfac", "ngd"])
def test_checkpointed_functions_take_the_steps_of_others(name):
    x, y = torch.randn(6, 5, generator=torch.Generator().manual_seed(1)), torch.arange(6) % 3
    found = []
    for checkpointed in (False, True):
        model = Checkpointed(checkpointed)
        opt = fl.optim.create(name, model)
        for _ in range(2):
            opt.zero_grad()
            F.cross_entropy(model(x), y).backward()
            opt.step()
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*found)
