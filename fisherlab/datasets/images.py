"""Images read from the data folder: MNIST, CIFAR-10, CIFAR-100."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from fisherlab.datasets.card import Card, File
from fisherlab.datasets.registry import Dataset, register

MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist"
KRIZHEVSKY = "A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009"
CITATION = "no explicit licence; the authors ask for the citation"
PER_CHANNEL = "every channel with mean 0 and deviation 1 on the training set"


def _mnist(name: str, sha256: str) -> File:
    return File(f"mnist/{name}", sha256, f"{MNIST}/{name}")


@register(
    Card(
        name="mnist",
        title="Handwritten digits, 28 x 28 pixels",
        task="classification",
        num_classes=10,
        input_shape=(1, 28, 28),
        train_examples=60_000,
        source="Y. LeCun, C. Cortes, C. J. C. Burges, The MNIST database of handwritten digits; "
        "LeCun, Bottou, Bengio, Haffner, Proc. IEEE, 1998",
        licence="CC BY-SA 3.0",
        split="the official one: 60,000 and 10,000 images",
        files=(
            _mnist(
                "train-images-idx3-ubyte.gz",
                "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            ),
            _mnist(
                "train-labels-idx1-ubyte.gz",
                "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            ),
            _mnist(
                "t10k-images-idx3-ubyte.gz",
                "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            ),
            _mnist(
                "t10k-labels-idx1-ubyte.gz",
                "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
            ),
        ),
        preparation="pixels divided by 255, in [0, 1]",
    )
)
def mnist(card: Card, files: dict[str, Path]) -> Dataset:
    """Images `[n, 1, 28, 28]` in [0, 1]."""

    def idx(path: str, header: int) -> Tensor:
        with gzip.open(files[f"mnist/{path}-ubyte.gz"]) as stream:
            return torch.from_numpy(np.frombuffer(stream.read(), np.uint8, offset=header).copy())

    def part(prefix: str) -> TensorDataset:
        images = idx(f"{prefix}-images-idx3", header=16).view(-1, 1, 28, 28)
        return TensorDataset(images.float() / 255, idx(f"{prefix}-labels-idx1", header=8).long())

    return Dataset(part("train"), part("t10k"), card)


@register(
    Card(
        name="cifar10",
        title="Small photographs in ten classes, 3 x 32 x 32: a sixth of CIFAR-10",
        task="classification",
        num_classes=10,
        input_shape=(3, 32, 32),
        train_examples=9_990,
        source=KRIZHEVSKY,
        licence=CITATION,
        split="9,990 images of data_batch_1 and 9,980 of the official test set",
        files=(
            File(
                "cifar10/cifar10_batch1_test.npz",
                "d3d9a7f80c29242f9db5abc9a6c598e9dbb8ebb8145e1aebdbc8f0a527691a7b",
            ),
        ),
        preparation=PER_CHANNEL,
        notes="one training batch of five; the 30 images that could not be had without loss are "
        "left out (exact_train, exact_test)",
        obtain="Make the npz from data_batch_1 and test_batch of the official archive",
    )
)
def cifar10(card: Card, files: dict[str, Path]) -> Dataset:
    """Images `[n, 3, 32, 32]`, standardised per channel."""
    with np.load(files[card.files[0].path]) as raw:
        train, test = raw["exact_train"], raw["exact_test"]
        return standardised(
            card,
            raw["x_train"][train],
            raw["y_train"][train],
            raw["x_test"][test],
            raw["y_test"][test],
        )


@register(
    Card(
        name="cifar100",
        title="Small photographs in a hundred classes, 3 x 32 x 32: a sixth of CIFAR-100",
        task="classification",
        num_classes=100,
        input_shape=(3, 32, 32),
        train_examples=8_000,
        source=KRIZHEVSKY,
        licence=CITATION,
        split="NOT the official one: 80 + 20 images of every class, by the sha256 of their pixels",
        files=(
            File(
                "cifar100/cifar100_pooled10k.npz",
                "6e296f56f80bc1af3b6532410dc4f4a02a005833a2598ca78023247ca8afbc42",
            ),
        ),
        preparation=PER_CHANNEL,
        notes="accuracies are not comparable with published ones",
        obtain="It was pooled from other copies of CIFAR-100; copy the file from who has it",
    )
)
def cifar100(card: Card, files: dict[str, Path]) -> Dataset:
    """Images `[n, 3, 32, 32]`, standardised per channel."""
    with np.load(files[card.files[0].path]) as raw:
        return standardised(card, raw["x_train"], raw["y_train"], raw["x_test"], raw["y_test"])


def standardised(
    card: Card, x: np.ndarray, y: np.ndarray, x_test: np.ndarray, y_test: np.ndarray
) -> Dataset:
    """Images `[n, c, h, w]` of bytes, each channel with mean 0 and deviation 1 in training."""
    pixels = torch.from_numpy(x).float()
    mean = pixels.mean((0, 2, 3), keepdim=True)
    std = pixels.std((0, 2, 3), keepdim=True, correction=0).clamp(min=1e-8)

    def part(x: Tensor, y: np.ndarray) -> TensorDataset:
        return TensorDataset((x - mean) / std, torch.from_numpy(y).long())

    return Dataset(part(pixels, y), part(torch.from_numpy(x_test).float(), y_test), card)
