"""`compare`: every approximation x layer x damping against the exact block, layer by layer."""

from __future__ import annotations

import math
import platform
import sys
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from copy import copy
from itertools import islice
from threading import Event
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from fisherlab import approximations as registry
from fisherlab.approximations import Approximation
from fisherlab.blocks import Block, BlockError, contractions
from fisherlab.comparison.crew import Crew, Rows, Work
from fisherlab.comparison.layer import Layer, Maker, by_layer
from fisherlab.comparison.table import COLUMNS, Comparison, Interrupted
from fisherlab.distributed import RankError, Ranks, unwrapped
from fisherlab.extract import Captures
from fisherlab.extract.api import Forward, _forward, split_batches
from fisherlab.extract.criteria import arranged, as_module, rules_of
from fisherlab.extract.fisher import FISHER_TYPES, default_type
from fisherlab.extract.inside import Inside, criterion_of
from fisherlab.extract.joint import shared_out
from fisherlab.extract.memory import captures_in_parts, check_memory
from fisherlab.extract.select import Names, check_batch, check_model
from fisherlab.extract.tape import KINDS


def compare(
    model: nn.Module,
    criterion: Callable[[Tensor, Tensor], Tensor] | None,
    x: object,
    y: Tensor | None = None,
    *,
    approximations: Mapping[str, Maker] | Iterable[str | Approximation] | None = None,
    fisher_type: str | None = None,
    dampings: Sequence[float] | float = (1e-3, 1e-1),
    reference: object = None,
    generator: torch.Generator | None = None,
    memory: int | None = None,
    layers: Names = None,
    skip: Names = None,
    backend: str = "auto",
    mc_samples: int = 1,
    step: int = 0,
    progress: Callable[[Sequence[Any]], Iterable[Any]] | None = None,
    forward: Forward | None = None,
    alone: bool = False,
    mask: Tensor | str | None = None,
    loss_scale: str | None = None,
) -> Comparison:
    """How well each approximation matches the exact Fisher block of every layer.

    `x, y` is one batch, or `x` a loader of batches (y None), which are one sample under one mean; a
    batch may be a dict with its labels inside, and `forward(model, x)` calls the model in its way.
    `approximations`: names or instances, or a dict name -> approximation, block or
    callable(layer) -> block; a dict layer -> block, as `opt.blocks()` hands out, is one
    preconditioner. Default: everything registered that one capture can build.
    `fisher_type`: default exact up to 20 outputs, else mc (empirical for a criterion without a
    known distribution). `dampings` are relative to `tr F / N` of each layer.
    `reference`: unseen examples `(x, y)` or a loader for the population error, or the name of a
    Fisher type to measure against on the same batch. `memory` bounds, in bytes, the chunks that
    approximations are built of and the intermediates of a product (the exact block keeps its `a`
    and `g`); on a device that runs out of memory both are halved until they fit.

    `mask`: the real positions of one batch, or the name of an entry of dict batches, as in
    `capture`. `loss_scale`: a loss inside the model, criterion None, as in `capture`; of several
    batches the model returns the losses of all examples.

    Under `torchrun` every rank calls it with its own shard, of any size (`alone`: this process by
    itself). The layers are shared out: a rank receives the other shards of its layers, their raw
    inputs and output gradients, and every rank returns the table of the joint batch.

    On a CPU with several threads heavy layers are measured side by side, unless `memory` is stated;
    the seconds of a row are then those of a share of the threads.

    `progress(layers)` iterates over the names of layers, each of which is measured then. Without
    it a notebook or a terminal shows a bar of one step per layer and method.

    Raises `CaptureError`, `BlockError` or `ValueError` before anything is computed for bad input;
    one that must refuse a layer is a row of NaN with the reason in `note`. Ctrl-C raises
    `Interrupted` with what was measured.
    """
    ranks = None if alone else Ranks.current()
    model = unwrapped(model)
    with ranks.together("checking its batch") if ranks else nullcontext():
        criterion = criterion_of(criterion, loss_scale)
        inside = isinstance(criterion, Inside)
        batches = split_batches(x, y, inside)
        check_model(model)
        for batch in batches:
            check_batch(*batch, model)
    if ranks:
        ranks.check_model(model)
        _check_counts(ranks, batches)
    shares = [dampings] if isinstance(dampings, int | float) else list(dampings)
    if not shares or any(not isinstance(d, int | float) or not 0 < d < math.inf for d in shares):
        raise ValueError(f"dampings are relative to tr F / N and positive, got {dampings!r}")
    if memory is not None and (not isinstance(memory, int) or memory < 1):
        raise ValueError(f"memory is a number of bytes, such as 800_000_000; got {memory!r}")
    makers = _makers(approximations, model)
    if not makers:
        raise ValueError(f"no approximation to compare; known: {', '.join(registry.names())}")
    asked = fisher_type is not None
    why_empirical = ""
    if fisher_type is None:
        fisher_type, why_empirical = _default_type(model, criterion, *batches[0], forward)
    if isinstance(reference, str) and reference not in FISHER_TYPES:
        raise ValueError(f"reference {reference!r} is none of {', '.join(FISHER_TYPES)}")
    if reference is not None and (
        isinstance(reference, Tensor) or not isinstance(reference, Iterable)
    ):
        kind = type(reference).__name__
        raise ValueError(f"reference is (x, y), a loader or a Fisher type, got {kind}")
    options: dict[str, Any] = {"backend": backend, "layers": layers, "mc_samples": mc_samples}
    options |= {"generator": generator, "forward": forward, "ranks": ranks, "mask": mask}
    # the approximations are of linear maps; others are compared where they are named
    options |= {"skip": skip, "kinds": ("map",) if layers is None else KINDS}
    if isinstance(mask, Tensor) and (
        len(batches) > 1 or not isinstance(reference, str | Captures | None)
    ):
        raise ValueError(
            "a mask tensor is that of one batch; for a loader or a reference pass dict batches and "
            "the name of their mask, such as mask='attention_mask'"
        )

    def captured(sample: list[tuple[object, Tensor]], kind: str) -> list[Captures]:
        parts = [
            captures_in_parts(
                model, criterion, b[0], None if inside else b[1], fisher_type=kind, **options
            )
            for b in sample
        ]
        found = [part for batch in parts for part in batch]
        if inside and len(found) > 1 and not found[0].outputs.ndim:
            raise ValueError(
                "the losses of several batches have no common mean as numbers; let the model "
                "return the loss of every example"
            )
        return found

    captures = captured(batches, fisher_type)
    target, unseen = captures, None
    if isinstance(reference, str):
        target = captured(batches, reference)
    elif isinstance(reference, Captures):
        unseen = [copy(reference)]  # ranks give parts of theirs away
    elif reference is not None:
        pair = reference if isinstance(reference, tuple) else (reference, None)
        others = split_batches(*pair) if not inside else split_batches(reference, None, True)
        _check_unseen(batches, others)
        unseen = captured(others, fisher_type)
    _check_blocks(makers, captures[0])
    check_memory(captures[0], memory)
    facts = {
        "fisher_type": fisher_type,
        "reference_fisher_type": reference if isinstance(reference, str) else fisher_type,
        "seed": generator.initial_seed() if generator else 0,
        "step": step,
    }
    names = list(by_layer(captures[0]))
    config = {
        **facts,
        "dampings": shares,
        "approximations": {k: repr(v) for k, v in makers.items()},
    }
    report = captures[0].report
    config |= {"backend": report.backend, "fisher_type_asked": asked}
    config["skipped"] = {k: v for batch in captures for k, v in batch.report.skipped.items()}
    config["parameters"] = {"trained": report.trained, "covered": report.covered}
    config |= {
        "model": type(model).__name__,
        "criterion": repr(criterion),
        "why_empirical": why_empirical,
        "mc_samples": mc_samples,
    }
    config |= versions() | {"ranks": ranks.size if ranks else 1}
    examples = len(captures[0].labels)
    # of all ranks, so that each comes to the same owners whatever its shard
    costs = _costs(captures[0], sum(ranks.objects(examples)) if ranks else examples)
    device = next(iter(captures[0].values())).device
    mine = names
    if ranks:
        owners = ranks.owners(costs)
        mine = [name for name in names if owners[name] == ranks.index]
        same = target is captures
        captures = [shared_out(batch, ranks, owners) for batch in captures]
        target = captures if same else [shared_out(batch, ranks, owners) for batch in target]
        unseen = unseen and [shared_out(batch, ranks, owners) for batch in unseen]

    def measure(name: str, stopped: Event) -> Work:
        layer = Layer(name, captures, target, unseen, memory)
        return (yield from layer.rows(makers, shares, facts, stopped))

    # a stated budget is that of one layer
    crew = Crew(measure, {name: costs[name] for name in mine}, device, memory is not None)
    # one piece of work per method, and a last one of what is found of all blocks at once
    each = len(makers) + 1
    steps = [f"{name}: {method}" for name in crew.order for method in [*makers, "condition"]]
    try:
        with (
            contractions.workspace(memory),
            ranks.together("measuring its layers") if ranks else nullcontext(),
            crew,
        ):
            work = crew.steps()
            for _ in progress(crew.order) if progress else notebook_bar(steps):
                deque(islice(work, each if progress else 1), 0)
    except KeyboardInterrupt:
        raise Interrupted(Comparison(_table(crew.found, names), config)) from None
    found = crew.found
    if ranks:
        found = {name: rows for part in ranks.objects(found) for name, rows in part.items()}
    return Comparison(_table(found, names), config)


