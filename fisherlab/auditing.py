"""`audit`: the state of a running optimizer, measured as the approximation that it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fisherlab.comparison import Comparison, compare
from fisherlab.comparison.measurement import Candidate
from fisherlab.comparison.request import named_makers
from fisherlab.distributed import unwrapped
from fisherlab.optim.preconditioner import Preconditioner
from fisherlab.optim.readings import read


def audit(
    optimizer: torch.optim.Optimizer | Preconditioner,
    model: nn.Module,
    criterion: Callable[[Tensor, Tensor], Tensor] | None,
    x: object,
    y: Tensor | None = None,
    *,
    approximations: Any = (),
    **options: Any,
) -> Comparison:
    """The blocks that a running optimizer preconditions with, in the table of `compare`.

    There are two readings of a step `-lr P m` for torch's SGD, Adam(W), NAdam, RMSprop, Adagrad and
    Muon, and for `fl.optim.SOAP` and `fl.optim.Muon`: "AdamW root" is
    `P^{-1} = diag(sqrt(v_hat) + eps)`, "AdamW square" is `diag(v_hat)`, the second moment whose
    root it takes. For FisherLab's curvature optimizers and `Preconditioner` it is `opt.blocks()`.

    A second moment of batches' mean gradients is about `F / batch size`, and a root is no multiple
    of `F` at all. Errors and trace ratios take the numbers of a state as they stand. `cosine`,
    `scaled_error` (after the best scale), `diagonalisation` and `subspace_overlap` do not change
    with its scale. `config["readings"]` has each formula, `config["unread"]` the layers without a
    reading and why.

    The model is measured in evaluation mode. The training is as it was: parameters, gradients,
    buffers, modes, hooks, random streams and the state of the optimizer.

    Args:
        optimizer: an optimizer of the model that has taken a step.
        model: the model.
        criterion: the loss, as in `compare`.
        x: a batch or a loader, as in `compare`.
        y: its labels.
        approximations: further ones to stand beside, as in `compare`: names, instances, a dict.
        options: options of `compare`, such as `fisher_type`, `dampings`, `reference`, `layers`.

    Returns:
        A `Comparison`, with one name per reading.

    Raises:
        OptimizerError: the optimizer has no reading, or has taken no step.
        ValueError, CaptureError: what `compare` raises.
    """
    model = unwrapped(model)
    reading = read(optimizer, model)
    none = isinstance(approximations, list | tuple | dict | None) and not approximations
    others = {} if none else named_makers(approximations, model)
    taken = sorted(others.keys() & reading.blocks.keys())
    if taken:
        raise ValueError(f"an approximation is named as a reading of the optimizer: {taken}")
    every: dict[str, Candidate] = {**reading.blocks, **others}
    with evaluated(model):
        table = compare(model, criterion, x, y, approximations=every, **options)
    table.config["readings"], table.config["unread"] = reading.formulas, reading.missing
    return table


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; every flag is as it was afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    for module, _ in flags:
        module.training = False
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training
