"""A loader, or several captures, is one sample under one mean, whatever its batches count."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from torch import nn
from torch.func import functional_call

import fisherlab as fl

IGNORED = -100


def padded(criterion, shape=(6, 5)):
    """Six examples, whose labels are ignored in part of the first three; a small net."""
    torch.manual_seed(0)
    x = torch.randn(*shape, dtype=torch.float64)
    y = torch.randint(3, (6, *shape[1:-1]))
    y.view(6, -1)[:2, 0] = IGNORED
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    return model, criterion, x, y


class Words(nn.Module):
    """Class scores on axis 1."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x).movedim(-1, 1)


CASES = {
    "padding": lambda: padded(nn.CrossEntropyLoss()),
    "padded tokens": lambda: padded(nn.CrossEntropyLoss(), (6, 3, 5)),
    "class weights": lambda: padded(
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5, 0.2]).double())
    ),
    "sum": lambda: padded(nn.CrossEntropyLoss(reduction="sum")),
}
KINDS = [
    (c, t) for c in CASES for t in ("empirical", "exact") if (c, t) != ("class weights", "exact")
]


def given(case):
    model, criterion, x, y = CASES[case]()
    return (Words(model) if x.ndim == 3 else model), criterion, x, y


def split(x, y):
    return [(x[:3], y[:3]), (x[3:4], y[3:4]), (x[4:], y[4:])]


def dense(model, criterion, x, y, name, kind):
    """`(1/M) sum_n J^T H J` of one affine layer, by autograd on the whole batch's loss."""
    parameters = {k: v.detach() for k, v in model.named_parameters()}
    mine = [f"{name}.weight", f"{name}.bias"]
    M, total = len(x), torch.zeros((), dtype=torch.float64)

    def outputs(weight, bias, n):
        new = parameters | dict(zip(mine, (weight, bias), strict=True))
        return functional_call(model, new, (x[n : n + 1],))

    weights = criterion.weight if criterion.weight is not None else torch.ones(3).double()
    counted = y != IGNORED
    Z = weights[y[counted]].sum() if criterion.reduction == "mean" else float(M)
    blocks = []
    for n in range(M):
        W, b = (parameters[k] for k in mine)
        J = torch.autograd.functional.jacobian(lambda W, b, n=n: outputs(W, b, n).flatten(), (W, b))
        J = torch.cat([J[0], J[1][..., None]], -1).flatten(1)
        scores = outputs(W, b, n).reshape(3, -1)
        p = scores.softmax(0)
        H = torch.zeros(p.numel(), p.numel(), dtype=torch.float64)
        v = torch.zeros_like(p)
        labels = y[n].reshape(-1)
        for t in (labels != IGNORED).nonzero()[:, 0].tolist():
            own = torch.arange(3) * p.shape[1] + t
            H[own[:, None], own] += M / Z * (p[:, t].diag() - torch.outer(p[:, t], p[:, t]))
            hot = nn.functional.one_hot(labels[t], 3).double()
            v[:, t] = M / Z * weights[labels[t]] * (p[:, t] - hot)
        blocks.append(J.mT @ (H if kind == "exact" else torch.outer(v.flatten(), v.flatten())) @ J)
    return total + sum(blocks) / M


@pytest.mark.parametrize(("case", "kind"), KINDS)
def test_the_exact_block_of_captures_is_that_of_the_sample(case, kind):
    model, criterion, x, y = given(case)
    parts = [fl.capture(model, criterion, *b, fisher_type=kind) for b in split(x, y)]
    for name in parts[0]:
        expected = dense(model, criterion, x, y, name, kind)
        layers = [part[name] for part in parts]
        found = fl.Exact()(*layers).dense()
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("case", "kind"), KINDS)
def test_a_loader_is_measured_as_its_sample(case, kind):
    model, criterion, x, y = given(case)
    clocks = [
        "build_seconds",
        "decompose_seconds",
        "shared_seconds",
        "solve_seconds",
        "memory_bytes",
        "formed_bytes",
    ]
    found = [
        fl.compare(model, criterion, *data, fisher_type=kind).frame
        for data in ((x, y), (split(x, y),))
    ]
    one, many = (frame.drop(columns=clocks, errors="ignore") for frame in found)
    assert len(one) > 10
    for frame in (one, many):
        # the loss of the exact block against itself is 0: all its digits are rounding
        itself = frame.approximation == "exact"
        assert itself.any() and frame.loc[itself, "stein_loss"].abs().max() < 2e-9
        frame.loc[itself, "stein_loss"] = 0.0
    pd.testing.assert_frame_equal(many, one, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_running_means_of_one_update_are_those_of_the_sample(case):
    model, criterion, x, y = given(case)
    take = lambda *batch: fl.capture(model, criterion, *batch, fisher_type="empirical")  # noqa: E731
    whole, parts = take(x, y), [take(*b) for b in split(x, y)]
    for name, layer in whole.items():
        running = fl.approximations.running.Running(fl.EKFAC())
        layers = [part[name] for part in parts]
        running.update(*layers)
        running.refresh_basis()
        running.correct(*layers)
        expected = fl.EKFAC()(layer).dense()
        torch.testing.assert_close(running.block().dense(), expected, rtol=1e-9, atol=1e-12)


def test_a_reference_of_several_batches_is_one_sample():
    model, criterion, x, y = given("padding")
    torch.manual_seed(5)
    seen = torch.randn(8, 5, dtype=torch.float64), torch.randint(3, (8,))
    rows = [
        fl.compare(model, criterion, *seen, approximations=["kfac"], reference=reference).frame
        for reference in ((x, y), split(x, y))
    ]
    for column in ("population_error", "diagonal_share"):
        torch.testing.assert_close(
            *(torch.tensor(r[column].to_numpy()) for r in rows), equal_nan=True
        )


def test_a_callable_is_never_given_the_first_batch_for_all():
    model, criterion, x, y = given("padding")
    makers = {"mine": lambda layer: fl.KFAC()(layer)}
    one = fl.compare(model, criterion, x, y, approximations=makers).frame
    many = fl.compare(model, criterion, split(x, y), approximations=makers).frame
    assert one["relative_error"].notna().all()
    assert many["relative_error"].isna().all()
    assert many["note"].str.contains("pass one batch, or an Approximation").all()
