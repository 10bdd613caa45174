"""`capture`: one forward and R backward vectors to `{layer name: LayerCapture}`; and `support`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fisherlab.blocks.numerics import all_finite
from fisherlab.distributed import Ranks, unwrapped
from fisherlab.extract import criteria, dead, fisher
from fisherlab.extract.hooks import fill
from fisherlab.extract.isolation import isolated, random_state
from fisherlab.extract.layer import CaptureError, Geometry, LayerCapture
from fisherlab.extract.outputs import output_of
from fisherlab.extract.padding import Masked, bare, counted, mask_of, masks
from fisherlab.extract.proof import CHECKS, unproven
from fisherlab.extract.record import Call, Record, joined_slopes, recording, set_slopes
from fisherlab.extract.select import by_owner, check_batch, check_model, choices, select

BACKENDS = ("auto", "backpack", "hooks")
# The faster backend where `fisherlab bench capture` has been run; hooks where it has not.
MEASURED = {"cpu": "takes any model; BackPACK took 0.9 to 1.1 x its time on CPU as measured"}


# Calls a model in its own way, for one whose arguments are not the batch's.
Forward = Callable[[nn.Module, Any], Tensor]
# Where a dict batch keeps its labels.
LABELS = ("labels", "label", "targets", "target", "y")


@dataclass(frozen=True)
class Report:
    """Which backend made a capture and why, and which modules have no block."""

    backend: str
    reason: str
    seconds: float
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"backend {self.backend}: {self.reason} ({self.seconds:.3f} s)"]
        return "\n".join(lines + [f"  {name}: {why}" for name, why in self.skipped.items()])


class Captures(dict[str, LayerCapture]):
    """`{layer name: LayerCapture}`, with the outputs, labels and `report` of the pass."""

    def __init__(
        self, layers: dict[str, LayerCapture], report: Report, outputs: Tensor, labels: Tensor
    ) -> None:
        super().__init__(layers)
        self.report, self.outputs, self.labels = report, outputs, labels

    def __missing__(self, name: str) -> LayerCapture:
        reason = self.report.skipped.get(name)
        raise KeyError(name if reason is None else f"layer {name!r} was left out: {reason}")

    def __repr__(self) -> str:
        inside = ", ".join(f"{name}: {layer.shape}" for name, layer in self.items())
        return f"Captures({inside}; {self.report.backend})"


def capture(
    model: nn.Module,
    criterion: Callable[[Tensor, Tensor], Tensor],
    x: object,
    y: Tensor | None = None,
    *,
    fisher_type: str = "exact",
    backend: str = "auto",
    mc_samples: int = 1,
    generator: torch.Generator | None = None,
    layers: Iterable[str] | None = None,
    forward: Forward | None = None,
    ranks: Ranks | None = None,
    check: str = "full",
    mask: Tensor | str | None = None,
) -> Captures:
    """`F = (1/M) sum_{m,n} vec(D) vec(D)^T`, `D = sum_t g[m,n,t] a[n,t]^T`: a and g of every layer.

    `x` is a tensor, a tuple or a dict of the model's arguments; `y` the labels, or None where `x`
    is a pair (x, y) or a dict that holds them under "labels". `forward(model, x)` makes the outputs
    where the model is to be called in another way. `fisher_type` is
    "exact" (a root of the loss Hessian), "mc" (labels drawn from the model with `generator`, None a
    fresh one seeded with 0) or "empirical" (the observed labels). The model comes back untouched:
    no hooks, `.grad`, buffers, mode and global random streams as they were.

    `ranks`: the processes that hold the other shards of this batch, if any; they capture together,
    each its own rows of what a single process would capture.

    `check` proves the capture by one more backward pass. "full": each row belongs to its example,
    and `sum g a^T` is autograd's gradient of weight and bias. "gradient": the second only. "off":
    neither. A layer that fails is left out, with its reason in `report.skipped`. "full" refuses a
    model whose outputs change from one forward pass to the next.

    Classes are axis 1 of the outputs, or the last if the shape of the class indices shows it; the
    captured `outputs` have them in axis 1. `register_criterion` adds a criterion of your own.

    `mask` `[n, positions]`, True for real, or the name of an entry of a dict batch: padding is left
    out of the loss and of means over positions, in every layer with these position axes. Positions
    of a Linear without any gradient (padding that the loss ignores) are left out of these means
    anyway. A layer whose masked positions have a gradient is left out: the model uses them.

    A convolution with groups gives one capture per group, `name:0`, `name:1`, ...

    Raises `CaptureError` naming the layer, tensor or criterion that cannot be captured, and why.
    """
    if fisher_type not in fisher.FISHER_TYPES:
        raise CaptureError(
            f"unknown fisher_type {fisher_type!r}; one of {', '.join(fisher.FISHER_TYPES)}"
        )
    if backend not in BACKENDS:
        raise CaptureError(f"unknown backend {backend!r}; one of {', '.join(BACKENDS)}")
    if check not in CHECKS:
        raise CaptureError(f"unknown check {check!r}; one of {', '.join(CHECKS)}")
    fisher.check_draws(mc_samples)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise CaptureError(
            f"generator is {generator!r}; pass torch.Generator().manual_seed(...) or None"
        )
    criterion = fisher.as_module(criterion)
    fisher.reduction_of(criterion)
    x, y = split_batch(x, y)
    model = unwrapped(model)
    check_model(model)
    check_batch(x, y, model)
    mask = mask_of(mask, x, y)
    if mask is not None:
        criterion = Masked(criterion, mask)
    with isolated(model, x):  # to read a parametrized weight may update its buffers
        modules = select(model, layers)
        skipped = {c.name: c.reason for c in choices(model) if c.status not in ("exact", "tied")}
    if not modules:
        reasons = "; ".join(f"{name!r}: {reason}" for name, reason in skipped.items())
        raise CaptureError(
            "no layer of this model has a block: it has no trainable Linear or Conv1d-3d"
            if not reasons
            else f"no layer of this model has a block: {reasons}"
        )

    def vectors(outputs: Tensor) -> Iterator[Tensor]:
        return fisher.output_vectors(
            fisher_type, criterion, outputs, y, mc_samples, generator, ranks
        )

    def checked(outputs: Tensor) -> Tensor:
        return _check_outputs(outputs, criterion, y, ranks)

    start = time.perf_counter()
    name, reason = _choose(backend, x if isinstance(x, Tensor) else y)
    columns = None if fisher_type == "empirical" else vectors

    def run() -> Tensor:
        return criteria.arranged(criterion, _forward(model, x, forward), y)

    # cached: one weight per parametrized layer, whose gradient can be asked for after the pass
    with isolated(model, x), nn.utils.parametrize.cached():
        before = random_state(x)
        if name == "backpack":
            from fisherlab.extract import backpack

            record, outputs = backpack.run(model, modules, run, checked, criterion, y, columns)
        else:
            record, outputs = _by_hooks(model, modules, run, checked, criterion, y, columns)
        calls = by_owner(modules, record.calls)
        scale = fisher.term_scale(criterion, outputs, y, ranks)
        broken: dict[str, str] = {}

        def behind(found: list[Call]) -> list[Tensor]:
            shapes = [call.output.shape for call in found]
            return dead.behind(outputs, record.labels, [call.edge for call in found], shapes)

        examples = outputs.shape[0]
        captured = _assemble(modules, calls, examples, fisher_type, scale, mask, broken, behind)
        if check == "full" and not torch.equal(before, random_state(x)):
            _check_repeatable(run, outputs)
        if check != "off" and captured:
            broken |= unproven(outputs, record.labels, captured, calls, modules, check)
    if mask is not None and not masks(criterion, outputs, captured.values()):
        shapes = {layer.name: tuple(layer.raw_inputs[0].shape) for layer in captured.values()}
        raise CaptureError(
            f"mask of shape {tuple(mask.shape)} fits the positions of no layer (inputs {shapes}) "
            f"and not the outputs {tuple(outputs.shape)}"
        )
    if layers is None and not record.calls and not record.without_graph:
        raise CaptureError(
            f"none of {', '.join(modules)} was called; a model compiled before the capture ignores "
            "new hooks: pass the module that was compiled"
        )
    skipped |= {n: "not called in this forward pass" for n in modules if n not in record.calls}
    skipped |= {n: _NO_GRAPH for n in record.without_graph} | broken
    if layers is not None:
        for layer in modules:
            if layer in broken or layer not in record.calls:
                raise CaptureError(f"layer {layer!r}: {skipped[layer]}")
    captured = {n: layer for n, layer in captured.items() if layer.name not in broken}
    if broken and not captured:
        reasons = "; ".join(f"{name!r}: {reason}" for name, reason in broken.items())
        raise CaptureError(f"no layer could be captured: {reasons}")
    report = Report(name, reason, time.perf_counter() - start, skipped)
    return Captures(captured, report, outputs.detach(), y)


_NO_GRAPH = "its output carries no graph (no_grad, or reentrant checkpointing)"


def _choose(backend: str, tensor: Tensor) -> tuple[str, str]:
    if backend != "auto":
        return backend, "asked for"
    device = tensor.device.type
    return "hooks", MEASURED.get(device, f"the default: BackPACK has not been measured on {device}")


def split_batch(x: object, y: Tensor | None = None) -> tuple[object, Tensor]:
    """The model's arguments and the labels of a batch `(x, y)` or a dict with its labels inside."""
    if y is not None:
        return x, y
    if isinstance(x, Mapping):
        key = next((name for name in LABELS if name in x), None)
        if key is None:
            raise CaptureError(
                f"a dict batch needs its labels under one of {', '.join(LABELS)}; got {list(x)}: "
                "pass them as y"
            )
        return {name: value for name, value in x.items() if name != key}, x[key]
    if isinstance(x, tuple | list) and len(x) == 2 and isinstance(x[1], Tensor):
        return x[0], x[1]
    raise CaptureError(
        f"labels are missing: pass y, a pair (x, y) or a dict with 'labels'; got {type(x).__name__}"
    )


