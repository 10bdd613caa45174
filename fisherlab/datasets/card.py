"""`Card`: what a data set is, where it is from, and which bytes it is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


class DatasetError(ValueError):
    """A data set that is unknown, missing or not the bytes its card names."""


@dataclass(frozen=True)
class File:
    """One file of a data set: its path below the data folder and the sha256 of its bytes.

    `url` is an address that serves exactly these bytes, or None where there is none.
    """

    path: str
    sha256: str
    url: str | None = None


@dataclass(frozen=True)
class Card:
    """The description of a data set; `markdown` is the page in data/cards."""

    name: str
    title: str
    task: Literal["classification", "regression"]
    num_classes: int | None  # None for a regression
    input_shape: tuple[int, ...]  # one example's
    source: str
    licence: str
    split: str  # how train and test were made
    files: tuple[File, ...] = ()  # empty: bundled or generated
    preparation: str = ""  # how inputs and targets were made
    notes: str = ""
    obtain: str = ""  # how to get files that no address serves
    train_examples: int | None = None  # size of the training set; None: not known before it is read
    ignore_index: int | None = None  # the label that stands for no label

    @property
    def num_outputs(self) -> int:
        """The outputs that a model of these targets needs: the classes, or one number."""
        return self.num_classes or 1

    @property
    def sha256(self) -> dict[str, str]:
        """`{path below the data folder: sha256}`."""
        return {file.path: file.sha256 for file in self.files}

    def markdown(self) -> str:
        """The card as a page of Markdown."""
        classes = "" if self.num_classes is None else f", {self.num_classes:,} classes"
        shape = " x ".join(map(str, self.input_shape))
        ignored = "" if self.ignore_index is None else f"{self.ignore_index}: no label there"
        rows = {
            "Task": self.task + classes,
            "One example": shape,
            "Training examples": f"{self.train_examples:,}" if self.train_examples else "",
            "Source": self.source,
            "Licence, as commonly stated": self.licence,
            "Split": self.split,
            "Preparation": self.preparation,
            "Ignored label": ignored,
            "Notes": self.notes,
            "How to get it": self._obtain(),
        }
        lines = [f"# {self.name}", "", self.title, ""]
        lines += [f"- **{key}**: {value}" for key, value in rows.items() if value]
        if self.files:
            lines += ["", "| file | sha256 |", "|---|---|"]
            lines += [f"| `{file.path}` | `{file.sha256}` |" for file in self.files]
        return "\n".join(lines) + "\n"

    def _obtain(self) -> str:
        if not self.files:
            return "nothing to get: it comes with the package"
        return self.obtain or f"`fisherlab data fetch {self.name}`"
