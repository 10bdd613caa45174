"""The documentation as built: strict, offline, and right in a browser at two widths."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from browser import faults

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs", reason="mkdocs is not installed (pip install .[docs])")
    pytest.importorskip(
        "mkdocstrings", reason="mkdocstrings is not installed (pip install .[docs])"
    )
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", folder]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return folder


def pages(site):
    # the 404 page has absolute addresses, for a server
    return [page for page in sorted(site.rglob("*.html")) if page.name != "404.html"]


@pytest.mark.slow
def test_pages_are_right_in_a_browser(site):
    assert len(pages(site)) >= 20
    assert faults(pages(site)) == []


@pytest.mark.slow
def test_equations_are_mathml_and_nothing_is_fetched(site):
    index = (site / "index.html").read_text(encoding="utf-8")
    assert '<math xmlns="http://www.w3.org/1998/Math/MathML" display="block"' in index
    for page in pages(site):
        text = page.read_text(encoding="utf-8")
        assert 'class="arithmatex"' not in text, page
        assert not re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="https?://', text), page


@pytest.mark.slow
def test_docstrings_and_notebooks_are_there(site):
    metrics = (site / "api" / "metrics.html").read_text(encoding="utf-8")
    assert "kfac_error_split" in metrics and "dependence + positions + noise" in metrics
    names = {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert names <= {page.stem for page in pages(site)}
