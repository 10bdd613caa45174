"""Which layers have a block, which do not and why; and the checks made before any pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from fisherlab import doors
from fisherlab.blocks.numerics import all_finite
from fisherlab.extract.geometry import CaptureError
from fisherlab.extract.isolation import buffers_kept
from fisherlab.names import nearest

_DROPOUT = nn.modules.dropout._DropoutNd


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
    def parameters(self) -> dict[str, Tensor]:
        """The parameters that a parametrized module's weight is computed of, by name; or none."""
        made = getattr(self.module, "parametrizations", {})
        if self.local not in made or self.local in self.module._parameters:
            return {}
        prefix = self.name.removesuffix(f".{self.local}")
        at = f"{prefix}.parametrizations.{self.local}"
        return {f"{at}.{name}": p for name, p in made[self.local].named_parameters()}

    @property
    def unfit(self) -> str:
        """Why no product with it has a block, whatever the model does; or ""."""
        if self.tensor.is_complex():
            return f"its weight is {self.tensor.dtype}, and a block is one of real numbers"
        if not self.tensor.numel():
            return f"its weight has no entries, shape {tuple(self.tensor.shape)}"
        if isinstance(self.module, torch.jit.ScriptModule):
            return (
                "it is inside a scripted or traced module, whose functions Python does not see: "
                "pass the module it was made of"
            )
        return ""


def _parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The module's own parameters; those of a scripted one are no dict of Python's."""
    if isinstance(module, torch.jit.ScriptModule):
        return dict(module.named_parameters(recurse=False))
    return {name: p for name, p in module._parameters.items() if p is not None}


def weights_of(model: nn.Module, computed: bool = True) -> dict[str, Weight]:
    """All weights by name, in order of registration; a `weight` has its module's own name.

    A tensor that several modules share has the name of the first; the others are aliases.

    Args:
        model: the model.
        computed: whether a parametrized module has its computed weight, or the parameters that it
            is computed of. Buffers that this updates are put back: the next pass starts from them.
    """
    found: dict[int, Weight] = {}
    for prefix, module in model.named_modules():
        if computed and "parametrizations" in prefix.split("."):
            continue
        parametrized = torch.nn.utils.parametrize.is_parametrized(module)
        made = list(getattr(module, "parametrizations", ())) if parametrized else []
        names = (*_parameters(module), *(made if computed else ()))
        with buffers_kept(module) if made else nullcontext():
            tensors = {local: getattr(module, local) for local in names}
        for local, tensor in tensors.items():
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


def on_tape(weights: Mapping[str, Weight]) -> dict[str, Tensor]:
    """The tensors by name that can have a block."""
    return {name: weight.tensor for name, weight in weights.items() if not weight.unfit}


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
    full = {f"{name}.weight": owner for name, owner in known.items()}
    trainable = {name for name, weight in weights.items() if weight.tensor.requires_grad}
    found: set[str] = set()
    named: set[str] = set()
    if layers is None:
        found = set(trainable)
    else:
        for pattern in _patterns(layers, "layers"):
            if pattern in known or pattern in full:
                named.add(known.get(pattern) or full[pattern])
                continue
            matches = {known[name] for name in _matching(pattern, known)}
            if not matches:
                near = _nearest(pattern, known)
                raise CaptureError(
                    f"no layer {pattern!r} in this model; nearest: {near}; "
                    "fl.support and `fisherlab support` list all"
                )
            if not matches & trainable:
                raise CaptureError(f"every layer that layers={pattern!r} means is frozen")
            found |= matches & trainable
        if not found | named:
            raise CaptureError("layers= names no layer; pass names, patterns, or None for all")
    for pattern in [] if skip is None else _patterns(skip, "skip"):
        matches = {known[name] for name in _matching(pattern, known)}
        if not matches:
            near = _nearest(pattern, known)
            raise CaptureError(f"skip={pattern!r} means no layer of this model; nearest: {near}")
        found -= matches
        named -= matches
    if skip is not None and trainable and not found | named:
        raise CaptureError(f"skip={skip!r} leaves no layer to capture")
    for name in sorted(named):
        reason = weights[name].unfit or ("" if name in trainable else "its weight is frozen")
        if reason:
            raise CaptureError(f"layer {name!r} has no block: {reason}")
    return [name for name in weights if name in found | named], named


def _nearest(pattern: str, names: Iterable[str]) -> str:
    layers = [name for name in names if not name.endswith("bias")]
    return nearest(pattern, layers, layers[:5])


def _patterns(given: Iterable[str] | str, role: str) -> list[str]:
    wanted = f"{role}= takes names or patterns of layers, which"
    patterns = doors.items(given, wanted, error=CaptureError)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise CaptureError(
                f"{role}= takes names or patterns of layers; got {type(pattern).__name__}"
            )
    return patterns


def _matching(pattern: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name == pattern or fnmatchcase(name, pattern)]


def check_initialised(model: nn.Module) -> None:
    """Refuse what no pass can send a gradient to, and lazy layers: a pass would initialise them."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise CaptureError(
                f"{name!r} is not initialised: a lazy layer takes its shape from the first batch; "
                "call the model once, under torch.no_grad()"
            )
        if tensor.is_inference() and tensor.requires_grad:
            raise CaptureError(
                f"parameter {name!r} was made in inference mode, where autograd tracks nothing; "
                "make or load the model outside torch.inference_mode()"
            )


