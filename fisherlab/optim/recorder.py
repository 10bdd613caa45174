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

import weakref
from collections.abc import Callable, Collection
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from fisherlab import doors
from fisherlab.distributed import Ranks, jointly
from fisherlab.extract import fisher
from fisherlab.extract.backward import pulled_back, widened
from fisherlab.extract.criteria import Rules, labels_matter, rules_of
from fisherlab.extract.dead import seen_at, stopping
from fisherlab.extract.isolation import in_own_pass, is_isolated, own_pass
from fisherlab.extract.layer import LayerCapture
from fisherlab.extract.moments import example_sum
from fisherlab.extract.no_gradient import no_gradient_named
from fisherlab.extract.padding import weighed_input
from fisherlab.extract.slopes import slopes
from fisherlab.extract.tape import Use
from fisherlab.optim.additive import AdditiveLaw
from fisherlab.optim.assembling import captures_of
from fisherlab.optim.coverage import Coverage
from fisherlab.optim.needs import Needs
from fisherlab.optim.passes import Call, Pass, behind, edges_behind, mark
from fisherlab.optim.proving import Proof, edges
from fisherlab.optim.scale import (
    OptimizerError,
    check_criterion,
    check_ranks,
    ignored_terms,
    is_loss,
    scale_factor,
)
from fisherlab.optim.watch import Hook, Watch
from fisherlab.optim.weight import Weight
from fisherlab.telling import warn

# The share of `.grad` that a gradient of the gradient may be before blocks are refused.
PENALTY = 1e-3


# Each gradient by its weight's name: which tensor it is, and how often it was written into.
Versions = dict[str, tuple["weakref.ref[Tensor]", int]]


