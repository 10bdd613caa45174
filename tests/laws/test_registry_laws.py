"""Laws of every registered approximation, so that a new file is tested by being there."""

import pytest

import fisherlab as fl
from fisherlab.testing import check_approximation
from fisherlab.testing.cases import FIRST, captured, problem
from fisherlab.testing.laws import near
from fisherlab.testing.statistics import parts_of

NAMES = [n for n in fl.approximations.names() if "pair" not in fl.approximations.get(n)().needs]
ADDITIVE = [name for name in NAMES if fl.approximations.get(name)().additive]
# The best sum of Kronecker products has negative eigenvalues; its powers leave them out.
INDEFINITE = {"kronecker_sum"}
# A root divides the rounding of an eigenvalue by twice its own root.
ROOTS = {"shampoo", "soap"}
# An alternation of a hundred steps for each of a dozen blocks.
SLOW = {"kl_optimal"}
FEW = ("full", "thin", "conv", "padded")


@pytest.mark.parametrize("name", NAMES)
def test_laws(name):
    layers = FEW if name in SLOW else tuple(FIRST)
    report = check_approximation(name, indefinite=name in INDEFINITE, layers=layers)
    assert len(report.laws) >= 9


@pytest.mark.parametrize("name", [name for name in ADDITIVE if name not in ROOTS])
def test_parts_of_a_batch_are_the_batch_to_the_last_digits(name):
    approximation = fl.approximations.get(name)()
    for kind in FIRST:
        layer = captured(kind)
        parts = parts_of(problem(kind), layer)
        whole = approximation(layer).dense()
        near(approximation(*parts).dense(), whole, whole.dtype, bound=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_each_has_its_name_and_its_words(name):
    kind = fl.approximations.get(name)
    assert kind.name == name and kind.__doc__
