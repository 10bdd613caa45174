"""The page of a run: one file with every number of its table; several runs side by side."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pandas as pd
import pytest
from drawn import frame
from typer.testing import CliRunner

from fisherlab import comparison, whole
from fisherlab.cli import app
from fisherlab.experiments import pages, report
from fisherlab.experiments.columns import MEANING
from fisherlab.experiments.rundir import RunDir, RunDirError

pytestmark = pytest.mark.usefixtures("no_pictures")


class Page(HTMLParser):
    """What a page consists of."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.links, self.sources, self.words = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.append(tag)
        self.ids += [found["id"]] if "id" in found else []
        self.links += [found["href"]] if "href" in found else []
        self.sources += [found["src"]] if "src" in found else []

    def handle_data(self, data):
        self.words.append(data.strip())


def folder(path, table=None, **config):
    run = RunDir(path)
    run.begin({"command": "compare"})
    settings = {"model": "mlp", "data": "digits", "reference": 7}
    run.write_config({"command": "compare", "status": "complete", "settings": settings, **config})
    if table is not None:
        run.write_table("comparison", table)
    return run


@pytest.fixture
def table():
    counts = {"examples": 5, "reference_examples": 7}
    return frame().assign(layer_type="Linear", fisher_type="exact", note="", **counts)


def test_the_page_needs_nothing_else(tmp_path, table):
    text = report.write(folder(tmp_path, table)).read_text()
    page = Page(text)
    assert len(page.sources) == len(pages.PICTURES) and all(
        s.startswith("data:image/png;base64,") for s in page.sources
    )
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert "http" not in re.sub(r"data:[^\"]+", "", text)
    # the contents lead somewhere
    inside = [link[1:] for link in page.links if link.startswith("#")]
    assert inside and set(inside) <= set(page.ids)


def test_every_number_of_the_summary_is_on_the_page(tmp_path, table):
    page = Page(report.write(folder(tmp_path, table)).read_text())
    summary = comparison.Comparison(table).summary()
    for name, row in summary.iterrows():
        assert name in page.words
        assert report.cell(row["relative_error"]) in page.words
    assert "7 unseen examples" in " ".join(page.words)


def test_every_column_is_explained(tmp_path, table):
    assert set(MEANING) == set(comparison.COLUMNS)
    page = Page(report.write(folder(tmp_path, table)).read_text())
    assert set(MEANING) <= set(page.words)


def test_what_a_user_named_is_text_and_not_markup(tmp_path, table):
    named = table.replace({"approximation": {"my_own": "<b onclick=x>&"}})
    page = Page(report.write(folder(tmp_path, named)).read_text())
    assert "<b onclick=x>&" in page.words and "b" not in page.tags


def test_an_interrupted_run_says_so(tmp_path, table):
    page = Page(report.write(folder(tmp_path, table, status="interrupted")).read_text())
    assert "This run is interrupted: the page shows what was measured so far." in page.words


def test_one_step_and_one_damping_have_no_empty_pictures(tmp_path, table):
    alone = table[(table["step"] == 0) & (table["damping_relative"] == 0.1)]
    assert (
        len(Page(report.write(folder(tmp_path, alone)).read_text()).sources)
        == len(pages.PICTURES) - 2
    )


def test_runs_side_by_side(tmp_path, table):
    one, two = folder(tmp_path / "one", table), folder(tmp_path / "two", table)
    path = report.write_side_by_side([one, two], tmp_path / "both.html")
    page = Page(path.read_text())
    assert "Side by side" in page.words and len(page.sources) == 2 * len(pages.PICTURES)
    assert "relative error: one" in page.words and "relative error: two" in page.words
    assert len(set(page.ids)) == len(page.ids)


def test_a_training_run_has_a_page(tmp_path):
    rows = pd.DataFrame({"optimizer": ["sgd"], "epoch": [1], "accuracy": [0.75]})
    run = RunDir(tmp_path)
    run.write_config({"command": "train", "metric": "accuracy"})
    run.write_table("rows", rows)
    run.write_table("summary", rows)
    page = Page(report.write(run).read_text())
    assert "Which optimizer is best" in page.words and "0.75" in page.words


