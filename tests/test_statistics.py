"""Laws of every statistic: totals add up, and the cheaper views are views of the total."""

import inspect
from dataclasses import dataclass
from functools import cache
from itertools import product

import pytest
import torch
from torch import nn

import fisherlab as fl
from fisherlab import statistics
from fisherlab.blocks import BlockError
from fisherlab.statistics import InputMoment, MeanInput, OutputMoment, Statistic

KINDS = [
    kind
    for _, kind in inspect.getmembers(statistics, inspect.isclass)
    if issubclass(kind, Statistic) and kind is not Statistic
]
# those of the mean gradient of a whole batch do not add up
ADDITIVE = [kind for kind in KINDS if not kind.__name__.startswith("Gradient")]
# first layer, shape of an example, examples
LAYERS = {
    "full": (nn.Linear(4, 3), (4,), 24),
    "thin": (nn.Linear(12, 14), (12,), 3),
    "positions": (nn.Linear(5, 4), (3, 5), 9),
    "thin positions": (nn.Linear(13, 18), (2, 13), 2),
    "conv": (nn.Conv2d(2, 3, 3, padding=1), (2, 4, 4), 7),
    "thin conv": (nn.Conv2d(2, 36, 3), (2, 3, 4), 4),
    "groups": (nn.Conv2d(4, 6, 3, groups=2), (4, 4, 4), 5),
    "padded": (nn.Linear(5, 3), (4, 5), 6),
}
CASES = pytest.mark.parametrize("case", LAYERS)
PRECISION = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])


@cache
def layers(case, dtype=torch.float64):
    """Captures of the first layer, one for each group."""
    first, shape, n = LAYERS[case]
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(n, *shape, generator=generator, dtype=torch.float64).to(dtype)
    if case == "padded":
        model = nn.Sequential(first, nn.Tanh(), nn.Linear(3, 3), Last()).to(dtype)
        y = torch.randint(3, (n, 4), generator=generator)
        y[0, 2:] = y[3, 1:] = -100
    else:
        size = first.to(dtype)(x[:1]).numel()
        model = nn.Sequential(first, nn.Tanh(), nn.Flatten(), nn.Linear(size, 3)).to(dtype)
        y = torch.randint(3, (n,), generator=generator)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.rand(p.shape, generator=generator, dtype=torch.float64) - 0.5)
    captured = fl.capture(model, nn.CrossEntropyLoss(), x, y)
    found = [layer for key, layer in captured.items() if key.split(":")[0].startswith("0")]
    assert (found[0].counted is not None) == (case == "padded")
    assert all(x.few_inputs and x.few_gradients for x in found) or "thin" not in case
    return found


class Last(nn.Module):
    """Classes before positions."""

    def forward(self, x):
        return x.transpose(1, 2)


def close(one, two, dtype=torch.float64):
    bound = 1e-12 if dtype == torch.float64 else 1e-5
    return (one.double() - two.double()).norm() <= bound * two.double().norm()


@CASES
@PRECISION
def test_views_are_views_of_the_total(case, dtype):
    for layer, kind in product(layers(case, dtype), KINDS):
        S = kind()
        total = S.total(layer)
        if S.side is not None:
            assert total.shape == (layer.shape[("output", "input").index(S.side)],) * 2
            assert close(S.diagonal(layer), total.diagonal(), dtype), S
        rows = S.rows(layer)
        if rows is not None:
            assert close(rows.formed(), total, dtype), S
            assert close(rows.scaled(0.25).formed(), total / 4, dtype), S
        # whichever way the columns are laid out
        assert close(S.total(layer.at_hand()), total, dtype), S


@CASES
@PRECISION
def test_totals_add_up_over_chunks_of_examples_and_of_output_vectors(case, dtype):
    for layer, kind in product(layers(case, dtype), ADDITIVE):
        S, whole = kind(), kind().total(layer)
        n, (o, i) = len(layer.raw_inputs[0]), layer.shape
        halves = [layer.part(slice(n // 2)), layer.part(slice(n // 2, None))]
        # one example at a time, and one of its output vectors
        size = layer.positions * (o + i) * layer.raw_inputs[0].element_size()
        columns = list(layer.chunks(size))
        assert len(columns) == n * layer.columns_per_example
        for parts in (halves, columns):
            assert close(sum(S.over(part) for part in parts), whole, dtype), S


@pytest.mark.parametrize("case", ["thin", "thin positions", "thin conv"])
def test_few_rows_are_taken_where_they_are_few(case):
    (layer,) = layers(case)
    views = [kind for kind in KINDS if kind.side and not kind.__name__.startswith("Gradient")]
    assert len(views) == 8 and all(kind().rows(layer) is not None for kind in views)
    (layer,) = layers("full")
    assert all(kind().rows(layer) is None for kind in views)


class Doubled(InputMoment):
    def total(self, layer):
        return 2 * super().total(layer)


class WithViews(InputMoment):
    def total(self, layer):
        return 2 * super().total(layer)

    def diagonal(self, layer):
        return 2 * super().diagonal(layer)


class Mixin:
    def total(self, layer):
        return 2 * InputMoment().total(layer)


class Mixed(Mixin, InputMoment):
    pass


@pytest.mark.parametrize("kind", [Doubled, WithViews, Mixed])
def test_a_subclass_with_its_own_total_drops_the_views_it_inherits(kind):
    (layer,) = layers("thin")
    S, total = kind(), 2 * InputMoment().total(layer)
    assert InputMoment().rows(layer) is not None and S.rows(layer) is None
    assert not S.columnwise and S.side == "input"
    assert close(S.diagonal(layer), total.diagonal()) and close(S.total(layer), total)


def test_statistics_are_equal_by_their_fields():
    class Power(Statistic):
        def __init__(self, p):
            self.p = p

        def total(self, layer):
            return layer.inputs.pow(self.p).sum((0, 1))

    class OfInput(InputMoment):
        def __init__(self, weights):
            self.weights = weights

    @dataclass(frozen=True)
    class Scaled(InputMoment):
        scale: float = 1.0

    weights = torch.ones(3)
    assert InputMoment() == InputMoment() != OutputMoment()
    assert len({InputMoment(), InputMoment(), OutputMoment(), MeanInput(), MeanInput(2)}) == 4
    assert Power(1) == Power(1) != Power(2) and hash(Power(1)) == hash(Power(1))
    assert OfInput(weights) == OfInput(weights) != OfInput(torch.ones(3))
    assert Scaled(2.0) == Scaled(2.0) != Scaled() != InputMoment()
    with pytest.raises(AttributeError):
        MeanInput().groups = 3


def test_part_of_an_examples_output_vectors_is_refused_where_totals_do_not_add_up_over_them():
    (layer,) = layers("positions")
    part = layer.part(slice(None), slice(0, 1))
    with pytest.raises(BlockError, match=r"Doubled\(\) is a sum over whole examples"):
        Doubled().over(part)
