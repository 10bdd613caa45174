"""bergson: the covariances and corrected eigenvalues that it saves, as blocks of ours.

Its covariances are sums over positions of the gradients of a summed loss. Its KFAC divides both by
the number of positions, so that it is `1/S` of ours. Its corrected eigenvalues have our scale.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fisherlab import doors
from fisherlab.adapters.library import AdapterError, library
from fisherlab.blocks import Block, Eigen, Kronecker

SIDES = ("gradient", "activation")
CORRECTED = "eigenvalue_correction_sharded"


def from_bergson(
    folder: str | Path, examples: int | None = None, positions: int | None = None
) -> dict[str, Block]:
    """The blocks of a folder that bergson's collectors have written, by layer, in our scale.

    With corrected eigenvalues it is EKFAC, `Q_G, Q_A` and `Lambda`, where `Lambda` is already a
    mean over documents. With covariances alone it is KFAC, `sum g g^T / N` and
    `sum a a^T / (N S)`. Its `tkfac` is no TKFAC, and its files have the names of KFAC's.

    Args:
        folder: holds `activation_sharded` and `gradient_sharded`, or `eigen_activation_sharded`,
            `eigen_gradient_sharded` and `eigenvalue_correction_sharded`.
        examples: `N`, which covariances do not say; of eigenvalues, nothing is divided.
        positions: `N S`, the positions that the sums of covariances have.

    Returns:
        Blocks on `[W | b]` by layer; on `W` alone where it was run without `include_bias`.

    Raises:
        AdapterError: the folder has neither kind of files.
        ValueError: it has covariances, and a count is missing.
    """
    folder = doors.place(folder, "folder", error=AdapterError)
    if (folder / CORRECTED).is_dir():
        Q_G, Q_A = (_shards(folder / f"eigen_{side}_sharded") for side in SIDES)
        values = _shards(folder / CORRECTED)
        return {name: Eigen(Q_G[name], Q_A[name], values[name]) for name in values}
    if examples is None or positions is None:
        raise ValueError(
            "covariances of bergson are sums: pass examples= and positions=, the numbers of "
            "examples and of positions in them"
        )
    doors.count(examples, "examples")
    doors.count(positions, "positions")
    G, A = (_shards(folder / f"{side}_sharded") for side in SIDES)
    return {name: Kronecker(G[name] / examples, A[name] / positions) for name in G}


def _shards(folder: Path) -> dict[str, Tensor]:
    """Each layer's matrix, whose rows are in one file per rank."""
    files = sorted(folder.glob("shard_*.safetensors"), key=lambda path: int(path.stem[6:]))
    if not files:
        raise AdapterError(
            f"{folder} has no shard_*.safetensors: from_bergson takes the folder that bergson's "
            "CovarianceCollector or LambdaCollector was given as path"
        )
    parts = [library("safetensors.torch").load_file(path) for path in files]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
