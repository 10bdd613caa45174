"""`capture`: one forward and R backward vectors to `{layer name: LayerCapture}`; and `support`."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fisherlab import doors, extras
from fisherlab.casting import as_cast
from fisherlab.distributed import Ranks, unwrapped
from fisherlab.extract import criteria, fisher
from fisherlab.extract.broadcast import spread
from fisherlab.extract.collect import collect, coverage
from fisherlab.extract.geometry import CaptureError, NoBlock
from fisherlab.extract.graph import read
from fisherlab.extract.hooks import fill
from fisherlab.extract.inside import Inside, criterion_of
from fisherlab.extract.isolation import (
    buffers_kept,
    copied,
    floated,
    in_float32,
    is_half,
    isolated,
    kept_by_autograd,
    streams_kept,
)
from fisherlab.extract.layer import LayerCapture
from fisherlab.extract.no_gradient import no_gradient_named
from fisherlab.extract.outputs import loss_of, output_of
from fisherlab.extract.padding import Masked, bare, mask_of, masks
from fisherlab.extract.proof import CHECKS
from fisherlab.extract.select import (
    Names,
    check_batch,
    check_dtypes,
    check_model,
    chosen,
    on_tape,
    tensors_of,
    weights_of,
)
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
        """The share of the trainable parameters that have a block."""
        return self.covered / self.trained if self.trained else 0.0

    def __str__(self) -> str:
        lines = [f"{self.share:.1%} of the trainable parameters have a block"]
        lines += [f"backend {self.backend}: {self.reason} ({self.seconds:.3f} s)"]
        return "\n".join(lines + [f"  {name}: {why}" for name, why in self.skipped.items()])


class Captures(dict[str, LayerCapture]):
    """`{layer name: LayerCapture}`, with the outputs, labels and `report` of the pass.

    Args:
        layers: captures by layer name.
        report: the backend, and the layers without a block.
        outputs: the model's outputs, classes in axis 1.
        labels: the labels of the batch.
    """

    def __init__(
        self, layers: dict[str, LayerCapture], report: Report, outputs: Tensor, labels: Tensor
    ) -> None:
        doors.instance(layers, "layers", Mapping, "a dict of layer name -> LayerCapture")
        for name, layer in layers.items():
            doors.instance(layer, f"layers[{name!r}]", LayerCapture, "that of fl.capture")
        doors.instance(report, "report", Report, "that of fl.capture")
        for part, what in ((outputs, "outputs"), (labels, "labels")):
            doors.instance(part, what, Tensor, "a tensor")
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
    criterion: Callable[[Tensor, Tensor], Tensor] | None,
    x: object,
    y: Tensor | None = None,
    *,
    fisher_type: str | None = None,
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
    loss_scale: str | None = None,
) -> Captures:
    """`F = (1/M) sum_{m,n} vec(D) vec(D)^T`, `D = sum_t g[m,n,t] a[n,t]^T`: a and g of every layer.

    The model comes back untouched: no hooks, and `.grad`, buffers, mode and global random streams
    are as they were. A convolution with groups gives one capture per group, `name:0`, `name:1`, ...

    `check` proves the capture from the graph where the graph states it, without arithmetic.
    Elsewhere autograd forms the gradients, as a training step does, and weighted loss terms go back
    once more. A layer that fails is left out, with its reason in `report.skipped`.

    Classes are axis 1 of the outputs, or the last axis if the shape of the class indices shows it.
    The captured `outputs` have classes in axis 1.

    Trainable weights of half precision are captured in float32: the pass runs with float32 copies
    of all half-precision tensors. If a model does not run in float32, these weights have no block.

    Args:
        model: the model, in the mode to be captured.
        criterion: a loss with `reduction` "mean" or "sum"; `register_criterion` adds your own. None
            for a loss inside the model (`loss_scale`).
        x: a tensor `[n, ...]`, or a tuple or dict of the model's arguments.
        y: the labels; None if `x` is a pair `(x, y)` or a dict that holds them under "labels".
        fisher_type: "exact" (a root of the loss Hessian), "mc" (labels drawn from the model) or
            "empirical" (the observed labels). None: "exact", or "empirical" with `loss_scale`.
        backend: "auto", "hooks" or "backpack".
        mc_samples: draws per example for "mc".
        generator: draws the labels of "mc"; None: a fresh one seeded with 0.
        layers: names or patterns such as "encoder.*". A layer named in full is captured or refused;
            any other without a block is left out with its reason.
        skip: names or patterns of layers to leave out.
        kinds: products that have a block: "map" (linear maps, convolutions), "embedding" and
            "factors". Factors are multiplied or added element by element: normalisations, scales,
            positions, and biases outside the blocks of maps.
        examples: `[rows]`, the example of each row, for rows in another order than the batch. None:
            autograd is asked (time-first sequences, windows, packed sequences).
        forward: `forward(model, x)` makes the outputs; None: `model(x)`.
        ranks: the processes that hold the other shards of this batch. They capture together; each
            gets its own rows of the capture that a single process would make.
        check: "full": each row belongs to its example, and `sum g a^T` is autograd's gradient of
            weight and bias. "gradient": the second only. "off": neither. "full" refuses a model
            whose outputs change from one forward pass to the next.
        mask: `[n, positions]`, True for real, or the name of an entry of a dict batch. Padding is
            left out of the loss and of means over positions, in every layer with these axes. A
            layer that gives masked positions a gradient is left out: the model uses them. Positions
            of a Linear without any gradient are left out of these means anyway.
        loss_scale: "mean" or "sum" states how a loss inside the model combines the losses of its
            examples. `criterion` is then None, `x` the whole batch with its labels, and
            `forward(model, x)` the loss or the losses `[n]` (default: `.loss`). The Fisher is the
            empirical one; `check="full"` proves the statement on halves of the batch.

    Returns:
        `Captures`, a dict from layer name to `LayerCapture` with the outputs, labels and `report`.

    Raises:
        CaptureError: a layer, tensor or criterion cannot be captured; the message names it and says
            why.

    Example:
        >>> import torch, fisherlab as fl
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        >>> captures = fl.capture(model, nn.CrossEntropyLoss(), torch.randn(16, 4),
        ...                       torch.randint(3, (16,)), fisher_type="exact")
        >>> {name: tuple(layer.inputs.shape) for name, layer in captures.items()}
        {'0': (16, 1, 5), '2': (16, 1, 9)}
    """
    criterion = criterion_of(criterion, loss_scale)
    inside = isinstance(criterion, Inside)
    _check_kinds(kinds, examples, forward, ranks)
    fisher_type = _asked(fisher_type, inside)
    _check_options(fisher_type, backend, check, generator)
    mc_samples = fisher.check_draws(mc_samples)
    if inside and (fisher_type != "empirical" or backend == "backpack" or mask is not None):
        raise CaptureError(
            "a loss inside the model has the empirical Fisher of the hooks backend without a mask "
            "alone: its distribution is not known; pass a criterion for more"
        )
    criterion = fisher.as_module(criterion)
    fisher.reduction_of(criterion)
    x, labels = split_batch(x, y, inside)
    model = unwrapped(model)
    check_model(model)
    check_batch(x, labels, model)
    examples = _of_batch(examples, len(labels))
    mask = mask_of(mask, x, labels)
    if mask is not None:
        criterion = Masked(criterion, mask)

    def returned(x: object) -> Tensor:
        return _forward(model, x, forward, loss_of if inside else output_of)

    def run() -> Tensor:
        outputs = returned(x)
        return criteria.arranged(
            criterion, outputs.float() if is_half(outputs) else outputs, labels
        )

    start = time.perf_counter()
    backend, reason = _choose(backend, x if isinstance(x, Tensor) else labels)
    with (
        isolated(model, x, bare(criterion)) as isolation,
        no_gradient_named(CaptureError),
        ExitStack() as stack,
    ):
        weights = weights_of(model)
        wanted, named = chosen(weights, layers, skip)
        half = [name for name in wanted if is_half(weights[name].tensor)]
        left_out: dict[str, str] = {}
        if half:
            kind, loss = weights[half[0]].tensor.dtype, bare(criterion)
            why = _float32(stack, model, loss, returned, x)
            if why:
                why = f"its weight is {kind}, and the model does not run in float32: {why}"
                left_out = dict.fromkeys(half, why)
                wanted = [name for name in wanted if name not in left_out]
            else:
                x, labels = floated(x), floated(labels)
                reason = f"{reason}; {kind} weights as float32"
        # cached: one weight per parametrized layer, whose gradient can be asked for after the pass
        stack.enter_context(nn.utils.parametrize.cached())
        before = isolation.draws() if check == "full" else None
        weights = weights_of(model)
        record = Record(on_tape(weights), wanted, kinds)

        def checked(outputs: Tensor) -> Tensor:
            if wanted and not outputs.requires_grad:
                raise CaptureError(_without_graph(record))
            if isinstance(criterion, Inside):
                return criterion.gradient(outputs, len(labels), ranks)
            return _check_outputs(outputs, criterion, labels, ranks)

        def vectors(outputs: Tensor) -> Iterator[Tensor]:
            return fisher.output_vectors(
                fisher_type, criterion, outputs, labels, mc_samples, generator, ranks
            )

        columns = None if fisher_type == "empirical" else vectors
        if backend == "backpack":
            with extras.named():
                from fisherlab.extract import backpack
            outputs = backpack.run(model, record, run, checked, columns)
        else:
            outputs = _by_tape(record, run, checked, columns, len(labels), check != "off")
        if before is not None and before != isolation.draws():
            _check_repeatable(run, outputs)
        if isinstance(criterion, Inside):
            scale = 1.0
            if check == "full" and not outputs.ndim:
                empty = partial(Record, on_tape(weights), wanted, kinds)
                left_out |= criterion.prove(record, empty, returned, x, len(labels))
        else:
            scale = fisher.term_scale(criterion, outputs, labels, ranks)
        captured, skipped = collect(
            record,
            weights,
            outputs,
            len(labels),
            fisher_type,
            scale,
            check,
            examples,
            mask,
            left_out,
        )
    found = captured.values(), bool(record.use_masked)
    fits = mask is None or masks(criterion, outputs, *found)
    _check_captured(captured, skipped, named, outputs, None if fits else mask, record.use_masked)
    seconds, counts = time.perf_counter() - start, coverage(weights, captured)
    report = Report(backend, reason, seconds, skipped, *counts)
    return Captures(captured, report, outputs.detach(), labels)


def _asked(fisher_type: str | None, inside: bool) -> str:
    """The Fisher type, by default the only one of a loss inside the model, else the exact one."""
    if fisher_type is None:
        return "empirical" if inside else "exact"
    return fisher_type


def _check_options(fisher_type: str, backend: str, check: str, generator: object) -> None:
    """Refuse an option that is none of its choices."""
    choices = {
        "fisher_type": (fisher_type, fisher.FISHER_TYPES),
        "backend": (backend, BACKENDS),
        "check": (check, CHECKS),
    }
    for option, (value, known) in choices.items():
        doors.choice(value, option, known, error=CaptureError)
    check_generator(generator)


def check_generator(generator: object) -> None:
    """Refuse what draws no labels."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise CaptureError(
            f"generator is {doors.said(generator)}; pass torch.Generator().manual_seed(...) or None"
        )


