"""The kept notebooks: a question, pictures of a clean run, and a last cell that can fail."""

import ast
import importlib
import json
import os
import re
import runpy
import types
from pathlib import Path

import nbformat
import pytest

import fisherlab

FOLDER = Path(__file__).parents[2] / "notebooks"
PATHS = sorted(FOLDER.glob("*.ipynb"))
digest = runpy.run_path(str(FOLDER / "keep.py"))["digest"]


@pytest.fixture(params=PATHS, ids=lambda path: path.stem)
def notebook(request):
    return nbformat.read(request.param, as_version=4)


def outputs(notebook):
    return [o for cell in notebook.cells for o in cell.get("outputs", [])]


def test_there_are_at_least_seven():
    assert len(PATHS) >= 7


def test_it_asks_a_question_and_its_last_cell_asserts(notebook):
    first, last = notebook.cells[0], notebook.cells[-1]
    assert first.cell_type == "markdown" and first.source.startswith("# ")
    assert "?" in first.source, "the first cell asks no question"
    assert last.cell_type == "code" and re.search(r"^ *assert ", last.source, re.MULTILINE)


def test_equations_are_between_dollars(notebook):
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            outside = re.sub(r"\$\$.*?\$\$|\$.*?\$|`.*?`", "", cell.source, flags=re.DOTALL)
            assert not re.search(r"\\[a-zA-Z]|\$", outside), outside


def test_every_cell_was_run_once_in_order_without_a_warning_or_an_error(notebook):
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert {o.output_type for o in outputs(notebook)} <= {
        "display_data",
        "execute_result",
        "stream",
    }
    errors = [o.text for o in outputs(notebook) if o.get("name") == "stderr"]
    assert [text for text in errors if "Warning" in text] == []


def test_pictures_are_kept(notebook):
    assert any("image/png" in o.get("data", {}) for o in outputs(notebook))


def test_its_outputs_are_those_of_its_code_in_full(notebook):
    """`make notebooks-keep` stamps them; a cell that was edited since asks for another run."""
    stamp = notebook.metadata.get("fisherlab")
    assert stamp is not None, "not kept by `make notebooks-keep`"
    assert stamp["fast"] is False
    assert stamp["code"] == digest(notebook)


def test_it_uses_public_names_alone(notebook):
    """Each is in the `__all__` of its package, or an attribute of `fl` that `dir(fl)` lists."""
    code = "\n".join(c.source for c in notebook.cells if c.cell_type == "code")
    tree = ast.parse(code)
    brought = {  # the user's name -> the module's
        name.asname or name.name: name.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for name in node.names
        if name.name.split(".")[0] == "fisherlab"
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "fisherlab":
            for name in node.names:
                found = public(f"{node.module}.{name.name}")
                if isinstance(found, types.ModuleType):
                    brought[name.asname or name.name] = found.__name__
    for node in ast.walk(tree):
        words = ast.unparse(node).split(".") if isinstance(node, ast.Attribute) else []
        if words and words[0] in brought and all(word.isidentifier() for word in words):
            public(".".join([brought[words[0]], *words[1:]]))


def public(dotted):
    """What a dotted name of ours is, as far as it goes through modules."""
    here = fisherlab
    for word in dotted.split(".")[1:]:
        if not isinstance(here, types.ModuleType):
            break
        listed = set(dir(here) if here is fisherlab else getattr(here, "__all__", ()))
        package = Path(here.__file__).parent / word / "__init__.py"
        inside = Path(here.__file__).name == "__init__.py" and package.is_file()
        assert word in listed or inside, f"{dotted}: {word} is not public"
        here = importlib.import_module(f"{here.__name__}.{word}") if inside else getattr(here, word)
    return here


def test_a_name_that_is_not_public_is_found():
    assert public("fisherlab.plots.claims.claim") is fisherlab.plots.claims.claim
    for name in ("plots.theme.LOOKS", "experiments.atlas.page.load", "optim.presets", "heap"):
        with pytest.raises(AssertionError, match="not public"):
            public(f"fisherlab.{name}")


def test_it_names_no_machine(notebook):
    text = json.dumps(notebook)
    text = re.sub(r'"image/png": "[^"]*"', "", text)
    assert not re.search(r"/(?:work|home|tmp|root|Users)/\w", text)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # Jupyter's own libraries
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_restarting_and_running_all_cells_gives_no_warning(path, monkeypatch):
    from nbclient import NotebookClient

    monkeypatch.setitem(os.environ, "FISHERLAB_FAST", "1")
    fresh = nbformat.read(path, as_version=4)
    NotebookClient(fresh, timeout=300, kernel_name="python3").execute(cwd=str(path.parent))
    assert [o.text for o in outputs(fresh) if o.get("name") == "stderr"] == []
