"""A refused or interrupted step leaves no trace, and the next batch is as if it had not been."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fisherlab as fl
from fisherlab.optim import OptimizerError

METHODS = ("kfac", "shampoo", "ngd", "tengrad", "soap", "kbfgs")


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def data(seed: int = 1, n: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (n,), generator=generator)


def closure(
    model: nn.Module, optimizer: torch.optim.Optimizer, seed: int = 1, scale: float = 1.0
) -> Callable[[], Tensor]:
    def evaluate() -> Tensor:
        x, y = data(seed)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y) * scale
        loss.backward()
        return loss

    return evaluate


def flat(value: Any) -> list[Any]:
    """The numbers of a nest, for comparison bit by bit."""
    if isinstance(value, dict):
        return [x for key, part in value.items() for x in (str(key), *flat(part))]
    if isinstance(value, list | tuple):
        return [x for part in value for x in flat(part)]
    return value.flatten().tolist() if isinstance(value, Tensor) else [value]


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Any]:
    return [*flat(model.state_dict()), *flat(optimizer.state_dict())]


def trained(method: str, **options: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = small()
    optimizer = fl.optim.create(method, model, **options)
    optimizer.step(closure(model, optimizer))
    return model, optimizer


@pytest.mark.parametrize("method", METHODS)
def test_a_step_that_is_interrupted_in_a_decomposition_changes_nothing(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"basis_every": 1} if method == "soap" else {}
    model, optimizer = trained(method, **options)
    twin, other = trained(method, **options)
    step = closure(model, optimizer, 2)
    if method not in ("kbfgs", "tengrad"):
        step()
    if method == "shampoo":
        for group in optimizer.param_groups + other.param_groups:
            group["basis_every"] = 1
    before = everything(model, optimizer)

    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        for name in ("eigh", "cholesky_ex", "inv_ex"):
            patch.setattr(torch.linalg, name, interrupted)
        if method == "kbfgs":
            calls: list[int] = []

            def twice() -> Tensor:
                calls.append(1)
                return step() if len(calls) == 1 else interrupted()

            with pytest.raises(KeyboardInterrupt):
                optimizer.step(twice)
        else:
            with pytest.raises(KeyboardInterrupt):
                optimizer.step(step if method == "tengrad" else None)
    assert everything(model, optimizer) == before
    optimizer.step(step)
    other.step(closure(twin, other, 2))
    assert flat(model.state_dict()) == flat(twin.state_dict())


def test_a_step_in_half_precision_is_refused_and_the_next_in_float32_is_taken() -> None:
    model = small().float()
    optimizer = fl.optim.create("kfac", model)
    x, y = data()
    model.bfloat16()
    F.cross_entropy(model(x.bfloat16()), y).backward()
    with pytest.raises(OptimizerError, match="bfloat16"):
        optimizer.step()
    model.float()
    optimizer.zero_grad()
    F.cross_entropy(model(x.float()), y).backward()
    optimizer.step()
    model.double()
    with pytest.raises(OptimizerError, match="was torch.float32 at the last step"):
        optimizer.step()


class Used(nn.Module):
    """A weight that a function uses, which only a pass shows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 4, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        if bool(x.isnan().any()):
            raise ValueError("no such batch")
        return F.linear(x, self.weight)


def test_a_first_pass_that_breaks_off_hides_no_weight() -> None:
    model, (x, y) = Used(), data()
    optimizer: Any = fl.optim.create("shampoo", model)
    with pytest.raises(ValueError, match="no such batch"):
        model(x * float("nan"))
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert len(optimizer.blocks()) == 1


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
@pytest.mark.parametrize("method", ["exact", "tengrad", "sngd"])
def test_a_model_is_exported_and_transformed_as_without_its_optimizer(method: str) -> None:
    model, plain, (x, y) = small(), small(), data()
    optimizer = fl.optim.create(method, model)
    assert torch.equal(torch.jit.trace(model, (x,))(x), plain(x))
    program = torch.export.export(model, (x,))
    assert len(program.graph.nodes) == len(torch.export.export(plain, (x,)).graph.nodes)

    def gradients(network: nn.Module) -> Tensor:
        def loss(parameters: Any, one: Tensor, label: Tensor) -> Tensor:
            output = torch.func.functional_call(network, parameters, (one[None],))
            return F.cross_entropy(output, label[None])

        values = {name: p.detach() for name, p in network.named_parameters()}
        return torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(values, x, y)["0.weight"]

    assert torch.equal(gradients(model), gradients(plain))
    optimizer.step(closure(model, optimizer))
    assert torch.overrides._len_torch_function_stack() == 0


