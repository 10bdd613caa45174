"""Where weight decay enters a step: after or before the preconditioner, or in the loss."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from optim_references import exact, eye, gradient, kfac, pairs, perceptron, weights
from torch import Tensor, nn

import fisherlab as fl
from fisherlab.optim.create import GRADIENT_ONLY

NAMES = fl.optim.names()
WOODBURY = ("tengrad", "ngd_smw", "fngd")
BEFORE = [n for n in NAMES if n not in (*GRADIENT_ONLY, *WOODBURY)]
DAMPING, MOMENTUM = 0.2, 0.8


def stream(count: int, n: int = 10) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(4)
    return [
        (
            torch.randn(n, 6, generator=generator, dtype=torch.float64),
            torch.randint(0, 4, (n,), generator=generator),
        )
        for _ in range(count)
    ]


def groups(model: nn.Sequential) -> list[dict]:
    """Weights and biases with decays and learning rates of their own."""
    first, _, second = model
    return [
        {"params": [first.weight, second.bias], "weight_decay": 0.3, "lr": 0.05},
        {"params": [second.weight, first.bias], "weight_decay": 0.02, "lr": 0.1},
    ]


def dense(name: str, both: list[tuple[Tensor, Tensor]]) -> Tensor:
    """`(F + lambda I)^{-1}` over both layers' `vec [W b]`."""
    if name == "ngd":
        U = torch.cat([torch.einsum("no,ni->noi", g, a).flatten(1) for a, g in both], 1)
        return torch.linalg.inv(U.T @ U / len(U) + DAMPING * eye(U.shape[1]))
    blocks = [torch.kron(*kfac(a, g)) if name == "kfac" else exact(a, g) for a, g in both]
    return torch.block_diag(*(torch.linalg.inv(B + DAMPING * eye(len(B))) for B in blocks))


def make(name: str, model: nn.Sequential, criterion: nn.Module, **options):
    options |= {"damping": DAMPING, "momentum": MOMENTUM, "lr": 1.0, "criterion": criterion}
    if name in ("ngd", "blockwise_ngd"):
        return fl.optim.create(name, model, params=groups(model), warmup=0, **options)
    approximation = fl.KFAC() if name == "kfac" else fl.Exact()
    every = {"statistics_every": 1, "basis_every": 1}
    if name == "kfac":
        every["decay"] = 0.0
    return fl.optim.NaturalGradient(model, approximation, params=groups(model), **every, **options)


@pytest.mark.parametrize("name", ["kfac", "exact", "ngd", "blockwise_ngd"])
@pytest.mark.parametrize("placement", ["after", "before", "loss", "decoupled"])
@pytest.mark.parametrize("kl_clip", [None, 1e-4])
@pytest.mark.parametrize(("reduction", "scale"), [("mean", 1.0), ("sum", 1.0), ("mean", 0.25)])
def test_the_decay_enters_where_it_is_placed(
    name: str, placement: str, kl_clip: float | None, reduction: str, scale: float
) -> None:
    ours, theirs = perceptron(6, 5, 4), perceptron(6, 5, 4)
    criterion = nn.CrossEntropyLoss(reduction=reduction)
    decoupled = placement == "decoupled"
    where = {"decoupled": True} if decoupled else {"weight_decay_placement": placement}
    optimizer = make(name, ours, criterion, kl_clip=kl_clip, **where)
    first, _, second = theirs
    # one entry per entry of vec [W b] of both layers
    sizes = (first.weight, 0.05, 0.3), (first.bias, 0.1, 0.02), (second.weight, 0.1, 0.02)
    order = [(first, sizes[0], sizes[1]), (second, sizes[2], (second.bias, 0.05, 0.3))]

    def spread(column: int) -> Tensor:
        parts = []
        for _, w, b in order:
            bias = torch.full_like(b[0], b[column])[:, None]
            parts.append(torch.cat([torch.full_like(w[0], w[column]), bias], 1).flatten())
        return torch.cat(parts).detach()

    lr, decay = spread(1), spread(2)
    velocity = torch.zeros_like(lr)
    for step, (x, y) in enumerate(stream(4)):
        optimizer.zero_grad()
        (scale * criterion(ours(x), y)).backward()
        optimizer.step()
        both = pairs(theirs, x, y)
        P = dense(name, both)
        g = torch.cat([gradient(*pair).flatten() for pair in both])
        g = g * scale * (len(x) if reduction == "sum" else 1)
        W = torch.cat(
            [torch.cat([m.weight, m.bias[:, None]], 1).flatten() for m in (first, second)]
        ).detach()
        if placement in ("before", "loss"):
            g = g + decay * W
        d = P @ g
        if kl_clip is not None:
            d = d * min(1.0, (kl_clip / float(lr.square() @ (d * g))) ** 0.5)
        if placement == "after":
            d = d + decay * W
        if decoupled:
            W = W - lr * decay * W
        velocity = MOMENTUM * velocity + d if step else d
        W = W - lr * velocity
        with torch.no_grad():
            for part, m in zip(W.split([35, 24]), (first, second), strict=True):
                matrix = part.view(m.weight.shape[0], -1)
                m.weight.copy_(matrix[:, :-1])
                m.bias.copy_(matrix[:, -1])
        torch.testing.assert_close(weights(ours), weights(theirs), rtol=1e-9, atol=1e-11)
    assert (optimizer.clipped > 0) == (kl_clip is not None)