def _check_kinds(kinds: object, examples: object, forward: object, ranks: object) -> None:
    """Refuse options that are of another type than theirs."""
    if isinstance(kinds, str) or not isinstance(kinds, Collection):
        found = None
    else:
        found = doors.items(kinds, "kinds", error=CaptureError)
    if found is None or any(not isinstance(kind, str) or kind not in KINDS for kind in found):
        raise CaptureError(f"kinds are some of {', '.join(KINDS)}; got {doors.said(kinds)}")
    if examples is not None and not (
        isinstance(examples, Tensor) and doors.is_index(examples) and examples.ndim == 1
    ):
        raise CaptureError(
            "examples is a tensor [rows] of the example of each row, whole numbers; got "
            f"{doors.said(examples)}"
        )
    check_forward(forward)
    if ranks is not None and not isinstance(ranks, Ranks):
        raise CaptureError(
            f"ranks is a fisherlab.distributed.Ranks or None, got {doors.said(ranks)}"
        )


def _of_batch(examples: Tensor | None, n: int) -> Tensor | None:
    """The example of each row, each one of `n`."""
    if examples is None:
        return None
    examples = examples.long()
    if not bool(((examples >= -1) & (examples < n)).all()):
        raise CaptureError(
            f"examples run from {int(examples.min())} to {int(examples.max())}, and the batch has "
            f"those from 0 to {n - 1}; -1 is a row of none"
        )
    return examples


