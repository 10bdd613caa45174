"""`fl.audit`: a running optimizer's state as blocks, against the state written out densely."""

import copy

import pytest
import torch
from references import randn, relative
from torch import Tensor, nn

import fisherlab as fl
from fisherlab.optim import OptimizerError
from fisherlab.optim.readings import read

STEPS = 50
CE = nn.CrossEntropyLoss()
# whose gradients have full rank: no factor of one step has a null space of several dimensions, of
# which the eigensolver would choose a basis
MSE = nn.MSELoss()


def net() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()


def batch(step: int) -> tuple[Tensor, Tensor]:
    return randn(20, 6, seed=step), torch.arange(20) % 4


def trained(make, steps: int = STEPS, criterion: nn.Module = CE):
    """The model, its optimizer, and every step's gradients by the name of the parameter."""
    model = net()
    optimizer, gradients = make(model), []
    for step in range(steps):
        x, y = batch(step)
        optimizer.zero_grad()
        y = randn(20, 4, seed=100 + step) if criterion is MSE else y
        criterion(model(x), y).backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
        optimizer.step()
    return model, optimizer, gradients


def averaged(terms: list[Tensor], decay: float) -> Tensor:
    """`(1 - decay) sum_k decay^(K - k) terms_k`."""
    weights = [(1 - decay) * decay ** (len(terms) - 1 - k) for k in range(len(terms))]
    return sum(w * term for w, term in zip(weights, terms, strict=True))


def adam(gradients: list[Tensor], decay: float) -> Tensor:
    return averaged([g**2 for g in gradients], decay) / (1 - decay ** len(gradients))


def beside(weight: Tensor, bias: Tensor) -> Tensor:
    """The matrix on `[W | b]` of one on `vec W` and the entries of one on `b`, entry by entry."""
    o, i = len(bias), len(weight) // len(bias)
    whole = torch.zeros(o, i + 1, o, i + 1, dtype=torch.float64)
    whole[:, :i, :, :i] = weight.view(o, i, o, i)
    for row in range(o):
        whole[row, i, row, i] = bias[row]
    return whole.view(o * (i + 1), -1)


def adamw_state(W: list[Tensor], b: list[Tensor]) -> dict[str, Tensor]:
    v, v_b = adam(W, 0.999), adam(b, 0.999)
    return {
        "AdamW square": beside(v.flatten().diag(), v_b),
        "AdamW root": beside((v.sqrt() + 1e-8).flatten().diag(), v_b.sqrt() + 1e-8),
    }


def muon_state(W: list[Tensor], b: list[Tensor]) -> dict[str, Tensor]:
    B, v = averaged(W, 0.95), adam(b, 0.999)
    o, i = B.shape
    S = B @ B.T if o <= i else B.T @ B
    # B V U^T of the polar decomposition B = P W
    U, _, Vh = torch.linalg.svd(B, full_matrices=False)
    root = B @ Vh.T @ U.T if o <= i else (U @ Vh).T @ B
    assert relative(root @ root, S) < 1e-12
    eye = torch.eye(max(o, i), dtype=torch.float64)

    def kron(S: Tensor) -> Tensor:
        return torch.kron(S, eye) if o <= i else torch.kron(eye, S)

    return {
        "Muon square": beside(kron(S), v),
        "Muon root": beside(kron(root), v.sqrt() + 1e-8),
    }


def soap_state(W: list[Tensor], b: list[Tensor]) -> dict[str, Tensor]:
    """`V` as a matrix on `vec W`, never in coordinates of a basis but at its last step."""
    v_b, o, i = adam(b, 0.95), *W[0].shape
    V, Q = torch.zeros(o * i, dtype=torch.float64), torch.eye(o * i, dtype=torch.float64)
    L, R = torch.zeros(o, o, dtype=torch.float64), torch.zeros(i, i, dtype=torch.float64)
    for step, G in enumerate(W, 1):
        V = 0.95 * V + 0.05 * (Q.T @ G.flatten()) ** 2
        L, R = 0.95 * L + 0.05 * G @ G.T, 0.95 * R + 0.05 * G.T @ G
        if step == 1 or step % 10 == 0:
            new = torch.kron(torch.linalg.eigh(L)[1], torch.linalg.eigh(R)[1])
            # the diagonal, in the new basis, of what is diagonal in the old one
            V, Q = (new.T @ Q @ V.diag() @ Q.T @ new).diagonal(), new
    V = V / (1 - 0.95 ** len(W))
    return {
        "SOAP square": beside(Q @ V.diag() @ Q.T, v_b),
        "SOAP root": beside(Q @ (V.sqrt() + 1e-8).diag() @ Q.T, v_b.sqrt() + 1e-8),
    }


