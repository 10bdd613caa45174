"""`preset="paper"` for five steps on an MLP and a CNN: dense, float64, autograd per example.

Written from the papers alone. Per layer and example: the inputs `a [T, i]` with the trailing 1,
the gradients `g [T, o]` at the outputs, and `D = g^T a`; every block is a matrix over `vec [W b]`.
Labels are the observed ones and intervals are shortened, so that five steps meet all formulas.
"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fisherlab as fl
from fisherlab.models.sequence import LSTMLayer
from fisherlab.optim.sngd import ReconstructedSGD

# More examples than a layer has inputs, so that every factor has one eigenbasis.
STEPS, EXAMPLES, CLASSES = 5, 20, 3
MODELS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, CLASSES)), (5,)),
    "cnn": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1),
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(12, CLASSES),
        ),
        (2, 4, 4),
    ),
}
EVERY = {"statistics_every": 1, "basis_every": 1}


def made(kind):
    torch.manual_seed(0)
    build, shape = {**MODELS, **RECONSTRUCTED}[kind]
    generator = torch.Generator().manual_seed(1)
    batches = [
        (
            torch.randn(EXAMPLES, *shape, generator=generator, dtype=torch.float64),
            torch.randint(CLASSES, (EXAMPLES,), generator=generator),
        )
        for _ in range(STEPS)
    ]
    return build().double(), batches


def eye(n):
    return torch.eye(n, dtype=torch.float64)


class Layer:
    """What one layer saw of a batch: `a`, `g`, `D` of every example."""

    def __init__(self, module):
        self.module, self.a, self.g = module, [], []

    def add(self, x, output_gradient):
        if isinstance(self.module, nn.Conv2d):
            x = F.unfold(x, 3, padding=1)[0].T
            output_gradient = output_gradient[0].flatten(1).T
        self.a.append(torch.cat([x, x.new_ones(len(x), 1)], 1))
        self.g.append(output_gradient)

    @property
    def D(self):
        return torch.stack([g.T @ a for a, g in zip(self.a, self.g, strict=True)])

    @property
    def U(self):
        """`vec D` in columns."""
        return self.D.flatten(1).T

    @property
    def conv(self):
        return isinstance(self.module, nn.Conv2d)


def seen(model, x, y):
    """The layers of a model on a batch, example by example."""
    layers = [Layer(m) for m in model if isinstance(m, nn.Linear | nn.Conv2d)]
    for n in range(len(x)):
        value, kept = x[n : n + 1], []
        for module in model:
            before, value = value, module(value)
            if isinstance(module, nn.Linear | nn.Conv2d):
                value.retain_grad()
                kept.append((before, value))
        F.cross_entropy(value, y[n : n + 1]).backward()
        for layer, (before, after) in zip(layers, kept, strict=True):
            layer.add(before.detach(), after.grad)
    model.zero_grad()
    return layers


def joint(module):
    if module.bias is None:
        return module.weight.detach().flatten(1)
    return torch.cat([module.weight.detach().flatten(1), module.bias.detach()[:, None]], 1)


@torch.no_grad()
def put(module, W):
    if module.bias is not None:
        module.bias.copy_(W[:, -1])
        W = W[:, :-1]
    module.weight.copy_(W.reshape(module.weight.shape))


class Reference:
    """Heavy ball on the directions of a method, which subclasses define layer by layer."""

    def __init__(self, lr, momentum):
        self.lr, self.momentum, self.velocity, self.step = lr, momentum, {}, 0

    def train(self, model, batches):
        for self.step, (x, y) in enumerate(batches):
            layers = seen(model, x, y)
            for k, direction in enumerate(self.directions(layers)):
                old = self.velocity.get(k)
                self.velocity[k] = direction if old is None else self.momentum * old + direction
                put(layers[k].module, joint(layers[k].module) - self.lr * self.velocity[k])


def check(name, kind, reference, options, tolerance=1e-8, closure=False):
    """Ours and the reference's weights after five steps, from the same start."""
    model, batches = made(kind)
    twin = copy.deepcopy(model)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    criterion = nn.CrossEntropyLoss()
    optimizer = fl.optim.create(name, model, preset="paper", **options)
    for x, y in batches:

        def evaluate(x=x, y=y):
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            return loss

        if closure:
            optimizer.step(evaluate)
        else:
            evaluate()
            optimizer.step()
    if isinstance(optimizer, ReconstructedSGD):
        fl.optim.restore(model)
    reference.train(twin, batches)
    found, wanted = model.state_dict(), twin.state_dict()
    for key, first in start.items():
        moved = (wanted[key] - first).norm()
        assert moved > 1e-6, "the reference stands still"
        assert (found[key] - wanted[key]).norm() <= tolerance * moved, key
    return optimizer