def split_batches(x: object, y: Tensor | None = None) -> list[tuple[object, Tensor]]:
    """One batch, given in any way that `split_batch` takes, or all of a loader."""
    pair = isinstance(x, tuple) and len(x) == 2 and isinstance(x[1], Tensor)
    if y is not None or isinstance(x, Mapping) or pair:
        return [split_batch(x, y)]
    if isinstance(x, Tensor) or not isinstance(x, Iterable):
        raise ValueError("pass labels y, or a loader of (x, y) batches as x")
    batches = [split_batch(batch) for batch in x]
    if not batches:
        raise CaptureError("the loader is empty")
    return batches


def _forward(model: nn.Module, x: object, forward: Forward | None = None) -> Tensor:
    if forward is not None:
        outputs = forward(model, x)
    elif isinstance(x, Mapping):
        outputs = model(**x)
    else:
        outputs = model(*x) if isinstance(x, tuple | list) else model(x)
    outputs = output_of(outputs)
    if not isinstance(outputs, Tensor):
        who = "the model" if forward is None else "forward"
        raise CaptureError(
            f"{who} returned {type(outputs).__name__}; FisherLab needs one tensor of outputs (or "
            "`.logits`): wrap the model, or pass forward=lambda model, x: model(x)[0]"
        )
    return outputs


