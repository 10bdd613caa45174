"""The Hessian of a whole network, by products through the graph of its gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from fisherlab.extract import CaptureError
from fisherlab.extract.api import Forward
from fisherlab.extract.hessian import check_unwritten, checked, hessian_product, loss_gradients
from fisherlab.extract.isolation import isolated
from fisherlab.network.base import NetworkMatrix, Weights


class NetworkHessian(NetworkMatrix):
    """`H = d^2 L / d theta^2` of all trainable parameters, `L` the mean of the `l_n`.

    It is symmetric and need not be positive semi-definite. A product costs one backward pass
    through the graph of the gradient, which it keeps: the parameters must stay as they were. Norm
    layers, embeddings and every other parameter take part, under their own names and shapes.
    `leading(k)` finds the largest eigenvalues by SciPy's Lanczos iteration, `leading(k, "SA")` the
    smallest. Its trace and density are estimated by curvlinops
    (`fl.adapters.as_curvlinops_operator`).

    Args:
        model: the model, in the mode that `fl.capture` takes.
        criterion: a loss with `reduction` "mean" or "sum".
        x: the batch, as in `fl.capture`.
        y: its labels.
        forward: how the model is called, as in `fl.capture`.

    Raises:
        CaptureError: the batch is none, or no parameter is trainable.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[..., Any],
        x: object,
        y: Tensor | None = None,
        *,
        forward: Forward | None = None,
    ) -> None:
        model, criterion, batch, labels = checked(model, criterion, x, y)
        leaves = {name: p for name, p in model.named_parameters() if p.requires_grad}
        kinds = {(p.dtype, p.device) for p in leaves.values()}
        if len(kinds) != 1:
            found = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds)) or "none"
            raise CaptureError(
                f"the trainable parameters must have one dtype and device, got {found}"
            )
        self.shapes = {name: tuple(p.shape) for name, p in leaves.items()}
        ((self.dtype, self.device),) = kinds
        self._leaves = tuple(leaves.values())
        with isolated(model, batch, criterion) as isolation:
            self._gradients, self._scale, _ = loss_gradients(
                model, batch, forward, criterion, labels, self._leaves
            )
            check_unwritten(isolation.written())

    def __matmul__(self, V: Mapping[str, Tensor]) -> Weights:
        self.check(V)
        found = hessian_product(self._gradients, self._leaves, [V[name] for name in self.shapes])
        return {name: self._scale * h for name, h in zip(self.shapes, found, strict=True)}
