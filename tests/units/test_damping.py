"""Where the damping goes, and how much of it there is, against dense matrices."""

import math

import dense
import pytest
import torch
from formulas import found_and_expected
from references import randn, relative

import fisherlab as fl
from fisherlab.approximations import damping as rules
from fisherlab.blocks import BlockError, Kronecker
from fisherlab.testing.blocks import matrix_power

CASES = ("linear", "conv", "fewer examples than inputs", "duplicates", "groups")
DAMPINGS = (1e-3, 0.7)


def eye(d):
    return torch.eye(d, dtype=torch.float64)


def inverse(matrix, damping=0.0):
    return torch.linalg.inv(matrix + damping * eye(len(matrix)))


def factors(p, name):
    """The Kronecker factors whose product is the block, scaled as the damping finds them."""
    if name == "kfac":
        return dense.kfac_factors(p)
    if name == "kfac_reduce":
        return dense.moment(p.g.sum(2)) / p.M, dense.moment(p.a.mean(1)) / p.M
    left, right, total = dense.tkfac_sides(p)
    sigma = total / p.M  # sqrt(sigma) on either side of the unit-trace factors
    return sigma.sqrt() * left / total, sigma.sqrt() * right / total


@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["kfac", "kfac_reduce", "tkfac"])
def test_every_placement_of_a_kronecker_product(name, case, damping):
    layer, p = found_and_expected(case, "exact")
    G, A = factors(p, name)
    pi = math.sqrt((A.trace() / len(A)) / (G.trace() / len(G)))
    root = math.sqrt(damping)

    def factored(pi):
        return torch.kron(inverse(G, root / pi), inverse(A, root * pi))

    whole = inverse(torch.kron(G, A), damping)
    expected = {
        ("tikhonov", None): whole,
        ("eigenvalue", None): whole,
        ("factored", None): factored(pi),
        ("factored", 1.0): factored(1.0),
        ("factorwise", None): torch.kron(inverse(G, damping), inverse(A, damping)),
    }
    for (placement, pi), matrix in expected.items():
        approximation = fl.approximations.get(name)(placement=placement, pi=pi)
        assert approximation.placement == placement
        found = approximation.damped(approximation(layer), damping)
        assert relative(found.dense(), matrix) < 1e-10, (placement, pi)


def test_the_default_pi_is_by_traces_for_kfac_and_one_for_tkfac():
    """Martens & Grosse 2015 for KFAC; Gao et al. 2020 fold sigma and take 1."""
    layer, _ = found_and_expected("linear", "exact")
    for make, pi in ((fl.KFAC, None), (fl.TKFAC, 1.0)):
        default, named = make(placement="factored"), make(placement="factored", pi=pi)
        assert default == named
        other = make(placement="factored", pi=1.0 if pi is None else None)
        X = default(layer)
        assert relative(default.damped(X, 0.1).dense(), other.damped(X, 0.1).dense()) > 1e-3


def test_pi_of_a_zero_trace_is_one():
    zero, A = torch.zeros(2, 2, dtype=torch.float64), eye(3)
    assert rules.trace_ratio_pi(Kronecker(zero, A)) == 1.0
    assert rules.trace_ratio_pi(Kronecker(A, zero)) == 1.0
    layer, _ = found_and_expected("zero gradients", "exact")
    approximation = fl.KFAC(placement="factored")
    P = approximation.damped(approximation(layer), 0.01)
    assert torch.isfinite(P.dense()).all()


@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("case", CASES)
def test_the_others_damp_the_whole_block(case, damping):
    """Tikhonov; a Kronecker sum takes its negative eigenvalues as zero first."""
    layer, p = found_and_expected(case, "exact")
    for name in ("exact", "diagonal", "ekfac", "tekfac", "mini_block", "kronecker_optimal", "eva"):
        approximation = fl.approximations.get(name)()
        assert approximation.placement == "tikhonov"
        found = approximation.damped(approximation(layer), damping)
        assert relative(found.dense(), inverse(dense.REFERENCES[name](p), damping)) < 1e-9, name
    values, Q = torch.linalg.eigh(dense.kronecker_sum(p))
    clamped = (Q * values.clamp(min=0)) @ Q.mT
    found = fl.KroneckerSum().damped(fl.KroneckerSum()(layer), damping)
    assert relative(found.dense(), inverse(clamped, damping)) < 1e-8
    share = -values.clamp(max=0).sum() / values.abs().sum()
    assert fl.KroneckerSum()(layer).clamped == pytest.approx(float(share), abs=1e-9)


@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("case", CASES)
def test_ifang_eva_and_shampoo(case, damping):
    layer, p = found_and_expected(case, "empirical")
    ifang = fl.IFANG().damped(fl.IFANG()(layer), damping)
    assert relative(ifang.dense(), dense.ifang_inverse(p, damping)) < 1e-10
    # Eva, Zhang et al. 2023: (V - (g^T V a) / (lambda + |g|^2 |a|^2) g a^T) / lambda
    g, a = dense.mean_vectors(p)
    V = randn(len(g), len(a), seed=5)
    shrink = (g @ V @ a) / (damping + (g @ g) * (a @ a))
    expected = (V - shrink * torch.outer(g, a)) / damping
    assert relative(fl.Eva().damped(fl.Eva()(layer), damping) @ V, expected) < 1e-10
    left, right, total = dense.tkfac_sides(p)
    L, R = left / p.M, right / p.M
    for form, exponent, scale in (("root", -0.25, 1.0), ("squared", -0.5, (total / p.M).sqrt())):
        approximation = fl.Shampoo(form=form)
        P = approximation.damped(approximation(layer), damping)
        sides = (matrix_power(side, exponent, damping) for side in (L, R))
        assert relative(P.dense(), scale * torch.kron(*sides)) < 1e-10


