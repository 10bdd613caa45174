"""The data folder, and the bytes in it: no file is parsed before its sha256 is checked."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from fisherlab import doors
from fisherlab.datasets.card import Card, DatasetError, File

VARIABLE = "FISHERLAB_DATA"


def data_folder(root: str | Path | None = None) -> Path:
    """The folder that holds one folder per data set: `root`, else `$FISHERLAB_DATA`, else `cache`.

    Raises `DatasetError` when a folder that was named does not exist.
    """
    if root is not None:
        doors.place(root, "root", error=DatasetError)
    named = root if root is not None else os.environ.get(VARIABLE)
    if not named:
        return cache_folder()
    folder = Path(named).expanduser()
    if not folder.is_dir():
        origin = "root" if root is not None else VARIABLE
        raise DatasetError(f"no such folder: {folder} (from {origin}); name one that exists")
    return folder


def cache_folder() -> Path:
    """Where `fisherlab data fetch` puts its files: data/downloads of a checkout, else of here."""
    checkout = Path(__file__).parents[2]
    base = checkout if (checkout / "pyproject.toml").is_file() else Path.cwd()
    return base / "data" / "downloads"


def verified(card: Card, folder: Path) -> dict[str, Path]:
    """`{path below folder: file}` of a card, every one there and with the sha256 of the card."""
    missing = [file.path for file in card.files if not (folder / file.path).is_file()]
    if missing:
        raise DatasetError(
            f"data set {card.name!r} is not installed: {', '.join(missing)} not in {folder}; "
            f"set {VARIABLE} to the folder that holds it, or run `fisherlab data fetch {card.name}`"
        )
    return {file.path: _checked(card, file, folder / file.path) for file in card.files}


def matches(path: Path, file: File) -> bool:
    """Whether the file is there with the bytes that its card names."""
    return path.is_file() and _sha256(path) == file.sha256


def _checked(card: Card, file: File, path: Path) -> Path:
    got = _sha256(path)
    if got != file.sha256:
        raise DatasetError(
            f"{path} is corrupt or truncated ({path.stat().st_size:,} bytes): "
            f"its sha256 is {got}, expected {file.sha256}; "
            f"delete it and get it again (`fisherlab data fetch {card.name}`)"
        )
    return path


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DatasetError(
            f"cannot read {path}: {error.strerror}; check its permissions"
        ) from error