# TEKFAC -------------------------------------------------------------------------------------------


class Tekfac(Reference):
    """(2.8)-(2.10), (3.1)-(3.9): the basis of every second step, Theta carried into it."""

    def __init__(self, past, **options):
        super().__init__(**options)
        self.past, self.factors, self.bases, self.thetas = past, {}, {}, {}

    def blend(self, store, k, new):
        store[k] = new if k not in store else self.past * store[k] + (1 - self.past) * new

    def directions(self, layers):
        lambdas = {}
        for k, layer in enumerate(layers):
            D = layer.D
            self.blend(self.factors, (k, "left"), torch.einsum("noi,npi->op", D, D) / EXAMPLES)
            self.blend(self.factors, (k, "right"), torch.einsum("noi,noj->ij", D, D) / EXAMPLES)
            if self.step % 2 == 0:
                sides = self.factors[k, "left"], self.factors[k, "right"]
                Q, P = (torch.linalg.eigh(side / side.trace())[1] for side in sides)
                if k in self.thetas:
                    old_Q, old_P = self.bases[k]
                    left, right = (Q.T @ old_Q).square(), (P.T @ old_P).square()
                    self.thetas[k] = left @ self.thetas[k] @ right.T
                self.bases[k] = Q, P
            Q, P = self.bases[k]
            self.blend(self.thetas, k, (Q.T @ D @ P).square().mean(0))
            if layer.conv:
                lambdas[k] = max(self.thetas[k].sum().item(), 0.01) / self.thetas[k].numel()
        beta = max(lambdas.values(), default=1.0)
        found = []
        for k, layer in enumerate(layers):
            (Q, P), theta = self.bases[k], self.thetas[k]
            damped = theta + lambdas[k] if layer.conv else beta * (theta + 1e-3)
            found.append(Q @ ((Q.T @ layer.D.mean(0) @ P) / damped) @ P.T)
        return found


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("ema", ["averaged", "literal"])
def test_tekfac(kind, ema):
    options = {"fisher_type": "empirical", "statistics_every": 1, "basis_every": 2}
    lr, past = 1e-5, 0.95 if ema == "averaged" else 0.05
    words = {} if ema == "averaged" else {"ema": ema}
    optimizer = check(
        "tekfac", kind, Tekfac(past, lr=lr, momentum=0.9), {**options, **words, "lr": lr}, 1e-7
    )
    beta = optimizer.summary()["beta"]
    assert beta.iloc[0] == 1 and (beta.iloc[1] == 1) == (kind == "mlp")


# ANG ----------------------------------------------------------------------------------------------


def blend(d, t, step, total):
    """(7), concave, from the natural direction to SGD's."""
    s = (1 - math.exp(-5 * step / (total - 1))) / (1 - math.exp(-5))
    rho = d.norm()
    omega = torch.arccos((d * t).sum() / (rho * t.norm()))
    along = torch.sin((1 - s) * omega) * d / rho + torch.sin(s * omega) * t / t.norm()
    return rho * along / torch.sin(omega)


