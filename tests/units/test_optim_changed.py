"""A model that changes under its optimizer, and states of other optimizers: refused by name."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from optim_references import perceptron
from torch import nn

import fisherlab as fl
from fisherlab.optim import OptimizerError

METHODS = ("kfac", "tekfac", "fngd", "tengrad", "ngd", "eva", "ang")


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    generator = torch.Generator().manual_seed(0)
    p = next(model.parameters())
    x = torch.randn(12, 6, generator=generator, dtype=torch.float64).to(p.dtype)
    optimizer.zero_grad()
    F.cross_entropy(model(x), torch.randint(0, 4, (12,), generator=generator)).backward()
    optimizer.step()


def another_layer(model: nn.Sequential) -> None:
    model[2] = nn.Linear(5, 4, dtype=torch.float64)


def another_weight(model: nn.Sequential) -> None:
    model[2].weight = nn.Parameter(torch.ones(4, 5, dtype=torch.float64))


def another_dtype(model: nn.Sequential) -> None:
    model.float()


@pytest.mark.parametrize("change", [another_layer, another_weight, another_dtype])
@pytest.mark.parametrize("name", METHODS)
def test_model_changed_under_the_optimizer(name: str, change: Callable) -> None:
    model = perceptron(6, 5, 4)
    optimizer = fl.optim.create(name, model)
    step(model, optimizer)
    change(model)
    before = [p.clone() for p in model.parameters()]
    layer = "'0'" if change is another_dtype else "'2'"
    with pytest.raises(OptimizerError, match=f"model was changed .*layer {layer}"):
        step(model, optimizer)
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))


def test_shape_changed_in_place() -> None:
    model = perceptron(6, 5, 4)
    optimizer = fl.optim.create("kfac", model)
    step(model, optimizer)
    model[0].weight.data, model[0].bias.data = torch.randn(7, 6).double(), torch.ones(7).double()
    model[2].weight.data = torch.randn(4, 7).double()
    with pytest.raises(OptimizerError, match=r"'0' had a weight of shape \(5, 6\).*\(7, 6\)"):
        step(model, optimizer)


def test_a_layer_under_another_name_and_a_parametrized_one_are_the_same() -> None:
    model = perceptron(6, 5, 4)
    optimizer = fl.optim.create("kfac", model)
    step(model, optimizer)
    model[0] = nn.Sequential(model[0])
    nn.utils.parametrize.register_parametrization(model[2], "weight", nn.Identity())
    step(model, optimizer)
    assert optimizer.steps == 2


def test_half_precision_is_refused() -> None:
    model = perceptron(6, 5, 4).bfloat16()
    optimizer = fl.optim.create("kfac", model)
    with pytest.raises(OptimizerError, match=r"layer '0' is torch\.bfloat16"):
        step(model, optimizer)


def saved(name: str, hidden: int = 5) -> dict:
    model = perceptron(6, hidden, 4)
    optimizer = fl.optim.create(name, model)
    step(model, optimizer)
    return optimizer.state_dict()


@pytest.mark.parametrize(("theirs", "ours"), [("kfac", "tekfac"), ("kfac", "fngd"), ("ngd", "eva")])
def test_state_of_another_method(theirs: str, ours: str) -> None:
    optimizer = fl.optim.create(ours, perceptron(6, 5, 4))
    with pytest.raises(ValueError, match="this state is of"):
        optimizer.load_state_dict(saved(theirs))
    assert optimizer.steps == 0


def test_state_of_another_model() -> None:
    optimizer = fl.optim.create("kfac", perceptron(6, 5, 4))
    with pytest.raises(ValueError, match=r"parameter 0 has shape \(8, 6\) there and \(5, 6\) here"):
        optimizer.load_state_dict(saved("kfac", hidden=8))
    assert not optimizer.state and not optimizer.blocks()


@pytest.mark.parametrize("name", ["kfac", "fngd", "ngd"])
def test_state_of_another_format_is_refused_whole(name: str) -> None:
    model = perceptron(6, 5, 4)
    optimizer = fl.optim.create(name, model)
    step(model, optimizer)
    state = optimizer.state_dict()
    for number, when in ((None, "an earlier"), (1, "an earlier"), (3, "a later")):
        other = {**state, "fisherlab": {**state["fisherlab"], "format": number}}
        if number is None:
            del other["fisherlab"]["format"]
        fresh = fl.optim.create(name, perceptron(6, 5, 4))
        with pytest.raises(ValueError, match=f"format {number or 1}, which {when} version"):
            fresh.load_state_dict(other)
        assert fresh.steps == 0 and not fresh.state
    options = copy.deepcopy(state["param_groups"])
    del options[0]["weight_decay_placement"]
    with pytest.raises(ValueError, match="parameter group of this state lacks weight_decay_plac"):
        fresh.load_state_dict({**state, "param_groups": options})
    with pytest.raises(ValueError, match="this state has 2 parameter groups, and this optimizer 1"):
        fresh.load_state_dict({**state, "param_groups": 2 * state["param_groups"]})
    assert fresh.steps == 0 and not fresh.state


def test_words_in_place_of_numbers_and_parameters_in_place_of_a_model() -> None:
    model = perceptron(6, 5, 4)
    for name in ("lr", "damping"):
        with pytest.raises(
            ValueError, match=rf"^{name}\b.* must be a finite number >= 0, got 'big' \(str\)"
        ):
            fl.optim.create("kfac", model, **{name: "big"})
    with pytest.raises(TypeError, match="takes the model, got generator"):
        fl.optim.create("kfac", model.parameters())


def test_repr_names_the_approximation() -> None:
    optimizer = fl.optim.NaturalGradient(perceptron(6, 5, 4), fl.KFAC(), lr=0.1, damping=1e-2)
    assert repr(optimizer).startswith("NaturalGradient of KFAC(")
