"""Which layers have a block, which do not and why; and the checks made before any pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TypeVar

import torch
from torch import Tensor, nn

from fisherlab.blocks.numerics import all_finite
from fisherlab.extract.geometry import CONVOLUTIONS, CaptureError
from fisherlab.names import nearest

C = TypeVar("C")

_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
_DROPOUT = nn.modules.dropout._DropoutNd


@dataclass(frozen=True)
class Choice:
    """A module with parameters: whether it has a block, and the reason if it has none.

    `status` is "exact", "tied" (the block of `owner`, whose weight it shares) or "plain gradient".
    """

    name: str
    module: nn.Module
    status: str
    reason: str = ""
    owner: str | None = None


def weight_identity(module: nn.Module) -> object:
    """The parameter that is the module's weight, or the module itself if it computes its weight.

    A parametrized weight is another tensor at each access, so no two modules share it.
    """
    weight = module._parameters.get("weight")
    return module if weight is None else weight


def by_owner(
    modules: Mapping[str, nn.Module], calls: Mapping[str, Sequence[C]]
) -> dict[str, list[C]]:
    """The calls of all modules that share a weight, under the name of its first owner."""
    owners: dict[object, str] = {}
    joined: dict[str, list[C]] = {}
    for name, module in modules.items():
        owner = owners.setdefault(weight_identity(module), name)
        joined.setdefault(owner, []).extend(calls.get(name, ()))
    return joined


def choices(model: nn.Module) -> list[Choice]:
    """One `Choice` per module that owns parameters, in order of registration."""
    owners: dict[object, Choice] = {}
    found: dict[str, Choice] = {}
    fused: set[nn.Module] = set()
    for name, module in model.named_modules():
        name = name or type(model).__name__.lower()
        if isinstance(module, nn.MultiheadAttention):
            fused.update(module.modules())
        if not list(module.parameters(recurse=False)) and not _parametrized(module):
            continue
        choice = _choice(name, module, module in fused)
        first = owners.setdefault(weight_identity(module), choice)
        found[name] = choice
        if first is choice:
            continue
        if isinstance(module, nn.Linear) and found[first.name].status == "exact":
            if isinstance(first.module, nn.Linear):
                reason = f"shares its weight with {first.name!r}"
                found[name] = Choice(name, module, "tied", reason, first.name)
                continue
        for one, other in ((choice, first), (first, choice)):
            if found[one.name].status != "plain gradient":
                reason = (
                    f"shares its weight with {other.name!r}, {type(other.module).__name__}: the "
                    "block of a weight used by two kinds of layer, or by two convolutions, is not "
                    "defined"
                )
                found[one.name] = Choice(one.name, one.module, "plain gradient", reason)
    lost = {name for name, choice in found.items() if choice.status == "plain gradient"}
    return [
        Choice(c.name, c.module, "plain gradient", found[c.owner].reason) if c.owner in lost else c
        for c in found.values()
    ]


def _parametrized(module: nn.Module) -> bool:
    return torch.nn.utils.parametrize.is_parametrized(module)


def _choice(name: str, module: nn.Module, fused: bool) -> Choice:
    plain = "plain gradient"
    if fused:
        return Choice(name, module, plain, "inside nn.MultiheadAttention, which calls no layer")
    if isinstance(module, _RECURRENT):
        return Choice(name, module, plain, "fused recurrence; fl.models' lstm is of Linear maps")
    if not isinstance(module, (nn.Linear, *CONVOLUTIONS)):
        return Choice(name, module, plain, f"{type(module).__name__} has no Kronecker form")
    if not module.weight.requires_grad:
        return Choice(name, module, plain, "its weight is frozen")
    return Choice(name, module, "exact")


@dataclass(frozen=True)
class Weight:
    """A parameter, or the computed weight of a parametrized module, and every name it has."""

    name: str
    tensor: Tensor
    module: nn.Module
    # its name in the module
    local: str
    aliases: tuple[str, ...] = ()

    @property
    def parametrized(self) -> bool:
        """Whether the module computes it."""
        return self.local not in self.module._parameters


def weights_of(model: nn.Module, computed: bool = True) -> dict[str, Weight]:
    """By name, in order of registration: a module's own name for its `weight`.

    A tensor that several modules share has the name of the first; the others are aliases.

    Args:
        model: the model.
        computed: whether a parametrized module has its computed weight, or the parameters that it
            is computed of. To compute it may update buffers.
    """
    found: dict[int, Weight] = {}
    for prefix, module in model.named_modules():
        if computed and "parametrizations" in prefix.split("."):
            continue
        made = list(getattr(module, "parametrizations", ())) if _parametrized(module) else []
        for local in (*module._parameters, *(made if computed else ())):
            tensor = getattr(module, local)
            if not isinstance(tensor, Tensor):
                continue
            at = prefix or type(model).__name__.lower()
            name = at if local == "weight" else f"{prefix}.{local}" if prefix else local
            first = found.get(id(tensor))
            if first is None:
                found[id(tensor)] = Weight(name, tensor, module, local)
            else:
                found[id(tensor)] = replace(first, aliases=(*first.aliases, name))
    return {weight.name: weight for weight in found.values()}


Names = str | Iterable[str] | None


def chosen(
    weights: Mapping[str, Weight], layers: Names, skip: Names = None
) -> tuple[list[str], set[str]]:
    """The names of the weights that `layers` means, and those of them that it names in full.

    Args:
        weights: those of the model.
        layers: names or patterns such as `"encoder.*"`; None for all trainable ones.
        skip: names or patterns of what is left out.

    Raises:
        CaptureError: for a name or a pattern that means nothing in this model.
    """
    known = {alias: w.name for w in weights.values() for alias in (w.name, *w.aliases)}
    trainable = {name for name, weight in weights.items() if weight.tensor.requires_grad}
    found: set[str] = set()
    named: set[str] = set()
    if layers is None:
        found = trainable
    else:
        for pattern in [layers] if isinstance(layers, str) else layers:
            if pattern in known:
                named.add(known[pattern])
                continue
            matches = {known[name] for name in _matching(pattern, known)} & trainable
            if not matches:
                near = nearest(pattern, known, list(known)[:5])
                raise CaptureError(
                    f"no layer {pattern!r} in this model; nearest: {near}; "
                    "fl.support and `fisherlab support` list all"
                )
            found |= matches
    for pattern in [skip] if isinstance(skip, str) else skip or ():
        matches = {known[name] for name in _matching(pattern, known)}
        if not matches:
            near = nearest(pattern, known, list(known)[:5])
            raise CaptureError(f"skip={pattern!r} means no layer of this model; nearest: {near}")
        found -= matches
        named -= matches
    for name in sorted(named - trainable):
        raise CaptureError(f"layer {name!r} has no block: its weight is frozen")
    return [name for name in weights if name in found | named], named


def _matching(pattern: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name == pattern or fnmatchcase(name, pattern)]


def select(model: nn.Module, layers: Names) -> dict[str, nn.Module]:
    """The Linear and convolution modules by name, those that share a weight included."""
    known = {choice.name: choice for choice in choices(model)}
    if layers is None:
        chosen = {c.name: c.module for c in known.values() if c.status == "exact"}
        return chosen | _sharing(known, set(chosen))
    chosen = {}
    for name in [layers] if isinstance(layers, str) else layers:
        if name not in known:
            near = nearest(name, known, list(known)[:5])
            raise CaptureError(
                f"no layer {name!r} in this model; nearest: {near}; "
                "fl.support and `fisherlab support` list all"
            )
        if known[name].status != "exact":
            raise CaptureError(f"layer {name!r} has no block: {known[name].reason}")
        chosen[name] = known[name].module
    return chosen | _sharing(known, set(chosen))


def _sharing(known: dict[str, Choice], owners: set[str]) -> dict[str, nn.Module]:
    """The layers that share the weight of one of `owners`: one block, the positions of all."""
    return {c.name: c.module for c in known.values() if c.owner in owners}


def check_model(model: nn.Module) -> None:
    """Refuse training-mode normalisation and dropout, half precision and non-finite parameters."""
    for name, module in model.named_modules():
        batch_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if batch_norm and (module.training or module.running_mean is None):
            raise CaptureError(
                f"{name!r} is a {type(module).__name__} that uses batch statistics: examples "
                "interact, so per-example gradients do not exist; call model.eval() first"
            )
        if isinstance(module, nn.modules.instancenorm._InstanceNorm) and (
            module.training and module.track_running_stats
        ):
            raise CaptureError(f"{name!r} would update its statistics; call model.eval() first")
        if isinstance(module, _DROPOUT) and module.training and module.p > 0:
            raise CaptureError(f"{name!r} is an active Dropout; call model.eval() first")
        if isinstance(module, nn.LSTM | nn.GRU | nn.RNN) and module.training and module.dropout:
            raise CaptureError(f"{name!r} has active dropout; call model.eval() first")
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.dtype in (torch.float16, torch.bfloat16):
            raise CaptureError(
                f"parameter {name!r} is {parameter.dtype}; curvature in half precision is noise: "
                "call model.float() or model.double() (autocast is fine)"
            )
        if not all_finite(parameter):
            raise CaptureError(f"parameter {name!r} has NaN or inf entries")


def check_batch(x: object, y: Tensor, model: nn.Module) -> None:
    """Refuse an empty batch, NaN or inf, and inputs of another dtype or device than the model's."""
    for value, role in ((x, "x"), (y, "y")):
        if not isinstance(value, Tensor) and (role == "y" or hasattr(value, "__array__")):
            kind = type(value).__name__
            raise CaptureError(f"{role} is no tensor but {kind}; pass torch.as_tensor({role})")
    parameter = next(model.parameters(), None)
    for tensor, role in (*_tensors(x), (y, "y")):
        if tensor.ndim == 0 or tensor.shape[0] == 0:
            raise CaptureError(f"{role} is an empty batch, shape {tuple(tensor.shape)}")
        if tensor.is_floating_point() and not all_finite(tensor):
            bad = (~torch.isfinite(tensor)).flatten(1).any(1) if tensor.ndim > 1 else None
            rows = "" if bad is None else f", first in row {int(bad.nonzero()[0])}"
            raise CaptureError(f"{role} has NaN or inf entries{rows}")
    if parameter is None:
        return
    for tensor, role in _tensors(x):
        if tensor.is_floating_point() and tensor.dtype != parameter.dtype:
            raise CaptureError(
                f"{role} is {tensor.dtype} and the model {parameter.dtype}; convert one of them"
            )
        if tensor.device != parameter.device:
            raise CaptureError(f"{role} is on {tensor.device} and the model on {parameter.device}")


def _tensors(x: object) -> list[tuple[Tensor, str]]:
    """The tensors among the model's arguments, and what to call each."""
    if isinstance(x, Mapping):
        named = [(value, f"x[{key!r}]") for key, value in x.items()]
    elif isinstance(x, tuple | list):
        named = [(value, f"x[{k}]") for k, value in enumerate(x)]
    else:
        named = [(x, "x")]
    return [(value, role) for value, role in named if isinstance(value, Tensor)]
