"""Everything the Gram matrices of one batch say: classes, layers, coefficients, dropped mass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from fisherlab import doors
from fisherlab.metrics.coefficients import example_coefficients
from fisherlab.metrics.entry import entered
from fisherlab.metrics.gram import (
    HasGram,
    adjacent_similarity,
    by_class,
    class_means,
    gram_correlation,
    similarity_matrix,
)
from fisherlab.metrics.layers import dropped_mass, layer_correlation, layer_masses


@dataclass(frozen=True)
class Gram:
    """A Gram matrix that is known already."""

    matrix: Tensor

    def gram(self) -> Tensor:
        return self.matrix


@dataclass(frozen=True)
class GramStudy:
    """FNGD fig. 3 as numbers; examples run by class, `order` says which example stands where."""

    layers: list[str]
    labels: Tensor  # [M], sorted
    order: Tensor  # [M], indices into the batch
    correlations: Tensor  # [L, M, M]
    within: Tensor  # [L], mean correlation of two examples of one class
    between: Tensor  # [L], of two classes
    similarities: Tensor  # [L, L]
    coefficients: Tensor  # [L, M], M v: FNGD's weight of an example, 1 is SGD's
    masses: Tensor  # [L, L], ||F_ij||_F

    def __repr__(self) -> str:
        within, between = float(self.within.mean()), float(self.between.mean())
        return (
            f"GramStudy({len(self.layers)} layers, {len(self.labels)} examples of "
            f"{len(self.labels.unique())} classes, mean correlation {within:.2f} within a class, "
            f"{between:.2f} between)"
        )

    @property
    def adjacent(self) -> Tensor:
        """Mean similarity of adjacent layers' matrices."""
        return adjacent_similarity(self.similarities)[0]

    @property
    def apart(self) -> Tensor:
        """Mean similarity of all other pairs of layers."""
        return adjacent_similarity(self.similarities)[1]

    @property
    def dropped(self) -> Tensor:
        """Share of `||F||^2` between layers, which a block-diagonal approximation drops."""
        return dropped_mass(self.masses)

    @property
    def relative_masses(self) -> Tensor:
        """`||F_ij||^2 / (||F_ii|| ||F_jj||)`, `[L, L]`: the masses without the layers' scales."""
        return layer_correlation(self.masses)

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything as arrays, for a file; the correlations in float32."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values = {
            name: np.asarray(value.cpu() if isinstance(value, Tensor) else value)
            for name, value in values.items()
        }
        return values | {"correlations": values["correlations"].astype(np.float32)}

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, np.ndarray]) -> GramStudy:
        """The study that `arrays` gave.

        Raises:
            ValueError: an array is missing.
        """
        missing = {f.name for f in fields(cls)} - set(
            doors.instance(arrays, "arrays", Mapping, "a dict of arrays, as `arrays` makes")
        )
        if missing:
            raise ValueError(f"arrays must be those of a study; {', '.join(sorted(missing))} lack")
        tensors = {f.name: arrays[f.name] for f in fields(cls) if f.name != "layers"}
        layers = [str(name) for name in arrays["layers"]]
        studied = {k: torch.as_tensor(value, device="cpu") for k, value in tensors.items()}
        return cls(layers, **studied)


@entered
def gram_study(layers: Mapping[str, HasGram], labels: Tensor, alpha: float = 0.005) -> GramStudy:
    """The study of one batch; each Gram matrix is formed once.

    Args:
        layers: captures or exact blocks of the empirical Fisher by layer: one column per example.
        labels: `[M]`, the class of each example.
        alpha: FNGD's damping relative to the norm of the Gram matrix.

    Returns:
        The study, with the examples in the order of their classes.
    """
    order = by_class(labels)
    grams = {}
    for name, layer in layers.items():
        matrix = layer.gram()
        if len(matrix) != len(labels):
            raise ValueError(
                f"layer {name!r} has {len(matrix)} columns for {len(labels)} labels; capture with "
                "fisher_type='empirical', one column per example"
            )
        grams[name] = Gram(matrix[order][:, order])
    correlations = [gram_correlation(gram) for gram in grams.values()]
    means = [class_means(correlation, labels[order]) for correlation in correlations]
    return GramStudy(
        layers=list(grams),
        labels=labels[order],
        order=order,
        correlations=torch.stack(correlations),
        within=torch.stack([within for within, _ in means]),
        between=torch.stack([between for _, between in means]),
        similarities=similarity_matrix(correlations),
        coefficients=torch.stack([example_coefficients(gram, alpha) for gram in grams.values()]),
        masses=layer_masses(grams, len(labels)),
    )
