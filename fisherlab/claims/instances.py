"""Random cases: small networks, data, criteria, Fisher types, positions, dampings.

A case is plain data, so that it can be saved and looked at. The shared parts of a claim's two sides
are here and nowhere else: the case itself, the network it describes, and the labels of its model.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fisherlab.claims.base import Case, Claim
from fisherlab.extract import Geometry, LayerCapture, capture
from fisherlab.models import create

CRITERIA = ("cross_entropy", "squared_error", "bernoulli")
ACTIVATIONS = {
    "tanh": nn.Tanh,
    "softplus": nn.Softplus,
    "relu": nn.ReLU,
    "identity": nn.Identity,
}
_MODULES = {
    "cross_entropy": nn.CrossEntropyLoss,
    "squared_error": nn.MSELoss,
    "bernoulli": nn.BCEWithLogitsLoss,
}
PROBES = 3


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    """Standard normal numbers in float64."""
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def integer(generator: torch.Generator, low: int, high: float, size: float = 1.0) -> int:
    """A whole number from `low` up to `high`, the room above `low` scaled by `size`."""
    top = low + round(size * (high - low))
    return int(torch.randint(low, top + 1, (), generator=generator))


def choice(generator: torch.Generator, options: Sequence[str]) -> str:
    """One of the options."""
    return options[int(torch.randint(len(options), (), generator=generator))]


def log_uniform(generator: torch.Generator, low: float, high: float) -> float:
    """A positive number, uniform in its logarithm."""
    u = torch.rand((), generator=generator, dtype=torch.float64).item()
    return low * (high / low) ** u


def orthogonal(generator: torch.Generator, n: int) -> Tensor:
    """A random orthogonal matrix `[n, n]`."""
    return torch.linalg.qr(normal(generator, n, n))[0]


def positive_definite(generator: torch.Generator, n: int, condition: float) -> Tensor:
    """A symmetric matrix with log-uniform eigenvalues from 1 / condition to 1, both ends there."""
    values = torch.tensor([log_uniform(generator, 1 / condition, 1.0) for _ in range(n)])
    values[0], values[-1] = 1 / condition, 1.0
    Q = orthogonal(generator, n)
    S = Q * values.double() @ Q.mT
    return (S + S.mT) / 2


class Net(nn.Module):
    """Affine maps with an activation between; inputs `[n, t, d]` are averaged before the last."""

    def __init__(self, weights: Sequence[Tensor], activation: str) -> None:
        super().__init__()
        self.layers, self.activations = nn.ModuleList(), nn.ModuleList()
        for W in weights:
            layer = nn.Linear(W.shape[1] - 1, W.shape[0], dtype=W.dtype)
            with torch.no_grad():
                layer.weight.copy_(W[:, :-1])
                layer.bias.copy_(W[:, -1])
            self.layers.append(layer)
        self.activations.extend(ACTIVATIONS[activation]() for _ in weights[1:])

    def forward(self, x: Tensor) -> Tensor:
        for layer, activation in zip(self.layers[:-1], self.activations, strict=True):
            x = activation(layer(x))
        return self.layers[-1](x.mean(1) if x.ndim == 3 else x)


def network_case(
    generator: torch.Generator,
    size: float,
    *,
    examples: tuple[int, int] = (2, 8),
    positions: int = 3,
    criteria: Sequence[str] = CRITERIA,
    activations: Sequence[str] = ("tanh", "softplus"),
) -> Case:
    """A network of two or three layers, a batch, a criterion, the layer in question, probes `V`."""
    M, T = integer(generator, *examples, size), integer(generator, 1, positions, size)
    criterion = choice(generator, criteria)
    widths = [integer(generator, 2, 4, size) for _ in range(integer(generator, 3, 4, size))]
    weights = [normal(generator, o, i + 1) / math.sqrt(i) for i, o in itertools.pairwise(widths)]
    x = normal(generator, *((M, T, widths[0]) if T > 1 else (M, widths[0])))
    layer = integer(generator, 0, len(weights) - 1)
    return {
        "weights": weights,
        "activation": choice(generator, activations),
        "criterion": criterion,
        "layer": layer,
        "x": x,
        "y": targets(criterion, normal(generator, M, widths[-1])),
        "damping": log_uniform(generator, 1e-3, 1.0),
        "V": normal(generator, PROBES, *weights[layer].shape),
    }


def targets(criterion: str, values: Tensor) -> Tensor:
    """Labels of the kind the criterion takes, from real numbers `[n, c]`."""
    if criterion == "cross_entropy":
        return values.argmax(1)
    return values if criterion == "squared_error" else (values > 0).double()


def model_of(case: Case) -> nn.Module:
    """The network of a case, in float64 and evaluation mode."""
    if "state" not in case:
        return Net(case["weights"], case["activation"]).eval()
    model = create(case["model"], **case["options"]).double().eval()
    model.load_state_dict(case["state"])
    return model


def layer_of(case: Case) -> str:
    """The name of the layer the case looks at."""
    return case["layer"] if isinstance(case["layer"], str) else f"layers.{case['layer']}"


def layer_names(case: Case) -> list[str]:
    """Every layer of the case's network."""
    return [n for n, m in model_of(case).named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]


