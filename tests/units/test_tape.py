"""Captures of products at the level of functions, against autograd one example at a time."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fisherlab as fl

CE = nn.CrossEntropyLoss()
TYPES = ("exact", "mc", "empirical")


def reference(model, run, columns, leaf):
    """`[m, n, *leaf]`: the gradient of `<f_n, v[m, n]>`, a pass of one example each."""
    outputs = run(slice(None))
    n = len(outputs)
    found = []
    for v in columns:
        rows = []
        for k in range(n):
            out = run(slice(k, k + 1))
            (g,) = torch.autograd.grad((out[0] * v[k]).sum(), [leaf], allow_unused=True)
            rows.append(torch.zeros_like(leaf) if g is None else g)
        found.append(torch.stack(rows))
    return torch.stack(found)


def vectors_of(criterion, outputs, y, fisher_type, generator):
    from fisherlab.extract import fisher

    if fisher_type == "empirical":
        return [fisher.label_vectors(criterion, outputs.detach().requires_grad_(), y, None)]
    return list(
        fisher.output_vectors(fisher_type, criterion, outputs.detach(), y, 2, generator, None)
    )


def check(model, x, y, names, criterion=CE, fisher_type="exact", share=None, **options):
    """Every named block's gradients, weight and biases, are autograd's; returns the captures."""
    draws = torch.Generator().manual_seed(3)
    captured = fl.capture(
        model,
        criterion,
        x,
        y,
        fisher_type=fisher_type,
        mc_samples=2,
        generator=draws,
        **options,
    )
    forward = options.get("forward") or (lambda m, x: m(x))

    def run(part):
        return forward(model, x[part])

    columns = vectors_of(
        criterion, run(slice(None)), y, fisher_type, torch.Generator().manual_seed(3)
    )
    found = {layer.name for layer in captured.values()}
    assert found >= set(names), (found, captured.report.skipped)
    tensors = dict(model.named_parameters())
    for key, layer in captured.items():
        name = layer.name
        weight = tensors.get(f"{name}.weight", tensors.get(name))
        if weight is None:
            weight = tensors["weight"]
        want = reference(model, run, columns, weight).flatten(0, 1)
        want = torch.stack([layer.geometry.matrix(D) for D in want])
        got = layer.per_example_gradients().flatten(0, 1)
        scale = 1 + want.norm()
        width = layer.geometry.in_features
        assert (got[..., :width] - want).norm() < 1e-11 * scale, key
        bias = tensors.get(f"{name}.bias")
        if layer.geometry.bias == 1 and bias is not None:
            want = reference(model, run, columns, bias).flatten(0, 1)
            o, k = layer.geometry.out_features, layer.geometry.group
            assert (got[..., -1] - want[:, k * o : (k + 1) * o]).norm() < 1e-11 * scale, key
    if share is not None:
        assert captured.report.share == pytest.approx(share)
    return captured


class Conv1D(nn.Module):
    """GPT-2's linear map: the weight is stored as `[i, o]`."""

    def __init__(self, i, o):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(i, o)), nn.Parameter(torch.randn(o))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


class Plain(nn.Module):
    """A matrix product without any bias, by the operator."""

    def __init__(self, i, o):
        super().__init__()
        self.W = nn.Parameter(torch.randn(i, o))

    def forward(self, x):
        return x @ self.W


class Rms(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d))

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


class Scale(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.gamma = nn.Parameter(torch.randn(*shape))

    def forward(self, x):
        return x * self.gamma


class Squashed(nn.Linear):
    def forward(self, x):
        return torch.tanh(super().forward(x))


class TiedDecoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 4), nn.Linear(5, 3)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)) @ self.a.weight)


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.b(F.linear(torch.tanh(self.a(x)), self.a.weight))


class TimeFirst(nn.Module):
    def __init__(self, steps=6):
        super().__init__()
        self.steps, self.n = steps, nn.LayerNorm(4)
        self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        steps = x[:, None] * torch.linspace(0.5, 1.5, self.steps).to(x)[None, :, None]
        return self.b(torch.tanh(self.n(self.a(steps.transpose(0, 1)))).mean(0))


