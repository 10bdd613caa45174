"""Run the notebooks in full and keep their outputs: `python notebooks/keep.py [NAME ...]`.

Each gets a stamp in its metadata: the commit it ran on, where its data came from, and a digest of
its code. A test refuses a notebook whose outputs are of other code, or of a run in fast mode.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent


def digest(notebook: nbformat.NotebookNode) -> str:
    """Of the code, cell by cell; texts may change without a new run."""
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\0".join(code).encode()).hexdigest()[:16]


def commit() -> str:
    """The commit that is checked out; with `+` where files of the package have changed since."""
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=FOLDER,
        capture_output=True,
        text=True,
        check=True,
    )
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "../fisherlab"], cwd=FOLDER)
    return found.stdout.strip() + ("+" if changed.returncode else "")


def keep(path: Path) -> None:
    """Execute one notebook from a fresh kernel and write it back with its stamp."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=3600, kernel_name="python3").execute(cwd=str(path.parent))
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if not is_bar(o)]
    data = "from FISHERLAB_DATA" if os.environ.get("FISHERLAB_DATA") else "bundled"
    stamp = {"commit": commit(), "code": digest(notebook), "data": data, "fast": False}
    notebook.metadata["fisherlab"] = stamp
    nbformat.write(notebook, path)


def is_bar(output: nbformat.NotebookNode) -> bool:
    """Whether an output is a progress bar, which is nothing to keep."""
    widget = "application/vnd.jupyter.widget-view+json" in output.get("data", {})
    return widget or (output.get("name") == "stderr" and "%|" in output.text)


def main(names: list[str]) -> None:
    """Keep the notebooks whose names begin with one of `names`; all without."""
    os.environ.pop("FISHERLAB_FAST", None)
    for path in sorted(FOLDER.glob("*.ipynb")):
        if not names or any(path.name.startswith(name) for name in names):
            print(path.stem, flush=True)
            keep(path)


if __name__ == "__main__":
    main(sys.argv[1:])
