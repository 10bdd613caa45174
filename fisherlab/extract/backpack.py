"""Capture from BackPACK: our own extensions, on the user's own model, inside a context.

    V_s = J_{f,s}^T V      all columns V = [v_1 .. v_R, probe] `[r, n, ...]` in one backward pass

A first-order extension leaves the gradient at each layer's output (empirical), a second-order one
the back-propagated columns (exact, mc). Both stop there: nothing of a parameter's size is formed.

The last column is the gradient of the loss, and must arrive at every layer as autograd delivers it.
BackPACK follows modules only and keys its tensors by `data_ptr()`. It is therefore silently wrong
behind functional transposes, in-place operations and paddings other than zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from backpack.core import derivatives as rules
from backpack.custom_module.branching import SumModule
from backpack.extensions.firstorder.base import (
    FirstOrderBackpropExtension,
    FirstOrderModuleExtension,
)
from backpack.extensions.mat_to_mat_jac_base import MatToJacMat
from backpack.extensions.module_extension import ModuleExtension
from backpack.extensions.secondorder.base import SecondOrderBackpropExtension
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss

from fisherlab.extract.geometry import CaptureError
from fisherlab.extract.hooks import send_backwards
from fisherlab.extract.tape import Record, set_slopes

# BackPACK saves what an extension returns under this attribute of the weight; it is taken at once.
SAVED = "_fisherlab_columns"
# How far the probe may be off, relative; or one rounding per module where that is more (a net of 60
# Linear and Tanh: 2e-6 in float32). The silent mistakes known are above 0.1.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


class LinearRule:
    """`J^T v` of a linear map without parameters, by autograd: J is the same at every input."""

    def jac_t_mat_prod(
        self, module: Any, g_inp: tuple[Any, ...], g_out: tuple[Any, ...], columns: Tensor, **_: Any
    ) -> Tensor:
        """The columns `[r, n, *out]` as `[r, n, *in]`."""
        r, n = columns.shape[:2]
        free = columns.new_zeros(r * n, *module.input0.shape[1:]).requires_grad_()
        with torch.enable_grad():
            outputs = module.forward(free)
        (result,) = torch.autograd.grad(outputs, free, columns.flatten(0, 1))
        return result.unflatten(0, (r, n))


# rules' submodules are loaded by backpack.extensions, above
LAYERS = {
    nn.Linear: rules.linear.LinearDerivatives,
    nn.Conv1d: rules.conv1d.Conv1DDerivatives,
    nn.Conv2d: rules.conv2d.Conv2DDerivatives,
    nn.Conv3d: rules.conv3d.Conv3DDerivatives,
}
PASSED = {
    nn.ReLU: rules.relu.ReLUDerivatives,
    nn.Sigmoid: rules.sigmoid.SigmoidDerivatives,
    nn.Tanh: rules.tanh.TanhDerivatives,
    nn.LeakyReLU: rules.leakyrelu.LeakyReLUDerivatives,
    nn.ELU: rules.elu.ELUDerivatives,
    nn.MaxPool1d: rules.maxpool1d.MaxPool1DDerivatives,
    nn.MaxPool2d: rules.maxpool2d.MaxPool2DDerivatives,
    nn.MaxPool3d: rules.maxpool3d.MaxPool3DDerivatives,
    nn.BatchNorm1d: rules.batchnorm_nd.BatchNormNdDerivatives,
    nn.BatchNorm2d: rules.batchnorm_nd.BatchNormNdDerivatives,
    nn.BatchNorm3d: rules.batchnorm_nd.BatchNormNdDerivatives,
    nn.Dropout: rules.dropout.DropoutDerivatives,
    nn.Flatten: rules.flatten.FlattenDerivatives,
    SumModule: rules.sum_module.SumModuleDerivatives,
}
# BackPACK's own rule for means builds a float32 convolution, which fails in float64
MEANS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
ADAPTIVE = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
PASSED |= dict.fromkeys((*MEANS, *ADAPTIVE, nn.Identity, nn.Unflatten, nn.ZeroPad2d), LinearRule)
_ADVICE = "use backend='hooks', which takes any model"
_NOT_A_MODULE = (
    "what follows the layer is not the module BackPACK took it for (a functional transpose, an "
    "in-place operation)"
)


class OutputVectors(_Loss):
    """`sum(f * v_R)`: a loss, which is where BackPACK starts; its gradient is the last column."""

    def __init__(self, columns: Tensor) -> None:
        super().__init__()
        self.columns = columns

    def forward(self, outputs: Tensor) -> Tensor:
        """A number, for autograd to start from."""
        return (outputs * self.columns[-1]).sum()


class LeaveRoot(ModuleExtension):
    """The loss: send our own columns, of any criterion and from any generator."""

    def backpropagate(
        self,
        extension: Any,
        module: OutputVectors,
        g_inp: tuple[Any, ...],
        g_out: tuple[Any, ...],
        columns: None,
    ) -> Tensor:
        """`[r, n, ...]`, where BackPACK would take a root of the Hessian of its own."""
        return module.columns


class LeaveColumns(MatToJacMat):
    """A layer: leave the columns that reach its output, then send them through its Jacobian."""

    def weight(
        self,
        extension: Any,
        module: nn.Module,
        g_inp: tuple[Any, ...],
        g_out: tuple[Any, ...],
        columns: Tensor,
    ) -> Tensor:
        """The value saved on the weight: `[r, n, ...]` at the layer's output."""
        return columns


