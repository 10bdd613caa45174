"""A stand-in accelerator: tensors that torch believes to be elsewhere, computed on the CPU.

Torch takes a `There` for a tensor on the device `"meta"`; its numbers are a CPU tensor's. An
operation that mixes in a tensor of the CPU raises where CUDA raises, and what copies a number to
the host is counted by line. With `FISHERLAB_DEVICE=cuda` the same tests run on the device itself.
"""

from __future__ import annotations

import copy
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_map

REAL = os.environ.get("FISHERLAB_DEVICE", "")
DEVICE = torch.device(REAL or "meta")
OURS = str(Path(__file__).parent.parent / "fisherlab")
aten = torch.ops.aten

DATA = ("tensor", "as_tensor", "asarray")

# copies between devices, and what only has the metadata of its tensor argument
ACROSS = {aten.copy_, aten._to_copy, aten.copy, aten.fill, aten.fill_}
# `addcmul` takes a CPU number as its last factor alone; these take none
NO_NUMBERS = {aten.addcmul, aten.addcmul_, aten.addcdiv, aten.addcdiv_, aten.lerp, aten.lerp_}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._unsafe_index, aten._index_put_impl_}
READS = {aten._local_scalar_dense: "number", aten.equal: "equal"}
# shapes that depend on numbers: the host waits for them
WAITS = {aten.nonzero, aten.masked_select, aten.repeat_interleave, aten._unique2, aten.bincount}


class MixedDevices(RuntimeError):
    """A tensor of the CPU where CUDA takes none."""


class There(torch.Tensor):
    """A tensor on the stand-in accelerator, with its numbers in `inner`."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> There:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return operate(func, args, kwargs or {}, None)

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __getitem__(self, index):
        return super().__getitem__(_index(index))

    def __setitem__(self, index, value):
        super().__setitem__(_index(index), value)

    def new_tensor(self, data, dtype=None):
        return There(torch.tensor(data, dtype=dtype or self.dtype))

    def tolist(self):
        return self.cpu().tolist()

    def numpy(self, **options):
        raise TypeError("can't convert a tensor of the stand-in to numpy; use Tensor.cpu() first")

    def __format__(self, spec):
        return format(self.cpu(), spec)

    def __deepcopy__(self, memo):
        copy = self.detach().clone().requires_grad_(self.requires_grad)
        if isinstance(self, nn.Parameter):
            copy = nn.Parameter(copy, self.requires_grad)
        memo[id(self)] = copy
        return copy

    def __repr__(self):
        return f"There({self.inner!r})"


class Accelerator(TorchDispatchMode):
    """While it is entered, `device="meta"` is the stand-in; `reads` counts reads by line."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[tuple[str, str]] = Counter()
        makers = {name: _from_data(getattr(torch, name)) for name in DATA}
        self._makers = patch.multiple(torch, **makers)

    def __enter__(self):
        if REAL:
            return self
        self._makers.start()
        return super().__enter__()

    def __exit__(self, *raised):
        if not REAL:
            super().__exit__(*raised)
            self._makers.stop()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would import its compiler, which takes seconds

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return operate(func, args, kwargs or {}, self.reads)


def _from_data(make: Any) -> Any:
    """A maker of tensors of Python's numbers, which torch makes without an operation."""

    def made(data: Any, *args: Any, device: Any = None, **options: Any) -> Tensor:
        if device is None or torch.device(device) != DEVICE or isinstance(data, Tensor):
            return make(data, *args, device=device, **options)
        return There(make(data, *args, device="cpu", **options))

    return made


def _index(index: Any) -> Any:
    if isinstance(index, list):
        return torch.tensor(index)
    return tuple(map(_index, index)) if isinstance(index, tuple) else index


