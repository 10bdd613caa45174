"""A pass of FisherLab's own leaves nothing behind in what a model or a criterion holds."""

import random
from collections import OrderedDict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import fisherlab as fl
from fisherlab.extract import CaptureError, held
from fisherlab.extract.isolation import isolated

CE = nn.CrossEntropyLoss()


class Entries(OrderedDict):
    def __setitem__(self, key, value):
        raise TypeError("read only")


def given():
    draw = torch.Generator().manual_seed(0)
    return torch.randn(6, 5, generator=draw), torch.arange(6) % 3


class Stateful(nn.Module):
    """State in an object, an array, subclasses of containers and tensors with a graph."""

    def __init__(self):
        super().__init__()
        self.l = nn.Linear(5, 3)
        self.record = SimpleNamespace(n=0, inner=SimpleNamespace(seen=[]), ema=torch.zeros(3))
        self.counts, self.entries = np.zeros(2), Entries()
        self.graph = self.l.weight.sum(0) * 2
        self.pair = (self.graph, {"last": None})

    def forward(self, x):
        self.record.n += 1
        self.record.inner.seen.append(self.record.n)
        self.record.ema.add_(1)
        self.counts += 1
        OrderedDict.__setitem__(self.entries, "last", self.record.n)
        out = self.l(x) + 0 * self.graph.detach().sum()
        self.graph.mul_(3)
        with torch.no_grad():
            self.pair[0].add_(1)
        self.pair[1]["last"] = out
        return out

    def state(self):
        record = self.record.n, [*self.record.inner.seen], self.record.ema.tolist()
        graphs = self.graph.tolist(), self.pair[0].tolist(), self.graph.grad_fn, self.graph._version
        return record, self.counts.tolist(), dict(self.entries), graphs, {**self.pair[1]}


@pytest.mark.parametrize("asked", [fl.capture, fl.compare, "support"])
def test_state_in_objects_arrays_and_graphs_comes_back(asked):
    model, (x, y) = Stateful(), given()
    before, objects = model.state(), (model.graph, model.pair, model.record, model.counts)
    fl.support(model, x) if asked == "support" else asked(model, CE, x, y)
    assert model.state() == before
    now = model.graph, model.pair, model.record, model.counts
    assert all(one is two for one, two in zip(now, objects, strict=True))
    model.graph.sum().backward()
    assert torch.equal(model.l.weight.grad, torch.full((3, 5), 2.0))


class Cached(nn.Linear):
    """A cache that is filled in place, and a weight that is clipped, by names and by an index."""

    def __init__(self):
        super().__init__(5, 3)
        self.keys, self.view = torch.zeros(6, 5), None
        self.view = self.keys[2:]

    def forward(self, x):
        self.keys[:2] = x[:2]
        torch.mul(x[2:], 2, out=self.view)
        with torch.no_grad():
            self.bias.clamp_(-0.01, 0.01)
        return super().forward(x + self.keys.mean())


def test_tensors_too_large_for_a_copy_have_one_where_a_pass_writes(monkeypatch):
    monkeypatch.setattr(held, "COPIED", 2)
    model, (x, y) = Cached(), given()
    before, versions = model.bias.detach().clone(), (model.bias._version, model.keys._version)
    copies = held.Copies()
    copies.add(model.weight)
    with copies.watched():
        model.weight + 1
        assert not copies.wrote(model.weight)
    with pytest.warns(UserWarning, match="writes into the parameter bias"):
        captures = fl.capture(model, CE, x, y)
    assert not model.keys.any() and torch.equal(model.bias, before)
    assert (model.bias._version, model.keys._version) == versions
    assert captures["cached"].inputs[0, 0, 0] != x[0, 0]


class Counting(nn.CrossEntropyLoss):
    """A criterion with state."""

    def __init__(self):
        super().__init__()
        self.register_buffer("ema", torch.zeros(()))
        self.history = []

    def forward(self, outputs, y):
        loss = super().forward(outputs, y)
        self.ema.add_(loss.detach())
        self.history.append(loss.item())
        return loss


def test_the_state_of_a_criterion_comes_back():
    model, criterion, (x, y) = nn.Linear(5, 3), Counting(), given()
    fl.capture(model, criterion, x, y, fisher_type="empirical")
    fl.compare(model, criterion, x, y, fisher_type="empirical", reference="hessian")
    assert criterion.history == [] and criterion.ema == 0


@pytest.mark.parametrize("kind", ["torch", "generator", "state", "python", "global", "random"])
def test_a_stream_of_the_models_own_comes_back_and_is_seen_to_be_drawn_from(kind):
    streams = {
        "torch": torch.Generator().manual_seed(0),
        "generator": np.random.default_rng(0),
        "state": np.random.RandomState(0),
        "python": random.Random(0),
    }
    draws = {
        "torch": lambda: float(torch.rand((), generator=streams["torch"])),
        "generator": lambda: streams["generator"].random(),
        "state": lambda: streams["state"].random_sample(),
        "python": lambda: streams["python"].random(),
        "global": np.random.random,
        "random": random.random,
    }

    class Noisy(nn.Linear):
        def forward(self, x):
            return super().forward(x * draws[kind]())

    model, (x, y) = Noisy(5, 3), given()
    model.stream = streams.get(kind)
    with isolated(model, x):
        first = draws[kind]()
    with pytest.raises(CaptureError, match="draws random numbers"):
        fl.capture(model, CE, x, y)
    fl.capture(model, CE, x, y, check="gradient")
    assert draws[kind]() == first


def test_an_owner_of_the_model_is_no_state_of_it():
    model, (x, y) = nn.Linear(5, 3), given()
    model.trainer = SimpleNamespace(model=model, steps=0)

    def forward(model, x):
        model.trainer.steps += 1
        return model(x)

    fl.capture(model, CE, x, y, forward=forward)
    assert model.trainer.steps == 1


def test_objects_that_refer_to_each_other_in_many_ways_are_looked_at_once() -> None:
    side, model = 30, nn.Sequential(nn.Linear(3, 2))
    cells = {(i, j): SimpleNamespace(seen=0) for i in range(side) for j in range(side)}
    for (i, j), cell in cells.items():
        cell.beside = SimpleNamespace(
            right=cells.get((i + 1, j)), left=cells.get((i - 1, j)), up=cells.get((i, j + 1))
        )
        cell.down = cells.get((i, j - 1))
    model.world = cells[0, 0]

    def forward(model, x):
        cells[side - 1, side - 1].seen += 1
        return model(x)

    x, y = torch.randn(4, 3), torch.arange(4) % 2
    assert list(fl.capture(model, nn.CrossEntropyLoss(), x, y, forward=forward)) == ["0"]
    assert cells[side - 1, side - 1].seen == 0