STATES = {"adamw": adamw_state, "muon": muon_state, "soap": soap_state}


@pytest.mark.parametrize("name", STATES)
def test_the_state_after_fifty_steps_is_that_of_a_dense_reference(name):
    model, optimizer, gradients = trained(lambda m: fl.optim.create(name, m), criterion=MSE)
    x, y = batch(99)[0], randn(20, 4, seed=99)
    table = fl.audit(optimizer, model, MSE, x, y, fisher_type="empirical")
    blocks = read(optimizer, model).blocks
    for layer, captured in fl.capture(model, MSE, x, y, fisher_type="empirical").items():
        F = fl.Exact()(captured).dense()
        W, b = ([g[f"{layer}.{leaf}"] for g in gradients] for leaf in ("weight", "bias"))
        for reading, X in STATES[name](W, b).items():
            assert relative(blocks[reading][layer].dense(), X) < 1e-9, reading
            row = table.frame.query("layer == @layer and approximation == @reading").iloc[0]
            cosine = float((X * F).sum() / X.norm() / F.norm())
            assert row.relative_error == pytest.approx(float((X - F).norm() / F.norm()), rel=1e-8)
            assert row.trace_ratio == pytest.approx(float(X.trace() / F.trace()), rel=1e-9)
            assert row.cosine == pytest.approx(cosine, rel=1e-8)
            scaled = (X * (X * F).sum() / X.norm() ** 2 - F).norm() / F.norm()
            assert row.scaled_error == pytest.approx(float(scaled), rel=1e-7)
            damped = X + row.damping * torch.eye(len(X), dtype=torch.float64)
            ours = torch.linalg.solve(damped, captured.gradient.flatten())
            damped = F + row.damping * torch.eye(len(X), dtype=torch.float64)
            exact = torch.linalg.solve(damped, captured.gradient.flatten())
            direction = float(ours @ exact / ours.norm() / exact.norm())
            assert row.direction_cosine == pytest.approx(direction, rel=1e-7)


def test_the_other_states_of_torch():
    def state(make, reading):
        model, optimizer, gradients = trained(make, 5)
        return read(optimizer, model).blocks[reading]["0"].diagonal()[:, :-1], [
            g["0.weight"] for g in gradients
        ]

    found, G = state(lambda m: torch.optim.RMSprop(m.parameters(), alpha=0.9), "RMSprop root")
    assert relative(found, averaged([g**2 for g in G], 0.9).sqrt() + 1e-8) < 1e-12
    found, G = state(
        lambda m: torch.optim.RMSprop(m.parameters(), alpha=0.9, centered=True), "RMSprop square"
    )
    expected = averaged([g**2 for g in G], 0.9) - averaged(G, 0.9) ** 2
    assert relative(found, expected) < 1e-10
    found, G = state(lambda m: torch.optim.Adagrad(m.parameters()), "Adagrad square")
    assert relative(found, sum(g**2 for g in G)) < 1e-12
    found, G = state(lambda m: torch.optim.NAdam(m.parameters()), "NAdam square")
    assert relative(found, adam(G, 0.999)) < 1e-12
    found, G = state(lambda m: torch.optim.Adam(m.parameters(), amsgrad=True), "Adam square")
    largest = torch.stack([averaged([g**2 for g in G[: k + 1]], 0.999) for k in range(5)]).amax(0)
    assert relative(found, largest / (1 - 0.999**5)) < 1e-12
    found, _ = state(lambda m: torch.optim.SGD(m.parameters(), lr=0.1), "SGD")
    assert torch.equal(found, torch.ones_like(found))


def test_our_own_blocks_stand_in_the_table():
    model, optimizer, _ = trained(lambda model: fl.optim.create("ekfac", model), 3)
    x, y = batch(99)
    table = fl.audit(optimizer, model, CE, x, y, approximations=["kfac"]).frame
    expected = fl.compare(model, CE, x, y, approximations=optimizer.blocks()).frame
    ours = table.query("approximation == 'NaturalGradient(EKFAC)'")
    assert set(table.approximation) == {"NaturalGradient(EKFAC)", "kfac"}
    assert (ours.relative_error.to_numpy() == expected.relative_error.to_numpy()).all()


