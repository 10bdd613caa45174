"""Statistics over time against ten-line loops; bases and corrections of other batches."""

import dataclasses
import math

import dense
import pytest
import torch
from formulas import found_and_expected
from references import randn, relative
from torch import nn

import fisherlab as fl
from fisherlab.approximations import Memo, Running
from fisherlab.blocks import BlockError
from fisherlab.extract import capture

CE = nn.CrossEntropyLoss()
SIZES = (9, 4, 9, 2, 7, 9, 1)  # short batches among the others
ADDITIVE = [n for n in dense.REFERENCES if fl.approximations.get(n).additive]


def captured(sizes=SIZES, classes=3, features=4, fisher_type="exact"):
    """Batches of unequal size through one network."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(features, 5), nn.Tanh(), nn.Linear(5, classes)).double()
    return [
        capture(model, CE, randn(n, features, seed=k), torch.arange(n) % classes,
                fisher_type=fisher_type)["0"]
        for k, n in enumerate(sizes)
    ]  # fmt: skip


def pair_of(layer):
    """The pairs of a capture (what they are is tested elsewhere)."""
    slope = float(layer.activation_slope)
    return dense.Pairs(layer.inputs, layer.output_gradients, layer.label_gradients, slope)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.95, 1.0])
def test_decayed_factors_against_a_loop(decay):
    """`S <- decay S + s`, `c <- decay c + n`: a right first estimate, a short batch counts less."""
    layers = captured()
    kfac, tkfac = Running(fl.KFAC(), decay), Running(fl.TKFAC(), decay)
    A = G = left = right = total = 0.0
    count = 0.0
    for layer in layers:
        p = pair_of(layer)
        l, r, e = dense.tkfac_sides(p)
        A, G = decay * A + dense.moment(p.a), decay * G + dense.moment(p.g)
        left, right, total = decay * left + l, decay * right + r, decay * total + e
        count = decay * count + p.M
        kfac.update(layer)
        tkfac.update(layer)
        assert relative(kfac.block().dense(), torch.kron(G / count, A / count)) < 1e-12
        expected = torch.kron(left, right) / total / count
        assert relative(tkfac.block().dense(), expected) < 1e-12
    assert kfac.count == pytest.approx(count)


@pytest.mark.parametrize("ema", ["averaged", "literal"])
def test_averaged_means_against_a_loop(ema):
    """TEKFAC (3.6)-(3.8): `new <- b old + (1 - b) estimate`, and the letter, b on the estimate."""
    decay, layers = 0.9, captured(sizes=(5,) * 6)
    running, corrected = Running(fl.KFAC(), decay, ema=ema), Running(fl.EKFAC(), decay, ema=ema)
    past = decay if ema == "averaged" else 1 - decay
    A = G = spectrum = None
    for layer in layers:
        p = pair_of(layer)
        one, two = dense.moment(p.a) / p.M, dense.moment(p.g) / p.M
        A = one if A is None else past * A + (1 - past) * one
        G = two if G is None else past * G + (1 - past) * two
        running.update(layer)
        assert relative(running.block().dense(), torch.kron(G, A)) < 1e-12
        corrected.update(layer)
        if spectrum is None:
            corrected.refresh_basis()
            Q_G, Q_A = corrected.basis["Q_G"], corrected.basis["Q_A"]
        new = (Q_G.mT @ p.D @ Q_A).square().sum(0) / p.M
        spectrum = new if spectrum is None else past * spectrum + (1 - past) * new
        corrected.correct(layer)
        Q = torch.kron(Q_G, Q_A)
        expected = Q @ torch.diag(spectrum.flatten()) @ Q.mT
        assert relative(corrected.block().dense(), expected) < 1e-12
    with pytest.raises(BlockError, match="corrected, averaged, literal"):
        Running(fl.KFAC(), ema="mean")


@pytest.mark.parametrize("name", ADDITIVE)
def test_the_first_estimate_and_the_ends_of_decay(name):
    layers = captured()
    approximation = fl.approximations.get(name)()
    for decay, expected in ((0.0, layers[-1:]), (1.0, layers)):
        running = Running(approximation, decay)
        for k, layer in enumerate(layers):
            running.update(layer)
            if k == 0:
                running.refresh_basis()
                running.correct(layer)
                first = approximation(layer).dense()
                assert relative(running.block().dense(), first) < 1e-12
        if approximation.corrections(layers[0], running.basis):
            continue  # a basis of the last step needs a second sweep: below
        assert relative(running.block().dense(), approximation(*expected).dense()) < 1e-12


@pytest.mark.parametrize("name", ["ekfac", "tekfac"])
@pytest.mark.parametrize("intervals", [(1, 1, 1), (1, 3, 1), (1, 3, 2), (2, 4, 1)])
def test_corrected_spectra_are_carried_into_a_new_basis(name, intervals):
    """`Lambda <- (Q_G'^T Q_G)^2 Lambda ((Q_A'^T Q_A)^2)^T`, and only then blended."""
    decay, (every, basis_every, corrections_every) = 0.8, intervals
    approximation = fl.approximations.get(name)()
    running = Running(approximation, decay)
    one = two = spectrum = 0.0
    seen = 0.0
    Q_G = Q_A = None
    for k, layer in enumerate(captured((9, 9, 6, 9, 3, 9, 9, 8))):
        p = pair_of(layer)
        if k % every == 0:
            running.update(layer)
            sides = (
                dense.tkfac_sides(p)[:2]
                if name == "tekfac"
                else (dense.moment(p.g), dense.moment(p.a))
            )
            one, two = decay * one + sides[0], decay * two + sides[1]
        if k % basis_every == 0:
            running.refresh_basis()
            new_G, new_A = (torch.linalg.eigh(side).eigenvectors for side in (one, two))
            if Q_G is not None:
                R_G, R_A = (new_G.mT @ Q_G) ** 2, (new_A.mT @ Q_A) ** 2
                before = spectrum.sum()
                spectrum = R_G @ spectrum @ R_A.mT
                assert float(spectrum.sum()) == pytest.approx(float(before), rel=1e-12)
            Q_G, Q_A = new_G, new_A
        if k % corrections_every == 0:
            running.correct(layer)
            spectrum = decay * spectrum + (Q_G.mT @ p.D @ Q_A).square().sum(0)
            seen = decay * seen + p.M
        Q = torch.kron(Q_G, Q_A)
        expected = Q @ torch.diag((spectrum / seen).flatten()) @ Q.mT
        assert relative(running.block().dense(), expected) < 1e-10


def test_before_the_first_correction_the_block_is_that_of_the_factors():
    layers = captured()
    for name, factors in (("ekfac", fl.KFAC()), ("tekfac", fl.TKFAC())):
        running = Running(fl.approximations.get(name)())
        with pytest.raises(BlockError, match="no batch has been seen yet"):
            running.block()
        running.update(*layers)
        running.refresh_basis()
        assert relative(running.block().dense(), factors(*layers).dense()) < 1e-12


def test_a_batch_in_chunks_decays_once():
    layers = captured()
    parts = [layer.part(slice(k, k + 2)) for layer in layers[:1] for k in (0, 2, 4, 6, 8)]
    whole, chunked = Running(fl.TEKFAC(), 0.9), Running(fl.TEKFAC(), 0.9)
    for running, batch in ((whole, layers[:1]), (chunked, parts)):
        running.update(layers[1])
        running.update(*batch)
        running.refresh_basis()
        running.correct(*batch)
    assert relative(chunked.block().dense(), whole.block().dense()) < 1e-12


def test_reduce_adds_the_sums_of_ranks():
    one, two = captured((6, 3), features=6)
    other = {key: S.total(two) for key, S in fl.KFAC().statistics_by_name.items()}
    other["count"] = torch.tensor(3.0)
    calls = []

    def reduce(sums):
        calls.append(list(sums))
        return {key: value + other[key] for key, value in sums.items()}

    running = Running(fl.KFAC(), 0.9, reduce=reduce)
    running.update(one)
    assert calls == [["A", "G", "count"]]
    assert relative(running.block().dense(), fl.KFAC()(one, two).dense()) < 1e-12


def test_what_is_remembered_travels_as_flat_tensors(tmp_path):
    layers = captured()
    running = Running(fl.TEKFAC(), 0.9)
    for layer in layers[:3]:
        running.update(layer)
        running.refresh_basis()
        running.correct(layer)
    torch.save(running.state_dict(), tmp_path / "state.pt")
    again = Running(fl.TEKFAC(), 0.9)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for layer in layers[3:]:
        for one in (running, again):
            one.update(layer)
            one.refresh_basis()
            one.correct(layer)
    assert torch.equal(running.block().dense(), again.block().dense())


def test_what_has_no_memory_is_refused_by_name():
    for name in ("exact", "kronecker_optimal", "kronecker_sum"):
        made = fl.approximations.get(name)()
        with pytest.raises(BlockError, match=f"{type(made).__name__} has no memory"):
            Running(made)
    for decay in (-0.1, 1.1, float("nan")):
        with pytest.raises(BlockError, match="decay, the weight of the past, must be"):
            Running(fl.KFAC(), decay)


@pytest.mark.parametrize("name", ["ekfac", "tekfac"])
@pytest.mark.parametrize("case", ["fewer examples than inputs", "one example"])
def test_a_thin_basis_keeps_the_trace_of_a_batch_it_has_not_seen(name, case):
    """0.334 of the trace was left on another batch."""
    seen, _ = found_and_expected(case, "exact")
    unseen = captured_like(seen)
    approximation = fl.approximations.get(name)()
    memo = Memo([seen])
    basis = memo.basis(approximation)
    assert basis["Q_A"].shape[1] < basis["Q_A"].shape[0]
    own = approximation(seen)
    assert float(own.trace() / fl.Exact()(seen).trace()) == pytest.approx(1, abs=1e-12)
    for parts in ([unseen], [unseen.part(slice(0, 5)), unseen.part(slice(5, None))]):
        sums = fl.approximations.running.add(approximation.corrections(x, basis) for x in parts)
        corrections = {key: value / unseen.examples for key, value in sums.items()}
        means = memo.means(approximation).given(basis, corrections)
        block = approximation.block(means, unseen.shape)
        F = fl.Exact()(unseen)
        assert float(block.trace() / F.trace()) == pytest.approx(1, abs=1e-12)
        assert (block.eigenvalues() >= 0).all()
        # the best block of this form: isotropic beside the basis
        Q_A, Q_G = basis["Q_A"], basis["Q_G"]
        beside = torch.eye(len(Q_A)).double() - Q_A @ Q_A.mT
        P = torch.kron(Q_G.contiguous(), beside.contiguous())
        energies = (P.mT @ F.dense() @ P).diagonal().view(len(Q_G), -1).sum(1)
        assert relative(block.tail_G, energies / beside.trace()) < 1e-10


def captured_like(layer):
    """Another batch at a layer of the same shape."""
    o, i = layer.shape
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(i - 1, o), nn.Tanh(), nn.Linear(o, 3)).double()
    return capture(model, CE, randn(12, i - 1, seed=9), torch.arange(12) % 3)["0"]


def test_a_damaged_state_is_refused_whole():
    running = Running(fl.EKFAC())
    layer = captured()[0]
    running.update(layer)
    running.refresh_basis()
    running.correct(layer)
    before = running.state_dict()
    for key, value in before.items():
        for damaged in (value[..., :-1] if value.ndim else value + 1, value * math.nan):
            with pytest.raises(ValueError, match="state"):
                running.load_state_dict({**before, key: damaged})
            after = running.state_dict()
            assert all(torch.equal(after[name], before[name]) for name in before)
    running.load_state_dict({k: v for k, v in before.items() if k != "form"})  # an earlier version
    with pytest.raises(BlockError, match="new must be a basis of Q_G"):
        running.refresh_basis({})


def test_nan_enters_no_corrections():
    running = Running(fl.EKFAC())
    layer = captured()[0]
    running.update(layer)
    running.refresh_basis()
    bad = dataclasses.replace(layer, raw_inputs=tuple(x * math.nan for x in layer.raw_inputs))
    with pytest.raises(BlockError, match="have NaN or inf entries"):
        running.correct(bad)
    assert not running.corrections