def trained(name: str, written_out: bool) -> Tensor:
    torch.manual_seed(0)
    layers = nn.Linear(6, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 4)
    model, criterion = nn.Sequential(*layers).double(), nn.CrossEntropyLoss()
    options = {} if written_out else {"weight_decay": 0.1, "weight_decay_placement": "loss"}
    optimizer = fl.optim.create(name, model, criterion=criterion, **options)

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        if written_out:
            loss = loss + 0.05 * sum(p.square().sum() for p in model.parameters())
        loss.backward()
        return loss

    for batch in stream(3):
        optimizer.step(partial(loss_of, *batch))
    return weights(model)


@pytest.mark.parametrize("name", BEFORE)
def test_a_decay_in_the_loss_is_an_l2_term_of_the_loss(name: str) -> None:
    """Parameters without a block included."""
    found, expected = trained(name, False), trained(name, True)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_after_the_switch_of_truncated_kfac_the_decay_is_sgd_s() -> None:
    x, y = stream(1)[0]
    moved = []
    for placement in ("after", "before"):
        model = perceptron(6, 5, 4)
        optimizer = fl.optim.create(
            "truncated_kfac", model, switch_step=1, weight_decay=0.1, momentum=0.0,
            weight_decay_placement=placement,
        )  # fmt: skip
        for _ in range(2):
            before = weights(model).clone()
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            plain = torch.cat([p.grad.flatten() for p in model.parameters()])
            optimizer.step()
        lr = optimizer.param_groups[0]["lr"]
        torch.testing.assert_close(weights(model), before - lr * (plain + 0.1 * before))
        moved.append(before)
    assert not torch.allclose(*moved)


@pytest.mark.parametrize("name", WOODBURY)
def test_methods_that_weigh_examples_place_the_decay_after(name: str) -> None:
    model = perceptron(6, 5, 4)
    with pytest.raises(ValueError, match=r"weighs the gradients.*pass 'after'.*fl.Exact"):
        fl.optim.create(name, model, weight_decay=0.1, weight_decay_placement="before")
    optimizer = fl.optim.create(name, model, weight_decay=0.1)
    with pytest.raises(ValueError, match="weighs the gradients"):
        extra = nn.Parameter(torch.zeros(3))
        optimizer.add_param_group({"params": [extra], "weight_decay_placement": "loss"})
    assert len(optimizer.param_groups) == 1


def test_placements_are_checked() -> None:
    with pytest.raises(
        ValueError, match="unknown weight_decay_placement 'inside'; one of after, before, loss"
    ):
        fl.optim.create("kfac", perceptron(), weight_decay_placement="inside")
    with pytest.raises(ValueError, match="decoupled weight decay is no part of the gradient"):
        fl.optim.create("kfac", perceptron(), weight_decay_placement="before", decoupled=True)