def joint(model: nn.Module, name: str) -> Tensor:
    """`[weight | bias]` of a layer."""
    module: Any = model.get_submodule(name)
    weight = module.weight.detach().flatten(1)
    return weight if module.bias is None else torch.cat([weight, module.bias.detach()[:, None]], 1)


def criterion_of(case: Case, reduction: str = "sum") -> nn.Module:
    """The criterion, summed: the per-example loss is that of one example."""
    return _MODULES[case["criterion"]](reduction=reduction)


def labels(criterion: str, f: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Every label of every example and its probability `[n]` under the outputs `f`.

    For the normal of variance 1/2 the two nodes of a quadrature that is exact for second moments.
    """
    n, c = f.shape
    if criterion == "cross_entropy":
        p = f.softmax(1)
        for k in range(c):
            yield torch.full((n,), k), p[:, k]
        return
    for bits in itertools.product((0.0, 1.0), repeat=c):
        y = torch.tensor(bits, dtype=f.dtype).expand(n, c)
        if criterion == "squared_error":
            yield f + math.sqrt(0.5) * (2 * y - 1), torch.full((n,), 0.5**c, dtype=f.dtype)
        else:
            yield y, torch.where(y > 0, f.sigmoid(), (-f).sigmoid()).prod(1)


def seen(case: Case, fisher_type: str, **options: Any) -> LayerCapture:
    """The capture that FisherLab makes at the layer of a network case."""
    name = layer_of(case)
    criterion = options.pop("criterion", None) or criterion_of(case)
    arguments = (model_of(case), criterion, case["x"], case["y"])
    return capture(*arguments, fisher_type=fisher_type, layers=[name], **options)[name]


def layer_case(
    generator: torch.Generator, size: float, *, fisher_type: str | None = None, **options: Any
) -> Case:
    """The inputs `a` `[n, t, i]` and output gradients `g` `[m, n, t, o]` of a network's layer."""
    case = network_case(generator, size, **options)
    kind = fisher_type or choice(generator, ("exact", "empirical", "mc"))
    found = seen(case, kind, generator=generator)
    a, g = found.inputs, found.output_gradients
    return {"a": a, "g": g, "damping": case["damping"], "V": case["V"]}


def captured(case: Case) -> LayerCapture:
    """The capture that a case's `a` and `g` stand for."""
    a, g = case["a"], case["g"]
    return LayerCapture(
        name="layer",
        layer_type="Linear",
        geometry=Geometry(a.shape[-1], g.shape[-1], bias=False),
        raw_inputs=(a,),
        raw_output_gradients=(g,),
        raw_label_gradients=(g[0],),
    )


def without_one(n: int) -> Iterator[Tensor]:
    """The indices of all but one of `n`, for each; nothing where there is but one."""
    for k in range(n if n > 1 else 0):
        yield torch.tensor([j for j in range(n) if j != k])


class OfNetwork(Claim):
    """A claim about a network, a batch and one of its layers."""

    free: ClassVar[tuple[str, ...]] = ("x", "weights")

    def draw(self, generator: torch.Generator, size: float) -> Case:
        return network_case(generator, size)

    def adapt(self, real: Case, generator: torch.Generator) -> Case | None:
        if real["fisher_type"] != "exact":
            return None  # the network is the same: once is enough
        return {key: value for key, value in real.items() if key not in ("a", "g")}

    def smaller(self, case: Case) -> Iterator[Case]:
        for keep in without_one(len(case["x"])):
            yield {**case, "x": case["x"][keep], "y": case["y"][keep]}


class OfLayer(Claim):
    """A claim about the inputs `a` and the output gradients `g` of one layer."""

    free: ClassVar[tuple[str, ...]] = ("a", "g")

    def draw(self, generator: torch.Generator, size: float) -> Case:
        return layer_case(generator, size)

    def adapt(self, real: Case, generator: torch.Generator) -> Case | None:
        return {key: real[key] for key in ("a", "g", "damping", "V")}

    def smaller(self, case: Case) -> Iterator[Case]:
        yield from smaller_layers(case)


# Which axis of each tensor an example, a position, an output vector, an output, an input is.
_AXES: tuple[dict[str, int], ...] = (
    {"a": 0, "g": 1},
    {"a": 1, "g": 2},
    {"g": 0},
    {"g": 3, "V": 1},
    {"a": 2, "V": 2},
)


def smaller_layers(case: Case) -> Iterator[Case]:
    """The case with one example, position, output vector, output or input less."""
    for axes in _AXES:
        key, axis = next(iter(axes.items()))
        for keep in without_one(case[key].shape[axis]):
            cut = {key: case[key].index_select(d, keep) for key, d in axes.items() if key in case}
            yield {**case, **cut}
