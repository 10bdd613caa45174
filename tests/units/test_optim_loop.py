"""EMA, intervals and momentum against a loop that anyone can check."""

import contextlib
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from optim_references import eye, gradient, kfac, pairs, perceptron, weights
from torch import Tensor, nn

import fisherlab as fl
from fisherlab.optim.passes import Pass


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


@pytest.mark.parametrize("fisher_type", ["mc", "exact"])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("how", ["no backward", "interrupted"])
def test_a_forward_that_is_thrown_away_is_freed(fisher_type: str, given: bool, how: str) -> None:
    """Its graph held the recorded pass, and the pass the graph: no collection freed the two."""
    model, criterion = perceptron(6, 5, 4), nn.CrossEntropyLoss()
    options = {"criterion": criterion} if given else {}
    optimizer = fl.optim.create("kfac", model, fisher_type=fisher_type, **options)
    ((x, y),) = stream(1)

    def note(module: nn.Module, args: object, output: Tensor) -> None:
        if how == "interrupted":
            raise KeyboardInterrupt

    handle = list(model)[-1].register_forward_hook(note)
    gc.collect()
    before = sum(type(one) is Pass for one in gc.get_objects())
    for _ in range(4):
        with contextlib.suppress(KeyboardInterrupt):
            criterion(model(x), y)
    handle.remove()
    gc.collect()
    torch.zeros(())  # the recorder lets go of an interrupted one with the next function of torch
    assert sum(type(one) is Pass for one in gc.get_objects()) == before
    optimizer.remove()
    assert not torch.overrides._len_torch_function_stack()


