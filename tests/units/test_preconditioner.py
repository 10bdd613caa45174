"""`Preconditioner` alone: it changes `.grad`, and any optimizer steps."""

import copy
import gc
import io
import re

import pytest
import torch
import torch.nn.functional as F
from optim_references import perceptron, weights
from torch import Tensor, nn

import fisherlab as fl
from fisherlab.approximations.damping import geometric, levenberg_marquardt, trace
from fisherlab.optim import Clip, NaturalGradient, OptimizerError, Preconditioner, Schedule

NAMES = fl.approximations.of_one_batch()
SHORT = Schedule(statistics=2, basis=3, warmup=2)


def convolution() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 4, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 4)
    return nn.Sequential(*layers).double()


def data(model: nn.Module, k: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(k)
    shape = (12, 2, 4, 4) if isinstance(model[0], nn.Conv2d) else (12, 6)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 4, (12,), generator=generator)


def train(model, preconditioner, optimizer, steps=range(7), criterion=F.cross_entropy) -> None:
    for k in steps:
        x, y = data(model, k)
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        if preconditioner is not None:
            preconditioner.step()
        optimizer.step()


@pytest.mark.parametrize("name", NAMES)
def test_in_front_of_sgd_it_is_the_natural_gradient(name: str) -> None:
    for make in (lambda: perceptron(6, 5, 4), convolution):
        one, other = make(), make()
        approximation = fl.approximations.get(name)()
        options = {"damping": geometric(0.1), "schedule": SHORT}
        alone = Preconditioner(one, approximation, **options)
        train(one, alone, torch.optim.SGD(one.parameters(), lr=0.05, momentum=0.9))
        joint = NaturalGradient(other, approximation, lr=0.05, **options)
        train(other, None, joint)
        torch.testing.assert_close(weights(one), weights(other), rtol=1e-12, atol=1e-12)
        assert alone.blocks().keys() == joint.blocks().keys() == joint.weights.keys()
        assert alone.covered_share == joint.covered_share == 1 and not alone.left_out


@pytest.mark.parametrize(
    "options",
    [
        {"fisher_type": "mc", "criterion": nn.CrossEntropyLoss(), "mc_samples": 2},
        {"graft": True, "skip": ["0"]},
        {"damping": trace(1e-3, {"0"})},
        {"schedule": Schedule(statistics=1, basis=2, examples=5, decay=0.5, until=4)},
    ],
    ids=["mc", "graft", "beta", "schedule"],
)
def test_its_options_are_those_of_the_natural_gradient(options: dict) -> None:
    one, other = convolution(), convolution()
    options = {"damping": 0.1, "schedule": SHORT, **options}
    criterion = options.get("criterion", F.cross_entropy)
    alone = Preconditioner(one, fl.EKFAC(), **options)
    train(one, alone, torch.optim.SGD(one.parameters(), lr=0.05), criterion=criterion)
    joint = NaturalGradient(other, fl.EKFAC(), lr=0.05, momentum=0.0, **options)
    train(other, None, joint, criterion=criterion)
    torch.testing.assert_close(weights(one), weights(other), rtol=1e-12, atol=1e-12)
    assert alone.due() == joint.due()


def test_the_gradient_that_it_leaves_is_the_dense_solve() -> None:
    model = perceptron(6, 5, 4)
    preconditioner = Preconditioner(model, fl.Exact(), damping=0.1, schedule=Schedule(1, 1))
    x, y = data(model, 0)
    F.cross_entropy(model(x), y).backward()
    found = {n: torch.cat([model[int(n)].weight.grad, model[int(n)].bias.grad[:, None]], 1)
             for n in ("0", "2")}  # fmt: skip
    rows = {n: [] for n in found}
    for k in range(len(x)):
        one = copy.deepcopy(model)
        one.zero_grad()
        F.cross_entropy(one(x[k : k + 1]), y[k : k + 1]).backward()
        for n in rows:
            layer = one[int(n)]
            rows[n].append(torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1).flatten())
    preconditioner.step()
    for n, gradient in found.items():
        U = torch.stack(rows[n])
        fisher = U.T @ U / len(x) + 0.1 * torch.eye(U.shape[1], dtype=torch.float64)
        expected = torch.linalg.solve(fisher, gradient.flatten()).view_as(gradient)
        layer = model[int(n)]
        step = torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1)
        torch.testing.assert_close(step, expected, rtol=1e-10, atol=1e-12)


