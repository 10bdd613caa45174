"""The BackPACK backend: refusals by name, the check column, BackPACK itself as second library."""

import copy
import warnings

import pytest
import torch
from backpack import backpack as backpack_context
from backpack import extend, extensions
from backpack.context import CTX
from backpack.core.derivatives.basederivatives import BaseParameterDerivatives
from backpack.core.derivatives.tanh import TanhDerivatives
from backpack.custom_module.branching import SumModule
from references import net, randn, relative
from torch import nn

from fisherlab.blocks import Outer
from fisherlab.extract import CaptureError, backpack, capture
from fisherlab.extract.fisher import FISHER_TYPES

CE = nn.CrossEntropyLoss()
BOTH = ("hooks", "backpack")


def image_net():
    return net(
        nn.Conv2d(1, 4, 3, padding=1, groups=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 3, 2, stride=2, bias=False),
        nn.Flatten(),
        nn.Linear(12, 6),
        nn.Tanh(),
        nn.Linear(6, 3),
    )


IMAGES, LABELS = randn(5, 1, 8, 8), torch.tensor([0, 1, 2, 1, 0])


class Between(nn.Module):
    """Two layers, a head, and something functional after the first."""

    def __init__(self, operation, first=None, **layers):
        super().__init__()
        torch.manual_seed(0)
        self.first = first or nn.Linear(4, 4)
        self.second, self.flat, self.head = nn.Linear(4, 4), nn.Flatten(), nn.Linear(16, 3)
        self.operation = operation
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.head(self.flat(self.second(self.operation(self, self.first(x)))))


class MyLinear(nn.Linear):
    """A subclass, which may compute anything."""


class Square(nn.Module):
    """A module that BackPACK has never heard of."""

    def forward(self, x):
        return x**2


def vector(*layers, name):
    return (lambda: net(nn.Linear(4, 4), *layers, nn.Linear(4, 3)), (4,), name)


def convolution(**options):
    return (
        lambda: net(nn.Conv2d(1, 2, 3, **options), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)),
        (1, 4, 4),
        "'0' .Conv2d.",
    )


REFUSED = {
    "layer norm": vector(nn.LayerNorm(4), name="'1' .LayerNorm. has no rule"),
    "gelu": vector(nn.GELU(), name="'1' .GELU. has no rule"),
    "softmax": vector(nn.Softmax(-1), name="'1' .Softmax. has no rule"),
    "own module": vector(Square(), name="'1' .Square. has no rule"),
    "subclass": vector(MyLinear(4, 4), name="'1' .MyLinear. has no rule"),
    "in place": vector(nn.ReLU(inplace=True), name="'1' .ReLU. works in place"),
    "repeated": (
        lambda: net(*[nn.Linear(4, 4)] * 2),
        (4,),
        "'0' .Linear. is called more than once",
    ),
    "same": convolution(padding="same"),
    "reflect": convolution(padding=1, padding_mode="reflect"),
    "replicate": convolution(padding=1, padding_mode="replicate"),
    "circular": convolution(padding=1, padding_mode="circular"),
}


@pytest.mark.parametrize("fisher_type", FISHER_TYPES)
@pytest.mark.parametrize("case", REFUSED)
def test_modules_are_refused_by_name_with_hooks_as_advice(case, fisher_type):
    make, shape, message = REFUSED[case]
    model, x, y = make(), randn(3, *shape), torch.tensor([0, 1, 2])
    with pytest.raises(CaptureError, match=message + ".*use backend='hooks'"):
        capture(model, CE, x, y, fisher_type=fisher_type, backend="backpack")
    assert capture(model, CE, x, y, fisher_type=fisher_type).report.backend == "hooks"


FUNCTIONS = {
    "square transpose": (lambda m, h: h.transpose(1, 2), "layer 'first' differs from autograd's"),
    "residual": (lambda m, h: h + torch.tanh(h), "'first' .Linear."),
    "scale": (lambda m, h: 2 * h, "'first' .Linear."),
    "in place": (lambda m, h: h.mul_(2.0), "layer 'first' differs from autograd's"),
    "flip in place": (lambda m, h: h.relu_(), "layer 'first' differs from autograd's"),
}