class Ang(Reference):
    """Damped KFAC (8), or the rows of one batch (9)-(14), blended by (7)."""

    def __init__(self, one_batch, damping, **options):
        super().__init__(**options)
        self.one_batch, self.damping = one_batch, damping
        self.sums, self.weight = {}, 0.0

    def factors(self, k, layer):
        if self.one_batch:
            a = torch.stack([rows.mean(0) for rows in layer.a]).mean(0)
            g = torch.stack([rows.sum(0) for rows in layer.g]).mean(0)
            return torch.outer(g, g), torch.outer(a, a)
        G = sum(rows.T @ rows for rows in layer.g)
        A = sum(rows.T @ rows / len(rows) for rows in layer.a)
        for key, new in (((k, "G"), G), ((k, "A"), A)):
            self.sums[key] = 0.95 * self.sums.get(key, 0.0) + new
        return self.sums[k, "G"] / self.weight, self.sums[k, "A"] / self.weight

    def directions(self, layers):
        self.weight = 0.95 * self.weight + EXAMPLES
        found = []
        for k, layer in enumerate(layers):
            G, A = self.factors(k, layer)
            t = layer.D.mean(0)
            left = torch.linalg.inv(G + self.damping * eye(len(G)))
            d = left @ t @ torch.linalg.inv(A + self.damping * eye(len(A)))
            found.append(blend(d, t, self.step, STEPS + 1))
        return found


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(("name", "damping"), [("ang", 0.03), ("ifang", 0.1)])
def test_ang(name, damping, kind):
    options = {"fisher_type": "empirical", "total_steps": STEPS + 1, "curve": "concave"}
    if name == "ang":
        options |= EVERY
    check(name, kind, Ang(name == "ifang", damping, lr=0.005, momentum=0.9), options)


# FNGD ---------------------------------------------------------------------------------------------


class Fngd(Reference):
    """(5)-(14): three steps solve for their coefficients, two share their mean by slot."""

    def __init__(self, fold, **options):
        super().__init__(**options)
        self.fold, self.taken = fold, {}

    def directions(self, layers):
        found = []
        for k, layer in enumerate(layers):
            U, mine = layer.U, self.taken.setdefault(k, [])
            if self.step < 3:
                gram = U.T @ U
                damping = 0.005 * gram.norm()
                ones = torch.ones(EXAMPLES, dtype=torch.float64)
                v = torch.linalg.solve(damping * eye(EXAMPLES) + gram / EXAMPLES, ones)
                mine.append(damping * v if self.fold else v)
            v = mine[-1] if self.step < 3 else sum(mine) / len(mine)
            found.append((U @ v / EXAMPLES).view(layer.D.shape[1:]))
        return found


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("fold, accelerated", [(True, True), (False, True), (True, False)])
def test_fngd(fold, accelerated, kind):
    lr = 0.1 if fold else 1e-4
    options = {"lr": lr, "fold": fold, "coefficient_steps": 3, "momentum": 0.9}
    options["accelerated"] = accelerated
    check("fngd", kind, Fngd(fold, lr=lr, momentum=0.9), options)


# SNGD ---------------------------------------------------------------------------------------------


class Sngd:
    """(11), (12): SGD with L2 on `w' = W G^{1/2}`, `G = nu A` averaged from I."""

    def __init__(self, lr, decay, eps, weight_decay):
        self.lr, self.decay, self.eps, self.weight_decay = lr, decay, eps, weight_decay

    def train(self, model, batches):
        modules = [m for m in model if isinstance(m, nn.Linear | nn.Conv2d)]
        sizes = [joint(module).shape[1] for module in modules]
        means, inverses = ([eye(n) for n in sizes] for _ in range(2))
        primed = [joint(module) for module in modules]
        for step, (x, y) in enumerate(batches):
            with torch.no_grad():
                slope = (modules[0](x) > 0).double().mean().item()  # of the ReLU
            layers = seen(model, x, y)
            for k, layer in enumerate(layers):
                A = sum(a.T @ a / len(a) for a in layer.a) / EXAMPLES
                nu = slope if k == 0 else 1.0  # 1 at the outputs of the network
                means[k] = self.decay * means[k] + (1 - self.decay) * nu * A
                gradient = layer.D.mean(0) @ inverses[k] + self.weight_decay * primed[k]
                primed[k] = primed[k] - self.lr * gradient
            for k, module in enumerate(modules):
                W = primed[k] @ inverses[k]
                if step % 2 == 1:
                    damped = means[k] + self.eps * means[k].trace() * eye(sizes[k])
                    values, Q = torch.linalg.eigh(damped)
                    primed[k] = W @ Q @ torch.diag(values.sqrt()) @ Q.T
                    inverses[k] = Q @ torch.diag(values.rsqrt()) @ Q.T
                put(module, W)


