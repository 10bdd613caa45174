"""How many numbers a step reads of the device: each read waits for all the work before it."""

import pytest
import torch
from standin import REAL, Accelerator, here, there
from torch import nn

import fisherlab as fl
from fisherlab import blocks
from fisherlab.blocks import numerics
from fisherlab.blocks.reads import Together, Unmet, holds, numbers_of
from fisherlab.optim.roots import denman_beavers, newton_schulz

# at a step that refreshes all layers, and at an ordinary one; the page docs/large.md lists them
READS = {
    "kfac": (2, 1),
    "ekfac": (2, 1),
    "tkfac": (2, 1),
    "tekfac": (2, 1),
    "eva": (2, 1),
    "diagonal": (2, 1),
    "sngd": (2, 1),
    "shampoo": (1, 1),
    "soap": (1, 1),
    "ang": (2, 1),
    "ifang": (2, 1),
    "fngd": (2, 2),
    "ngd_smw": (2, 2),
    "tengrad": (2, 2),
    "ngd": (2, 2),
}


def network(layers):
    torch.manual_seed(0)
    hidden = [module for _ in range(layers - 1) for module in (nn.Linear(12, 12), nn.Tanh())]
    return nn.Sequential(*hidden, nn.Linear(12, 4)), torch.randn(16, 12), torch.arange(16) % 4


def optimizer_of(name, model, **options):
    every = {"schedule": fl.optim.Schedule(statistics=5, basis=5)}
    if name in ("fngd", "ngd_smw", "tengrad", "ngd"):
        every = {}
    elif name == "soap":
        every = {"basis_every": 5}
    return fl.optim.create(name, model, **every, **options)


def step(optimizer, model, x, y):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()


@pytest.mark.skipif(bool(REAL), reason="the stand-in counts")
@pytest.mark.parametrize("name", READS)
def test_a_step_reads_as_few_numbers_of_any_number_of_layers(name):
    for layers in (2, 6):
        with Accelerator() as elsewhere:
            model, x, y = there(network(layers))
            optimizer, found = optimizer_of(name, model), []
            for _ in range(8):
                elsewhere.reads.clear()
                step(optimizer, model, x, y)
                found.append(elsewhere.reads.total())
        assert (found[5], found[7]) == READS[name], (layers, elsewhere.reads)


# --- what waits for its read ----------------------------------------------------------------------


def test_conditions_are_looked_at_together_and_void_what_was_computed():
    two = torch.tensor(2.0)
    with Together():
        assert holds(two > 1)
        assert numbers_of([two, two + 1]) == [2, 3]
        assert holds(two > 3)
        with pytest.raises(Unmet):
            numbers_of([two])
    with pytest.raises(Unmet), Together():
        holds(two > 3)
    assert not holds(two > 3)


@pytest.mark.parametrize("name", ["kfac", "ekfac", "diagonal"])
def test_a_step_with_a_condition_that_fails_is_taken_again(name, monkeypatch):
    """Where a decomposition fails, the others are made as before, and the weights are the same."""
    model, x, y = network(3)
    straight, other = optimizer_of(name, model), network(3)[0]
    for _ in range(7):
        step(straight, model, x, y)
    failing, failed = optimizer_of(name, other), []
    for k in range(7):
        with monkeypatch.context() as patch:
            if k == 5:
                look = Together.settle

                def settle(self, tensors, look=look):
                    found = look(self, tensors)
                    if len(failed) < 2:  # the second read is that of the refresh
                        failed.append(1)
                        if len(failed) == 2:
                            raise Unmet
                    return found

                patch.setattr(Together, "settle", settle)
            step(failing, other, x, y)
    assert len(failed) == 2 and not failing._attempt.worthwhile
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    assert failing.preconditioner.curvature.dampings == straight.preconditioner.curvature.dampings


def test_a_layer_whose_statistics_are_not_finite_is_named_and_nothing_is_changed():
    model, x, y = network(3)
    optimizer = optimizer_of("kfac", model)
    step(optimizer, model, x, y)
    before = {
        k: v.clone() for k, v in optimizer.preconditioner.curvature.parts["2"].running.sums.items()
    }
    optimizer.preconditioner.steps = 5
    optimizer.preconditioner.recorder.wanted = True
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    for one in optimizer.preconditioner.recorder.passes:
        one.calls["2"][0].gradient[0] = torch.nan
    with pytest.raises(blocks.BlockError, match="'2' have NaN"):
        optimizer.step()
    after = optimizer.preconditioner.curvature.parts["2"].running.sums
    assert all(torch.equal(before[key], after[key]) for key in before)


# --- decompositions of one shape, together --------------------------------------------------------


def moments(*sizes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(2 * d, d, generator=generator, dtype=dtype) for d in sizes]
    return [X.mT @ X for X in rows]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stacked_decompositions_are_those_of_each(dtype):
    """Up to the last digits: LAPACK takes one matrix after another, elsewhere in memory."""
    close = {"rtol": 100 * torch.finfo(dtype).eps, "atol": 100 * torch.finfo(dtype).eps}
    every = moments(5, 7, 5, 5, 7, dtype=dtype)
    for (values, Q), S in zip(numerics.eigh_each(every, "ababa"), every, strict=True):
        expected = numerics.eigh(S)
        torch.testing.assert_close((values, Q), expected, **close)
    dampings = [0.1, 1.0, torch.tensor(2.0, dtype=torch.float64), 0.3, 0.5]
    for inverse, S, damping in zip(
        numerics.damped_inverses(every, dampings), every, dampings, strict=True
    ):
        torch.testing.assert_close(inverse, numerics.damped_inverse(S, damping), **close)


@pytest.mark.parametrize("name, calls", [("ekfac", ("eigh", 3)), ("kfac", ("cholesky_ex", 3))])
def test_a_refresh_makes_one_call_a_shape(name, calls, monkeypatch):
    function, expected = calls
    model, x, y = network(6)
    optimizer, found = optimizer_of(name, model), []
    made = getattr(torch.linalg, function)
    monkeypatch.setattr(
        torch.linalg, function, lambda S, *args: found.append(S.shape) or made(S, *args)
    )
    step(optimizer, model, x, y)
    # of inputs [13, 13], of outputs [12, 12] and [4, 4], where there were twelve
    assert len(found) == expected


def test_eigenvectors_that_are_none_are_found_again_one_by_one(monkeypatch):
    solve, (S, T) = torch.linalg.eigh, moments(4, 4)
    monkeypatch.setattr(
        torch.linalg,
        "eigh",
        lambda X: solve(X) if X.ndim == 2 else (solve(X)[0], solve(X)[1] * torch.nan),
    )
    for (values, Q), X in zip(numerics.eigh_each([S, T], "ab"), (S, T), strict=True):
        torch.testing.assert_close(Q * values @ Q.mT, X)
    with pytest.raises(blocks.BlockError, match="b of shape"):
        numerics.eigh_each([S, T * torch.nan], "ab")


@pytest.mark.skipif(bool(REAL), reason="the stand-in counts")
@pytest.mark.parametrize("roots", [newton_schulz, denman_beavers])
def test_an_iteration_is_looked_at_once_in_eight(roots):
    (S,) = moments(6)
    expected = roots(S)
    with Accelerator() as elsewhere:
        S = there(S)
        with Together():
            found = roots(S)
            assert elsewhere.reads.total() == -(-expected.iterations // 8)
    assert torch.equal(here(found.root), expected.root)
    assert found.residuals == expected.residuals
