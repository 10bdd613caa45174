"""Bad input: a named error, and no parameter changed before it."""

from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from optim_references import perceptron, weights
from torch import Tensor, nn

import fisherlab as fl
from fisherlab.optim import OptimizerError
from fisherlab.optim.create import GRADIENT_ONLY
from fisherlab.optim.scale import recognised_factor

CURVATURE = [n for n in fl.optim.names() if n not in GRADIENT_ONLY]
STEPPED = [n for n in CURVATURE if n != "kbfgs"]


def small() -> nn.Sequential:
    return perceptron(6, 5, 4)


def data(n: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(n, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 4, (n,), generator=generator)


def closing(optimizer, model: nn.Module, spoil=lambda: None):
    """A closure of one batch; `spoil` may change what its backward pass left."""
    x, y = data()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        spoil()
        return loss

    return closure


def refused(model: nn.Module, step, error: type[Exception], match: str) -> None:
    before = weights(model).clone()
    with pytest.raises(error, match=match):
        step()
    assert torch.equal(weights(model), before)


@pytest.mark.parametrize("name", CURVATURE)
def test_non_finite_gradient(name: str) -> None:
    model = small()
    optimizer = fl.optim.create(name, model)

    def spoil() -> None:
        model[2].weight.grad[0, 0] = torch.nan

    closure = closing(optimizer, model, spoil)
    refused(model, lambda: optimizer.step(closure), OptimizerError, "layers? .*2.* NaN")
    optimizer.remove()  # the closure keeps it alive
    optimizer = fl.optim.create(name, model, nonfinite="skip")
    before = weights(model).clone()
    optimizer.step(closing(optimizer, model, spoil))
    assert torch.equal(weights(model), before) and optimizer.steps == 0


def test_a_finite_gradient_whose_norm_overflows_is_called_that():
    model = small()
    optimizer = fl.optim.create("kfac", model)
    x, y = data()
    F.cross_entropy(model(x), y).backward()
    for p in model.parameters():
        p.grad.fill_(1e300)
    refused(model, optimizer.step, OptimizerError, "so large that its norm overflows")


@pytest.mark.parametrize("name", STEPPED)
def test_non_finite_data(name: str) -> None:
    model = small()
    optimizer = fl.optim.create(name, model)
    x, y = data()
    x[0, 0] = torch.inf

    def whole() -> None:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    refused(model, whole, (OptimizerError, fl.blocks.BlockError), "NaN or inf")


@pytest.mark.parametrize("name", CURVATURE)
def test_step_without_backward(name: str) -> None:
    model = small()
    optimizer = fl.optim.create(name, model)
    refused(model, lambda: optimizer.step(lambda: None), OptimizerError, "backward")


@pytest.mark.parametrize("name", STEPPED)
def test_loop_that_bypasses_the_model(name: str) -> None:
    """`model.forward` runs no hook of the model: nothing may be silently plain."""
    if name in ("shampoo", "kl_shampoo", "dykaf"):
        pytest.skip("needs nothing but the gradient")
    model = small()
    optimizer = fl.optim.create(name, model)
    x, y = data()

    def whole() -> None:
        F.cross_entropy(model.forward(x), y).backward()
        optimizer.step()

    refused(model, whole, OptimizerError, r"model\.forward|forward of the model")


@pytest.mark.parametrize("name", STEPPED)
def test_criterion_that_must_be_named(name: str) -> None:
    if name in ("shampoo", "kl_shampoo", "dykaf"):
        pytest.skip("needs no scale")
    x, _ = data()
    target = torch.randn(12, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    model = small()
    optimizer = fl.optim.create(name, model)

    def whole() -> None:
        F.mse_loss(model(x), target).backward()
        optimizer.step()

    refused(model, whole, OptimizerError, "criterion")
    model, criterion = small(), nn.MSELoss()
    optimizer = fl.optim.create(name, model, criterion=criterion)
    before = weights(model)
    criterion(model(x), target).backward()
    optimizer.step()
    assert not torch.equal(before, weights(model))


def test_singular_factor_names_the_damping() -> None:
    model = small()
    optimizer = fl.optim.NaturalGradient(model, fl.KFAC(), lr=0.1, damping=0.0)
    x, y = data(2)

    def whole() -> None:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    refused(model, whole, fl.blocks.BlockError, "damping")


def test_batch_size_that_fngd_has_no_coefficients_for() -> None:
    model = small()
    optimizer = fl.optim.create("fngd", model, coefficient_steps=1)
    F.cross_entropy(model(data()[0]), data()[1]).backward()
    optimizer.step()
    x, y = data(13)
    optimizer.zero_grad()
    refused(
        model, lambda: F.cross_entropy(model(x), y).backward(), OptimizerError, "13 examples.*12"
    )


def test_fngd_by_example_needs_indices() -> None:
    model = small()
    optimizer = fl.optim.create("fngd", model, share="example")
    x, y = data()
    F.cross_entropy(model(x), y).backward()
    refused(model, optimizer.step, OptimizerError, "set_batch")


def test_kbfgs_needs_a_closure() -> None:
    model = small()
    optimizer = fl.optim.create("kbfgs", model)
    F.cross_entropy(model(data()[0]), data()[1]).backward()
    refused(model, optimizer.step, OptimizerError, "closure")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"damping": -1.0}, "damping"),
        ({"damping": float("nan")}, "damping"),
        ({"lr": -0.1}, "lr"),
        ({"momentum": -0.1}, "momentum"),
        ({"weight_decay": float("inf")}, "weight_decay"),
        ({"momentum": 0.0, "nesterov": True}, "Nesterov"),
        ({"nonfinite": "ignore"}, "nonfinite"),
        ({"kl_clip": 0.0}, "kl_clip"),
        ({"statistics_every": 0}, "statistics_every"),
        ({"basis_every": 1.5}, "basis_every"),
        ({"statistics_examples": 0}, "statistics_examples"),
        ({"decay": 1.5}, "decay"),
        ({"fisher_type": "foo"}, "unknown fisher_type 'foo'; one of exact, mc, empirical"),
    ],
)
def test_options_out_of_range(options: dict, match: str) -> None:
    model = small()
    with pytest.raises(ValueError, match=match):
        fl.optim.create("kfac", model, **options)
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("name", CURVATURE)
def test_an_option_that_a_loop_takes_out_of_a_group_is_refused_before_any_change(name: str) -> None:
    model = small()
    optimizer = fl.optim.create(name, model)
    closure = closing(optimizer, model)
    may_be_none = {"params", "corrections_every"}
    may_be_none |= {"damping"} if getattr(optimizer, "alpha", None) is not None else set()
    for group in optimizer.param_groups:
        for option in sorted(group.keys() - may_be_none):
            value, group[option] = group[option], None
            refused(model, lambda: optimizer.step(closure), ValueError, option)
            group[option] = value
    optimizer.step(closure)