def _check_repeatable(run: Callable[[], Tensor], outputs: Tensor) -> None:
    """Refuse a model whose outputs are other ones at the next call."""
    with torch.no_grad():
        again, outputs = run(), outputs.detach()
    if (again - outputs).norm() > 1e-3 * outputs.norm():
        raise CaptureError(
            "the forward pass draws random numbers (dropout in a function or in attention, a "
            "sampled latent), so a second capture would be of another network; call model.eval(), "
            "or pass check='gradient' to capture this draw"
        )


def _check_outputs(outputs: Tensor, criterion: Callable, y: Tensor, ranks: Ranks | None) -> Tensor:
    """The gradient of the per-example loss at the observed labels, after every check of it."""
    if not torch.isfinite(outputs).all():
        raise CaptureError("the model's outputs have NaN or inf entries; check its weights")
    if outputs.shape[0] != y.shape[0]:
        raise CaptureError(
            f"the model returned {outputs.shape[0]} rows for {y.shape[0]} labels; the first axis "
            "of outputs and labels is the example"
        )
    fisher.check_labels(criterion, outputs, y)
    mask = criterion.spread(outputs) if isinstance(criterion, Masked) else None
    if mask is not None and fisher.divisor(criterion, outputs, y) == 0:
        raise CaptureError("mask leaves no loss term: every real position is ignored")
    labels = fisher.label_vectors(criterion, outputs, y, ranks)
    fisher.check_additive(bare(criterion), outputs.detach(), y)
    fisher.check_registered(bare(criterion), outputs.detach(), y)
    return labels


