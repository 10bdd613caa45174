"""A regression test for each bug found in other libraries, and for bad input."""

import pytest
import torch
from references import Reference, net, randn, relative
from torch import nn

from fisherlab.approximations import get
from fisherlab.blocks import Outer
from fisherlab.extract import CaptureError, capture

CE = nn.CrossEntropyLoss()
BOTH = ("hooks", "backpack")


def block(layer):
    return Outer(layer.inputs, layer.output_gradients)


def as_sequence_and_as_convolution(T=7):
    """The same function twice: a Linear over `[n, t, i]`, a Conv1d of width 1 over `[n, i, t]`."""
    linear = net(nn.Linear(4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(3 * T, 3))
    conv = net(nn.Conv1d(4, 3, 1), nn.Tanh(), nn.Flatten(), nn.Linear(3 * T, 3))
    with torch.no_grad():
        conv[0].weight.copy_(linear[0].weight[..., None])
        conv[0].bias.copy_(linear[0].bias)
        head = linear[3].weight.reshape(3, T, 3)  # [classes, t, o]
        conv[3].weight.copy_(head.mT.reshape(3, -1))
        conv[3].bias.copy_(linear[3].bias)
    x, y = randn(5, T, 4), torch.tensor([0, 1, 2, 0, 1])
    assert torch.allclose(linear(x), conv(x.mT))
    return (linear, x, y), (conv, x.mT.contiguous(), y)


@pytest.mark.parametrize("name", ["kfac", "kfac_reduce", "ekfac", "tkfac"])
@pytest.mark.parametrize("backend", BOTH)
def test_sequence_linear_is_not_positions_times_too_large(backend, name):
    """NNGeometry and ASDL: KFAC of a sequence Linear is T x that of the same convolution."""
    one, other = (
        capture(model, CE, x, y, backend=backend)["0"]
        for model, x, y in as_sequence_and_as_convolution()
    )
    approximation = get(name)()
    assert relative(block(one).dense(), block(other).dense()) < 1e-12
    assert relative(approximation(one).dense(), approximation(other).dense()) < 1e-10


def test_convolutional_kfac_is_kfc_and_not_backpacks_hybrid():
    """`G = (1/M) sum g g^T`, `A = (1/MT) sum a a^T`; BackPACK: T A with G of summed positions."""
    model = net(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 3))
    x, y = randn(4, 1, 6, 6), torch.tensor([0, 1, 2, 0])
    layer = capture(model, CE, x, y)["0"]
    a, g = layer.inputs, layer.output_gradients
    n, T = a.shape[:2]
    A = torch.einsum("nti,ntj->ij", a, a) / (n * T)
    G = torch.einsum("mnto,mntp->op", g, g) / n
    summed = g.sum(2)
    hybrid = torch.kron(torch.einsum("mno,mnp->op", summed, summed) / n, T * A)
    found = get("kfac")()(layer).dense()
    assert relative(found, torch.kron(G, A)) < 1e-12
    assert relative(found, hybrid) > 0.5


@pytest.mark.parametrize("backend", BOTH)
def test_the_scale_of_mc_does_not_depend_on_the_number_of_draws(backend):
    """ASDL divides the loss by n_mc: a trace ratio of 1 / n_mc instead of 1."""
    model, x, y = net(nn.Linear(4, 3)), randn(200, 4), torch.zeros(200).long()
    exact = block(capture(model, CE, x, y, backend=backend)["0"]).trace()
    for draws in (1, 4, 16):
        layers = capture(model, CE, x, y, fisher_type="mc", mc_samples=draws, backend=backend)
        assert abs(block(layers["0"]).trace() / exact - 1) < 0.2


@pytest.mark.parametrize("criterion", [nn.MSELoss(), nn.BCEWithLogitsLoss()])
def test_mean_over_outputs_keeps_its_factor(criterion):
    """NNGeometry assumes unit covariance: no `2 / C` of `MSELoss(reduction="mean")`."""
    model, x, y = net(nn.Linear(4, 3)), randn(5, 4), torch.zeros(5, 3).double()
    reference = Reference(model, criterion, x, y, model[0].weight, model[0].bias)
    layer = capture(model, criterion, x, y)["0"]
    assert relative(block(layer).dense(), reference.exact()) < 1e-12


