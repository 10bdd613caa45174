"""`compare`: every approximation x layer x damping against the exact block, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fisherlab import doors
from fisherlab.comparison.request import Candidates, checked
from fisherlab.comparison.run import Progress, measured
from fisherlab.comparison.table import Comparison
from fisherlab.comparison.turns import in_turns
from fisherlab.extract.api import Forward
from fisherlab.extract.select import Names


def compare(
    model: nn.Module,
    criterion: Callable[[Tensor, Tensor], Tensor] | None,
    x: object,
    y: Tensor | None = None,
    *,
    approximations: Candidates = None,
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
    progress: Progress | None = None,
    forward: Forward | None = None,
    alone: bool = False,
    mask: Tensor | str | None = None,
    loss_scale: str | None = None,
    layers_at_once: int | None = None,
) -> Comparison:
    """How well each approximation matches the exact Fisher block of every layer.

    `x, y` is one batch, or `x` a loader of batches (y None), which are one sample under one mean; a
    batch may be a dict with its labels inside, and `forward(model, x)` calls the model in its way.
    `approximations`: names or instances, or a dict name -> approximation, block or
    callable(layer) -> block; a dict layer -> block, as `opt.blocks()` hands out, is one
    preconditioner. Default: everything registered that one capture can build.
    `fisher_type`: default exact up to 20 outputs, else mc (empirical for a criterion without a
    known distribution). `dampings` are relative to `tr F / N` of each layer.
    `reference`: unseen examples `(x, y)` or a loader for the population error, or what to measure
    against on the same batch: a Fisher type, "ggn" (the exact type's block) or "hessian", the block
    of the loss's Hessian, against which errors, cosine and trace ratio are known.
    `memory` bounds, in bytes, the chunks that approximations are built of and the intermediates of
    a product (the exact block keeps its `a` and `g`); on a device that runs out of memory both are
    halved until they fit.

    `mask`: the real positions of one batch, or the name of an entry of dict batches, as in
    `capture`. `loss_scale`: a loss inside the model, criterion None, as in `capture`; of several
    batches the model returns the losses of all examples.

    `layers_at_once`: how many layers are captured together, by one more forward and backward pass
    for every so many; their inputs and output gradients are dropped before the next ones, so that
    memory does not grow with depth. `progress` is then called once per turn. Default: all.

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
    if layers_at_once is not None:
        layers_at_once = doors.count(layers_at_once, "layers_at_once")
    if progress is not None:
        doors.function(progress, "progress(layers)")
    request = checked(
        model,
        criterion,
        x,
        y,
        approximations=approximations,
        fisher_type=fisher_type,
        dampings=dampings,
        reference=reference,
        memory=memory,
        layers=layers,
        forward=forward,
        step=step,
        alone=alone,
        loss_scale=loss_scale,
        skip=skip,
        generator=generator,
        backend=backend,
        mc_samples=mc_samples,
        mask=mask,
    )
    if layers_at_once is None:
        return measured(request, request.samples(), progress)
    return in_turns(request, layers_at_once, progress)
