"""Networks, batches and criteria that people bring, some of which nothing can be made of."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Returns(nn.Module):
    """A network whose output goes through a function."""

    def __init__(self, inner: nn.Module, function: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.inner, self.function = inner, function

    def forward(self, x: Tensor) -> object:
        return self.function(self.inner(x))


class Raises(nn.Module):
    """A network with a fault of its own."""

    def __init__(self, error: type[Exception]) -> None:
        super().__init__()
        self.linear, self.error = nn.Linear(4, 3), error

    def forward(self, x: Tensor) -> Tensor:
        self.linear(x)
        raise self.error("a fault of the user's own")


class Unused(nn.Module):
    """A layer that nothing calls, and one that is called without effect."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + 0 * self.two(x)


class Parameter(nn.Module):
    """A matrix of its own, multiplied by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.W.T


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x, x, x)[0].mean(1))


class Inside(nn.Module):
    """A forward pass that does what belongs outside."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.linear, self.what = nn.Linear(4, 3), what

    def forward(self, x: Tensor) -> Tensor:
        found = self.linear(x)
        if self.what == "in place":
            x.mul_(1.0)
        elif self.what == "a backward":
            with torch.enable_grad():
                torch.autograd.grad(found.sum(), found)
            found = found.relu()
        elif self.what == "random":
            found = found * (1 + 0 * random.random() + 0 * np.random.rand())  # noqa: NPY002
        return found


class Steps(nn.Module):
    """Time in front, as many steps as there may be examples; all steps are read or the first."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.inner, self.head, self.first = nn.Linear(4, 5), nn.Linear(5, 3), first

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.inner(x.transpose(0, 1)))
        return self.head(h[0] if self.first else h.mean(0))


class Halved(torch.autograd.Function):
    """A function with a number beside its tensor."""

    @staticmethod
    def forward(ctx: object, by: float, x: Tensor) -> Tensor:
        ctx.by = by  # type: ignore[attr-defined]
        return x * by

    @staticmethod
    def backward(ctx: object, g: Tensor) -> tuple[None, Tensor]:  # type: ignore[override]
        return None, g * ctx.by  # type: ignore[attr-defined]


class LowRank(nn.Module):
    """A matrix `u V` of one row, which all examples share."""

    def __init__(self) -> None:
        super().__init__()
        self.u, self.v = nn.Parameter(torch.randn(1, 2)), nn.Parameter(torch.randn(2, 4))
        self.head = nn.Linear(1, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.linear(x, self.u @ self.v))


class Tied(nn.Module):
    """A map that is used with its bias, and without as its transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.map, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.linear(torch.tanh(self.map(x)), self.map.weight.T))


def channels_last() -> nn.Module:
    def laid(_: object, __: object, h: Tensor) -> Tensor:
        return h.contiguous(memory_format=torch.channels_last)

    model = nn.Sequential(nn.Conv2d(2, 4, 2), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(16, 3))
    model[0].register_forward_hook(laid)
    return model


def dead() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    nn.init.constant_(model[0].bias, -1e3)
    return model


def shared() -> nn.Module:
    linear = nn.Linear(4, 4)
    return nn.Sequential(linear, nn.Tanh(), linear, nn.Linear(4, 3))


def frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    model[0].requires_grad_(False)
    return model


def mlp(**options: bool) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5, **options), nn.Tanh(), nn.Linear(5, 3, **options))


def scripted() -> nn.Module:
    return torch.jit.trace(mlp(), torch.ones(2, 4), check_trace=False)


def nested() -> nn.Module:
    return nn.Sequential(
        nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5)), nn.GELU(), nn.Linear(5, 3)
    )


def convolution(groups: int = 1) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 2, groups=groups), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
    )


@dataclass
class Brought:
    """A network with inputs that it takes; `sound` says that its blocks have a reference."""

    name: str
    model: nn.Module
    x: Tensor
    sound: bool = True
    classes: bool = True


