"""What only a CUDA device can show: memory that runs out, and nccl. `make gpu` runs the rest."""

import os

import pytest
import torch
from torch import nn

import fisherlab as fl
from fisherlab.blocks import contractions

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]


def problem(device: str = "cuda") -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 256, 10)
    )
    x = torch.randn(64, 3, 16, 16, generator=generator)
    y = torch.randint(10, (64,), generator=generator)
    return model.to(device), x.to(device), y.to(device)


def test_a_product_that_runs_out_of_memory_is_made_in_halves() -> None:
    names = ["kfac", "ekfac"]
    expected = fl.compare(*problem_with_criterion(), approximations=names).frame
    whole = contractions.WORKSPACE
    torch.cuda.empty_cache()
    held = torch.cuda.memory_allocated()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((held + 96 * 2**20) / total)
    try:
        found = fl.compare(*problem_with_criterion(), approximations=names).frame
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert whole == contractions.WORKSPACE
    measured = found["note"] == ""
    close = found["relative_error"][measured] - expected["relative_error"][measured]
    assert close.abs().max() < 1e-3
    # what does not fit in any part says so
    assert found["note"][~measured].str.contains("memory").all()


def problem_with_criterion() -> tuple:
    model, x, y = problem()
    return model, nn.CrossEntropyLoss(), x, y


def test_one_rank_by_nccl_measures_what_no_rank_does(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = fl.compare(*problem_with_criterion(), approximations=["kfac"]).frame
    for name, value in {
        "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": os.environ.get("MASTER_PORT", "29541"),
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    fl.distributed.start()
    try:
        assert torch.distributed.get_backend() == "nccl"
        found = fl.compare(*problem_with_criterion(), approximations=["kfac"]).frame
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(
        torch.tensor(found["relative_error"].values),
        torch.tensor(expected["relative_error"].values),
    )
