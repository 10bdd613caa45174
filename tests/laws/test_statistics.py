"""Laws of every statistic: totals add up, and the cheaper views are views of the total."""

import inspect
from dataclasses import dataclass

import pytest
import torch

from fisherlab import statistics
from fisherlab.blocks import BlockError
from fisherlab.statistics import InputMoment, MeanInput, OutputMoment, Statistic
from fisherlab.testing import check_statistic
from fisherlab.testing.cases import captured

KINDS = [
    kind
    for _, kind in inspect.getmembers(statistics, inspect.isclass)
    if issubclass(kind, Statistic) and kind is not Statistic
]
# those of the mean gradient of a whole batch do not add up
ADDITIVE = [kind for kind in KINDS if not kind.__name__.startswith("Gradient")]


def close(one, two):
    return (one - two).norm() <= 1e-12 * two.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_laws(kind):
    report = check_statistic(kind(), additive=kind in ADDITIVE)
    assert all(len(layers) == 18 for layers in report.laws.values())


@pytest.mark.parametrize("case", ["thin", "thin positions", "thin conv"])
def test_few_rows_are_taken_where_they_are_few(case):
    layer = captured(case)
    views = [kind for kind in KINDS if kind.side and not kind.__name__.startswith("Gradient")]
    assert len(views) == 8 and all(kind().rows(layer) is not None for kind in views)
    layer = captured("full")
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
    layer = captured("thin")
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
    layer = captured("positions")
    part = layer.part(slice(None), slice(0, 1))
    with pytest.raises(BlockError, match=r"Doubled\(\) is a sum over whole examples"):
        Doubled().over(part)
