"""TENGraD, NGD-SMW, FNGD against dense steps: reused layers, reductions, micro-batches, groups."""

import pytest
import torch
from torch import nn

import fisherlab as fl
from fisherlab.approximations.damping import relative

DAMPING, LR = 0.3, 0.1
NAMES = pytest.mark.parametrize("name", ["tengrad", "ngd_smw", "fngd"])
REDUCTIONS = pytest.mark.parametrize(
    ("reduction", "scale"), [("mean", 1.0), ("sum", 1.0), ("mean", 0.25), ("mean", 1024.0)]
)


class Recurrent(nn.Module):
    """A layer that is called three times."""

    def __init__(self):
        super().__init__()
        self.i, self.h, self.o = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        h = torch.tanh(self.i(x[:, 0]))
        for t in range(3):
            h = torch.tanh(self.h(h) + x[:, t, :1])
        return self.o(h)


class SharedConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.c, self.o = nn.Conv1d(3, 3, 3, padding=1), nn.Linear(9, 3)

    def forward(self, x):
        return self.o(torch.tanh(self.c(torch.tanh(self.c(x)))).flatten(1))


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.c, self.o = nn.Conv1d(3, 6, 3, padding=1, groups=3), nn.Linear(18, 3)

    def forward(self, x):
        return self.o(torch.tanh(self.c(x)).flatten(1))


MODELS = pytest.mark.parametrize("kind", [Recurrent, SharedConv])


def made(kind):
    torch.manual_seed(2)
    return kind().double()


def batch(n=6):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(n, 3, 3, generator=generator, dtype=torch.float64), torch.arange(n) % 3


def per_example(kind, x, y):
    """`{layer: [n, N]}`, the gradient of each example's loss over weight and bias."""
    model, loss = made(kind), nn.CrossEntropyLoss()
    found = {name: [] for name, _ in model.named_children()}
    for k in range(len(x)):
        for name, module in model.named_children():
            grads = torch.autograd.grad(
                loss(model(x[k : k + 1]), y[k : k + 1]), [module.weight, module.bias]
            )
            found[name].append(torch.cat([grads[0].flatten(), grads[1]]))
    return {name: torch.stack(rows) for name, rows in found.items()}


def dense_step(D, damping, fold):
    """`(F + lambda I)^{-1} g`, times lambda if folded, of the mean loss."""
    F = D.mT @ D / len(D)
    step = torch.linalg.solve(F + damping * torch.eye(len(F)).double(), D.mean(0))
    return step * (damping if fold else 1)


def moved(model, before):
    return {
        name: torch.cat(
            [(before[f"{name}.{p}"] - q.detach()).flatten() for p, q in module.named_parameters()]
        )
        / LR
        for name, module in model.named_children()
    }


def optimizer(name, model, criterion, **options):
    return fl.optim.create(
        name, model, criterion=criterion, lr=LR, momentum=0.0, **({"kl_clip": None} | options)
    )


def options_of(name):
    return {"damping": DAMPING} if name == "tengrad" else {"damping": DAMPING, "alpha": None}


def loss_of(criterion, model, x, y, scale):
    return scale * criterion(model(x), y)


@NAMES
@MODELS
@REDUCTIONS
def test_a_layer_called_several_times_steps_in_the_scale_of_the_loss(name, kind, reduction, scale):
    model, (x, y) = made(kind), batch()
    criterion = nn.CrossEntropyLoss(reduction=reduction)
    opt = optimizer(name, model, criterion, **options_of(name))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    wanted = {
        k: dense_step(D, DAMPING, name != "tengrad") for k, D in per_example(kind, x, y).items()
    }
    loss_of(criterion, model, x, y, scale).backward()
    opt.step()
    factor = scale * (len(x) if reduction == "sum" else 1)
    for layer, step in moved(model, before).items():
        expected = factor * wanted[layer]
        assert (step - expected).norm() < 1e-9 * expected.norm(), layer


@NAMES
@MODELS
@pytest.mark.parametrize("sizes", [(3, 3), (2, 4), (2, 2, 2)])
def test_accumulation_is_the_mean_of_the_steps_of_the_micro_batches(name, kind, sizes):
    model, (x, y) = made(kind), batch()
    criterion = nn.CrossEntropyLoss()
    opt = optimizer(name, model, criterion, **options_of(name))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    parts = list(zip(x.split(sizes), y.split(sizes), strict=True))
    steps = [
        {k: dense_step(D, DAMPING, name != "tengrad") for k, D in per_example(kind, *p).items()}
        for p in parts
    ]
    for part in parts:
        loss_of(criterion, model, *part, 1 / len(parts)).backward()
    opt.step()
    for layer, step in moved(model, before).items():
        expected = sum(one[layer] for one in steps) / len(parts)
        assert (step - expected).norm() < 1e-9 * expected.norm(), layer


