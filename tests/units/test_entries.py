"""Doors of blocks, means and metrics: junk is refused by name, and rare forms have right values."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

import fisherlab as fl
from fisherlab import blocks, metrics
from fisherlab.approximations import damping
from fisherlab.blocks.low_rank import Pair

one = torch.ones


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def psd(d: int, seed: int = 0) -> Tensor:
    X = randn(d, d, seed=seed)
    return X @ X.mT


@pytest.fixture(scope="module")
def layer() -> Any:
    model = nn.Linear(3, 3)
    return fl.capture(model, nn.CrossEntropyLoss(), one(5, 3), torch.arange(5) % 3)["linear"]


KRONECKER = blocks.Kronecker(psd(3), psd(4))
OUTER = blocks.Outer(randn(5, 1, 4), randn(2, 5, 1, 3))
JUNK: list[tuple[Callable[[], object], str]] = [
    (lambda: blocks.Kronecker(randn(3, 3), psd(4)), "output factor G must be symmetric"),
    (lambda: blocks.Dense(randn(4, 4), (2, 2)), "matrix must be symmetric"),
    (lambda: blocks.Leading(one(1, 2, 2), one(1), "x"), "level must be a tensor"),
    (lambda: blocks.Leading(one(1, 2, 2), one(1)), "vectors must be orthonormal"),
    (lambda: blocks.Eigen(one(2, 2), None, one(2, 3)), "columns of Q_G must be orthonormal"),
    (lambda: Pair(one(2, 1), one(3, 1), None, one(1)), "g must be a tensor"),
    (lambda: blocks.Outer(OUTER.a, OUTER.g, core=-1.0), "core must be a finite number >= 0"),
    (lambda: blocks.Outer(OUTER.a, OUTER.g, shift=-1.0), "shift must be a finite number >= 0"),
    (lambda: blocks.RowBlocks(OUTER.a, OUTER.g, -1.0), "scale must be a finite number >= 0"),
    (lambda: OUTER.inner(blocks.Outer), "other must be a block"),
    (lambda: OUTER.inner_with_columns(type(OUTER.columns)), "columns must be those of"),
    (lambda: KRONECKER.eigen.inner_with_rotated(None), "other must be a block"),
    (lambda: KRONECKER.eigen.of_factors(None, one(4)), "values_G must be a tensor"),
    (lambda: fl.EKFAC().basis(None), "mean must be the Means"),
    (lambda: fl.approximations.Means(one, 1.0, None), "shape must be"),
    (lambda: blocks.Outer.over(None), "columns must be those of an exact block"),
    (lambda: blocks.to_dict(None), "block must be a block"),
    (lambda: blocks.from_dict({"form": []}), "block form must be one of"),
    (lambda: blocks.from_dict(None), "state must be a dict"),
    (lambda: list(OUTER.rows(-1)), "budget must be a whole number"),
    (lambda: OUTER.leading_products(1, one(3, 1), "x"), "q_A must be a tensor"),
    (lambda: KRONECKER.factored_power(None, 0.1, 0.1), "exponent must be a finite number"),
    (lambda: KRONECKER.eigen.in_bases(None), "V must be a tensor"),
    (lambda: blocks.Diagonal(one(2, 2).double() * 0).power(-2, 1e-300), "overflows torch.float64"),
    (lambda: OUTER.power(-2, 1e-300), "overflows torch.float64"),
    (lambda: KRONECKER.solve(one(3, 4).double(), nn.LazyLinear(2).weight), "damping must be"),
    (lambda: fl.KFAC(A=None), "A of KFAC must be a Statistic, got None"),
    (lambda: fl.KLOptimal(iterations=torch.tensor(3)), "must be a whole number of Python"),
    (lambda: fl.KFAC().damped(None, 0.1), "block must be a block"),
    (lambda: fl.IFANG().damped(KRONECKER, 0.1), "IFANG damps blocks that it made"),
    (lambda: fl.KFAC().damped_each([KRONECKER], []), "1 blocks need as many dampings"),
    (lambda: fl.approximations.Memo([]), "at least one"),
    (lambda: fl.approximations.Memo([fl.LayerCapture]), "a layer must be that of fl.capture"),
    (lambda: damping.constant("x"), "damping must be a finite number"),
    (lambda: damping.levenberg_marquardt().adapt(None), "ratio must be a number"),
    (lambda: damping.LevenbergMarquardt(smallest=2.0, largest=1.0), "must not exceed largest"),
    (lambda: damping.lambdas(None, {}), "rule must be callable"),
    (lambda: damping.trace_ratio_pi(OUTER), "must be a Kronecker product"),
    (lambda: metrics.gram_study({}, one(3)), "layers must have a layer"),
    (lambda: metrics.pareto_front(torch.tensor(1.0), [1.0]), "costs must have 1 axes"),
    (lambda: metrics.condition_curve(OUTER, b"x"), "dampings must be a list"),
    (lambda: metrics.GramStudy.of_arrays({}), "arrays must be those of a study"),
    (lambda: fl.save(None, "nowhere"), "the value is None"),
    (lambda: fl.save(one(2).to_sparse(), "nowhere"), "must be a dense tensor"),
    (lambda: fl.load("nowhere", device=3), "device must be one that this machine has"),
    (lambda: fl.load("nowhere", device="cuda:99"), "device must be one that this machine has"),
    (lambda: fl.load("\ud800"), "path must be a path"),
    (lambda: fl.extract.Captures(3, None, None, None), "layers must be a dict of layer name"),
    (lambda: fl.extract.Captures({"0": 3}, None, None, None), "must be that of fl.capture"),
    (lambda: fl.extract.Captures({}, None, None, None), "report must be that of fl.capture"),
    (lambda: fl.extract.Geometry("3", 3, True), "in_features must be a whole number"),
    (lambda: fl.extract.Geometry(3, 3, 1), "bias must be True or False"),
]


def test_a_core_below_zero_counts_as_zero_in_a_power() -> None:
    X = blocks.OuterSum(OUTER.a.double(), OUTER.g.double(), -torch.eye(10).double(), 0.5)
    dense = blocks.Dense(X.dense(), X.shape)
    for exponent in (0.5, -1):
        torch.testing.assert_close(
            X.power(exponent, 0.3).dense(), dense.power(exponent, 0.3).dense()
        )
    torch.testing.assert_close(X.logdet(0.3), dense.logdet(0.3))


@pytest.mark.filterwarnings("error")
def test_a_block_of_tensors_that_require_gradients_gives_plain_numbers() -> None:
    X = blocks.Dense(psd(4).requires_grad_(), (2, 2))
    product = X.as_linear_operator() @ np.ones(4)
    torch.testing.assert_close(torch.as_tensor(product), X.matrix.detach().sum(1))
    assert 0 <= X.clamped < 1e-6


@pytest.mark.parametrize(("call", "message"), JUNK)
def test_junk_is_refused_by_name(call: Callable[[], object], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_of_a_capture(layer: Any) -> None:
    means = fl.approximations.Memo([layer]).means(fl.EKFAC())
    for call, message in (
        (lambda: layer.part(None), "examples must be a slice"),
        (lambda: list(layer.chunks("x")), "memory must be a whole number"),
        (lambda: layer.map(None), "function must be callable"),
        (lambda: layer.weighed(None), "a must be a tensor"),
        (lambda: fl.approximations.Memo([layer], "x"), "memory must be a whole number"),
        (lambda: fl.approximations.Memo([layer]).block(fl.KFAC), "approximation must be one"),
        (lambda: fl.EKFAC().block(means, (3, 4)), "no basis with 'l_G'"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_state_of_running_means_is_refused_whole(layer: Any) -> None:
    running = fl.approximations.Running(fl.KFAC())
    running.update(layer)
    good, before = running.state_dict(), running.block().dense()
    for bad in (None, good | {"sums.A": "x"}, good | {"counts": one(3)}, good | {"sums.B": one(3)}):
        with pytest.raises(ValueError, match="state"):
            running.load_state_dict(bad)
        assert torch.equal(running.block().dense(), before)


def test_von_neumann_in_float32() -> None:
    G, A, F = psd(3).float(), psd(4, 1).float(), blocks.Outer(OUTER.a.float(), OUTER.g.float())

    def log(S: Tensor) -> Tensor:
        values, Q = torch.linalg.eigh(S.double() + 0.1 * torch.eye(12))
        return Q * values.log() @ Q.mT

    X, E = torch.kron(G, A), F.dense()
    right = ((E + 0.1 * torch.eye(12)).double() @ (log(E) - log(X))).trace() - (E - X).trace()
    found = metrics.von_neumann_divergence(blocks.Kronecker(G, A), F, 0.1)
    assert float(found) == pytest.approx(float(right), rel=1e-4)


def test_diagonalisation_of_mini_blocks_beside_a_dense_matrix() -> None:
    parts = torch.stack([psd(2, k) for k in range(6)]).view(3, 2, 2, 2)
    X, F = blocks.MiniBlock(parts), psd(12, 9)
    Q = torch.block_diag(*torch.linalg.eigh(parts.flatten(0, 1))[1])
    right = (Q.mT @ F @ Q).diagonal()
    assert torch.allclose(X.diagonal_of(blocks.Dense(F, (3, 4))).flatten(), right)
    share = metrics.diagonalisation(X, blocks.Dense(F, (3, 4)))
    assert float(share) == pytest.approx(float(right.square().sum() / F.square().sum()))


def test_a_diagonal_side_beside_an_outer_sum() -> None:
    F = blocks.OuterSum(OUTER.a, OUTER.g, psd(10))
    X, A = blocks.Kronecker(one(3).double(), psd(4)), torch.linalg.eigh(psd(4))[1]
    Q = torch.block_diag(A, A, A)
    assert torch.allclose(X.diagonal_of(F).flatten(), (Q.mT @ F.dense() @ Q).diagonal())


def test_a_tail_of_a_whole_basis_counts_for_nothing() -> None:
    Q_G, Q_A = torch.linalg.qr(randn(3, 2))[0], torch.linalg.qr(randn(4, 4))[0]
    spectrum, beside = randn(2, 4).square(), randn(4).square()
    X = blocks.Eigen(Q_G, Q_A, spectrum, torch.full((2,), 1e15).double(), beside)
    V, whole = randn(3, 4, seed=3), torch.eye(12) + X.dense()
    right = torch.linalg.solve(whole, V.flatten()).view(3, 4)
    assert torch.allclose(X.power(0.5).power(2).solve(V, 1.0), right)


def test_what_lies_beside_a_range() -> None:
    F = blocks.Outer(OUTER.a, OUTER.g, shift=2.0)
    values = torch.linalg.eigvalsh(F.dense()).flip(0)
    rank = len(F.leading_values(12))
    right = (values[rank - 1] - values[rank]) / values[0] if rank < 12 else values[-1] / values[0]
    assert float(metrics.spectral_gap(F, rank)) == pytest.approx(float(right))
    with pytest.raises(ValueError, match="lie beside its range"):
        metrics.subspace_overlap(blocks.Outer(OUTER.a[:2], OUTER.g[:, :2]).power(-1, 0.1), OUTER)


def test_verify_and_load_leave_the_random_streams() -> None:
    for call in (
        lambda: fl.claims.verify("kfac_keeps_the_trace", trials=2),
        lambda: fl.datasets.load("digits"),
    ):
        before = torch.get_rng_state(), random.getstate()
        call()
        assert torch.equal(before[0], torch.get_rng_state())
        assert before[1] == random.getstate()


DRAWN: list[tuple[Callable[[], object], str]] = [
    (lambda: fl.plots.error(None), "table must be a Comparison or its frame"),
    (lambda: fl.plots.eigenvalues({"kfac": one(0)}), "must have entries"),
    (lambda: fl.plots.effective_rank({"0": {"kfac": "x"}}), "must be a finite number"),
    (lambda: fl.plots.gram_similarity(None), "study must be a GramStudy"),
    (lambda: fl.plots.lines(pd.DataFrame({"a": [1]}), "a", "b"), "lines finds no"),
    (lambda: fl.Comparison(pd.DataFrame({"a": [1]})), "it has no column layer"),
    (lambda: fl.Comparison(pd.DataFrame(), unseen=3), "unseen must be that of a comparison"),
    (lambda: fl.statistics.InputMoment().total(None), "layer must be that of fl.capture"),
    (lambda: fl.claims.Verdicts([3]), "verdicts must be those of"),
    (lambda: fl.models.create("mlp", input_size=4, hidden=["x"]), "hidden must hold positive"),
    (lambda: fl.models.register(3), "builder must be a function"),
    (lambda: fl.datasets.load("mnist", root=3), "root must be a path"),
    (lambda: fl.adapters.from_bergson(3), "folder must be a path"),
    (
        lambda: fl.adapters.from_kronfluence({"gradient_covariance": {"0": None}}, 4),
        r"factors\['gradient_covariance'\]\['0'\] must be a tensor",
    ),
]


@pytest.mark.parametrize(("call", "message"), DRAWN)
def test_what_is_drawn_and_read_is_checked(call: Callable[[], object], message: str) -> None:
    with pytest.raises((ValueError, TypeError, fl.adapters.AdapterError), match=message):
        call()


def test_a_spectrum_is_drawn_from_its_largest_value_down() -> None:
    values = torch.tensor([1e-20, 1.0, 4.0, 2.0])
    (line,) = fl.plots.eigenvalues({"kfac": values}).axes[0].lines
    assert line.get_ydata().tolist() == [4.0, 2.0, 1.0]
    with pytest.raises(ValueError, match="has NaN or inf entries"):
        fl.plots.eigenvalues({"kfac": values * float("nan")})


def test_settings_of_a_run_are_checked_by_their_types() -> None:
    from fisherlab.experiments import training

    given = training.Settings().to_json()
    for key, bad in (
        ("epochs", 2.5), ("epochs", None), ("seeds", 3), ("seeds", ["x"]), ("schedule", 1.5),
        ("width", "x"), ("hidden", 3), ("device", []), ("augment", "no"), ("entries", [3]),
    ):  # fmt: skip
        named = "config" if key == "entries" else key
        with pytest.raises(training.SettingsError, match=named):
            training.Settings.from_json({**given, key: bad})
    before = torch.get_rng_state()
    assert training.bounds(training.Entry("sgd", "sgd")) == {}
    assert torch.equal(before, torch.get_rng_state())
    for call in (lambda: training.train(None, "x"), lambda: training.entries(3)):
        with pytest.raises(training.SettingsError, match="settings must be|wanted must be"):
            call()