@pytest.mark.parametrize("name", fl.optim.names())
@pytest.mark.parametrize("given", [False, True])
def test_a_forward_that_is_interrupted_holds_no_memory(name: str, given: bool) -> None:
    class Kept(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            kept.append(weakref.ref(x))
            return x * x

    kept: list[weakref.ref[Tensor]] = []
    model = perceptron(6, 5, 4)
    model = nn.Sequential(model[0], Kept(), model[2], Kept())
    takes = given and "criterion" in fl.optim.option_names(name)
    options = {"criterion": nn.CrossEntropyLoss()} if takes else {}
    optimizer = fl.optim.create(name, model, **options)
    ((x, y),) = stream(1)

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    handle = model[3].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(x)
    torch.zeros(())
    gc.collect()
    assert [each() for each in kept] == [None, None]
    handle.remove()
    optimizer.step(lambda: F.cross_entropy(model(x), y).backward())
    assert not torch.overrides._len_torch_function_stack()


@pytest.mark.parametrize("bad", ["no step", "no backward", "refused", "interrupted"])
def test_draws_for_a_batch_without_a_step_are_taken_back(bad: str) -> None:
    def trained(spoiled: bool) -> tuple[Tensor, Tensor]:
        model = perceptron(6, 5, 4)
        optimizer = fl.optim.create("kfac", model, fisher_type="mc", statistics_every=1)
        for step, (x, y) in enumerate(stream(3)):
            if spoiled and step == 1:
                before = optimizer.state_dict()["fisherlab"]["preconditioner"]["generator"]
                spoil(model, optimizer, x, y)
                after = optimizer.state_dict()["fisherlab"]["preconditioner"]["generator"]
                assert torch.equal(before, after)
            # gradients are zeroed after the forward here, as many loops do
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        state = optimizer.state_dict()["fisherlab"]["preconditioner"]["generator"]
        return torch.cat([p.detach().flatten() for p in model.parameters()]), state

    def spoil(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
        loss = F.cross_entropy(model(x.flip(0)), y)
        if bad == "no backward":
            return
        optimizer.zero_grad()
        (loss * (float("nan") if bad == "refused" else 1.0)).backward()
        if bad == "no step":
            optimizer.zero_grad()
        elif bad == "refused":
            with pytest.raises(fl.optim.OptimizerError, match="NaN"):
                optimizer.step()
        else:

            def interrupt(*args: object) -> None:
                raise KeyboardInterrupt

            handle = list(model)[-1].register_forward_hook(interrupt)

            def closure() -> Tensor:
                with contextlib.ExitStack() as stack:
                    stack.callback(handle.remove)
                    return model(x)

            with pytest.raises(KeyboardInterrupt):
                optimizer.step(closure)  # type: ignore[arg-type]
            assert not torch.overrides._len_torch_function_stack()

    clean, spoiled = trained(False), trained(True)
    assert torch.equal(clean[0], spoiled[0])
    assert torch.equal(clean[1], spoiled[1])


# loops that set gradients to zero in place, and where a batch may leave none
THROWN = [
    ("kfac", {"fisher_type": "mc"}),
    ("kfac", {"statistics_examples": 3}),
    ("ngd", {}),
    ("sngd", {"momentum": 0.0}),
]


@pytest.mark.parametrize(("name", "options"), THROWN)
@pytest.mark.parametrize("bad", ["zeroed", "autograd.grad", "broken off", "a hook on the way"])
@pytest.mark.parametrize("zero", ["before", "after the forward"])
def test_a_batch_whose_gradient_was_thrown_away_does_not_count(name, options, bad, zero) -> None:
    def trained(spoiled: bool) -> list[Tensor]:
        model = perceptron(6, 5, 4)
        criterion = nn.CrossEntropyLoss()
        always = {"statistics_every": 1, "basis_every": 1} if name != "ngd" else {}
        options_ = {"criterion": criterion, **always, **options}
        optimizer = fl.optim.create(name, model, **options_)
        for step, (x, y) in enumerate(stream(4)):
            if spoiled and step == 2:
                throw(bad, model, criterion, x.flip(0), y)
                optimizer.zero_grad(set_to_none=False)
            if zero == "before":
                optimizer.zero_grad(set_to_none=False)
            loss = criterion(model(x), y)
            if zero != "before":
                optimizer.zero_grad(set_to_none=False)
            loss.backward()
            optimizer.step()
        blocks = optimizer.blocks().values() if name != "ngd" else ()
        return [weights(model), *(block.dense() for block in blocks)]

    for clean, spoiled in zip(trained(False), trained(True), strict=True):
        assert torch.equal(clean, spoiled)


def throw(bad: str, model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor) -> None:
    """A batch of which nothing is to stay."""

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    def arm(module: nn.Module, args: object, output: Tensor) -> None:
        output.register_hook(interrupt)

    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.suppress(KeyboardInterrupt))
        if bad == "a hook on the way":
            stack.callback(next(iter(model)).register_forward_hook(arm).remove)
        loss = criterion(model(x), y)
        if bad == "broken off":
            stack.callback(next(model.parameters()).register_hook(interrupt).remove)
        if bad == "autograd.grad":
            torch.autograd.grad(loss, list(model.parameters()))
        else:
            loss.backward()


class Spread(nn.Module):
    """One row for three examples, where there is no axis of examples."""

    def forward(self, x: Tensor) -> Tensor:
        return x.tanh() if x.ndim > 1 else x.tanh().expand(3, -1)


@pytest.mark.parametrize("name", ["kfac", "kfac_reduce", "ngd", "tengrad", "kbfgs"])
def test_a_forward_without_a_step_costs_no_layer_its_block(name: str) -> None:
    def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)

    def trained(spoiled: bool) -> tuple[Tensor, dict[str, str]]:
        model = perceptron(6, 5, 4)
        model = nn.Sequential(model[0], Spread(), model[2])
        optimizer = fl.optim.create(name, model)
        for x, y in stream(2):
            if spoiled:
                model(x[0])
            step(model, optimizer, x, y)
        return weights(model), optimizer.left_out

    clean, spoiled = trained(False), trained(True)
    assert torch.equal(clean[0], spoiled[0]) and not spoiled[1]
    model = nn.Sequential(nn.Linear(6, 5), Spread(), nn.Linear(5, 12)).double()
    ((x, y),) = stream(1)
    with pytest.warns(UserWarning, match="layer '0' has no block"):
        step(model, fl.optim.create(name, model), x[0], y[:3])


