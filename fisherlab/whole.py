"""Files that are whole or absent: written beside, flushed to the disk, renamed; read or refused."""

from __future__ import annotations

import errno
import json
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import IO, Any, TypeVar
from weakref import WeakValueDictionary

try:
    import fcntl
except ImportError:  # no Unix
    fcntl = None  # type: ignore[assignment]

import pandas as pd
import torch
from torch.utils.serialization import config

T = TypeVar("T")


@contextmanager
def cause_kept() -> Iterator[None]:
    """Raise Ctrl-C, or what the system said, that a library in C reports as an error of its own.

    torch's zip code says RuntimeError of a stream that raised, and SystemError while it reads.
    """
    try:
        yield
    except Exception as error:
        inner = error.__cause__ or error.__context__
        if isinstance(inner, KeyboardInterrupt | OSError):
            raise inner from None
        raise


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that takes the place of `path` when the block ends, and only then.

    Raises:
        OSError: the disk is full or the folder read-only; it names `path`, which is as it was.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        beside.replace(path)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        with suppress(OSError):
            beside.unlink()


def write(path: Path, content: str | bytes | Callable[[IO[bytes]], Any]) -> None:
    """Write text or bytes, or what a function writes into a stream, whole or not at all."""
    with replacing(path) as stream:
        if callable(content):
            content(stream)
        else:
            # a file's name that is no text has surrogates
            text = content.encode(errors="replace") if isinstance(content, str) else content
            stream.write(text)


def write_tensors(path: Path, state: dict[str, Any]) -> None:
    """Write dicts, lists, numbers, strings and tensors, whole or not at all, by `torch.save`."""
    with replacing(path) as stream:
        try:
            # checksums even where the process does without them: `read_tensors` compares them
            sums = config.patch("save.compute_crc32", True)  # type: ignore[attr-defined]
            with cause_kept(), sums:
                torch.save(state, stream)
        except RuntimeError as error:  # torch's zip writer says so of any write that fails
            raise OSError(errno.EIO, "cannot be written whole; is the disk full?") from error


class FolderBusy(ValueError):
    """A folder into which another process writes."""


class Held:
    """A folder that is this process's own until the object is gone, however the process ends."""

    def __init__(self, folder: Path) -> None:
        self._handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FolderBusy(
                f"another process writes into {folder}; wait for its end, or name another folder"
            ) from None
        except OSError:  # a file system without locks
            pass

    def __del__(self) -> None:
        with suppress(OSError, AttributeError):
            os.close(self._handle)


_HELD: WeakValueDictionary[Path, Held] = WeakValueDictionary()


def hold(folder: Path) -> Held | None:
    """Make a folder, and keep other processes out of it for as long as the result lives.

    Raises:
        FolderBusy: another process is in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        return None
    key = folder.resolve()
    found = _HELD.get(key)
    if found is None:
        found = _HELD[key] = Held(folder)
    return found


def sweep_parts(folder: Path) -> None:
    """Delete what killed processes left half-written below a folder."""
    for part in folder.rglob(".*.part"):
        owner = part.suffixes[-2].removeprefix(".") if len(part.suffixes) > 1 else ""
        if not (owner.isdigit() and int(owner) != os.getpid() and alive(int(owner))):
            part.unlink(missing_ok=True)


def alive(process: int) -> bool:
    """Whether a process of this number runs on this machine."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


class DamagedFile(ValueError):
    """A file that cannot be read as what it is."""


def read(
    path: Path, reader: Callable[[Path], T], what: str, error: type[ValueError] = DamagedFile
) -> T:
    """The content of a file, by a reader.

    Args:
        path: the file.
        reader: reads it.
        what: what the file is, for messages: "table".
        error: the type of the refusal of a damaged file.

    Raises:
        OSError: the file cannot be opened.
    """
    try:
        with cause_kept():
            _check_ends(path)
            return reader(path)
    except OSError as failure:
        # readers of formats seek to places that a damaged file names, which fails without a name
        if failure.errno is not None and failure.filename is not None:
            raise
        raise error(_damaged(path, what, failure)) from failure
    except Exception as failure:  # readers raise what their formats raise
        raise error(_damaged(path, what, failure)) from failure


def _check_ends(path: Path) -> None:
    """Refuse what may have no end: a pipe waits for its writer."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OSError(errno.EINVAL, "it is a pipe or a device, no file; move it away", str(path))


def write_table(path: Path, frame: pd.DataFrame) -> None:
    """Write a table as Parquet, whole or not at all, with a checksum of all its bytes."""
    content = frame.to_parquet(index=False)
    # between the pages and the footer, whose length stands before the last four bytes: no reader
    # looks there, since the footer has the places of all pages
    end = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    write(path, content[:end] + _MARK + _crc(content) + content[end:])


def read_table(path: Path, error: type[ValueError] = DamagedFile) -> pd.DataFrame:
    """A Parquet file, or a refusal as `read` has it."""

    def reader(path: Path) -> pd.DataFrame:
        content = path.read_bytes()
        before, mark, behind = content.rpartition(_MARK)
        # a file of another program has no mark
        if mark and behind[:4] != _crc(before + behind[4:]):
            raise ValueError("another checksum")
        return pd.read_parquet(BytesIO(content))

    return read(path, reader, "Parquet file", error)


# Before a table's checksum: no text in UTF-8 has these bytes.
_MARK = b"\xfffisherlab crc32\xff"


def _crc(content: bytes) -> bytes:
    return zlib.crc32(content).to_bytes(4, "little")


def read_tensors(path: Path, device: str | torch.device = "cpu") -> Any:
    """What `write_tensors` wrote; nothing in it is executed.

    Raises:
        Exception: the file is damaged; torch and its zip reader have many types for it.
    """
    _check_ends(path)
    with path.open("rb") as stream:
        with zipfile.ZipFile(stream) as archive:
            if (member := archive.testzip()) is not None:  # torch's reader compares no checksum
                raise ValueError(f"another checksum of {member}")
        stream.seek(0)
        return torch.load(stream, map_location=device, weights_only=True)


def opened(reader: Callable[[IO[bytes]], T]) -> Callable[[Path], T]:
    """A reader that opens the file itself: pandas takes `~/x` or `a::b` for another place."""

    def read_in(path: Path) -> T:
        with path.open("rb") as stream:
            return reader(stream)

    return read_in


def read_json(path: Path, error: type[ValueError] = DamagedFile) -> dict[str, Any]:
    """The object of a JSON file, or a refusal as `read` has it."""
    found = read(path, lambda path: json.loads(path.read_text(encoding="utf-8")), "JSON", error)
    if not isinstance(found, dict):
        raise error(f"{path} is damaged: it holds a {type(found).__name__}; make it again")
    return found


def _damaged(path: Path, what: str, failure: Exception) -> str:
    return (
        f"{path} is damaged, or no {what} ({type(failure).__name__}); restore it, or make it again"
    )
