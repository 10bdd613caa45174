"""A pass through a user's model that leaves the model and the process as they were."""

from __future__ import annotations

import copy
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fisherlab.casting import uncast
from fisherlab.extract.held import Copies, Held
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


def buffers_kept(model: nn.Module) -> AbstractContextManager[Held]:
    """Buffers are afterwards as before, whether a pass writes into them or replaces them."""
    return _kept([model], lambda module: module._buffers)


@contextmanager
def _kept(owners: Iterable[Any], part: Callable[[Any], Any]) -> Iterator[Held]:
    """A part of each module, and what is inside it, holds afterwards what it held before."""
    modules = [
        module
        for owner in owners
        for module in (owner.modules() if isinstance(owner, nn.Module) else [owner])
    ]
    # a scripted module holds its buffers in none of its dicts
    buffers = [
        (module._buffers, name, buffer)
        for module in modules
        if isinstance(module, nn.Module)
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    parts = [part(module) if isinstance(module, nn.Module) else module for module in modules]
    held = Held([*parts, *(buffer for *_, buffer in buffers)])
    try:
        with held.kept():
            yield held
    finally:
        for owned, name, buffer in buffers:
            owned[name] = buffer


@contextmanager
def parameters_kept(model: nn.Module) -> Iterator[Callable[[], list[str]]]:
    """Parameters are afterwards as before.

    A pass rescales embeddings with `max_norm`, moves the vectors of a spectral norm written by
    hand, clips weights. A warning names the trained parameters that it writes into.

    Yields:
        The names of all that a pass has written into so far, max-norm embeddings apart.
    """
    rescaled = [
        getattr(module, "weight", None)
        for module in model.modules()
        if getattr(module, "max_norm", None) is not None
    ]
    bound = set(map(id, rescaled))
    every = {
        name: p
        for name, p in model.named_parameters()
        if type(p) is nn.Parameter and not p.is_inference() and not p.is_meta
    }
    copies = Copies()
    for p in every.values():
        copies.add(p, whole=id(p) in bound)

    def written() -> list[str]:
        return [name for name, p in every.items() if id(p) not in bound and copies.wrote(p)]

    try:
        with copies.watched():
            yield written
    finally:
        changed = [name for name in written() if every[name].requires_grad]
        copies.put_back()
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


@dataclass(frozen=True)
class Isolation:
    """What is known of the passes that ran inside.

    Args:
        written: the names of the parameters that a pass has written into so far.
        draws: the states of all random streams that a pass may draw from.
    """

    written: Callable[[], list[str]]
    draws: Callable[[], tuple[object, ...]]


@contextmanager
def isolated(model: nn.Module, x: object, criterion: object = None) -> Iterator[Isolation]:
    """Gradients on, in inference mode too; random streams and all of the model are put back.

    Compiled modules run as the Python they were made of, so that their functions are seen. Autocast
    is left for all but the model.

    Args:
        model: the model that runs inside. A forward pass may update what it holds: running
            statistics, codebooks, a cache in a dict, a hidden state.
        x: the batch, whose device has a random stream of its own.
        criterion: the loss that is called inside, which may hold as much.

    Yields:
        What its passes write and draw.
    """
    devices = [x.device] if isinstance(x, Tensor) and x.is_cuda else []
    flags = [(module, module.training) for module in model.modules()]
    token = _ISOLATED.set(True)
    try:
        with (
            # the user's own passes keep things for later, such as an auxiliary loss
            _kept([model, criterion], vars) as held,
            parameters_kept(model) as written,
            torch.inference_mode(False),
            torch.enable_grad(),
            streams_kept(*devices),
            _uncompiled(),
            uncast(),
        ):
            yield Isolation(written, lambda: (*_draws(devices), held.draws()))
    finally:
        _ISOLATED.reset(token)
        for module, training in flags:
            module.training = training


def _draws(devices: Iterable[torch.device]) -> tuple[object, ...]:
    """The states of the process's own random streams."""
    states = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, devices)]
    array: Any = np.random.get_state()  # noqa: NPY002
    found = [state.numpy().tobytes() for state in states]
    return random.getstate(), array[1].tobytes(), array[2:], *found


def _uncompiled() -> AbstractContextManager[Any]:
    # nothing is compiled where the compiler was never loaded, which takes seconds
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


@contextmanager
def in_float32(*owners: object) -> Iterator[None]:
    """Parameters and buffers of half precision are float32 inside; afterwards as before.

    Every value is kept. The arithmetic that a capture needs is that of float32.
    """
    halves = [
        (tensor, tensor.data)
        for owner in owners
        if isinstance(owner, nn.Module)
        for tensor in (*owner.parameters(), *owner.buffers())
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
