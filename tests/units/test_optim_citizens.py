"""Every optimizer in the places where torch's own are used."""

import copy
import gc
import io
import warnings

import pytest
import torch
import torch.nn.functional as F
from optim_references import perceptron, weights
from torch import Tensor, nn

import fisherlab as fl
from fisherlab.optim.create import GRADIENT_ONLY

NAMES = fl.optim.names()
CURVATURE = [n for n in NAMES if n not in GRADIENT_ONLY]
SHORT = {
    "statistics_every": 2,
    "basis_every": 3,
}


def small() -> nn.Sequential:
    return perceptron(6, 5, 4).float()


def data(n: int = 12, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(n, 6, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randint(0, 4, (n,), generator=generator)


def create(name: str, model: nn.Module, **options):
    """With short intervals where the method has any, so that seven steps see each of them."""
    defaults = {"fngd": {"coefficient_steps": 5}, "truncated_kfac": {"switch_step": 9}}
    options = {**defaults.get(name, {}), **options}
    try:
        return fl.optim.create(name, model, **SHORT, **options)
    except (TypeError, ValueError):
        return fl.optim.create(name, model, **options)


def run(model: nn.Module, optimizer, steps: int, start: int = 0, scheduler=None) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="FNGD's shared")
        for step in range(start, start + steps):
            x, y = data()
            x = x.roll(step, 0)

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                return loss

            optimizer.step(closure)
            if scheduler is not None:
                scheduler.step()


@pytest.mark.parametrize("name", NAMES)
def test_resumes_bit_for_bit(name: str) -> None:
    straight = small()
    optimizer = create(name, straight)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.5)
    run(straight, optimizer, 14, scheduler=schedule)

    model = small()
    optimizer = create(name, model)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.5)
    run(model, optimizer, 7, scheduler=schedule)
    file = io.BytesIO()
    states = {"model": model, "optimizer": optimizer, "schedule": schedule}
    torch.save({key: value.state_dict() for key, value in states.items()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    model = small()
    optimizer = create(name, model)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.5)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    schedule.load_state_dict(saved["schedule"])
    run(model, optimizer, 7, start=7, scheduler=schedule)
    assert torch.equal(weights(model), weights(straight))


@pytest.mark.parametrize("name", CURVATURE)
def test_deletion_leaves_no_hooks(name: str) -> None:
    gc.freeze()  # what other tests hold is looked through each time otherwise
    model = small()
    optimizer = create(name, model)
    run(model, optimizer, 2)
    optimizer.zero_grad()
    del optimizer
    gc.collect()
    gc.unfreeze()
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert not module._backward_hooks


@pytest.mark.parametrize("name", CURVATURE)
def test_evaluation_between_backward_and_step_disturbs_nothing(name: str) -> None:
    assert torch.equal(disturbed_run(name, False), disturbed_run(name, True))


def disturbed_run(name: str, disturbed: bool) -> Tensor:
    model = small()
    optimizer = create(name, model)
    x, y = data()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        if disturbed:
            with torch.no_grad():
                model.eval()
                model(torch.ones(5, 6))
                model.train()
            model(torch.ones(3, 6))  # a training forward without a backward
        return loss

    for _ in range(4):
        optimizer.step(closure)
    return weights(model)


@pytest.mark.parametrize("name", [n for n in CURVATURE if n != "kbfgs"])
@pytest.mark.parametrize("scale", ["mean", "sum", "accumulated", "scaled"])
def test_loss_scale_is_recognised(name: str, scale: str) -> None:
    """Mean, sum, 1/k and 2^16: the same Fisher matrix."""
    x, y = data(dtype=torch.float64)
    factors = {"mean": 1.0, "sum": 12.0, "accumulated": 0.25, "scaled": 65536.0}
    model, reference = perceptron(6, 5, 4), perceptron(6, 5, 4)
    optimizer, expected = (create(name, one, kl_clip=None) for one in (model, reference))
    (F.cross_entropy(model(x), y) * factors[scale]).backward()
    F.cross_entropy(reference(x), y).backward()
    for p in model.parameters():
        p.grad /= factors[scale]
    optimizer.step(), expected.step()
    torch.testing.assert_close(weights(model), weights(reference), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["kfac", "ekfac", "sngd", "exact", "ngd", "diagonal"])
def test_accumulation_of_micro_batches_is_the_whole_batch(name: str) -> None:
    x, y = data(dtype=torch.float64)
    model, reference = perceptron(6, 5, 4), perceptron(6, 5, 4)
    optimizer, expected = create(name, model), create(name, reference)
    for part in (slice(0, 6), slice(6, 12)):
        (F.cross_entropy(model(x[part]), y[part]) / 2).backward()
    F.cross_entropy(reference(x), y).backward()
    optimizer.step(), expected.step()
    torch.testing.assert_close(weights(model), weights(reference), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["kfac", "tengrad", "fngd", "shampoo"])
def test_grad_scaler(name: str) -> None:
    model, reference = small(), small()
    optimizer, expected = create(name, model), create(name, reference)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    x, y = data()
    for _ in range(3):
        optimizer.zero_grad(), expected.zero_grad()
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        scaler.step(optimizer)
        scaler.update()
        F.cross_entropy(reference(x), y).backward()
        expected.step()
    torch.testing.assert_close(weights(model), weights(reference), rtol=1e-4, atol=1e-5)
    before = weights(model).clone()
    optimizer.zero_grad()
    x, y = data()
    scaler.scale(F.cross_entropy(model(x), y)).backward()
    model[0].weight.grad[0, 0] = torch.inf
    scaler.step(optimizer)
    assert torch.equal(weights(model), before), "an overflowing step is skipped"


@pytest.mark.parametrize("name", ["kfac", "tengrad", "ekfac"])
def test_autocast(name: str) -> None:
    model = small()
    optimizer = create(name, model)
    x, y = data()
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    assert torch.isfinite(weights(model)).all()


@pytest.mark.parametrize("name", ["kfac", "ngd", "tengrad", "fngd", "kbfgs", "ang"])
def test_parameter_groups_frozen_and_unused_layers(name: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layers = small()
            self.first, self.last = layers[0], layers[2]
            self.frozen, self.unused = nn.Linear(5, 5), nn.Linear(5, 5)
            self.frozen.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.frozen(self.first(x).relu()))

    model = Net()
    groups = [
        {"params": [model.first.weight, model.last.weight, model.unused.weight], "lr": 0.05},
        {"params": [model.first.bias], "lr": 0.0},
    ]
    optimizer = create(name, model, params=groups)
    before = copy.deepcopy(model.state_dict())
    run(model, optimizer, 4)
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {"first.weight", "last.weight"}


@pytest.mark.parametrize("name", CURVATURE)
def test_tied_weights(name: str) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.one, self.two, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)
            self.two.weight = self.one.weight
            self.two.bias = self.one.bias

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.two(self.one(x).relu()).relu())

    with torch.random.fork_rng():
        model = Tied()
    optimizer = create(name, model)
    before = weights(model)
    run(model, optimizer, 4)
    assert torch.isfinite(weights(model)).all() and not torch.equal(before, weights(model))


