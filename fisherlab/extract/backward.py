"""Vectors sent back from a model's outputs, on the graph of its own forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from fisherlab.extract.geometry import CaptureError


def pulled_back(
    outputs: Tensor, vector: Tensor, sources: Sequence[GradientEdge | Tensor]
) -> Sequence[Tensor | None]:
    """`J^T v` at edges and parameters, in one pass; `.grad` is not touched and the graph is kept.

    Args:
        outputs: the model's outputs, with their graph.
        vector: `v`, of their shape.
        sources: where the gradients are wanted.

    Returns:
        One gradient per source, None where the outputs do not depend on it.
    """
    if not sources:
        return ()
    if outputs.is_complex():
        raise CaptureError(
            f"the outputs are {outputs.dtype}; return real ones, such as outputs.abs()"
        )
    if outputs.layout == torch.strided and vector.stride() != outputs.stride():
        # in the layout of the outputs, as kernels of torch expect: batch norm's misreads others
        vector = torch.empty_like(outputs, dtype=vector.dtype).copy_(vector)
    # the gradient of the number <f, v>: given v itself, autograd loads a package, 2 s once
    with torch.enable_grad():
        product = (outputs * vector).sum()
    wanted: list[Any] = [*sources, *_read_by_group_norms(sources)]
    found = torch.autograd.grad(product, wanted, retain_graph=True, allow_unused=True)
    return found[: len(sources)]


def _read_by_group_norms(sources: Sequence[GradientEdge | Tensor]) -> list[GradientEdge]:
    """The inputs of group normalisations, which torch's kernel has to be asked for as well.

    In channels-last layout on the CPU it ends the process where the weight alone is asked for.
    """
    nodes = {source.node for source in sources if isinstance(source, GradientEdge)}
    found = [n.next_functions[0] for n in nodes if n.name().startswith("NativeGroupNorm")]
    return [GradientEdge(node, number) for node, number in found if node is not None]


def widened(tensor: Tensor) -> Tensor:
    """Half precision, as of an autocast region, raised to float32 before any product."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
