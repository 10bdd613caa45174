"""The kit of laws: what is right passes, and each wrong one of a pair is told by its law."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import fisherlab as fl
from fisherlab.approximations import Approximation
from fisherlab.blocks import Dense, Diagonal, Kronecker
from fisherlab.statistics import InputMoment, LeftMoment, OutputMoment, Squares, Statistic
from fisherlab.testing import (
    LawError,
    check_approximation,
    check_block,
    check_optimizer,
    check_statistic,
)

QUICK = ("full", "thin", "positions")


def told(check, *args, **options):
    """The names of the laws that a check says are broken."""
    with pytest.raises(LawError) as error:
        check(*args, **options)
    return {line[2:].split(", on ")[0].split(":")[0] for line in str(error.value).splitlines()[1:]}


# statistics: the right one, and what a slip makes of it -------------------------------------------


class Ridge(Statistic):
    """The inputs' moment with a prior for each example, which the inputs do not span."""

    side = "input"

    def total(self, layer):
        A = InputMoment().total(layer)
        return A + 0.5 * layer.examples * torch.eye(len(A), dtype=A.dtype)


class RidgeOnce(Ridge):
    def total(self, layer):  # the prior is added per batch
        A = InputMoment().total(layer)
        return A + 0.5 * torch.eye(len(A), dtype=A.dtype)


class Mean(Ridge):
    def total(self, layer):  # divided by the examples of the chunk
        return InputMoment().total(layer) / len(layer.raw_inputs[0])


class WrongRows(InputMoment):
    def total(self, layer):
        return 2 * super().total(layer)

    def rows(self, layer):  # the rows of the sum that was replaced
        return InputMoment().rows(layer)


class WrongDiagonal(InputMoment):
    def total(self, layer):
        return 2 * super().total(layer)

    def diagonal(self, layer):
        return InputMoment().diagonal(layer)


class NotItsSide(OutputMoment):
    side = "input"


class Uncounted(Ridge):
    needs = frozenset({"inputs"})

    def total(self, layer):  # reads what it does not name
        return (
            layer.inputs.flatten(0, 1).mT
            @ layer.inputs.flatten(0, 1)
            * (layer.output_gradients.square().sum())
        )


class Changing(Ridge):
    def total(self, layer):
        layer.raw_inputs[0].mul_(1.0000001)
        return super().total(layer)


class Random(Ridge):
    def total(self, layer):
        return super().total(layer) * (1 + 1e-3 * torch.rand(()).to(layer.dtype))


class Columnwise(Ridge):
    columnwise = True

    def total(self, layer):  # a square of a sum over the output vectors
        g = layer.output_gradients.sum(0)
        return layer.input_moment * g.square().sum()


def test_a_right_statistic_passes():
    report = check_statistic(Ridge())
    assert "Ridge" in str(report) and "it adds up over examples, on 18 layers" in str(report)


@pytest.mark.parametrize(
    ("statistic", "law"),
    [
        (RidgeOnce(), "it adds up over examples"),
        (Mean(), "it adds up over examples"),
        (WrongRows(), "views are views of the total"),
        (WrongDiagonal(), "views are views of the total"),
        (NotItsSide(), "a finite total in the capture's precision"),
        (Uncounted(), "it reads what `needs` names"),
        (Random(), "the same again, the capture unchanged"),
        (Columnwise(), "it adds up over output vectors"),
    ],
)
def test_a_wrong_statistic_is_told_by_its_law(statistic, law):
    assert law in told(check_statistic, statistic)


def test_a_statistic_that_changes_the_capture_is_told_and_leaves_the_kit_clean():
    assert "the same again, the capture unchanged" in told(check_statistic, Changing())
    check_statistic(Ridge())


# approximations -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Neuron(Approximation):
    """`F ~ diag(v) (x) I`, v the mean of the exact diagonal over each output's weights."""

    squares: Statistic = Squares()

    def block(self, mean, shape):
        squares = mean(self.squares)
        return Diagonal(squares.mean(1, keepdim=True).expand_as(squares).clone())


def neuron_by_hand(layer):
    a, g = layer.inputs, layer.output_gradients
    D = torch.einsum("mnto,nti->mnoi", g, a)
    squares = D.square().sum((0, 1)) / layer.examples
    return squares.mean(1, keepdim=True).expand_as(squares).flatten().diag()


@dataclass(frozen=True)
class ThreeSums(Approximation):
    """KFAC and a multiple of the identity, the mean eigenvalue of `sum D D^T`."""

    A: Statistic = Ridge()
    G: Statistic = OutputMoment()
    left: Statistic = LeftMoment()

    def block(self, mean, shape):
        F = torch.kron(mean(self.G), mean(self.A))
        share = mean(self.left).trace() / len(F)
        return Dense(F + share * torch.eye(len(F), dtype=F.dtype), shape)


class Remembering(Neuron):
    """A block that depends on how often it was asked for."""

    def block(self, mean, shape):
        object.__setattr__(self, "asked", getattr(self, "asked", 0) + 1)
        return Diagonal(super().block(mean, shape).entries * self.asked)


class WithoutBias(Neuron):
    def block(self, mean, shape):
        return Diagonal(mean(self.squares)[:, :-1].clone())


class Negative(Neuron):
    def block(self, mean, shape):
        return Diagonal(super().block(mean, shape).entries - 1.0)


class Counting(Neuron):
    """A block that grows with the number of examples."""

    def block(self, mean, shape):
        return Diagonal(super().block(mean, shape).entries * mean.count)