SOUND: dict[str, Callable[[], tuple[nn.Module, tuple[int, ...]]]] = {
    "mlp": lambda: (mlp(), (4,)),
    "no bias": lambda: (mlp(bias=False), (4,)),
    "one layer": lambda: (nn.Linear(4, 3), (4,)),
    "convolution": lambda: (convolution(), (2, 3, 3)),
    "groups": lambda: (convolution(2), (2, 3, 3)),
    "nested": lambda: (nested(), (4,)),
    "dead layer": lambda: (dead(), (4,)),
    "frozen": lambda: (frozen(), (4,)),
    "shared": lambda: (shared(), (4,)),
    "unused": lambda: (Unused(), (4,)),
    "dropout off": lambda: (nn.Sequential(mlp(), nn.Dropout(0.5)).eval(), (4,)),
    "batch norm off": lambda: (nn.Sequential(nn.BatchNorm1d(4), mlp()).eval(), (4,)),
    "by hand": lambda: (Parameter(), (4,)),
    "attention": lambda: (Attention(), (3, 4)),
    "spectral": lambda: (
        nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)), nn.Linear(5, 3)),
        (4,),
    ),
    "time first": lambda: (Steps(False), (3, 4)),
    "first step": lambda: (Steps(True), (3, 4)),
    "in place": lambda: (nn.Sequential(nn.SiLU(inplace=True), mlp()), (4,)),
    "a number": lambda: (
        nn.Sequential(
            nn.Linear(4, 5), Returns(nn.Tanh(), lambda f: Halved.apply(0.5, f)), nn.Linear(5, 3)
        ),
        (4,),
    ),
    "low rank": lambda: (LowRank(), (4,)),
    "tied": lambda: (Tied(), (4,)),
    "channels last": lambda: (channels_last(), (2, 3, 3)),
    "one output": lambda: (nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)), (4,)),
}
HOSTILE: dict[str, Callable[[], tuple[nn.Module, tuple[int, ...]]]] = {
    "raises": lambda: (Raises(random.Random(0).choice([RuntimeError])), (4,)),
    "key error": lambda: (Raises(KeyError), (4,)),
    "lazy": lambda: (nn.LazyLinear(3), (4,)),
    "zero width": lambda: (nn.Sequential(nn.Linear(4, 0), nn.Linear(0, 3)), (4,)),
    "no parameters": lambda: (nn.Sequential(nn.Tanh()), (4,)),
    "all frozen": lambda: (mlp().requires_grad_(False), (4,)),
    "scripted": lambda: (scripted(), (4,)),
    "complex": lambda: (nn.Linear(4, 3, dtype=torch.complex64), (4,)),
    "half": lambda: (mlp().half(), (4,)),
    "bfloat16": lambda: (mlp().bfloat16(), (4,)),
    "meta": lambda: (mlp().to("meta"), (4,)),
    "NaN weight": lambda: (_filled(float("nan")), (4,)),
    "inf weight": lambda: (_filled(float("inf")), (4,)),
    "huge weight": lambda: (_filled(1e30), (4,)),
    "dropout on": lambda: (nn.Sequential(mlp(), nn.Dropout(0.5)), (4,)),
    "batch norm on": lambda: (nn.Sequential(nn.BatchNorm1d(4), mlp()), (4,)),
    "pair": lambda: (Returns(mlp(), lambda f: (f, f)), (4,)),
    "dict": lambda: (Returns(mlp(), lambda f: {"logits": f}), (4,)),
    "none": lambda: (Returns(mlp(), lambda f: None), (4,)),
    "list": lambda: (Returns(mlp(), lambda f: f.tolist()), (4,)),
    "array": lambda: (Returns(mlp(), lambda f: f.detach().numpy()), (4,)),
    "0-d": lambda: (Returns(mlp(), lambda f: f.sum()), (4,)),
    "1-d": lambda: (Returns(mlp(), lambda f: f.sum(1)), (4,)),
    "detached": lambda: (Returns(mlp(), lambda f: f.detach()), (4,)),
    "integer": lambda: (Returns(mlp(), lambda f: f.argmax(1)), (4,)),
    "complex output": lambda: (Returns(mlp(), lambda f: f * 1j), (4,)),
    "sparse output": lambda: (Returns(mlp(), lambda f: f.to_sparse()), (4,)),
    "fewer rows": lambda: (Returns(mlp(), lambda f: f[:-1]), (4,)),
    "mean over batch": lambda: (Returns(mlp(), lambda f: f.mean(0, keepdim=True)), (4,)),
    "batch mixed": lambda: (Returns(mlp(), lambda f: f - f.mean(0)), (4,)),
    "NaN output": lambda: (Returns(mlp(), lambda f: f * float("nan")), (4,)),
    "random": lambda: (Returns(mlp(), lambda f: f + torch.randn_like(f)), (4,)),
    "no classes": lambda: (Returns(mlp(), lambda f: f[:, :0]), (4,)),
    "a class": lambda: (nn.Linear, (4,)),
    "a function": lambda: ((lambda x: x), (4,)),
    "nothing": lambda: (None, (4,)),
    "a word": lambda: ("mlp", (4,)),
    "under no_grad": lambda: (Returns(nn.Identity(), torch.no_grad()(mlp())), (4,)),
    "lstm": lambda: (Returns(nn.LSTM(4, 3, batch_first=True), lambda f: f[0][:, -1]), (3, 4)),
    "embedding": lambda: (nn.Embedding(7, 3), ()),
    "quantised": lambda: (_quantised(), (4,)),
    "writes into its input": lambda: (Inside("in place"), (4,)),
    "calls backward": lambda: (Inside("a backward"), (4,)),
    "draws from Python": lambda: (Inside("random"), (4,)),
}


