"""EMA, intervals and momentum against a loop that anyone can check."""

import pytest
import torch
import torch.nn.functional as F
from optim_references import eye, gradient, kfac, pairs, perceptron, weights
from torch import Tensor, nn

import fisherlab as fl


def stream(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    sizes = [12, 12, 7, 12, 12, 12, 5, 12, 12][:count]
    return [
        (
            torch.randn(n, 6, generator=generator, dtype=torch.float64),
            torch.randint(0, 4, (n,), generator=generator),
        )
        for n in sizes
    ]


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("decoupled", [False, True])
def test_kfac_is_the_reference_loop(nesterov: bool, decoupled: bool) -> None:
    lr, damping, momentum, weight_decay, decay = 0.1, 0.2, 0.9, 0.01, 0.8
    ours, theirs = perceptron(6, 5, 4), perceptron(6, 5, 4)
    optimizer = fl.optim.NaturalGradient(
        ours,
        fl.KFAC(),
        lr=lr,
        damping=damping,
        momentum=momentum,
        nesterov=nesterov,
        weight_decay=weight_decay,
        decoupled=decoupled,
        decay=decay,
        statistics_every=2,
        basis_every=3,
    )
    sums, velocity, P = [None, None], [None, None], [None, None]
    for step, (x, y) in enumerate(stream(9)):
        optimizer.zero_grad()
        F.cross_entropy(ours(x), y).backward()
        optimizer.step()
        for k, (a, g) in enumerate(pairs(theirs, x, y)):
            G, A = kfac(a, g)
            if step % 2 == 0:
                old = sums[k] or (0.0, 0.0, 0.0)
                new = (len(a) * G, len(a) * A, len(a))
                sums[k] = tuple(decay * s + n for s, n in zip(old, new, strict=True))
            if step % 3 == 0:
                G, A = sums[k][0] / sums[k][2], sums[k][1] / sums[k][2]
                P[k] = torch.linalg.inv(torch.kron(G, A) + damping * eye(len(G) * len(A)))
            V = gradient(a, g)
            layer = theirs[2 * k]
            W = torch.cat([layer.weight, layer.bias[:, None]], 1).detach()
            d = (P[k] @ V.flatten()).view_as(V)
            W = (1 - lr * weight_decay) * W if decoupled else W
            d = d if decoupled else d + weight_decay * W
            velocity[k] = d if velocity[k] is None else momentum * velocity[k] + d
            W = W - lr * (d + momentum * velocity[k] if nesterov else velocity[k])
            pending = (layer, W)
            if k == 0:
                held = pending
        for layer, W in (held, pending):
            with torch.no_grad():
                layer.weight.copy_(W[:, :-1])
                layer.bias.copy_(W[:, -1])
        torch.testing.assert_close(weights(ours), weights(theirs), rtol=1e-9, atol=1e-11)


def test_each_state_changes_when_it_is_due() -> None:
    model = perceptron(6, 5, 4)
    optimizer = fl.optim.create(
        "ekfac", model, statistics_every=2, basis_every=6, corrections_every=3, warmup=0
    )
    changes: dict[str, list[int]] = {"sums": [], "basis": [], "corrections": []}
    before: dict[str, Tensor] = {}
    for step, (x, y) in enumerate([*stream(9), *stream(4)]):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        running = optimizer.preconditioner.curvature.parts["0"].running
        now = {
            "sums": running.sums["A"].clone(),
            "basis": running.basis["Q_A"].clone(),
            # carried into a new basis too
            "corrections": running.corrections["spectrum"].clone(),
        }
        for key, value in now.items():
            if key not in before or not torch.equal(before[key], value):
                changes[key].append(step)
        before = now
    assert changes["sums"] == [0, 2, 4, 6, 8, 10, 12]
    assert changes["basis"] == [0, 6, 12]
    assert changes["corrections"] == [0, 3, 6, 9, 12]


def test_statistics_of_the_first_examples_only() -> None:
    x, y = stream(1)[0]
    model = perceptron(6, 5, 4)
    optimizer = fl.optim.create("kfac", model, statistics_examples=5)
    F.cross_entropy(model(x), y).backward()
    expected = [kfac(a[:5], g[:5]) for a, g in pairs(model, x, y)]
    optimizer.step()
    for block, (G, A) in zip(optimizer.blocks().values(), expected, strict=True):
        torch.testing.assert_close(block.G, G)
        torch.testing.assert_close(block.A, A)


def test_mc_and_exact_columns_leave_the_loop_s_gradient_alone() -> None:
    x, y = stream(1)[0]
    for fisher_type in ("mc", "exact"):
        model, plain = perceptron(6, 5, 4), perceptron(6, 5, 4)
        optimizer = fl.optim.create("kfac", model, fisher_type=fisher_type)
        state = torch.get_rng_state()
        for one in (model, plain):
            F.cross_entropy(one(x), y).backward()
        assert torch.equal(torch.get_rng_state(), state)
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)
        optimizer.step()
        layers = fl.capture(
            plain.eval(), nn.CrossEntropyLoss(), x, y, fisher_type=fisher_type, backend="hooks"
        )
        if fisher_type == "exact":
            for name, block in optimizer.blocks().items():
                torch.testing.assert_close(block.G, fl.KFAC()(layers[name]).G)