@pytest.mark.parametrize("residual", ["loss", "none"])
@pytest.mark.parametrize("case", FUNCTIONS)
def test_functions_between_modules_are_never_silently_wrong(case, residual):
    """Also where the loss is at its minimum, and its gradient could vouch for nothing."""
    operation, message = FUNCTIONS[case]
    model, x = Between(operation).double(), randn(3, 4, 4)
    y = model(x).detach() if residual == "none" else randn(3, 3, seed=1)
    with pytest.raises(CaptureError, match=message):
        capture(model, nn.MSELoss(), x, y, backend="backpack")


def test_a_wrong_rule_is_caught_at_the_layer_in_front_of_it(monkeypatch):
    right = TanhDerivatives.jac_t_mat_prod

    def wrong(self, *arguments, **options):
        return right(self, *arguments, **options) * (1 + 1e-9)

    monkeypatch.setattr(TanhDerivatives, "jac_t_mat_prod", wrong)
    with pytest.raises(CaptureError, match="layer '6' differs from autograd's by 1.0e-09"):
        capture(image_net(), CE, IMAGES, LABELS, backend="backpack")
    capture(image_net().float(), CE, IMAGES.float(), LABELS, backend="backpack")


def test_a_deep_float32_network_is_no_false_alarm():
    torch.manual_seed(0)
    layers = [layer for _ in range(40) for layer in (nn.Linear(32, 32), nn.Tanh())]
    model = nn.Sequential(*layers, nn.Linear(32, 3))
    x, y = torch.randn(8, 32), torch.arange(8) % 3
    assert len(capture(model, CE, x, y, fisher_type="mc", backend="backpack")) == 41


def test_sums_of_modules_and_repeated_activations_are_taken():
    def residual(m, h):
        return m.sum(h, m.act(m.inner(m.act(h))))

    model = Between(residual, sum=SumModule(), act=nn.Tanh(), inner=nn.Linear(4, 4)).double()
    x, y = randn(3, 4, 4), torch.tensor([0, 1, 2])
    one, other = (capture(model, CE, x, y, backend=backend) for backend in BOTH)
    for name, layer in one.items():
        assert relative(other[name].output_gradients, layer.output_gradients) < 1e-12


def test_unused_frozen_and_unchosen_layers():
    model = Between(lambda m, h: h, unused=nn.Linear(2, 2), lost=nn.Linear(4, 4)).double()
    model.operation = lambda m, h: (m.lost(h), h)[1]
    model.second.weight.requires_grad_(False)
    x, y = randn(3, 4, 4), torch.tensor([0, 1, 2])
    one, other = (capture(model, CE, x, y, backend=backend) for backend in BOTH)
    assert list(other) == ["first", "head", "lost"]
    # the bias of a frozen weight is a block of its own, which BackPACK does not send
    assert set(one) == {*other, "second.bias"}
    assert other.report.skipped.keys() == {"second", "unused"}
    assert other["lost"].output_gradients.abs().max() == 0
    for name, layer in other.items():
        assert one[name].output_gradients.shape == layer.output_gradients.shape
        assert relative(one[name].output_gradients, layer.output_gradients) < 1e-12
    assert list(capture(model, CE, x, y, backend="backpack", layers=["head"])) == ["head"]


def test_one_backward_pass_and_nothing_of_a_parameters_size(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("a per-example parameter quantity was formed")

    passes, send = [], backpack.send_backwards
    monkeypatch.setattr(BaseParameterDerivatives, "param_mjp", refuse)
    monkeypatch.setattr(backpack, "send_backwards", lambda *a: passes.append(1) or send(*a))
    for fisher_type in FISHER_TYPES:
        capture(image_net(), CE, IMAGES, LABELS, fisher_type=fisher_type, backend="backpack")
    assert len(passes) == 3


def second_library(criterion, extension, y):
    """A deep copy, extended, as BackPACK's own documentation has it."""
    model, criterion = extend(copy.deepcopy(image_net())), extend(criterion)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Full backward hook is firing")
        with backpack_context(extension):
            criterion(model(IMAGES), y).backward()
    return model


@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss, nn.MSELoss])
@pytest.mark.parametrize("backend", BOTH)
def test_the_block_is_backpacks_own_square_root(backend, criterion):
    """`F = V V^T`: SqrtGGNExact has `1/sqrt(N)` inside."""
    y = LABELS if criterion is nn.CrossEntropyLoss else torch.eye(3).double()[LABELS]
    theirs = second_library(criterion(), extensions.SqrtGGNExact(), y)
    ours = capture(image_net(), criterion(), IMAGES, y, backend=backend, kinds=("map",))
    for name, layer in ours.items():
        module = theirs.get_submodule(name)
        V = module.weight.sqrt_ggn_exact.flatten(0, 1).flatten(2)
        if module.bias is not None:
            b = module.bias.sqrt_ggn_exact.flatten(0, 1)
            V = torch.cat([V, b[..., None]], 2)
        V = V.flatten(1)
        assert relative(Outer(layer.inputs, layer.output_gradients).dense(), V.mT @ V) < 1e-12


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_per_example_gradients_are_backpacks_batch_gradients(reduction):
    """BatchGrad has the criterion's `1/N` inside."""
    criterion = nn.CrossEntropyLoss(reduction=reduction)
    theirs = second_library(criterion, extensions.BatchGrad(), LABELS)
    ours = capture(
        image_net(), nn.CrossEntropyLoss(reduction=reduction), IMAGES, LABELS,
        fisher_type="empirical", backend="backpack",
    )  # fmt: skip
    scale = len(LABELS) if reduction == "mean" else 1
    for name, layer in ours.items():
        module = theirs.get_submodule(name)
        D = layer.per_example_gradients()[0]
        weight = module.weight.grad_batch.flatten(2) * scale
        assert relative(D[..., : weight.shape[2]], weight) < 1e-12
        if module.bias is not None:
            assert relative(D[..., -1], module.bias.grad_batch * scale) < 1e-12


