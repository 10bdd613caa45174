"""Capture from hooks and autograd: for any model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fisherlab.extract.backward import pulled_back, widened
from fisherlab.extract.proof import call_tolerance
from fisherlab.extract.tape import Record, Recorded


def send_backwards(outputs: Tensor, record: Record, vector: Tensor) -> list[Tensor]:
    """`J^T v` at the output of every recorded call, zeros where the outputs do not depend on it.

    Only as far as layer outputs: no parameter gradient is formed and `.grad` is not touched.
    """
    calls = record.every()
    return _dense(pulled_back(outputs, vector, [call.edge for call in calls]), calls)


def _dense(gradients: Sequence[Tensor | None], calls: Sequence[Recorded]) -> list[Tensor]:
    return [
        widened(torch.zeros_like(call.output) if gradient is None else gradient)
        for call, gradient in zip(calls, gradients, strict=True)
    ]


def fill(
    outputs: Tensor,
    record: Record,
    labels: Tensor,
    vectors: Callable[[], Iterator[Tensor]] | None,
    parameters: bool = False,
) -> None:
    """Send the loss gradient and every output vector backwards; leave the results on the calls.

    `vectors` None: the loss gradient is the only column (the empirical Fisher). With `parameters`
    the loss gradients of weights and biases are left on the record, of the same backward pass.
    """
    calls, leaves = record.every(), record.leaves() if parameters else []
    found = pulled_back(outputs, labels, [*(call.edge for call in calls), *leaves])
    record.keep(leaves, found[len(calls) :])
    for call, gradient in zip(calls, _dense(found[: len(calls)], calls), strict=True):
        call.label_gradient = gradient
    if vectors is None:
        for call in calls:
            call.gradients = call.label_gradient[None]
        return
    columns = list(vectors())
    for call in calls:
        label = call.label_gradient
        call.gradients = label.new_empty(len(columns), *label.shape)
    for k, vector in enumerate(columns):
        # into one buffer: a list of columns and their stack would take twice the memory
        for call, gradient in zip(calls, send_backwards(outputs, record, vector), strict=True):
            call.gradients[k] = gradient
    if parameters and record.tape.hooked:
        _prove_linear(outputs, record, columns)


def _prove_linear(outputs: Tensor, record: Record, columns: Sequence[Tensor]) -> None:
    """Find gradient hooks of the user's under which vectors do not add up, such as clipping."""
    factors = [2.0 ** -(k % 8 + 1) for k in range(len(columns))]
    vector = torch.stack([f * v for f, v in zip(factors, columns, strict=True)]).sum(0)
    found = send_backwards(outputs, record, vector)
    for name, calls in record.calls.items():
        for call in calls:
            weights = call.gradients.new_tensor(factors).view(-1, *[1] * call.output.ndim)
            terms, gradient = weights * call.gradients, found.pop(0)
            size = terms.norm()
            if (gradient - terms.sum(0)).norm() > call_tolerance(call) * size:
                record.unfit[name] = (
                    "a gradient hook changes what arrives at it other than by a linear map, as "
                    "clipping does; remove the hook"
                )
