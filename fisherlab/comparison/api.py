"""`compare`: every approximation x layer x damping against the exact block, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fisherlab import doors
from fisherlab.casting import uncast
from fisherlab.comparison.request import Candidates, checked
from fisherlab.comparison.run import Progress, measured
from fisherlab.comparison.table import Comparison
from fisherlab.comparison.turns import in_turns
from fisherlab.distributed import answering
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
    """`||X - F|| / ||F||` of every approximation `X` and exact Fisher block `F`, layer by layer.

    Under `torchrun` every rank calls it with its own shard, of any size. The layers are shared out
    over the ranks: each rank receives the other shards of its layers. Every rank returns the table
    of the joint batch.

    On a CPU with several threads, expensive layers are measured in parallel unless `memory` is
    given. The seconds of a row then refer to a share of the threads. If a method must refuse a
    layer, its row is NaN with the reason in `note`.

    Args:
        model: the model, in the mode to be measured; it comes back untouched.
        criterion: a loss with `reduction` "mean" or "sum"; None for a loss inside the model
            (`loss_scale`).
        x: one batch of inputs `[n, ...]`, a dict with labels inside, or a loader of batches, which
            count as one sample.
        y: the labels of one batch; None for a loader or a dict.
        approximations: names or instances, or a dict from name to approximation, block or
            callable(layer) -> block. A dict layer -> block, such as `opt.blocks()`, is one
            preconditioner. None: all registered methods that one capture can build.
        fisher_type: "exact", "mc" or "empirical". None: exact up to 20 outputs, else mc; empirical
            if the criterion has no known distribution.
        dampings: lambda relative to the mean eigenvalue `tr F / N` of each layer.
        reference: held-out examples `(x, y)` or a loader, for the population error; or another
            block of the same batch: a Fisher type, "ggn" (the exact type), or "hessian". Errors,
            cosine and trace ratio are known against the Hessian.
        generator: draws the labels of "mc"; None: a fresh one seeded with 0.
        memory: bytes for the chunks that build approximations and for the intermediates of a
            product; the exact block keeps its `a` and `g` besides. If a device runs out of memory,
            both are halved until they fit.
        layers: names or patterns such as "encoder.*"; None: all layers with a block.
        skip: names or patterns of layers to leave out.
        backend: "auto", "hooks" or "backpack".
        mc_samples: draws per example for "mc".
        step: the training step that the table records.
        progress: `progress(layers)` iterates over names of layers; each is measured when its name
            is taken. None: a bar in a notebook or terminal.
        forward: `forward(model, x)` makes the outputs; None: `model(x)`.
        alone: whether this process ignores the other ranks.
        mask: the real positions of one batch `[n, positions]`, or the name of an entry of dict
            batches; see `capture`.
        loss_scale: "mean" or "sum" of a loss inside the model; see `capture`. For several batches
            the model returns the losses `[n]` of the examples.
        layers_at_once: layers captured together, by one more forward and backward pass for each
            such group. Memory then does not grow with depth, and `progress` is called once per
            group. None: all.

    Returns:
        A `Comparison`, one row per layer, approximation and damping.

    Raises:
        CaptureError: the model, criterion or batch has no capture; nothing is computed.
        BlockError: an approximation given as a block does not fit its layer.
        ValueError: an argument is out of its range; nothing is computed.
        Interrupted: Ctrl-C was pressed; the exception holds the layers measured before it.

    Example:
        >>> import torch, fisherlab as fl
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> table = fl.compare(model, nn.CrossEntropyLoss(), x, y, approximations=["kfac", "exact"],
        ...                    dampings=0.1, layers="0")
        >>> table.frame[["layer", "approximation"]].values.tolist()
        [['0', 'kfac'], ['0', 'exact']]
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
        layers_at_once=layers_at_once,
        skip=skip,
        generator=generator,
        backend=backend,
        mc_samples=mc_samples,
        mask=mask,
    )
    with answering(request.ranks, "comparing"), uncast():
        if layers_at_once is None:
            return measured(request, request.samples(), progress)
        return in_turns(request, layers_at_once, progress)
