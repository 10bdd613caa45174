"""Numbers and words as the terminal and the pages show them."""

import io
import re
import sys

import pandas as pd
import pytest

from fisherlab.commands.common import show
from fisherlab.experiments.pages import _counted, _listed
from fisherlab.experiments.report import cell


class Terminal(io.StringIO):
    """A standard output that is a terminal."""

    def isatty(self) -> bool:
        return True


def shown(patch: pytest.MonkeyPatch, frame: pd.DataFrame, **options: object) -> str:
    """What a terminal of 80 columns gets."""
    screen = Terminal()
    with patch.context() as patched:
        patched.setenv("COLUMNS", "80")
        patched.setenv("TERM", "xterm")
        patched.setattr(sys, "stdout", screen)
        show(frame, **options)
    return re.sub(r"\x1b\[[0-9;]*m", "", screen.getvalue())


def test_a_narrow_terminal_cuts_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    frame = pd.DataFrame({f"a_long_column_{k}": [123_456_789] for k in range(9)})
    assert shown(monkeypatch, frame).count("123,456,789") == 9


def test_columns_of_words_give_way_first(monkeypatch: pytest.MonkeyPatch) -> None:
    frame = pd.DataFrame({"n": [123_456_789], "said": ["many words " * 20]})
    text = shown(monkeypatch, frame, wrap=["said"])
    assert "123,456,789" in text and max(map(len, text.splitlines())) <= 80


def test_counts_in_a_column_with_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    frame = pd.DataFrame({"positions": [1024.0, float("nan")], "error": [1024.5, 1e9]})
    text = shown(monkeypatch, frame)
    assert "1,024 " in text and "1.02e+03" in text


def test_cells_of_a_page() -> None:
    assert [cell(v) for v in (None, float("nan"), 1234, 0.5)] == ["–", "–", "1,234", "0.5"]


def test_one_and_several() -> None:
    frame = pd.DataFrame({"step": [22, 22], "layer": ["0", "1"], "approximation": ["kfac"] * 2})
    assert _listed("step", frame["step"]) == "step 22"
    assert _listed("seed", pd.Series([1, 0, 1])) == "seeds 0, 1"
    assert (_counted("layer", frame), _counted("approximation", frame)) == (
        "2 layers",
        "1 approximation",
    )