def test_another_kind_of_run_shows_its_tables(tmp_path):
    run = RunDir(tmp_path)
    run.write_config({"command": "later"})
    run.write_table("found", pd.DataFrame({"answer": [42]}))
    page = Page(report.write(run).read_text())
    assert "found" in page.words and "42" in page.words


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(RunDirError, match="holds no run"):
        report.write(RunDir(tmp_path))
    (tmp_path / "config.json").write_text("{half")
    with pytest.raises(RunDirError, match="damaged"):
        report.write(RunDir(tmp_path))
    with pytest.raises(RunDirError, match="without rows"):
        list(pages.of_compare(folder(tmp_path / "empty")))


@pytest.mark.parametrize("harm", [{"layer": None}, {"relative_error": "<b>"}])
def test_a_table_of_another_version_is_named_with_its_folder(harm, tmp_path, table):
    run = folder(tmp_path / "one", table)
    frame = run.table("comparison").assign(**harm)
    whole.write_table(run.folder / "comparison.parquet", frame.dropna(axis=1, how="all"))
    for words in ([], [run.folder, "--out", tmp_path / "page.html"]):
        ended = CliRunner().invoke(app, ["report", *map(str, [run.folder, *words])])
        assert ended.exit_code == 2 and not list(tmp_path.rglob("*.part"))
        assert f"error: {run.folder}" in ended.output and "run it again" in ended.output


def test_no_flipped_bit_of_a_table_is_read_as_another_table(tmp_path):
    path = tmp_path / "table.parquet"
    table = pd.DataFrame({"error": [0.1234, 0.5678], "note": ["a", "b"]})
    whole.write_table(path, table)
    content, refused = path.read_bytes(), 0
    pd.testing.assert_frame_equal(pd.read_parquet(path), table)  # by a reader that knows no sum
    for place in range(0, len(content), 3):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            found = whole.read_table(path)
        except whole.DamagedFile as error:
            assert str(error).startswith(f"{path} is damaged")
            refused += 1
        else:
            pd.testing.assert_frame_equal(found, table)
    assert 3 * refused > 0.98 * len(content)  # all but those of the mark itself


@pytest.mark.parametrize(
    "name", ["~", "a::b", "http:", "*", "new\nline", "<b>x</b>", "no\udcfftext"]
)
def test_the_name_of_a_folder_is_no_address(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = RunDir(name)
    run.write_config({"command": "later", "title": name})
    run.write_table("found", pd.DataFrame({"answer": [42]}))
    assert run.table("found")["answer"].tolist() == [42]
    text = report.write(run).read_text()
    assert "42" in Page(text).words and "<b>x" not in text


def test_the_command_rebuilds_and_refuses(tmp_path, table):
    def call(*words):
        return CliRunner().invoke(app, ["report", *map(str, words)])

    run = folder(tmp_path / "one", table)
    assert call(run.folder).exit_code == 0 and (run.folder / "report.html").is_file()
    out = tmp_path / "page.html"
    assert call(run.folder, run.folder, "--out", out).exit_code == 0
    assert call(run.folder, "--out", out).exit_code == 2
    assert call(run.folder, "--out", out, "--overwrite").exit_code == 0
    missing = call(tmp_path / "nothing")
    assert missing.exit_code == 2 and "is not a folder" in missing.output
    config = json.loads((run.folder / "config.json").read_text())
    assert config["versions"]["fisherlab"] in out.read_text()


def test_two_processes_do_not_write_into_one_folder(tmp_path):
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom fisherlab import whole\n"
        "held = whole.hold(Path(sys.argv[1]))\nprint('held', flush=True)\ntime.sleep(60)\n"
    )
    other = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(whole.FolderBusy, match="another process writes into"):
            RunDir(tmp_path).begin({"command": "compare"})
        assert not list(tmp_path.iterdir())
    finally:
        other.kill()
        other.wait()
        other.stdout.close()
    run = RunDir(tmp_path)
    run.begin({"command": "compare"})
    RunDir(tmp_path).begin({"command": "compare"})  # this process's own
