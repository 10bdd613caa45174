"""Every optimizer on every kind of model, a few steps each."""

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fisherlab as fl
from fisherlab.optim.create import GRADIENT_ONLY

Build = Callable[[], tuple[nn.Module, Tensor]]


def images(name: str, side: int, channels: int = 1, **options) -> Build:
    def build() -> tuple[nn.Module, Tensor]:
        size = (channels, side, side)
        model = fl.models.create(name, num_classes=3, input_size=size, **options)
        return model, torch.randn(4, *size, generator=torch.Generator().manual_seed(1))

    return build


def tokens(name: str, **options) -> Build:
    def build() -> tuple[nn.Module, Tensor]:
        model = fl.models.create(name, num_classes=7, **options)
        return model, torch.randint(0, 7, (4, 6), generator=torch.Generator().manual_seed(1))

    return build


KINDS: dict[str, Build] = {
    "mlp": images("mlp", 3, hidden=(6,)),
    "lenet": images("lenet", 12, width=0.15),
    "resnet": images("resnet20", 8, width=0.125),
    "vgg": images("vgg11", 32, width=0.015),
    "lstm": tokens("lstm", width=0.02),
    "transformer": tokens("transformer", width=0.02, layers=1, heads=2),
}
DENSE = {"ngd_dense", "blockwise_ngd", "kronecker_sum"}


# attention's maps feed no element-wise function
@pytest.mark.filterwarnings("ignore:SNGD has no block of these layers")
@pytest.mark.filterwarnings("ignore:only .* of the trainable matrices have a block")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", fl.optim.names())
def test_few_steps(name: str, kind: str) -> None:
    model, x = KINDS[kind]()
    criterion = nn.CrossEntropyLoss()
    options = {} if name in GRADIENT_ONLY else {"criterion": criterion}
    if name in ("shampoo", "kl_shampoo", "dykaf"):
        options = {}
    try:
        optimizer = fl.optim.create(name, model, **options)
    except ValueError as error:
        assert name in DENSE and "refused above" in str(error)
        return
    outputs = model(x)
    labels = torch.randint(
        0,
        outputs.shape[1],
        (len(outputs), *outputs.shape[2:]),
        generator=torch.Generator().manual_seed(2),
    )
    before = [p.detach().clone() for p in model.parameters()]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = criterion(model(x), labels)
        loss.backward()
        return loss

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="FNGD's shared")
        for _ in range(1 if name in DENSE else 3):
            optimizer.step(closure)
    moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
    # a gradient of rounding (the bias of attention's keys has none) need not move anything
    trained = [p.grad is not None and bool(p.grad.abs().max() > 1e-4) for p in model.parameters()]
    assert all(m for m, t in zip(moved, trained, strict=True) if t)
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    assert torch.isfinite(F.cross_entropy(model(x), labels))