def test_adamw_trains_on_preconditioned_gradients() -> None:
    model = perceptron(6, 5, 4)
    preconditioner = Preconditioner(model, fl.KFAC(), damping=geometric(0.1), schedule=SHORT)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.03)
    x, y = data(model, 0)
    before = F.cross_entropy(model(x), y).item()
    train(model, preconditioner, optimizer, steps=[0] * 60)
    assert F.cross_entropy(model(x), y).item() < 0.2 * before


def test_groups_have_their_own_damping_and_intervals() -> None:
    one, other = perceptron(6, 5, 4), perceptron(6, 5, 4)

    def groups(model: nn.Sequential) -> list[dict]:
        own = {"params": list(model[2].parameters()), "damping": 1.0, "basis_every": 2}
        return [{"params": model[0].parameters()}, own]

    options = {"damping": 0.1, "schedule": Schedule(1, 4)}
    alone = Preconditioner(one, fl.KFAC(), params=groups(one), **options)
    train(one, alone, torch.optim.SGD(one.parameters(), lr=0.05))
    joint = NaturalGradient(
        other, fl.KFAC(), lr=0.05, momentum=0.0, params=groups(other), **options
    )
    train(other, None, joint)
    torch.testing.assert_close(weights(one), weights(other), rtol=1e-12, atol=1e-12)
    assert alone.summary()["damping"].tolist() == [0.1, 1.0]


