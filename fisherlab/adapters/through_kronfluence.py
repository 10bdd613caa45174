"""Kronfluence: its covariances and corrected eigenvalues as blocks of ours.

Its sum-reduced loss has our per-example gradients. It divides `sum g g^T` by `N S`, where ours is
divided by `N`: its KFAC is `1/S` of ours. Its EKFAC has the scale of ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fisherlab import doors
from fisherlab.adapters.library import AdapterError
from fisherlab.blocks import Block, Eigen, Kronecker

Factors = Mapping[str, Mapping[str, Tensor]]


def from_kronfluence(factors: Factors, examples: int | None = None) -> dict[str, Block]:
    """The blocks of factors that an `Analyzer` has fitted, by layer, in the scale of ours.

    The result of `load_all_factors` (strategies "ekfac" and "kfac") gives EKFAC,
    `Q_G, Q_A` and `Lambda / N`. The result of `load_covariance_matrices` gives KFAC,
    `sum g g^T / N` and `sum a a^T / (N S)`; the `1/S` that Kronfluence has in the former is undone.

    Args:
        factors: tensors that the analyzer loads, or that its files hold.
        examples: `N`, which covariances alone do not say.

    Returns:
        Blocks on `[W | b]` by layer.

    Raises:
        AdapterError: the factors are of neither kind.
        ValueError: they are covariances, and `examples` is missing.
    """
    if not isinstance(factors, Mapping):
        raise AdapterError(f"factors must be a dict of dicts, got {doors.said(factors)}")
    if "lambda_matrix" in factors:
        return {name: _eigen(factors, name) for name in _layers(factors, "lambda_matrix")}
    if "gradient_covariance" not in factors:
        raise AdapterError(
            f"from_kronfluence takes load_all_factors(name) or load_covariance_matrices(name), got "
            f"a dict of {sorted(map(str, factors))}"
        )
    if examples is None:
        raise ValueError(
            "covariances count positions, not examples: pass examples=, the number of examples"
        )
    examples = doors.count(examples, "examples")
    return {
        name: Kronecker(
            _of(factors, "gradient_covariance", name) / examples,
            _of(factors, "activation_covariance", name)
            / _counted(factors, "num_activation_covariance_processed", name),
        )
        for name in _layers(factors, "gradient_covariance")
    }


def _layers(factors: Factors, key: str) -> Mapping[str, Tensor]:
    """The tensors of a key by layer."""
    found = factors.get(key)
    if not isinstance(found, Mapping):
        raise AdapterError(f"factors[{key!r}] must be a dict of tensors, got {doors.said(found)}")
    return found


def _of(factors: Factors, key: str, name: str) -> Tensor:
    """One tensor of a layer."""
    found = _layers(factors, key).get(name)
    return doors.tensor(found, f"factors[{key!r}][{name!r}]", error=AdapterError)


def _counted(factors: Factors, key: str, name: str) -> float:
    """How many positions or examples the sums of a layer have."""
    found = _layers(factors, key).get(name)
    return doors.number(found, f"factors[{key!r}][{name!r}]", above=0.0, error=AdapterError)


def _eigen(factors: Factors, name: str) -> Block:
    values = _of(factors, "lambda_matrix", name) / _counted(factors, "num_lambda_processed", name)
    Q_G, Q_A = (_of(factors, f"{side}_eigenvectors", name) for side in ("gradient", "activation"))
    return Eigen(Q_G, Q_A, values.to(Q_G))


def to_kronfluence(block: Block, positions: int = 1) -> dict[str, Tensor]:
    """The factors of one layer under Kronfluence's names, each over a count of 1.

    Args:
        block: a Kronecker product, or a block in a Kronecker eigenbasis.
        positions: `S`, by which its gradient covariance is divided.

    Returns:
        Tensors by Kronfluence's names.

    Raises:
        AdapterError: the block is neither.
        ValueError: `positions` is no count.
    """
    doors.count(positions, "positions")
    one = torch.ones(1, dtype=torch.int64, device="cpu")
    if isinstance(block, Kronecker):
        return {
            "activation_covariance": block.A,
            "gradient_covariance": block.G / positions,
            "num_activation_covariance_processed": one,
            "num_gradient_covariance_processed": one,
        }
    if isinstance(block, Eigen) and not block.thin:
        vectors: dict[str, Any] = {
            "activation_eigenvectors": block.saved("Q_A"),
            "gradient_eigenvectors": block.saved("Q_G"),
        }
        for key, side in (("activation_eigenvectors", 1), ("gradient_eigenvectors", 0)):
            if vectors[key] is None:
                vectors[key] = torch.eye(block.shape[side], dtype=block.dtype, device="cpu")
        return {**vectors, "lambda_matrix": block.spectrum, "num_lambda_processed": one}
    raise AdapterError(
        f"Kronfluence keeps Kronecker products and full Kronecker eigenbases, got "
        f"{doors.said(block)}"
    )