@NAMES
@MODELS
def test_a_dropped_backward_pass_leaves_nothing_in_a_reused_layer(name, kind):
    model, (x, y) = made(kind), batch()
    criterion = nn.CrossEntropyLoss()
    opt = optimizer(name, model, criterion, **options_of(name))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    wanted = {
        k: dense_step(D, DAMPING, name != "tengrad") for k, D in per_example(kind, x, y).items()
    }
    criterion(model(5 * x), y).backward()
    opt.zero_grad()
    criterion(model(x), y).backward()
    opt.step()
    for layer, step in moved(model, before).items():
        assert (step - wanted[layer]).norm() < 1e-9 * wanted[layer].norm(), layer


@NAMES
@pytest.mark.parametrize("kind", [Recurrent, SharedConv, Grouped])
@REDUCTIONS
def test_clipping_is_in_the_scale_of_the_loss(name, kind, reduction, scale):
    clip = 1e-6
    model, (x, y) = made(kind), batch()
    criterion = nn.CrossEntropyLoss(reduction=reduction)
    opt = optimizer(name, model, criterion, **options_of(name), kl_clip=clip)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    loss_of(criterion, model, x, y, scale).backward()
    plain = made(kind)
    loss_of(criterion, plain, x, y, scale).backward()
    opt.step()
    gradients = {
        n: torch.cat([p.grad.flatten() for p in m.parameters()]) for n, m in plain.named_children()
    }
    steps = moved(model, before)
    change = sum(LR**2 * float(steps[k] @ gradients[k]) for k in steps)
    # a step that was scaled by s has the change s times that of the whole, sqrt(clip change)
    unclipped = made(kind)
    free = optimizer(name, unclipped, criterion, **options_of(name))
    loss_of(criterion, unclipped, x, y, scale).backward()
    free.step()
    whole = moved(unclipped, before)
    full = sum(LR**2 * float(whole[k] @ gradients[k]) for k in whole)
    assert full > clip and opt.clipped == 1
    assert change == pytest.approx((clip * full) ** 0.5, rel=1e-9)


def test_groups_of_a_convolution_share_the_damping_of_their_layer():
    model, (x, y) = made(Grouped), batch()
    criterion = nn.CrossEntropyLoss()
    opt = optimizer("tengrad", model, criterion, damping=relative(10.0))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    D = per_example(Grouped, x, y)["c"]
    criterion(model(x), y).backward()
    opt.step()
    # the block of a grouped convolution has no entries between groups
    weights, biases = D[:, :18].reshape(len(D), 3, 6), D[:, 18:].reshape(len(D), 3, 2)
    parts = [torch.cat([weights[:, k], biases[:, k]], 1) for k in range(3)]
    trace = sum(float(part.square().sum()) for part in parts) / len(D)
    damping = 10.0 * trace / D.shape[1]
    steps = [dense_step(part, damping, False) for part in parts]
    expected = torch.cat([*(s[:6] for s in steps), *(s[6:] for s in steps)])
    got = moved(model, before)["c"]
    assert (got - expected).norm() < 1e-9 * expected.norm()


@pytest.mark.parametrize("name", ["ngd", "ngd_dense", "blockwise_ngd", "kfac", "exact", "diagonal"])
def test_a_resumed_run_draws_the_labels_of_the_run_it_resumes(name):
    def trained(stop):
        model, (x, y) = made(Recurrent if name != "kfac" else SharedConv), batch()
        criterion = nn.CrossEntropyLoss()
        opt = fl.optim.create(name, model, criterion=criterion, fisher_type="mc")
        for step in range(6):
            if step == stop:
                state, weights = opt.state_dict(), model.state_dict()
                fresh = type(model)().double()
                fresh.load_state_dict(weights)
                model = fresh
                opt = fl.optim.create(name, model, criterion=criterion, fisher_type="mc")
                opt.load_state_dict(state)
            opt.zero_grad()
            criterion(model(x), y).backward()
            opt.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(trained(None), trained(3))


@NAMES
def test_a_capture_between_the_passes_of_a_step_changes_no_bit(name):
    def trained(audit):
        model, (x, y) = made(Recurrent), batch()
        criterion = nn.CrossEntropyLoss()
        opt = optimizer(name, model, criterion, **options_of(name))
        for _ in range(3):
            opt.zero_grad()
            loss = criterion(model(x), y)
            if audit:
                fl.capture(model, criterion, 2 * x, y)
            loss.backward()
            opt.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(trained(False), trained(True))
