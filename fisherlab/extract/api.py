"""`capture`: one forward and R backward vectors to `{layer name: LayerCapture}`; and `support`."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fisherlab.distributed import Ranks, unwrapped
from fisherlab.extract import criteria, fisher
from fisherlab.extract.collect import collect, coverage
from fisherlab.extract.geometry import CaptureError
from fisherlab.extract.hooks import fill
from fisherlab.extract.isolation import isolated, random_state
from fisherlab.extract.layer import LayerCapture
from fisherlab.extract.outputs import output_of
from fisherlab.extract.padding import Masked, bare, mask_of, masks
from fisherlab.extract.proof import CHECKS
from fisherlab.extract.reentrant import reentrant_named
from fisherlab.extract.select import Names, check_batch, check_model, chosen, weights_of
from fisherlab.extract.tape import KINDS, Record, set_slopes

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
    # parameters that are trained, and those of them that have a block
    trained: int = 0
    covered: int = 0

    @property
    def share(self) -> float:
        """Of the trainable parameters, those that have a block."""
        return self.covered / self.trained if self.trained else 0.0

    def __str__(self) -> str:
        lines = [f"{self.share:.1%} of the trainable parameters have a block"]
        lines += [f"backend {self.backend}: {self.reason} ({self.seconds:.3f} s)"]
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
    layers: Names = None,
    skip: Names = None,
    kinds: Collection[str] = KINDS,
    examples: Tensor | None = None,
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

    `layers` and `skip` are names or patterns such as `"encoder.*"`. A layer that is named in full
    is captured or refused; any other is left out with its reason where it has no block.
    `kinds`: which products have a block, of "map" (linear maps, convolutions), "embedding" and
    "factors" (vectors of factors: normalisations and scales).
    `examples` `[rows]` gives the example of each row, for rows that are in another order than the
    batch's; None: autograd is asked (time-first sequences, windows, packed sequences).

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
    if isinstance(kinds, str) or not set(kinds) <= set(KINDS):
        raise CaptureError(f"kinds are some of {', '.join(KINDS)}; got {kinds!r}")
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

    def run() -> Tensor:
        return criteria.arranged(criterion, _forward(model, x, forward), y)

    start = time.perf_counter()
    backend, reason = _choose(backend, x if isinstance(x, Tensor) else y)
    # cached: one weight per parametrized layer, whose gradient can be asked for after the pass
    with (
        isolated(model, x),
        nn.utils.parametrize.cached(),
        reentrant_named(CaptureError),
    ):
        before = random_state(x)
        weights = weights_of(model)
        wanted, named = chosen(weights, layers, skip)
        record = Record({w.name: w.tensor for w in weights.values()}, wanted, kinds)

        def checked(outputs: Tensor) -> Tensor:
            return _check_outputs(outputs, criterion, y, ranks)

        def vectors(outputs: Tensor) -> Iterator[Tensor]:
            return fisher.output_vectors(
                fisher_type, criterion, outputs, y, mc_samples, generator, ranks
            )

        columns = None if fisher_type == "empirical" else vectors
        if backend == "backpack":
            from fisherlab.extract import backpack

            outputs = backpack.run(model, record, run, checked, columns)
        else:
            outputs = _by_tape(record, run, checked, columns)
        if check == "full" and not torch.equal(before, random_state(x)):
            _check_repeatable(run, outputs)
        scale = fisher.term_scale(criterion, outputs, y, ranks)
        captured, skipped = collect(
            record, weights, outputs, fisher_type, scale, check, examples, mask
        )
    for name in sorted(named):
        if name in skipped:
            raise CaptureError(f"layer {name!r}: {skipped[name]}")
    fits = mask is None or record.mask_fits or masks(criterion, outputs, captured.values())
    if mask is not None and captured and not fits:
        shapes = {layer.name: tuple(layer.raw_inputs[0].shape) for layer in captured.values()}
        raise CaptureError(
            f"mask of shape {tuple(mask.shape)} fits the positions of no layer (inputs {shapes}) "
            f"and not the outputs {tuple(outputs.shape)}"
        )
    if not captured:
        reasons = "; ".join(f"{name!r}: {why}" for name, why in skipped.items())
        raise CaptureError(
            "no layer of this model has a block: it has no trainable weight that a product uses"
            if not reasons
            else f"no layer of this model has a block: {reasons}"
        )
    seconds, counts = time.perf_counter() - start, coverage(weights, captured)
    report = Report(backend, reason, seconds, skipped, *counts)
    return Captures(captured, report, outputs.detach(), y)


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


def _by_tape(
    record: Record,
    forward: Callable[[], Tensor],
    check: Callable[[Tensor], Tensor],
    vectors: Callable[[Tensor], Iterator[Tensor]] | None,
) -> Tensor:
    with record.tape:
        outputs = forward()
    labels = record.labels = check(outputs)
    columns = None if vectors is None else partial(vectors, outputs.detach())
    if record.every():
        fill(outputs, record, labels, columns)
    record.check_inputs()
    set_slopes(outputs, [call for call in record.every() if call.is_map])
    return outputs
