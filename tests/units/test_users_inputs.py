"""Inputs of users' that failed inside, were refused with a wrong cause, or gave a wrong number."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fisherlab as fl
from fisherlab.extract import CaptureError, hessian_blocks

CE = nn.CrossEntropyLoss()
Y = torch.tensor([0, 2, 1])


def net(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def inputs(dtype=torch.float64):
    return torch.randn(3, 4, dtype=dtype, generator=torch.Generator().manual_seed(1))


def per_example(model, x, W, criterion=CE, y=Y):
    """`d l_n / dW` of each example by autograd, `[n, *W.shape]`."""
    return torch.stack(
        [
            torch.autograd.grad(criterion(model(x)[k : k + 1], y[k : k + 1]), W)[0]
            for k in range(len(y))
        ]
    )


def assert_gradients(layer, expected):
    found = layer.per_example_gradients()[0, :, :, : expected.shape[2]]
    torch.testing.assert_close(found, expected)


class Experts(nn.Module):
    """Each example goes to one of two experts; the second may get none."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        out = torch.zeros_like(x)
        for k, expert in enumerate(self.experts):
            rows = torch.nonzero(torch.full((len(x),), k == 0)).squeeze(1)
            out = out.index_add(0, rows, expert(x[rows]))
        return self.head(out.tanh())


def test_an_expert_without_examples_has_gradients_zero():
    torch.manual_seed(0)
    model, x = Experts().double(), inputs()
    captured = fl.capture(model, CE, x, Y, fisher_type="empirical")
    assert_gradients(captured["experts.0"], per_example(model, x, model.experts[0].weight))
    table = fl.compare(model, CE, x, Y, approximations=["kfac"], layers="experts.0")
    assert table.frame["relative_error"].notna().all()


class Sparse(nn.Module):
    def __init__(self):
        super().__init__()
        self.W, self.head = nn.Parameter(torch.randn(4, 5)), nn.Linear(5, 3)

    def forward(self, x):
        return self.head((x @ self.W).tanh())


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")
def test_backpack_names_a_scripted_module():
    model = net()
    model[0] = torch.jit.script(model[0])
    with pytest.raises(CaptureError, match=r"'0' \(RecursiveScriptModule\) has no rule in BackP"):
        fl.capture(model, CE, inputs(), Y, backend="backpack")


@pytest.mark.parametrize("sparse", [torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr])
@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_sparse_inputs_of_a_matrix_product(sparse):
    torch.manual_seed(0)
    model, x = Sparse().double(), inputs()
    captured = fl.capture(model, CE, sparse(x.relu()), Y, fisher_type="empirical")
    assert_gradients(captured["W"], per_example(model, x.relu(), model.W).mT)
    rows = fl.support(model, sparse(x.relu())).set_index("layer")
    assert rows.loc["W", "status"] == "exact"


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.head = nn.Linear(4, 4).double(), nn.Linear(4, 3).double()
        self.c = nn.Linear(4, 4, dtype=torch.cdouble)

    def forward(self, x):
        return self.head(self.c(self.a(x).to(torch.cdouble)).abs())


def test_layers_around_a_complex_one_are_captured():
    torch.manual_seed(0)
    model, x = Complex(), inputs()
    captured = fl.capture(model, CE, x, Y, fisher_type="empirical")
    assert "a block is one of real numbers" in captured.report.skipped["c"]
    assert_gradients(captured["a"], per_example(model, x, model.a.weight))


def test_inference_mode_captures_as_outside():
    model, x = net(), inputs()
    outside = fl.capture(model, CE, x, Y)
    with torch.inference_mode():
        inside = fl.capture(model, CE, x.clone(), Y.clone())
        assert torch.is_inference_mode_enabled()
        x_made, y_made = x.clone(), Y.clone()
    for found in (inside, fl.capture(model, CE, x_made, y_made)):
        for name, layer in outside.items():
            torch.testing.assert_close(
                found[name].per_example_gradients(), layer.per_example_gradients()
            )
    squared = fl.compare(
        *(model, nn.MSELoss(), x_made, torch.zeros(3, 3).double()),
        approximations="kfac",
        reference="hessian",
    )
    assert squared.frame["relative_error"].notna().all()


