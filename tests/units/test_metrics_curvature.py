"""Layers, coefficients, Fisher types, KFAC's error, eigenspaces: each against its definition."""

import numpy as np
import pytest
import torch
from torch import nn

import fisherlab as fl
from fisherlab import metrics
from fisherlab.blocks import BlockError, Dense, DirectSum, Outer


@pytest.fixture
def conv_net(generator):
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(48, 5), nn.Tanh()
    )
    model.append(nn.Linear(5, 3))
    x = torch.randn(7, 2, 4, 4, generator=generator, dtype=torch.float64)
    return model.double(), x, torch.randint(0, 3, (7,), generator=generator)


def flat(layer):
    """The columns of U, `[o i, R]`."""
    return layer.per_example_gradients().reshape(-1, layer.shape[0] * layer.shape[1]).mT


@pytest.mark.parametrize("fisher_type", ["exact", "empirical"])
def test_masses_between_layers_are_those_of_the_dense_fisher_matrix(conv_net, fisher_type):
    layers = fl.capture(conv_net[0], nn.CrossEntropyLoss(), *conv_net[1:], fisher_type=fisher_type)
    columns = [flat(layer) for layer in layers.values()]
    dense = torch.stack([torch.stack([(u @ v.mT / 7).norm() for v in columns]) for u in columns])
    masses = metrics.layer_masses(layers, 7)
    torch.testing.assert_close(masses, dense)
    whole = torch.cat(columns) @ torch.cat(columns).mT / 7
    diagonal = sum((u @ u.mT / 7).square().sum() for u in columns)
    torch.testing.assert_close(metrics.dropped_mass(masses), 1 - diagonal / whole.square().sum())
    correlation = metrics.layer_correlation(masses)
    expected = dense[0, 1] ** 2 / (dense[0, 0] * dense[1, 1])
    torch.testing.assert_close(correlation[0, 1], expected)


def test_layers_of_different_captures_are_refused(conv_net):
    model, x, y = conv_net
    one = fl.capture(model, nn.CrossEntropyLoss(), x, y, fisher_type="empirical")
    two = fl.capture(model, nn.CrossEntropyLoss(), x[:5], y[:5], fisher_type="empirical")
    with pytest.raises(ValueError, match="different numbers of columns"):
        metrics.layer_masses({"0": one["0"], "3": two["3"]}, 7)


def test_coefficients_give_the_damped_inverse_times_the_gradient(conv_net):
    layer = fl.capture(*with_loss(conv_net), fisher_type="empirical")["3"]
    v = metrics.example_coefficients(layer, alpha=0.02)
    U, M = flat(layer), 7
    damping = 0.02 * (U.mT @ U).norm()
    F = U @ U.mT / M
    step = torch.linalg.solve(F + damping * torch.eye(len(F), dtype=F.dtype), U.mean(1))
    torch.testing.assert_close(U @ v / M / damping, step)
    assert ((v > 0).any() and (v < 1).any()).item()
    large = metrics.example_coefficients(layer, alpha=1e8)
    torch.testing.assert_close(large, torch.ones_like(large))


def with_loss(net):
    return net[0], nn.CrossEntropyLoss(), net[1], net[2]


def test_drift_is_zero_for_the_same_coefficients_and_one_for_a_constant():
    v = torch.tensor([0.5, 1.0, 1.5])
    assert metrics.coefficient_drift(v, v) == 0
    assert metrics.coefficient_drift(v, torch.ones(3)) == 1


def test_mc_distances_are_those_of_the_first_draws(conv_net):
    exact = fl.Exact()(fl.capture(*with_loss(conv_net))["3"])
    mc = fl.Exact()(fl.capture(*with_loss(conv_net), fisher_type="mc", mc_samples=6)["3"])
    curve = metrics.mc_convergence(mc, exact)
    F = exact.dense()
    for s in (1, 4, 6):
        D = mc.columns.a.new_tensor(0) + torch.einsum("mnto,nti->mnoi", mc.g[:s], mc.a).flatten(2)
        # columns of 6 draws carry 1/sqrt(6); the first s are a capture of s draws
        first = (D.flatten(0, 1).mT @ D.flatten(0, 1)) / 7 * 6 / s
        torch.testing.assert_close(curve.errors[s - 1], (first - F).norm() / F.norm())
    singles = [
        (torch.einsum("na,nb->ab", d, d) * 6 / 7 - F).norm() ** 2 / F.norm() ** 2
        for d in torch.einsum("mnto,nti->mnoi", mc.g, mc.a).flatten(2)
    ]
    torch.testing.assert_close(curve.one_draw, torch.stack(singles).mean().sqrt())