NUMBERS = ("lr", "damping", "weight_decay", "momentum", "eps", "statistics_every", "basis_every")


@pytest.mark.parametrize("name", CURVATURE)
@pytest.mark.parametrize("value", [10**30, -(10**30), 10**400, Fraction(1, 10)])
def test_a_number_that_no_tensor_can_hold_is_refused_by_its_option_s_name(name, value) -> None:
    model = small()
    optimizer = fl.optim.create(name, model)
    closure = closing(optimizer, model)
    for option in sorted({*NUMBERS} & {*fl.optim.option_names(name)}):
        with pytest.raises(ValueError, match=option):
            fl.optim.create(name, small(), **{option: value})
    for group in optimizer.param_groups:
        for option in sorted({*NUMBERS} & {*group}):
            before, group[option] = group[option], value
            refused(model, lambda: optimizer.step(closure), ValueError, option)
            group[option] = before
    with pytest.raises(ValueError, match="max_norm must be positive or None, got 1000"):
        fl.optim.Clip(norm=10**30)


@pytest.mark.parametrize("name", ["kfac", "ngd", "tengrad", "soap"])
def test_a_tensor_of_one_element_is_the_number_that_it_holds(name: str) -> None:
    wanted = {"lr": 0.5, "weight_decay": 0.25}
    if name != "soap":
        wanted |= {"momentum": 0.5, "kl_clip": 1.0, "max_norm": 0.125}
    found = []
    for make in (float, lambda x: torch.tensor([[x]])):
        model = small()
        optimizer = fl.optim.create(name, model, **{key: make(x) for key, x in wanted.items()})
        for _ in range(2):
            optimizer.step(closing(optimizer, model))
        assert repr(optimizer)
        found.append(weights(model))
    assert torch.equal(*found)


@pytest.mark.parametrize("name", CURVATURE)
def test_a_class_is_no_criterion(name: str) -> None:
    with pytest.raises(ValueError, match="criterion is the module or the function"):
        fl.optim.create(name, small(), criterion=nn.CrossEntropyLoss)


# what has no type of its own: a criterion and a rule are callables, and some options may be absent
OPEN = {"params", "criterion"}
JUNK = ("junk", 1j, float("nan"), torch.ones(2))


