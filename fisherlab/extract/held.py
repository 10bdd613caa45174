"""What a model holds besides its parameters, and the way back to it.

A pass may update whatever it reaches: statistics, a cache in a dict, a hidden state with its graph,
counters in a plain object, a random stream of the model's own.
"""

from __future__ import annotations

import operator
import pickle
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer
from torch.overrides import TorchFunctionMode

# Up to this many numbers a tensor has a copy from the start, above it from the first write on.
COPIED = 2**22
# The narrower ones first; what is in a subclass goes back by these classes' own methods.
_CONTAINERS: tuple[Any, ...] = (OrderedDict, dict, list, set, deque)
_NUMBERS = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_CODE = (type, FunctionType, BuiltinFunctionType, ModuleType)
# Most of what a module holds; these have nothing inside.
_PLAIN = frozenset((*_NUMBERS, bool))
_IN_PLACE = frozenset(
    f"__{name}__"
    for name in "setitem iadd isub imul itruediv ifloordiv imod ipow iand ior ixor".split()
)


class Copies:
    """Copies of tensors that a pass may write into, taken late of the large ones."""

    def __init__(self) -> None:
        # by id: the tensor, its numbers in place, their copy, its version
        self._found: dict[int, tuple[Tensor, Tensor, Tensor | None, int | None]] = {}
        self._large: dict[int, list[Tensor]] = {}

    def add(self, tensor: Tensor, whole: bool = False) -> None:
        """Keep a tensor: by a copy if it is small or wanted `whole`, else watch its storage."""
        copy = None
        if whole or tensor.numel() <= COPIED or not _has_storage(tensor):
            copy = tensor.detach().clone()
        else:
            self._large.setdefault(tensor.untyped_storage()._cdata, []).append(tensor)
        version = None if tensor.is_inference() else tensor._version
        self._found[id(tensor)] = tensor, tensor.data, copy, version

    def before_write(self, arguments: Iterable[Any]) -> None:
        """Copy the large tensors among some arguments of a function that writes."""
        for argument in arguments:
            if isinstance(argument, tuple | list):
                self.before_write(argument)
            elif isinstance(argument, Tensor) and _has_storage(argument):
                for tensor in self._large.pop(argument.untyped_storage()._cdata, ()):
                    _, data, _, version = self._found[id(tensor)]
                    self._found[id(tensor)] = tensor, data, data.clone(), version

    def watched(self) -> AbstractContextManager[Any]:
        """The context of a pass: it sees the operations in place on large tensors."""
        return _Writes(self) if self._large else nullcontext()

    def wrote(self, tensor: Tensor) -> bool:
        """Whether a tensor has other numbers than before."""
        _, _, copy, version = self._found[id(tensor)]
        if copy is None or not _has_storage(tensor):
            return version is not None and tensor._version != version
        return not _is_equal(tensor.data, copy)

    def put_back(self) -> None:
        """Give the tensors their numbers, where others are there now."""
        for tensor, data, copy, version in self._found.values():
            if self.wrote(tensor):
                if _has_storage(tensor) and tensor.data_ptr() != data.data_ptr():
                    tensor.data = data
                if copy is not None:
                    data.copy_(copy)
            if copy is not None and version is not None and tensor._version != version:
                # a live graph of the user's may hold the tensor
                torch._C._autograd._unsafe_set_version_counter((tensor,), (version,))


class _Writes(TorchFunctionMode):
    """Copies large tensors before a function writes into them."""

    def __init__(self, copies: Copies) -> None:
        super().__init__()
        self.copies = copies

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _IN_PLACE or (name[-1:] == "_" != name[-2:-1]) or "out" in kwargs:
            self.copies.before_write((*args, *kwargs.values()))
        return func(*args, **kwargs)


