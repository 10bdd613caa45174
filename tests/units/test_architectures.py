"""Real architectures with random weights: every block against autograd, and no silent SGD.

Those of transformers, timm and peft (`pip install -e '.[hub]'`) are skipped where these are absent.
"""

import pytest
import torch
from architectures import TABLE
from architectures.measure import (
    drawn_errors,
    exact_errors,
    located,
    measured,
    own_parameters,
    step_errors,
    trained,
)
from architectures.measure import error as relative_error
from architectures.measure import per_example as autograd_per_example

import fisherlab as fl

EXACT = 1e-10
OPTIMIZERS = ("kfac", "tekfac", "fngd", "shampoo")
# Optimizer runs in the default run; every other one is slow.
QUICK_RUNS = {
    ("causal transformer, rotary, gated", "kfac"),
    ("residual block, batch norm", "tekfac"),
    ("TransformerEncoderLayer, batch first", "fngd"),
    ("TransformerEncoderLayer, batch first", "exact"),
    ("window attention", "fngd"),
}

pytestmark = [
    # of the other libraries, about themselves and about torch
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def slow_unless(quick: bool) -> list:
    return [] if quick else [pytest.mark.slow]


def every(condition=lambda architecture: True):
    chosen = [a for a in TABLE.values() if condition(a)]
    return [pytest.param(a.name, marks=slow_unless(a.quick), id=a.name) for a in chosen]


@pytest.mark.parametrize("name", every())
def test_every_block_is_autograds_of_each_example(name):
    architecture = TABLE[name]
    found = measured(architecture.problem())
    for block, error in found.errors.items():
        cast = architecture.cast and block.endswith(architecture.cast)
        assert error < (architecture.tolerance if cast else EXACT), block
    assert found.share >= architecture.share, found.refusal or found.skipped
    assert found.reported == pytest.approx(found.share, abs=1e-12)


@pytest.mark.parametrize("name", every(lambda architecture: architecture.exact))
def test_every_exact_block_is_the_jacobians_and_the_hessian(name):
    architecture = TABLE[name]
    problem = architecture.problem()
    found = measured(problem)
    errors = exact_errors(problem, found.parts)
    assert errors.keys() == found.errors.keys()
    assert max(errors.values()) < architecture.tolerance, errors


@pytest.mark.parametrize("name", every(lambda architecture: not architecture.exact))
def test_every_block_of_drawn_labels_is_autograds(name):
    architecture = TABLE[name]
    problem = architecture.problem()
    if not isinstance(problem.criterion, torch.nn.CrossEntropyLoss):
        pytest.skip("labels are drawn of classes")
    found = measured(problem)
    if found.refusal:
        pytest.skip(found.refusal)
    errors = drawn_errors(problem, found.parts)
    assert errors.keys() == found.errors.keys()
    assert max(errors.values()) < architecture.tolerance, errors


def runs(optimizers):
    return [
        pytest.param(name, run, marks=slow_unless((name, run) in QUICK_RUNS), id=f"{name}-{run}")
        for name in TABLE
        for run in optimizers
    ]


@pytest.mark.parametrize(("name", "optimizer"), runs(OPTIMIZERS))
def test_no_optimizer_is_sgd_in_silence(name, optimizer):
    found = trained(TABLE[name].problem(), optimizer)
    assert not found.refusal, found.refusal
    assert not found.silent_sgd, (found.covered, found.cosines)


@pytest.mark.filterwarnings("ignore:layer .* has no block")
@pytest.mark.filterwarnings("ignore:only .* of the trainable matrices have a block")
@pytest.mark.parametrize(("name", "optimizer"), runs(("fngd", "exact")))
def test_a_first_step_is_the_closed_form_of_each_examples_gradients(name, optimizer):
    errors = step_errors(TABLE[name].problem(), optimizer)
    assert max(errors.values(), default=0.0) < 1e-8, errors


def test_the_table_holds_what_the_tests_promise():
    plain = [a for a in TABLE.values() if not a.packages]
    hub = [a for a in TABLE.values() if a.packages]
    assert len(plain) >= 8
    assert len(hub) >= 30
    assert sum(a.quick for a in hub) == 8


@pytest.mark.parametrize("fault", ["examples swapped", "bias scaled", "another layer's name"])
def test_the_comparison_sees_a_wrong_block(fault):
    problem = TABLE["residual block, batch norm"].problem()
    truth = autograd_per_example(problem)
    layer = fl.capture(
        problem.model, problem.criterion, problem.x, problem.y, fisher_type="empirical"
    )["head"]
    (D,) = layer.per_example_gradients()
    name = "head"
    if fault == "examples swapped":
        D = D[torch.tensor([1, 0, 2, 3])]
    elif fault == "bias scaled":
        D = torch.cat([D[:, :, :-1], D[:, :, -1:] * (1 + 1e-7)], 2)
    else:
        name = "conv2"
    own = own_parameters(problem.model, name, truth)
    assert relative_error(D, truth, located(D, truth, own)) > EXACT