def _by_hooks(
    model: nn.Module,
    modules: dict[str, nn.Module],
    forward: Callable[[], Tensor],
    check: Callable[[Tensor], Tensor],
    criterion: Callable,
    y: Tensor,
    vectors: Callable[[Tensor], Iterator[Tensor]] | None,
) -> tuple[Record, Tensor]:
    with recording(modules, model) as record:
        outputs = forward()
        labels = record.labels = check(outputs)
        columns = None if vectors is None else partial(vectors, outputs.detach())
        if record.calls:
            fill(outputs, record, labels, columns)
        record.check_inputs()
        set_slopes(outputs, record.every())
        return record, outputs


def _assemble(
    modules: dict[str, nn.Module],
    joined: dict[str, list[Call]],
    examples: int,
    fisher_type: str,
    term_scale: float,
    mask: Tensor | None,
    broken: dict[str, str],
    behind: Callable[[list[Call]], list[Tensor]],
) -> dict[str, LayerCapture]:
    """Captures by name; in `broken` the layers whose masked positions have a gradient."""
    captured = {}
    for name, calls in joined.items():
        if not calls:
            continue
        _check_calls(name, calls, examples)
        module = modules[name]
        bias = module.bias is not None and bool(module.bias.requires_grad)
        groups = getattr(module, "groups", 1)
        slopes, reason = joined_slopes(name, calls)
        columns = tuple(call.gradients for call in calls)
        labels = tuple(call.label_gradient for call in calls)
        try:
            counts = counted(
                Geometry.of(module, bias), columns, labels, mask, partial(behind, calls)
            )
        except CaptureError as error:
            broken[name], counts = str(error), None
        for group in range(groups):
            captured[f"{name}:{group}" if groups > 1 else name] = LayerCapture(
                name=name,
                layer_type=type(module).__name__,
                geometry=Geometry.of(module, bias, group),
                raw_inputs=tuple(_matching(call.raw_input, call.gradients) for call in calls),
                raw_output_gradients=columns,
                raw_label_gradients=labels,
                raw_outputs=tuple(call.output for call in calls),
                slopes=slopes,
                without_slope=reason,
                counted=counts,
                fisher_type=fisher_type,
                term_scale=term_scale,
            )
    return captured


def _matching(raw: Tensor, gradients: Tensor) -> Tensor:
    return raw if raw.dtype == gradients.dtype else raw.to(gradients.dtype)


def _check_calls(name: str, calls: list[Call], examples: int) -> None:
    for index, call in enumerate(calls):
        if call.raw_input.ndim < 2 or call.raw_input.shape[0] != examples:
            raise CaptureError(
                f"call {index} of layer {name!r} received {tuple(call.raw_input.shape)}, but the "
                f"batch has {examples} examples and the first axis must be the example; keep "
                "[n, ..., features] instead of flattening positions into the batch"
            )
        if not all_finite(call.gradients):
            raise CaptureError(f"the gradient at the output of {name!r} has NaN or inf entries")
