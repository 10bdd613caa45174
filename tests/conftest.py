"""What every test shares."""

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("fisherlab", deadline=None, derandomize=True)
hypothesis.settings.load_profile("fisherlab")


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
