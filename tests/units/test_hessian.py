"""The Hessian's block of a layer, and how far the Fisher blocks are from it."""

import numpy as np
import pytest
import torch
from references import randn, relative
from torch import Tensor, nn
from torch.func import functional_call

import fisherlab as fl
from fisherlab.extract import CaptureError, hessian_blocks
from fisherlab.metrics import hessian_split
from fisherlab.testing import check_block

CRITERIA = {
    "ce": nn.CrossEntropyLoss(),
    "ce sum": nn.CrossEntropyLoss(reduction="sum"),
    "mse": nn.MSELoss(),
}


def reverse(loss, joint: Tensor) -> Tensor:
    return torch.autograd.functional.hessian(loss, joint)


def forward_over_reverse(loss, joint: Tensor) -> Tensor:
    return torch.func.hessian(loss)(joint)


def problem(kind: str) -> tuple[nn.Sequential, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "conv":
            layers = [nn.Conv2d(2, 4, 2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)]
            return nn.Sequential(*layers).double(), randn(6, 2, 3, 3)
        layers = [nn.Linear(4, 3, bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(6, 3)]
        return nn.Sequential(*layers).double(), randn(6, 2, 4)


def labels(criterion: nn.Module) -> Tensor:
    return randn(6, 3, seed=1) if isinstance(criterion, nn.MSELoss) else torch.arange(6) % 3


def dense(
    model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor, name: str, hessian=reverse
) -> Tensor:
    """torch's Hessian of the loss as a function of `[W b]`, of the mean over examples."""
    module = model.get_submodule(name)
    parts = [module.weight.flatten(1)]
    parts += [] if module.bias is None else [module.bias[:, None]]
    joint = torch.cat(parts, 1).detach()

    def loss(joint: Tensor) -> Tensor:
        weight = joint if module.bias is None else joint[:, :-1]
        found = {f"{name}.weight": weight.reshape(module.weight.shape)}
        if module.bias is not None:
            found[f"{name}.bias"] = joint[:, -1]
        value = criterion(functional_call(model, found, (x,)), y)
        return value / len(x) if criterion.reduction == "sum" else value

    return hessian(loss, joint).detach().reshape(joint.numel(), -1)


@pytest.mark.parametrize("kind", ["conv", "sequence"])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_the_block_is_that_of_torch(kind, criterion):
    criterion = CRITERIA[criterion]
    (model, x), y = problem(kind), labels(criterion)
    blocks = hessian_blocks(model, criterion, x, y)
    assert set(blocks) == {"0", "3"}
    for name, block in blocks.items():
        expected = dense(model, criterion, x, y, name)
        assert relative(block.dense(), expected) < 1e-9
        V = randn(2, *block.shape)
        assert relative((block @ V).flatten(1), V.flatten(1) @ expected) < 1e-9
    # softmax's curvature at the last layer is the Gauss-Newton matrix itself
    ours = fl.Exact()(fl.capture(model, criterion, x, y)["3"]).dense()
    assert relative(blocks["3"].dense(), ours) < 1e-10


@pytest.mark.slow  # forward mode compiles torch's decompositions first
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_block_is_that_of_torch_func():
    criterion = CRITERIA["ce"]
    (model, x), y = problem("conv"), labels(criterion)
    for name, block in hessian_blocks(model, criterion, x, y).items():
        expected = dense(model, criterion, x, y, name, forward_over_reverse)
        assert relative(block.dense(), expected) < 1e-9


def test_a_criterion_of_means_and_variances_has_a_hessian():
    model, x, y = nn.Sequential(nn.Linear(3, 4), nn.Softplus()).double(), randn(6, 3), randn(6, 2)

    def by_halves(outputs, y):
        return nn.GaussianNLLLoss()(outputs[:, :2], y, outputs[:, 2:])

    by_halves.reduction = "mean"
    block = hessian_blocks(model, nn.GaussianNLLLoss(), x, y)["0"]
    assert relative(block.dense(), dense(model, by_halves, x, y, "0")) < 1e-9


def test_nothing_moves():
    model, x = problem("conv")
    model[0].weight.grad = randn(*model[0].weight.shape)
    before, stream = model[0].weight.grad.clone(), torch.get_rng_state()
    hessian_blocks(model, CRITERIA["ce"], x, labels(CRITERIA["ce"]))
    assert torch.equal(model[0].weight.grad, before) and model[3].weight.grad is None
    assert torch.equal(stream, torch.get_rng_state()) and model.training


def test_compare_measures_against_it():
    criterion = CRITERIA["ce"]
    (model, x), y = problem("conv"), labels(criterion)
    frame = fl.compare(
        model, criterion, x, y, reference="hessian", approximations=["exact", "kfac", "tkfac"]
    )
    assert "measured against the Hessian of the loss" in frame.about
    layers = fl.capture(model, criterion, x, y)
    for row in frame.frame.itertuples():
        H = dense(model, criterion, x, y, row.layer)
        keys = [key for key, layer in layers.items() if layer.name == row.layer]
        make = fl.approximations.get(row.approximation)()
        X = torch.block_diag(*(make(layers[key]).dense() for key in keys))
        assert row.relative_error == pytest.approx(float((X - H).norm() / H.norm()), abs=1e-9)
        assert row.trace_ratio == pytest.approx(float(X.trace() / H.trace()), rel=1e-9)
        assert row.cosine == pytest.approx(float((X * H).sum() / X.norm() / H.norm()), rel=1e-9)
        values = torch.linalg.eigvalsh(H)
        negative = float(-values.clamp(max=0).sum() / values.abs().sum())
        assert f"{negative:.1%} of the Hessian's spectrum is negative" in row.note
        assert (
            torch.tensor([row.direction_cosine, row.stein_loss, row.optimality_gap]).isnan().all()
        )
    halves = [(x[:2], y[:2]), (x[2:], y[2:])]
    parts = fl.compare(model, criterion, halves, reference="hessian", approximations=["kfac"])
    whole = frame.frame.query("approximation == 'kfac'")
    assert parts.frame.relative_error.to_numpy() == pytest.approx(whole.relative_error.to_numpy())


def test_batches_of_other_weights_have_the_hessian_of_their_joint_mean():
    (model, x), y = problem("sequence"), torch.tensor([0, 1, -100, 2, -100, -100])
    criterion = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 0.1, 3.0]).double())
    parts = [(x[:2], y[:2]), (x[2:], y[2:])]
    options = {"reference": "hessian", "approximations": ["kfac"]}
    whole = fl.compare(model, criterion, x, y, **options).frame
    table = fl.compare(model, criterion, parts, **options).frame
    for column in ("relative_error", "trace_ratio", "cosine"):
        assert np.allclose(whole[column], table[column], rtol=1e-9)