def _table(found: Mapping[str, Rows], names: Sequence[str]) -> pd.DataFrame:
    """The rows, by layer in the order of the model."""
    return pd.DataFrame([row for name in names for row in found.get(name, [])], columns=COLUMNS)


def notebook_bar(steps: Sequence[str]) -> Iterable[str]:
    """A bar over layers and methods in a notebook or on a terminal; nothing elsewhere."""
    shell = sys.modules.get("IPython")
    notebook = shell is not None and getattr(shell.get_ipython(), "kernel", None) is not None
    if not notebook and not sys.stderr.isatty():
        return steps
    from tqdm.auto import tqdm

    return tqdm(steps, desc="layers and methods", leave=False)


def default_fisher_type(
    model: nn.Module,
    criterion: Callable,
    x: object,
    forward: Forward | None = None,
    y: Tensor | None = None,
) -> str:
    """exact up to 20 output elements per example, else mc; empirical for an unknown criterion.

    NLLLoss is cross entropy where the outputs are log-probabilities, else unknown. The labels `y`
    tell where the classes are in the outputs, axis 1 or the last.
    """
    return _default_type(model, criterion, x, y, forward)[0]


def _default_type(
    model: nn.Module, criterion: Callable, x: object, y: Tensor | None, forward: Forward | None
) -> tuple[str, str]:
    """The default Fisher type, and why it is the empirical one."""
    criterion = as_module(criterion)
    if rules_of(criterion) is None:  # no forward pass is needed to know
        return default_type(criterion, torch.empty(0))
    with torch.no_grad():
        outputs = _forward(model, x, forward)
        return default_type(criterion, outputs if y is None else arranged(criterion, outputs, y))


