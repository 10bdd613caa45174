"""Problems with known answers: each step is the closed form, in float64."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from optim_references import columns, exact, eye, gradient, pairs, perceptron
from torch import Tensor, nn

import fisherlab as fl
from fisherlab.approximations.damping import relative
from fisherlab.optim.ang import blended

PLAIN = {"momentum": 0.0, "lr": 0.5}


@pytest.fixture
def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x = torch.randn(12, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 4, (12,), generator=generator)


def small() -> nn.Sequential:
    return perceptron(6, 5, 4)


def directions(model: nn.Module, optimizer, x: Tensor, y: Tensor, steps: int = 1) -> list[Tensor]:
    """`-change / lr` of the last step, one `[o, i]` per layer."""
    for _ in range(steps):
        before = copy.deepcopy(model.state_dict())
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    lr = optimizer.param_groups[0]["lr"]
    moved = {k: (before[k] - v) / lr for k, v in model.state_dict().items()}
    return [torch.cat([moved[f"{k}.weight"], moved[f"{k}.bias"][:, None]], 1) for k in (0, 2)]


def take(name: str, batch: tuple[Tensor, Tensor], steps: int = 1, **options) -> list[Tensor]:
    model = small()
    options = {"kl_clip": None, **PLAIN, **options}
    return directions(model, fl.optim.create(name, model, **options), *batch, steps)


def same(ours: list[Tensor], theirs: list[Tensor], tolerance: float = 1e-8) -> None:
    for one, two in zip(ours, theirs, strict=True):
        assert (one - two).norm() <= tolerance * two.norm()


def test_one_ngd_step_solves_linear_regression(generator: torch.Generator) -> None:
    x = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    target = torch.randn(40, 2, generator=generator, dtype=torch.float64)
    model = nn.Linear(3, 2).double()
    criterion = nn.MSELoss()
    options = {"criterion": criterion, "fisher_type": "exact", "lr": 1.0, "momentum": 0.0}
    makers = (
        lambda: fl.optim.NGD(model, damping=1e-8, **options),
        lambda: fl.optim.NaturalGradient(model, fl.KFAC(), damping=0.0, **options),
    )
    a = torch.cat([x, torch.ones(40, 1, dtype=torch.float64)], 1)
    solution = torch.linalg.lstsq(a, target).solution.T
    for make in makers:
        optimizer = make()
        nn.init.zeros_(model.weight)
        optimizer.zero_grad()
        criterion(model(x), target).backward()
        optimizer.step()
        ours = torch.cat([model.weight, model.bias[:, None]], 1)
        torch.testing.assert_close(ours.detach(), solution, rtol=1e-5, atol=1e-5)
        optimizer.remove()


def test_kfac_is_exact_on_a_kronecker_hessian(generator: torch.Generator) -> None:
    """`|| (W x - y) ||^2_S`: the Hessian is `S (x) E x x^T`, so one step lands on the solution."""
    x = torch.randn(30, 4, generator=generator, dtype=torch.float64)
    y = torch.randn(30, 3, generator=generator, dtype=torch.float64)
    mixing = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    first, criterion = nn.Linear(4, 3, bias=False).double(), nn.MSELoss(reduction="sum")
    last = nn.Linear(3, 3, bias=False).double()
    last.weight.data, last.weight.requires_grad = mixing, False
    model = nn.Sequential(first, last)
    optimizer = fl.optim.NaturalGradient(
        model,
        fl.KFAC(),
        criterion=criterion,
        fisher_type="exact",
        lr=1.0,
        damping=0.0,
        momentum=0.0,
    )
    criterion(model(x), y @ mixing.T).backward()
    # the gradient of the sum over 30 examples: 30 times that of the mean per-example loss
    optimizer.param_groups[0]["lr"] = 1 / 30
    optimizer.step()
    solution = torch.linalg.lstsq(x, y).solution.T
    torch.testing.assert_close(first.weight.detach(), solution, rtol=1e-9, atol=1e-9)


def test_one_layer_at_a_time_four_ways(batch: tuple[Tensor, Tensor]) -> None:
    damping = 0.03
    dense = []
    for a, g in pairs(small(), *batch):
        F_ = exact(a, g)
        step = torch.linalg.solve(F_ + damping * eye(len(F_)), gradient(a, g).flatten())
        dense.append(step.view(g.shape[1], a.shape[1]))
    for name in ("tengrad", "blockwise_ngd", "exact"):
        same(take(name, batch, damping=damping), dense)
    same(take("ngd_smw", batch, alpha=None, damping=damping, fold=False), dense)
    folded = [damping * d for d in dense]
    same(take("ngd_smw", batch, alpha=None, damping=damping), folded)


def test_joint_ngd_is_dense_over_layers(batch: tuple[Tensor, Tensor]) -> None:
    for damping in (0.03, relative(2.0)):
        joint = take("ngd", batch, damping=damping)
        same(joint, take("ngd_dense", batch, damping=damping))
    blockwise = take("blockwise_ngd", batch, damping=0.03)
    assert (joint[0] - blockwise[0]).norm() > 1e-2 * joint[0].norm()
    both = pairs(small(), *batch)
    U = torch.cat([columns(*pair) for pair in both])
    F_ = U @ U.T / 12
    flat = torch.cat([gradient(*pair).flatten() for pair in both])
    step = torch.linalg.solve(F_ + 0.03 * eye(len(F_)), flat)
    ours = torch.cat([d.flatten() for d in take("ngd", batch, damping=0.03)])
    assert (ours - step).norm() < 1e-9 * step.norm()


def test_joint_is_blockwise_for_one_layer(batch: tuple[Tensor, Tensor]) -> None:
    steps = []
    for scope in ("joint", "layer"):
        model = nn.Linear(6, 4).double()
        nn.init.ones_(model.weight), nn.init.zeros_(model.bias)
        optimizer = fl.optim.NGD(model, lr=1.0, damping=0.1, scope=scope, momentum=0.0)
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()
        steps.append(model.weight.detach().clone())
    torch.testing.assert_close(steps[0], steps[1], rtol=1e-10, atol=1e-10)


def test_fngd_begins_as_ngd_smw_and_equal_coefficients_are_sgd(
    batch: tuple[Tensor, Tensor],
) -> None:
    first = take("fngd", batch, steps=3, coefficient_steps=5)
    same(first, take("ngd_smw", batch, steps=3))
    model = small()
    optimizer = fl.optim.create("fngd", model, coefficient_steps=1, momentum=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fisherlab.optim.fngd.FLAT", 0.0)
        directions(model, optimizer, *batch)
    for name, rows in optimizer._sums.items():
        optimizer._sums[name] = torch.full_like(rows, 1.0)
    plain = [gradient(a, g) for a, g in pairs(model, *batch)]
    same(directions(model, optimizer, *batch), plain, 1e-12)


def test_fngd_control_is_sgd_with_a_factor_per_layer(batch: tuple[Tensor, Tensor]) -> None:
    model = small()
    optimizer = fl.optim.create(
        "fngd", model, coefficient_steps=1, control=True, momentum=0.0, alpha=1e-3
    )
    directions(model, optimizer, *batch)
    factors = optimizer.summary()["factor"]
    plain = [c * gradient(a, g) for c, (a, g) in zip(factors, pairs(model, *batch), strict=True)]
    same(directions(model, optimizer, *batch), plain, 1e-10)


@pytest.mark.parametrize("name", ["ngd", "tengrad", "kfac", "shampoo", "ang"])
def test_a_control_has_the_lengths_of_the_method_and_the_gradient_s_directions(
    name: str, batch: tuple[Tensor, Tensor]
) -> None:
    model = small()
    gradients = [gradient(a, g) for a, g in pairs(model, *batch)]
    wanted = [g * d.norm() / g.norm() for g, d in zip(gradients, take(name, batch), strict=True)]
    same(take(name, batch, control=True), wanted)
    bounded = take(name, batch, control=True, kl_clip=None, max_norm=1e-3)
    assert torch.cat([d.flatten() for d in bounded]).norm() == pytest.approx(1e-3)


@pytest.mark.parametrize("name", ["ang", "ifang"])
def test_ang_runs_from_natural_to_euclidean(name: str, batch: tuple[Tensor, Tensor]) -> None:
    natural = {"ang": "kfac", "ifang": "ifang"}[name]
    options = {"damping": 0.05} | ({} if name == "ang" else {"total_steps": 10**9})
    start = take(natural, batch, **options)
    at_zero = take(name, batch, damping=0.05, total_steps=10, schedule=lambda p: 0.0)
    same(at_zero, start)
    plain = [gradient(a, g) for a, g in pairs(small(), *batch)]
    at_one = take(name, batch, damping=0.05, total_steps=10, schedule=lambda p: 1.0)
    expected = [t * d.norm() / t.norm() for d, t in zip(at_zero, plain, strict=True)]
    same(at_one, expected)


def test_blend_keeps_the_length_and_turns_by_a_share_of_the_angle() -> None:
    d = torch.tensor([3.0, 0.0, 0.0], dtype=torch.float64)
    t = torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64)
    omega = torch.arccos(d @ t / (d.norm() * t.norm()))
    for s in (0.0, 0.3, 1.0):
        u = blended(d, t, s)
        assert math.isclose(u.norm().item(), 3.0, rel_tol=1e-12)
        assert math.isclose(
            torch.arccos((u @ d / 9).clamp(-1, 1)).item(), s * omega.item(), abs_tol=1e-7
        )
    torch.testing.assert_close(blended(d, 2 * d, 0.5), d)
    torch.testing.assert_close(blended(d, -t, 0.2), -t)


def test_blend_on_the_chord_and_as_a_sum_are_the_papers() -> None:
    d = torch.tensor([3.0, 4.0], dtype=torch.float64)
    t = torch.tensor([1.0, 0.5], dtype=torch.float64)
    unit_d, unit_t, rho = d / 5, t / t.norm(), 5
    for s in (0.0, 0.3, 1.0):
        wanted = rho * ((1 - s) * unit_d + s * unit_t)  # ANG (6)
        torch.testing.assert_close(blended(d, t, s, path="chord"), wanted)
        # ANG (3) at the lambdas of (4), which is (5)
        l2 = rho / t.norm()
        torch.testing.assert_close(blended(d, t, s, path="sum"), d + l2 * t)


def test_sngd_step_is_natural_for_the_frozen_local_fisher(batch: tuple[Tensor, Tensor]) -> None:
    """Proposition 1, and its tie: reconstructed network + SGD = `sngd` by name."""
    x, y = batch
    model = small()
    net = fl.optim.reconstruct(copy.deepcopy(model), decay=0.0, eps=0.05, method="eigh")
    net(x)  # observes nu A
    fl.optim.sngd.refresh(net)
    sgd = torch.optim.SGD(net.parameters(), lr=0.5)
    F.cross_entropy(net(x), y).backward()
    sgd.step()
    fl.optim.restore(net)
    expected = []
    slopes = [(model[0](x) > 0).double().mean(), 1.0]
    for slope, (a, g) in zip(slopes, pairs(model, x, y), strict=True):
        A = slope * a.T @ a / len(a)
        damped = A + 0.05 * A.trace() * eye(len(A))
        expected.append(gradient(a, g) @ torch.linalg.inv(damped))
    moved = [
        torch.cat([one.weight - two.weight, (one.bias - two.bias)[:, None]], 1).detach() / 0.5
        for one, two in zip(model[::2], net[::2], strict=True)
    ]
    same(moved, expected)
    # by name, lambda = share tr(I (x) nu A) / N = share / i * tr(nu A)
    for k, layer in enumerate((7, 6)):
        by_name = take("sngd", batch, damping=relative(0.05 * layer))
        same([by_name[k]], [expected[k]])


def test_ekfac_with_a_huge_interval_is_kfac_s_basis_with_frozen_eigenvalues(
    batch: tuple[Tensor, Tensor], generator: torch.Generator
) -> None:
    never = {"statistics_every": 10**6, "basis_every": 10**6, "warmup": 0, "damping": 0.1}
    model = small()
    optimizer = fl.optim.create("ekfac", model, kl_clip=None, **PLAIN, **never)
    first = pairs(model, *batch)
    directions(model, optimizer, *batch)
    other = torch.randn(12, 6, generator=generator, dtype=torch.float64), batch[1]
    now = [gradient(a, g) for a, g in pairs(model, *other)]
    expected = []
    for (a, g), v in zip(first, now, strict=True):
        Q = torch.kron(torch.linalg.eigh(g.T @ g)[1], torch.linalg.eigh(a.T @ a)[1])
        spectrum = (Q.T @ columns(a, g)).square().mean(1)
        expected.append((Q @ ((Q.T @ v.flatten()) / (spectrum + 0.1))).view_as(v))
    same(directions(model, optimizer, *other), expected)


def test_truncated_kfac_is_sgd_after_the_switch(batch: tuple[Tensor, Tensor]) -> None:
    model = small()
    optimizer = fl.optim.create("truncated_kfac", model, switch_step=3, lr=0.1, momentum=0.9)
    directions(model, optimizer, *batch, steps=3)
    twin = copy.deepcopy(model)
    sgd = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    same(
        directions(model, optimizer, *batch, steps=4), directions(twin, sgd, *batch, steps=4), 1e-12
    )
    assert not optimizer.preconditioner.recorder.wanted


@pytest.mark.parametrize("inplace", [False, True])
def test_kbfgs_updates_its_inverses_and_satisfies_the_secant_equation(
    batch: tuple[Tensor, Tensor], inplace: bool
) -> None:
    x, y = batch
    model = small()
    model[1] = nn.ReLU(inplace=inplace)
    optimizer = fl.optim.create("kbfgs", model, lr=0.2, momentum=0.0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    before = pairs(model, x, y)
    outputs = [a @ joint(layer).T for (a, _), layer in zip(before, model[::2], strict=True)]
    optimizer.step(closure)
    after = pairs(model, x, y)
    for k, layer in enumerate(model[::2]):
        (a, g), (a2, g2) = before[k], after[k]
        basis = optimizer.preconditioner.curvature.parts[str(2 * k)].running.basis
        # A: y = A_LM s, s = H_a mean(a)
        A_LM = a.T @ a / 12 + math.sqrt(0.3) * eye(a.shape[1])
        s = torch.linalg.inv(A_LM) @ a.mean(0)
        torch.testing.assert_close(basis["H_a"] @ (A_LM @ s), s, rtol=1e-10, atol=1e-12)
        # G: the pair of means over the step, doubly damped
        s = (a2 @ joint(layer).T).mean(0) - outputs[k].mean(0)
        y_ = g2.mean(0) - g.mean(0)
        s, y_ = damped_pair(s, y_, math.sqrt(0.3))
        torch.testing.assert_close(basis["H_g"] @ y_, s, rtol=1e-8, atol=1e-12)
        assert (basis["H_g"] - eye(len(s))).norm() > 1e-3
    parts = optimizer.preconditioner.curvature.parts
    held = [parts[k].running.basis["H_g"].clone() for k in ("0", "2")]
    optimizer.step(closure)
    for k, H in zip(("0", "2"), held, strict=True):
        assert not torch.equal(parts[k].running.basis["H_g"], H)


def kbfgs_run(model: nn.Module, parts: list[tuple[Tensor, Tensor]], steps: int = 5) -> Tensor:
    """The weights after a few K-BFGS steps on the mean over `parts`, each a backward pass."""
    total = sum(len(x) for x, _ in parts)
    optimizer = fl.optim.create("kbfgs", model, lr=0.2)

    def closure() -> Tensor:
        optimizer.zero_grad()
        losses = [F.cross_entropy(model(x), y) * len(x) / total for x, y in parts]
        for loss in losses:
            loss.backward()
        return sum(losses)

    for _ in range(steps):
        optimizer.step(closure)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def with_activation(kind: str, activation: nn.Module) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        if kind == "conv":
            first = [nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 4, 2, padding=1), activation]
            return nn.Sequential(*first, nn.Flatten(), nn.Linear(16, 4)).double()
        layers = nn.Linear(6, 5), activation, nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 4)
        return nn.Sequential(*layers).double()


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.LeakyReLU, nn.ELU, nn.Hardtanh])
def test_kbfgs_learns_from_pre_activations_that_are_overwritten(
    batch: tuple[Tensor, Tensor], kind: str, activation: type[nn.Module]
) -> None:
    """An in-place activation of the same network takes the same steps."""
    plain = kbfgs_run(with_activation(kind, activation()), [batch])
    found = kbfgs_run(with_activation(kind, activation(inplace=True)), [batch])
    torch.testing.assert_close(found, plain, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("norm", [nn.Identity, nn.LayerNorm])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU])
def test_sngd_s_slope_is_that_of_pre_activations_that_are_overwritten(
    batch: tuple[Tensor, Tensor], norm: type[nn.Module], activation: type[nn.Module]
) -> None:
    def run(inplace: bool) -> list[Tensor]:
        torch.manual_seed(3)
        layers = nn.Linear(6, 5), norm(5), activation(inplace=inplace), nn.Linear(5, 4)
        model = nn.Sequential(*layers).double()
        optimizer = fl.optim.create("sngd", model)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(batch[0]), batch[1]).backward()
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    for one, two in zip(run(True), run(False), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("sizes", [(6, 6), (4, 8), (3, 4, 5)])
def test_kbfgs_of_micro_batches_is_that_of_their_batch(
    batch: tuple[Tensor, Tensor], sizes: tuple[int, ...]
) -> None:
    x, y = batch
    parts = list(zip(x.split(sizes), y.split(sizes), strict=True))
    whole = kbfgs_run(small(), [batch])
    torch.testing.assert_close(kbfgs_run(small(), parts), whole, rtol=1e-9, atol=1e-11)


def joint(layer: nn.Linear) -> Tensor:
    return torch.cat([layer.weight, layer.bias[:, None]], 1).detach()


def damped_pair(s: Tensor, y: Tensor, mu: float) -> tuple[Tensor, Tensor]:
    """Goldfarb et al. 2020, Algorithm 2, with H = I."""
    if s @ y < 0.2 * (y @ y):
        theta = 0.8 * (y @ y) / (y @ y - s @ y)
        s = theta * s + (1 - theta) * y
    if s @ y < mu * (s @ s):
        theta = (1 - mu) * (s @ s) / (s @ s - s @ y)
        y = theta * y + (1 - theta) * s
    return s, y


def test_levenberg_marquardt_follows_the_reduction_ratio(batch: tuple[Tensor, Tensor]) -> None:
    from fisherlab.approximations.damping import levenberg_marquardt

    rule = levenberg_marquardt(share=4.0, every=2, omega=0.9)
    for ratio, share in ((1.0, 4 * 0.81), (0.5, 4 * 0.81), (0.1, 4.0), (-3.0, 4 / 0.81)):
        rule.adapt(ratio)
        assert math.isclose(rule.share, share, rel_tol=1e-12)
    x, y = batch
    model, rule = small(), levenberg_marquardt(share=1.0, every=1)
    optimizer = fl.optim.NaturalGradient(model, fl.Exact(), lr=1.0, damping=rule, momentum=0.0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    (a, g), (b, h) = pairs(model, x, y)
    before = optimizer.step(closure).item()
    after = F.cross_entropy(model(x), y).item()
    predicted = 0.0
    for inputs, gradients in ((a, g), (b, h)):
        block, v = exact(inputs, gradients), gradient(inputs, gradients).flatten()
        damped = block + block.trace() / len(block) * eye(len(block))
        d = -torch.linalg.solve(damped, v)
        predicted += float(v @ d + 0.5 * d @ damped @ d)
    ratio = (after - before) / predicted
    expected = 0.95 if ratio > 0.75 else 1 / 0.95 if ratio < 0.25 else 1.0
    assert math.isclose(rule.share, expected, rel_tol=1e-12)
    with pytest.raises(fl.optim.OptimizerError, match=r"step\(closure\)"):
        optimizer.step()
