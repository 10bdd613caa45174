"""A pass through a user's model that leaves the model and the process as they were."""

from __future__ import annotations

import copy
import functools
import operator
import random
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer

from fisherlab.casting import uncast
from fisherlab.telling import warn

# Whether a capture's own pass runs: an optimizer's hooks on the same model then look away.
_ISOLATED: ContextVar[bool] = ContextVar("isolated", default=False)


def is_isolated() -> bool:
    """Whether the current pass is one of a capture, not one of the user's training."""
    return _ISOLATED.get()


def is_traced() -> bool:
    """Whether the current pass is traced, exported or transformed by `torch.func`.

    Its tensors have no numbers to read, and hooks would be written into the program.
    """
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        return True
    modes = (torch._C._TorchDispatchModeKey.PROXY, torch._C._TorchDispatchModeKey.FAKE)
    return any(torch._C._get_dispatch_mode(mode) for mode in modes) or is_transformed()


def is_transformed() -> bool:
    """Whether a transform of `torch.func` runs, whose tensors are those of one level of it."""
    # the compiler, which traces the tape along, would take any answer of torch for a level
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None


# The models whose graphs a pass of FisherLab's own runs through, and how many do. A variable of the
# context would not do: on an accelerator autograd calls hooks from threads of its own.
_SENT_THROUGH: Counter[int] = Counter()


@contextmanager
def own_pass(model: nn.Module | None) -> Iterator[None]:
    """Vectors of FisherLab's own go back through a live graph of the model: no hook counts them."""
    _SENT_THROUGH[id(model)] += 1
    try:
        yield
    finally:
        _SENT_THROUGH[id(model)] -= 1
        if not _SENT_THROUGH[id(model)]:
            del _SENT_THROUGH[id(model)]


def in_own_pass(model: nn.Module | None) -> bool:
    """Whether what arrives in a graph of the model is not the gradient of the user's loss."""
    return id(model) in _SENT_THROUGH


def buffers_kept(model: nn.Module) -> AbstractContextManager[None]:
    """Buffers are afterwards as before, whether a pass writes into them or replaces them."""
    return _kept(model, lambda module: module._buffers)


# Up to this many numbers a tensor has a copy while a pass runs that may write into it.
COPIED = 2**22
# Containers of which a copy is kept; a module of torch is itself no more than dicts of them.
_CONTAINERS = (dict, OrderedDict, defaultdict, Counter, list, set, deque)