@pytest.mark.parametrize("name", fl.optim.names())
def test_junk_for_any_option_is_refused_by_the_option_s_name(name: str) -> None:
    model = small()
    for option in set(fl.optim.option_names(name)) - OPEN:
        for junk in JUNK:
            with pytest.raises((ValueError, TypeError)) as refusal:
                fl.optim.create(name, model, **{option: junk})
            said = str(refusal.value).lower()
            assert any(word in said for word in option.removesuffix("s").split("_")), option


@pytest.mark.parametrize("name", CURVATURE)
def test_unknown_option_and_name(name: str) -> None:
    with pytest.raises(TypeError, match=f"optimizer '{name}' has no option 'colour'"):
        fl.optim.create(name, small(), colour="red")
    with pytest.raises(ValueError, match="nearest.*" + name[:3]):
        fl.optim.create(name + "x", small())


def test_unknown_option_names_the_nearest() -> None:
    with pytest.raises(
        TypeError, match=r"no option 'dampning'; nearest: damping.* It takes .*lr, "
    ):
        fl.optim.create("kfac", small(), dampning=0.1)
    with pytest.raises(TypeError, match=r"no option 'momentun'; nearest: momentum"):
        fl.optim.create("sgd", small(), momentun=0.1)


@pytest.mark.parametrize("name", ["ngd", "shampoo", "ekfac"])
def test_unknown_fisher_type_leaves_no_hooks(name: str) -> None:
    model = small()
    with pytest.raises(ValueError, match="one of exact, mc, empirical"):
        fl.optim.create(name, model, fisher_type="foo")
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("name", ["ngd_dense", "blockwise_ngd", "kronecker_sum"])
def test_dense_methods_refuse_a_size_with_the_reason(name: str) -> None:
    model = nn.Sequential(nn.Linear(100, 80), nn.ReLU(), nn.Linear(80, 10))
    with pytest.raises(ValueError, match="refused above"):
        fl.optim.create(name, model)
    assert not any(m._forward_hooks for m in model.modules())


def test_state_of_something_else() -> None:
    model = small()
    optimizer = fl.optim.create("kfac", model)
    with pytest.raises(ValueError, match="FisherLab optimizer"):
        optimizer.load_state_dict(torch.optim.SGD(model.parameters(), lr=0.1).state_dict())


def test_nothing_changes_inside_the_method_before_an_error() -> None:
    """Running statistics too: a refused step leaves the state as it was."""
    model = small()
    optimizer = fl.optim.create("kfac", model, statistics_every=1, basis_every=1)
    x, y = data()
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    running = optimizer.preconditioner.curvature.parts["0"].running
    before = {k: v.clone() for k, v in running.sums.items()}
    optimizer.zero_grad()
    (F.cross_entropy(model(x), y) * torch.nan).backward()
    with pytest.raises(OptimizerError):
        optimizer.step()
    for key, value in running.sums.items():
        assert torch.equal(value, before[key])
    assert optimizer.steps == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_at_the_output_says_so(value: float) -> None:
    """And not that the loss is no cross entropy, which its check would find as well."""
    output = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    gradient = output.softmax(1) / 5
    gradient[2, 1] = value
    with pytest.raises(OptimizerError, match="at the model's output has NaN or inf .* diverged"):
        recognised_factor(output, gradient)
    model, (x, y) = small(), data()
    optimizer = fl.optim.create("fngd", model)
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y) * value
    loss.backward()  # a loop that skips such a step goes on from here
    with pytest.raises(OptimizerError, match="gradient of layers .* has NaN or inf"):
        optimizer.step()


@pytest.mark.parametrize(
    "options, said",
    [
        ({"every": 0}, "every must be a whole number >= 1, got 0"),
        ({"decay": 1.0}, "decay must be a finite number >= 0 and < 1"),
        ({"eps": -1.0}, "eps must be a finite number > 0"),
        ({"rank": 0}, "rank must be a whole number >= 1"),
    ],
)
def test_reconstruct_refuses_a_number_out_of_range_and_leaves_the_model(options, said) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=said):
        fl.optim.reconstruct(model, **options)
    assert not fl.optim.sngd.local_fishers(model) and not model._forward_hooks


@pytest.mark.parametrize("value", [-1, "junk", None, 10**30])
def test_muon_refuses_an_option_of_adamw_before_its_matrices_move(value: object) -> None:
    model = small()
    optimizer = fl.optim.create("muon", model)
    step = closing(optimizer, model)
    (group,) = (g for g in optimizer.param_groups if g["rule"] == "adamw")
    for option in ("lr", "weight_decay", "eps", "betas", "amsgrad", "maximize", "capturable"):
        before, group[option] = group[option], value
        refused(model, lambda: optimizer.step(step), ValueError, option)
        group[option] = before
    optimizer.step(step)
