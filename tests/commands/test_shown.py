"""Numbers and words as the terminal and the pages show them."""

import io
import re
import sys

import pandas as pd
import pytest

from fisherlab.commands.common import show
from fisherlab.comparison import Comparison
from fisherlab.experiments.findings import best_optimizer, nearest
from fisherlab.experiments.pages import _counted, _listed
from fisherlab.experiments.report import cell


class Terminal(io.StringIO):
    """A standard output that is a terminal."""

    def isatty(self) -> bool:
        return True


def shown(
    patch: pytest.MonkeyPatch, frame: pd.DataFrame, plain: bool = True, **options: object
) -> str:
    """What a terminal of 80 columns gets."""
    screen = Terminal()
    with patch.context() as patched:
        patched.setenv("COLUMNS", "80")
        patched.setenv("TERM", "xterm")
        patched.setattr(sys, "stdout", screen)
        show(frame, **options)
    return re.sub(r"\x1b\[[0-9;]*m", "", screen.getvalue()) if plain else screen.getvalue()


def test_a_narrow_terminal_cuts_no_number_and_names_what_gave_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    frame = pd.DataFrame({f"a_long_column_{k}": [123_456_789] for k in range(9)})
    text = shown(monkeypatch, frame, rest="all.csv")
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    assert text.count("123,456,789") == 6
    left = " ".join(text.split()).partition("no room for ")[2]
    assert left == "a long column 6, a long column 7, a long column 8; all.csv has all columns"


def test_long_names_are_broken_and_never_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"tekfac_error_at_most_tkfac_{end}" for end in ("out_of_sample", "with_memory")]
    frame = pd.DataFrame({"claim": names, **{f"number_{k}": [1.25] * 2 for k in range(7)}})
    text = shown(monkeypatch, frame, wrap=["claim"])
    found = re.sub(r"\s", "", re.sub(r"1\.25", "", text))
    assert all(name in found for name in names)
    assert max(map(len, text.splitlines())) <= 80 and text.count("1.25") == 14


@pytest.mark.parametrize("colours", [True, False])
def test_a_verdict_has_a_colour_unless_nobody_wants_one(
    colours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    if not colours:
        monkeypatch.setenv("NO_COLOR", "1")
    frame = pd.DataFrame({"claim": ["a", "b"], "verdict": ["refuted", "holds"]})
    text = shown(monkeypatch, frame, plain=False)
    assert ("\x1b[31mrefuted" in text) is colours and ("\x1b[32mholds" in text) is colours
    assert "refuted" in text and "holds" in text


def test_a_file_gets_every_column(capsys: pytest.CaptureFixture[str]) -> None:
    show(pd.DataFrame({f"a_long_column_{k}": [123_456_789] for k in range(30)}))
    assert capsys.readouterr().out.count("123,456,789") == 30


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


def found(errors: dict[str, list[float]]) -> list[str]:
    """The finding of a table with these errors by method, a layer each."""
    rows = [
        {"layer": str(k), "approximation": name, "relative_error": error, "step": 0, "seed": 0}
        | {"population_error": error, "population_error_low": 0.1, "population_error_high": 0.4}
        for name, column in errors.items()
        for k, error in enumerate(column)
    ]
    return nearest(Comparison(pd.DataFrame(rows)))


def test_a_finding_names_the_nearest_method_its_equals_and_what_its_interval_holds() -> None:
    errors = {"exact": [0.0] * 3, "tekfac": [0.2, 0.25, 0.9], "kfac": [0.3, 0.3, 0.3]}
    batch, held_out = found({**errors, "twin": errors["tekfac"]})
    assert batch == (
        "On the batch itself, tekfac and twin are nearest in 2 of 3 layers, with a median error "
        "of 0.25."
    )
    assert held_out.startswith("On held-out examples, tekfac and twin are nearest in 2 of 3")
    assert held_out.endswith("(95 % intervals: 0.1 to 0.4, which hold kfac as well).")


def test_a_finding_says_where_no_method_leads_in_most_layers() -> None:
    errors = {"ekfac": [0.2, 0.6, 0.6], "kfac": [0.5, 0.3, 0.5], "tkfac": [0.4, 0.4, 0.1]}
    batch, _ = found(errors)
    assert batch == (
        "On the batch itself, no method is nearest in most of the 3 layers; tkfac has the least "
        "median error, 0.4."
    )


def test_the_best_optimizer_is_not_claimed_beyond_the_spread_of_its_seeds() -> None:
    rows = [("tekfac", 0.96, 0.02, 6.0), ("kfac", 0.95, 0.01, 3.0), ("sgd", 0.6, 0.01, 1.0)]
    summary = pd.DataFrame(rows, columns=["optimizer", "final", "final_sd", "ratio_to_sgd"])
    assert best_optimizer(summary, "accuracy") == [
        "tekfac ends best, with accuracy 0.96 ± 0.02; next is kfac with 0.95, within the spread "
        "of the seeds.",
        "Its step takes 6 times as long as SGD's.",
    ]
    assert best_optimizer(pd.DataFrame({"optimizer": ["a"]}), "accuracy") == [
        "No optimizer came to its end."
    ]