def test_a_model_already_extended_is_taken_as_it_is():
    model = extend(image_net())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Full backward hook is firing")
        layers = capture(model, CE, IMAGES, LABELS, backend="backpack")
    expected = capture(image_net(), CE, IMAGES, LABELS, kinds=("map",))
    for name, layer in expected.items():
        assert relative(layers[name].output_gradients, layer.output_gradients) < 1e-12


def state_of(model):
    """All that a capture could leave behind."""
    tables = [name for name in vars(model) if name.endswith("hooks")]
    return {
        "attributes": {name: sorted(vars(m)) for name, m in model.named_modules()},
        "hooks": [len(vars(m)[table]) for m in model.modules() for table in tables],
        "on parameters": [sorted(vars(p)) for p in model.parameters()],
        "tensor hooks": [p._backward_hooks for p in model.parameters()],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "trainable": [p.requires_grad for p in model.parameters()],
        "mode": [m.training for m in model.modules()],
        "values": {k: (v.clone(), v._version) for k, v in model.state_dict().items()},
        "random": torch.get_rng_state(),
        "backpack": (CTX.get_active_exts(), CTX.hook_handles[:], CTX.get_retain_graph()),
        "grad mode": torch.is_grad_enabled(),
    }


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.mark.parametrize("fails", [None, "labels", "criterion", "backward"])
@pytest.mark.parametrize("fisher_type", FISHER_TYPES)
@pytest.mark.parametrize("backend", BOTH)
def test_the_model_comes_back_untouched(backend, fisher_type, fails, monkeypatch):
    model = image_net()
    model[0].bias.requires_grad_(False)
    model[6].train()
    CE(model(IMAGES), LABELS).backward()
    before = state_of(model)
    y, criterion = LABELS, CE
    if fails == "labels":
        y = LABELS + 7
    elif fails == "criterion":
        criterion = nn.HuberLoss(reduction="none")
    elif fails == "backward":

        def broken(*arguments, **options):
            raise RuntimeError("broken")

        monkeypatch.setattr(TanhDerivatives, "jac_t_mat_prod", broken)
        monkeypatch.setattr(torch.autograd, "grad", broken)
    if fails is None:
        capture(model, criterion, IMAGES, y, fisher_type=fisher_type, backend=backend)
    else:
        with pytest.raises((CaptureError, RuntimeError)):
            capture(model, criterion, IMAGES, y, fisher_type=fisher_type, backend=backend)
    after = state_of(model)
    for what, value in before.items():
        assert same(value, after[what]), what


@pytest.mark.parametrize("backend", BOTH)
def test_random_numbers_drawn_by_the_model_do_not_move_the_global_stream(backend):
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.map = nn.Linear(4, 3)

        def forward(self, x):
            return self.map(x + torch.randn_like(x))

    model, y = Noisy().double(), torch.tensor([0, 1, 2])
    before = torch.get_rng_state()
    with torch.no_grad():
        # outputs that change from call to call are refused by the full check
        capture(model, CE, randn(3, 4), y, fisher_type="mc", backend=backend, check="gradient")
        assert not torch.is_grad_enabled()
    assert torch.equal(before, torch.get_rng_state())