def versions() -> dict[str, str]:
    """The versions a measurement depends on."""
    import fisherlab

    return {
        "fisherlab": fisherlab.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _check_counts(ranks: Ranks, batches: list[tuple[object, Tensor]]) -> None:
    """Batch k of the joint sample is batch k of every rank."""
    counts = ranks.objects(len(batches))
    if len(set(counts)) > 1:
        raise RankError(
            f"the ranks' loaders have {counts} batches; give each rank the same number (batches "
            "may differ in size)"
        )


def _costs(captures: Captures, examples: int) -> dict[str, float]:
    """Multiplications that measuring each layer takes, roughly: one pass, the eigenvectors."""
    costs: dict[str, float] = {}
    for layer in captures.values():
        o, i = layer.shape
        columns = examples * layer.columns_per_example * layer.positions
        span = min(i, examples * layer.positions)
        cost = columns * o * i + 10 * (span**2 * i + o**3)
        costs[layer.name] = costs.get(layer.name, 0.0) + cost
    return costs


def _makers(
    approximations: Mapping[str, Maker] | Iterable[str | Approximation] | None, model: nn.Module
) -> dict[str, Maker]:
    if approximations is None:
        return {name: registry.get(name)() for name in registry.of_one_batch()}
    if isinstance(approximations, Mapping):
        blocks = {k: v for k, v in approximations.items() if isinstance(v, Block)}
        layers = {name for name, _ in model.named_modules()}
        if len(blocks) == len(approximations) and any(k.split(":")[0] in layers for k in blocks):
            return {"preconditioner": blocks}
        return dict(approximations)
    if isinstance(approximations, str):
        approximations = [approximations]
    makers: dict[str, Maker] = {}
    for item in approximations:
        maker = registry.get(item)() if isinstance(item, str) else item
        if not isinstance(maker, Approximation):
            raise ValueError(f"{item!r} is neither a name nor an approximation; name it in a dict")
        name = maker.name or type(maker).__name__
        if maker not in makers.values():
            makers[name if name not in makers else repr(maker)] = maker
    return makers


def _check_unseen(
    batches: list[tuple[object, Tensor]], reference: list[tuple[object, Tensor]]
) -> None:
    """Refuse the batch itself as its unseen examples: it would flatter every approximation."""
    for x, _ in batches:
        for other, _ in reference:
            if x is other or (
                isinstance(x, Tensor)
                and isinstance(other, Tensor)
                and (x.shape, x.dtype, x.device) == (other.shape, other.dtype, other.device)
                and torch.equal(x, other)
            ):
                raise ValueError(
                    "reference holds the very batch that the approximations are made of, whose "
                    "error is relative_error; pass examples that they have not seen"
                )


def _check_blocks(makers: dict[str, Maker], captures: Captures) -> None:
    """A dict of blocks must name layers of this model; a block must fit one of them."""
    layers = by_layer(captures)
    known = set(captures) | set(layers)
    for name, maker in makers.items():
        if isinstance(maker, Mapping) and not set(maker) & known:
            raise ValueError(
                f"the blocks of {name!r} are named {sorted(maker)}, the layers {sorted(known)}"
            )
        if isinstance(maker, Block) and maker.shape not in {c.shape for c in captures.values()}:
            raise BlockError(f"block {name!r} of shape {maker.shape} fits no layer of this model")
