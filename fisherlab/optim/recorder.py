"""The pair (a, g) of every layer, taken in the user's own forward and backward.

A tape sees the products of the weights (`Watch`). A hook on each product's *output tensor* closes
over that call's input. A forward without a backward therefore leaves nothing behind, and an
evaluation pass between two steps disturbs nothing. A pass counts only if its gradient is in `.grad`
at the step (`AdditiveLaw`).

The factor between `dL` and the per-example loss is read off the criterion's own loss tensor, or
recognised from (output, its gradient) for softmax cross entropy. A wrong factor c would silently
scale the Fisher matrix by c^2.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from fisherlab import doors
from fisherlab.distributed import Ranks
from fisherlab.extract import fisher
from fisherlab.extract.assemble import Form, capture_of, pieces
from fisherlab.extract.backward import pulled_back, widened
from fisherlab.extract.criteria import Rules, labels_matter, rules_of
from fisherlab.extract.dead import seen_at, stopping
from fisherlab.extract.isolation import in_own_pass, is_isolated, own_pass
from fisherlab.extract.layer import LayerCapture
from fisherlab.extract.moments import example_sum
from fisherlab.extract.padding import counted, weighed_input
from fisherlab.extract.proof import gradient_error, not_a_product, tolerance
from fisherlab.extract.reentrant import reentrant_named
from fisherlab.extract.rows import find_examples, in_order, take
from fisherlab.extract.slopes import slopes
from fisherlab.extract.tape import Use, or_zero
from fisherlab.names import unknown
from fisherlab.optim.additive import AdditiveLaw
from fisherlab.optim.coverage import Coverage
from fisherlab.optim.passes import Call, Pass
from fisherlab.optim.scale import OptimizerError, ignored_terms, scale_factor
from fisherlab.optim.watch import Hook, Watch
from fisherlab.optim.weight import Weight

# of a capture: what sums of the raw tensors over the examples determine
SUMS = frozenset({"mean_input_sum", "label_gradient_sum"})


# The share of `.grad` that a gradient of the gradient may be before blocks are refused.
PENALTY = 1e-3


class Recorder:
    """Delivers `LayerCapture`s of each step's own passes.

    `wanted` switches the recording; the hooks are installed once, before any `torch.compile`, since
    compiled code ignores later ones.

    Args:
        model: the model.
        coverage: the matrices; those that a call shows join, those without a block are left out.
        criterion: what the training loop calls, if it was given.
        fisher_type: "empirical", "mc" or "exact".
        mc_samples: draws per example.
        generator: source of the draws; None: a fresh one seeded with 0.
        examples: the first rows of a batch that count; None: all.
        needs: what of a capture the approximation reads.
        ranks: the processes that hold the other shards, if any.
    """

    def __init__(
        self,
        model: nn.Module,
        coverage: Coverage,
        *,
        criterion: Callable[..., Any] | None = None,
        fisher_type: str = "empirical",
        mc_samples: int = 1,
        generator: torch.Generator | None = None,
        examples: int | None = None,
        needs: Collection[str] = ("inputs", "output_gradients"),
        ranks: Ranks | None = None,
    ) -> None:
        check_fisher_type(fisher_type)
        check_draw(criterion, mc_samples, generator)
        self.coverage, self.weights, self.criterion = coverage, coverage.weights, criterion
        self.fisher_type, self.mc_samples = fisher_type, mc_samples
        self.generator = generator or torch.Generator().manual_seed(0)
        self.examples, self.ranks = examples, ranks
        self.needs = frozenset(needs)
        # tensors that no approximation needs are not kept: memory that backward then reuses
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
        # the backward pass that reached the last of them
        self._task = -1
        self._key = f"fisherlab pass of {id(self)}"
        self._open: Pass | None = None
        # their gradient is not `g a^T` of their calls, their rows are no examples, or they have no
        # slope; known after the first pass
        self.left_out = coverage.left_out
        # layers that were proven, and those whose rows are not in the order of the examples
        self._proven: set[str] = set()
        self._coded: set[str] = set()
        self._proves = examples is None and not self.summed
        self.law: AdditiveLaw | None = None
        if self.gradients and "inputs" in needs and examples is None and ranks is None:
            self.law = AdditiveLaw(self.weights, lambda: self.wanted and not is_isolated())
        self.watch = Watch(
            model, self.weights, lambda: self.wanted, self._begin, self._record, self._end
        )
        coverage.tape = self.watch.tape
        self._handles: list[Any] = []
        if isinstance(criterion, nn.Module):
            hook = Hook(lambda _, *args: self._loss(*args))
            self._handles.append(criterion.register_forward_hook(hook, with_kwargs=True))

    def remove(self) -> None:
        """Take every hook off the model."""
        self.watch.remove()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self.law is not None:
            self.law.remove()

    def add(self, weight: Weight) -> None:
        """A matrix that joined later."""
        if self.law is not None:
            self.law.add(weight)

    def clear(self) -> None:
        """Forget the passes since the last step."""
        self.passes.clear()
        self._open = self._latest = None
        if self.law is not None:
            self.law.clear()

    def _drop_zeroed(self) -> None:
        """Forget passes whose gradients were thrown away: no weight has one any more.

        While the backward pass that reached them runs, no weight has one yet.
        """
        running = torch._C._current_graph_task_id()
        if running != -1 and running == self._task:
            return
        if self.passes and all(w.weight.grad is None for w in self.weights.values()):
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
        self._task = torch._C._current_graph_task_id()

    # the forward pass -------------------------------------------------------------------------

    def _begin(self) -> None:
        self._drop_zeroed()
        self._open = Pass()

    def _record(self, use: Use, output: Tensor) -> Tensor:
        current, weight = self._open, self.weights.get(use.name)
        if current is None:
            return output
        known = use.name in self.watch.tape.others or use.kind != "map"
        if weight is None and not known and (weight := self.coverage.adopt(use)) is not None:
            self.add(weight)
        if weight is not None and weight.weight.numel() != weight.geometry.numel:
            # changed in place since: the step refuses it by name
            return output
        if weight is None or not weight.fits(use):
            self.watch.tape.others.setdefault(use.name, set()).add(use.function)
            return output
        x = use.product.x
        x = x if x.layout == torch.strided else x.to_dense()
        part = x.detach()[: self.examples]
        # of a linear map over positions, those without a gradient are left out of the sum
        waiting = self.summed and weight.is_linear and part.ndim > 2
        call = Call(
            use.geometry,
            use.bias,
            part if waiting else self._kept(part),
            tuple(weight.weight.shape),
            output.detach()[: self.examples].clone() if self.outputs else None,
            count=len(part),
            shape=output.shape,
            edge=get_gradient_edge(output),
            waiting=waiting,
        )
        current.calls.setdefault(use.name, []).append(call)

        def arrive(gradient: Tensor) -> None:
            if self._is_own():
                return
            self._arrived(current)
            call.arrived = True
            current.twice |= gradient.requires_grad
            if call.waiting:
                rows = gradient[: self.examples].detach()
                call.raw_input = self._kept(weighed_input(call.raw_input, rows, call.behind))
                call.waiting = False
            if self.gradients:
                part = self._kept(gradient[: self.examples].detach())
                call.gradient = part if call.gradient is None else call.gradient + part

        output.register_hook(arrive)
        # a Linear over [n, t, i] returns a view; an in-place operation on a view replaces the
        # view's history, and the hook with it
        return output.clone() if output._is_view() else output

    def _kept(self, tensor: Tensor) -> Tensor:
        """The kept part of the examples: they, or their sum, taken while they are at hand."""
        return example_sum(widened(tensor)) if self.summed else tensor

    def _end(self, output: Tensor | None) -> None:
        current, self._open = self._open, None
        if current is None or output is None:
            return
        self._leave_out(current)
        if not current.calls:
            return
        current.output = output.detach()

        def arrive(gradient: Tensor) -> None:
            if self._is_own():
                return
            self._arrived(current)
            current.output_gradient = _plus(current.output_gradient, gradient)

        output.register_hook(arrive)
        if self.watch.loss is not None:

            def arrive_own(gradient: Tensor) -> None:
                if self._is_own():
                    return
                current.own_scale = _plus(current.own_scale, gradient)

            self.watch.loss.register_hook(arrive_own)
        self._latest = weakref.ref(current)
        # on the graph's own node: a loss may be taken of what is made of an earlier output
        if output.grad_fn is not None:
            cast(Any, output.grad_fn).metadata[self._key] = weakref.ref(current)
        with own_pass(self.watch.model()):
            self._ask(current, output)

    def _is_own(self) -> bool:
        return in_own_pass(self.watch.model())

    def _ask(self, current: Pass, output: Tensor) -> None:
        """Send what must be known of the pass back through its graph."""
        if self._proves:
            self._prove(current, output)
        elif self.summed:
            self._count_positions(current, output)
        if self.slopes:
            self._find_slopes(current, output)
        self._watch_rectifiers(current, output)
        if self.columns and not isinstance(self.criterion, nn.Module):
            if not self.watch.single:
                raise OptimizerError(
                    f"the model returned several tensors, and fisher_type={self.fisher_type!r} "
                    "must know which the loss is of; pass `criterion=` the module that the "
                    "training loop calls"
                )
            self._send_columns(current, output, None)
        elif not self.columns:
            for call in current.every():
                call.edge = None

    def _leave_out(self, current: Pass) -> None:
        """Name the layers without a call, or with a use that is no product of this weight's own."""
        others = self.watch.tape.others
        new: dict[str, str] = {}
        for name in self.weights:
            functions = ", ".join(sorted(others.get(name, ())))
            # an unproven product is not taken on trust
            lost = name not in current.calls or not self._proves
            if functions and lost:
                new[name] = f"it is used by {functions}, not by a product FisherLab knows"
        self.coverage.leave_out(new)

    @reentrant_named(OptimizerError)
    def _send_columns(self, current: Pass, output: Tensor, labels: Tensor | None) -> None:
        """The model's own output vectors, on the live graph and only as far as layer outputs.

        `output` is what the criterion sees, which may have the examples' positions as rows.
        """
        criterion = fisher.as_module(self.criterion or nn.CrossEntropyLoss())
        calls = current.every()
        free = output.detach().float() if output.dtype.itemsize < 4 else output.detach()
        if labels is None:
            # mc and exact vectors depend on the labels through nothing but their shape
            is_class = rules_of(criterion) is not None and cast(Rules, rules_of(criterion)).classes
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
            gradients = pulled_back(output, (scale * vector).to(output.dtype), _edges(calls))
            for call, gradient in zip(calls, gradients, strict=True):
                if gradient is None:
                    gradient = output.new_zeros(call.shape)
                call.columns.append(gradient[: self.examples].detach())

    def _loss(
        self, criterion: nn.Module, args: tuple[Any, ...], kwargs: dict[Any, Any], loss: Tensor
    ) -> None:
        saw = args[0] if args else kwargs["input"]
        if is_isolated() or not isinstance(loss, Tensor) or not loss.requires_grad:
            return
        passes = self._passes_behind(saw)
        if len(passes) > 1 and self.columns:
            raise OptimizerError(
                f"fisher_type={self.fisher_type!r} takes a loss of one forward pass, and this one "
                f"is of the outputs of {len(passes)} together; take a loss of each, or 'empirical'"
            )
        if len(passes) != 1:
            return  # of several passes: the gradient at each output tells the scale
        (current,) = passes
        labels = args[1] if len(args) > 1 else kwargs.get("target")
        current.labels = labels.detach() if isinstance(labels, Tensor) else None

        def arrive(gradient: Tensor) -> None:
            if self._is_own():
                return
            current.loss_scale = _plus(current.loss_scale, gradient)

        loss.register_hook(arrive)
        if not self.columns:
            return
        if current.criterion_saw is saw:
            # a second loss of the same outputs (mixed labels) has the same Hessian
            seen = cast(Tensor, saw), cast(Tensor, current.labels)
            if labels_matter(criterion, *seen):
                raise OptimizerError(
                    f"fisher_type={self.fisher_type!r} takes one loss of the same outputs where "
                    "labels have weights or are ignored; mix the labels before the loss, or use "
                    "'empirical'"
                )
        else:
            rules = rules_of(criterion)
            if current.labels is None or (rules is not None and rules.apart):
                raise OptimizerError(
                    f"fisher_type={self.fisher_type!r} needs {type(criterion).__name__} called as "
                    "criterion(outputs, labels); a criterion that is called in another way has "
                    "the empirical Fisher only"
                )
            current.criterion_saw = saw
            with own_pass(self.watch.model()):
                self._send_columns(current, saw, current.labels)

    def _passes_behind(self, saw: object) -> list[Pass]:
        """The passes whose outputs a loss was taken of: the output, or what was made of it."""
        latest = None if self._latest is None else self._latest()
        found: dict[int, Pass] = {}
        seen: set[Any] = set()
        stack = [saw.grad_fn] if isinstance(saw, Tensor) else []
        while stack:
            node = stack.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            known = cast(Any, node).metadata.get(self._key)
            current = None if known is None else known()
            if current is None:
                stack += [behind for behind, _ in node.next_functions]
            else:
                found[id(current)] = current
        if found:
            return list(found.values())
        return [] if latest is None else [latest]

    # what the passes delivered ------------------------------------------------------------------

    def captures(self) -> list[dict[str, LayerCapture]]:
        """One dict of captures per forward and backward since the last step, checked and scaled."""
        arrived = [p for p in self.passes if p.arrived]
        self.factors = [self._factor(p) for p in arrived]
        found = [self._capture(*pair) for pair in zip(arrived, self.factors, strict=True)]
        if self.law is None or not found:
            return found
        twice = [k for k, one in enumerate(arrived) if one.twice]
        if twice and not self.columns and self.law.rest(found, self.factors) > PENALTY:
            raise OptimizerError(
                "the loss holds a gradient of the model (create_graph=True, as of a gradient "
                "penalty), so what reaches the layers is no per-example gradient of the "
                "criterion; pass fisher_type='mc' or 'exact', which take the model's own outputs; "
                "no parameter was changed"
            )
        kept = self.law.present(found, self.factors)
        self.factors = [self.factors[k] for k in kept]
        return [found[k] for k in kept]

    @reentrant_named(OptimizerError)
    def _prove(self, current: Pass, output: Tensor) -> None:
        """Leave out layers whose gradient is not `sum g a^T` of their calls; asked once of each.

        A random vector is sent back from the outputs: terms of the loss that are no terms of the
        model, such as a penalty on the weights, are not in it. Rows in another order than the
        batch's are given back to their examples, in each pass of a layer that has such rows.
        """
        n = len(output)
        fresh = {name for name in current.calls if name not in self._proven}
        doubtful = [
            (name, call)
            for name, calls in current.calls.items()
            for call in calls
            if name in fresh or name in self._coded or call.shape[0] != n
        ]
        if doubtful:
            self._find_rows(output, doubtful)
        if fresh:
            self._proven |= fresh
            self._find_products(current, output, fresh - set(self.left_out))

    @reentrant_named(OptimizerError)
    def _count_positions(self, current: Pass, output: Tensor) -> None:
        """Give each example as many positions of the summed rows, or leave the layer out."""
        n = len(output)
        folded = [
            (name, call)
            for name, calls in current.calls.items()
            for call in calls
            if call.shape[0] != n and name not in self.left_out
        ]
        if not folded:
            return
        calls = [call for _, call in folded]
        whys = find_examples(output, calls, _edges(calls), [call.shape for call in calls])
        new: dict[str, str] = {}
        for (name, call), why in zip(folded, whys, strict=True):
            examples, call.examples = call.examples, None
            if not why and examples is not None:
                counts = torch.bincount(examples[examples >= 0], minlength=n)
                whole = int(counts.min()) * n == len(examples) and len(call.shape) == 2
                why = "" if whole else "its examples have different numbers of rows"
                call.positions = len(examples) // n
            if why:
                new[name] = why
        self.coverage.leave_out(new)

    def _find_rows(self, output: Tensor, doubtful: list[tuple[str, Call]]) -> None:
        n, calls = len(output), [call for _, call in doubtful]
        whys = find_examples(output, calls, _edges(calls), [call.shape for call in calls])
        new: dict[str, str] = {}
        for (name, call), why in zip(doubtful, whys, strict=True):
            same = call.shape[0] == n == len(call.raw_input)
            if why or (same and in_order(call, n)):
                # examples that interact, as under batch norm, keep the rows that they have
                call.examples = None
                if why and not same and name not in self.left_out:
                    new[name] = why
            else:
                self._coded.add(name)
        self.coverage.leave_out(new)

    def _find_products(self, current: Pass, output: Tensor, names: set[str]) -> None:
        generator = torch.Generator().manual_seed(0)
        vector = torch.randn(output.shape, generator=generator).to(output)
        joined = {name: calls for name, calls in current.calls.items() if name in names}
        every = [call for calls in joined.values() for call in calls]
        leaves = [
            leaf
            for name in joined
            for leaf in (self.weights[name].weight, self.weights[name].bias)
            if leaf is not None
        ]
        if not every:
            return
        found = pulled_back(output, vector, [*_edges(every), *leaves])
        rows = {
            id(call): output.new_zeros(call.shape) if g is None else g
            for call, g in zip(every, found[: len(every)], strict=True)
        }
        gradients = iter(found[len(every) :])
        new: dict[str, str] = {}
        for name, calls in joined.items():
            weight = self.weights[name]
            leaf = or_zero(next(gradients), weight.weight)
            bias = None if weight.bias is None else or_zero(next(gradients), weight.bias)
            parts, why = self._parts(name, calls, len(output))
            if why:
                new[name] = why
                continue
            layers = capture_of(name, "", parts, self._form(weight), lambda c: rows[id(c)])
            error = gradient_error(list(layers.values()), leaf, bias)
            if error > max(tolerance(t) for c in calls for t in (c.raw_input, rows[id(c)])):
                others = self.watch.tape.others.get(name)
                extra = [f"it is used by {', '.join(sorted(others))} as well"] if others else []
                new[name] = not_a_product(error, *extra)
        self.coverage.leave_out(new)

    @staticmethod
    def _form(weight: Weight) -> Form:
        return Form(weight.geometry, weight.bias)

    def _parts(self, name: str, calls: list[Call], n: int) -> tuple[list[Any], str]:
        """The calls in the form of the weight, or why they have none."""
        form = self._form(self.weights[name])
        try:
            return [piece for call in calls for piece in pieces(call, form, n)], ""
        except ValueError as error:
            return [], str(error)

    def _watch_rectifiers(self, current: Pass, output: Tensor) -> None:
        """See which positions of a linear map the loss reaches behind a rectifier."""
        if not self.gradients:
            return
        calls = [
            call
            for name, found in current.calls.items()
            for call in found
            if self.weights[name].is_linear and (len(found) > 1 or len(call.shape) > 2)
        ]
        edges = _edges(calls)
        for call, nodes in zip(calls, stopping(output, edges) if edges else (), strict=True):
            for node in nodes:
                node.register_prehook(partial(self._seen_behind, call))

    def _seen_behind(self, call: Call, gradients: tuple[Any, ...]) -> None:
        seen = seen_at(gradients[0], call.shape)[: self.examples]
        call.behind = seen if call.behind is None else call.behind | seen

    def _find_slopes(self, current: Pass, output: Tensor) -> None:
        """Slopes of all calls; layers that have none are left out, which is said once."""
        every = current.every()
        for call, each in zip(every, slopes([output], _edges(every)), strict=True):
            call.slopes = each
        reasons = {
            name: next((c.slopes.reason for c in calls if c.slopes and c.slopes.reason), "")
            for name, calls in current.calls.items()
        }
        new = {n: why for n, why in reasons.items() if why and n not in self.left_out}
        if new:
            self.left_out |= new
            named = "; ".join(f"layer {name!r} has no slope nu: {why}" for name, why in new.items())
            warnings.warn(
                f"SNGD has no block of these layers, which take their plain gradients: {named}",
                stacklevel=2,
            )

    def _capture(self, one: Pass, factor: float) -> dict[str, LayerCapture]:
        found: dict[str, LayerCapture] = {}
        for name, calls in one.calls.items():
            arrived = [call for call in calls if call.arrived]
            if arrived and name not in self.left_out:
                found |= self._layer(name, arrived, factor, one)
        return found

    def _layer(
        self, name: str, calls: list[Call], factor: float, one: Pass
    ) -> dict[str, LayerCapture]:
        weight = self.weights[name]
        batch = len(cast(Tensor, one.output))
        expected = batch if self.examples is None else None
        for index, call in enumerate(calls):
            if call.positions > 1:
                # a mean over positions, as of `[n, t, i]`
                call.raw_input, call.count = call.raw_input / call.positions, batch
                call.positions = 1
            given = (call.count, *call.raw_input.shape[1:])
            moved = expected is not None and call.count != expected and call.examples is None
            if len(given) < 2 or moved:
                raise OptimizerError(
                    f"call {index} of layer {name!r} received {given} in a "
                    f"batch of {batch}: the first axis must be the example"
                )
        n = len(calls[0].raw_input) if self.summed or self.examples is not None else batch
        parts, why = self._parts(name, calls, n)
        if why:
            raise OptimizerError(f"layer {name!r}: {why}; no parameter was changed")
        scale = factor
        columns: Callable[[Any], Tensor] | None = None
        labels: Callable[[Any], Tensor] = _labels
        if not self.gradients:
            labels = _nothing_arrived
        elif self.fisher_type == "empirical":
            columns = _label_columns
        if self.columns:
            # its own columns are of the per-example loss already
            scale, columns = 1.0, _columns
            labels = partial(_labels, factor=factor)
        sums = None
        if self.slopes:
            sums = torch.stack([c.slopes.sums for c in calls if c.slopes]).sum(0)[: self.examples]
        layers = capture_of(
            name,
            type(weight.module).__name__,
            parts,
            self._form(weight),
            labels,
            columns,
            slopes=sums,
            fisher_type=self.fisher_type,
            gradient_scale=scale,
            summed=calls[0].count if self.summed else 1,
        )
        first = next(iter(layers.values()))
        if not self.gradients:
            return {key: replace(layer, raw_label_gradients=None) for key, layer in layers.items()}
        if "inputs" not in self.needs or self.summed:
            return layers

        def behind() -> list[Tensor]:
            found = []
            for part in parts:
                call = cast(Call, part.call)
                seen = call.behind
                if seen is None:
                    seen = torch.zeros(
                        call.shape[0],
                        call.shape[1:-1].numel(),
                        dtype=torch.bool,
                        device=first.device,
                    )[: self.examples]
                found.append(seen if part.rows is None else take(seen.flatten(), part.rows))
            return found

        maps = first.maps or [first.geometry] * len(parts)
        own = first.raw_output_gradients
        rows = cast(tuple[Tensor, ...], first.raw_label_gradients)
        own = tuple(g[None] for g in rows) if own is None else own
        counts = counted(maps, own, rows, behind=behind)
        return {key: replace(layer, counted=counts) for key, layer in layers.items()}

    def _factor(self, one: Pass) -> float:
        """The factor from `dL/ds` to the gradient of the per-example loss `l_n`."""
        if one.output is None:
            raise OptimizerError(
                "the model returned no tensor with a graph, so the examples of its batch are not "
                "known; return the outputs (a tensor, a tuple, a dict); no parameter was changed"
            )
        if self.columns and one.loss_scale is None and one.output_gradient is not None:
            # columns were sent for every label, an ignored one included
            if ignored_terms(one.output, one.output_gradient):
                raise OptimizerError(
                    f"fisher_type={self.fisher_type!r} cannot tell which labels are ignored by a "
                    "loss function; pass `criterion=` the module that the training loop calls, "
                    "such as torch.nn.CrossEntropyLoss()"
                )
        # columns were sent for classes in axis 1
        return scale_factor(
            *(one.output, one.output_gradient, one.loss_scale, self.criterion, one.own_scale),
            last=not self.columns,
        )


