"""What the graph states of a capture is so by backward passes too; else it states nothing."""

from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fisherlab.extract import CaptureError, api
from fisherlab.extract.api import capture
from fisherlab.extract.graph import read
from fisherlab.extract.proof import Weighted

N = 4
# of s [N, 4, 4] from a Linear: each example by itself
APART = {
    "element-wise": lambda s: F.gelu(s).tanh().clamp(-0.5, 0.5) * torch.sigmoid(s) + s.exp(),
    "reshaped": lambda s: s.reshape(2 * N, 8).relu().view(N, 4, 4),
    "moved": lambda s: s.transpose(1, 2).permute(0, 2, 1).transpose(-1, -2),
    "reduced": lambda s: s - s.mean(-1, keepdim=True) + s.sum((1, 2))[:, None, None],
    "softmax": lambda s: s.softmax(-1) @ s.log_softmax(1),
    "attention": lambda s: F.scaled_dot_product_attention(s[:, None], s[:, None], s[:, None])[:, 0],
    "parts": lambda s: torch.cat([s[:, 1:], s[:, :1]], 1) + torch.stack(s.unbind(2), 2),
    "split": lambda s: torch.cat(s.split(2, -1)[::-1], -1) + s.select(1, 0).unsqueeze(1),
    "normed": lambda s: F.layer_norm(s, (4, 4)) + F.group_norm(s, 2),
    "pooled": lambda s: F.max_pool2d(s[:, None], 2).expand(-1, 4, 2, 2).flatten(2),
    "evaluated": lambda s: F.batch_norm(s, torch.zeros(4).double(), torch.ones(4).double()),
}
# examples meet, or a row is another example's
MEETING = {
    "flipped": lambda s: s.flip(0),
    "rolled": lambda s: s.roll(1, 0),
    "time first": lambda s: s.transpose(0, 1),
    "permuted": lambda s: s.permute(1, 0, 2),
    "turned": lambda s: s.reshape(N, 16).T.reshape(N, 4, 4),
    "mean": lambda s: s - s.mean(0),
    "mean of all": lambda s: s - s.mean(),
    "mean over the axis -3": lambda s: s - s.mean(-3, keepdim=True),
    "sum": lambda s: s / s.sum(0, keepdim=True),
    "softmax": lambda s: s.softmax(0),
    "softmax of the axis -3": lambda s: s.log_softmax(-3),
    "running sum": lambda s: s.cumsum(0),
    "product": lambda s: torch.einsum("mab,ncd->nab", s, s),
    "attention": lambda s: (s.flatten(1) @ s.flatten(1).T).softmax(-1) @ s.flatten(1),
    "picked": lambda s: s[[1, 0, 3, 2]],
    "cut": lambda s: torch.cat([s[1:], s[:1]]),
    "unbound": lambda s: torch.stack(s.unbind(0)[::-1]),
    "stacked": lambda s: torch.stack(s.unbind(1), 0),
    "first for all": lambda s: s + s[:1],
    "normed": lambda s: F.layer_norm(s, s.shape),
    "batch norm": lambda s: F.batch_norm(s, None, None, training=True),
    "instance norm": lambda s: F.instance_norm(s.transpose(0, 1)),
    "pooled": lambda s: F.max_pool1d(s.permute(2, 1, 0), 3, 1, 1).permute(2, 1, 0),
    "a function of one's own": lambda s: Relu.apply(s),
}


class Relu(torch.autograd.Function):
    """Its node is called as that of `torch.relu`."""

    @staticmethod
    def forward(ctx, s):
        return s.flip(0)

    @staticmethod
    def backward(ctx, g):
        return g.flip(0)