@pytest.mark.parametrize("backend", BOTH)
def test_float64_stays_float64_whatever_the_default(backend):
    """NNGeometry allocates float32 for float64 models: errors of 1e-8, hidden by its tests."""
    assert torch.get_default_dtype() == torch.float32
    model, x, y = net(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), randn(6, 4), torch.arange(6) % 3
    for fisher_type in ("exact", "mc", "empirical"):
        layers = capture(model, CE, x, y, fisher_type=fisher_type, backend=backend)
        for layer in layers.values():
            F = block(layer)
            parts = (layer.inputs, layer.output_gradients, layer.label_gradients, layer.gram())
            parts += (F.dense(), F.power(-1, 0.1).dense(), F.eigenvalues(), F @ layer.gradient)
            assert {part.dtype for part in parts} == {torch.float64}
    single = capture(model.float(), CE, x.float(), y, backend=backend)["0"]
    assert single.output_gradients.dtype == torch.float32


def test_the_low_rank_inverse_is_that_of_the_damped_block():
    """NNGeometry's PMatLowRank.solve drops `(1/lambda) (I - V V^T)`: relative error 0.99997."""
    model, x, y = net(nn.Linear(6, 4)), randn(2, 6), torch.tensor([0, 3])
    F = block(capture(model, CE, x, y, fisher_type="empirical")["0"])
    dense = F.dense()
    identity = torch.eye(len(dense), dtype=torch.float64)
    for damping in (1e-6, 1e-2, 10.0):
        inverse = F.power(-1, damping)
        assert relative(inverse.dense() @ (dense + damping * identity), identity) < 1e-8
        assert (
            relative(inverse.trace(), torch.linalg.inv(dense + damping * identity).trace()) < 1e-8
        )


def test_ekfac_is_no_plain_gradient():
    """ASDL's EKFAC is a silent no-op, and its rotation uses U V U for U^T V U."""
    model, x, y = net(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), randn(9, 5), torch.arange(9) % 3
    layer = capture(model, CE, x, y)["0"]
    kfac, ekfac, F = get("kfac")()(layer), get("ekfac")()(layer), block(layer).dense()
    V = layer.gradient
    step = ekfac.power(-1, 0.01) @ V
    assert torch.cosine_similarity(step.flatten(), V.flatten(), 0) < 0.99
    _, vectors = torch.linalg.eigh(kfac.dense())
    D = vectors.mT @ F @ vectors
    expected = vectors @ torch.diag(D.diag()) @ vectors.mT
    assert relative(ekfac.dense(), expected) < 1e-8
    assert relative(ekfac.trace(), F.trace()) < 1e-12


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_padding_modes_are_right_or_refused(mode):
    """BackPACK treats every padding as zeros: off by 84 %, its BatchGrad by 56 %, no warning."""
    layer = nn.Conv2d(2, 2, 3, padding=1, padding_mode=mode)
    model = net(nn.Conv2d(1, 2, 1), layer, nn.Flatten(), nn.Linear(32, 3))
    x, y = randn(3, 1, 4, 4), torch.tensor([0, 1, 2])
    layers = capture(model, CE, x, y)
    for name in ("0", "1"):
        module = model.get_submodule(name)
        reference = Reference(model, CE, x, y, module.weight, module.bias)
        assert relative(block(layers[name]).dense(), reference.exact()) < 1e-10
    with pytest.raises(CaptureError, match="'1' .*padding_mode"):
        capture(model, CE, x, y, backend="backpack")


def test_a_functional_transpose_of_equal_sizes():
    """BackPACK keys by data_ptr: off by 121 %, no warning."""

    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.rows, self.columns, self.flat = nn.Linear(4, 4), nn.Linear(4, 4), nn.Flatten()
            self.head = nn.Linear(16, 3)

        def forward(self, x):
            return self.head(self.flat(self.columns(self.rows(x).transpose(1, 2))))

    torch.manual_seed(0)
    model, x, y = Mixer().double(), randn(3, 4, 4), torch.tensor([0, 1, 2])
    reference = Reference(model, CE, x, y, model.rows.weight, model.rows.bias)
    assert relative(block(capture(model, CE, x, y)["rows"]).dense(), reference.exact()) < 1e-10
    with pytest.raises(CaptureError, match="'rows' differs from autograd"):
        capture(model, CE, x, y, backend="backpack")


def test_a_second_forward_before_the_backward_does_not_mix_the_pairs():
    """Inputs kept on the module belong to the last forward; ours belong to the call."""
    model, x, y = net(nn.Linear(4, 3)), randn(3, 4), torch.tensor([0, 1, 2])
    first = capture(model, CE, x, y, fisher_type="empirical")["0"].gradient
    loss = CE(model(x), y)
    capture(model, CE, randn(3, 4, seed=1), y)
    loss.backward()
    assert relative(first[:, :4], model[0].weight.grad) < 1e-12


