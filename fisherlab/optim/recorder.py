"""The pair (a, g) of every layer, taken in the user's own forward and backward.

Nothing is kept on a module. A hook on each layer's *output tensor* closes over that call's input,
so a forward without a backward leaves nothing behind and an evaluation pass between two steps
disturbs nothing. A pass counts only if its gradient is in `.grad` at the step (`AdditiveLaw`).

The factor between `dL` and the per-example loss is read off the criterion's own loss tensor, or
recognised from (output, its gradient) for softmax cross entropy: a wrong factor c would give a
Fisher matrix that is c^2 off without any error.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Collection
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from fisherlab.distributed import Ranks
from fisherlab.extract import fisher
from fisherlab.extract.geometry import CaptureError, Geometry
from fisherlab.extract.isolation import is_isolated
from fisherlab.extract.layer import LayerCapture
from fisherlab.extract.moments import example_sum
from fisherlab.extract.proof import gradient_error, not_a_product, or_zero, tolerance
from fisherlab.extract.record import Call as GraphCall
from fisherlab.extract.record import joined_slopes, set_slopes
from fisherlab.extract.reentrant import reentrant_named
from fisherlab.extract.select import by_owner
from fisherlab.names import unknown
from fisherlab.optim.additive import AdditiveLaw
from fisherlab.optim.passes import Call, Pass
from fisherlab.optim.scale import OptimizerError, scale_factor

# of a capture: what sums of the raw tensors over the examples determine
SUMS = frozenset({"mean_input_sum", "label_gradient_sum"})


class Recorder:
    """Hooks on a model's layers that deliver `LayerCapture`s of each step's own passes.

    `wanted` switches the recording; the hooks are installed once, before any `torch.compile`, since
    compiled code ignores later ones.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: dict[str, nn.Module],
        *,
        criterion: Callable | None = None,
        fisher_type: str = "empirical",
        mc_samples: int = 1,
        generator: torch.Generator | None = None,
        examples: int | None = None,
        needs: Collection[str] = ("inputs", "output_gradients"),
        biased: Collection[str],
        ranks: Ranks | None = None,
    ) -> None:
        check_fisher_type(fisher_type)
        self.modules, self.biased, self.criterion = modules, biased, criterion
        self.fisher_type, self.mc_samples = fisher_type, mc_samples
        self.generator = generator or torch.Generator().manual_seed(0)
        self.examples, self.ranks = examples, ranks
        # what an approximation does not need is not kept: memory that backward then reuses
        self.summed = SUMS.issuperset(needs)
        self.gradients = not {"inputs", "outputs", "activation_slope"}.issuperset(needs)
        self.outputs, self.slopes = "outputs" in needs, "activation_slope" in needs
        self.columns = fisher_type != "empirical" and "output_gradients" in needs
        # of the passes last captured: what turned dL/ds into per-example gradients
        self.factors: list[float] = []
        self.wanted = False
        # those that a backward pass has reached; the graph alone keeps the others
        self.passes: list[Pass] = []
        self._latest: weakref.ref[Pass] | None = None
        self._open: Pass | None = None
        self._model = weakref.ref(model)
        # layers without a block, and why: their gradient is not `g a^T` of their calls, or they
        # have no slope; known after the first pass
        self.left_out: dict[str, str] = {}
        self._proven = examples is not None or self.summed
        self.law: AdditiveLaw | None = None
        if self.gradients and "inputs" in needs and examples is None and ranks is None:
            self.law = AdditiveLaw(self._leaves(), lambda: self.wanted and not is_isolated())
        self._handles = [model.register_forward_pre_hook(uncompiled(self._begin))]
        for name, module in modules.items():
            self._handles.append(
                module.register_forward_hook(uncompiled(self._layer_hook(name)), with_kwargs=True)
            )
        # after the layers' own: the model may be a single layer
        self._handles.append(model.register_forward_hook(uncompiled(self._end)))
        if isinstance(criterion, nn.Module):
            self._handles.append(criterion.register_forward_hook(self._loss))

    def remove(self) -> None:
        """Take every hook off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self.law is not None:
            self.law.remove()

    def clear(self) -> None:
        """Forget the passes since the last step."""
        self.passes.clear()
        self._open = self._latest = None
        if self.law is not None:
            self.law.clear()

    def _leaves(self) -> dict[str, tuple[Tensor, Tensor | None]]:
        """The weight and the bias, if in its block, of every owner of a weight."""
        owners = ((name, self.modules[name]) for name in by_owner(self.modules, {}))
        return {
            name: (cast(Tensor, m.weight), cast(Tensor, m.bias) if name in self.biased else None)
            for name, m in owners
        }

    def _drop_zeroed(self) -> None:
        """Forget passes whose gradients were thrown away: no weight has one any more."""
        if self.passes and all(m.weight.grad is None for m in self.modules.values()):
            self.passes.clear()
            if self.law is not None:
                self.law.clear()

    def _arrived(self, current: Pass) -> None:
        """A backward pass reaches `current`; `.grad` is still as it was before."""
        if any(current is known for known in self.passes):
            return
        self._drop_zeroed()
        if not self.passes and self.law is not None:
            self.law.begin()
        self.passes.append(current)

    # hooks ------------------------------------------------------------------------------------

    def _begin(self, model: nn.Module, args: tuple) -> None:
        # a deep copy of the model carries these hooks along
        if model is not self._model():
            return
        self._open = None
        if is_isolated():
            return
        self._drop_zeroed()
        self._open = Pass() if self.wanted and torch.is_grad_enabled() else None

    def _layer_hook(self, name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:
            current = self._open
            if current is None or not output.requires_grad or module is not self.modules[name]:
                return None
            raw = (args[0] if args else kwargs["input"]).detach()
            part = raw[: self.examples]
            call = Call(
                len(part),
                self._kept(part),
                output.detach()[: self.examples].clone() if self.outputs else None,
            )
            if self.columns or self.slopes or not self._proven:
                edge = get_gradient_edge(output)
                call.graph = GraphCall(raw, edge, output.detach(), raw._version)
            current.calls.setdefault(name, []).append(call)

            def arrive(gradient: Tensor) -> None:
                self._arrived(current)
                call.arrived = True
                if self.gradients:
                    part = self._kept(gradient[: self.examples].detach())
                    call.gradient = part if call.gradient is None else call.gradient + part

            output.register_hook(arrive)
            # a Linear over [n, t, i] returns a view; an in-place operation on a view replaces the
            # view's history, and the hook with it
            return output.clone() if output._is_view() else None

        return hook

    def _kept(self, tensor: Tensor) -> Tensor:
        """What is kept of the examples: they, or their sum, taken while they are at hand."""
        return example_sum(_wide(tensor)) if self.summed else tensor

    def _end(self, model: nn.Module, args: tuple, output: Any) -> None:
        if model is not self._model() or is_isolated():
            return
        current, self._open = self._open, None
        if current is None or not current.calls:
            return
        output = getattr(output, "logits", output)
        if not isinstance(output, Tensor) or not output.requires_grad:
            return
        current.output = output.detach()

        def arrive(gradient: Tensor) -> None:
            self._arrived(current)
            current.output_gradient = _plus(current.output_gradient, gradient)

        output.register_hook(arrive)
        self._latest = weakref.ref(current)
        if not self._proven:
            self._prove(current, output)
        if self.slopes:
            self._find_slopes(current, output)
        if self.columns and not isinstance(self.criterion, nn.Module):
            self._send_columns(current, output, None)

    def _send_columns(self, current: Pass, output: Tensor, labels: Tensor | None) -> None:
        """The model's own output vectors, on the live graph and only as far as layer outputs.

        `output` is what the criterion sees, which may have the examples' positions as rows.
        """
        criterion = fisher.as_module(self.criterion or nn.CrossEntropyLoss())
        calls = [c for cs in current.calls.values() for c in cs if c.graph is not None]
        free = output.detach().float() if output.dtype.itemsize < 4 else output.detach()
        if labels is None:
            # mc and exact vectors depend on the labels through nothing but their shape
            is_class = isinstance(criterion, nn.CrossEntropyLoss)
            labels = free.argmax(1) if is_class else torch.zeros_like(free)
        M, rows = len(cast(Tensor, current.output)), len(free)
        if rows != M and self.fisher_type == "exact":
            raise OptimizerError(
                f"the criterion sees {rows} rows for {M} examples, so the exact columns of one "
                "example cannot be told apart; keep the example as first axis or use 'mc'"
            )
        mean = fisher.reduction_of(criterion) == "mean"
        scale = (M / rows) ** 0.5 if mean else 1.0
        vectors = fisher.output_vectors(
            self.fisher_type, criterion, free, labels, self.mc_samples, self.generator, self.ranks
        )
        for vector in vectors:
            with reentrant_named(OptimizerError):
                gradients = torch.autograd.grad(
                    output,
                    [call.graph.edge for call in calls],
                    (scale * vector).to(output.dtype),
                    retain_graph=True,
                    allow_unused=True,
                )
            for call, gradient in zip(calls, gradients, strict=True):
                if gradient is None:
                    gradient = torch.zeros_like(call.graph.output)
                call.columns.append(gradient[: self.examples].detach())
        # the hooks on the output tensors have seen these columns too: only the loss's own count
        self._forget_gradients(current)

    def _loss(self, criterion: nn.Module, args: tuple, loss: Tensor) -> None:
        current = None if self._latest is None else self._latest()
        if current is None or is_isolated():
            return
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            return
        current.labels = args[1].detach() if len(args) > 1 else None

        def arrive(gradient: Tensor) -> None:
            current.loss_scale = _plus(current.loss_scale, gradient)

        loss.register_hook(arrive)
        # a second loss of the same outputs (mixed labels) has the same Hessian
        if self.columns and current.criterion_saw is not args[0]:
            current.criterion_saw = args[0]
            self._send_columns(current, args[0], current.labels)

    # what the passes delivered ------------------------------------------------------------------

    def captures(self) -> list[dict[str, LayerCapture]]:
        """One dict of captures per forward and backward since the last step, checked and scaled."""
        arrived = [p for p in self.passes if p.arrived]
        self.factors = [self._factor(p) for p in arrived]
        found = [self._capture(*pair) for pair in zip(arrived, self.factors, strict=True)]
        if self.law is None or not found:
            return found
        kept = self.law.present(found, self.factors)
        self.factors = [self.factors[k] for k in kept]
        return [found[k] for k in kept]

    def _prove(self, current: Pass, output: Tensor) -> None:
        """Leave out layers whose gradient is not `sum g a^T` of their calls; asked once.

        A random vector is sent back from the outputs: terms of the loss that are no terms of the
        model, such as a penalty on the weights, are not in it.
        """
        self._proven = True
        generator = torch.Generator().manual_seed(0)
        vector = torch.randn(output.shape, generator=generator).to(output)
        joined = {n: cs for n, cs in by_owner(self.modules, current.calls).items() if cs}
        edges: list[Any] = [call.graph.edge for calls in joined.values() for call in calls]
        parameters = self._leaves()
        leaves = {name: [x for x in parameters[name] if x is not None] for name in joined}
        flat = [leaf for found in leaves.values() for leaf in found]
        with torch.enable_grad():
            product = (output * vector).sum()
        with reentrant_named(OptimizerError):
            gradients = torch.autograd.grad(
                product, [*edges, *flat], retain_graph=True, allow_unused=True
            )
        rest = iter(gradients[: len(edges)]), iter(gradients[len(edges) :])
        for name, calls in joined.items():
            rows = [or_zero(next(rest[0]), call.graph.output) for call in calls]
            found = [or_zero(next(rest[1]), leaf) for leaf in leaves[name]]
            module, bias = self.modules[name], name in self.biased
            inputs = [call.raw_input for call in calls]
            parts = [
                LayerCapture(
                    name, "", Geometry.of(module, bias, k), tuple(inputs), None, tuple(rows)
                )
                for k in range(getattr(module, "groups", 1))
            ]
            error = gradient_error(parts, found[0], found[1] if len(found) > 1 else None)
            if error > max(tolerance(x) for x in (*inputs, *rows)):
                self.left_out[name] = not_a_product(error)
                warnings.warn(
                    f"layer {name!r} has no block and takes its plain gradient: "
                    f"{self.left_out[name]}",
                    stacklevel=2,
                )
        self._forget_gradients(current)
        if not self.columns and not self.slopes:
            for call in (call for calls in current.calls.values() for call in calls):
                call.graph = None

    def _find_slopes(self, current: Pass, output: Tensor) -> None:
        """Slopes of all calls; layers that have none are left out, which is said once."""
        graphs = {
            name: [call.graph for call in calls if call.graph is not None]
            for name, calls in by_owner(self.modules, current.calls).items()
            if calls
        }
        set_slopes(output, [call for calls in graphs.values() for call in calls])
        reasons = {name: joined_slopes(name, calls)[1] for name, calls in graphs.items()}
        new = {n: reason for n, reason in reasons.items() if reason and n not in self.left_out}
        if new:
            self.left_out |= new
            warnings.warn(
                f"SNGD has no block of these layers, which take their plain gradients: "
                f"{'; '.join(new.values())}",
                stacklevel=2,
            )

    def _forget_gradients(self, current: Pass) -> None:
        """Undo what the hooks saw of a backward pass that is not the loss's own."""
        for calls in current.calls.values():
            for call in calls:
                call.gradient, call.arrived = None, False
        current.output_gradient = None
        self.passes = [known for known in self.passes if known is not current]

    def _capture(self, one: Pass, factor: float) -> dict[str, LayerCapture]:
        joined = {
            name: [call for call in calls if call.arrived]
            for name, calls in by_owner(self.modules, one.calls).items()
            if name not in self.left_out
        }
        found: dict[str, LayerCapture] = {}
        for name, calls in joined.items():
            if calls:
                found |= self._layer(name, calls, factor, one)
        return found

    def _layer(
        self, name: str, calls: list[Call], factor: float, one: Pass
    ) -> dict[str, LayerCapture]:
        module = self.modules[name]
        batch = len(cast(Tensor, one.output))
        expected = batch if self.examples is None else None
        for index, call in enumerate(calls):
            shape = (call.examples, *call.raw_input.shape[1:])
            if len(shape) < 2 or (expected is not None and call.examples != expected):
                raise CaptureError(
                    f"call {index} of layer {name!r} received {shape} in a "
                    f"batch of {batch}: the first axis must be the example"
                )
        inputs = tuple(_wide(call.raw_input) for call in calls)
        labels, columns, scale = None, None, factor
        if self.gradients:
            labels = tuple(_wide(cast(Tensor, call.gradient)) for call in calls)
            inputs = tuple(x.to(g.dtype) for x, g in zip(inputs, labels, strict=True))
            if self.fisher_type == "empirical":
                columns = tuple(g[None] for g in labels)
        if self.columns:
            assert labels is not None
            # its own columns are of the per-example loss already
            labels, scale = tuple(factor * g for g in labels), 1.0
            columns = tuple(torch.stack([_wide(v) for v in call.columns]) for call in calls)
        outputs = tuple(_wide(c.output) for c in calls if c.output is not None) or None
        bias = name in self.biased
        groups = getattr(module, "groups", 1)
        slopes = None
        if self.slopes:
            graphs = [call.graph for call in calls if call.graph is not None]
            slopes = joined_slopes(name, graphs)[0][: self.examples]
        return {
            f"{name}:{k}" if groups > 1 else name: LayerCapture(
                name=name,
                layer_type=type(module).__name__,
                geometry=Geometry.of(module, bias, k),
                raw_inputs=inputs,
                raw_output_gradients=columns,
                raw_label_gradients=labels,
                raw_outputs=outputs,
                slopes=slopes,
                fisher_type=self.fisher_type,
                gradient_scale=scale,
                summed=calls[0].examples if self.summed else 1,
            )
            for k in range(groups)
        }

    def _factor(self, one: Pass) -> float:
        """What turns `dL/ds` into the gradient of the per-example loss `l_n`."""
        assert one.output is not None
        return scale_factor(one.output, one.output_gradient, one.loss_scale, self.criterion)


def check_fisher_type(fisher_type: str) -> None:
    """Refuse an unknown one before anything is hooked."""
    if fisher_type not in fisher.FISHER_TYPES:
        raise ValueError(unknown("fisher_type", fisher_type, fisher.FISHER_TYPES))


def uncompiled(hook: Callable) -> Callable:
    """The hook as it is, with a break of the graph, where the model is compiled later."""
    breaking = torch.compiler.disable(hook)

    def either(*args: Any) -> Any:
        # the break itself costs an uncompiled model 15 us a call
        return breaking(*args) if torch.compiler.is_compiling() else hook(*args)

    return either


def _plus(known: Tensor | None, gradient: Tensor) -> Tensor:
    """The sum over backward passes of one graph, as `.grad` holds it."""
    return gradient.detach() if known is None else known + gradient.detach()


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