def check_model(model: nn.Module) -> None:
    """Refuse lazy layers, training-mode normalisation and dropout, and non-finite parameters."""
    check_initialised(model)
    for name, parameter in model.named_parameters():
        if type(parameter) is nn.Parameter and parameter.is_meta:
            raise CaptureError(
                f"parameter {name!r} is on the device 'meta', which holds no numbers; load the "
                "weights first"
            )
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
        if not all_finite(parameter):
            raise CaptureError(f"parameter {name!r} has NaN or inf entries")


def check_inputs(x: object) -> None:
    """Refuse inputs without examples: arrays of NumPy's kind, nested tensors, an empty batch."""
    if not isinstance(x, Tensor) and hasattr(x, "__array__"):
        raise CaptureError(f"x is no tensor but {type(x).__name__}; pass torch.as_tensor(x)")
    given = tensors_of(x)
    batched = any(tensor.ndim for tensor, _ in given if not nn.parameter.is_lazy(tensor))
    for tensor, role in given:
        _check_rows(tensor, role, number=batched)


def _check_rows(tensor: Tensor, role: str, number: bool = False) -> None:
    """Refuse a tensor without rows; it may be a `number`, which is every example's."""
    if nn.parameter.is_lazy(tensor) or tensor.is_nested or tensor.is_quantized:
        raise CaptureError(
            f"{role} is {doors.said(tensor)}; pass a plain tensor of numbers, dense or padded with "
            "a mask"
        )
    if (tensor.ndim == 0 and not number) or (tensor.ndim and tensor.shape[0] == 0):
        raise CaptureError(f"{role} is an empty batch, shape {tuple(tensor.shape)}")


def check_batch(x: object, y: Tensor, model: nn.Module) -> None:
    """Refuse an empty batch, NaN or inf, and inputs on another device than the model's."""
    check_inputs(x)
    if not isinstance(y, Tensor):
        several = isinstance(y, tuple) and any(isinstance(part, Tensor) for part in y)
        step = (
            "join the labels in one tensor, and say what the loss is made of by "
            "fl.register_criterion (docs/howto/own-loss.md)"
            if several or isinstance(y, Mapping)
            else "pass torch.as_tensor(y)"
        )
        raise CaptureError(f"y is no tensor but {type(y).__name__}; {step}")
    if nn.parameter.is_lazy(y) or y.layout != torch.strided:
        raise CaptureError(f"y is {doors.said(y)}; pass y.to_dense()")
    _check_rows(y, "y")
    for tensor, role in (*tensors_of(x), (y, "y")):
        if type(tensor) is Tensor and tensor.is_meta:
            raise CaptureError(f"{role} is on the device 'meta', which holds no numbers")
        if tensor.is_floating_point() and not all_finite(tensor):
            bad = (~torch.isfinite(tensor)).flatten(1).any(1) if tensor.ndim > 1 else None
            rows = "" if bad is None else f", first in row {int(bad.nonzero()[0])}"
            raise CaptureError(f"{role} has NaN or inf entries{rows}")
    devices = {parameter.device for parameter in model.parameters()}
    for tensor, role in tensors_of(x):
        if devices and tensor.device not in devices:
            device = ", ".join(sorted(map(str, devices)))
            raise CaptureError(f"{role} is on {tensor.device} and the model on {device}")


def check_dtypes(x: object, model: nn.Module) -> None:
    """Refuse inputs of another dtype than any parameter's; asked once the model failed."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point() or p.is_complex()}
    for tensor, role in tensors_of(x):
        numbers = tensor.is_floating_point() or tensor.is_complex()
        if dtypes and numbers and tensor.dtype not in dtypes:
            known = ", ".join(sorted(map(str, dtypes)))
            raise CaptureError(
                f"{role} is {tensor.dtype} and the model {known}; convert one of them"
            )


def tensors_of(x: object) -> list[tuple[Tensor, str]]:
    """The tensors among the model's arguments, and what to call each."""
    if isinstance(x, Mapping):
        named = [(value, f"x[{key!r}]") for key, value in x.items()]
    elif isinstance(x, tuple | list):
        named = [(value, f"x[{k}]") for k, value in enumerate(x)]
    else:
        named = [(x, "x")]
    return [(value, role) for value, role in named if isinstance(value, Tensor)]