def _filled(value: float) -> nn.Module:
    model = mlp()
    nn.init.constant_(model[0].weight, value)
    return model


def _quantised() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(mlp(), {nn.Linear}, dtype=torch.qint8)


def brought(draw: random.Random, hostile: bool) -> Brought:
    """A network of random weights and its inputs; float64 where it is sound."""
    name = draw.choice(list(HOSTILE if hostile else SOUND))
    state = torch.get_rng_state()
    torch.manual_seed(draw.randrange(2**31))
    model, shape = (HOSTILE if hostile else SOUND)[name]()
    n = draw.choice([1, 2, 3, 5])
    x = torch.randn(n, *shape, dtype=torch.float64)
    torch.set_rng_state(state)
    if not hostile:
        model = model.double()
    elif name == "embedding":
        x = torch.arange(n) % 7
    elif isinstance(model, nn.Module):
        dtypes = {p.dtype for p in model.parameters() if not nn.parameter.is_lazy(p)}
        x = x.to(dtypes.pop() if dtypes else torch.float32)
    else:
        x = x.float()
    return Brought(name, model, x, not hostile, name != "one output")


def labelled(draw: random.Random, one: Brought) -> tuple[object, Tensor]:
    """A criterion with labels that fit a sound network."""
    n = len(one.x)
    generator = torch.Generator().manual_seed(draw.randrange(2**31))
    classes = torch.randint(0, 3 if one.classes else 1, (n,), generator=generator)
    reduction = draw.choice(["mean", "mean", "sum"])
    k = 3 if one.classes else 1
    numbers = torch.randn(n, k, generator=generator, dtype=torch.float64)
    kind = draw.choice(["ce", "mse", "fitted", "bce", "function"])
    if kind == "fitted":  # all but one: these send no gradient back
        with torch.no_grad():
            numbers = torch.cat([numbers[:1], one.model(one.x.clone())[1:]])
    if kind in ("mse", "fitted"):
        return nn.MSELoss(reduction=reduction), numbers
    if kind == "bce":
        return nn.BCEWithLogitsLoss(reduction=reduction), (numbers > 0).double()
    return (nn.CrossEntropyLoss(reduction=reduction) if kind == "ce" else F.cross_entropy), classes


CRITERIA: dict[str, Callable[[], object]] = {
    "a word": lambda: "ce",
    "nothing": lambda: None,
    "a class": lambda: nn.CrossEntropyLoss,
    "a number": lambda: 3,
    "a network": lambda: nn.Linear(3, 3),
    "no reduction": lambda: nn.CrossEntropyLoss(reduction="none"),
    "returns None": lambda: lambda f, y: None,
    "returns a number": lambda: lambda f, y: 1.0,
    "returns the outputs": lambda: lambda f, y: f,
    "returns integers": lambda: lambda f, y: f.argmax(),
    "returns complex": lambda: lambda f, y: (f * 1j).sum(),
    "no graph": lambda: lambda f, y: f.detach().sum(),
    "of no output": lambda: lambda f, y: torch.ones((), requires_grad=True),
    "NaN": lambda: lambda f, y: f.sum() * float("nan"),
    "takes one": lambda: lambda f: f.sum(),
    "raises": lambda: _raises,
    "cosine": lambda: nn.CosineEmbeddingLoss(),
    "bad weight": lambda: nn.CrossEntropyLoss(weight=torch.ones(7)),
    "NaN weight": lambda: nn.CrossEntropyLoss(weight=torch.full((3,), float("nan"))),
    "odd smoothing": lambda: nn.CrossEntropyLoss(label_smoothing=1.0),
    "ignores all": lambda: nn.CrossEntropyLoss(ignore_index=0),
    "NLL on logits": lambda: nn.NLLLoss(),
    "argmax": lambda: torch.argmax,
    "print": lambda: print,
}


def _raises(f: Tensor, y: Tensor) -> Tensor:
    raise RuntimeError("a fault of the user's own criterion")