def test_ggn_is_the_exact_fisher_block():
    criterion = CRITERIA["ce"]
    (model, x), y = problem("sequence"), labels(criterion)
    options = {"fisher_type": "empirical", "approximations": ["exact", "kfac"]}
    ggn, exact = (
        fl.compare(model, criterion, x, y, reference=name, **options).frame
        for name in ("ggn", "exact")
    )
    assert (ggn.relative_error == exact.relative_error).all() and (ggn.relative_error > 0.1).all()
    assert set(ggn.reference_fisher_type) == {"ggn"}


def test_the_split_at_the_gauss_newton_matrix():
    criterion = CRITERIA["mse"]
    (model, x), y = problem("sequence"), labels(criterion)
    H = hessian_blocks(model, criterion, x, y)["0"]
    G = fl.Exact()(fl.capture(model, criterion, x, y)["0"])
    F = fl.Exact()(fl.capture(model, criterion, x, y, fisher_type="empirical")["0"])
    split = hessian_split(F, G, H)
    f, g, h = F.dense(), G.dense(), dense(model, criterion, x, y, "0")
    for found, expected in ((split.error, f - h), (split.gap, f - g), (split.residual, g - h)):
        assert found.item() == pytest.approx(float(expected.norm() / h.norm()), rel=1e-9)
    parts = split.gap**2 + split.residual**2 + 2 * split.cosine * split.gap * split.residual
    assert parts.item() == pytest.approx(split.error.item() ** 2, rel=1e-10)
    assert hessian_split(G, G, H).gap == 0


def test_a_linear_model_has_no_residual_and_a_positive_block():
    model = nn.Sequential(nn.Linear(4, 3)).double()
    x, y = randn(9, 4), randn(9, 3, seed=1)
    H = hessian_blocks(model, CRITERIA["mse"], x, y)["0"]
    G = fl.Exact()(fl.capture(model, CRITERIA["mse"], x, y)["0"])
    assert hessian_split(G, G, H).residual < 1e-14
    check_block(H.formed(), G.dense())


def test_refusals():
    model, x = problem("sequence")
    y = labels(CRITERIA["ce"])
    with pytest.raises(CaptureError, match="is no weight of a linear layer"):
        named = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(8, 3)).double()
        hessian_blocks(named, CRITERIA["ce"], torch.zeros(6, 2, dtype=torch.long), y, layers=["0"])
    with pytest.raises(ValueError, match="one of exact, mc, empirical, ggn, hessian"):
        fl.compare(model, CRITERIA["ce"], x, y, reference="hesian")
    with pytest.raises(ValueError, match="without a mask"):
        mask = torch.ones(6, 2, dtype=torch.bool)
        fl.compare(model, CRITERIA["ce"], x, y, reference="hessian", mask=mask)