def test_an_optimizer_that_loads_the_state_of_one_without_a_step_learns_its_weights() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.eye(6, 4, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.w

    model = Product()
    state = fl.optim.create("kfac", model).state_dict()
    optimizer = fl.optim.create("kfac", model)
    optimizer.load_state_dict(state)
    ((x, y),) = stream(1)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    assert list(optimizer.blocks()) == ["w"]


@pytest.mark.parametrize("name", ["tengrad", "fngd", "kbfgs", "ngd", "kfac"])
def test_an_interrupted_step_leaves_no_mode_behind(name: str) -> None:
    model = perceptron(6, 5, 4)
    optimizer = fl.optim.create(name, model)
    ((x, y),) = stream(1)

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    list(model)[-1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(lambda: F.cross_entropy(model(x), y))
    assert not torch.overrides._len_torch_function_stack()


def test_a_generator_that_someone_else_draws_from_is_left_alone() -> None:
    model, generator = perceptron(6, 5, 4), torch.Generator().manual_seed(3)
    optimizer = fl.optim.create("kfac", model, fisher_type="mc", generator=generator)
    ((x, y),) = stream(1)
    F.cross_entropy(model(x), y).backward()
    optimizer.zero_grad()
    torch.randn(2, generator=generator)
    state = generator.get_state()
    optimizer.preconditioner.recorder.undraw()
    assert torch.equal(generator.get_state(), state)


def by_hand(model: nn.Module, loss: Tensor, way: str) -> None:
    """Accumulate a gradient as loops do that call no `backward()`, or keep its graph."""
    if way == "create_graph":
        loss.backward(create_graph=True)
        return
    parameters = list(model.parameters())
    for p, found in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        if p.grad is None:
            p.grad = found
        elif way == "a new tensor":
            p.grad = p.grad + found
        else:
            p.grad += found


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize(("name", "options"), [*THROWN, ("kfac", {})])
@pytest.mark.parametrize("way", ["a new tensor", "in place", "create_graph"])
@pytest.mark.parametrize("none", [True, False])
def test_gradients_that_a_loop_puts_there_itself_count(name, options, way, none) -> None:
    def trained(accumulate) -> Tensor:
        model = perceptron(6, 5, 4)
        criterion = nn.CrossEntropyLoss()
        optimizer = fl.optim.create(name, model, **{"criterion": criterion, **options})
        for x, y in stream(3):
            optimizer.zero_grad(set_to_none=none)
            for half in (slice(0, len(x) // 2), slice(len(x) // 2, len(x))):
                accumulate(model, criterion(model(x[half]), y[half]) / 2)
            optimizer.step()
        return weights(model)

    plain = trained(lambda model, loss: loss.backward())
    assert torch.equal(trained(lambda model, loss: by_hand(model, loss, way)), plain)


@pytest.mark.parametrize("none", [True, False])
def test_an_attack_before_gradients_are_clipped_does_not_count(none) -> None:
    def trained(attacks: bool) -> Tensor:
        model = perceptron(6, 5, 4)
        optimizer = fl.optim.create("sngd", model, momentum=0.0)
        for x, y in stream(3):
            optimizer.zero_grad(set_to_none=none)
            F.cross_entropy(model(x), y).backward()
            if attacks:
                z = (5 * x).requires_grad_()
                torch.autograd.grad(F.cross_entropy(model(z), y), z)
            nn.utils.clip_grad_norm_(model.parameters(), 1e3)
            optimizer.step()
        return weights(model)

    assert torch.equal(trained(True), trained(False))