class Folded(nn.Module):
    """Positions are folded into the batch, frames of a video for a convolution as well."""

    def __init__(self):
        super().__init__()
        self.c, self.a = nn.Conv2d(1, 2, 3, padding=1), nn.Linear(8, 4)
        self.o = nn.Linear(4, 3)

    def forward(self, x):
        n = len(x)
        frames = torch.stack([x[:, :4], x[:, 1:]], 1).reshape(2 * n, 1, 2, 2)
        h = torch.tanh(self.a(torch.tanh(self.c(frames)).flatten(1)))
        return self.o(h.view(n, 2, 4).sum(1))


class Tokens(nn.Module):
    """A small language model; `tied`: the head is the embedding."""

    def __init__(self, tied, padding=None):
        super().__init__()
        self.e, self.h = nn.Embedding(7, 4, padding_idx=padding), nn.Linear(4, 7, bias=False)
        self.a = Conv1D(4, 4)
        if tied:
            self.h.weight = self.e.weight

    def forward(self, x):
        return self.h(torch.tanh(self.a(self.e(x)))).mean(1)


class Attention(nn.Module):
    def __init__(self, cross, batch_first=True):
        super().__init__()
        self.cross, self.first = cross, batch_first
        self.m = nn.MultiheadAttention(
            4, 2, batch_first=batch_first, **({"kdim": 3, "vdim": 3} if cross == "dims" else {})
        )
        self.o = nn.Linear(4, 3)

    def forward(self, x):
        q = torch.tanh(x.unflatten(1, (2, 4)))
        k = q if not self.cross else torch.sin(x.unflatten(1, (2, 4)))
        k = k[..., :3] if self.cross == "dims" else k
        if not self.first:
            q, k = q.transpose(0, 1), k.transpose(0, 1)
            return self.o(self.m(q, k, k)[0].mean(0))
        return self.o(self.m(q, k, k)[0].mean(1))


def tied_pair(share):
    a, b, c = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)
    setattr(b, share, getattr(a, share))
    return nn.Sequential(a, nn.Tanh(), b, nn.Tanh(), c)


def hooked():
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    model[0].register_forward_hook(lambda module, args, output: 2 * output)
    return model


def upsampling(groups=1, **options):
    return nn.Sequential(
        nn.Unflatten(1, (4, 1, 2)),
        nn.ConvTranspose2d(4, 2 * groups, 3, groups=groups, **options),
        nn.Tanh(),
        nn.Flatten(),
        nn.LazyLinear(3),
    )


