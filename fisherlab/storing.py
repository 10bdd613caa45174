"""Captures, blocks and tables on the disk: no batch is captured twice.

A file holds tensors as safetensors and their places as JSON in its header; reading it executes
nothing, and a damaged or foreign one is refused. A table is a folder, as `Comparison.save` has it.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fisherlab import doors, extras, whole
from fisherlab.blocks import Block
from fisherlab.blocks.serialise import from_dict, to_dict
from fisherlab.comparison import Comparison
from fisherlab.extract import Captures, LayerCapture
from fisherlab.extract.api import Report
from fisherlab.extract.geometry import Convolution, Geometry

FORMAT = "1"
KINDS = {kind.__name__: kind for kind in (Convolution, Geometry, LayerCapture, Report)}
# Fields that a capture has only while it is measured.
PASSING = ("shared", "brief")


_TAKES = "fl.save takes captures, blocks and dicts of them, and a Comparison"


class StoredError(ValueError):
    """A value that cannot be stored, or a file that `save` did not write."""


def save(value: Any, path: str | Path) -> Path:
    """Write captures, blocks or a table; every number keeps its bits.

    Args:
        value: what `fl.capture` returns or one layer of it; a block; a dict of blocks by name; a
            `Comparison`, which becomes a folder.
        path: the file, or the folder of a table.

    Returns:
        The path.

    Raises:
        StoredError: it is something else; nothing is written.

    Example:
        >>> import tempfile, torch, fisherlab as fl
        >>> path = fl.save(fl.blocks.Diagonal(torch.tensor([[2.0, 3.0]])), tempfile.mktemp())
        >>> fl.load(path).entries.tolist()
        [[2.0, 3.0]]
        >>> path.unlink()
    """
    path = doors.place(path, "path", error=StoredError)
    if isinstance(value, Comparison):
        return value.save(path)
    if path.is_dir():
        raise StoredError(f"{path} is a folder; name a file, such as {path / 'file.safetensors'}")
    if value is None or isinstance(value, bool | int | float | str):
        raise StoredError(f"the value is {doors.said(value)}; {_TAKES}")
    with extras.named():
        from safetensors.torch import save as to_bytes
    store = _Store()
    tree = json.dumps(store.packed(value, "the value"))
    sums = json.dumps([zlib.crc32(tree.encode()), *map(_sum, store.tensors)])
    told = {"fisherlab": FORMAT, "tree": tree, "sums": sums}
    named = {str(k): tensor for k, tensor in enumerate(store.tensors)}
    whole.write(path, lambda stream: stream.write(to_bytes(named, told)))
    return path


def load(path: str | Path, device: str | torch.device = "cpu") -> Any:
    """Read what `save` wrote.

    Args:
        path: the file, or the folder of a table.
        device: where the tensors shall be.

    Returns:
        An object equal to the one that was saved.

    Raises:
        FileNotFoundError: there is no such file.
        StoredError: it is damaged, or `save` did not write it.
    """
    path = doors.place(path, "path", error=StoredError)
    device = _device(device)
    if path.is_dir():
        return Comparison.load(path)
    with extras.named():
        from safetensors import safe_open

    def read(path: Path) -> tuple[dict[str, str], list[Tensor]]:
        with safe_open(path, "pt") as file:
            told = file.metadata() or {}
            return told, [file.get_tensor(str(k)) for k in range(len(file.keys()))]

    path.open("rb").close()  # the system's own word for a file that is not there
    told, tensors = whole.read(path, read, "file of fl.save", StoredError)
    if told.get("fisherlab") != FORMAT:
        raise StoredError(
            f"{path} is no file of fl.save in format {FORMAT}, but of {told.get('fisherlab')!r}; "
            "save it again with this version"
        )

    def unpacked(path: Path) -> Any:
        if json.loads(told["sums"]) != [zlib.crc32(told["tree"].encode()), *map(_sum, tensors)]:
            raise ValueError("another sum")
        return _unpacked(json.loads(told["tree"]), [tensor.to(device) for tensor in tensors])

    return whole.read(path, unpacked, "file of fl.save", StoredError)


def _device(device: object) -> torch.device:
    """A device of torch, by its name."""
    if isinstance(device, str | torch.device):
        # torch says with either that it knows no such device, or that this machine has none
        with suppress(RuntimeError, AssertionError):
            return torch.empty(0, device=device).device
    got = doors.said(device)
    raise StoredError(f"device must be one that this machine has, such as 'cpu', got {got}")


def _sum(tensor: Tensor) -> int:
    """A checksum of a tensor's bytes."""
    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data)


class _Store:
    """Tensors in the order in which they are met, each once."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.places: dict[tuple[Any, ...], int] = {}
        self.met: list[Tensor] = []  # alive, so that no other takes one's address

    def packed(self, value: Any, what: str) -> Any:
        """The value as JSON, tensors as their numbers; `what` names it in a refusal."""
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, Tensor):
            return {"tensor": self._place(value, what)}
        if isinstance(value, Captures):
            layers = {name: self.packed(layer, name) for name, layer in value.items()}
            rest = [self.packed(v, what) for v in (value.report, value.outputs, value.labels)]
            return {"captures": [layers, *rest]}
        if isinstance(value, Block):
            return {"block": self.packed(to_dict(value), what)}
        if type(value) in KINDS.values():
            names = [f.name for f in fields(value) if f.name not in PASSING]
            held = {name: self.packed(getattr(value, name), f"{what}.{name}") for name in names}
            return {type(value).__name__: held}
        if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
            return {"dict": {k: self.packed(v, f"{what}[{k!r}]") for k, v in value.items()}}
        if isinstance(value, list | tuple):
            items = [self.packed(v, f"{what}[{k}]") for k, v in enumerate(value)]
            return {"tuple" if isinstance(value, tuple) else "list": items}
        raise StoredError(f"{what} is {doors.said(value)}; {_TAKES}")

    def _place(self, tensor: Tensor, what: str) -> int:
        if not doors.is_strided(tensor) or tensor.is_meta:
            raise StoredError(
                f"{what} must be a dense tensor with numbers, got {doors.said(tensor)}"
            )
        if tensor.is_quantized:
            raise StoredError(f"{what} is quantised; pass {what}.dequantize()")
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if key not in self.places:
            self.places[key] = len(self.tensors)
            # a copy: a file has no views, and no two tensors in one place
            own = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            self.tensors.append(own)
            self.met.append(tensor)
        return self.places[key]


def _unpacked(tree: Any, tensors: list[Tensor]) -> Any:
    if not isinstance(tree, dict):
        return tree
    ((kind, held),) = tree.items()
    if kind == "tensor":
        return tensors[held]
    if kind in ("list", "tuple"):
        items = [_unpacked(item, tensors) for item in held]
        return tuple(items) if kind == "tuple" else items
    if kind == "captures":
        layers = {name: _unpacked(layer, tensors) for name, layer in held[0].items()}
        return Captures(layers, *(_unpacked(item, tensors) for item in held[1:]))
    if kind == "block":
        return from_dict(_unpacked(held, tensors))
    values = {name: _unpacked(value, tensors) for name, value in held.items()}
    return values if kind == "dict" else KINDS[kind](**values)