class Held:
    """Everything inside some containers, as it is when this is made.

    Args:
        roots: the containers; tensors among them have copies at any size.
    """

    def __init__(self, roots: Iterable[Any]) -> None:
        waiting = list(roots)
        self.copies = Copies()
        self._whole = {id(root) for root in waiting if isinstance(root, Tensor)}
        self._containers: list[tuple[Any, Any, list[Any]]] = []
        self._arrays: list[tuple[Any, Any]] = []
        self._streams: list[tuple[Callable[[], Any], Callable[[Any], Any], Any]] = []
        self._stand_ins: dict[int, Tensor] = {}
        self._records: set[int] = set()
        # every value by id, so that none is let go and its id taken by another
        self._seen: dict[int, Any] = {}
        while waiting:
            value = waiting.pop()
            if type(value) not in _PLAIN and id(value) not in self._seen:
                self._seen[id(value)] = value
                waiting += self._inside(value)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """All is afterwards as it was.

        Tensors with a graph are copies of themselves inside: an operation in place would go into
        the graph that the user holds.
        """
        try:
            for kind, now, held in self._containers:
                if held and kind is not set:
                    for key, value in held if issubclass(kind, dict) else enumerate(held):
                        other = self._stand_in(value)
                        if other is not value:
                            kind.__setitem__(now, key, other)
            with self.copies.watched():
                yield
        finally:
            self.copies.put_back()
            for kind, now, held in self._containers:
                _refill(kind, now, held)
            for array, before in self._arrays:
                if array.tobytes() != before.tobytes():
                    array[...] = before
            for _, put, state in self._streams:
                put(state)

    def draws(self) -> bytes:
        """The states of the random streams that the model holds."""
        return pickle.dumps([get() for get, _, _ in self._streams]) if self._streams else b""

    def _inside(self, value: Any) -> Iterable[Any]:
        """Note a value; returns what it holds."""
        if type(value) in (dict, OrderedDict):
            return self._contained(type(value), value)
        if isinstance(value, nn.Module):
            return ()
        if isinstance(value, Tensor):
            if _is_state(value):
                self.copies.add(value, id(value) in self._whole)
            return ()
        if isinstance(value, np.ndarray):
            if value.flags.writeable and value.size <= COPIED:
                self._arrays.append((value, value.copy()))
            return ()
        if (stream := _stream(value)) is not None:
            get, put = stream
            self._streams.append((get, put, get()))
            return ()
        found: list[Any] = [vars(value)] if _is_record(value, self._records) else []
        kind = next((kind for kind in _CONTAINERS if isinstance(value, kind)), None)
        if kind is not None:
            return [*found, *self._contained(kind, value)]
        return [*found, *value] if isinstance(value, tuple) else found

    def _contained(self, kind: Any, value: Any) -> Iterable[Any]:
        held = _items(kind, value)
        self._containers.append((kind, value, held))
        return [each for _, each in held] if issubclass(kind, dict) else held

    def _stand_in(self, value: Any) -> Any:
        """A copy of a tensor with a graph; any other value itself."""
        if isinstance(value, tuple):
            found = [self._stand_in(each) for each in value]
            if all(map(operator.is_, found, value)):
                return value
            return value._make(found) if hasattr(value, "_make") else type(value)(found)
        if type(value) is not Tensor or value.grad_fn is None or value.numel() > COPIED:
            return value
        if isinstance(value._base, nn.Parameter):  # a view of it, and known as such
            return value
        if id(value) not in self._stand_ins:
            with torch.inference_mode(False), torch.enable_grad():
                self._stand_ins[id(value)] = value.clone()
        return self._stand_ins[id(value)]


def _items(kind: Any, value: Any) -> list[Any]:
    return [*kind.items(value)] if issubclass(kind, dict) else [*kind.__iter__(value)]


def _refill(kind: Any, now: Any, held: list[Any]) -> None:
    """Give a container what it held, where that is not in it."""
    if not held and not now:
        return
    mapping = issubclass(kind, dict)
    found, wanted = (
        [part for item in items for part in item] if mapping else items
        for items in (_items(kind, now), held)
    )
    if len(found) == len(wanted) and all(map(operator.is_, found, wanted)):
        return
    kind.clear(now)
    if mapping:
        for key, value in held:
            kind.__setitem__(now, key, value)
    else:
        (set.update if kind is set else kind.extend)(now, held)


def _is_state(tensor: Tensor) -> bool:
    """Whether a pass may move a tensor in place that has no other copy."""
    kinds = nn.Parameter | UninitializedBuffer
    return not isinstance(tensor, kinds) and not tensor.is_meta


def _has_storage(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_nested


def _is_equal(now: Tensor, before: Tensor) -> bool:
    """Whether a tensor is as its copy; NaN equals NaN."""
    if now.shape == before.shape and torch.equal(now, before):
        return True
    if not now.is_floating_point() or now.shape != before.shape:
        return False
    return torch.allclose(now, before, rtol=0.0, atol=0.0, equal_nan=True)


def _stream(value: Any) -> tuple[Callable[[], Any], Callable[[Any], Any]] | None:
    """How to read and set the state of a random stream; None of any other value."""
    if isinstance(value, torch.Generator):
        return value.get_state, value.set_state
    if isinstance(value, random.Random):
        return value.getstate, value.setstate
    if isinstance(value, np.random.RandomState):
        return value.get_state, value.set_state
    if isinstance(value, np.random.Generator):
        bits: Any = value.bit_generator
        return lambda: bits.state, lambda state: setattr(bits, "state", state)
    return None


def _is_record(value: Any, records: set[int]) -> bool:
    """Whether an object is no more than its data, and that of the objects which it refers to.

    An owner of modules, files, locks or threads, such as a trainer or a logger, is none. All that
    a record refers to are records, and join those that are known.
    """
    known = (*_NUMBERS, *_CODE, *_CONTAINERS, tuple, Tensor, np.ndarray)
    seen, waiting = set[int](), [value]
    while waiting:
        each = waiting.pop()
        if id(each) in seen or id(each) in records:
            continue
        seen.add(id(each))
        own = getattr(each, "__dict__", None)
        none = (*_NUMBERS, *_CODE, nn.Module, torch.optim.Optimizer)
        if isinstance(each, none) or type(own) is not dict:
            return False
        parts = (part for part in own.values() if not isinstance(part, known))
        waiting += [part for part in parts if _stream(part) is None]
    records |= seen
    return True
