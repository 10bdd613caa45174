"""Which passes are part of a step: what `.grad` holds counts, and nothing else does."""

import copy
import gc
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import _get_current_function_mode_stack

import fisherlab as fl
from fisherlab.optim import OptimizerError

CE = nn.CrossEntropyLoss()
TYPES = pytest.mark.parametrize("fisher_type", ["empirical", "exact"])


def batch():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    return x, torch.arange(6) % 3


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def optimizer(model, **options):
    options = {"damping": 1.0, "lr": 0.0, "fisher_type": "empirical"} | options
    return fl.optim.NaturalGradient(model, fl.Exact(), **options)


def truth(model, x, y, fisher_type="empirical"):
    """The dense blocks of one batch, by autograd of each example."""
    found = {}
    for name in ("0", "2"):
        module, columns = model.get_submodule(name), []
        for n in range(len(x)):
            outputs = model(x[n : n + 1])
            if fisher_type == "empirical":
                losses = [CE(outputs, y[n : n + 1])]
            else:
                p = outputs.softmax(1).detach()
                rows = [p[0, c].sqrt() * (F.one_hot(torch.tensor(c), 3) - p[0]) for c in range(3)]
                losses = [(outputs[0] * row).sum() for row in rows]
            for loss in losses:
                w, b = torch.autograd.grad(loss, [module.weight, module.bias], retain_graph=True)
                columns.append(torch.cat([w, b[:, None]], 1).flatten())
        U = torch.stack(columns, 1)
        found[name] = U @ U.mT / len(x)
    return found


def check(opt, wanted):
    assert set(opt.blocks()) == set(wanted)
    for name, block in opt.blocks().items():
        assert (block.dense() - wanted[name]).norm() < 1e-12 * wanted[name].norm(), name


def dropped_batch(model, x, y):
    CE(model(5 * x), y).backward()


def attacked(model, x, y):
    z = x.clone().requires_grad_()
    torch.autograd.grad(CE(model(5 * z), y), z)


def of_a_copy(model, x, y):
    CE(copy.deepcopy(model)(5 * x), y).backward()


def no_backward(model, x, y):
    CE(model(5 * x), y)


def captured(model, x, y):
    fl.capture(model, CE, 5 * x, y)


@TYPES
@pytest.mark.parametrize("before", [dropped_batch, attacked, of_a_copy, no_backward, captured])
@pytest.mark.parametrize("to_none", [True, False])
def test_a_pass_whose_gradient_is_not_used_does_not_count(before, to_none, fisher_type):
    model, (x, y) = net(), batch()
    opt = optimizer(model, fisher_type=fisher_type)
    before(model, x, y)
    opt.zero_grad(set_to_none=to_none)
    CE(model(x), y).backward()
    opt.step()
    check(opt, truth(model, x, y, fisher_type))


@TYPES
def test_sharpness_aware_steps_see_the_second_pass_only(fisher_type):
    model, (x, y) = net(), batch()
    opt = optimizer(model, fisher_type=fisher_type)
    CE(model(x), y).backward()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * p.grad)
    opt.zero_grad()
    CE(model(x), y).backward()
    opt.step()
    check(opt, truth(model, x, y, fisher_type))


@TYPES
def test_an_attack_between_two_micro_batches_does_not_count(fisher_type):
    model, (x, y) = net(), batch()
    opt = optimizer(model, fisher_type=fisher_type)
    (CE(model(x[:3]), y[:3]) / 2).backward()
    attacked(model, x, y)
    (CE(model(x[3:]), y[3:]) / 2).backward()
    opt.step()
    check(opt, truth(model, x, y, fisher_type))


def twice(model, x, y):
    loss = CE(model(x), y)
    loss.backward(retain_graph=True)
    loss.backward()


def in_parts(model, x, y):
    outputs = model(x)
    CE(outputs, y).backward(retain_graph=True)
    (0.5 * CE(outputs, y)).backward()


def clipped(model, x, y):
    CE(model(x), y).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    nn.utils.clip_grad_value_(model.parameters(), 1e-4)


def decayed(model, x, y):
    (CE(model(x), y) + 0.1 * sum(p.square().sum() for p in model.parameters())).backward()


@TYPES
@pytest.mark.parametrize("backward", [twice, in_parts, clipped, decayed])
@pytest.mark.parametrize("given", [True, False], ids=["criterion", "recognised"])
def test_the_scale_is_that_of_all_backward_passes_of_one_graph(backward, given, fisher_type):
    model, (x, y) = net(), batch()
    opt = optimizer(model, fisher_type=fisher_type, criterion=CE if given else None)
    backward(model, x, y)
    opt.step()
    check(opt, truth(model, x, y, fisher_type))


def test_mixed_labels_have_one_hessian():
    model, (x, y) = net(), batch()
    opt = optimizer(model, fisher_type="exact", criterion=CE)
    outputs = model(x)
    (0.7 * CE(outputs, y) + 0.3 * CE(outputs, (y + 1) % 3)).backward()
    opt.step()
    check(opt, truth(model, x, y, "exact"))