@pytest.mark.parametrize("kind", MODELS)
def test_sngd(kind):
    reference = Sngd(lr=0.1, decay=0.995, eps=1e-4, weight_decay=1e-3)
    check("sngd", kind, reference, {"every": 2})


class Residual(nn.Module):
    """The activation of the second map stands behind the sum."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        h = self.first(x).relu()
        return self.last((self.second(h) + h).relu())


class Recurrent(nn.Module):
    """An LSTM, and a map of its mean state."""

    def __init__(self):
        super().__init__()
        self.lstm, self.last = LSTMLayer(3, 2), nn.Linear(2, 3)

    def forward(self, x):
        return self.last(self.lstm(x).mean(1))


RECONSTRUCTED = {
    "batch norm": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1, bias=False),
            nn.BatchNorm2d(3),
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(12, CLASSES),
        ),
        (2, 4, 4),
    ),
    "residual": (Residual, (5,)),
    "deep": (
        lambda: nn.Sequential(
            nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, CLASSES)
        ),
        (5,),
    ),
    "lstm": (Recurrent, (4, 3)),
}


def one(x):
    return torch.cat([x, x.new_ones(*x.shape[:-1], 1)], -1)


def normalised(W, rest, x):
    """Outputs, and of every map the rows of its inputs and its nu: here behind batch norm."""
    gain, shift = (p[None, :, None, None] for p in rest)
    patches = F.unfold(x, 3, padding=1).mT
    s = (patches @ W[0].T).mT.unflatten(2, (4, 4))
    variance, mean = torch.var_mean(s, (0, 2, 3), correction=0, keepdim=True)
    z = gain * (s - mean) / (variance + 1e-5).sqrt() + shift
    pooled = one(F.avg_pool2d(z.relu(), 2).flatten(1))
    slope = (z > 0).double().mean()
    return pooled @ W[1].T, [(patches.flatten(0, 1), slope), (pooled, 1.0)]


def summed(W, rest, x):
    z = one(x) @ W[0].T
    h = one(z.relu())
    total = h @ W[1].T + h[:, :-1]
    after = one(total.relu())
    slopes = (z > 0).double().mean(), (total > 0).double().mean()
    return after @ W[2].T, [(one(x), slopes[0]), (h, slopes[1]), (after, 1.0)]


def gated(W, rest, x):
    h = c = x.new_zeros(len(x), 2)
    states, slopes, before = [], [], []
    for step in range(x.shape[1]):
        before.append(h)
        s = one(x[:, step]) @ W[0].T + h @ W[1].T
        i, f, g, o = s.split(2, 1)
        bell = [torch.sigmoid(u) * (1 - torch.sigmoid(u)) for u in (i, f, o)]
        slopes.append(torch.cat([*bell, 1 - g.tanh().square()], 1).mean())
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * g.tanh()
        h = torch.sigmoid(o) * c.tanh()
        states.append(h)
    nu, mean = torch.stack(slopes).mean(), one(torch.stack(states).mean(0))
    inputs = one(x).flatten(0, 1), torch.cat(before)
    return mean @ W[2].T, [(inputs[0], nu), (inputs[1], nu), (mean, 1.0)]


class SngdOf(Sngd):
    """The same of a network that is written out as a function of its weights."""

    def __init__(self, network, **options):
        super().__init__(**options)
        self.network = network

    def train(self, model, batches):
        modules = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        mapped = {id(p) for module in modules for p in module.parameters()}
        rest = [p for p in model.parameters() if id(p) not in mapped]  # of normalisations
        primed = [joint(module) for module in modules]
        means, inverses = ([eye(W.shape[1]) for W in primed] for _ in range(2))
        for step, (x, y) in enumerate(batches):
            pairs = zip(primed, inverses, strict=True)
            weights = [(w @ root).requires_grad_() for w, root in pairs]
            outputs, seen = self.network(weights, rest, x)
            slopes = torch.autograd.grad(F.cross_entropy(outputs, y), [*weights, *rest])
            for k, (a, nu) in enumerate(seen):
                A = (a.detach().T @ a.detach()) / len(a)
                means[k] = self.decay * means[k] + (1 - self.decay) * nu * A
                gradient = slopes[k] @ inverses[k] + self.weight_decay * primed[k]
                W = (primed[k] - self.lr * gradient) @ inverses[k]
                primed[k] = primed[k] - self.lr * gradient
                if step % 2 == 1:
                    damped = means[k] + self.eps * means[k].trace() * eye(len(means[k]))
                    values, Q = torch.linalg.eigh(damped)
                    primed[k] = W @ Q @ torch.diag(values.sqrt()) @ Q.T
                    inverses[k] = Q @ torch.diag(values.rsqrt()) @ Q.T
                with torch.no_grad():
                    put(modules[k], W)
            with torch.no_grad():
                for p, slope in zip(rest, slopes[len(weights) :], strict=True):
                    p -= self.lr * (slope + self.weight_decay * p)


@pytest.mark.parametrize(
    "kind, network", [("batch norm", normalised), ("residual", summed), ("lstm", gated)]
)
def test_sngd_behind_normalisations_sums_and_gates(kind, network):
    reference = SngdOf(network, lr=0.1, decay=0.9, eps=1e-4, weight_decay=1e-3)
    check("sngd", kind, reference, {"every": 2, "decay": 0.9})


class Relative(Sngd):
    """The authors' metric: `G_o = E[f'(z_o) a a^T]` per unit, `E[a a^T]` at the first layer."""

    def train(self, model, batches):
        modules = [m for m in model if isinstance(m, nn.Linear)]
        sizes = [joint(module).shape for module in modules]
        units = [1 if k == 0 else o for k, (o, _) in enumerate(sizes)]
        means = [[eye(i) for _ in range(n)] for n, (_, i) in zip(units, sizes, strict=True)]
        inverses = [[eye(i) for _ in range(n)] for n, (_, i) in zip(units, sizes, strict=True)]
        primed = [joint(module) for module in modules]
        for step, (x, y) in enumerate(batches):
            layers = seen(model, x, y)
            for k, layer in enumerate(layers):
                a = torch.cat(layer.a)
                z = a @ joint(layer.module).T
                gradient, W = layer.D.mean(0), joint(layer.module)
                for o in range(len(W)):
                    u = o if units[k] > 1 else 0
                    f = (z[:, o] > 0).double() if 0 < k < len(layers) - 1 else torch.ones(len(a))
                    if o == u:
                        moment = sum(s * torch.outer(r, r) for s, r in zip(f, a, strict=True))
                        old = means[k][u]
                        means[k][u] = self.decay * old + (1 - self.decay) * moment / len(a)
                    slope = gradient[o] @ inverses[k][u] + self.weight_decay * primed[k][o]
                    primed[k][o] = primed[k][o] - self.lr * slope
                    W[o] = primed[k][o] @ inverses[k][u]
                if step % 2 == 1:
                    for u in range(units[k]):
                        G = means[k][u] + self.eps * means[k][u].trace() * eye(sizes[k][1])
                        values, Q = torch.linalg.eigh(G)
                        inverses[k][u] = Q @ torch.diag(values.rsqrt()) @ Q.T
                        for o in [u] if units[k] > 1 else range(len(W)):
                            primed[k][o] = W[o] @ Q @ torch.diag(values.sqrt()) @ Q.T
                put(layer.module, W)


def test_sngd_by_the_relative_metric():
    reference = Relative(lr=0.1, decay=0.9, eps=1e-2, weight_decay=1e-3)
    options = {"every": 2, "decay": 0.9, "eps": 1e-2, "variant": "relative"}
    check("sngd", "deep", reference, options)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    with pytest.raises(ValueError, match="unknown variant 'units'; one of mean, relative"):
        fl.optim.reconstruct(model, variant="units")
    wide = nn.Sequential(nn.Linear(2, 2_000), nn.ReLU(), nn.Linear(2_000, 30))
    with pytest.raises(ValueError, match="a matrix per unit, 120,120,030 numbers for layer '2'"):
        fl.optim.reconstruct(wide, variant="relative")


# K-BFGS -------------------------------------------------------------------------------------------


class Kbfgs(Reference):
    """Goldfarb et al. 2020: both inverses by BFGS, pairs averaged with 0.9, doubly damped."""

    root = math.sqrt(0.3)

    def train(self, model, batches):
        inverses, sums, weight, gradients = {}, {}, 0.0, {}
        for x, y in batches:
            before = seen(model, x, y)
            held = [joint(layer.module) for layer in before]
            weight = 0.9 * weight + 1
            for k, layer in enumerate(before):
                D = layer.D.mean(0)
                gradients[k] = D if k not in gradients else 0.9 * gradients[k] + 0.1 * D
                if k not in inverses:
                    A = torch.cat(layer.a).T @ torch.cat(layer.a) / len(torch.cat(layer.a))
                    start = torch.linalg.inv(A + self.root * eye(len(A)))
                    inverses[k] = eye(len(D)), start
                H_g, H_a = inverses[k]
                put(layer.module, joint(layer.module) - self.lr * H_g @ gradients[k] @ H_a)
            after = seen(model, x, y)
            for k, (one, two) in enumerate(zip(before, after, strict=True)):
                W = joint(two.module)
                new = {
                    "A": sum(a.T @ a / len(a) for a in one.a) / EXAMPLES,
                    "a": sum(a.mean(0) for a in one.a) / EXAMPLES,
                    "s": sum((b @ W.T).mean(0) for b in two.a) / EXAMPLES
                    - sum((a @ held[k].T).mean(0) for a in one.a) / EXAMPLES,
                    "y": (sum(g.sum(0) for g in two.g) - sum(g.sum(0) for g in one.g)) / EXAMPLES,
                }
                mean = {}
                for key, value in new.items():
                    sums[k, key] = 0.9 * sums.get((k, key), 0.0) + value
                    mean[key] = sums[k, key] / weight
                H_g, H_a = inverses[k]
                s = H_a @ mean["a"]
                H_a = self.bfgs(H_a, s, (mean["A"] + self.root * eye(len(mean["A"]))) @ s)
                inverses[k] = self.bfgs(H_g, *self.damped(H_g, mean["s"], mean["y"])), H_a

    def bfgs(self, H, s, y):
        r, one = 1 / (s @ y), eye(len(s))
        return (one - r * torch.outer(s, y)) @ H @ (one - r * torch.outer(y, s)) + r * torch.outer(
            s, s
        )

    def damped(self, H, s, y):
        yHy = y @ H @ y
        if s @ y < 0.2 * yHy:
            theta = 0.8 * yHy / (yHy - s @ y)
            s = theta * s + (1 - theta) * H @ y
        if s @ y < self.root * (s @ s):
            theta = (1 - self.root) * (s @ s) / (s @ s - s @ y)
            y = theta * y + (1 - theta) * s
        return s, y


@pytest.mark.parametrize("kind", MODELS)
def test_kbfgs(kind):
    check("kbfgs", kind, Kbfgs(lr=0.3, momentum=0.0), {"lr": 0.3}, closure=True)