class LeaveGradient(FirstOrderModuleExtension):
    """A layer: leave the gradient that reaches its output."""

    def weight(
        self,
        extension: Any,
        module: nn.Module,
        g_inp: tuple[Any, ...],
        g_out: tuple[Any, ...],
        columns: None,
    ) -> Tensor:
        """The value saved on the weight: `[1, n, ...]` at the layer's output."""
        return g_out[0][None]


class OutputColumns(SecondOrderBackpropExtension):
    """All columns at the output of every layer."""

    def __init__(self) -> None:
        table = {kind: LeaveColumns(rule(), ["weight"]) for kind, rule in LAYERS.items()}
        table |= {kind: MatToJacMat(rule()) for kind, rule in PASSED.items()}
        super().__init__(SAVED, table | {OutputVectors: LeaveRoot()})

    def accumulate_backpropagated_quantities(self, existing: Tensor, other: Tensor) -> Tensor:
        """Where the graph branches, columns add."""
        return existing + other


class OutputGradient(FirstOrderBackpropExtension):
    """The gradient at the output of every layer."""

    def __init__(self) -> None:
        super().__init__(SAVED, dict.fromkeys(LAYERS, LeaveGradient(["weight"])), "SILENT")


def run(
    model: nn.Module,
    record: Record,
    forward: Callable[[], Tensor],
    check: Callable[[Tensor], Tensor],
    vectors: Callable[[Tensor], Iterator[Tensor]] | None,
) -> Tensor:
    """The outputs; on `record` the calls with their gradients and slopes."""
    modules = {name or type(model).__name__.lower(): m for name, m in model.named_modules()}
    # element-wise weights have no rule here
    kept = {name for name in record.calls if type(modules.get(name)) in LAYERS}
    record.calls = {name: [] for name in record.calls if name in kept}
    follower = Follower(OutputColumns() if vectors else OutputGradient(), kept=kept)
    with follower.following(model):
        with record.tape:
            outputs = forward()
        labels = record.labels = check(outputs)
        record.check_inputs()
        if record.every():
            columns = [] if vectors is None else vectors(outputs.detach())
            fill(outputs, record, follower, labels, list(columns))
    set_slopes(outputs, record.every())
    return outputs


def fill(
    outputs: Tensor, record: Record, follower: Follower, labels: Tensor, columns: list[Tensor]
) -> None:
    """Send columns and probe backwards in one pass; compare the probe, leave the rest."""
    # a loss at its minimum has a zero gradient, which would compare equal to anything
    vanished = bool(columns) and not labels.any()
    probe = torch.ones_like(labels) if vanished else labels
    root = OutputVectors(torch.stack([*columns, probe]))
    follower.follow("the loss", root)
    loss = root(outputs)
    arrived = send_backwards(loss, record, torch.ones_like(loss))
    names = [name for name, calls in record.calls.items() for _ in calls]
    # from the outputs on, so that the layer named is the one in front of the mistake
    layers = [*zip(names, record.every(), arrived, strict=True)]
    for name, call, expected in reversed(layers):
        shape = (len(columns) + 1, *expected.shape)
        left = follower.columns.pop(name, expected.new_zeros(()).expand(shape)).to(expected.dtype)
        if left.shape != shape:
            raise CaptureError(
                f"BackPACK's gradients at the output of layer {name!r} have shape "
                f"{tuple(left.shape)}, autograd's {shape}: {_NOT_A_MODULE}; {_ADVICE}"
            )
        _compare(name, left[-1], expected, len(follower.called))
        call.label_gradient = torch.zeros_like(expected) if vanished else expected
        call.gradients = left[:-1] if columns else left


