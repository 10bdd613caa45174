"""`fetch`: the one place that downloads, and only bytes whose sha256 is known beforehand."""

from __future__ import annotations

from pathlib import Path

from fisherlab.datasets.card import Card, DatasetError, File
from fisherlab.datasets.files import VARIABLE, data_folder, matches
from fisherlab.datasets.registry import card as card_of
from fisherlab.extras import named

TIMEOUT = 60.0  # seconds without an answer


def fetch(name: str, root: str | Path | None = None, progress: bool = True) -> list[Path]:
    """Download the files of a data set into the data folder; present files are kept.

    A file appears under its name only whole and with the right sha256.

    Args:
        name: a name of `names()`.
        root: the folder with one folder per data set; None as in `load`.
        progress: whether to show a bar.

    Returns:
        All files, in the card's order; none for a bundled data set.

    Raises:
        DatasetError: the name is unknown, no public address serves the data set byte for byte, a
            download failed, or a checksum is wrong.
    """
    card = card_of(name)
    if not card.files:
        return []
    folder = data_folder(root)
    return [_fetched(card, file, folder / file.path, progress) for file in card.files]


def _fetched(card: Card, file: File, path: Path, progress: bool) -> Path:
    if matches(path, file):
        return path
    if file.url is None:
        raise DatasetError(
            f"{card.name!r} cannot be fetched: no public address serves exactly the bytes of "
            f"{file.path}. {card.obtain}; then set {VARIABLE} to the folder above {file.path}"
        )
    with named():
        import pooch  # here, because only a download needs it and the HTTP libraries below it

    pooch.get_logger().setLevel("WARNING")  # the progress bar already says what is under way
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        pooch.retrieve(
            file.url,
            known_hash=f"sha256:{file.sha256}",
            fname=path.name,
            path=path.parent,
            downloader=pooch.HTTPDownloader(progressbar=progress, timeout=TIMEOUT),
        )
    except ValueError as error:  # pooch's word for a wrong checksum
        raise DatasetError(
            f"{file.url} did not serve {file.path}: expected sha256 {file.sha256}. {error}; "
            "nothing was kept: try again later, or copy the file there by hand"
        ) from error
    except OSError as error:
        raise DatasetError(
            f"could not download {file.url} to {path}: {error}; check the connection and the "
            f"folder, or put the file there by hand"
        ) from error
    return path
