"""What exact, mc and empirical mean, for every criterion: by dense autograd, and by counting."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from references import Reference, relative
from torch import nn

from fisherlab.blocks import Outer
from fisherlab.extract import CaptureError, capture, fisher

BACKENDS = ("hooks", "backpack")
M, CLASSES, T = 4, 3, 2

NETS = {
    "linear": (lambda: [nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES)], (4,)),
    "axes": (lambda: [nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, T)], (CLASSES, 4)),
    "image": (
        lambda: [nn.Conv2d(2, 3, 2, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(12, CLASSES)],
        (2, 4, 4),
    ),
    "tokens": (
        lambda: [nn.Conv1d(2, 4, 3, padding=1), nn.ELU(), nn.Conv1d(4, CLASSES, 1)],
        (2, T),
    ),
}
CRITERIA = {
    "ce": nn.CrossEntropyLoss(),
    "ce sum": nn.CrossEntropyLoss(reduction="sum"),
    "ce ignore": nn.CrossEntropyLoss(ignore_index=-7),
    "ce ignore class": nn.CrossEntropyLoss(ignore_index=1),
    "ce ignore sum": nn.CrossEntropyLoss(ignore_index=-7, reduction="sum"),
    "ce smooth": nn.CrossEntropyLoss(label_smoothing=0.1),
    "ce smooth ignore": nn.CrossEntropyLoss(label_smoothing=0.2, ignore_index=-7),
    "mse": nn.MSELoss(),
    "mse sum": nn.MSELoss(reduction="sum"),
    "bce": nn.BCEWithLogitsLoss(),
    "bce sum": nn.BCEWithLogitsLoss(reduction="sum"),
}
_W = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
# terms with weights: the Hessian of each term is that of an unweighted one times a factor
WEIGHTED = {
    "ce weight": (nn.CrossEntropyLoss(weight=_W), "linear"),
    "ce weight ignore": (nn.CrossEntropyLoss(weight=_W, ignore_index=-7), "tokens"),
    "ce weight smooth": (nn.CrossEntropyLoss(_W, label_smoothing=0.1), "tokens"),
    "ce weight sum": (nn.CrossEntropyLoss(_W, reduction="sum"), "tokens"),
    "ce soft": (nn.CrossEntropyLoss(), "linear"),
    "ce soft tokens": (nn.CrossEntropyLoss(), "tokens"),
    "ce soft weight": (nn.CrossEntropyLoss(_W, label_smoothing=0.2), "tokens"),
    "bce pos_weight": (nn.BCEWithLogitsLoss(pos_weight=_W), "linear"),
    "bce weight": (nn.BCEWithLogitsLoss(weight=_W), "image"),
    "bce both": (nn.BCEWithLogitsLoss(weight=_W, pos_weight=2 * _W, reduction="sum"), "linear"),
}


def problem(net, criterion, seed=0, soft=False):
    """A small float64 model, a batch, and labels that suit the criterion."""
    g = torch.Generator().manual_seed(seed)
    layers, shape = NETS[net]
    torch.manual_seed(seed)
    model = nn.Sequential(*layers()).double()
    x = torch.randn(M, *shape, generator=g, dtype=torch.float64)
    outputs = model(x).detach()
    if soft:
        y = torch.rand(outputs.shape, generator=g, dtype=torch.float64).softmax(1)
    elif isinstance(criterion, nn.CrossEntropyLoss):
        y = torch.randint(CLASSES, (M, *outputs.shape[2:]), generator=g)
        if criterion.ignore_index == -7:
            y.flatten()[1] = -7
    elif isinstance(criterion, nn.BCEWithLogitsLoss):
        y = torch.randint(2, outputs.shape, generator=g).double()
    else:
        y = torch.randn(outputs.shape, generator=g, dtype=torch.float64)
    return model, x, y


def block(layer):
    return Outer(layer.inputs, layer.output_gradients).dense()


def reference(model, criterion, x, y, name):
    module = model.get_submodule(name)
    return Reference(model, criterion, x, y, module.weight, module.bias)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fisher_type", fisher.FISHER_TYPES)
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_layer_against_dense_autograd(criterion, net, fisher_type, backend, monkeypatch):
    criterion = CRITERIA[criterion]
    model, x, y = problem(net, criterion)
    draws, draw = [], fisher.draw_labels
    monkeypatch.setattr(fisher, "draw_labels", lambda *a: draws.append(draw(*a)) or draws[-1])
    layers = capture(model, criterion, x, y, fisher_type=fisher_type, backend=backend, mc_samples=3)
    assert layers.report.backend == backend
    for name, layer in layers.items():
        expected = reference(model, criterion, x, y, name)
        arguments = (draws,) if fisher_type == "mc" else ()
        assert relative(block(layer), getattr(expected, fisher_type)(*arguments)) < 1e-10
        gradient = expected.gradients()
        assert relative(layer.gradient.flatten(), gradient.mean(0)) < 1e-10


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", WEIGHTED)
def test_weighted_losses_against_dense_autograd(case, backend):
    """exact is the dense Hessian; mc, averaged over all labels that can be drawn, is exact."""
    criterion, net = WEIGHTED[case]
    model, x, y = problem(net, criterion, soft="soft" in case)
    for fisher_type in ("empirical", "exact"):
        layers = capture(model, criterion, x, y, fisher_type=fisher_type, backend=backend)
        for name, layer in layers.items():
            expected = getattr(reference(model, criterion, x, y, name), fisher_type)()
            assert relative(block(layer), expected) < 1e-10


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_loss_without_a_likelihood_has_an_empirical_fisher_and_no_other(backend):
    criterion = nn.HuberLoss()
    model, x, y = problem("linear", criterion)
    layers = capture(model, criterion, x, y, fisher_type="empirical", backend=backend)
    for name, layer in layers.items():
        expected = reference(model, criterion, x, y, name).empirical()
        assert relative(block(layer), expected) < 1e-10
    for fisher_type in ("exact", "mc"):
        with pytest.raises(CaptureError, match="HuberLoss is none of .*register_criterion"):
            capture(model, criterion, x, y, fisher_type=fisher_type, backend=backend)


def combinations(criterion, outputs):
    """Every label an example can draw, with its probability per example: `[n, ...]` and `[n]`.

    Squared error has a two-point stand-in of the same moments, `f +- sqrt(1/2)` for each output.
    """
    n, shape = len(outputs), outputs.shape[1:]
    if isinstance(criterion, nn.CrossEntropyLoss):
        p = outputs.softmax(1).movedim(1, -1).reshape(n, -1, shape[0])
        for pick in itertools.product(range(shape[0]), repeat=p.shape[1]):
            labels = torch.tensor(pick).reshape(1, *shape[1:]).expand(n, *shape[1:])
            yield labels, torch.stack([p[:, j, k] for j, k in enumerate(pick)]).prod(0)
        return
    for pick in itertools.product((0.0, 1.0), repeat=math.prod(shape)):
        bits = torch.tensor(pick, dtype=outputs.dtype).reshape(1, *shape).expand_as(outputs)
        if isinstance(criterion, nn.MSELoss):
            yield (
                outputs + (2 * bits - 1) * math.sqrt(0.5),
                outputs.new_full((n,), 0.5 ** len(pick)),
            )
        else:
            p = outputs.sigmoid()
            yield bits, (bits * p + (1 - bits) * (1 - p)).flatten(1).prod(1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("net", ["linear", "tokens"])
@pytest.mark.parametrize("case", [*CRITERIA, *WEIGHTED])
def test_mc_is_unbiased_for_exact_by_enumeration(case, net, backend, monkeypatch):
    criterion = CRITERIA[case] if case in CRITERIA else WEIGHTED[case][0]
    if case.startswith("bce") and case in WEIGHTED and net == "tokens":
        criterion = nn.BCEWithLogitsLoss(_W[:, None], pos_weight=2 * _W[:, None])
    model, x, y = problem(net, criterion, soft="soft" in case)
    exact = capture(model, criterion, x, y, backend=backend)
    sums = {name: torch.zeros_like(block(layer)) for name, layer in exact.items()}
    total = torch.zeros(M, dtype=torch.float64)
    for labels, probability in combinations(criterion, model(x).detach()):
        monkeypatch.setattr(fisher, "draw_labels", lambda *a, labels=labels: labels)
        drawn = capture(model, criterion, x, y, fisher_type="mc", backend=backend)
        total += probability
        for name, layer in drawn.items():
            D = layer.per_example_gradients()[0].flatten(1)
            sums[name] += (probability[:, None] * D).mT @ D / M
    assert torch.allclose(total, torch.ones_like(total))
    for name, layer in exact.items():
        assert relative(sums[name], block(layer)) < 1e-12


@pytest.mark.parametrize("criterion", ["ce", "mse", "bce"])
def test_drawn_labels_have_the_moments_of_the_model(criterion):
    criterion = CRITERIA[criterion]
    outputs = torch.randn(1, 3, dtype=torch.float64).expand(20000, 3)
    labels = fisher.draw_labels(criterion, outputs, torch.Generator().manual_seed(1))
    if isinstance(criterion, nn.CrossEntropyLoss):
        found, mean = F.one_hot(labels, 3).double(), outputs[0].softmax(0)
        variance = mean * (1 - mean)
    elif isinstance(criterion, nn.MSELoss):
        found, mean, variance = labels, outputs[0], torch.full((3,), 0.5)
    else:
        found, mean = labels, outputs[0].sigmoid()
        variance = mean * (1 - mean)
    assert (found.mean(0) - mean).abs().max() < 0.02
    assert (found.var(0) - variance).abs().max() < 0.02


def test_mc_is_reproducible_from_the_generator_and_changes_with_it():
    model, x, y = problem("linear", CRITERIA["ce"])

    def drawn(seed):
        g = torch.Generator().manual_seed(seed)
        layers = capture(model, CRITERIA["ce"], x, y, fisher_type="mc", mc_samples=8, generator=g)
        return layers["0"].output_gradients

    assert torch.equal(drawn(3), drawn(3))
    assert not torch.equal(drawn(3), drawn(4))


def test_the_empirical_fisher_is_a_factor_of_the_terms_below_the_others():
    """`c^2` against `c`; two tokens under a mean, drawn labels as observed ones."""
    criterion = CRITERIA["ce"]
    model, x, y = problem("tokens", criterion)
    empirical = capture(model, criterion, x, y, fisher_type="empirical")
    summed = capture(model, nn.CrossEntropyLoss(reduction="sum"), x, y, fisher_type="empirical")
    ratio = block(summed["0"]) / block(empirical["0"])
    assert torch.allclose(ratio, torch.full_like(ratio, float(T * T)))


def test_functions_stand_for_their_modules():
    for function, module in ((F.cross_entropy, nn.CrossEntropyLoss()), (F.mse_loss, nn.MSELoss())):
        model, x, y = problem("linear", module)
        assert torch.equal(
            capture(model, function, x, y)["0"].output_gradients,
            capture(model, module, x, y)["0"].output_gradients,
        )


def test_a_certain_prediction_has_finite_columns():
    """`sqrt(p)` and never `1 / p`: probabilities of 0 and 1."""
    model, x, y = problem("linear", CRITERIA["ce"])
    with torch.no_grad():
        model[2].bias += torch.tensor([0.0, 2000.0, -2000.0])
    for criterion in (CRITERIA["ce"], CRITERIA["bce"]):
        labels = y if criterion is CRITERIA["ce"] else F.one_hot(y, 3).double()
        for fisher_type in fisher.FISHER_TYPES:
            layers = capture(model, criterion, x, labels, fisher_type=fisher_type)
            assert all(layer.output_gradients.isfinite().all() for layer in layers.values())


def not_additive(outputs, y):
    return (outputs - y).square().sum().sqrt()


not_additive.reduction = "mean"


def returns_rows(outputs, y):
    return (outputs - y).square().sum(1)


returns_rows.reduction = "mean"

REFUSED = {
    "no reduction": (nn.MSELoss(reduction="none"), None, {}, "MSELoss has reduction 'none'"),
    "function without": (lambda f, y: f.sum(), None, {}, "carry a `reduction`"),
    "not additive": (
        not_additive,
        None,
        {"fisher_type": "empirical"},
        "not_additive is not a mean",
    ),
    "not a number": (returns_rows, None, {"fisher_type": "empirical"}, "returned shape"),
    "range": (nn.CrossEntropyLoss(), torch.tensor([0, 1, 3, 2]), {}, "run from 0 to 3.*3 classes"),
    "negative": (nn.CrossEntropyLoss(), torch.tensor([0, 1, -1, 2]), {}, "run from -1"),
    "label shape": (nn.CrossEntropyLoss(), torch.zeros(4, 2).long(), {}, r"need \(4,\)"),
    "all ignored": (
        nn.CrossEntropyLoss(),
        torch.full((4,), -100),
        {},
        "every label is ignore_index",
    ),
    "broadcast": (nn.MSELoss(), torch.zeros(4, 1).double(), {}, "would broadcast"),
    "rows": (nn.MSELoss(), torch.zeros(3, 3).double(), {}, "4 rows for 3 labels"),
    "no draws": (nn.MSELoss(), None, {"fisher_type": "mc", "mc_samples": 0}, "mc_samples must be"),
    "fisher type": (nn.MSELoss(), None, {"fisher_type": "Exact"}, "'Exact'; one of exact"),
    "backend": (nn.MSELoss(), None, {"backend": "functorch"}, "'functorch'; one of auto"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_the_criterion_or_the_labels(case, backend):
    criterion, y, options, message = REFUSED[case]
    model, x, targets = problem("linear", nn.MSELoss())
    with pytest.raises(CaptureError, match=message):
        capture(model, criterion, x, targets if y is None else y, **{"backend": backend} | options)


def test_too_many_columns_are_refused_with_mc_as_the_way_out():
    model = nn.Linear(2, fisher.MAX_COLUMNS + 1).double()
    x, y = torch.ones(1, 2).double(), torch.zeros(1).long()
    with pytest.raises(CaptureError, match="4,097 output vectors.*fisher_type='mc'"):
        capture(model, nn.CrossEntropyLoss(), x, y)
    assert capture(model, nn.CrossEntropyLoss(), x, y, fisher_type="mc")["linear"].shape[0] == 4097
