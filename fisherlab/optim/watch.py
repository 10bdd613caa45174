"""The tape in a model's own forward pass, for an optimizer that stays."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import get_eval_frame_callback

from fisherlab.extract.isolation import is_isolated, is_traced
from fisherlab.extract.outputs import loss_of, output_of
from fisherlab.extract.products import Product
from fisherlab.extract.select import on_tape, weights_of
from fisherlab.extract.tape import Tape, Use
from fisherlab.optim.weight import Weight


class Hook:
    """A hook that stays with its model: a copy or a pickle of the model carries none."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self._breaking = function, torch.compiler.disable(function)

    def __call__(self, *args: Any) -> Any:
        """The function, told whether the caller is compiled: its graph has a break here."""
        if torch.compiler.is_exporting():  # a program of the model has no optimizer in it
            return None
        # the break itself costs an uncompiled model 15 us a call. Past its limit of recompilations
        # the compiler runs a hook as it is, and goes on to compile what that calls
        compiled = torch.compiler.is_compiling() or get_eval_frame_callback() is not None
        return self._breaking(True, *args) if compiled else self.function(False, *args)

    def __reduce__(self) -> tuple[Any, ...]:
        return _nothing_of, ()


def _nothing_of() -> Callable[..., Any]:
    return _nothing


def _nothing(*_: Any) -> None:
    """Do nothing, as a copied hook does."""


class _Tape(Tape):
    """One that hears no pass of FisherLab's own, and nothing after Ctrl-C."""

    # whether the pass was broken off
    broken: Callable[[], bool]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """The function's own result; its use of a weight is noted."""
        if is_isolated() or self.broken():
            return func(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)


class Watch:
    """Enters a tape at the begin of each forward pass of a model, and leaves it at its end.

    Compiled code calls no function that a tape sees, and checkpointing computes again when the tape
    is left. There the hooks of the modules tell their own products, as far as these are known.

    A model that calls itself makes one pass. Where Ctrl-C breaks a pass off, torch calls no hook.
    What was recorded is then let go at the next function of torch, which the tape, left at the next
    pass or step, passes on.

    Args:
        model: the model.
        weights: the matrices known so far; more may join.
        wanted: whether the pass that begins is to be recorded.
        begin: called when such a pass begins.
        record: gets each use and its output, and returns the output or a tensor in its place.
        end: called with the model's output tensor, the first of several, or None where it has none
            with a graph.
        replaces: whether `record` returns other tensors, which the tapes of others have to see.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Mapping[str, Weight],
        wanted: Callable[[], bool],
        begin: Callable[[], None],
        record: Callable[[Use, Tensor], Tensor],
        end: Callable[[Tensor | None], None],
        replaces: bool = False,
    ) -> None:
        self.model = weakref.ref(model)
        self.weights, self.wanted = weights, wanted
        self.begin, self.record, self.end = begin, record, end
        self.tape = _Tape(on_tape(weights_of(model, computed=False)), record)
        self.tape.broken = self._is_broken
        # whether the latest pass returned one tensor, or one called `logits`
        self.single = True
        # the loss that the latest pass returned beside its outputs
        self.loss: Tensor | None = None
        # whether the latest pass returned anything, or broke off
        self.returned = False
        # of this thread: torch's frame that runs a recorded pass, and calls inside it
        self._passes = threading.local()
        # whether the pass runs in compiled code
        self._compiled = False
        # the weights whose own modules tell their products
        self.hooked = {name for name, weight in weights.items() if weight.local == "weight"}
        self._handles = [
            # the tape that is entered first is the first to get an output
            model.register_forward_pre_hook(Hook(self._begin), prepend=replaces),
            *(
                weight.module.register_forward_hook(
                    Hook(_of_module(weakref.ref(self), weight)), with_kwargs=True
                )
                for weight in weights.values()
                if weight.local == "weight"
            ),
            model.register_forward_hook(Hook(self._end), always_call=True),
        ]

    @property
    def _running(self) -> bool:
        return getattr(self._passes, "running", False)

    @_running.setter
    def _running(self, running: bool) -> None:
        self._passes.running = running

    def remove(self) -> None:
        """Take the hooks off the model."""
        self.settle()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _begin(self, compiled: bool, model: nn.Module, args: tuple[Any, ...]) -> None:
        # a deep copy of the model carries these hooks along
        if model is not self.model() or is_isolated():
            return
        if self._is_inside():
            self._passes.nested += 1
            return
        self.settle()
        if is_traced() or not self.wanted() or not torch.is_grad_enabled():
            return
        self.begin()
        self._running, self._compiled = True, compiled
        if not compiled:
            # the one that calls this hook; a frame of compiled code is none of a pass
            self._passes.frame, self._passes.nested = sys._getframe(2), 0
            self.tape.others.clear()
            self.tape.__enter__()

    def _is_inside(self) -> bool:
        """Whether the recorded pass of this thread is under way, and not broken off."""
        home: FrameType | None = getattr(self._passes, "frame", None)
        frame: FrameType | None = None if home is None else sys._getframe(1)
        while frame is not None and frame is not home:
            frame = frame.f_back
        return frame is not None

    def _is_broken(self) -> bool:
        """Whether the pass was broken off; what it left is then let go."""
        # the compiler traces the tape along, without frames to look at
        if torch.compiler.is_compiling() or self._is_inside():
            return False
        if self._passes.frame is not None:
            self._let_go(None)
        return True

    def _end(self, compiled: bool, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if model is not self.model() or is_isolated() or not self._running:
            return
        if getattr(self._passes, "nested", 0):
            self._passes.nested -= 1
            return
        self._finish(output)

    def settle(self) -> None:
        """End a pass that Ctrl-C broke off, as one that raised."""
        if self._running:
            self._finish(None)

    def _finish(self, output: Any) -> None:
        self._running = False
        self.tape.leave()
        self._let_go(output)

    def _let_go(self, output: Any) -> None:
        self._passes.frame = None
        found, self.returned = output_of(output), output is not None
        self.single, loss = isinstance(found, Tensor), loss_of(output)
        if isinstance(loss, Tensor) and loss.requires_grad and not loss.ndim:
            self.loss = loss
        self.end(first_with_graph(found))
        self.loss = None

    def called(
        self,
        weight: Weight,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[Any, Any],
        output: Tensor,
    ) -> Tensor | None:
        """A module's own product where no tape sees it: compiled, or computed again."""
        if (self._running and not self._compiled) or module is not weight.module:
            return None
        if is_isolated() or is_traced():
            return None
        if not isinstance(output, Tensor) or not output.requires_grad:
            return None
        x = args[0] if args else kwargs["input"]
        product = Product(x, weight.weight, weight.bias)
        return self.record(
            Use(weight.name, weight.geometry, weight.bias, product, "module"), output
        )


def _of_module(watch: weakref.ref[Watch], weight: Weight) -> Callable[..., Any]:
    def hook(
        compiled: bool,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[Any, Any],
        output: Tensor,
    ) -> Tensor | None:
        known = watch()
        return None if known is None else known.called(weight, module, args, kwargs, output)

    return hook


def first_with_graph(output: Any) -> Tensor | None:
    """The first tensor with a graph in what a model returned."""
    if isinstance(output, Tensor):
        return output if output.requires_grad and output.ndim else None
    inside: Any = ()
    if isinstance(output, Mapping):
        inside = output.values()
    elif isinstance(output, tuple | list):
        inside = output
    found = (first_with_graph(item) for item in inside)
    return next((tensor for tensor in found if tensor is not None), None)