def test_a_small_gradient_penalty_leaves_the_blocks_as_they_are():
    model, (x, y) = net(), batch()
    opt = optimizer(model)
    z = x.clone().requires_grad_()
    loss = CE(model(z), y)
    (g,) = torch.autograd.grad(loss, z, create_graph=True)
    (loss + 1e-9 * g.square().sum()).backward()
    opt.step()
    for name, wanted in truth(model, x, y).items():
        assert (opt.blocks()[name].dense() - wanted).norm() < 1e-7 * wanted.norm()


def test_a_gradient_penalty_is_refused_but_for_the_models_own_columns():
    def stepped(fisher_type):
        model, (x, y) = net(), batch()
        opt = optimizer(model, fisher_type=fisher_type, criterion=CE)
        z = x.clone().requires_grad_()
        outputs = model(z)
        (g,) = torch.autograd.grad(outputs.logsumexp(1).sum(), z, create_graph=True)
        (CE(outputs, y) + 0.1 * (g.norm(dim=1) - 1).square().mean()).backward()
        opt.step()
        return opt, truth(model, x, y, fisher_type)

    with pytest.raises(OptimizerError, match="gradient penalty"):
        stepped("empirical")
    check(*stepped("exact"))


@pytest.mark.parametrize("fisher_type", ["empirical", "mc", "exact"])
def test_a_comparison_in_mid_training_changes_no_bit(fisher_type):
    def trained(audit):
        model, (x, y) = net(), batch()
        opt = fl.optim.create("kfac", model, fisher_type=fisher_type)
        for step in range(4):
            if audit and step:
                fl.compare(model, CE, 2 * x, y, approximations=opt.blocks(), dampings=[1.0])
            opt.zero_grad()
            CE(model(x), y).backward()
            if audit:
                fl.capture(model, CE, 2 * x, y)
            opt.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(trained(False), trained(True))


def test_a_batch_that_the_loop_skips_does_not_stop_the_next():
    model, (x, y) = net(), batch()
    opt = optimizer(model)
    CE(model(x * float("nan")), y).backward()
    opt.zero_grad()
    CE(model(x), y).backward()
    opt.step()
    check(opt, truth(model, x, y))


def test_a_refused_step_does_not_stop_the_next():
    model, (x, y) = net(), batch()
    opt = optimizer(model)
    model(x).square().mean().backward()
    with pytest.raises(fl.optim.OptimizerError, match="not that of softmax cross entropy"):
        opt.step()
    opt.zero_grad()
    CE(model(x), y).backward()
    opt.step()
    check(opt, truth(model, x, y))


def test_forwards_without_a_step_leave_nothing_behind():
    model, (x, y) = net(), batch()
    opt, other = optimizer(model), torch.optim.SGD(model.parameters(), lr=0.0)
    for _ in range(5):
        other.zero_grad()
        CE(model(x), y).backward()
        other.step()
    assert len(opt.preconditioner.recorder.passes) == 1
    model.zero_grad()
    outputs = [model(x) for _ in range(3)]
    latest = opt.preconditioner.recorder._latest
    assert not opt.preconditioner.recorder.passes and latest() is not None
    del outputs
    gc.collect()
    assert latest() is None


class Masked(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight * (torch.arange(20).view(4, 5) % 2), self.bias)