def test_parameters_made_in_inference_mode_are_refused():
    with torch.inference_mode():
        model = net()
    for call in (
        lambda: fl.capture(model, CE, inputs(), Y),
        lambda: fl.support(model, inputs()),
    ):
        with pytest.raises(CaptureError, match=r"parameter '0.weight' was made in inference mode"):
            call()


class Averaging(nn.Module):
    """Moves a running mean at each pass, and subtracts it."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 3)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        self.mean.mul_(0.5).add_(x.detach().mean(0))
        return self.a(x - self.mean)


def test_the_trial_in_float32_moves_no_buffer():
    torch.manual_seed(0)
    model, x = Averaging().bfloat16(), inputs(torch.bfloat16)
    captured = fl.capture(model, CE, x, Y)
    raw = captured["a"].raw_inputs[0]
    torch.testing.assert_close(raw, x.float() - x.float().mean(0))
    assert not model.mean.any()


def test_a_number_among_the_arguments_belongs_to_every_example():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 3).double()

        def forward(self, x, t):
            return self.a(x) * t

    torch.manual_seed(0)
    model, x = Scaled(), inputs()
    captured = fl.capture(model, CE, (x, torch.tensor(2.0)), Y, fisher_type="empirical")
    scaled = per_example(lambda x: model(x, 2.0), x, model.a.weight)
    assert_gradients(captured["a"], scaled)
    with pytest.raises(CaptureError, match=r"x\[0\] is an empty batch, shape \(\)"):
        fl.capture(model, CE, (torch.tensor(1.0), torch.tensor(2.0)), Y)


@pytest.mark.parametrize(
    ("x", "options", "named"),
    [
        (torch.ones(0, 4), {}, r"x is an empty batch, shape \(0, 4\)"),
        (None, {}, r"the model does not take None \(NoneType\).*x is a tensor, or a tuple"),
        (torch.ones(3, 4) * 1j, {}, r"x is torch.complex64 and the model torch.float32"),
        (torch.ones(3, 4), {"forward": 3}, r"forward must be callable.*got 3 \(int\)"),
    ],
)
def test_support_names_a_wrong_argument(x, options, named):
    with pytest.raises(CaptureError, match=named):
        fl.support(net(torch.float32), x, **options)


def test_support_of_a_model_without_numbers():
    table = fl.support(net().to("meta"), inputs().to("meta"))
    assert list(table["status"]) == ["exact", "exact"]
    assert table["compare"].str.startswith("refused: parameter '0.weight' is on the device").all()


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.head = nn.Linear(4, 12).double(), nn.Linear(4, 3).double()

    def forward(self, x):
        q, k, v = self.qkv(x.view(3, 1, 2, 4)).chunk(3, -1)
        return self.head(F.scaled_dot_product_attention(q, k, v).mean((1, 2)))


def test_the_hessian_of_torchs_attention():
    torch.manual_seed(0)
    model, x = Attention(), torch.randn(3, 8).double()
    block = hessian_blocks(model, CE, x, Y)["head"]
    direction = torch.randn(3, 5).double()

    def gradient(step):
        with torch.no_grad():
            moved = [model.head.weight + step * direction[:, :4]]
            moved.append(model.head.bias + step * direction[:, 4])
        state = {"head.weight": moved[0], "head.bias": moved[1]}
        leaves = [state[name].requires_grad_() for name in ("head.weight", "head.bias")]
        loss = CE(torch.func.functional_call(model, state, (x,)), Y)
        one, two = torch.autograd.grad(loss, leaves)
        return torch.cat([one, two[:, None]], 1)

    numeric = (gradient(1e-5) - gradient(-1e-5)) / 2e-5
    torch.testing.assert_close(block @ direction, numeric, rtol=1e-6, atol=1e-9)
    assert (hessian_blocks(model, CE, x, Y)["qkv"] @ torch.ones(12, 5).double()).any()


def test_a_hessian_that_is_none_is_refused_by_name():
    def table(model, criterion=CE, x=None):
        given = inputs() if x is None else x
        fl.compare(model, criterion, given, Y, approximations="kfac", reference="hessian")

    with pytest.raises(CaptureError, match="lacks a derivative .*multi_margin_loss_backward"):
        table(net(), nn.MultiMarginLoss())
    with pytest.raises(CaptureError, match=r"'0.weight' is torch.bfloat16.*pass model.float\(\)"):
        table(net(torch.bfloat16), CE, inputs(torch.bfloat16))
    torch.manual_seed(0)
    with pytest.raises(CaptureError, match="the Hessian's block of layer 'W' is not known"):
        model = Sparse().double()
        model.head.requires_grad_(False)
        table(model)


def test_a_layer_behind_a_gradient_hook_that_clips_is_left_out():
    def hooked(function):
        model = net()

        def hook(module, given, output):
            if output.requires_grad:
                output.register_hook(function)

        model[1].register_forward_hook(hook)
        return model

    clipped = fl.capture(hooked(lambda g: g.clamp(-0.2, 0.2)), CE, inputs(), Y, fisher_type="exact")
    assert "a gradient hook changes what arrives at it" in clipped.report.skipped["0"]
    plain = fl.capture(net(), CE, inputs(), Y, fisher_type="exact")["0"]
    halved = fl.capture(hooked(lambda g: g / 2), CE, inputs(), Y, fisher_type="exact")["0"]
    torch.testing.assert_close(halved.gram(), plain.gram() / 4)


def test_autocast_is_the_models_alone():
    model, x = net(torch.float32), inputs(torch.float32)

    def cast(model, x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    def table(**options):
        methods = ["kfac", "tkfac", "diagonal", "exact"]
        found = fl.compare(model, CE, x, Y, approximations=methods, dampings=0.1, **options)
        return found.frame[["relative_error", "direction_cosine", "stein_loss"]]

    expected = table(forward=cast)
    with torch.autocast("cpu", torch.bfloat16):
        found, captured = table(), fl.capture(model, CE, x, Y)
        assert torch.is_autocast_enabled("cpu")
    assert found.equals(expected) and found.notna().all(axis=None)
    assert captured.outputs.equal(cast(model, x).float())


@pytest.mark.parametrize("name", sorted(set(fl.approximations.names()) - {"kbfgs"}))
def test_blocks_and_metrics_inside_autocast_are_those_outside(name):
    layer = fl.capture(net(torch.float32), CE, inputs(torch.float32), Y)["0"]
    maker, V = fl.approximations.get(name)(), torch.linspace(-1, 1, 25).view(5, 5)

    def numbers():
        F, exact = maker(layer), fl.Exact()(layer)
        found = [F @ V, F.dense(), F.power(-0.5, 0.1) @ V, F.diagonal(), F.trace(), F.quadratic(V)]
        found += [F.eigenvalues(), F.squared_norm(), F.inner(exact), F.logdet(0.1)]
        return [*found, fl.metrics.relative_error(F, exact), fl.metrics.cosine(F, exact)]

    expected = numbers()
    with torch.autocast("cpu", torch.bfloat16):
        found = numbers()
    for k, (number, right) in enumerate(zip(found, expected, strict=True)):
        assert torch.as_tensor(number).equal(torch.as_tensor(right)), k


@pytest.mark.parametrize("name", ["kfac", "ngd", "soap", "muon", "kbfgs"])
def test_a_step_inside_autocast_is_the_step_outside(name):
    def trained(inside):
        model, x = net(torch.float32), inputs(torch.float32)
        optimizer = fl.optim.create(name, model, lr=0.1)

        def closure():
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = CE(model(x), Y)
            loss.backward()
            return loss

        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                optimizer.step(closure)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert trained(True).equal(trained(False))


def test_the_hessian_of_a_parametrized_layer_is_that_of_its_weight():
    model, x = net(), inputs()
    nn.utils.parametrizations.weight_norm(model[0])
    with nn.utils.parametrize.cached():
        W, b = model[0].weight, model[0].bias
        found = torch.autograd.grad(CE(model(x), Y), (W, b), create_graph=True)
        direction = torch.randn_like(W)
        expected = torch.autograd.grad((found[0] * direction).sum(), (W, b))
    V = torch.cat([direction.detach(), torch.zeros(5, 1).double()], 1)
    product = hessian_blocks(model, CE, x, Y)["0"] @ V
    torch.testing.assert_close(product, torch.cat([expected[0], expected[1][:, None]], 1))


class Broken:
    def __iter__(self):
        raise RuntimeError("this iterator is broken")

    def __repr__(self):
        raise RuntimeError("and so are its words")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"layers": torch.tensor(3)}, "layers= takes names .* cannot be iterated over"),
        ({"skip": Broken()}, "skip= takes names .*this iterator is broken.*Broken instance"),
        ({"approximations": torch.tensor(3)}, "approximations are names.*cannot be iterated"),
        ({"approximations": [Broken()]}, "Broken instance.* among the approximations"),
        ({"dampings": Broken()}, "dampings cannot be iterated over .this iterator is broken"),
        ({"loss_scale": torch.ones(2)}, "loss_scale must be one of mean, sum; got a torch.float32"),
        ({"reference": [[1, 2], [3]]}, "the examples of reference: y is no tensor but list"),
        ({"reference": (torch.ones(0, 4).double(), Y[:0])}, "of reference: x is an empty batch"),
    ],
)
def test_compare_names_an_argument_that_is_no_list(options, named):
    given = {"approximations": "kfac"} | options
    with pytest.raises(ValueError, match=named):
        fl.compare(net(), None if "loss_scale" in options else CE, inputs(), Y, **given)


def test_kinds_that_cannot_be_hashed_are_named():
    with pytest.raises(CaptureError, match="kinds are some of map, embedding, factors; got"):
        fl.capture(net(), CE, inputs(), Y, kinds=[["map"], ["factors"]])


def test_a_sparse_reference_is_another_sample():
    torch.manual_seed(0)
    model, x = Sparse().double(), inputs().relu().to_sparse()
    table = fl.compare(model, CE, x, Y, approximations="kfac", reference=(2 * x, Y))
    assert table.frame["reference_examples"].eq(3).all()


def test_warnings_point_at_the_users_line():
    model, x = net(), inputs()
    model.register_parameter("unused", nn.Parameter(torch.ones(99, 99)))
    for name in ("kfac", "tengrad"):
        optimizer = fl.optim.create(name, model, lr=0.1)
        optimizer.zero_grad()
        (CE(model(x), Y) + model.unused.square().sum()).backward()
        with pytest.warns(UserWarning, match="of the trainable matrices have a block") as said:
            optimizer.step()
        assert said[0].filename == __file__
        optimizer.remove()


def test_a_real_factor_of_a_complex_product_has_no_block():
    class Filter(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.head = nn.Parameter(torch.randn(3).double()), nn.Linear(4, 3).double()

        def forward(self, x):
            return self.head(torch.fft.irfft(torch.fft.rfft(x) * self.w, n=4))

    torch.manual_seed(0)
    captured = fl.capture(Filter(), CE, inputs(), Y, check="off")
    assert list(captured) == ["head"] and "used by mul" in captured.report.skipped["w"]


@pytest.mark.parametrize("call", [fl.capture, hessian_blocks, fl.network.NetworkHessian])
@pytest.mark.parametrize(
    ("loss", "named"),
    [
        (lambda f, y: (f - y).square().mean(1), r"returned shape \(3,\), not a number"),
        (lambda f, y: (f - y).square().mean() * 1j, "returned torch.complex128; return a real"),
        (lambda f, y: (f - y).square().mean().detach(), "does not depend on the outputs"),
        (lambda f, y: nn.Parameter(torch.ones(())), "does not depend on the outputs"),
        (lambda f, y: (f - y).square().sum() / f.sum(), "is not a mean of per-example losses"),
    ],
)
def test_what_is_no_loss_of_the_outputs_is_named(call, loss, named):
    loss.reduction = "mean"
    options = {"fisher_type": "empirical"} if call is fl.capture else {}
    with pytest.raises(CaptureError, match=named):
        call(net(), loss, inputs(), torch.zeros(3, 3).double(), **options)


def test_a_reference_is_read_once_and_is_of_this_model_and_type():
    model, x = net(), inputs()

    def table(reference, **options):
        methods = ["kfac", "exact"]
        given = {"approximations": methods, "fisher_type": "empirical", "dampings": 0.1} | options
        return fl.compare(model, CE, x, Y, reference=reference, **given).frame

    unseen = torch.randn(64, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    other = [(part, torch.arange(len(part)) % 3) for part in unseen.split(24)]
    expected = table(other)["population_error"]
    assert expected.notna().any()
    assert table(iter(other), layers_at_once=1)["population_error"].equals(expected)
    with pytest.raises(ValueError, match="captures of the exact Fisher.*table is of the empirical"):
        table(fl.capture(model, CE, x + 1, Y, fisher_type="exact"))
    with pytest.raises(ValueError, match="layer '0' has shape .5, 5., and reference has no such"):
        table(fl.capture(nn.Sequential(nn.Tanh(), net()), CE, x, Y, fisher_type="empirical"))
    with pytest.raises(CaptureError, match="the examples of reference: labels run from 1 to 3"):
        table((x + 1, Y + 1))


def test_a_mask_of_one_position_fits_no_bias():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 5)

        def forward(self, x):
            return self.head(self.norm(x)).mT

    x, y = torch.randn(3, 2, 4), torch.zeros(3, 2, dtype=torch.long)
    with pytest.raises(CaptureError, match=r"mask of shape \(3, 1\) fits the positions of no"):
        fl.capture(Tokens(), CE, x, y, mask=torch.tensor([[True], [False], [True]]))


class Writes(nn.Module):
    """Writes at each pass what a later one reads, as spectral norms written by hand do."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 3).double()
        self.u = nn.Parameter(torch.ones(3).double(), requires_grad=False)
        self.losses, self.loss = [], torch.zeros(())

    def forward(self, x):
        self.u.data = self.a.weight.data @ (self.a.weight.data.mT @ self.u.data)
        with torch.no_grad():
            self.a.weight.clamp_(-0.2, 0.2)
        outputs = self.a(x)
        self.loss, self.seen = outputs.square().mean(), len(x)
        return outputs


