"""From a tape to captures that are proven, and the reasons of what is left out."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from fisherlab.blocks.numerics import all_finite
from fisherlab.extract import dead
from fisherlab.extract.assemble import Form, Piece, capture_of, pieces, shared_biases
from fisherlab.extract.backward import pulled_back
from fisherlab.extract.geometry import CaptureError
from fisherlab.extract.layer import LayerCapture
from fisherlab.extract.padding import counted
from fisherlab.extract.proof import Weighted, call_tolerance, gradient_error, not_a_product
from fisherlab.extract.rows import SEVERAL, as_rows, find_examples, take
from fisherlab.extract.select import Weight
from fisherlab.extract.tape import Record, Recorded, joined_slopes

NO_GRAPH = "its output carries no graph (no_grad, inference_mode, or reentrant checkpointing)"
_RECURRENCE = "fused recurrence; fl.models' lstm is of Linear maps"


def collect(
    record: Record,
    weights: Mapping[str, Weight],
    outputs: Tensor,
    n: int,
    fisher_type: str,
    term_scale: float,
    check: str,
    examples: Tensor | None = None,
    mask: Tensor | None = None,
    left_out: Mapping[str, str] | None = None,
) -> tuple[dict[str, LayerCapture], dict[str, str]]:
    """Captures by name, and `{name: reason}` of the weights without one.

    Args:
        record: the tape of the pass, gradients included.
        weights: every parameter of the model by name.
        outputs: the model's outputs `[n, ...]`, with their graph; or the loss of the batch.
        n: the number of examples.
        fisher_type: of the columns on the record.
        term_scale: `c = M / Z` of the batch.
        check: "full", "gradient" or "off".
        examples: the example of every row, for calls with as many rows; None: rows are asked of
            autograd where they are not the examples.
        mask: the real positions `[n, ...]`; None where no padding is known.
        left_out: weights without a block by name, and why.
    """
    calls = {name: found for name, found in record.calls.items() if found}
    for name, found in calls.items():
        if not all(all_finite(call.gradients) for call in found):
            raise CaptureError(f"the gradient at the output of {name!r} has NaN or inf entries")
    proves = check != "off"
    leaves = [leaf for leaf in record.leaves() if id(leaf) not in record.gradients]
    if proves and leaves:
        record.keep(leaves, pulled_back(outputs, record.labels, leaves))
    weighted = None
    if outputs.ndim:
        doubtful = [call for call in record.every() if examples is not None or not call.own_rows]
        weighted = Weighted(outputs, record.labels, doubtful, fisher_type == "empirical")
    failures = shared_biases(calls)
    failures |= _find_rows(calls, outputs, n, weighted, examples, check == "full")
    failures |= record.unfit | dict(left_out or {})
    captured: dict[str, LayerCapture] = {}
    covered: set[int] = set()
    for name, found in calls.items():
        if name in failures:
            continue
        if not proves and record.tape.others.get(name):
            # an unproven product is not taken on trust
            failures[name] = _why(record, name)[0]
            continue
        form = Form.of(found)
        try:
            parts = [piece for call in found for piece in pieces(call, form, n)]
        except ValueError as why:
            failures[name] = str(why)
            continue
        kind = type(weights[name].module).__name__
        slopes, reason = _slopes(name, found, parts, n)
        layers = capture_of(
            name,
            kind,
            parts,
            form,
            lambda call: cast(Recorded, call).label_gradient,
            lambda call: cast(Recorded, call).gradients,
            slopes=slopes,
            without_slope=reason,
            fisher_type=fisher_type,
            term_scale=term_scale,
        )
        if proves and name not in record.proven:
            leaf = record.gradients[id(weights[name].tensor)]
            bias = None if form.bias is None else record.gradients[id(form.bias)]
            error = gradient_error(list(layers.values()), leaf, bias)
            if not error <= max(call_tolerance(call) for call in found):
                failures[name] = not_a_product(error, *_why(record, name))
                continue
        try:
            counts = _counted(next(iter(layers.values())), parts, mask, outputs, record.labels)
        except CaptureError as masked:
            failures[name] = str(masked)
            record.use_masked.append(name)
            continue
        captured |= {key: replace(layer, counted=counts) for key, layer in layers.items()}
        covered |= {id(weights[name].tensor), id(form.bias)}
    return captured, _skipped(record, weights, failures, covered)


def _counted(
    layer: LayerCapture,
    parts: Sequence[Piece],
    mask: Tensor | None,
    outputs: Tensor,
    labels: Tensor,
) -> Tensor | None:
    """The positions that count, `[n, t]` over all parts; None where all do."""
    if any(part.sums for part in parts):
        # sums and unit vectors have no positions
        return None

    def seen() -> list[Tensor]:
        calls = [cast(Recorded, part.call) for part in parts]
        edges, shapes = [call.edge for call in calls], [call.output.shape for call in calls]
        found = dead.behind(outputs, labels, edges, shapes)
        return [
            one if part.rows is None else take(one.flatten(), part.rows)
            for one, part in zip(found, parts, strict=True)
        ]

    maps = layer.maps or [layer.geometry] * len(parts)
    columns, rows = layer.raw_output_gradients, layer.raw_label_gradients
    assert columns is not None and rows is not None
    return counted(maps, columns, rows, mask, seen)


def coverage(
    weights: Mapping[str, Weight], captured: Mapping[str, LayerCapture]
) -> tuple[int, int]:
    """How many parameters are trained, and how many of them have a block."""
    made = {name: weight.parameters for name, weight in weights.items()}
    total = sum(
        p.numel()
        for name, weight in weights.items()
        for p in (made[name].values() or (weight.tensor,))
        if p.requires_grad
    )
    inside = sum(layer.shape[0] * layer.shape[1] for layer in captured.values())
    # a block of a computed weight is none of the parameters that it is computed of
    names = {layer.name for layer in captured.values()}
    inside -= sum(weights[name].tensor.numel() for name in names & set(made) if made[name])
    return total, min(total, inside)


def _find_rows(
    calls: Mapping[str, Sequence[Recorded]],
    outputs: Tensor,
    n: int,
    weighted: Weighted | None,
    examples: Tensor | None,
    proves: bool,
) -> dict[str, str]:
    """Set the examples of rows that are in another order than the batch's; why some have none.

    Unless it `proves`, as many rows as examples count as these where examples interact.
    """
    doubtful: list[tuple[str, Recorded]] = []
    failures: dict[str, str] = {}

    def folded(call: Recorded) -> bool:
        return len(call.output) != n or len(call.raw_input) != n

    for name, call in ((name, call) for name, found in calls.items() for call in found):
        rows = len(as_rows(call, call.output))
        if examples is not None and rows == len(examples):
            call.examples = examples.to(call.output.device)
            if proves and weighted is not None and not weighted.belong(call):
                failures[name] = f"with the given examples, {SEVERAL}"
        elif folded(call):
            doubtful.append((name, call))
        elif weighted is not None and not call.own_rows and not weighted.belong(call):
            doubtful.append((name, call))
    if examples is not None and not any(c.examples is not None for f in calls.values() for c in f):
        raise CaptureError(
            f"examples has {len(examples)} entries, and no layer has as many rows; pass one entry "
            "for each row of a layer's outputs"
        )
    if doubtful and not outputs.ndim:
        failures |= {name: f"{SEVERAL}; return the loss of every example" for name, _ in doubtful}
    elif doubtful:
        found = [call for _, call in doubtful]
        edges, shapes = [call.edge for call in found], [call.output.shape for call in found]
        reasons = find_examples(outputs, found, edges, shapes)
        failures |= {
            name: why
            for (name, call), why in zip(doubtful, reasons, strict=True)
            if why and (proves or folded(call))
        }
    return failures


def _slopes(
    name: str, calls: Sequence[Recorded], parts: Sequence[Piece], n: int
) -> tuple[Tensor, str]:
    plain = all(not piece.sums and piece.rows is None for piece in parts)
    if plain and all(call.slopes is not None for call in calls):
        return joined_slopes(name, calls)
    return torch.zeros(n, 2, dtype=torch.float64, device="cpu"), (
        f"layer {name!r} has no slope nu: it is no linear map of the examples' rows"
    )


def _why(record: Record, name: str) -> list[str]:
    others = record.tape.others.get(name)
    return [f"it is used by {', '.join(sorted(others))} as well"] if others else []


def _skipped(
    record: Record,
    weights: Mapping[str, Weight],
    failures: Mapping[str, str],
    covered: Collection[int],
) -> dict[str, str]:
    """The trainable weights without a block, with the reasons."""
    found: dict[str, str] = {}
    for name, weight in weights.items():
        if id(weight.tensor) in covered:
            for part in weight.parameters:
                found[part] = f"the weight of {name!r} is computed of it, and that has the block"
            continue
        if name not in record.calls and name not in failures:
            if not weight.tensor.requires_grad and weight.local == "weight":
                found[name] = "its weight is frozen"
            continue
        if weight.unfit:
            found[name] = weight.unfit
            continue
        others = record.tape.others.get(name)
        if isinstance(weight.module, nn.RNNBase | nn.RNNCellBase):
            found[name.rpartition(".")[0] or name] = _RECURRENCE
        elif name in failures:
            found[name] = failures[name]
        elif name in record.tape.without_graph:
            found[name] = NO_GRAPH
        elif others:
            asked = name in record.other_kinds
            because = "left out unless `layers` names it" if asked else "no product FisherLab knows"
            found[name] = f"it is used by {', '.join(sorted(others))}, {because}"
        elif name in record.tape.added:
            owner = record.tape.added[name]
            found[name] = f"it is a bias of {owner!r} and has no block of its own"
        else:
            found[name] = "not called in this forward pass"
    return found