def check_fisher_type(fisher_type: str) -> None:
    """Refuse an unknown one before anything is hooked."""
    if not isinstance(fisher_type, str) or fisher_type not in fisher.FISHER_TYPES:
        raise ValueError(unknown("fisher_type", fisher_type, fisher.FISHER_TYPES))


def check_draw(criterion: object, mc_samples: int, generator: object) -> None:
    """Refuse what is no criterion, no number of draws and no generator, before anything is hooked.

    Raises:
        ValueError: one of them, by name.
    """
    if criterion is not None and (not callable(criterion) or isinstance(criterion, type)):
        raise ValueError(
            "criterion is the module or the function that the loop calls, or None; got "
            f"{doors.said(criterion)}"
        )
    fisher.check_draws(mc_samples)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ValueError(f"generator is a torch.Generator or None, got {doors.said(generator)}")


def _edges(calls: list[Call]) -> list[GradientEdge]:
    return [cast(GradientEdge, call.edge) for call in calls]


def _labels(call: Any, factor: float = 1.0) -> Tensor:
    g = widened(cast(Tensor, call.gradient))
    return g if factor == 1 else factor * g


def _label_columns(call: Any) -> Tensor:
    return _labels(call)[None]


def _columns(call: Any) -> Tensor:
    return torch.stack([widened(v) for v in call.columns])


def _nothing_arrived(call: Any) -> Tensor:
    """In place of a gradient that is not kept: zeros that take no memory."""
    return widened(call.raw_input).new_zeros(()).expand(call.shape)[: call.count]


def _plus(known: Tensor | None, gradient: Tensor) -> Tensor:
    """The sum over backward passes of one graph, as `.grad` holds it."""
    return gradient.detach() if known is None else known + gradient.detach()