def test_mc_of_another_batch_is_refused(conv_net):
    model, x, y = conv_net
    exact = fl.Exact()(fl.capture(model, nn.CrossEntropyLoss(), x, y)["3"])
    mc = fl.capture(model, nn.CrossEntropyLoss(), x[:4], y[:4], fisher_type="mc")["3"]
    with pytest.raises(BlockError, match="capture the same batch"):
        metrics.mc_convergence(fl.Exact()(mc), exact)


def dense_split(layer):
    """Dependence, positions and total, from `E_n` as dense matrices."""
    a, g = layer.inputs, layer.output_gradients
    M, t, _ = a.shape
    A = torch.einsum("nti,ntj->ij", a, a) / (M * t)
    G = torch.einsum("mnto,mntp->op", g, g) / M
    D, P = [], []
    for n in range(M):
        full = sum(torch.outer(d, d) for d in (g[:, n].mT @ a[n]).flatten(1))
        same = sum(
            torch.kron(torch.outer(h[s], h[s]), torch.outer(a[n, s], a[n, s]))
            for h in g[:, n]
            for s in range(t)
        )
        A_n = a[n].mT @ a[n] / t
        G_n = sum(h.mT @ h for h in g[:, n])
        D.append(same - torch.kron(G_n, A) - torch.kron(G, A_n) + torch.kron(G, A))
        P.append(full - same)
    D, P = torch.stack(D).flatten(1), torch.stack(P).flatten(1)
    E = D + P
    apart = ~torch.eye(M, dtype=torch.bool)
    return (D @ E.mT)[apart].mean(), (P @ E.mT)[apart].mean(), E.mean(0).square().sum()


@pytest.mark.parametrize("fisher_type", ["exact", "empirical"])
@pytest.mark.parametrize("name", ["0", "3"])
def test_error_split_is_the_dense_one_and_adds_up(conv_net, fisher_type, name):
    layer = fl.capture(*with_loss(conv_net), fisher_type=fisher_type)[name]
    F = fl.Exact()(layer)
    split = metrics.kfac_error_split(F)
    norm = F.squared_norm()
    dependence, positions, total = (value / norm for value in dense_split(layer))
    torch.testing.assert_close(split.dependence, dependence)
    torch.testing.assert_close(split.positions, positions, atol=1e-12, rtol=1e-6)
    torch.testing.assert_close(split.total, total)
    torch.testing.assert_close(split.total.sqrt(), metrics.relative_error(fl.KFAC()(layer), F))


def test_a_linear_layer_has_no_positions_and_one_example_no_noise_estimate(conv_net):
    layer = fl.capture(*with_loss(conv_net))["3"]
    assert metrics.kfac_error_split(fl.Exact()(layer)).positions == 0
    with pytest.raises(BlockError, match="at least 2 examples"):
        metrics.kfac_error_split(fl.Exact()(layer.part(slice(0, 1))))


def test_splits_of_groups_add(generator):
    a = torch.randn(5, 2, 3, generator=generator, dtype=torch.float64)
    parts = [
        Outer(a, torch.randn(1, 5, 2, 2, generator=generator, dtype=torch.float64))
        for _ in range(2)
    ]
    one, two = (metrics.kfac_error_split(p).total * p.squared_norm() for p in parts)
    both = DirectSum(parts)
    torch.testing.assert_close(
        metrics.kfac_error_split(both).total * both.squared_norm(), one + two
    )


def test_overlap_of_eigenspaces_does_not_see_the_basis_in_a_repeated_eigenvalue(generator):
    Q = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64)).Q
    turn = torch.eye(6, dtype=torch.float64)
    turn[1:3, 1:3] = torch.tensor([[0.6, -0.8], [0.8, 0.6]])
    values = torch.tensor([3.0, 2.0, 2.0, 1.0, 0.5, 0.1], dtype=torch.float64)
    F = Dense(Q * values @ Q.mT, (2, 3))
    X = Dense((Q @ turn) * values @ (Q @ turn).mT, (2, 3))
    found = metrics.grouped_overlap(X, F, k=3)
    torch.testing.assert_close(found.matrix, torch.eye(2, dtype=torch.float64), atol=1e-7, rtol=0)
    assert found.sizes == found.exact_sizes == [1, 2]
    # the second eigenspace is whole although k would cut it
    assert metrics.grouped_overlap(X, F, k=2).sizes == [1, 2]