@pytest.mark.parametrize("method", ["kfac", "tengrad", "kbfgs"])
@pytest.mark.parametrize(
    "group, said",
    [
        (None, "a parameter group is a dict, got None"),
        ({"lr": -1.0}, "lr must be a finite number >= 0"),
        ({"damping": "x"}, "damping"),
        ({"momentum": float("nan")}, "momentum must be a finite number"),
    ],
)
def test_a_group_with_an_option_that_is_none_is_not_added(method, group, said) -> None:
    optimizer = fl.optim.create(method, small())
    if group is not None:
        group = {"params": [nn.Parameter(torch.zeros(3))], **group}
    with pytest.raises((ValueError, TypeError), match=said):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("method", ["kfac", "ngd"])
def test_a_parameter_whose_gradient_was_taken_away_does_not_move(method: str) -> None:
    model = small()
    optimizer = fl.optim.create(method, model, kl_clip=1e-9, max_norm=1e-3)
    closure(model, optimizer)()
    model[0].bias.grad = None
    bias, weight = model[0].bias.detach().clone(), model[0].weight.detach().clone()
    optimizer.step()
    assert torch.equal(model[0].bias, bias) and not torch.equal(model[0].weight, weight)


class Positions(nn.Module):
    """A layer whose rows are those of a table, and no example of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Parameter(torch.ones(2, 4)), nn.Linear(4, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) + self.head(self.table).mean(0)


@pytest.mark.parametrize("fisher_type", ["empirical", "mc", "exact"])
def test_a_batch_without_examples_is_refused_or_a_step_of_no_length(fisher_type: str) -> None:
    criterion, empty = nn.MSELoss(reduction="sum"), torch.zeros(0, 4, dtype=torch.float64)
    for model in (Positions(), small()):
        optimizer: Any = fl.optim.create(
            "kfac", model, criterion=criterion, fisher_type=fisher_type
        )
        before = flat(model.state_dict())
        criterion(model(empty), torch.zeros(0, 3, dtype=torch.float64)).backward()
        if isinstance(model, Positions):
            with pytest.raises(OptimizerError, match="the batch has no example; leave it out"):
                optimizer.step()
        else:
            optimizer.step()
        assert flat(model.state_dict()) == before and not optimizer.blocks()


@pytest.mark.parametrize("method", ["kfac", "ngd", "tengrad", "fngd"])
def test_a_loss_times_zero_is_refused_by_name(method: str) -> None:
    model, criterion = small(), nn.CrossEntropyLoss()
    optimizer = fl.optim.create(method, model, criterion=criterion)
    x, y = data()
    with pytest.raises(OptimizerError, match="the loss is multiplied by 0"):
        (criterion(model(x), y) * 0.0).backward()
        optimizer.step()


@pytest.mark.parametrize("method", ["tengrad", "fngd", "ngd_smw", "kfac"])
@pytest.mark.parametrize("given", [True, False])
def test_a_step_that_is_not_finite_is_skipped_though_its_scale_is_not_known(method, given) -> None:
    model, criterion = small(), nn.CrossEntropyLoss()
    more = {"criterion": criterion} if given else {}
    optimizer = fl.optim.create(method, model, nonfinite="skip", **more)
    before, (x, y) = flat(model.state_dict()), data()
    (criterion(model(x), y) * float("inf")).backward()
    optimizer.step()
    assert flat(model.state_dict()) == before
    optimizer.step(closure(model, optimizer))
    assert flat(model.state_dict()) != before


def test_drawn_labels_of_outputs_with_nan_break_no_forward_pass() -> None:
    model, (x, y) = small(), data()
    optimizer = fl.optim.create("kfac", model, fisher_type="mc")
    F.cross_entropy(model(x * float("nan")), y).backward()
    with pytest.raises(OptimizerError, match="gradient of layers .* has NaN"):
        optimizer.step()


@pytest.mark.parametrize("method", ["kfac", "tengrad", "soap", "muon"])
@pytest.mark.parametrize("junk", [3, "x", [[0, 1]], None])
def test_a_state_with_junk_in_the_place_of_its_parameters_is_refused(method, junk) -> None:
    model, optimizer = trained(method)
    before, state = everything(model, optimizer), optimizer.state_dict()
    state["param_groups"][0]["params"] = junk
    with pytest.raises(ValueError, match="the params of a group are a list of whole numbers"):
        optimizer.load_state_dict(state)
    state = optimizer.state_dict()
    state["state"] = {**state["state"], 0: []}
    with pytest.raises(ValueError, match="damaged|not of"):
        optimizer.load_state_dict(state)
    assert everything(model, optimizer) == before


def mapped(state: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A nest with a function of each of its tensors."""
    if isinstance(state, dict):
        return {key: mapped(value, function) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(mapped(value, function) for value in state)
    return function(state) if isinstance(state, Tensor) else state


def to(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor


@pytest.mark.parametrize("method", ["kfac", "ekfac", "tkfac", "exact", "fngd", "kbfgs", "tengrad"])
@pytest.mark.parametrize(
    "cast",
    [to(torch.float32), to(torch.float16), to(torch.int32), to(torch.complex64), Tensor.to_sparse],
)
def test_a_state_whose_tensors_were_cast_is_refused_whole(method: str, cast) -> None:
    model, optimizer = trained(method, momentum=0.5)
    before, state = everything(model, optimizer), optimizer.state_dict()
    with pytest.raises(ValueError, match="not the form that was saved|sparse"):
        optimizer.load_state_dict(mapped(state, cast))
    assert everything(model, optimizer) == before
    optimizer.load_state_dict(state)
    assert everything(model, optimizer) == before


@pytest.mark.parametrize("method", ["kfac", "ekfac", "shampoo", "diagonal"])
def test_a_state_of_a_model_of_another_dtype_is_refused_whole(method: str) -> None:
    _, theirs = trained(method)
    model = small().float()
    optimizer = fl.optim.create(method, model)
    before = everything(model, optimizer)
    with pytest.raises(
        ValueError, match=r"block of torch.float64 .* whose weight is torch.float32"
    ):
        optimizer.load_state_dict(theirs.state_dict())
    assert everything(model, optimizer) == before


@pytest.mark.parametrize("method", ["soap", "muon"])
def test_torch_casts_what_it_keeps_itself_but_not_from_half_precision(method: str) -> None:
    model, optimizer = trained(method)
    before, state = everything(model, optimizer), optimizer.state_dict()
    for cast in (to(torch.float16), to(torch.int32), Tensor.to_sparse):
        with pytest.raises(ValueError, match="nothing was loaded"):
            optimizer.load_state_dict(mapped(state, cast))
    for key in ("L", "Q_L", "exp_avg") if method == "soap" else ("momentum_buffer",):
        bad = {**state, "state": {**state["state"], 0: {**state["state"][0], key: torch.ones(3)}}}
        with pytest.raises(ValueError, match=f"as {key} of a parameter of shape"):
            optimizer.load_state_dict(bad)
    assert everything(model, optimizer) == before


def test_soap_of_half_precision_resumes() -> None:
    found = []
    for resumed in (False, True):
        model = small().bfloat16()
        optimizer = fl.optim.create("soap", model)
        for seed in range(3):
            if resumed and seed == 2:
                state, optimizer = optimizer.state_dict(), fl.optim.create("soap", model)
                optimizer.load_state_dict(state)
            optimizer.zero_grad()
            x, y = data(seed)
            F.cross_entropy(model(x.bfloat16()).float(), y).backward()
            optimizer.step()
        found.append(everything(model, optimizer))
    assert found[0] == found[1]


@pytest.mark.parametrize("method", ["exact", "ngd", "tengrad", "kfac"])
@pytest.mark.parametrize("value", [float("nan"), 3e38])
def test_a_first_batch_that_overflows_demotes_no_layer(method: str, value: float) -> None:
    model, twin, (x, y) = small().float(), small().float(), data()
    optimizer, other = fl.optim.create(method, model), fl.optim.create(method, twin)
    x = x.float()
    wild = torch.full_like(x, value)
    F.cross_entropy(model(wild), y).backward()
    with pytest.raises(OptimizerError):
        optimizer.step()
    for network, stepped in ((model, optimizer), (twin, other)):
        stepped.zero_grad()
        F.cross_entropy(network(x), y).backward()
        stepped.step()
    assert flat(model.state_dict()) == flat(twin.state_dict())
    assert not optimizer.left_out  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", ["tengrad", "fngd", "kfac"])
def test_a_bias_that_is_frozen_for_a_pass_costs_no_block(method: str) -> None:
    """Its step is that of a layer whose bias the optimizer does not have."""
    model, twin, (x, y) = small(), small(), data()
    options = {} if method == "fngd" else {"damping": 0.1}
    optimizer = fl.optim.create(method, model, momentum=0.0, kl_clip=None, **options)
    model[0].bias.requires_grad_(False)
    twin[0].bias.requires_grad_(False)
    other = fl.optim.create(method, twin, momentum=0.0, kl_clip=None, **options)
    for network, stepped in ((model, optimizer), (twin, other)):
        F.cross_entropy(network(x), y).backward()
        stepped.step()
    if method != "kfac":  # whose input factor has a row for the bias
        assert torch.allclose(model[0].weight, twin[0].weight, rtol=1e-12, atol=0)
    assert torch.equal(model[0].bias, twin[0].bias)
    model[0].bias.requires_grad_(True)
    optimizer.step(closure(model, optimizer))
    assert not optimizer.left_out  # type: ignore[attr-defined]
    assert not torch.equal(model[0].bias, twin[0].bias)


def step_of(method: str, loss: Callable[[nn.Module, nn.Module], Tensor]) -> list[Any]:
    """The parameters after one step by the exact block of a loss, which gets the criterion."""
    model, criterion = small(), nn.MSELoss()
    options = {"momentum": 0.0, "kl_clip": None, "damping": 0.1, "criterion": criterion}
    if method != "tengrad":
        options["fisher_type"] = "empirical"
    optimizer = fl.optim.create(method, model, **options)
    loss(model, criterion).backward()
    optimizer.step()
    return flat(model.state_dict())


def near(found: list[Any], expected: list[Any]) -> None:
    for one, two in zip(found, expected, strict=True):
        assert one == (pytest.approx(two, rel=1e-9) if isinstance(two, float) else two)


@pytest.mark.parametrize("method", ["exact", "kfac", "ngd", "tengrad"])
def test_a_loss_of_another_model_tells_nothing_of_this_one(method: str) -> None:
    (x, _), other = data(), nn.Linear(4, 3).double()
    labels = x[:, :3].sin()
    alone = step_of(method, lambda model, criterion: criterion(model(x), labels))

    def beside(model: nn.Module, criterion: nn.Module) -> Tensor:
        output = model(x)
        teachers = criterion(other(x), labels)
        return criterion(output, labels) + 0.3 * teachers

    assert step_of(method, beside) == alone


@pytest.mark.parametrize("method", ["exact", "kfac", "ngd", "tengrad"])
def test_losses_of_two_outputs_are_each_of_their_own(method: str) -> None:
    (x, _), (far, _) = data(), data(7)
    labels = x[:, :3].sin()

    def apart(model: nn.Module, criterion: nn.Module) -> Tensor:
        criterion(model(x), labels).backward()
        return 3 * criterion(model(far), labels)

    def together(model: nn.Module, criterion: nn.Module) -> Tensor:
        one, two = model(x), model(far)
        late = criterion(two, labels)
        return criterion(one, labels) + 3 * late

    near(step_of(method, together), step_of(method, apart))


@pytest.mark.parametrize("method", ["exact", "kfac", "ngd", "tengrad"])
def test_mixed_labels_are_one_loss(method: str) -> None:
    """`p l(f, y) + (1 - p) l(f, z)` of a squared error has the gradients at `p y + (1 - p) z`."""
    x, _ = data()
    y, z = x[:, :3].sin(), x[:, 1:].cos()

    def mixed(model: nn.Module, criterion: nn.Module) -> Tensor:
        output = model(x)
        return 0.3 * criterion(output, y) + 0.7 * criterion(output, z)

    alone = step_of(method, lambda model, criterion: criterion(model(x), 0.3 * y + 0.7 * z))
    near(step_of(method, mixed), alone)


@pytest.mark.parametrize("method", ["kfac", "exact", "ngd", "fngd"])
def test_the_weighted_gradients_of_another_optimizer_are_refused(method: str) -> None:
    model, twin = small(), small()
    optimizer, alone = fl.optim.create(method, model), fl.optim.create(method, twin)
    other: Any = fl.optim.create("tengrad", model)
    before, (x, y) = flat(model.state_dict()), data()
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(OptimizerError, match=r"another optimizer .* call its remove\(\)"):
        optimizer.step()
    assert flat(model.state_dict()) == before
    other.remove()
    optimizer.step(closure(model, optimizer))
    alone.step(closure(twin, alone))
    assert flat(model.state_dict()) == flat(twin.state_dict())


@pytest.mark.parametrize("method", ["kfac", "ang"])
def test_a_direction_that_overflows_is_refused_and_named(method, monkeypatch) -> None:
    model = small()
    optimizer: Any = fl.optim.create(method, model)
    closure(model, optimizer)()
    before, of = everything(model, optimizer), optimizer.preconditioner
    known = of.precondition
    monkeypatch.setattr(
        of, "precondition", lambda name, g: known(name, g) * (1e200 if name == "2" else 1.0)
    )
    with pytest.raises(OptimizerError, match="the direction of layers 2 has NaN or inf"):
        optimizer.step()
    assert everything(model, optimizer) == before


@pytest.mark.parametrize("method", ["dykaf", "kl_shampoo"])
def test_a_layer_too_large_for_whole_factors_is_named(method: str) -> None:
    model = small()
    optimizer = fl.optim.create(method, model, largest_factor=4)
    before = flat(model.state_dict())
    with pytest.raises(fl.blocks.BlockError, match="layer '0' has 5 outputs and 5 inputs, above"):
        optimizer.step(closure(model, optimizer))
    assert flat(model.state_dict()) == before