def check_forward(forward: object) -> None:
    """Refuse what cannot be called as `forward(model, x)`."""
    if forward is not None:
        doors.function(forward, "forward(model, x)", error=CaptureError)


def _check_captured(
    captured: Mapping[str, LayerCapture],
    skipped: Mapping[str, str],
    named: Collection[str],
    outputs: Tensor,
    unfit: Tensor | None,
    use_masked: Collection[str],
) -> None:
    """Refuse a layer that was named and has no block, a mask that fits nothing, no layer at all."""
    for name in sorted(named):
        if name in skipped:
            raise CaptureError(f"layer {name!r}: {skipped[name]}")
    if unfit is not None and captured:
        shapes = {layer.name: tuple(layer.raw_inputs[0].shape) for layer in captured.values()}
        gradient = ", ".join(map(repr, use_masked))
        raise CaptureError(
            f"mask of shape {tuple(unfit.shape)} fits the positions of no layer (inputs {shapes}) "
            f"and not the outputs {tuple(outputs.shape)}"
            + (f"; where it fits, masked positions have a gradient ({gradient})" * bool(gradient))
        )
    if captured:
        return
    raise NoBlock(skipped)


def _choose(backend: str, tensor: Tensor) -> tuple[str, str]:
    if backend != "auto":
        return backend, "asked for"
    device = tensor.device.type
    return "hooks", MEASURED.get(device, f"the default: BackPACK has not been measured on {device}")