@pytest.mark.filterwarnings("ignore:the forward pass writes into the parameter a.weight")
def test_what_a_pass_writes_into_the_model_is_taken_back():
    torch.manual_seed(0)
    model, x = Writes(), inputs()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    places = [p.data_ptr() for p in model.parameters()]
    loss = model.loss

    def refused(hessian):
        with pytest.raises(CaptureError, match="writes into the parameters u, a.weight, which"):
            hessian(model, CE, x, Y)

    for call in (
        lambda: fl.capture(model, CE, x, Y),
        lambda: fl.compare(model, CE, x, Y, approximations="kfac"),
        lambda: refused(hessian_blocks),
        lambda: refused(fl.network.NetworkHessian),
        lambda: fl.support(model, x),
    ):
        call()
        assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())
        assert [p.data_ptr() for p in model.parameters()] == places
        assert model.loss is loss and not hasattr(model, "seen")
    layer = fl.capture(model, CE, x, Y, fisher_type="empirical")["a"]
    model(x)
    assert_gradients(layer, per_example(model.a, x, model.a.weight))


def test_products_inside_a_transform_of_torch_func_have_no_block():
    class Energy(nn.Module):
        def __init__(self):
            super().__init__()
            self.n, self.head = net(), nn.Linear(4, 3).double()

        def forward(self, x):
            def energy(row):
                return self.n(row).square().sum()

            return self.head(torch.func.vmap(torch.func.grad(energy))(x))

    torch.manual_seed(0)
    model, x = Energy(), inputs()
    captured = fl.capture(model, CE, x, Y, fisher_type="empirical")
    assert list(captured) == ["head"]
    assert "it is used by linear" in captured.report.skipped["n.0"]
    assert_gradients(captured["head"], per_example(model, x, model.head.weight))