def operate(func: Any, args: Any, kwargs: Any, reads: Counter[tuple[str, str]] | None) -> Any:
    """One operation: checked for its devices, counted, computed on the CPU, wrapped."""
    tensors: list[Tensor] = []
    inner_args = [_inner(x, tensors) for x in args]
    inner_kwargs = {key: _inner(x, tensors) for key, x in kwargs.items()}
    there = any(isinstance(x, There) for x in tensors)
    asked = kwargs.get("device")
    asked = None if asked is None else torch.device(asked).type
    empty = [x for x in tensors if x.device == DEVICE and not isinstance(x, There)]
    assert not empty, f"{func}: a tensor without numbers, {empty[0].shape}: the stand-in lost it"
    if not there and asked != DEVICE.type:
        return func(*args, **kwargs)
    packet = func.overloadpacket
    generator = kwargs.get("generator")
    if generator is not None and generator.device.type == "cpu":
        raise MixedDevices(f"{func}: Expected a generator of the device, got one of the CPU")
    if there and packet not in ACROSS:
        check(func, packet, args, tensors)
    if reads is not None and there:
        count(packet, asked, args, reads)
    if asked == DEVICE.type:
        inner_kwargs["device"] = "cpu"
    out = func(*inner_args, **inner_kwargs)
    home = asked == "cpu" or (packet is aten.copy_ and not isinstance(args[0], There))
    if home:
        return args[0] if packet is aten.copy_ else out
    wrapped = _wrapped(out)
    return return_and_correct_aliasing(func, args, kwargs, wrapped)


def _inner(value: Any, tensors: list[Tensor]) -> Any:
    """An argument with the numbers of what is there; its tensors join the list."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return value.inner if isinstance(value, There) else value
    return [_inner(x, tensors) for x in value] if isinstance(value, list | tuple) else value


def _wrapped(out: Any) -> Any:
    if isinstance(out, Tensor):
        return There(out)
    return type(out)(map(_wrapped, out)) if isinstance(out, list | tuple) else out


def check(func: Any, packet: Any, args: Any, tensors: list[Tensor]) -> None:
    """Raise where CUDA does."""
    here = [x for x in tensors if not isinstance(x, There)]
    if packet in INDEXING and isinstance(args[0], There):
        indices = [x for x in args[1] if x is not None]
        here = [x for x in here if not any(x is index for index in indices)]
        here = [x for x in here if x.ndim]  # a value
    elif torch.Tag.pointwise in func.tags and packet not in NO_NUMBERS:
        written = func._schema.is_mutable and not isinstance(args[0], There)
        here = [x for x in here if x.ndim or written]
    if here:
        shapes = ", ".join(f"{x.dtype} {list(x.shape)}" for x in here)
        raise MixedDevices(f"{func}: expected all tensors on the accelerator; on the CPU: {shapes}")


def count(packet: Any, asked: str | None, args: Any, reads: Counter[tuple[str, str]]) -> None:
    """Count what makes the host wait."""
    kind = READS.get(packet)
    if packet in WAITS or (
        packet in INDEXING and any(x is not None and x.dtype == torch.bool for x in args[1])
    ):
        kind = "shape"
    if asked == "cpu" or (packet is aten.copy_ and not isinstance(args[0], There)):
        kind = "copy"
    if kind:
        reads[kind, line()] += 1


def line() -> str:
    """The innermost line of the package that is being executed."""
    frame = sys._getframe(1)
    while frame is not None:
        ours = frame.f_code.co_filename.startswith(OURS)
        # who asks for a read, not what reads
        if ours and not frame.f_code.co_filename.endswith("blocks/reads.py"):
            name = frame.f_code.co_filename.removeprefix(OURS).lstrip("/")
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


def there(value: Any) -> Any:
    """Tensors and modules, also in containers, copied to the accelerator."""

    def moved(x: Any) -> Any:
        if isinstance(x, nn.Module):
            return _module(x)
        return _placed(x) if isinstance(x, Tensor) else x

    return tree_map(moved, value)


def here(value: Any) -> Any:
    """Tensors, and those in containers, back on the CPU."""

    def moved(x: Any) -> Any:
        return _inner(x.detach(), []).cpu().clone() if isinstance(x, Tensor) else x

    return tree_map(moved, value)


def _placed(x: Tensor) -> Tensor:
    x = x.detach().clone()
    return x.to(DEVICE) if REAL else There(x)


def _module(module: nn.Module) -> nn.Module:
    module = copy.deepcopy(module)
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                part._parameters[name] = nn.Parameter(_placed(p), p.requires_grad)
        for name, b in part._buffers.items():
            if b is not None:
                part._buffers[name] = _placed(b)
    return module