@pytest.mark.parametrize("name", ["kfac", "ekfac", "ngd", "exact", "shampoo"])
def test_a_layer_whose_gradient_is_not_its_product_is_plain_and_says_so(name):
    torch.manual_seed(1)
    model = nn.Sequential(Masked(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = batch()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opt = fl.optim.create(name, model, criterion=CE)
        for _ in range(2):
            opt.zero_grad()
            CE(model(x), y).backward()
            opt.step()
    said = [str(w.message) for w in caught if "layer '0'" in str(w.message)]
    needs_inputs = name != "shampoo"
    assert len(said) == needs_inputs
    if needs_inputs:
        assert "takes its plain gradient" in said[0] and "used by mul" in said[0]


@pytest.mark.parametrize("criterion", [nn.MSELoss(), nn.CrossEntropyLoss()])
@pytest.mark.parametrize("kind", ["empirical", "exact"])
@pytest.mark.parametrize("unused", [False, True], ids=["both", "unused"])
def test_a_loss_of_an_earlier_output_counts_for_that_forward_pass(criterion, kind, unused):
    # `f = model(a); g = model(b); criterion(f, ya) + criterion(g, yb)` is the loop that takes each
    # loss at once, and a later forward pass without a loss counts for nothing
    torch.manual_seed(0)
    x, y = torch.randn(10, 3), torch.randn(10, 2)
    if isinstance(criterion, nn.CrossEntropyLoss):
        y = y.argmax(1)
    parts = [(x[:6], y[:6])] if unused else [(x[:6], y[:6]), (x[6:], y[6:])]
    made = []
    for late in (False, True):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        optimizer = fl.optim.NaturalGradient(
            model, fl.KFAC(), lr=0.1, damping=1e-2, criterion=criterion, fisher_type=kind
        )
        if late:
            outputs = [model(a.double()) for a, _ in parts]
            model(x.double())
        else:
            outputs = (model(a.double()) for a, _ in parts)
        y_of = [b if b.dtype == torch.long else b.double() for _, b in parts]
        losses = [criterion(f, b) / 3 for f, b in zip(outputs, y_of, strict=True)]
        torch.stack(losses).sum().backward()
        optimizer.step()
        made.append([block.trace() for block in optimizer.blocks().values()])
    assert torch.stack(made[0]).equal(torch.stack(made[1])) and made[0][0] > 0


@pytest.mark.parametrize("how", ["as they are", "views", "joined"])
def test_a_loss_of_what_was_made_of_earlier_outputs_counts_for_them(how):
    """One backward pass of two forward passes: the first was dropped, as if it had been zeroed."""
    x, y = batch()
    made = []
    for late in (False, True):
        model = net()
        opt = optimizer(model, criterion=CE)
        if not late:
            for k in (slice(0, 3), slice(3, 6)):
                (CE(model(x[k]), y[k]) / 2).backward()
        elif how == "as they are":
            one, two = model(x[:3]), model(x[3:])
            (CE(one, y[:3]) / 2 + CE(two, y[3:]) / 2).backward()
        elif how == "views":
            one, two = model(x[:3]), model(x[3:])
            (CE(2 * one / 2, y[:3]) / 2 + CE(two.reshape(3, 3), y[3:]) / 2).backward()
        else:
            CE(torch.cat([model(x[:3]), model(x[3:])]), y).backward()
        opt.step()
        made.append({name: block.dense() for name, block in opt.blocks().items()})
    for name, block in made[0].items():
        torch.testing.assert_close(made[1][name], block, rtol=1e-9, atol=0)


def test_columns_of_a_loss_of_several_passes_are_refused():
    x, y = batch()
    model = net()
    opt = optimizer(model, criterion=CE, fisher_type="exact")
    outputs = torch.cat([model(x[:3]), model(x[3:])])
    with pytest.raises(OptimizerError, match="of the outputs of 2 together"):
        CE(outputs, y)
    opt.remove()


class Calls(nn.Module):
    """May call itself, and may be broken off in its midst."""

    def __init__(self, how=""):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 5).double(), nn.Linear(5, 3).double()
        self.how, self.broken = how, False

    def forward(self, x, inner=False):
        hidden = self.a(x).tanh()
        if self.broken:
            raise KeyboardInterrupt
        if self.how == "first" and not inner:
            return self(x / 2, inner=True) + self.b(hidden)
        out = self.b(hidden)
        if inner or not self.how:
            return out
        if self.how == "teacher":
            with torch.no_grad():
                target = self(x / 2, inner=True)
            return out + target
        return out + self(x / 2, inner=True)


def own_batch():
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x, torch.arange(6) % 3


@pytest.mark.parametrize("how", ["", "teacher", "first", "last"])
def test_a_model_that_calls_itself_makes_one_pass(how):
    model, (x, y) = Calls(how), own_batch()
    optimizer = fl.optim.create("exact", model, lr=0.1)
    nn.CrossEntropyLoss()(model(x), y).backward()
    assert not _get_current_function_mode_stack()
    captured = fl.capture(model, nn.CrossEntropyLoss(), x, y, fisher_type="empirical")
    optimizer.step()
    for name, block in optimizer.blocks().items():
        torch.testing.assert_close(block.dense(), fl.Exact()(captured[name]).dense())


@pytest.mark.parametrize("name", ["kfac", "tengrad"])
@pytest.mark.parametrize("meanwhile", ["capture", "by hand", "evaluation", "step", "removal"])
def test_a_pass_that_ctrl_c_breaks_off_leaves_nothing(name, meanwhile):
    x, y = own_batch()
    criterion = nn.CrossEntropyLoss()

    def trained(interrupted):
        model = Calls()
        optimizer = fl.optim.create(name, model, lr=0.1)

        def gradients():
            optimizer.zero_grad()
            criterion(model(x), y).backward()

        gradients()
        optimizer.step()
        gradients()
        if interrupted:
            model.broken = True
            with pytest.raises(KeyboardInterrupt):
                model(3 * x)
            model.broken = False
            if meanwhile == "capture":
                fl.capture(model, criterion, x, y)
            elif meanwhile == "by hand":
                assert model.a(x).grad_fn.name() == "AddmmBackward0"
                assert bool(model.a.weight.norm() > 0)
            elif meanwhile == "evaluation":
                with torch.no_grad():
                    model(x)
                assert not _get_current_function_mode_stack()
            elif meanwhile == "removal":
                optimizer.remove()
                assert not _get_current_function_mode_stack()
                return None
        optimizer.step()
        assert not _get_current_function_mode_stack()
        gradients()
        optimizer.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    found = trained(interrupted=True)
    assert found is None or found.equal(trained(interrupted=False))