def test_a_class_is_no_rule():
    with pytest.raises(ValueError, match="damping, if it is no rule, must be a finite number"):
        fl.optim.create("kfac", torch.nn.Linear(3, 2), damping=int)


def test_a_singular_block_without_damping_is_refused_by_name():
    layer, _ = found_and_expected("fewer examples than inputs", "empirical")
    for name in fl.approximations.names():
        approximation = fl.approximations.get(name)()
        if "pair" in approximation.needs:
            continue
        if name != "diagonal":  # the only one of full rank here
            with pytest.raises(BlockError, match="damping"):
                approximation.damped(approximation(layer), 0.0)
        with pytest.raises(BlockError, match="damping must be a finite number >= 0"):
            approximation.damped(approximation(layer), -1.0)


# --- how much -------------------------------------------------------------------------------------


def blocks(*cases, fisher_type="empirical"):
    layers = {case: found_and_expected(case, fisher_type)[0] for case in cases}
    matrices = {case: dense.exact(found_and_expected(case, fisher_type)[1]) for case in cases}
    return {case: fl.Exact()(layer) for case, layer in layers.items()}, matrices


def test_constant_and_relative():
    found, matrices = blocks("linear", "conv", "zero gradients")
    assert rules.constant(0.3)(found) == dict.fromkeys(found, 0.3)
    lambdas = rules.relative(0.1)(found)
    for case, F in matrices.items():
        assert lambdas[case] == pytest.approx(max(0.1 * F.trace().item() / len(F), 1e-10))
    assert lambdas["zero gradients"] == 1e-10


def test_geometric_is_between_the_mean_eigenvalue_and_the_trace():
    found, matrices = blocks("linear", "conv", "zero gradients")
    lambdas = rules.geometric(0.1)(found)
    for case, F in matrices.items():
        values = torch.linalg.eigvalsh(F)
        mean, largest_possible = values.mean().item(), values.sum().item()
        wanted = max(0.1 * max(mean * largest_possible, 0.0) ** 0.5, 1e-10)
        assert lambdas[case] == pytest.approx(wanted)
    assert repr(rules.geometric(0.1)) == "geometric(0.1)"
    assert repr(rules.relative(3)) == "relative(3)"


def test_gram_norm_has_no_batch_size_in_it():
    """FNGD (14): `alpha ||U^T U||_F = alpha M ||F||_F`, although (9) has `K / M`."""
    found, matrices = blocks("linear", "conv")
    lambdas = rules.gram_norm(0.005)(found)
    for case, F in matrices.items():
        examples = found_and_expected(case, "empirical")[1].M
        assert lambdas[case] == pytest.approx(0.005 * examples * F.norm().item(), rel=1e-12)
    layer, _ = found_and_expected("linear", "empirical")
    with pytest.raises(BlockError, match="gram_norm needs the exact block.*'a' is a Kronecker"):
        rules.gram_norm(0.005)({"a": fl.KFAC()(layer)})


def test_the_trace_rule_of_a_network_with_convolutions():
    """TEKFAC (3.4), (3.5): `max(tr Theta, vartheta) / dim` on convolutions; beta for the others."""
    names = ("conv", "conv without bias", "linear")
    layers = {name: found_and_expected(name, "empirical") for name in names}
    found = {name: fl.TEKFAC()(layer) for name, (layer, _) in layers.items()}
    traces = {name: dense.exact(p).trace().item() for name, (_, p) in layers.items()}
    sizes = {name: found[name].size for name in names}
    convolutions = set(names[:2])
    for vartheta in (0.0, max(traces.values()), 5.0):
        rule = rules.trace(vartheta, convolutions, constant=0.02)
        lambdas = rule(found)
        for name in convolutions:
            expected = max(traces[name], vartheta) / sizes[name]
            assert lambdas[name] == pytest.approx(expected, rel=1e-12)
        assert lambdas["linear"] == 0.02
        beta = max(lambdas[name] for name in convolutions)
        assert rule.fully_connected_scale(lambdas) == beta
        plain = rules.trace(vartheta, convolutions, fc_expansion=False)
        assert plain.fully_connected_scale(plain(found)) == 1.0
    alone = rules.trace(0.1, set())
    assert alone.fully_connected_scale(alone({"linear": found["linear"]})) == 1.0


def test_levenberg_marquardt_follows_the_reduction_ratio():
    """Martens & Grosse 2015, 6.5: `omega^every` down above 3/4, up below 1/4, within its bounds."""
    rule = rules.levenberg_marquardt(share=2.0, every=5, omega=0.9)
    found, matrices = blocks("linear", "conv")
    for case, F in matrices.items():
        assert rule(found)[case] == pytest.approx(2.0 * F.trace().item() / len(F))
    share = 2.0
    for ratio, power in ((0.9, 1), (0.5, 0), (0.75, 0), (0.25, 0), (0.1, -1), (-3.0, -1)):
        rule.adapt(ratio)
        share *= (0.9**5) ** power
        assert rule.share == pytest.approx(share)
    rule.adapt(math.nan)  # a step that ended nowhere was not predicted well
    assert rule.share == pytest.approx(share / 0.9**5)
    for _ in range(100):
        rule.adapt(1.0)
    assert rule.share == rule.smallest
    with pytest.raises(ValueError, match="omega must be a finite number > 0 and < 1"):
        rules.levenberg_marquardt(omega=1.0)