def test_a_spectral_norm_in_training_is_captured_as_the_next_pass_sees_it():
    model, x = net().train(), inputs()
    nn.utils.parametrizations.spectral_norm(model[0])
    with torch.no_grad():
        model[0].parametrizations.weight.original.add_(torch.eye(5, 4))
    buffers = [b.clone() for b in model.buffers()]
    layer = fl.capture(model, CE, x, Y, fisher_type="empirical")["2"]
    table = fl.compare(model, CE, x, Y, approximations="kfac", layers_at_once=1)
    assert table.frame["relative_error"].notna().all()
    assert all(torch.equal(b, now) for b, now in zip(buffers, model.buffers(), strict=True))
    hidden = model[1](model[0](x))
    torch.testing.assert_close(layer.raw_inputs[0], hidden)


def test_an_input_with_a_gradient_is_not_written_into():
    class Shifts(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 3).double()

        def forward(self, x):
            return self.a(x.add_(1) if not torch.is_grad_enabled() else x + 1)

    x = inputs().requires_grad_()
    before = x.detach().clone()
    fl.compare(Shifts(), CE, x, Y, approximations="kfac")
    assert torch.equal(x, before) and x.grad is None


@pytest.mark.parametrize(
    ("examples", "named"),
    [
        (
            torch.tensor([0, 1, 99]),
            "examples run from 0 to 99, and the batch has those from 0 to 2",
        ),
        (torch.tensor([0, 1, -2]), "examples run from -2 to 1"),
        (torch.ones(3, dtype=torch.bool), "whole numbers; got a torch.bool tensor"),
        (torch.ones(3), "whole numbers; got a torch.float32 tensor"),
    ],
)
def test_examples_that_are_none_are_named(examples, named):
    with pytest.raises(CaptureError, match=named):
        fl.capture(net(), CE, inputs(), Y, examples=examples)


def test_examples_may_be_short_integers():
    plain = fl.capture(net(), CE, inputs(), Y)["0"]
    given = fl.capture(net(), CE, inputs(), Y, examples=torch.arange(3, dtype=torch.int32))["0"]
    torch.testing.assert_close(given.gram(), plain.gram())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_support_takes_an_exported_program_and_outputs_that_a_capture_refuses():
    model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(6, 4)
    exported = torch.export.export(model, (x,)).module()
    assert len(fl.support(exported, x)) == 2
    nested = {"forward": lambda m, x: torch.nested.as_nested_tensor(list(m(x)))}
    for options in (nested, {"forward": lambda m, x: m(x).to_sparse()}):
        assert "not one dense tensor" in fl.support(model, x, **options)["compare"][0]


def test_a_dict_of_layers_holds_blocks():
    with pytest.raises(TypeError, match=r"opt\['0'\] must be a block of fl.blocks, got 3"):
        fl.compare(net(), CE, inputs(), Y, approximations={"opt": {"0": 3}})
