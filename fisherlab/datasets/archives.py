"""Official archives, read as their authors published them: CIFAR-10, CIFAR-100, SVHN."""

from __future__ import annotations

import io
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from fisherlab.datasets.card import Card, DatasetError, File
from fisherlab.datasets.images import CITATION, KRIZHEVSKY, PER_CHANNEL, standardised
from fisherlab.datasets.registry import Dataset, register

TORONTO = "https://www.cs.toronto.edu/~kriz"
HOUSE_NUMBERS = "http://ufldl.stanford.edu/housenumbers"
# The names that a pickle of arrays needs, as numpy 1 and 2 spell them; no other is looked up.
ARRAYS = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("_codecs", "encode"),
}


class _Arrays(pickle.Unpickler):
    """Reads dicts, lists, bytes and arrays; a pickle that names anything else is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ARRAYS:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def unpickled(content: bytes, origin: str) -> Any:
    """The arrays in a pickle, read without running any code in it.

    Raises:
        DatasetError: the pickle names anything but numpy's arrays, or is damaged.
    """
    try:
        return _Arrays(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # a damaged pickle may fail in any way
        raise DatasetError(
            f"{origin} is no pickle of arrays: {error}; get the official archive"
        ) from None


def cifar_batches(
    archive: Path, train: tuple[str, ...], test: str, labels: bytes
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Images `[n, 3, 32, 32]` and labels of the training batches and the test batch of a tar.

    Raises:
        DatasetError: a batch is missing, or holds something else.
    """
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            name = Path(member.name).name
            stream = tar.extractfile(member) if name in (*train, test) else None
            if stream is not None:
                found[name] = _batch(
                    unpickled(stream.read(), f"{name} in {archive}"), labels, archive
                )
    missing = [name for name in (*train, test) if name not in found]
    if missing:
        raise DatasetError(f"{archive} has no {', '.join(missing)}; get the official archive")
    x, y = (np.concatenate([found[name][k] for name in train]) for k in (0, 1))
    return x, y, *found[test]


def _batch(batch: Any, labels: bytes, archive: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        x, y = batch[b"data"], np.asarray(batch[labels], np.int64)
        if x.dtype != np.uint8 or y.shape != (len(x),):
            raise ValueError(f"{x.dtype} images and {y.shape} labels")
        return x.reshape(-1, 3, 32, 32), y
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DatasetError(f"a batch in {archive} is not CIFAR's: {error!r}") from None


def house_numbers(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images `[n, 3, 32, 32]` and labels 0 to 9 of a .mat, in which 10 stands for the digit 0."""
    from scipy.io import loadmat  # here: a second to import

    try:
        content = loadmat(path, variable_names=["X", "y"])
        x = np.ascontiguousarray(content["X"].transpose(3, 2, 0, 1))
        return x, content["y"].ravel().astype(np.int64) % 10
    except (KeyError, ValueError, NotImplementedError) as error:
        raise DatasetError(f"{path} is not SVHN's .mat of cropped digits: {error!r}") from None


def _official(name: str, classes: int, sha256: str, folder: str) -> Card:
    return Card(
        name=f"{name}_official",
        title=f"Small photographs in {classes} classes, 3 x 32 x 32: all of {folder}",
        task="classification",
        num_classes=classes,
        input_shape=(3, 32, 32),
        train_examples=50_000,
        source=KRIZHEVSKY,
        licence=CITATION,
        split="the official one: 50,000 and 10,000 images",
        files=(
            File(f"{name}/{folder}-python.tar.gz", sha256, f"{TORONTO}/{folder}-python.tar.gz"),
        ),
        preparation=PER_CHANNEL,
    )


@register(
    _official(
        "cifar10",
        10,
        "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
        "cifar-10",
    )
)
def cifar10_official(card: Card, files: dict[str, Path]) -> Dataset:
    """Images `[n, 3, 32, 32]`, standardised per channel."""
    batches = tuple(f"data_batch_{k}" for k in range(1, 6))
    (archive,) = files.values()
    return standardised(card, *cifar_batches(archive, batches, "test_batch", b"labels"))


@register(
    _official(
        "cifar100",
        100,
        "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
        "cifar-100",
    )
)
def cifar100_official(card: Card, files: dict[str, Path]) -> Dataset:
    """Images `[n, 3, 32, 32]` in the fine classes, standardised per channel."""
    (archive,) = files.values()
    return standardised(card, *cifar_batches(archive, ("train",), "test", b"fine_labels"))


@register(
    Card(
        name="svhn",
        title="Digits of house numbers, 3 x 32 x 32",
        task="classification",
        num_classes=10,
        input_shape=(3, 32, 32),
        train_examples=73_257,
        source="Y. Netzer, T. Wang, A. Coates, A. Bissacco, B. Wu, A. Y. Ng, Reading Digits in "
        "Natural Images with Unsupervised Feature Learning, 2011",
        licence="for non-commercial use",
        split="the official one: 73,257 and 26,032 images, without the extra ones",
        files=(
            File(
                "svhn/train_32x32.mat",
                "435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8",
                f"{HOUSE_NUMBERS}/train_32x32.mat",
            ),
            File(
                "svhn/test_32x32.mat",
                "cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b",
                f"{HOUSE_NUMBERS}/test_32x32.mat",
            ),
        ),
        preparation=PER_CHANNEL,
    )
)
def svhn(card: Card, files: dict[str, Path]) -> Dataset:
    """Images `[n, 3, 32, 32]`, standardised per channel."""
    train, test = (house_numbers(files[f"svhn/{part}_32x32.mat"]) for part in ("train", "test"))
    return standardised(card, *train, *test)
