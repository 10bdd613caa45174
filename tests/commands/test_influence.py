"""The study of influence and Laplace: its parts against slow definitions, its page of its rows."""

import runpy
from pathlib import Path

import pytest
import torch
from references import randn, relative
from scipy.stats import spearmanr
from torch import nn

import fisherlab as fl
from fisherlab import whole
from fisherlab.testing.cases import captured

FOLDER = Path(__file__).parents[2] / "data" / "results"


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(FOLDER / "influence.py"))


def test_the_page_is_made_of_the_rows_in_the_repository(script):
    rows = whole.read_table(FOLDER / "influence.parquet")
    assert (FOLDER / "influence.md").read_text(encoding="utf-8") == script["page"](rows)
    assert len(rows.drop_duplicates(["network", "seed"])) == len(script["NETWORKS"]) >= 8


def test_scores_are_spearmans_and_a_sure_posterior_is_the_network(script):
    one, other = randn(9, 4), randn(9, 4, seed=1)
    expected = [spearmanr(one[:, k], other[:, k]).statistic for k in range(4)]
    assert script["correlations"](one, other).tolist() == pytest.approx(expected, abs=1e-12)
    f, y = randn(20, 5), torch.arange(20) % 5
    nll, calibration = script["judged"](f, torch.zeros(20, 5, 5).double(), y)
    assert nll == pytest.approx(float(nn.functional.cross_entropy(f, y)), rel=1e-5)
    assert 0 < calibration < 1


def test_jacobians_and_solvers_are_the_dense_ones(script):
    model, x = script["made"]("mean", 0), randn(2, 1, 8, 8)
    J = script["jacobians"](model, ["head"], x)["head"]
    model(x)[1, 3].backward()
    head = model.head
    assert relative(J[1, 3], torch.cat([head.weight.grad, head.bias.grad[:, None]], 1)) < 1e-12
    layer, V = captured("full"), randn(3, 3, 5)
    F = fl.Exact()(layer).dense()
    for name, method in (("exact", fl.Exact()), ("kfac", fl.KFAC())):
        X = method(layer)
        dense = X.dense() + 0.1 * torch.eye(len(F)).double()
        expected = torch.linalg.solve(dense, V.flatten(1).T).T.view_as(V)
        assert relative(script["solver"](name, X, F)(V, 0.1), expected) < 1e-10
