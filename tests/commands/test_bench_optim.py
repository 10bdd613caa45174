"""The bench of optimizers: its rows keep their intervals, and a row that does not is caught."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from fisherlab.experiments.bench.optim import (
    MLP_ROWS,
    RESNET_ROWS,
    Counter,
    Row,
    Run,
    check_changes,
    measure,
    random_batches,
)


def tiny() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32, 10)
        )


@pytest.mark.filterwarnings("ignore:FNGD's shared")
@pytest.mark.parametrize("row", [*RESNET_ROWS, *MLP_ROWS], ids=lambda row: row.title)
def test_rows_keep_their_intervals(row: Row) -> None:
    (found,) = measure(tiny, random_batches((1, 4, 4), 36, 2), (row,), steps=25, repeats=1)
    assert found["ratio"] > 0 and found["optimizer"] == row.title
    assert found["statistics_every"] == row.options.get("statistics_every")


def test_a_row_that_does_less_than_it_states_is_caught() -> None:
    row = Row("kfac", {"statistics_every": 10, "basis_every": 20, "warmup": 0})
    run = Run(tiny, row, random_batches((1, 4, 4), 8, 2))
    counter = Counter(run.optimizer)
    run.seconds(20)
    check_changes(row, counter, 20)
    stated = replace(row, options={"statistics_every": 5, "basis_every": 20, "warmup": 0})
    with pytest.raises(AssertionError, match="kfac states"):
        check_changes(stated, counter, 20)