@contextmanager
def _kept(model: nn.Module, part: Callable[[nn.Module], Any]) -> Iterator[None]:
    """A part of each module, and what is inside it, holds afterwards what it held before.

    Tensors of more than `COPIED` numbers are copied where they are buffers.
    """
    # a scripted module holds its buffers in none of its dicts
    buffers = [
        (module._buffers, name, buffer)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    copied = {id(buffer) for *_, buffer in buffers}
    containers: dict[int, tuple[Any, Any]] = {}
    tensors: dict[int, tuple[Tensor, Tensor, int | None]] = {}
    waiting = [*map(part, model.modules()), *(buffer for _, _, buffer in buffers)]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            known = id(value) in tensors or not _is_state(value)
            if not known and (id(value) in copied or value.numel() <= COPIED):
                version = None if value.is_inference() else value._version
                tensors[id(value)] = value, value.detach().clone(), version
        elif type(value) in _CONTAINERS and id(value) not in containers:
            containers[id(value)] = value, value.copy()
            waiting += value.values() if isinstance(value, dict) else value
        elif type(value) is tuple:
            waiting += value
    try:
        yield
    finally:
        for tensor, before, version in tensors.values():
            # compared by value: batch norm writes its statistics without a new version. A copy
            # where nothing changed would break a graph that holds the tensor.
            if not _is_equal(tensor, before, version):
                with torch.no_grad():
                    tensor.copy_(before)
        for owned, name, buffer in buffers:
            owned[name] = buffer
        for now, held in containers.values():
            _refill(now, held)


def _is_state(tensor: Tensor) -> bool:
    """Whether a pass may move a tensor in place: no parameter and no result of a graph is such."""
    kinds = nn.Parameter | UninitializedBuffer
    return not isinstance(tensor, kinds) and tensor.grad_fn is None and not tensor.is_meta


def _is_equal(now: Tensor, before: Tensor, version: int | None) -> bool:
    """Whether a tensor is as its copy; NaN equals NaN. Sparse ones go by version."""
    if now.layout != torch.strided or now.is_nested:
        return version is None or now._version == version
    if torch.equal(now, before):
        return True
    if not now.is_floating_point() or now.shape != before.shape:
        return False
    return torch.allclose(now, before, rtol=0.0, atol=0.0, equal_nan=True)


def _refill(now: Any, before: Any) -> None:
    """Give a container what its copy holds, where that is not in it."""
    if not before and not now:
        return
    known = [*now], [*before]
    if isinstance(now, dict):
        known = [*now, *now.values()], [*before, *before.values()]
    if len(known[0]) != len(known[1]) or not all(map(operator.is_, *known)):
        now.clear()
        (now.update if isinstance(now, dict | set) else now.extend)(before)


@contextmanager
def parameters_kept(model: nn.Module) -> Iterator[Callable[[], list[str]]]:
    """Parameters are afterwards as before, large ones apart, which no copy is made of.

    A pass rescales embeddings with `max_norm`, moves the vectors of a spectral norm written by
    hand, clips weights. A warning names the trained parameters that it writes into.

    Yields:
        The names of all that a pass has written into, max-norm embeddings apart; for its end, as
        the parameters are looked at once.
    """
    bound = {
        id(getattr(module, "weight", None))
        for module in model.modules()
        if getattr(module, "max_norm", None) is not None
    }
    every = [
        (name, p, p._version, p.data)
        for name, p in model.named_parameters()
        if type(p) is nn.Parameter and not p.is_inference()
    ]
    copies = {
        id(p): data.clone()
        for _, p, _, data in every
        if p.layout == torch.strided and not p.is_meta and (id(p) in bound or p.numel() <= COPIED)
    }

    def wrote(p: Tensor, version: int) -> bool:
        before = copies.get(id(p))
        return p._version != version if before is None else not _is_equal(p.data, before, None)

    @functools.cache
    def moved() -> list[tuple[str, nn.Parameter, Tensor]]:
        return [(name, p, data) for name, p, version, data in every if wrote(p, version)]

    try:
        yield lambda: [name for name, p, _ in moved() if id(p) not in bound]
    finally:
        changed = [name for name, p, _ in moved() if p.requires_grad and id(p) not in bound]
        for _, p, data in moved():
            if id(p) not in copies:
                continue
            if p.data_ptr() != data.data_ptr():
                p.data = data
            data.copy_(copies[id(p)])  # no new version: a live graph may hold the parameter
        if changed:
            warn(
                f"the forward pass writes into the parameter{'s' * (len(changed) > 1)} "
                f"{', '.join(changed)}, also when FisherLab runs it; the numbers are of the values "
                "after that"
            )


@contextmanager
def streams_kept(*devices: torch.device) -> Iterator[None]:
    """The random streams of Python, NumPy and torch are afterwards as before."""
    python, array = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(array)  # noqa: NPY002


@contextmanager
def isolated(model: nn.Module, x: object) -> Iterator[Callable[[], list[str]]]:
    """Gradients on, in inference mode too; random streams and all of the model are put back.

    Compiled modules run as the Python they were made of, so that their functions are seen. Autocast
    is left for all but the model.

    Args:
        model: the model that runs inside. A forward pass may update what it holds: running
            statistics, codebooks, a cache in a dict, a hidden state.
        x: the batch, whose device has a random stream of its own.

    Yields:
        The names of parameters that the pass has written into; asked at its end.
    """
    devices = [x.device] if isinstance(x, Tensor) and x.is_cuda else []
    flags = [(module, module.training) for module in model.modules()]
    token = _ISOLATED.set(True)
    try:
        with (
            # the user's own passes keep things for later, such as an auxiliary loss
            _kept(model, vars),
            parameters_kept(model) as written,
            torch.inference_mode(False),
            torch.enable_grad(),
            streams_kept(*devices),
            _uncompiled(),
            uncast(),
        ):
            yield written
    finally:
        _ISOLATED.reset(token)
        for module, training in flags:
            module.training = training


def _uncompiled() -> AbstractContextManager[Any]:
    # nothing is compiled where the compiler was never loaded, which takes seconds
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Parameters and buffers of half precision are float32 inside; afterwards as before.

    Every value is kept. The arithmetic that a capture needs is that of float32.
    """
    halves = [
        (tensor, tensor.data)
        for tensor in (*model.parameters(), *model.buffers())
        if is_half(tensor)
    ]
    try:
        for tensor, data in halves:
            tensor.data = data.float()
        yield
    finally:
        for tensor, data in halves:
            tensor.data = data


def is_half(tensor: Tensor) -> bool:
    """Whether a tensor has floating numbers of fewer than 32 bits."""
    return tensor.is_floating_point() and tensor.element_size() < 4


def floated(x: Any) -> Any:
    """A batch with its half-precision tensors in float32."""
    if isinstance(x, Tensor):
        return x.float() if is_half(x) else x
    if isinstance(x, Mapping):
        return {key: floated(value) for key, value in x.items()}
    return type(x)(map(floated, x)) if type(x) in (tuple, list) else x


def copied(x: Any) -> Any:
    """A batch of the user's with tensors of its own, into which a forward pass may write.

    Tensors that require a gradient where gradients are on, and objects that are no mappings, tuples
    or lists, are not copied.
    """
    if isinstance(x, Tensor):
        tracked = nn.parameter.is_lazy(x) or (x.requires_grad and torch.is_grad_enabled())
        return x if tracked else x.clone()
    if isinstance(x, MutableMapping):
        again = copy.copy(x)
        for key, value in x.items():
            again[key] = copied(value)
        return again
    if isinstance(x, tuple) and hasattr(x, "_make"):
        return x._make(map(copied, x))
    return type(x)(map(copied, x)) if type(x) in (tuple, list) else x


def kept_by_autograd(y: Any) -> Any:
    """Labels as ones that a graph may keep: those made in inference mode are copied."""
    if not isinstance(y, Tensor) or nn.parameter.is_lazy(y) or not y.is_inference():
        return y
    with torch.inference_mode(False):
        return y.clone()


def random_state(x: object) -> Tensor:
    """The state of the global random stream that a forward pass of `x` would draw from."""
    if isinstance(x, Tensor) and x.is_cuda:
        return torch.cuda.get_rng_state(x.device)
    return torch.get_rng_state()
