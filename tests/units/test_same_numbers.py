"""The same numbers: of one seed to the last byte, in every order, of sparse and dense inputs."""

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fisherlab as fl

CE = nn.CrossEntropyLoss()
METHODS = ["kfac", "eva", "tekfac", "kronecker_optimal", "diagonal", "ekfac"]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))


def batch() -> tuple[Tensor, Tensor]:
    x = torch.randn(10, 5, generator=torch.Generator().manual_seed(1))
    return x * (x > 0), torch.arange(10) % 3


def table(methods=METHODS, seed: int = 0, **options) -> str:
    """The CSV file of a comparison without its seconds, by layer, method and damping."""
    generator = torch.Generator().manual_seed(seed)
    found = fl.compare(
        *(net(), CE, *batch()),
        approximations=methods,
        fisher_type="mc",
        generator=generator,
        **options,
    ).frame
    rows = found.sort_values(["layer", "approximation", "damping"])
    return rows.drop(columns=[c for c in rows if c.endswith("_seconds")]).to_csv(index=False)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_one_seed_is_one_table() -> None:
    first = table(seed=3)
    assert table(seed=3) == first
    assert table(seed=4) != first


def test_orders_do_not_count() -> None:
    wanted = table(layers=["0", "2", "4"])
    assert table(METHODS[::-1], layers=["4", "0", "2"]) == wanted


@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr"])
def test_a_sparse_input_is_the_dense_one(layout: str) -> None:
    x, y = batch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sparse = getattr(x, layout)()
    rows = [fl.compare(net(), CE, given, y, approximations=METHODS).frame for given in (x, sparse)]
    for column in ("relative_error", "cosine", "direction_cosine"):
        assert np.allclose(rows[0][column], rows[1][column], rtol=1e-4)
    models = net(), net()
    for model, given in zip(models, (x, sparse), strict=True):
        optimizer = fl.optim.create("kfac", model)
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(model(given), y).backward()
            optimizer.step()
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)
