"""Data that a user owns: `folder:PATH` of images by class, `module:function` that returns it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from fisherlab import heap
from fisherlab.datasets.card import Card, DatasetError
from fisherlab.datasets.images import PER_CHANNEL, standardised
from fisherlab.datasets.registry import Dataset, scheme
from fisherlab.names import imported

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
TESTS = ("test", "val", "valid", "validation")
# Bytes per pixel of the images while they are read and standardised: uint8, and float32 twice.
BYTES = 9


@scheme("folder")
def folder(name: str, rest: str) -> Dataset:
    """`folder:PATH`, `folder:PATH@64`: images in `PATH/train/CLASS` and `PATH/test/CLASS`.

    With `@SIDE` the middle square of each image, scaled to that side. Images are RGB, and gray
    where all are gray. Classes are the folders below `train` in the order of their names.

    Raises:
        DatasetError: a folder or a class is missing, sizes differ, or the memory is too small.
    """
    place, _, text = rest.partition("@")
    root = Path(place).expanduser()
    if text and not (text.isdecimal() and int(text) > 0):
        raise DatasetError(f"{name}: after @ stands the side of the images, such as @64")
    side = int(text) if text else None
    test = next((root / part for part in TESTS if (root / part).is_dir()), None)
    if not (root / "train").is_dir() or test is None:
        raise DatasetError(
            f"{root} has no folders train and test (or val), each with a folder of images per class"
        )
    classes = sorted(path.name for path in (root / "train").iterdir() if path.is_dir())
    extra = sorted({path.name for path in test.iterdir() if path.is_dir()} - set(classes))
    if len(classes) < 2 or extra:
        raise DatasetError(
            f"{root / 'train'} has {len(classes)} class folders"
            + (f", and {test} others: {', '.join(extra)}" if extra else "; two or more are needed")
        )
    files = [_listed(part, classes) for part in (root / "train", test)]
    (x, y), (x_test, y_test) = _images(files, side)
    card = Card(
        name=name,
        title=f"Images of {root}",
        task="classification",
        num_classes=len(classes),
        input_shape=x.shape[1:],
        train_examples=len(x),
        source=str(root.resolve()),
        licence="of whoever owns it",
        split=f"its folders train and {test.name}",
        preparation=PER_CHANNEL,
    )
    return standardised(card, x, y, x_test, y_test)


def _listed(part: Path, classes: list[str]) -> list[tuple[Path, int]]:
    found = [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted((part / name).glob("*"))
        if path.suffix.lower() in SUFFIXES
    ]
    if not found:
        raise DatasetError(f"no images below {part}: {', '.join(SUFFIXES)}")
    return found


def _images(
    files: list[list[tuple[Path, int]]], side: int | None
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Arrays `[n, c, h, w]` of bytes and labels, c = 1 where all images are gray."""
    from PIL import Image  # here: no other data set needs it

    first = _opened(files[0][0][0], side, Image)
    needed = BYTES * first.size * sum(map(len, files))
    there = heap.available()
    if needed > there:
        raise DatasetError(
            f"{sum(map(len, files)):,} images of {first.shape[0]} x {first.shape[1]} take "
            f"{needed / 2**30:.1f} GiB, and {there / 2**30:.1f} GiB are free; take a smaller @SIDE"
        )
    found = []
    for part in files:
        x = np.empty((len(part), *first.shape), np.uint8)
        for k, (path, _) in enumerate(part):
            image = _opened(path, side, Image)
            if image.shape != first.shape:
                height, width = image.shape[:2]
                raise DatasetError(
                    f"{path} is {height} x {width}, the first image {first.shape[0]} x "
                    f"{first.shape[1]}; give the side that all are scaled to, such as @64"
                )
            x[k] = image
        found.append((x, np.array([label for _, label in part], np.int64)))
    gray = all((x == x[..., :1]).all() for x, _ in found)
    return [
        (np.ascontiguousarray(x[..., : 1 if gray else 3].transpose(0, 3, 1, 2)), y)
        for x, y in found
    ]


def _opened(path: Path, side: int | None, Image: Any) -> np.ndarray:
    """One image `[h, w, 3]`, its middle square scaled to `side` where that is given."""
    try:
        with Image.open(path) as stream:
            image = stream.convert("RGB")
    except Exception as error:  # a damaged image, or one of too many pixels, fails in any way
        raise DatasetError(f"{path} cannot be read as an image: {error}") from None
    if side is not None:
        short = min(image.size)
        left, top = ((length - short) // 2 for length in image.size)
        image = image.crop((left, top, left + short, top + short)).resize((side, side))
    return np.asarray(image)


@scheme("")
def function(name: str, rest: str) -> Dataset:
    """`module:function` or `file.py:function`: what the function returns without arguments.

    The result is a `datasets.Dataset`, or `(x, y, x_test, y_test)` as tensors or arrays: labels
    whole numbers `[n]`, targets of a regression floats `[n]` or `[n, 1]`.

    Raises:
        DatasetError: there is no such function, or it returns something else.
    """
    try:
        found = imported(name)()
    except (ImportError, AttributeError, OSError) as error:
        raise DatasetError(f"{name}: {error}; give module:function or file.py:function") from None
    if isinstance(found, Dataset):
        return found
    if not isinstance(found, tuple) or len(found) != 4:
        raise DatasetError(
            f"{name} returns a {type(found).__name__}; "
            "a Dataset or (x, y, x_test, y_test) is needed"
        )
    try:
        x, y, x_test, y_test = map(torch.as_tensor, found)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DatasetError(f"{name} returns no arrays of numbers: {error}") from None
    for part, inputs, targets in (("training", x, y), ("test", x_test, y_test)):
        if not len(inputs) == len(targets) > 0 or inputs.shape[1:] != x.shape[1:]:
            raise DatasetError(
                f"{name}: the {part} set has inputs {tuple(inputs.shape)} and targets "
                f"{tuple(targets.shape)}; one target per example is needed"
            )
    x, x_test = (part.float() if part.is_floating_point() else part.long() for part in (x, x_test))
    return _of_tensors(name, x, y, x_test, y_test)


def _of_tensors(name: str, x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor) -> Dataset:
    regression = y.is_floating_point()
    if regression:
        y, y_test = (part.float().reshape(len(part), -1) for part in (y, y_test))
        if y.shape[1] != 1:
            raise DatasetError(f"{name}: a regression has one number per example, got {y.shape[1]}")
    else:
        y, y_test = y.long(), y_test.long()
    card = Card(
        name=name,
        title=f"What {name} returns",
        task="regression" if regression else "classification",
        num_classes=None if regression else int(max(y.max(), y_test.max())) + 1,
        input_shape=tuple(x.shape[1:]),
        train_examples=len(x),
        source=name,
        licence="of whoever owns it",
        split="the function's",
    )
    return Dataset(TensorDataset(x, y), TensorDataset(x_test, y_test), card)