class Doubling(Neuron):
    """In float32 alone."""

    def block(self, mean, shape):
        entries = super().block(mean, shape).entries
        return Diagonal(entries * (2 if entries.dtype == torch.float32 else 1))


class OwnDamping(Neuron):
    def damped(self, block, damping):
        return block.power(-1, damping * block.trace().item() / block.size)


class Undamped(Neuron):
    """Its damping has no effect."""

    def damped(self, block, damping):
        return block.power(-1, 1e-3)


class OfBatch(Approximation):
    """Says that it is a sum, and is not."""

    G: Statistic = OutputMoment()
    A: Statistic = Mean()

    def block(self, mean, shape):
        return Kronecker(mean(self.G), mean(self.A))


def test_right_methods_pass():
    report = check_approximation(Neuron(), neuron_by_hand)
    assert "Neuron" in str(report) and "the formula's matrix, on 9 layers" in str(report)
    for method in (ThreeSums(), fl.KFAC(A=Ridge()), OwnDamping()):
        check_approximation(method, layers=QUICK)


@pytest.mark.parametrize(
    ("method", "law"),
    [
        (Remembering(), "the same again, the capture unchanged"),
        (WithoutBias(), "a finite block of the layer's shape"),
        (Negative(), "symmetric and positive"),
        (Doubling(), "float32 is float64 rounded"),
        (Undamped(), "a damped inverse"),
        (OfBatch(), "parts of a batch are the batch"),
        (Counting(), "parts of a batch are the batch"),
        (fl.KFAC(A=WrongRows()), "parts of a batch are the batch"),
        (fl.KFAC(A=RidgeOnce()), "parts of a batch are the batch"),
    ],
)
def test_a_wrong_method_is_told_by_its_law(method, law):
    assert law in told(check_approximation, method, layers=QUICK)


def test_a_method_that_is_not_its_formula_is_told():
    def half(layer):
        return neuron_by_hand(layer) / 2

    assert "the formula's matrix" in told(check_approximation, Neuron(), half, layers=("thin",))


def test_a_function_of_a_capture_is_tried_as_far_as_it_goes():
    def identity(layer):
        return Diagonal(torch.ones(layer.shape, dtype=layer.dtype))

    def noisy(layer):
        return Diagonal(1 + torch.rand(layer.shape, dtype=layer.dtype))

    assert "compare measures it" in str(check_approximation(identity, layers=QUICK))
    assert "the same again, the capture unchanged" in told(check_approximation, noisy, layers=QUICK)


# blocks -------------------------------------------------------------------------------------------


class WrongTrace(Diagonal):
    def trace(self):
        return 2 * super().trace()


class WrongInverse(Diagonal):
    def power(self, exponent, damping=0.0):
        return super().power(exponent, 1.1 * damping)


@pytest.mark.parametrize(("kind", "law"), [(WrongTrace, "scalars"), (WrongInverse, "power")])
def test_a_wrong_block_is_told_by_its_law(kind, law):
    entries = 1 + torch.arange(6, dtype=torch.float64).view(2, 3)
    check_block(Diagonal(entries), entries.flatten().diag())
    assert law in told(check_block, kind(entries))
    assert "dense" in told(check_block, Diagonal(entries), 2 * entries.flatten().diag())


# optimizers ---------------------------------------------------------------------------------------

# a backward pass weighs its own examples
OWN_BATCH = {"tengrad", "ngd_smw", "fngd"}


@pytest.mark.parametrize("name", fl.optim.names())
def test_every_optimizer_keeps_the_laws(name):
    check_optimizer(name, accumulates=name not in OWN_BATCH)


class Forgetful(torch.optim.SGD):
    """Its momentum is not in its state."""

    def state_dict(self):
        return {**super().state_dict(), "state": {}}


class Careless(torch.optim.SGD):
    covered_share = 1.0

    def remove(self):
        """Nothing to remove."""


class Touching(torch.optim.SGD):
    def __init__(self, model, lr):
        super().__init__(model.parameters(), lr=lr, momentum=0.9)
        nn.init.zeros_(next(model.parameters()))


@pytest.mark.parametrize(
    ("make", "law"),
    [
        (lambda m: Forgetful(m.parameters(), 0.1, momentum=0.9), "a run is resumable"),
        (lambda m: Careless(m.parameters(), 0.1), "no gradient step in disguise"),
        (lambda m: Careless(m.parameters(), 0.1), "a NaN changes nothing"),
        (lambda m: Touching(m, 0.1), "creation changes nothing"),
        (lambda m: torch.optim.SGD(m.parameters(), 1e-9), "the loss falls"),
    ],
)
def test_a_wrong_optimizer_is_told_by_its_law(make, law):
    assert law in told(check_optimizer, make)


def test_what_is_not_in_the_kit_is_refused_by_name():
    with pytest.raises(TypeError, match=r"takes an instance such as InputMoment\(\)"):
        check_statistic(InputMoment)
    with pytest.raises(TypeError, match=r"a function of the model"):
        check_optimizer(torch.optim.SGD)
    with pytest.raises(TypeError, match="a function of a capture; got 3"):
        check_approximation(3)
    with pytest.raises(ValueError, match="unknown kind of layers 'convs'; did you mean 'conv'"):
        check_approximation(fl.KFAC(), layers=("convs",))
    with pytest.raises(TypeError, match="takes a fisherlab.blocks.Block, got int"):
        check_block(3)
    with pytest.raises(ValueError, match=r"matrix is \[6, 6\] .* got \[2, 3\]"):
        check_block(Diagonal(torch.ones(2, 3)), torch.ones(2, 3))
    check_optimizer(fl.KFAC())
