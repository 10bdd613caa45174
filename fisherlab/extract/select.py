"""Which layers have a block, which do not and why; and the checks made before any pass."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fisherlab.blocks.numerics import all_finite
from fisherlab.extract.layer import CONVOLUTIONS, CaptureError
from fisherlab.names import nearest

_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
_DROPOUT = nn.modules.dropout._DropoutNd


@dataclass(frozen=True)
class Choice:
    """A module with parameters: its name, whether it has a block, and the reason if it has none."""

    name: str
    module: nn.Module
    status: str
    reason: str = ""


def choices(model: nn.Module) -> list[Choice]:
    """One `Choice` per module that owns parameters, in order of registration."""
    owners: dict[int, tuple[str, nn.Module]] = {}
    found = []
    fused = set()
    for name, module in model.named_modules():
        name = name or type(model).__name__.lower()
        if isinstance(module, nn.MultiheadAttention):
            fused |= {id(part) for part in module.modules()}
        if not list(module.parameters(recurse=False)) and not _parametrized(module):
            continue
        found.append(_choice(name, module, id(module) in fused, owners))
    return found


def _parametrized(module: nn.Module) -> bool:
    return torch.nn.utils.parametrize.is_parametrized(module)


def _choice(
    name: str, module: nn.Module, fused: bool, owners: dict[int, tuple[str, nn.Module]]
) -> Choice:
    plain = "plain gradient"
    if fused:
        return Choice(name, module, plain, "inside nn.MultiheadAttention, which calls no layer")
    if isinstance(module, _RECURRENT):
        return Choice(name, module, plain, "fused recurrence; fl.models' lstm is of Linear maps")
    if not isinstance(module, (nn.Linear, *CONVOLUTIONS)):
        kind = type(module).__name__
        tied = owners.get(id(getattr(module, "weight", None)))
        owners.setdefault(id(getattr(module, "weight", None)), (name, module))
        if tied:
            return Choice(name, module, "tied", f"{kind} shares its weight with {tied[0]!r}")
        return Choice(name, module, plain, f"{kind} has no Kronecker form")
    if not module.weight.requires_grad:
        return Choice(name, module, plain, "its weight is frozen")
    weight = id(module.weight)
    if weight in owners:
        return Choice(name, module, "tied", f"shares its weight with {owners[weight][0]!r}")
    owners[weight] = (name, module)
    return Choice(name, module, "exact")


def select(model: nn.Module, layers: Iterable[str] | None) -> dict[str, nn.Module]:
    """The modules to capture by name; unknown or unsupported names are refused with the reason."""
    known = {choice.name: choice for choice in choices(model)}
    if layers is None:
        chosen = {c.name: c.module for c in known.values() if c.status == "exact"}
        return chosen | _sharing(known, set(known))
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
    found: dict[str, nn.Module] = {}
    for choice in known.values():
        owner = choice.reason.split("'")[1] if choice.status == "tied" else None
        if owner not in owners:
            continue
        if not (
            isinstance(choice.module, nn.Linear) and isinstance(known[owner].module, nn.Linear)
        ):
            raise CaptureError(
                f"layer {choice.name!r} {choice.reason}: the block of a weight used by two "
                "different kinds of layer is not defined; name other layers with `layers=`"
            )
        found[choice.name] = choice.module
    return found


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
    if isinstance(x, dict):
        named = [(value, f"x[{key!r}]") for key, value in x.items()]
    elif isinstance(x, tuple | list):
        named = [(value, f"x[{k}]") for k, value in enumerate(x)]
    else:
        named = [(x, "x")]
    return [(value, role) for value, role in named if isinstance(value, Tensor)]
