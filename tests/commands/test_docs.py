"""The code of the docs runs as it stands, page by page, and their links lead somewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
BLOCK = re.compile(r"(?:<!-- needs (\w+) -->\n)?^```python\n(.*?)^```", flags=re.S | re.M)
PAGES = sorted(DOCS.rglob("*.md"))

# What a page defines is registered for good, so the pages run in one process of their own.
RUNNER = """
import json, sys, traceback
failed = {}
for page, code in json.load(sys.stdin).items():
    try:
        exec(compile(code, page, "exec"), {"__name__": "__main__"})
    except Exception:
        failed[page] = traceback.format_exc()
print("FAILED", json.dumps(failed))
"""


def code_of(page):
    """The page's blocks as one script, without those that need a package that is not installed."""
    from importlib.util import find_spec

    blocks = BLOCK.findall(page.read_text(encoding="utf-8"))
    return "\n".join(code for needs, code in blocks if not needs or find_spec(needs))


def test_the_code_of_every_page_runs(tmp_path):
    import json

    scripts = {
        str(page.relative_to(DOCS)): code_of(page)
        for folder in ("howto", "explain", ".")
        for page in sorted((DOCS / folder).glob("*.md"))
        if page.name in ("start.md", "index.md") or folder != "."
    }
    scripts = {page: code for page, code in scripts.items() if code}
    assert len(scripts) >= 7
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", RUNNER],
        input=json.dumps(scripts),
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    failed = json.loads(done.stdout.rsplit("FAILED ", 1)[1])
    assert not failed, "\n".join(f"{page}:\n{text}" for page, text in failed.items())
    assert (tmp_path / "error.png").stat().st_size > 5000


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_every_link_of_a_page_leads_somewhere(page):
    made = {"notebooks", "api", "results"}  # docs/hooks.py makes these pages and pictures
    for target in re.findall(
        r"\]\(([^)#]+?\.(?:md|png|svg))(?:#[^)]*)?\)", page.read_text("utf-8")
    ):
        path = (page.parent / target).resolve().relative_to(DOCS)
        if path.parts[0] == "notebooks" and path.stem != "index":
            assert (ROOT / "notebooks" / f"{path.stem}.ipynb").is_file(), target
        elif path.parts[0] not in made and path.name not in ("cli.md", "glossary.md"):
            assert (DOCS / path).is_file(), target