@pytest.mark.parametrize("name", ["adamw", "muon", "soap", "kfac"])
def test_an_audit_changes_no_bit_of_the_training(name):
    """Gradients, buffers, flags, hooks, random streams, and every later parameter."""

    def run(audited: bool):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.3), nn.Linear(5, 4))
        optimizer = fl.optim.create(name, model)
        for step in range(4):
            x, y = batch(step)
            optimizer.zero_grad()
            CE(model(x.float()), y).backward()
            if audited and step:
                before = [p.grad.clone() for p in model.parameters()]
                hooks = [len(m._forward_hooks) for m in model.modules()]
                fl.audit(optimizer, model, CE, x.float(), y, fisher_type="empirical")
                assert all(map(torch.equal, before, [p.grad for p in model.parameters()]))
                assert hooks == [len(m._forward_hooks) for m in model.modules()]
                assert model.training
            optimizer.step()
        return torch.cat([t.double().flatten() for t in model.state_dict().values()]), torch.rand(3)

    for one, other in zip(run(False), run(True), strict=True):
        assert torch.equal(one, other)


def test_refusals_name_what_to_do():
    model, (x, y) = net(), batch(0)
    with pytest.raises(OptimizerError, match=r"Rprop has no reading.*READERS"):
        fl.audit(torch.optim.Rprop(model.parameters()), model, CE, x, y)
    with pytest.raises(OptimizerError, match="take a step first"):
        fl.audit(torch.optim.AdamW(model.parameters()), model, CE, x, y)
    with pytest.raises(OptimizerError, match="take a step first"):
        fl.audit(fl.optim.create("kfac", model), model, CE, x, y)
    model, optimizer, _ = trained(lambda model: torch.optim.AdamW(model.parameters()), 1)
    with pytest.raises(ValueError, match="named as a reading"):
        fl.audit(optimizer, model, CE, x, y, approximations={"AdamW root": fl.KFAC()})


def test_layers_without_a_state_are_named():
    model, optimizer, _ = trained(lambda model: torch.optim.AdamW(model[0].parameters()), 1)
    x, y = batch(0)
    table = fl.audit(optimizer, model, CE, x, y)
    assert set(table.frame.layer) == {"0"}
    assert table.config["unread"] == {"2": "the optimizer does not have it"}


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad])
def test_a_block_read_before_a_step_says_afterwards_what_it_said(kind):
    model, optimizer, _ = trained(lambda model: kind(model.parameters()), 2)
    blocks = [found["0"] for found in read(optimizer, model).blocks.values()]
    before = [copy.deepcopy(block.dense()) for block in blocks]
    CE(model(batch(0)[0]), batch(0)[1]).backward()
    optimizer.step()
    assert all(map(torch.equal, [block.dense() for block in blocks], before))


def watched(name: str, every: int | None):
    """A short run with or without a monitor; the parameters, and the monitor."""
    model = net()
    optimizer, logged = fl.optim.create(name, model), {}
    options = {"every": every or 10, "log": lambda values, step: logged.update({step: values})}
    monitor = fl.Monitor(optimizer, model, CE, fisher_type="empirical", **options)
    for step in range(6):
        x, y = batch(step)
        optimizer.zero_grad()
        CE(model(x), y).backward()
        optimizer.step()
        if every:
            monitor(x, y)
    return torch.cat([p.detach().flatten() for p in model.parameters()]), monitor, logged, model


@pytest.mark.parametrize("name", ["adamw", "soap", "kfac"])
def test_a_monitor_says_what_the_blocks_say_and_moves_nothing(name):
    plain, *_ = watched(name, None)
    weights, monitor, logged, model = watched(name, 3)
    assert torch.equal(plain, weights) and list(logged) == [3, 6]
    assert monitor.frame.step.tolist() == [3, 6] and 0 < monitor.share_of_time < 1
    x, y = batch(5)
    layer = fl.capture(model, CE, x, y, fisher_type="empirical")["0"]
    F, g = fl.Exact()(layer).dense(), layer.gradient.flatten()
    values, eye = logged[6], torch.eye(len(F), dtype=torch.float64)
    assert values["0/trace"] == pytest.approx(float(F.trace()), rel=1e-9)
    assert 1 < values["0/effective_rank"] < 20
    for reading, found in read(monitor.optimizer, model).blocks.items():
        X = found["0"].dense()
        ours, exact = (torch.linalg.solve(S + 0.1 * S.trace() / len(S) * eye, g) for S in (X, F))
        cosine = float(ours @ exact / ours.norm() / exact.norm())
        assert values[f"0/{reading}/direction_cosine"] == pytest.approx(cosine, rel=1e-8)
        assert (
            f"0/{reading}/stale_cosine" in values and f"0/{reading}/stale_cosine" not in logged[3]
        )
    assert ("clipped_share" in values) == (name == "kfac")


def test_a_monitor_refuses_what_it_cannot_do():
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match="every must be a whole number >= 1, got 0"):
        fl.Monitor(optimizer, model, CE, every=0)
    with pytest.raises(OptimizerError, match="take a step first"):
        fl.Monitor(optimizer, model, CE, every=1)(*batch(0))