def _is_untouched(now: Versions, before: Versions) -> bool:
    """Whether gradients are the same tensors with the same numbers; a dead one is none of them."""
    return now.keys() == before.keys() and all(
        found() is before[name][0]() and version == before[name][1]
        for name, (found, version) in now.items()
    )


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
        self.needs = Needs(frozenset(needs), fisher_type, examples)
        self.mc_samples, self.ranks = mc_samples, ranks
        self.generator = generator or torch.Generator().manual_seed(0)
        # its state before the draws since the last step, and after them
        self._drawn: tuple[Tensor, Tensor] | None = None
        self._refused = False
        # the gradients as the latest backward pass left them
        self._left: Versions = {}
        # passes of a backward pass that accumulated nothing
        self._unclaimed: list[Pass] = []
        # a factor for each pass last captured: it turned dL/ds into per-example gradients
        self.factors: list[float] = []
        self.wanted = False
        # passes that a backward pass has reached; the graph alone keeps the others
        self.passes: list[Pass] = []
        self._latest: weakref.ref[Pass] | None = None
        # the backward pass that reached the last of them
        self._task = -1
        self._key = f"fisherlab pass of {id(self)}"
        self._marks = f"fisherlab calls of {id(self)}"
        self._open: Pass | None = None
        self.proof = Proof(coverage)
        self.law: AdditiveLaw | None = None
        if self.needs.gradients and self.needs.inputs and examples is None and ranks is None:
            self.law = AdditiveLaw(self.weights, lambda: self.wanted and not is_isolated())
        self.watch = Watch(
            model, self.weights, lambda: self.wanted, self._begin, self._record, self._end
        )
        coverage.watch = self.watch
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

    @property
    def generator_state(self) -> Tensor:
        """The generator's state without the draws since the last step."""
        state = self.generator.get_state()
        # someone else may have drawn from it since
        taken = self._drawn is not None and torch.equal(state, self._drawn[1])
        return self._drawn[0] if taken and self._drawn is not None else state

    def undraw(self) -> None:
        """Take back the draws since the last step: those of a batch that took none."""
        if self._drawn is not None:
            self.generator.set_state(self.generator_state)
        self._drawn, self._refused = None, False

    def refuse(self) -> None:
        """A step was refused or interrupted: the draws for it do not count."""
        self._refused = True
        self.watch.settle()

    def stepped(self) -> None:
        """Keep the draws: a step was taken."""
        self._drawn, self._refused = None, False

    def clear(self) -> None:
        """Forget the passes since the last step."""
        self.passes.clear()
        self._unclaimed = []
        if self._open is not None:
            self._open.release()
        self._open = self._latest = None
        if self.law is not None:
            self.law.clear()

    def _drop_zeroed(self) -> None:
        """Forget passes whose gradients were thrown away.

        While the backward pass that reached them runs, no weight has one yet.
        """
        running = torch._C._current_graph_task_id()
        if running != -1 and running == self._task:
            return
        if self.passes and self._is_thrown():
            latest = None if self._latest is None else self._latest()
            if any(latest is known for known in self.passes):
                self._latest = None
            self.passes.clear()
            if self.law is not None:
                self.law.clear()
        self._settle()

    def _is_thrown(self) -> bool:
        """Whether no weight holds a gradient of the passes any more."""
        found = [w.weight.grad for w in self.weights.values() if w.weight.grad is not None]
        # untouched since a backward pass accumulated them
        if found and _is_untouched(self._versions(), self._left):
            return False
        return not any(bool(gradient.any()) for gradient in found)

    def _versions(self) -> Versions:
        """Which tensor each gradient is, and how often it was written into."""
        gradients = {name: w.weight.grad for name, w in self.weights.items()}
        return {n: (weakref.ref(g), g._version) for n, g in gradients.items() if g is not None}

    def _note(self, before: Versions, known: list[Pass]) -> None:
        """A backward pass ended: `autograd.grad` accumulates no gradient."""
        self._left = self._versions()
        new = [p for p in self.passes if not any(p is each for each in known)]
        self._unclaimed = new if _is_untouched(self._left, before) else []

    def _settle(self) -> None:
        """Forget what `autograd.grad` reached, unless its gradients were put into `.grad` since.

        They are other tensors there then, or all that was written into the old ones: a norm that
        is clipped after a batch which accumulated claims nothing.
        """
        if not self._unclaimed:
            return
        now, new = self._versions(), self._unclaimed
        others = [p for p in self.passes if not any(p is each for each in new)]
        replaced = any(
            n not in self._left or self._left[n][0]() is not r() for n, (r, _) in now.items()
        )
        written = not _is_untouched(now, self._left) and all(p.by_hand for p in others)
        if replaced or (written and not self._is_thrown()):
            for one in new:
                one.by_hand = True
            self._left = now
        else:
            self.passes[:] = others
        self._unclaimed = []

    def _arrived(self, current: Pass) -> None:
        """A backward pass reaches `current`; `.grad` is still as it was before."""
        if any(current is known for known in self.passes):
            return
        self._drop_zeroed()
        if not self.passes and self.law is not None:
            self.law.begin()
        task = torch._C._current_graph_task_id()
        if task != self._task:
            note = partial(self._note, self._versions(), list(self.passes))
            cast(Any, torch.autograd.Variable)._execution_engine.queue_callback(note)
        self.passes.append(current)
        self._task = task

    # the forward pass -------------------------------------------------------------------------

    def _begin(self) -> None:
        if self._open is not None:  # an interrupted forward
            self._open.release()
        self._drop_zeroed()
        waits = self._latest is not None and self._latest() is not None
        if self._refused or not (self.passes or waits):
            self.undraw()
        self._open = Pass()

    def _record(self, use: Use, output: Tensor) -> Tensor:
        current, weight = self._open, self.weights.get(use.name)
        # an expert that no token was sent to has no examples
        if current is None or not use.product.x.numel():
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
        part = x.detach()[: self.needs.examples]
        # positions without a gradient are left out of a linear map's sum
        waiting = self.needs.summed and weight.is_linear and part.ndim > 2
        call = Call(
            use.geometry,
            use.bias,
            part if waiting else self._kept(part),
            tuple(weight.weight.shape),
            output.detach()[: self.needs.examples].clone() if self.needs.outputs else None,
            count=len(part),
            shape=output.shape,
            edge=get_gradient_edge(output),
            waiting=waiting,
        )
        current.calls.setdefault(use.name, []).append(call)

        if self.needs.columns:  # vectors will be sent back to it
            mark(output, self._marks, call)

        def arrive(gradient: Tensor) -> None:
            self._arrived(current)
            call.arrived = True
            current.twice |= gradient.requires_grad
            if call.waiting:
                rows = gradient[: self.needs.examples].detach()
                call.raw_input = self._kept(weighed_input(call.raw_input, rows, call.behind))
                call.waiting = False
            if self.needs.gradients:
                part = self._kept(gradient[: self.needs.examples].detach())
                call.gradient = part if call.gradient is None else call.gradient + part

        output.register_hook(self._of_others(arrive))
        # a Linear over [n, t, i] returns a view; an in-place operation on a view replaces the
        # view's history, and the hook with it
        return output.clone() if output._is_view() else output

    def _kept(self, tensor: Tensor) -> Tensor:
        """The kept part of the examples: they, or their sum, taken while they are at hand."""
        return example_sum(widened(tensor)) if self.needs.summed else tensor

    def _end(self, output: Tensor | None) -> None:
        current, self._open = self._open, None
        if current is None:
            return
        try:
            if output is not None:
                self._close(current, output)
        finally:
            current.release()

    def _close(self, current: Pass, output: Tensor) -> None:
        self._leave_out(current)
        if not current.calls:
            return
        current.output = output.detach()
        if not len(output):  # the step refuses it
            return

        def arrive(gradient: Tensor) -> None:
            self._arrived(current)
            current.output_gradient = _plus(current.output_gradient, gradient)

        output.register_hook(self._of_others(arrive))
        if self.watch.loss is not None:

            def arrive_own(gradient: Tensor) -> None:
                current.own_scale = _plus(current.own_scale, gradient)

            self.watch.loss.register_hook(self._of_others(arrive_own))
        with own_pass(self.watch.model()):
            self._ask(current, output)
        self._latest = weakref.ref(current)
        # on the graph's own node: a loss may be taken of what is made of an earlier output
        if output.grad_fn is not None:
            cast(Any, output.grad_fn).metadata[self._key] = self._latest

    def _of_others(self, listen: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
        """A hook that hears every backward pass but our own."""

        def arrive(gradient: Tensor) -> None:
            if not in_own_pass(self.watch.model()):
                listen(gradient)

        return arrive

    def _ask(self, current: Pass, output: Tensor) -> None:
        """Send what must be known of the pass back through its graph."""
        if self.needs.rows:
            self.proof.prove(current, output)
        elif self.needs.summed:
            self.proof.count_positions(current, output)
        if self.needs.slopes:
            self._find_slopes(current, output)
        self._watch_rectifiers(current, output)
        if self.needs.columns and not isinstance(self.criterion, nn.Module):
            if not self.watch.single:
                raise OptimizerError(
                    f"the model returned several tensors, and {self.needs.chosen} "
                    "must know which the loss is of; pass `criterion=` the module that the "
                    "training loop calls"
                )
            self._send_columns(current, output, None)

    def _leave_out(self, current: Pass) -> None:
        """Find the layers without a call, or with a use that is no product of its own."""
        others = self.watch.tape.others
        new: dict[str, str] = {}
        for name in self.weights:
            functions = ", ".join(sorted(others.get(name, ())))
            # an unproven product is not taken on trust
            lost = name not in current.calls or not self.needs.rows
            if functions and lost:
                new[name] = f"it is used by {functions}, not by a product FisherLab knows"
        current.lost |= new

    @no_gradient_named(OptimizerError)
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
        if not rows:  # the step refuses it
            return
        if rows != M and self.needs.fisher_type == "exact":
            raise OptimizerError(
                f"the criterion sees {rows} rows for {M} examples, so the exact columns of one "
                "example cannot be told apart; keep the example as first axis or use 'mc'"
            )
        mean = fisher.reduction_of(criterion) == "mean"
        scale = (M / rows) ** 0.5 if mean else 1.0
        before, state = self.generator_state, self.generator.get_state()
        vectors = fisher.output_vectors(
            self.needs.fisher_type,
            criterion,
            free,
            labels,
            self.mc_samples,
            self.generator,
            self.ranks,
        )
        sources = edges_behind(output, self._marks, calls)
        reached = [edge for edge in sources if edge is not None]
        try:
            for vector in vectors:
                found = iter(pulled_back(output, (scale * vector).to(output.dtype), reached))
                for call, edge in zip(calls, sources, strict=True):
                    gradient = None if edge is None else next(found)
                    if gradient is None:
                        gradient = output.new_zeros(call.shape)
                    call.columns.append(gradient[: self.needs.examples].detach())
        except BaseException:  # a hook of the user's may raise on the way of a vector
            self.generator.set_state(state)
            for call in calls:
                call.columns.clear()
            raise
        self._drawn = before, self.generator.get_state()

    def _loss(
        self, criterion: nn.Module, args: tuple[Any, ...], kwargs: dict[Any, Any], loss: Tensor
    ) -> None:
        saw = args[0] if args else kwargs["input"]
        if not is_loss(loss):
            return
        latest = None if self._latest is None else self._latest()
        passes = behind(saw, self._key, latest, (w.weight for w in self.weights.values()))
        if len(passes) > 1 and self.needs.columns:
            raise OptimizerError(
                f"{self.needs.chosen} takes a loss of one forward pass, and this one "
                f"is of the outputs of {len(passes)} together; take a loss of each, or 'empirical'"
            )
        if len(passes) != 1:
            return  # the gradient at each output tells the scale of several passes
        (current,) = passes
        labels = args[1] if len(args) > 1 else kwargs.get("target")
        current.labels = labels.detach() if isinstance(labels, Tensor) else None

        def arrive(gradient: Tensor) -> None:
            current.loss_scale = _plus(current.loss_scale, gradient)

        loss.register_hook(self._of_others(arrive))
        if not self.needs.columns:
            return
        if current.criterion_saw is not None and current.criterion_saw() is saw:
            # a second loss of the same outputs (mixed labels) has the same Hessian
            seen = cast(Tensor, saw), cast(Tensor, current.labels)
            if labels_matter(criterion, *seen):
                raise OptimizerError(
                    f"{self.needs.chosen} takes one loss of the same outputs where "
                    "labels have weights or are ignored; mix the labels before the loss, or use "
                    "'empirical'"
                )
        else:
            rules = rules_of(criterion)
            if current.labels is None or (rules is not None and rules.apart):
                raise OptimizerError(
                    f"{self.needs.chosen} needs {type(criterion).__name__} called as "
                    "criterion(outputs, labels); a criterion that is called in another way has "
                    "the empirical Fisher only"
                )
            with own_pass(self.watch.model()):
                self._send_columns(current, saw, current.labels)
            current.criterion_saw = weakref.ref(saw)

    # delivery -----------------------------------------------------------------------------------

    def captures(self, at: str = "") -> list[dict[str, LayerCapture]]:
        """One dict of captures per forward and backward since the last step, checked and scaled.

        Args:
            at: the step, and what it captures for; ranks that are elsewhere are refused.
        """
        self._settle()
        arrived = [p for p in self.passes if p.arrived]
        for one in arrived:
            self.coverage.leave_out(one.lost)
        with jointly(self.ranks, "reading its batch"):
            self.factors = [self._factor(p) for p in arrived]
        if self.ranks is not None:
            calls = [f"{name} x {len(each)}" for p in arrived for name, each in p.calls.items()]
            at = f"{at}, with {', '.join(calls)}"
            self.factors, _ = check_ranks(self.ranks, self.factors, at, len(calls))
        found = [
            captures_of(one, factor, self.needs, self.coverage)
            for one, factor in zip(arrived, self.factors, strict=True)
        ]
        if self.law is None or not found:
            return found
        twice = [k for k, one in enumerate(arrived) if one.twice]
        if twice and not self.needs.columns and self.law.rest(found, self.factors) > PENALTY:
            raise OptimizerError(
                "the loss holds a gradient of the model (create_graph=True, as of a gradient "
                "penalty), so what reaches the layers is no per-example gradient of the "
                "criterion; pass fisher_type='mc' or 'exact', which take the model's own outputs; "
                "no parameter was changed"
            )
        kept = self.law.present(found, self.factors)
        self.factors = [self.factors[k] for k in kept]
        return [found[k] for k in kept]

    def _watch_rectifiers(self, current: Pass, output: Tensor) -> None:
        """See which positions of a linear map the loss reaches behind a rectifier."""
        if not self.needs.gradients:
            return
        calls = [
            call
            for name, found in current.calls.items()
            for call in found
            if self.weights[name].is_linear and (len(found) > 1 or len(call.shape) > 2)
        ]
        behind = stopping(output, edges(calls)) if calls else ()
        for call, nodes in zip(calls, behind, strict=True):
            for node in nodes:
                node.register_prehook(partial(self._seen_behind, call))

    def _seen_behind(self, call: Call, gradients: tuple[Any, ...]) -> None:
        seen = seen_at(gradients[0], call.shape)[: self.needs.examples]
        call.behind = seen if call.behind is None else call.behind | seen

    def _find_slopes(self, current: Pass, output: Tensor) -> None:
        """Slopes of all calls; layers that have none are left out, which is said once."""
        every = current.every()
        for call, each in zip(every, slopes([output], edges(every)), strict=True):
            call.slopes = each
        reasons = {
            name: next((c.slopes.reason for c in calls if c.slopes and c.slopes.reason), "")
            for name, calls in current.calls.items()
        }
        new = {n: why for n, why in reasons.items() if why and n not in self.coverage.left_out}
        if new:
            self.coverage.left_out |= new
            named = "; ".join(f"layer {name!r} has no slope nu: {why}" for name, why in new.items())
            warn(f"SNGD has no block of these layers, which take their plain gradients: {named}")

    def _factor(self, one: Pass) -> float:
        """The factor from `dL/ds` to the gradient of the per-example loss `l_n`."""
        if one.output is None:
            raise OptimizerError(
                "the model returned no tensor with a graph, so the examples of its batch are not "
                "known; return the outputs (a tensor, a tuple, a dict); no parameter was changed"
            )
        if not len(one.output):
            raise OptimizerError("the batch has no example; leave it out; no parameter was changed")
        if self.needs.columns and one.loss_scale is None and one.output_gradient is not None:
            # columns were sent for every label, an ignored one included
            if ignored_terms(one.output, one.output_gradient):
                raise OptimizerError(
                    f"{self.needs.chosen} cannot tell which labels are ignored by a "
                    "loss function; pass `criterion=` the module that the training loop calls, "
                    "such as torch.nn.CrossEntropyLoss()"
                )
        # columns were sent for classes in axis 1
        return scale_factor(
            *(one.output, one.output_gradient, one.loss_scale, self.criterion, one.own_scale),
            last=not self.needs.columns,
        )


def check_fisher_type(fisher_type: str) -> None:
    """Refuse an unknown one before anything is hooked."""
    doors.choice(fisher_type, "fisher_type", fisher.FISHER_TYPES)


def check_draw(criterion: object, mc_samples: int, generator: object) -> None:
    """Refuse what is no criterion, no number of draws and no generator, before anything is hooked.

    Raises:
        ValueError: one of them, by name.
    """
    check_criterion(criterion)
    fisher.check_draws(mc_samples)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ValueError(f"generator is a torch.Generator or None, got {doors.said(generator)}")


def _plus(known: Tensor | None, gradient: Tensor) -> Tensor:
    """The sum over backward passes of one graph, as `.grad` holds it."""
    return gradient.detach() if known is None else known + gradient.detach()
