"""TENGraD, NGD-SMW, FNGD against dense steps: reused layers, reductions, micro-batches, groups."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fisherlab as fl
from fisherlab.approximations.damping import relative

DAMPING, LR = 0.3, 0.1
NAMES = pytest.mark.parametrize("name", ["tengrad", "ngd_smw", "fngd"])
SCALES = (("mean", 1.0), ("sum", 1.0), ("mean", 0.25), ("mean", 1024.0))
REDUCTIONS = pytest.mark.parametrize(("reduction", "scale"), SCALES)


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
    # a bound is meant in full, at the first step too
    options = {"kl_clip": None, "warmup": 0, "lr": LR, "momentum": 0.0} | options
    return fl.optim.create(name, model, criterion=criterion, **options)


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


def plain_gradients(kind, criterion, parts, scale):
    model = made(kind)
    for part in parts:
        loss_of(criterion, model, *part, scale).backward()
    return {n: [p.grad.clone() for p in m.parameters()] for n, m in model.named_children()}


def weighted_gradients(name, kind, parts, scale, reduction):
    """The sum over passes of `scale` times each pass's own dense step."""
    total = None
    for x, y in parts:
        size = len(x) if reduction == "sum" else 1
        step = {
            k: scale * size * dense_step(D, DAMPING, name != "tengrad")
            for k, D in per_example(kind, x, y).items()
        }
        total = step if total is None else {k: total[k] + step[k] for k in step}
    return total


def flat_gradients(model):
    children = model.named_children()
    return {n: torch.cat([p.grad.flatten() for p in m.parameters()]) for n, m in children}


@NAMES
@MODELS
@REDUCTIONS
def test_backward_leaves_the_weighted_gradient_of_reused_layers_too(name, kind, reduction, scale):
    """So that GradScaler, clipping and DDP see what will be used."""
    model, (x, y) = made(kind), batch()
    criterion = nn.CrossEntropyLoss(reduction=reduction)
    opt = optimizer(name, model, criterion, **options_of(name))
    parts = [(x[:2], y[:2]), (x[2:], y[2:])]
    for part in parts:
        loss_of(criterion, model, *part, scale).backward()
    expected = weighted_gradients(name, kind, parts, scale, reduction)
    for layer, found in flat_gradients(model).items():
        assert (found - expected[layer]).norm() < 1e-9 * expected[layer].norm(), layer
    opt.remove()


@NAMES
@MODELS
def test_passes_whose_forwards_come_first_are_not_merged(name, kind):
    model, (x, y) = made(kind), batch()
    criterion = nn.CrossEntropyLoss()
    opt = optimizer(name, model, criterion, **options_of(name))
    parts = [(x[:3], y[:3]), (x[3:], y[3:])]
    sum(0.5 * criterion(model(one), two) for one, two in parts).backward()
    expected = weighted_gradients(name, kind, parts, 0.5, "mean")
    for layer, found in flat_gradients(model).items():
        assert (found - expected[layer]).norm() < 1e-9 * expected[layer].norm(), layer
    opt.remove()