@pytest.mark.parametrize("name", ["kfac", "ekfac", "exact", "shampoo", "eva"])
def test_a_resumed_run_is_the_uninterrupted_one(name: str) -> None:
    def fresh() -> tuple:
        model = convolution()
        approximation = fl.approximations.get(name)()
        made = Preconditioner(model, approximation, damping=geometric(0.1), schedule=SHORT)
        return model, made, torch.optim.AdamW(model.parameters(), lr=0.01)

    straight = fresh()
    train(*straight, steps=range(8))
    first = fresh()
    train(*first, steps=range(5))
    file = io.BytesIO()
    torch.save([part.state_dict() for part in first], file)
    file.seek(0)
    again = fresh()
    for part, state in zip(again, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    train(*again, steps=range(5, 8))
    # reloaded columns of the exact block multiply in another order
    bound = 1e-13 if name == "exact" else 0.0
    torch.testing.assert_close(weights(again[0]), weights(straight[0]), rtol=bound, atol=bound)


def state_of(approximation, hidden: int = 5) -> dict:
    model = perceptron(6, hidden, 4)
    preconditioner = Preconditioner(model, approximation, damping=0.1)
    train(model, preconditioner, torch.optim.SGD(model.parameters(), lr=0.05), steps=[0])
    return preconditioner.state_dict()


def plain() -> dict:
    model = perceptron(6, 5, 4)
    return torch.optim.SGD(model.parameters(), lr=0.1).state_dict()


def joint() -> dict:
    model = perceptron(6, 5, 4)
    return NaturalGradient(model, fl.KFAC(), lr=0.1, damping=0.1).state_dict()


@pytest.mark.parametrize(
    ("foreign", "match"),
    [
        (plain, "not saved by a FisherLab preconditioner"),
        (joint, "not saved by a FisherLab preconditioner"),
        (lambda: {**state_of(fl.KFAC()), "format": 1}, "format 1, which an earlier version"),
        (lambda: {**state_of(fl.KFAC()), "format": 9}, "format 9, which a later version"),
        (lambda: state_of(fl.EKFAC()), r"is of Preconditioner\(EKFAC\)"),
        (lambda: state_of(fl.KFAC(), 8), r"'0' has shape \(8, 7\) there and \(5, 7\) here"),
        (lambda: {**state_of(fl.KFAC()), "shares": [None, None]}, "has 2 parameter groups"),
        (
            lambda: {**(s := state_of(fl.KFAC())), "weights": {**s["weights"], "9": ({}, None)}},
            r"layers that the model lacks: \['9'\]",
        ),
        (lambda: {**state_of(fl.KFAC()), "form": None}, "damaged: form is no dict"),
        (lambda: {**state_of(fl.KFAC()), "shares": 3}, "damaged: shares has not the form"),
        (lambda: {**state_of(fl.KFAC()), "weights": None}, "damaged: weights has not the form"),
        (lambda: {**state_of(fl.KFAC()), "running": {}}, "damaged: running has not the form"),
    ],
)
def test_a_foreign_state_is_refused_whole_by_name(foreign, match: str) -> None:
    model = perceptron(6, 5, 4)
    preconditioner = Preconditioner(model, fl.KFAC(), damping=0.1)
    train(model, preconditioner, torch.optim.SGD(model.parameters(), lr=0.05), steps=[1, 2])
    before = said(preconditioner.state_dict())
    with pytest.raises(ValueError, match=match):
        preconditioner.load_state_dict(foreign())
    assert said(preconditioner.state_dict()) == before


def said(state) -> str:
    """Every value of a nested state."""
    if isinstance(state, Tensor):
        return str(state.tolist())
    if isinstance(state, dict):
        return str({key: said(value) for key, value in state.items()})
    return str([said(value) for value in state] if isinstance(state, list | tuple) else state)


def test_the_part_of_an_optimizers_state_is_a_preconditioners() -> None:
    model = perceptron(6, 5, 4)
    optimizer = NaturalGradient(model, fl.KFAC(), lr=0.1, damping=0.1)
    train(model, None, optimizer, steps=[0])
    alone = Preconditioner(perceptron(6, 5, 4), fl.KFAC(), damping=0.1)
    alone.load_state_dict(optimizer.state_dict()["fisherlab"]["preconditioner"])
    for name, block in optimizer.blocks().items():
        assert torch.equal(alone.blocks()[name].dense(), block.dense())


def test_deletion_and_removal_leave_no_hooks() -> None:
    for removed in (True, False):
        model = perceptron(6, 5, 4)
        preconditioner = Preconditioner(model, fl.KFAC(), damping=0.1)
        train(model, preconditioner, torch.optim.SGD(model.parameters(), lr=0.05), steps=[0])
        if removed:
            preconditioner.remove()
        else:
            del preconditioner
            gc.collect()
        for module in model.modules():
            assert not module._forward_hooks and not module._forward_pre_hooks


def test_a_gradient_is_preconditioned_once() -> None:
    model = perceptron(6, 5, 4)
    preconditioner = Preconditioner(model, fl.KFAC(), damping=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    train(model, preconditioner, optimizer, steps=[0])
    left = [p.grad.clone() for p in model.parameters()]
    with pytest.raises(OptimizerError, match="preconditioned already"):
        preconditioner.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), left, strict=True))
    x, y = data(model, 1)
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(OptimizerError, match="was added to, one that is preconditioned already"):
        preconditioner.step()
    for to_none in (True, False):
        optimizer.zero_grad(set_to_none=to_none)
        F.cross_entropy(model(x), y).backward()
        preconditioner.step()
    assert preconditioner.steps == 3