class Net(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.a, self.body, self.b = nn.Linear(5, 4), body, nn.LazyLinear(3)

    def forward(self, x):
        return self.b(self.body(self.a(x)).reshape(N, -1))


def states(body, monkeypatch):
    """Which weights and rows the graph proves, beside the rows that a backward pass proves."""
    torch.manual_seed(0)
    net, x = Net(body).double(), torch.randn(N, 4, 5).double()
    net(x)
    found = {}

    def spied(outputs, record, n):
        read(outputs, record, n)
        found.update(proven=set(record.proven), outputs=outputs, record=record)

    monkeypatch.setattr(api, "read", spied)
    captured = capture(net, nn.CrossEntropyLoss(), x, torch.arange(N) % 3)
    record = found["record"]
    for call in record.every():
        call.examples = None
    weighted = Weighted(found["outputs"], record.labels, record.every())
    rows = {name: calls[0].own_rows for name, calls in record.calls.items() if calls}
    passed = {name: weighted.belong(record.calls[name][0]) for name in rows}
    return SimpleNamespace(
        proven=found["proven"], rows=rows, passed=passed, skipped=captured.report.skipped
    )


@pytest.mark.parametrize("body", APART.values(), ids=APART)
def test_an_example_by_itself_is_read_off_the_graph(body, monkeypatch):
    found = states(body, monkeypatch)
    assert found.rows == found.passed == {"a": True, "b": True}
    assert found.proven == {"a", "b"}
    assert not found.skipped


@pytest.mark.parametrize("body", MEETING.values(), ids=MEETING)
def test_examples_that_meet_are_left_to_a_backward_pass(body, monkeypatch):
    found = states(body, monkeypatch)
    assert not found.rows["a"] and not found.passed["a"]
    assert found.rows["b"] and found.passed["b"]


class Uses(nn.Module):
    """`use(W, b, x)` is all that the forward pass does with the weight `a`."""

    def __init__(self, use):
        super().__init__()
        self.a, self.use, self.b = nn.Linear(5, 4), use, nn.Linear(4, 3)

    def forward(self, x):
        return self.b(torch.tanh(self.use(self.a.weight, self.a.bias, x)))


class Packed(nn.Module):
    """Saved tensors are stored coarsely, so autograd multiplies other numbers than were read."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        with torch.autograd.graph.saved_tensors_hooks(torch.round, lambda packed: packed):
            return self.b(torch.tanh(self.a(x)))


def hooked(W, b, x):
    y = F.linear(x, W, b)
    y.register_hook(lambda g: 2 * g.flip(0))
    return y


def hooked_node(W, b, x):
    y = F.linear(x, W, b)
    y.grad_fn.register_prehook(lambda g: (2 * g[0].flip(0),))
    return y


PROVEN = {
    "linear": lambda W, b, x: F.linear(x, W, b),
    "addmm": lambda W, b, x: torch.addmm(b, x, W.T),
    "twice": lambda W, b, x: F.linear(x, W, b) + F.linear(x * x, W, b),
    "one transpose twice": lambda W, b, x: (lambda T: x @ T + (x * x) @ T)(W.T),
}
UNPROVEN = {
    "hook": hooked,
    "node's hook": hooked_node,
    "masked": lambda W, b, x: F.linear(x, W * torch.ones(4, 1, dtype=W.dtype), b),
    "penalty": lambda W, b, x: F.linear(x, W, b) * W.square().sum(),
    "bias used again": lambda W, b, x: F.linear(x, W, b) * (1 + b.square().sum()),
    "squared": lambda W, b, x: F.linear(x, W, b) + (W @ W.T)[0],
}


def proven(net, monkeypatch):
    """The weights whose gradient the graph proves, in a capture that may refuse all of them."""
    records = []

    def spied(outputs, record, n):
        read(outputs, record, n)
        records.append(record)

    monkeypatch.setattr(api, "read", spied)
    torch.manual_seed(0)
    with suppress(CaptureError):
        capture(net, nn.CrossEntropyLoss(), torch.randn(N, 5).double(), torch.arange(N) % 3)
    return records[0].proven


@pytest.mark.parametrize("use", PROVEN.values(), ids=PROVEN)
def test_the_products_of_a_weight_are_read_off_the_graph(use, monkeypatch):
    net = Uses(use).double()
    assert proven(net, monkeypatch) == {"a", "b"}


@pytest.mark.parametrize("use", UNPROVEN.values(), ids=UNPROVEN)
def test_another_use_of_a_weight_or_a_hook_is_left_to_a_backward_pass(use, monkeypatch):
    assert "a" not in proven(Uses(use).double(), monkeypatch)


def test_packed_tensors_and_hooks_of_a_parameter_are_left_to_a_backward_pass(monkeypatch):
    assert not proven(Packed().double(), monkeypatch)
    net = Uses(PROVEN["linear"]).double()
    net.a.weight.register_hook(lambda g: 0 * g)
    assert proven(net, monkeypatch) == {"b"}
