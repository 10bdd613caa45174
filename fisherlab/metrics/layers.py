"""The whole Fisher matrix at a glance: the blocks between layers, from Gram matrices alone.

With `F_ij = U_i U_j^T / M` between layers i and j, `||F_ij||_F^2 = <K_i, K_j> / M^2`, `K = U^T U`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fisherlab.blocks.numerics import over
from fisherlab.metrics.entry import entered
from fisherlab.metrics.gram import HasGram


@entered
def layer_masses(layers: Mapping[str, HasGram], examples: int) -> Tensor:
    """`||F_ij||_F = sqrt(<K_i, K_j>) / M` between every two layers.

    No block between two layers is ever formed.

    Args:
        layers: captures or exact blocks of the same columns: examples and backpropagated vectors
            in the same order.
        examples: M.

    Returns:
        `[L, L]` float64, on the scale of the Fisher.
    """
    if not layers:
        raise ValueError("layer_masses needs at least one layer")
    grams = [layer.gram().double().flatten() for layer in layers.values()]
    if len({len(gram) for gram in grams}) > 1:
        sizes = {name: len(layer.gram()) for name, layer in layers.items()}
        raise ValueError(f"the layers have different numbers of columns: {sizes}; capture together")
    K = torch.stack(grams)
    return (K @ K.mT).clamp(min=0).sqrt() / float(examples)


@entered
def dropped_mass(masses: Tensor) -> Tensor:
    """`sum_{i != j} ||F_ij||^2 / ||F||^2`: the share that a block-diagonal approximation drops.

    Args:
        masses: `[L, L]`, from `layer_masses`.

    Returns:
        0-d float64.

    Example:
        >>> import torch
        >>> from fisherlab import metrics
        >>> round(float(metrics.dropped_mass(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))), 3)
        0.2
    """
    squared = masses.double().square()
    total = squared.sum()
    dropped = total - squared.diagonal().sum()
    return over(dropped, total)


@entered
def layer_correlation(masses: Tensor) -> Tensor:
    """`||F_ij||^2 / (||F_ii|| ||F_jj||)` in [0, 1]: the cosine of two Gram matrices.

    Layers differ in scale by orders of magnitude; this measure does not.

    Args:
        masses: `[L, L]`, from `layer_masses`.

    Returns:
        `[L, L]`. A layer with zero gradient has row 0 and diagonal 1.
    """
    squared = masses.double().square()
    scale = squared.diagonal().sqrt()
    inverse = over(torch.ones_like(scale), scale)
    return (squared * inverse[:, None] * inverse).clamp(max=1).fill_diagonal_(1)