def test_it_says_that_most_matrices_have_no_block() -> None:
    class Squared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.ones(6, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.a.square()

    model = Squared().double()
    alone = Preconditioner(model, fl.KFAC(), damping=0.1)
    x, y = data(perceptron(6, 5, 4), 0)
    F.cross_entropy(model(x), y).backward()
    left = model.a.grad.clone()
    with pytest.warns(UserWarning, match="only 0% of the trainable matrices have a block") as said:
        alone.step()
    assert said[0].filename == __file__ and torch.equal(model.a.grad, left)


def test_a_gradient_that_is_not_finite_is_refused_or_left() -> None:
    for nonfinite in ("raise", "skip"):
        model = perceptron(6, 5, 4)
        preconditioner = Preconditioner(model, fl.KFAC(), damping=0.1, nonfinite=nonfinite)
        x, y = data(model, 0)
        F.cross_entropy(model(x), y).backward()
        model[0].weight.grad[0, 0] = torch.nan
        left = model[2].weight.grad.clone()
        if nonfinite == "raise":
            with pytest.raises(OptimizerError, match="layers 0 has NaN"):
                preconditioner.step()
        else:
            preconditioner.step()
        assert preconditioner.steps == 0 and torch.equal(model[2].weight.grad, left)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"damping": levenberg_marquardt()}, ValueError, "take NaturalGradient"),
        ({"schedule": 10}, TypeError, r"schedule is a fl\.optim\.Schedule\(...\), got 10"),
        ({"nonfinite": "ignore"}, ValueError, "nonfinite"),
        ({"largest_factor": -1}, ValueError, "largest_factor"),
        ({"layers": ["nine"]}, ValueError, "nine"),
        ({"fisher_type": "foo"}, ValueError, "unknown fisher_type"),
    ],
)
def test_options_out_of_range_leave_no_hooks(options: dict, error: type, match: str) -> None:
    model = perceptron(6, 5, 4)
    with pytest.raises(error, match=match):
        Preconditioner(model, fl.KFAC(), **{"damping": 0.1, **options})
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (
            lambda: Schedule(statistics=0),
            "statistics_every, which counts steps, must be a whole number >= 1, got 0 (int)",
        ),
        (
            lambda: Schedule(corrections=0),
            "corrections_every, which counts steps, must be a whole number >= 1, got 0 (int)",
        ),
        (
            lambda: Schedule(basis=1.5),
            "basis_every, which counts steps, must be a whole number >= 1, got 1.5 (float)",
        ),
        (
            lambda: Schedule(warmup=-1),
            "warmup, which counts steps, must be a whole number >= 0, got -1 (int)",
        ),
        (
            lambda: Schedule(until=0),
            "until, which counts steps, must be a whole number >= 1, got 0 (int)",
        ),
        (lambda: Schedule(examples=0), "statistics_examples"),
        (lambda: Clip(kl=0.0), "kl_clip must be positive"),
        (lambda: Clip(norm=-1.0), "max_norm must be positive"),
        (
            lambda: Clip(warmup=0.5),
            "warmup, which counts steps, must be a whole number >= 0, got 0.5 (float)",
        ),
    ],
)
def test_parts_refuse_what_is_out_of_range(make, match: str) -> None:
    with pytest.raises(ValueError, match=re.escape(match)):
        make()


def test_parts_and_flat_options_are_the_same() -> None:
    flat = {"statistics_every": 2, "basis_every": 3, "corrections_every": 4, "warmup": 1,
            "decay": 0.5, "statistics_examples": 5, "kl_clip": 1e-5, "max_norm": 0.1}  # fmt: skip
    parts = {"schedule": Schedule(2, 3, 4, 1, 0.5, 5), "clip": Clip(1e-5, 0.1, 1)}
    ends = []
    for options in (flat, parts):
        model = perceptron(6, 5, 4)
        train(model, None, NaturalGradient(model, fl.EKFAC(), lr=0.1, damping=0.1, **options))
        ends.append(weights(model))
        model = perceptron(6, 5, 4)
        train(model, None, fl.optim.create("ekfac", model, **options))
        ends.append(weights(model))
    assert torch.equal(ends[0], ends[2]) and torch.equal(ends[1], ends[3])
    # a part that is given stands for the whole of the preset's
    optimizer = fl.optim.create("kfac", perceptron(6, 5, 4), clip=Clip(kl=1e-2), decay=0.9)
    assert optimizer.clip == Clip(kl=1e-2)
    assert optimizer.preconditioner.schedule == Schedule(warmup=20, decay=0.9)
    with pytest.raises(AttributeError, match=r"keeps kl_clip in clip\.kl"):
        optimizer.kl_clip = None
    with pytest.raises(TypeError, match=r"clip is a fl\.optim\.Clip\(...\), got 1"):
        fl.optim.create("ngd", perceptron(6, 5, 4), clip=1)
