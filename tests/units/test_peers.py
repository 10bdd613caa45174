"""Other libraries on the same layers: curvlinops and BackPACK, entry for entry."""

import copy

import pytest
import torch
from references import randn, relative
from torch import nn

import fisherlab as fl

curvlinops = pytest.importorskip("curvlinops", reason="curvlinops is not installed")
pytest.importorskip("backpack", reason="BackPACK is not installed")

pytestmark = [
    pytest.mark.peers,
    # their own, about torch's API
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*backward hook.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*non-full backward hook.*:FutureWarning"),
]
CRITERIA = {
    "ce": nn.CrossEntropyLoss(),
    "ce sum": nn.CrossEntropyLoss(reduction="sum"),
    "mse": nn.MSELoss(),
    "bce": nn.BCEWithLogitsLoss(),
}


def problem(criterion):
    """A small CNN without anything that a peer cannot take, and a batch."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 3, 2, stride=2, padding=1), nn.Sigmoid(), nn.Flatten()]
    layers += [nn.Linear(27, 4), nn.Tanh(), nn.Linear(4, 3)]
    model, x = nn.Sequential(*layers).double(), randn(6, 2, 4, 4)
    y = torch.arange(6) % 3
    if isinstance(criterion, nn.MSELoss):
        y = randn(6, 3, seed=1)
    elif isinstance(criterion, nn.BCEWithLogitsLoss):
        y = (randn(6, 3, seed=1) > 0).double()
    return model, x, y


def to_curvlinops(shape: tuple[int, int]) -> torch.Tensor:
    """Where each entry of our `[W b]` lies in their `[vec W, b]`."""
    o, i = shape
    weights = torch.arange(o * (i - 1)).view(o, i - 1)
    return torch.cat([weights, o * (i - 1) + torch.arange(o)[:, None]], 1).flatten()


def blocks_of(operator, model, layers):
    """Their operator, materialised, as one matrix per layer in our order."""
    size = sum(p.numel() for p in model.parameters())
    matrix = operator @ torch.eye(size, dtype=torch.float64)
    start, found = 0, {}
    for name, layer in layers.items():
        o, i = layer.shape
        part = matrix[start : start + o * i, start : start + o * i]
        order = to_curvlinops(layer.shape)
        found[name], start = part[order][:, order], start + o * i
    return found


def scale(criterion, x):
    """Our blocks are per example whatever the reduction; theirs of a sum are not divided by M."""
    return len(x) if criterion.reduction == "sum" else 1


@pytest.mark.parametrize("approximation", ["kfac", "kfac_reduce", "ekfac"])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_curvlinops_joint_kfac_and_ekfac(criterion, approximation):
    criterion = CRITERIA[criterion]
    model, x, y = problem(criterion)
    layers = fl.capture(model, criterion, x, y)
    make = (
        curvlinops.EKFACLinearOperator
        if approximation == "ekfac"
        else curvlinops.KFACLinearOperator
    )
    kind = (
        curvlinops.KFACType.REDUCE if approximation == "kfac_reduce" else curvlinops.KFACType.EXPAND
    )
    operator = make(
        model, criterion, list(model.parameters()), [(x, y)],
        fisher_type=curvlinops.FisherType.TYPE2, kfac_approx=kind, separate_weight_and_bias=False,
    )  # fmt: skip
    theirs = blocks_of(operator, model, layers)
    for name, layer in layers.items():
        ours = scale(criterion, x) * fl.approximations.get(approximation)()(layer).dense()
        assert relative(ours, theirs[name]) < 1e-10, name


@pytest.mark.parametrize("criterion", CRITERIA)
def test_curvlinops_ggn(criterion):
    criterion = CRITERIA[criterion]
    model, x, y = problem(criterion)
    layers = fl.capture(model, criterion, x, y)
    operator = curvlinops.GGNLinearOperator(model, criterion, list(model.parameters()), [(x, y)])
    theirs = blocks_of(operator, model, layers)
    for name, layer in layers.items():
        ours = scale(criterion, x) * fl.Exact()(layer).dense()
        assert relative(ours, theirs[name]) < 1e-10, name


def test_curvlinops_empirical_fisher():
    criterion = CRITERIA["ce"]
    model, x, y = problem(criterion)
    layers = fl.capture(model, criterion, x, y, fisher_type="empirical")
    operator = curvlinops.EFLinearOperator(model, criterion, list(model.parameters()), [(x, y)])
    theirs = blocks_of(operator, model, layers)
    for name, layer in layers.items():
        assert relative(fl.Exact()(layer).dense(), theirs[name]) < 1e-10, name


def through_backpack(criterion, extension):
    """BackPACK's own quantities on a copy that it may keep hooks on."""
    from backpack import backpack, extend

    model, x, y = problem(criterion)
    copied, loss = extend(copy.deepcopy(model)), extend(copy.deepcopy(criterion))
    with backpack(extension):
        loss(copied(x), y).backward()
    return copied, (model, criterion, x, y)


@pytest.mark.parametrize("criterion", ["ce", "ce sum", "mse"])
def test_backpack_sqrt_ggn_exact(criterion):
    """`V` `[c, n, *shape]`, every normalisation inside: `V^T V` is the block."""
    from backpack.extensions import SqrtGGNExact

    criterion = CRITERIA[criterion]
    copied, arguments = through_backpack(criterion, SqrtGGNExact())
    for name, layer in fl.capture(*arguments).items():
        module = copied.get_submodule(name)
        parts = module.weight.sqrt_ggn_exact.flatten(3), module.bias.sqrt_ggn_exact[..., None]
        V = torch.cat(parts, -1).flatten(0, 1).flatten(1)
        ours = scale(*arguments[1:3]) * fl.Exact()(layer).dense()
        assert relative(ours, V.mT @ V) < 1e-10, name


@pytest.mark.parametrize("criterion", CRITERIA)
def test_backpack_batch_grad(criterion):
    """`grad_batch` `[n, *shape]` carries the `1/M` of a mean; ours is of the per-example loss."""
    from backpack.extensions import BatchGrad

    criterion = CRITERIA[criterion]
    copied, arguments = through_backpack(criterion, BatchGrad())
    for name, layer in fl.capture(*arguments, fisher_type="empirical").items():
        module = copied.get_submodule(name)
        parts = module.weight.grad_batch.flatten(2), module.bias.grad_batch[..., None]
        theirs = torch.cat(parts, -1)
        mean = len(theirs) if criterion.reduction == "mean" else 1
        ours = layer.per_example_gradients()[0]
        assert relative(ours, mean * theirs) < 1e-10, name


def test_backpack_kflr_of_a_linear_layer_is_kfac_of_the_weight():
    """`p.kflr = [B, A]` with separate bias; of a convolution another matrix (test_peer_bugs)."""
    from backpack.extensions import KFLR

    criterion = CRITERIA["ce"]
    copied, arguments = through_backpack(criterion, KFLR())
    for name in ("3", "5"):
        layer = fl.capture(*arguments)[name]
        found = fl.KFAC()(layer)
        B, A = copied.get_submodule(name).weight.kflr
        assert relative(found.G, B) < 1e-10
        assert relative(found.A[:-1, :-1], A) < 1e-10