class RowByRow(nn.Module):
    """Each call has one row and no axis of examples."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        return torch.stack([self.b(torch.tanh(self.a(row))) for row in x])


FLAT = {
    "conv1d of gpt-2": (lambda: nn.Sequential(Conv1D(5, 4), nn.Tanh(), Conv1D(4, 3)), ["0", "2"]),
    "operator": (lambda: nn.Sequential(Plain(5, 4), nn.Tanh(), nn.Linear(4, 3)), ["0.W", "2"]),
    "activation inside": (lambda: nn.Sequential(Squashed(5, 4), nn.Linear(4, 3)), ["0", "1"]),
    "transposed use": (TiedDecoder, ["a", "b"]),
    "functional use": (Functional, ["a", "b"]),
    "row by row": (RowByRow, ["a", "b"]),
    "user's hook": (hooked, ["0", "2"]),
    "one weight, two biases": (lambda: tied_pair("weight"), ["0", "4"]),
    "one bias, two weights": (lambda: tied_pair("bias"), ["4"]),
    "layer norm": (lambda: nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3)), "012"),
    "rms norm": (lambda: nn.Sequential(nn.Linear(5, 4), nn.RMSNorm(4), nn.Linear(4, 3)), "012"),
    "rms by hand": (lambda: nn.Sequential(nn.Linear(5, 4), Rms(4), nn.Linear(4, 3)), "012"),
    "scale": (
        lambda: nn.Sequential(nn.Linear(5, 4), Scale(4), nn.Tanh(), nn.Linear(4, 3)),
        ["0", "1.gamma", "3"],
    ),
    "scale of one row": (
        lambda: nn.Sequential(nn.Linear(5, 4), Scale(1, 4), nn.Tanh(), nn.Linear(4, 3)),
        ["0", "1.gamma", "3"],
    ),
    "time first": (TimeFirst, ["a", "n", "b"]),
    "time first, other length": (lambda: TimeFirst(4), ["a", "n", "b"]),
    "time first, one step": (lambda: TimeFirst(1), ["a", "n", "b"]),
}
IMAGES = {
    "transposed convolution": (upsampling, "14"),
    "strided": (lambda: upsampling(stride=2, padding=1, output_padding=1), "14"),
    "dilated": (lambda: upsampling(dilation=2, bias=False), "14"),
    "grouped": (lambda: upsampling(groups=2, stride=2), "14"),
    "folded": (Folded, "cao"),
    "group norm": (
        lambda: nn.Sequential(
            nn.Unflatten(1, (1, 2, 4)),
            nn.Conv2d(1, 4, 2),
            nn.GroupNorm(2, 4),
            nn.Flatten(),
            nn.LazyLinear(3),
        ),
        "124",
    ),
    "batch norm": (
        lambda: nn.Sequential(
            nn.Unflatten(1, (1, 2, 4)),
            nn.Conv2d(1, 4, 2),
            nn.BatchNorm2d(4),
            nn.Flatten(),
            nn.LazyLinear(3),
        ).eval(),
        "124",
    ),
    "attention": (lambda: Attention(False), ["m.in_proj_weight", "m.out_proj", "o"]),
    "attention, time first": (
        lambda: Attention(False, batch_first=False),
        ["m.in_proj_weight", "m.out_proj", "o"],
    ),
    "cross attention": (lambda: Attention(True), ["m.in_proj_weight", "m.out_proj", "o"]),
    "cross attention of other widths": (
        lambda: Attention("dims"),
        ["m.q_proj_weight", "m.k_proj_weight", "m.out_proj", "o"],
    ),
}


def made(make, like):
    torch.manual_seed(0)
    model = make()
    training = model.training
    model.eval()(like)
    return model.train(training).double()


@pytest.mark.parametrize("fisher_type", TYPES)
@pytest.mark.parametrize("kind", FLAT)
def test_flat_inputs(kind, fisher_type):
    make, names = FLAT[kind]
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    check(made(make, x.float()), x, torch.arange(6) % 3, names, fisher_type=fisher_type)


@pytest.mark.parametrize("fisher_type", ["exact", "empirical"])
@pytest.mark.parametrize("kind", IMAGES)
def test_images_and_sequences(kind, fisher_type):
    make, names = IMAGES[kind]
    width = 5 if kind == "folded" else 8
    x = torch.randn(4, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    check(made(make, x.float()), x, torch.arange(4) % 3, names, fisher_type=fisher_type)


@pytest.mark.parametrize("fisher_type", TYPES)
@pytest.mark.parametrize("padding", [None, 0])
@pytest.mark.parametrize("tied", [False, True])
def test_embeddings(tied, padding, fisher_type):
    x = torch.randint(7, (4, 3), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    model = Tokens(tied, padding).double()
    names = ["e", "a"] if tied else ["e", "a", "h"]
    check(model, x, torch.arange(4), names, fisher_type=fisher_type, share=1.0)


FORMS = {
    "an output": lambda x, w: torch.mul(x, 2.0, out=torch.empty_like(x)) @ w.t(),
    "a row by name": lambda x, w: F.linear(x + w[:1].expand(size=x.shape), w),
    "an old order": lambda x, w: torch.add(F.linear(x, w), 2, F.linear(x, w).detach()),
    "a factor by name": lambda x, w: F.linear(x, torch.mul(w, other=2.0)),
    "a factor": lambda x, w: F.linear(x, torch.rsub(w, 1.0, alpha=2)),
    "a floor": lambda x, w: F.linear(x, torch.div(w, 2.0, rounding_mode="floor")) + x @ w.t(),
}


@pytest.mark.filterwarnings("ignore:This overload of add is deprecated")
@pytest.mark.parametrize("check", ["full", "off"])
@pytest.mark.parametrize("form", FORMS)
def test_a_function_called_in_another_form_fails_in_no_pass(form, check):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.head = nn.Parameter(torch.randn(4, 3).double()), nn.Linear(4, 2).double()

        def forward(self, x):
            return self.head(FORMS[form](x, self.w))

    torch.manual_seed(0)
    model, x, y = Model(), torch.randn(5, 3).double(), torch.arange(5) % 2
    captures = fl.capture(model, CE, x, y, fisher_type="empirical", check=check)
    assert "head" in captures
    if "w" in captures:
        gradient = torch.autograd.grad(CE(model(x), y), model.w)[0]
        assert torch.allclose(captures["w"].gradient, gradient)
