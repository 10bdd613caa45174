"""The README: its code runs, its tables are what the package says, its picture is there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fisherlab as fl
from fisherlab.cli import COMMANDS
from fisherlab.commands.approximations import table

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, flags=re.S | re.M)


def run(code, folder, *paths):
    """Run Python in a process of its own: what a README defines is registered for good."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [*paths, ROOT]))}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def listed(heading):
    """`{first cell: row}` of the table below a heading; a bar inside a cell is escaped."""
    section = README.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in section.splitlines() if line[:1] == "|"]
    cells = [[cell.strip().strip("`").replace("\\|", "|") for cell in row] for row in rows[2:]]
    return {row[0]: row for row in cells}


def test_the_library_in_a_few_lines_runs(tmp_path):
    code = BLOCKS[0]
    assert len([line for line in code.splitlines() if line]) <= 12
    done = run(code + BLOCKS[-1], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "tekfac" in done.stdout and (tmp_path / "error.png").stat().st_size > 5000


def test_the_table_of_approximations_is_what_is_registered():
    theirs = listed("Approximations")
    ours = {row.name: [row.name, row.equation, row.source] for row in table().itertuples()}
    assert theirs == ours


def test_every_file_and_command_that_is_named_exists():
    for path in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"`fisherlab (\w+)", README):
        assert name in COMMANDS, name
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", README, flags=re.M):
        assert re.search(rf"^{target}:", makefile, flags=re.M), target


CHECK = """
import fisherlab as fl, torch
from typer.testing import CliRunner
from fisherlab.cli import app
import test_readme

assert fl.__file__.startswith({copy!r}), fl.__file__
assert "neuron" in fl.approximations.names() and "neuron" in fl.optim.names()
torch.manual_seed(0)
model, x = torch.nn.Linear(3, 2), torch.randn(6, 3)
frame = fl.compare(model, torch.nn.CrossEntropyLoss(), x, torch.arange(6) % 2).frame
assert frame[frame["approximation"] == "neuron"]["relative_error"].between(0, 1).all()
assert "neuron" in CliRunner().invoke(app, ["compare", "--help"], terminal_width=200).output
try:
    test_readme.test_the_table_of_approximations_is_what_is_registered()
except AssertionError:
    print("the README misses it")
# last: pytest has imports of its own, and plugins with many
import os, pytest
os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
laws = ["tests/laws/test_registry_laws.py", "-q", "-k", "neuron", "-p", "no:cacheprovider"]
raise SystemExit(pytest.main(laws))
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The package with the README's approximation as one new file in it, and the tests."""
    folder = tmp_path_factory.mktemp("copy")
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("fisherlab", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("README.md", "Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    (folder / "fisherlab" / "approximations" / "neuron.py").write_text(
        '"""One number per output."""\n\n' + BLOCKS[1]
    )
    return folder


def test_one_new_file_is_all_that_a_new_approximation_needs_and_the_laws_find_it(copy):
    done = run(CHECK.format(copy=str(copy)), copy, copy, copy / "tests" / "commands")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert "the README misses it" in done.stdout
    assert re.search(r"(\d+) passed", done.stdout)[1] != "0"


def test_the_statistic_of_its_own_is_the_sum_it_says():
    space: dict = {}
    exec(BLOCKS[2], space)
    x = torch.rand(6, 2, 3, generator=torch.Generator().manual_seed(0))
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Flatten(), torch.nn.Linear(4, 3))
    layer = fl.capture(
        model.double(), torch.nn.CrossEntropyLoss(), x.double(), torch.arange(6) % 3
    )["0"]
    w = layer.output_gradients.square().sum((0, 2, 3))
    A = torch.einsum("n,nti,ntj->ij", w, layer.inputs, layer.inputs) / 12
    torch.testing.assert_close(space["weighted"](layer).A, A)
