"""What every test shares, and the variants of an environment that no number may depend on.

Neither torch nor matplotlib is loaded here: the process that hands tests to others needs neither.
"""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

if TYPE_CHECKING:
    import torch

hypothesis.settings.register_profile("fisherlab", deadline=None, derandomize=True)
hypothesis.settings.load_profile("fisherlab")

# FISHERLAB_ORDER=7: files, and the tests in each, in the random order of seed 7.
ORDER = os.environ.get("FISHERLAB_ORDER")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The order of `FISHERLAB_ORDER`, the same in every process; a file's tests stay together."""
    if ORDER is None:
        return
    order = random.Random(int(ORDER))
    files: dict[str, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.nodeid.partition("::")[0], []).append(item)
    groups = [files[name] for name in sorted(files)]
    order.shuffle(groups)
    for group in groups:
        order.shuffle(group)
    items[:] = [item for group in groups for item in group]


def pytest_terminal_summary(terminalreporter) -> None:
    """The seed that repeats a failure of this run."""
    if ORDER is not None:
        terminalreporter.write_line(f"in random order: FISHERLAB_ORDER={ORDER}")


# folders that torch, torchrun and pytest itself make
THEIRS = ("torchinductor_", "torchelastic_", "pytest-of-")


@pytest.fixture(scope="session", autouse=True)
def temporary(tmp_path_factory) -> Iterator[Path]:
    """Where temporary files go, in this process and in those that tests start."""
    folder, before = tmp_path_factory.mktemp("temporary"), tempfile.tempdir
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(folder))
        tempfile.tempdir = str(folder)
        yield folder
        tempfile.tempdir = before


@pytest.fixture(scope="session", autouse=True)
def few_threads() -> None:
    """On matrices this small, two threads mostly wait for each other."""
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


@pytest.fixture(autouse=True)
def nothing_left(temporary) -> Iterator[None]:
    """No test leaves a temporary file behind."""
    before = set(temporary.iterdir())
    yield
    new = {path.name for path in set(temporary.iterdir()) - before}
    left = sorted(name for name in new if not name.startswith(THEIRS))
    assert not left, f"left in the folder of temporary files: {left}"


@pytest.fixture(autouse=True)
def seeded() -> None:
    """A test draws the same, whichever tests ran before it in its process."""
    import torch

    # torch.manual_seed keeps the stack, as text, for each kind of accelerator that is not there
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(0)


@pytest.fixture
def generator() -> torch.Generator:
    import torch

    return torch.Generator().manual_seed(0)


@pytest.fixture
def quick_pictures(monkeypatch):
    """Pictures of few points, with letters that need no font cut out: the same, made faster."""
    quicken(monkeypatch)


def quicken(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `quick_pictures` does, for a fixture of a whole module."""
    from fisherlab.plots import theme

    monkeypatch.setattr(theme, "DPI", 50)
    monkeypatch.setitem(theme.STYLE, "savefig.dpi", 50)
    monkeypatch.setitem(theme.STYLE, "pdf.fonttype", 3)


@pytest.fixture
def real_pictures(quick_pictures) -> None:
    """Asked for where a test looks at the pictures of a run."""


@pytest.fixture(scope="session")
def square(tmp_path_factory):
    """One small picture, as PNG and PDF."""
    import matplotlib.pyplot as plt

    from fisherlab.plots import theme

    figure = plt.figure(figsize=(1, 1))
    paths = theme.save(figure, tmp_path_factory.mktemp("square") / "square")
    plt.close(figure)
    return [path.read_bytes() for path in paths]


@pytest.fixture
def no_pictures(request, monkeypatch, square):
    """Runs whose rows matter: each picture that they write is one and the same."""
    if "real_pictures" in request.fixturenames:
        return
    import matplotlib.pyplot as plt

    from fisherlab import plots

    def save(figure, stem):
        stem.parent.mkdir(parents=True, exist_ok=True)
        paths = [stem.with_name(stem.name + suffix) for suffix in (".png", ".pdf")]
        for path, content in zip(paths, square, strict=True):
            path.write_bytes(content)
        plt.close(figure)
        return paths

    monkeypatch.setattr(plots, "save", save)