SIZES = ((6,), (3, 3), (1, 5), (2, 2, 2))
# each value of each setting with each value of every other one
TWO_BY_TWO = [
    (*reduction, sizes, (LR, 0.03)[(i + j) % 2], bool((i // 2 + j // 2) % 2))
    for i, reduction in enumerate(SCALES)
    for j, sizes in enumerate(SIZES)
]


@NAMES
@MODELS
@pytest.mark.parametrize(("reduction", "scale", "sizes", "bias_lr", "unscaled"), TWO_BY_TWO)
def test_clipping_counts_every_pass_that_the_gradient_holds(
    name, kind, reduction, scale, sizes, bias_lr, unscaled
):
    clip = 1e-11
    model, (x, y) = made(kind), batch()
    criterion = nn.CrossEntropyLoss(reduction=reduction)
    groups = [
        {"params": [m.weight for m in model.children()]},
        {"params": [m.bias for m in model.children()], "lr": bias_lr},
    ]
    options = {"params": groups, "kl_clip": clip, **options_of(name)}
    opt = optimizer(name, model, criterion, **options)
    before = [p.detach().clone() for p in model.parameters()]
    parts = list(zip(x.split(sizes), y.split(sizes), strict=True))
    criterion(model(x), y).backward()
    opt.zero_grad()  # a dropped pass counts nowhere
    for part in parts:
        loss_of(criterion, model, *part, scale).backward()
    left = 1.0
    if unscaled:  # as GradScaler and gradient clipping do
        left = 0.3
        for p in model.parameters():
            p.grad *= left
    opt.step()
    g = plain_gradients(kind, criterion, parts, scale)
    d = weighted_gradients(name, kind, parts, scale, reduction)
    change, expected = 0.0, []
    for layer, module in model.named_children():
        sizes_ = [p.numel() for p in module.parameters()]
        for part, gradient, lr in zip(d[layer].split(sizes_), g[layer], (LR, bias_lr), strict=True):
            change += lr**2 * left**2 * float(part @ gradient.flatten())
            expected.append(lr * left * part)
    assert change > clip and opt.clipped == 1
    for old, p, step in zip(before, model.parameters(), expected, strict=True):
        wanted = step * (clip / change) ** 0.5
        assert ((old - p.detach()).flatten() - wanted).norm() < 1e-8 * wanted.norm()


@pytest.mark.parametrize("kind", [Recurrent, SharedConv, Grouped])
@pytest.mark.parametrize("sizes", [(6,), (3, 3)])
def test_shared_coefficients_are_clipped_and_are_means_over_all_micro_batches(kind, sizes):
    """FNGD: the second phase has no Gram matrix, and micro-batches are batches of the first."""
    clip, n = 1e-8, sizes[0]
    model, (x, y) = made(kind), batch()
    criterion = nn.CrossEntropyLoss()
    # coefficients far from one another, or the run says that it is SGD
    damping = 0.05
    options = {"damping": damping, "alpha": None, "coefficient_steps": 1, "kl_clip": None}
    opt = optimizer("fngd", model, criterion, **options)
    parts = list(zip(x.split(sizes), y.split(sizes), strict=True))
    for part in parts:
        loss_of(criterion, model, *part, 1 / len(parts)).backward()
    opt.param_groups[0]["lr"] = 1e-300  # the weights stay, the phase ends
    opt.step()
    # a grouped convolution's coefficients differ between groups
    coefficients = {}
    for layer, module in model.named_children():
        groups, rows = getattr(module, "groups", 1), []
        for part in parts:
            D = per_example(kind, *part)[layer]
            weights, biases = D[:, : module.weight.numel()], D[:, module.weight.numel() :]
            U = torch.cat([weights.reshape(n, groups, -1), biases.reshape(n, groups, -1)], 2)
            K = torch.einsum("ngp,mgp->gnm", U, U)
            eye = torch.eye(n, dtype=torch.float64)
            ones = torch.ones(groups, n, 1, dtype=torch.float64)
            v = torch.linalg.solve(n * damping * eye + K, ones)[..., 0]
            rows.append(n * damping * v)
        coefficients[layer] = sum(rows) / len(rows)
    for layer, found in opt.coefficients().items():
        assert torch.allclose(found, coefficients[layer], rtol=1e-10)
    opt.clip, opt.param_groups[0]["lr"] = fl.optim.Clip(kl=clip), LR
    before = {k: v.clone() for k, v in model.state_dict().items()}
    opt.zero_grad()
    x, y = x[:n].flip(0), y[:n]
    criterion(model(x), y).backward()
    opt.step()
    expected, change = {}, 0.0
    for layer, D in per_example(kind, x, y).items():
        module = getattr(model, layer)
        rows = [
            coefficients[layer].repeat_interleave(p.numel() // len(coefficients[layer]), 0).mT
            for p in module.parameters()
        ]
        expected[layer] = (torch.cat(rows, 1) * D).mean(0)
        change += LR**2 * float(expected[layer] @ D.mean(0))
    assert change > clip and opt.clipped == 1
    for layer, found in moved(model, before).items():
        wanted = expected[layer] * (clip / change) ** 0.5
        assert (found - wanted).norm() < 1e-7 * wanted.norm(), layer


class Partly(nn.Module):
    """A layer whose third call reaches no output, or that is recomputed in the backward pass."""

    def __init__(self, checkpointed):
        super().__init__()
        self.h, self.o, self.checkpointed = nn.Linear(3, 3), nn.Linear(3, 3), checkpointed

    def forward(self, x):
        def twice(z):
            return torch.tanh(self.h(torch.tanh(self.h(z))))

        x = x[:, 0]
        z = checkpoint(twice, x, use_reentrant=False) if self.checkpointed else twice(x)
        self.unused = self.h(z)
        return self.o(z)


@NAMES
@pytest.mark.parametrize("checkpointed", [False, True])
def test_calls_without_a_gradient_and_recomputed_calls(name, checkpointed):
    (x, y), found = batch(), []
    for flag in (False, checkpointed):
        model = made(lambda flag=flag: Partly(flag))
        opt = optimizer(name, model, None, **options_of(name))
        nn.functional.cross_entropy(model(x), y).backward()
        found.append(flat_gradients(model))
        opt.remove()
    expected = weighted_gradients(name, lambda: Partly(False), [(x, y)], 1.0, "mean")
    for one in found:
        for layer, gradient in one.items():
            assert (gradient - expected[layer]).norm() < 1e-9 * expected[layer].norm(), layer


@NAMES
@pytest.mark.parametrize("kind", [Recurrent, SharedConv, Grouped])
def test_a_bias_of_another_optimizer_keeps_its_plain_gradient(name, kind):
    model, (x, y) = made(kind), batch()
    criterion = nn.CrossEntropyLoss()
    params = [m.weight for m in model.children()]
    opt = optimizer(name, model, criterion, params=params, **options_of(name))
    criterion(model(x), y).backward()
    for layer, (_, bias) in plain_gradients(kind, criterion, [(x, y)], 1.0).items():
        assert torch.allclose(getattr(model, layer).bias.grad, bias, rtol=1e-10, atol=0)
    opt.remove()


@NAMES
def test_a_deep_copy_of_the_model_trains_on_its_own(name):
    model, (x, y) = made(Recurrent), batch()
    opt = optimizer(name, model, nn.CrossEntropyLoss(), **options_of(name))
    other = copy.deepcopy(model)
    nn.functional.cross_entropy(model(x), y).backward()
    found = flat_gradients(model)
    opt.zero_grad()
    loss = nn.functional.cross_entropy(model(x), y)
    nn.functional.cross_entropy(other(3 * x), y).backward()
    loss.backward()
    for layer, gradient in flat_gradients(model).items():
        assert torch.equal(gradient, found[layer])
    plain = made(Recurrent)
    nn.functional.cross_entropy(plain(3 * x), y).backward()
    for layer, gradient in flat_gradients(other).items():
        assert torch.allclose(gradient, flat_gradients(plain)[layer], rtol=1e-10)
    opt.remove()