class Exponent(nn.Module):
    """A scale that is the exponential of its parameter."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return x * self.weight.exp()


def broken(kind):
    """A model, a batch and what is wrong with them."""
    model = net(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3))
    x, y, options = randn(4, 4), torch.tensor([0, 1, 2, 0]), {}
    if kind == "empty batch":
        x, y = x[:0], y[:0]
    elif kind == "nan in x":
        x[2, 1] = float("nan")
    elif kind == "inf in weight":
        with torch.no_grad():
            model[2].weight[0, 0] = float("inf")
    elif kind == "dtype":
        x = x.float()
    elif kind == "batch norm":
        model = net(nn.Linear(4, 3), nn.BatchNorm1d(3)).train()
    elif kind == "no statistics":
        model = net(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False))
    elif kind == "dropout":
        model = net(nn.Linear(4, 3), nn.Dropout(0.5)).train()
    elif kind == "unknown layer":
        options = {"layers": ["O"]}
    elif kind == "near name":
        model, options = nn.Sequential(), {"layers": ["encodr"]}
        model.add_module("encoder", nn.Linear(4, 3).double())
    elif kind == "no block":
        model = net(nn.Linear(4, 3), Exponent())
        options = {"layers": ["1"]}
    elif kind == "frozen":
        model[0].weight.requires_grad_(False)
        options = {"layers": ["0"]}
    elif kind == "all frozen":
        model.requires_grad_(False)
    elif kind == "not called":
        model.add_module("spare", nn.Linear(2, 2).double())
        model.forward = lambda x: model[0](x)
        options = {"layers": ["spare"]}
    elif kind == "overflow":
        with torch.no_grad():
            model[2].weight.fill_(1e308)
            model[0].weight.fill_(1e308)
    return model, x, y, options


BROKEN = {
    "empty batch": r"x is an empty batch, shape \(0, 4\)",
    "nan in x": "x has NaN or inf entries, first in row 2",
    "inf in weight": "parameter '2.weight' has NaN or inf",
    "dtype": "x is torch.float32 and the model torch.float64",
    "batch norm": r"'1' is a BatchNorm1d that uses batch statistics.*model.eval\(\)",
    "no statistics": "'1' is a BatchNorm1d that uses batch statistics",
    "dropout": r"'1' is an active Dropout; call model.eval\(\)",
    "unknown layer": "no layer 'O' in this model; nearest: 0, 2",
    "near name": "no layer 'encodr' in this model; nearest: encoder",
    "no block": "layer '1': it is used by exp|'1' .Exponent. has no rule in BackPACK",
    "frozen": "layer '0' has no block: its weight is frozen",
    "all frozen": "no layer of this model has a block",
    "not called": "layer 'spare': not called in this forward pass",
    "overflow": "outputs have NaN or inf entries",
}


@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("kind", BROKEN)
def test_bad_input_is_refused_by_name(kind, backend):
    model, x, y, options = broken(kind)
    with pytest.raises(CaptureError, match=BROKEN[kind]):
        capture(model, CE, x, y, backend=backend, **options)


def test_models_that_return_no_tensor():
    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    class WithInput(nn.Sequential):
        def forward(self, x):
            return super().forward(x), x

    for model in (Pair(4, 3), WithInput(nn.Linear(4, 3))):
        with pytest.raises(CaptureError, match="the model returned tuple.*wrap the model"):
            capture(model.double(), CE, randn(2, 4), torch.tensor([0, 1]))


@pytest.mark.parametrize("backend", BOTH)
def test_a_model_compiled_before_the_capture_is_the_model(backend):
    """`torch.compile` ignores later hooks without a word, so the Python behind it is run."""
    plain, x, y = net(nn.Linear(4, 3)), randn(3, 4), torch.arange(3)
    model = torch.compile(plain, backend="eager")
    model(x)
    (found,) = capture(model, CE, x, y, backend=backend).values()
    (expected,) = capture(plain, CE, x, y, backend=backend).values()
    assert torch.equal(found.per_example_gradients(), expected.per_example_gradients())


def test_every_argument_of_the_model_is_checked():
    model, x, y = net(nn.Linear(4, 3)), randn(3, 4), torch.arange(3)
    wrong = x.clone()
    wrong[1, 2] = float("inf")
    with pytest.raises(CaptureError, match=r"x\['mask'\] has NaN or inf entries, first in row 1"):
        capture(model, CE, {"input": x, "mask": wrong}, y)
    with pytest.raises(CaptureError, match=r"x\[1\] is torch.float32"):
        capture(model, CE, (x, x.float()), y)