def test_blocks_are_audited_in_mid_training() -> None:
    x, y = stream(1)[0]
    model = perceptron(6, 5, 4)
    optimizer = fl.optim.create("tekfac", model, fisher_type="exact")
    F.cross_entropy(model(x), y).backward()
    blocks = optimizer.blocks()
    assert not blocks
    audited = perceptron(6, 5, 4)
    optimizer.step()
    options = {"fisher_type": "exact", "dampings": (0.1,)}
    criterion = nn.CrossEntropyLoss()
    ours = fl.compare(audited, criterion, x, y, approximations=optimizer.blocks(), **options)
    fresh = fl.compare(audited, criterion, x, y, approximations=["tekfac"], **options)
    columns = ["layer", "relative_error", "trace_ratio", "direction_cosine"]
    for name in columns[1:]:
        assert list(ours.frame[name].round(6)) == list(fresh.frame[name].round(6))
    assert list(ours.frame["layer"]) == ["0", "2"]


@pytest.mark.parametrize("name", ["kfac", "tekfac"])
def test_the_warmup_refreshes_everything_at_each_of_its_steps(name: str) -> None:
    """Three warm-up steps of intervals 10 and 100 are three steps of intervals 1, then silence."""
    nets = perceptron(6, 5, 4), perceptron(6, 5, 4)
    options = {"lr": 0.1, "damping": 0.2}
    slow, often = (
        fl.optim.NaturalGradient(net, fl.approximations.get(name)(), **options, **intervals)
        for net, intervals in zip(
            nets,
            (
                {"statistics_every": 10, "basis_every": 100, "warmup": 3},
                {"statistics_every": 1, "basis_every": 1},
            ),
            strict=True,
        )
    )
    for step, (x, y) in enumerate(stream(5)):
        for net, optimizer in zip(nets, (slow, often), strict=True):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
        assert torch.equal(weights(nets[0]), weights(nets[1])) == (step < 3)


def test_the_second_look_of_levenberg_marquardt_leaves_no_trace() -> None:
    """Batch-norm statistics and the random stream move once per step, not twice."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.passes = 0

        def forward(self, x: Tensor) -> Tensor:
            self.passes += 1
            return x

    def trained(damping: object) -> tuple[nn.Sequential, Tensor]:
        torch.manual_seed(0)
        layers = nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.3), nn.Linear(5, 4), Counting()
        net = nn.Sequential(*layers).double()
        optimizer = fl.optim.NaturalGradient(net, fl.KFAC(), lr=0.0, damping=damping)
        for x, y in stream(4):

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                optimizer.zero_grad()
                loss = F.cross_entropy(net(x), y)
                loss.backward()
                return loss

            optimizer.step(closure)
        return net, torch.get_rng_state()

    with torch.random.fork_rng():
        rule = fl.approximations.damping.levenberg_marquardt(0.1, every=1)
        (adaptive, stream_adaptive), (constant, stream_constant) = trained(rule), trained(0.1)
    assert adaptive[4].passes == 2 * constant[4].passes
    assert torch.equal(stream_adaptive, stream_constant)
    for one, two in zip(adaptive.buffers(), constant.buffers(), strict=True):
        assert torch.equal(one, two)
