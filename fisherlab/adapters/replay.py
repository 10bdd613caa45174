"""A capture as a model of one linear layer, which another library can be run on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fisherlab.blocks import BlockError
from fisherlab.extract import LayerCapture


class Replay(nn.Module):
    """`z[n, m] = sum_t <g[m, n, t], W a[n, t]>`.

    Its Jacobian is the capture's per-example gradients. The squared error of `z` has a constant
    Hessian, `(2/C) I` of `C` outputs under a mean. A library that makes its factors from a
    `nn.Linear` then finds the inputs `a` and the output gradients `sqrt(2/C) g` at that layer. It
    computes its own sums over the capture.

    Args:
        layer: a capture of all output vectors of its examples.

    Raises:
        BlockError: positions of the capture do not count, or it is a chunk.
    """

    def __init__(self, layer: LayerCapture) -> None:
        super().__init__()
        if not layer.whole or layer.counted is not None or layer.summed != 1:
            raise BlockError(
                f"the capture of layer {layer.name!r} has positions that do not count, or output "
                "vectors of some examples only; another library has no such sums"
            )
        columns = layer.columns
        self.a, self.g = columns.a.detach(), columns.g.detach()
        o, i = columns.shape
        self.linear = nn.Linear(i, o, bias=False, dtype=self.a.dtype, device=self.a.device)
        with torch.no_grad():
            self.linear.weight.zero_()  # no gradient depends on it

    @property
    def columns(self) -> int:
        """`C`, the outputs of an example."""
        return len(self.g)

    @property
    def batch(self) -> tuple[dict[str, Tensor], Tensor]:
        """The input, `a` and `g` with the examples first, and targets of zero."""
        g = self.g.transpose(0, 1)
        return {"a": self.a, "g": g}, g.new_zeros(g.shape[:2])

    def forward(self, batch: Any) -> Tensor:
        """`z`, `[n, m]`."""
        outputs = self.linear(batch["a"])
        # a layer of one position is [n, o] to the libraries
        outputs = outputs if outputs.ndim == 3 else outputs[:, None]
        return torch.einsum("nmto,nto->nm", batch["g"], outputs)


def drawn_nothing(layer: LayerCapture) -> Replay:
    """The replay of a capture; torch's random stream is where it was."""
    with torch.random.fork_rng(devices=[]):
        return Replay(layer)