def split_batch(x: object, y: Tensor | None = None, inside: bool = False) -> tuple[object, Tensor]:
    """The model's arguments and the labels of a batch `(x, y)` or a dict with its labels inside.

    Args:
        x: the batch.
        y: the labels, or None where `x` holds them.
        inside: whether the model computes the loss: it takes the whole batch, and the labels
            returned are `[n, 0]`.
    """
    if inside:
        return x, _no_labels(x, y)
    if y is not None:
        return x, kept_by_autograd(y)
    if isinstance(x, Mapping):
        key = next((name for name in LABELS if name in x), None)
        if key is None:
            raise CaptureError(
                f"a dict batch needs its labels under one of {', '.join(LABELS)}; got {list(x)}: "
                "pass them as y"
            )
        return {name: value for name, value in x.items() if name != key}, kept_by_autograd(x[key])
    if isinstance(x, tuple | list) and _is_pair(x):
        return x[0], kept_by_autograd(x[1])
    loader = (
        ""
        if isinstance(x, Tensor | str) or not hasattr(x, "__len__")
        else ("; of a data set or a loader pass one batch, or fl.compare the loader")
    )
    raise CaptureError(
        "labels are missing: pass y, a pair (x, y) or a dict with 'labels'; got "
        f"{type(x).__name__}{loader}"
    )


def _is_pair(x: tuple[Any, ...] | list[Any]) -> bool:
    """Whether two things are inputs and labels, right or wrong in type; not two batches."""
    if len(x) != 2:
        return False
    labels = x[1]
    numbers = isinstance(labels, list) and bool(labels) and isinstance(labels[0], int | float)
    return isinstance(labels, Tensor) or hasattr(labels, "__array__") or numbers


def _no_labels(x: object, y: Tensor | None) -> Tensor:
    if y is not None:
        raise CaptureError("with loss_scale the labels are the model's: leave y out, put them in x")
    given = tensors_of(x)
    if isinstance(x, Mapping):
        given = [(x[key], key) for key in LABELS if isinstance(x.get(key), Tensor)] + given
    given = [(tensor, role) for tensor, role in given if tensor.ndim]
    if not given:
        raise CaptureError("x holds no tensor of examples")
    return given[0][0].new_empty((len(given[0][0]), 0))


def split_batches(
    x: object, y: Tensor | None = None, inside: bool = False
) -> list[tuple[object, Tensor]]:
    """One batch, given in any way that `split_batch` takes, or all of a loader."""
    pair = isinstance(x, tuple | list) and _is_pair(x)
    if y is not None or isinstance(x, Mapping) or pair:
        return [split_batch(x, y, inside)]
    if isinstance(x, Tensor) or not isinstance(x, Iterable):
        raise ValueError(
            "pass labels y, or a loader of (x, y) batches as x, such as "
            f"torch.utils.data.DataLoader(data, 128); got {type(x).__name__}"
        )
    with streams_kept():  # a loader draws its order, and a number for its workers
        batches = [split_batch(batch, None, inside) for batch in x]
    if not batches:
        raise CaptureError("the loader is empty")
    return batches