def test_overlap_of_single_eigenvectors_is_the_plain_one(conv_net):
    layer = fl.capture(*with_loss(conv_net))["3"]
    F, X = fl.Exact()(layer), fl.EKFAC()(layer)
    grouped = metrics.grouped_overlap(X, F, k=4, rtol=0)
    plain = metrics.overlap_matrix(X, F, 8)[:4, :4]
    torch.testing.assert_close(grouped.matrix, plain)
    torch.testing.assert_close(
        metrics.off_diagonal_mass(X, F) + metrics.diagonalisation(X, F),
        torch.ones((), dtype=torch.float64),
    )


def test_similarity_matrix_and_adjacent_means(generator):
    one, two, three = (
        torch.corrcoef(torch.randn(5, 9, generator=generator, dtype=torch.float64))
        for _ in range(3)
    )
    S = metrics.similarity_matrix([one, two, three])
    torch.testing.assert_close(S[0, 2], metrics.similarity(one, three))
    adjacent, apart = metrics.adjacent_similarity(S)
    torch.testing.assert_close(adjacent, (S[0, 1] + S[1, 2]) / 2)
    torch.testing.assert_close(apart, S[0, 2])


def test_condition_curve_is_the_condition_number_at_each_damping(conv_net):
    F = fl.Exact()(fl.capture(*with_loss(conv_net))["3"])
    curve = metrics.condition_curve(F, [1e-3, 1e-1])
    expected = torch.stack([metrics.condition_number(F, d) for d in (1e-3, 1e-1)])
    torch.testing.assert_close(curve, expected)


def test_staleness_of_an_old_state_is_its_error_on_todays_block(conv_net):
    model, x, y = conv_net
    states, exact = {}, {}
    for step in range(3):
        layer = fl.capture(model, nn.CrossEntropyLoss(), x, y, fisher_type="empirical")["3"]
        states[step], exact[step] = fl.KFAC()(layer), fl.Exact()(layer)
        with torch.no_grad():
            model[3].weight.add_(0.1)
    rows = list(metrics.staleness({0: states[0], 2: states[2]}, exact))
    assert [(made, age) for made, age, *_ in rows] == [(0, 0), (0, 1), (0, 2), (2, 0)]
    torch.testing.assert_close(rows[2][2], metrics.relative_error(states[0], exact[2]))
    torch.testing.assert_close(rows[2][3], metrics.cosine(states[0], exact[2]))


def test_gram_study_orders_by_class_and_agrees_with_the_single_functions(conv_net):
    model, x, y = conv_net
    layers = fl.capture(*with_loss(conv_net), fisher_type="empirical")
    study = metrics.gram_study(layers, y)
    assert (study.labels.diff() >= 0).all()
    torch.testing.assert_close(y[study.order], study.labels)
    correlation = metrics.gram_correlation(layers["3"])
    order = study.order
    torch.testing.assert_close(study.correlations[1], correlation[order][:, order])
    torch.testing.assert_close(study.within[1], metrics.class_means(correlation, y)[0])
    v = metrics.example_coefficients(layers["3"])
    torch.testing.assert_close(study.coefficients[1], v[order])
    torch.testing.assert_close(study.dropped, metrics.dropped_mass(metrics.layer_masses(layers, 7)))
    with pytest.raises(ValueError, match="fisher_type='empirical'"):
        metrics.gram_study(fl.capture(*with_loss(conv_net)), y)


def test_pareto_front_leaves_out_what_is_beaten():
    costs, errors = [1, 2, 3, 4, 2], [0.9, 0.5, 0.6, 0.1, 0.4]
    assert metrics.pareto_front(costs, errors) == [0, 4, 3]


def test_gram_study_survives_a_file(conv_net, tmp_path):
    layers = fl.capture(*with_loss(conv_net), fisher_type="empirical")
    study = metrics.gram_study(layers, conv_net[2])
    np.savez(tmp_path / "study.npz", **study.arrays())
    with np.load(tmp_path / "study.npz") as arrays:
        back = metrics.GramStudy.of_arrays(arrays)
    assert back.layers == study.layers
    torch.testing.assert_close(back.masses, study.masses)
    torch.testing.assert_close(back.correlations, study.correlations.float())