def _compare(name: str, probe: Tensor, expected: Tensor, modules: int) -> None:
    error, size = (probe - expected).norm(), expected.norm()
    tolerance = max(TOLERANCE[expected.dtype], modules * torch.finfo(expected.dtype).eps)
    if error > tolerance * size:
        raise CaptureError(
            f"BackPACK's gradient at the output of layer {name!r} differs from autograd's by "
            f"{error / size:.1e} relative: {_NOT_A_MODULE}; {_ADVICE}"
        )


class Follower:
    """Runs an extension on each module at the moment the gradient of that module's output arrives.

    It works as `backpack.extend`, with two differences. A call's input and output are bound to the
    call and shown to BackPACK only while it looks at them. Every hook is gone afterwards. Nothing
    can be left on the model, and no output is wrapped.
    """

    def __init__(self, extension: OutputColumns | OutputGradient, kept: Container[str]) -> None:
        self.extension, self.kept = extension, kept
        self.columns: dict[str, Tensor] = {}
        self.called: set[str] = set()
        self._handles: list[Any] = []

    @contextmanager
    def following(self, model: nn.Module) -> Iterator[None]:
        """Follow every module that computes; modules that hold others only call them."""
        try:
            for name, module in model.named_modules():
                if next(module.children(), None) is None:
                    self.follow(name or type(model).__name__.lower(), module)
            yield
        finally:
            for handle in self._handles:
                handle.remove()

    def follow(self, name: str, module: nn.Module) -> None:
        """Run the extension on `module` whenever a gradient arrives at an output of it."""
        if isinstance(module, torch.jit.ScriptModule):  # which takes no hook
            _refuse(name, module, again=False)
        hook = partial(self._called_with, name)
        self._handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def _called_with(
        self,
        name: str,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[Any, Any],
        output: Tensor,
    ) -> None:
        inputs = (*args, *kwargs.values())
        outputs = output if isinstance(output, tuple | list) else (output,)
        if not any(isinstance(o, Tensor) and o.requires_grad for o in outputs):
            return
        _refuse(name, module, again=name in self.called)
        self.called.add(name)
        # a Dropout in evaluation, an Identity or a Flatten of a matrix hands its input through
        if any(output is given for given in inputs):
            return
        arrive = partial(self._arrived, name, module, inputs, output)
        self._handles.append(output.register_hook(arrive))

    def _arrived(
        self,
        name: str,
        module: nn.Module,
        inputs: tuple[Any, ...],
        output: Tensor,
        gradient: Tensor,
    ) -> None:
        with _shown(module, inputs, output):
            try:
                self.extension(module, (None,) * len(inputs), (gradient,))
            except (CaptureError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                raise CaptureError(
                    f"BackPACK cannot send output vectors through {name!r} "
                    f"({type(module).__name__}): {error}. An operation between modules that is no "
                    f"module itself is the usual cause; {_ADVICE}"
                ) from error
            if name in self.kept:
                self.columns[name] = vars(module.weight)[SAVED]


@contextmanager
def _shown(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Iterator[None]:
    """`module.input0 ...` and `module.output`, where BackPACK's derivatives look, for one call."""
    shown = {f"input{k}": value for k, value in enumerate(inputs)} | {"output": output}
    try:
        vars(module).update(shown)
        yield
    finally:
        for attribute in shown:
            vars(module).pop(attribute, None)
        for parameter in module.parameters(recurse=False):
            vars(parameter).pop(SAVED, None)


def _refuse(name: str, module: nn.Module, again: bool) -> None:
    kind = type(module)
    padding = getattr(module, "padding", 0) if kind in LAYERS else 0
    mode = getattr(module, "padding_mode", "zeros")
    if kind not in LAYERS and kind not in PASSED and kind is not OutputVectors:
        reason = "has no rule in BackPACK (a subclass has none either)"
    elif again and next(module.parameters(), None) is not None:
        reason = "is called more than once, and BackPACK keeps one set of columns per module"
    elif getattr(module, "inplace", False):
        reason = "works in place, on the tensor by which BackPACK finds its columns"
    elif isinstance(padding, str):
        reason = f"has padding={padding!r}, where BackPACK takes numbers"
    elif mode != "zeros":
        reason = f"has padding_mode={mode!r}, which BackPACK takes for zeros"
    else:
        return
    raise CaptureError(f"{name!r} ({kind.__name__}) {reason}; {_ADVICE}")