def call(model: nn.Module, x: object, forward: Forward | None = None) -> Any:
    """The model's own result for a batch of its arguments, into which it may write: it has a copy.

    Raises:
        CaptureError: for arguments that the model does not take, in number, name or dtype.
    """
    x = copied(x)
    args: tuple[Any, ...] = tuple(x) if isinstance(x, tuple | list) else (x,)
    names = dict(x) if isinstance(x, Mapping) else {}
    try:
        with as_cast():
            if forward is not None:
                return forward(model, x)
            return model(**names) if isinstance(x, Mapping) else model(*args)
    except (TypeError, RuntimeError) as error:
        check_dtypes(x, model)
        if forward is None:
            _check_arguments(model, () if isinstance(x, Mapping) else args, names, error)
            if isinstance(error, TypeError) and not tensors_of(x):
                raise CaptureError(
                    f"the model does not take {doors.said(x)}: {error}; x is a tensor, or a tuple "
                    "or dict of the model's arguments"
                ) from error
        raise


def _check_arguments(
    model: nn.Module, args: tuple[Any, ...], names: dict[Any, Any], error: Exception
) -> None:
    try:
        inspect.signature(model.forward).bind(*args, **names)
    except TypeError:
        given = f"the arguments {sorted(names)}" if names else f"{len(args)} arguments"
        stack = "" if names else ", or torch.stack(x) for a list of examples"
        raise CaptureError(
            f"the model does not take {given} that x holds: {error}; pass "
            f"forward=lambda model, x: ...{stack}"
        ) from error
    except ValueError:  # no signature is known
        return


def _forward(
    model: nn.Module,
    x: object,
    forward: Forward | None = None,
    of: Callable[[Any], Any] = output_of,
) -> Tensor:
    check_forward(forward)
    outputs = of(call(model, x, forward))
    if not isinstance(outputs, Tensor):
        who = "the model" if forward is None else "forward"
        raise CaptureError(
            f"{who} returned {type(outputs).__name__}; FisherLab needs one tensor of outputs (or "
            "`.logits`): wrap the model, or pass forward=lambda model, x: model(x)[0]"
        )
    if outputs.is_nested or outputs.is_quantized or outputs.layout != torch.strided:
        raise CaptureError(f"the outputs are {doors.said(outputs)}; return a dense tensor")
    if outputs.is_complex():
        raise CaptureError(
            f"the outputs are {outputs.dtype}; return real ones, such as outputs.abs()"
        )
    return outputs


def _float32(
    stack: ExitStack,
    model: nn.Module,
    criterion: object,
    returned: Callable[[object], Tensor],
    x: object,
) -> str:
    """Make half-precision tensors, class weights too, float32; why it does not run so, or ""."""
    with ExitStack() as trial:
        trial.enter_context(in_float32(model, criterion))
        try:
            # the pass that counts starts from the same buffers and draws
            with buffers_kept(model), streams_kept(), torch.no_grad():
                returned(floated(x))
        except RuntimeError as error:
            return str(error).partition("\n")[0]
        stack.push(trial.pop_all())
    return ""


def _without_graph(record: Record) -> str:
    """Why the outputs have no graph though something is to be captured."""
    inside = sorted(record.tape.without_graph)
    return (
        "the outputs carry no graph: forward detaches them, runs under torch.no_grad() or "
        "inference_mode(), or uses no trainable weight; no gradient can be sent back"
        + (f" (without a graph: {', '.join(inside)})" if inside else "")
    )


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


def _check_outputs(
    outputs: Tensor, criterion: Callable[..., Any], y: Tensor, ranks: Ranks | None
) -> Tensor:
    """The gradient of the per-example loss at the observed labels, after every check of it."""
    if not torch.isfinite(outputs).all():
        raise CaptureError("the model's outputs have NaN or inf entries; check its weights")
    if not outputs.ndim:
        raise CaptureError(
            "the model returned one number, its loss; pass the criterion's inputs by forward=, "
            "such as lambda model, x: model(**x).logits, or None as criterion and "
            "loss_scale='mean' or 'sum'"
        )
    if outputs.shape[0] != y.shape[0]:
        raise CaptureError(
            f"the model returned {outputs.shape[0]} rows for {y.shape[0]} labels; the first axis "
            "of outputs and labels is the example: reshape them (outputs by forward=)"
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
    examples: int,
    proves: bool,
) -> Tensor:
    """The outputs; their gradients are left on the record, with the parameters' if it `proves`."""
    with record.tape:
        outputs = forward()
    labels = record.labels = check(outputs)
    if outputs.ndim and outputs.requires_grad:
        spread(outputs, record.every(), len(outputs))
        read(outputs, record, examples)
    columns = None if vectors is None else partial(vectors, outputs.detach())
    if record.every():
        fill(outputs, record, labels, columns, proves)
    record.check_inputs()
    set_slopes(outputs, [call for call in record.every() if call.is_map])
    return outputs
