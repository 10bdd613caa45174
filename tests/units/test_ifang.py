"""IFANG's rows: a batch reduced to the means of its groups, against dense factors (ANG 2.3)."""

import dense
import pytest
import torch
from formulas import found_and_expected
from references import relative
from torch import nn

import fisherlab as fl
from fisherlab.blocks import BlockError
from fisherlab.optim.ang import ANG
from fisherlab.testing.blocks import matrix_power


def factors(p: dense.Pairs, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`(1/s') sum_k v_k v_k^T` of the groups' means, output side first, by loops."""
    n = p.M
    groups = [range(k * n // rows, (k + 1) * n // rows) for k in range(rows)]
    G = [sum(p.label_g[j].sum(0) for j in group) / len(group) for group in groups]
    A = [sum(p.a[j].mean(0) for j in group) / len(group) for group in groups]
    return tuple(sum(torch.outer(v, v) for v in side) / rows for side in (G, A))


@pytest.mark.parametrize("fisher_type", ["empirical", "mc"])
@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("case", ["linear", "conv", "groups"])
def test_rows_are_the_groups_means(case, rows, fisher_type):
    layer, p = found_and_expected(case, fisher_type)
    approximation = fl.IFANG(rows=rows)
    block, (G, A) = approximation(layer), factors(p, rows)
    assert relative(block.dense(), torch.kron(G, A)) < 1e-10
    expected = torch.kron(*(matrix_power(side, -1, 0.3) for side in (G, A)))
    assert relative(approximation.damped(block, 0.3).dense(), expected) < 1e-10


@pytest.mark.parametrize("case", ["linear", "conv"])
def test_a_row_per_example_is_kfac(case):
    layer, p = found_and_expected(case, "empirical")
    assert relative(fl.IFANG(rows=p.M)(layer).dense(), fl.KFACReduce()(layer).dense()) < 1e-10


def test_rows_that_cannot_be_are_refused():
    layer, p = found_and_expected("linear", "empirical")
    with pytest.raises(BlockError, match=rf"rows={p.M + 1}.* of layer .* got {p.M}"):
        fl.IFANG(rows=p.M + 1)(layer)
    with pytest.raises(BlockError, match="whole number >= 1, got 0"):
        fl.IFANG(rows=0)
    with pytest.raises(BlockError, match="rank 2 at most, so their inverse needs damping"):
        fl.IFANG(rows=2).damped(fl.IFANG(rows=2)(layer), 0.0)


def test_a_step_with_rows_is_that_of_the_dense_inverse():
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    x, y = torch.randn(7, 4).double(), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    options = {"total_steps": 9, "schedule": lambda p: 0.0, "momentum": 0.0}
    optimizer = ANG(model, fl.IFANG(rows=3), lr=1.0, damping=0.2, **options)
    before = torch.cat([model.weight, model.bias[:, None]], 1).detach().clone()
    nn.CrossEntropyLoss()(model(x), y).backward()
    gradient = torch.cat([model.weight.grad, model.bias.grad[:, None]], 1)
    g = (before[:, :-1] @ x.T + before[:, -1:]).T.softmax(1) - nn.functional.one_hot(y, 3)
    a = torch.cat([x, torch.ones(7, 1).double()], 1)
    p = dense.Pairs(a[:, None], g[None, :, None], g[:, None], 1.0)
    G, A = (matrix_power(side, -1, 0.2) for side in factors(p, 3))
    optimizer.step()
    after = torch.cat([model.weight, model.bias[:, None]], 1).detach()
    assert relative(before - after, G @ gradient @ A) < 1e-9