def test_tied_layers_make_one_block_of_both_calls() -> None:
    class Twice(nn.Module):
        def __init__(self, tied: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.one, self.last = nn.Linear(6, 6), nn.Linear(6, 4)
            self.two = nn.Linear(6, 6) if tied else self.one
            self.two.weight, self.two.bias = self.one.weight, self.one.bias

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.two(self.one(x).relu()).relu())

    factors = []
    for tied in (True, False):
        with torch.random.fork_rng():
            model = Twice(tied)
        optimizer = create("kfac", model)
        run(model, optimizer, 1)
        factors.append(optimizer.blocks()["one"])
    torch.testing.assert_close(factors[0].A, factors[1].A)
    torch.testing.assert_close(factors[0].G, factors[1].G)


@pytest.mark.parametrize("name", ["kfac", "tengrad", "fngd", "sngd", "ekfac"])
def test_in_place_operation_after_a_linear_over_positions(name: str) -> None:
    """Its output is a view; an in-place operation must not cut the gradient's hook off."""

    class Positions(nn.Module):
        def __init__(self, activation) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(3, 5), nn.Linear(5, 4)
            self.activation = activation

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.activation(self.first(x.view(-1, 2, 3)))).mean(1)

    ends = []
    for activation in (F.relu, F.relu_):
        with torch.random.fork_rng():
            model = Positions(activation)
        run(model, create(name, model), 3)
        ends.append(weights(model))
    assert torch.equal(*ends)


