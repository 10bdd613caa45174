"""What every test shares."""

import hypothesis
import pytest
import torch

from fisherlab.plots import theme

hypothesis.settings.register_profile("fisherlab", deadline=None, derandomize=True)
hypothesis.settings.load_profile("fisherlab")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """A test draws the same, whichever tests ran before it in its process."""
    torch.manual_seed(0)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def quick_pictures(monkeypatch):
    """Pictures of few points, with letters that need no font cut out: the same, made faster."""
    monkeypatch.setattr(theme, "DPI", 50)
    monkeypatch.setitem(theme.STYLE, "savefig.dpi", 50)
    monkeypatch.setitem(theme.STYLE, "pdf.fonttype", 3)