def test_clip_grad_norm_sees_the_gradient_that_is_used() -> None:
    for name in ("kfac", "tengrad", "fngd"):
        model = small()
        optimizer = create(name, model)
        x, y = data()
        F.cross_entropy(model(x), y).backward()
        assert nn.utils.clip_grad_norm_(model.parameters(), 1e-3) > 1e-3
        optimizer.step()


@pytest.fixture
def fresh_compiler():
    # torch reuses code compiled for another model of the same class, hooks or not
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", ["kfac", "ngd", "tengrad", "fngd"])
def test_compiled_before_the_optimizer(name: str) -> None:
    model = small()
    compiled = torch.compile(model, backend="eager")
    x, y = data()
    F.cross_entropy(compiled(x), y).backward()
    optimizer = create(name, model)
    before = weights(model)
    optimizer.zero_grad()
    F.cross_entropy(compiled(x), y).backward()
    with pytest.raises(fl.optim.OptimizerError, match="compiled"):
        optimizer.step()
    assert torch.equal(before, weights(model))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("of_compiled", [False, True], ids=["of the model", "of the compiled"])
@pytest.mark.parametrize("name", ["kfac", "ngd", "tengrad", "fngd", "sngd"])
def test_compiled_with_an_optimizer(name: str, of_compiled: bool) -> None:
    ends = []
    for compiled in (False, True):
        model = small()
        forward = torch.compile(model, backend="eager") if compiled else model
        optimizer = create(name, forward if of_compiled else model)
        x, y = data()
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(forward(x), y).backward()
            optimizer.step()
        ends.append(weights(model))
    torch.testing.assert_close(*ends)


def test_a_weight_laid_out_channels_last_takes_the_same_step() -> None:
    """torch's fused kernel goes over bare memory, where a direction is laid out another way."""
    generator = torch.Generator().manual_seed(4)
    x, y = torch.randn(6, 2, 5, 5, generator=generator), torch.tensor([0, 1, 2, 0, 1, 2])
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3))
    last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    assert last[0].weight.stride() != plain[0].weight.stride()
    for model in (plain, last):
        optimizer = fl.optim.create("kfac", model)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    for one, other in zip(plain.parameters(), last.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_steps_that_a_bound_shortened_are_counted_and_said():
    found = {}
    for lr, bound in ((1.0, 1e-4), (100.0, 1e-4), (0.1, None)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
        x, y = torch.randn(8, 5), torch.arange(8) % 3
        opt = fl.optim.create("kfac", model, lr=lr, kl_clip=bound)
        for _ in range(3):
            opt.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            opt.step()
        found[lr] = opt, [p.detach() for p in model.parameters()]
    (one, few), (other, many), (free, _) = found.values()
    # the same step at any learning rate, which is what the count is there to say
    torch.testing.assert_close(few, many, rtol=1e-4, atol=1e-6)
    assert one.clipped == other.clipped == 3 and free.clipped == 0
    assert "kl_clip=0.0001 (3 of 3 steps" in repr(one) and "kl_clip" not in repr(free)
    again = fl.optim.create("kfac", one.model)
    again.load_state_dict(one.state_dict())
    assert again.clipped == 3
    with pytest.raises(ValueError, match="below 1"):
        fl.optim.create("kfac", one.model, momentum=2.0)


def test_a_hook_that_the_compiler_runs_as_it_is_enters_no_tape() -> None:
    """Past its limit of recompilations: what the hook left was compiled, and failed inside."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    optimizer = fl.optim.create("kfac", model)
    inside: list[int] = []
    model[1].register_forward_hook(
        lambda *_: inside.append(torch.overrides._len_torch_function_stack())
    )
    forward = torch._dynamo.run(lambda x: model(x))
    nn.functional.cross_entropy(forward(torch.randn(8, 6)), torch.arange(8) % 3).backward()
    optimizer.step()
    assert inside == [0] and set(optimizer.blocks()) == {"0", "2"}
