"""Laws of an approximation: one block, whichever way it is made, measured and stepped with."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fisherlab import approximations as registry
from fisherlab.approximations import Approximation, Memo, Running
from fisherlab.approximations.exact import Exact
from fisherlab.blocks import Block
from fisherlab.comparison import compare
from fisherlab.extract import LayerCapture
from fisherlab.names import unknown
from fisherlab.testing.blocks import LAWS
from fisherlab.testing.cases import FIRST, Problem, captured, problem
from fisherlab.testing.laws import Report, Run, near, unchanged
from fisherlab.testing.statistics import bare, parts_of, tensors

DAMPING = 0.1
# An approximation, or any function of a capture that returns its block.
Method = Approximation | Callable[..., Block]
Reference = Callable[[LayerCapture], Tensor]


@dataclass(frozen=True)
class Tried:
    """A method on one layer."""

    method: Method
    found: Problem
    layer: LayerCapture
    indefinite: bool

    def dense(self) -> Tensor:
        """Its block of the whole batch, as a matrix."""
        return self.method(self.layer).dense()

    def built(self) -> None:
        """A block of the layer's shape and precision, finite."""
        block = self.method(self.layer)
        assert isinstance(block, Block), f"it returned a {type(block).__name__}, not a Block"
        assert block.shape == self.layer.shape, (
            f"its shape is {tuple(block.shape)} on a layer {self.layer.shape} (o, i with the bias)"
        )
        assert block.dtype == self.layer.dtype, (
            f"it is {block.dtype} where the capture is {self.layer.dtype}"
        )
        assert torch.isfinite(block.dense()).all(), "it has NaN or inf entries"

    def symmetric(self) -> None:
        """Symmetric, and positive semi-definite unless it is said to be indefinite."""
        F = self.dense()
        near(F.mT, F, F.dtype, bound=1e-12)
        values = torch.linalg.eigvalsh(F)
        assert values[-1] > 0, "it has no positive eigenvalue"
        if not self.indefinite:
            assert values[0] > -1e-10 * values[-1], (
                f"its smallest eigenvalue is {values[0]:.2e}, its largest {values[-1]:.2e}; pass "
                "indefinite=True if that is meant"
            )

    def again(self) -> None:
        """The same block again; the capture as it was."""
        unchanged(self.dense, tensors(self.layer), "blocks")

    def is_reference(self, reference: Reference) -> None:
        """The block is the formula's."""
        near(self.dense(), reference(self.layer), self.layer.dtype)

    def bare(self) -> None:
        """The block of a capture that holds `needs` alone."""
        assert isinstance(self.method, Approximation)
        block = self.method(bare(self.layer, self.method.needs))
        near(block.dense(), self.dense(), self.layer.dtype)

    def chunks(self) -> None:
        """Parts of the batch, the batch under a memory budget, parts captured apart, it twice."""
        assert isinstance(self.method, Approximation)
        whole, parts = self.dense(), parts_of(self.found, self.layer)
        near(self.method(*parts).dense(), whole, whole.dtype)
        near(self.method(self.layer, self.layer).dense(), whole, whole.dtype)
        budget = self.layer.positions * sum(self.layer.shape) * self.layer.dtype.itemsize
        near(Memo([self.layer], budget).block(self.method).dense(), whole, whole.dtype)
        n = len(self.found.x)
        apart = [self.found.captured(slice(0, n // 2)), self.found.captured(slice(n // 2, n))]
        near(self.method(*apart).dense(), whole, whole.dtype)

    def running(self) -> None:
        """Running means that have seen the batch, at once or in parts."""
        assert isinstance(self.method, Approximation)
        for parts in ([self.layer], parts_of(self.found, self.layer)):
            running = Running(self.method, decay=0.0)
            running.update(*parts)
            running.refresh_basis()
            running.correct(*parts)
            near(running.block().dense(), self.dense(), self.layer.dtype)

    def remembered(self) -> None:
        """Running means with a past: `(decay S_1 + S_2) / (decay n_1 + n_2)` for each sum."""
        assert isinstance(self.method, Approximation)
        parts = parts_of(self.found, self.layer)
        running = Running(self.method, decay=0.5)
        for part in parts:
            running.update(part)
        for key, S in running.statistics.items():
            expected = torch.zeros_like(running.sums[key])
            for part in parts:
                expected = 0.5 * expected + S.over(part)
            near(running.sums[key], expected, self.layer.dtype)
        again = Running(self.method, decay=0.5)
        again.load_state_dict(running.state_dict())
        running.refresh_basis()
        again.refresh_basis()
        running.correct(parts[-1])
        again.correct(parts[-1])
        assert torch.equal(running.block().dense(), again.block().dense()), (
            "a block of a restored state differs"
        )

    def damped(self) -> None:
        """The preconditioner is symmetric, positive definite, and no larger at larger damping."""
        assert isinstance(self.method, Approximation)
        block, last = self.method(self.layer), math.inf
        for damping in (DAMPING, 100 * DAMPING):
            P = self.method.damped(block, damping).dense()
            assert torch.isfinite(P).all(), f"at damping {damping} it has NaN or inf entries"
            near(P.mT, P, P.dtype)
            values = torch.linalg.eigvalsh(P)
            assert values[0] > 0, f"at damping {damping} its smallest eigenvalue is {values[0]:.2e}"
            size = float(values[-1])
            assert size < last, f"damping {damping} makes it larger: {size:.3e} after {last:.3e}"
            last = size

    def measured(self) -> None:
        """The table's numbers are those of the dense matrices."""
        found, method, X = self.found, self.method, self.method(self.layer)
        row = (
            compare(
                found.model,
                found.criterion,
                found.x,
                found.y,
                layers=["0"],
                approximations={"method": method},
                dampings=[DAMPING],
                progress=list,  # no bar: the whole is one check
            )
            .frame.query("approximation == 'method'")
            .iloc[0]
        )
        F, B = Exact()(self.layer).dense(), X.dense()
        error = float((B - F).norm() / F.norm())
        _equal("relative_error", row.relative_error, error, 1e-7 * (1 + error))
        _equal("trace_ratio", row.trace_ratio, float(B.trace() / F.trace()), 1e-9)
        damping = float(row.damping)
        # a root is measured as the approximation of F that its square makes
        inverse = isinstance(method, Approximation) and method.exponent == -1
        P = method.damped(X, damping) if inverse else X.power(-1, damping)
        g = self.layer.gradient.flatten()
        ours = P.dense() @ g
        exact = torch.linalg.solve(F + damping * torch.eye(len(F), dtype=F.dtype), g)
        cosine = float(ours @ exact / (ours.norm() * exact.norm()))
        _equal("direction_cosine", row.direction_cosine, cosine, 1e-7)

    def stepped(self) -> None:
        """One step of the optimizer is `-lr P g` with the block of the capture."""
        from fisherlab.optim import NaturalGradient

        assert isinstance(self.method, Approximation)
        found = self.found
        model = copy.deepcopy(found.model)
        optimizer = NaturalGradient(
            model,
            self.method,
            criterion=found.criterion,
            fisher_type="exact",
            lr=0.1,
            momentum=0.0,
            damping=DAMPING,
        )
        before = _weight(model)
        found.criterion(model(found.x), found.y).backward()
        gradient = _weight(model, grad=True)
        optimizer.step()
        near(optimizer.blocks()["0"].dense(), self.dense(), self.layer.dtype)
        P = self.method.damped(self.method(self.layer), DAMPING)
        near(_weight(model) - before, -0.1 * (P @ gradient), self.layer.dtype, bound=1e-9)
        optimizer.remove()


def _equal(column: str, found: float, expected: float, bound: float) -> None:
    assert abs(found - expected) <= bound, (
        f"the column {column} has {found:.12g}; dense matrices give {expected:.12g}"
    )


def _weight(model: torch.nn.Sequential, grad: bool = False) -> Tensor:
    """`[weight | bias]` of the first layer, or its gradient."""
    first = model[0]
    held = [p for p in (first.weight, first.bias) if isinstance(p, Tensor)]
    values = [(p.grad if grad else p.detach().clone()) for p in held]
    return torch.cat(
        [v.flatten(1) if v.ndim > 1 else v[:, None] for v in values if v is not None], 1
    )


def _one_value(method: Approximation) -> None:
    assert method == copy.deepcopy(method), "it differs from its own copy"
    assert hash(method) == hash(copy.deepcopy(method)), "its copy hashes differently"


def _float32(one: Tried, exact: Tried) -> None:
    one.built()
    near(one.dense(), exact.dense(), torch.float32, bound=2e-3)


def check_approximation(
    approximation: str | type[Approximation] | Method,
    reference: Reference | None = None,
    *,
    indefinite: bool = False,
    layers: tuple[str, ...] = tuple(FIRST),
) -> Report:
    """A method on thin and full layers, positions, convolutions, groups and padding.

    The block of one batch, of chunks, of running means, of `fl.compare` and of the optimizer is
    one block, in float64 to 1e-10.

    Args:
        approximation: An instance, a class or a registered name; or a function of a capture that
            returns a block, which is tested for what needs no sums.
        reference: The matrix `[o i, o i]` in float64 that the block of a capture ought to be; the
            method's formula, written without FisherLab's blocks.
        indefinite: Whether negative eigenvalues are meant, as those of the best Kronecker sum.
        layers: Kinds of layers, of "full", "thin", "positions", "thin positions", "conv",
            "thin conv", "groups", "padded" and "no bias".

    Returns:
        The laws that hold, with the layers.

    Raises:
        LawError: a law is broken; the message lists each with its figures.
        TypeError: `approximation` is no method.
        ValueError: a name, of the approximation or of a kind of layers, is unknown.
    """
    method: Any = registry.get(approximation) if isinstance(approximation, str) else approximation
    method = method() if isinstance(method, type) else method
    if not callable(method):
        raise TypeError(
            f"check_approximation takes an approximation, its name or a function of a capture; got "
            f"{approximation!r}"
        )
    strange = [kind for kind in layers if kind not in FIRST]
    if strange:
        raise ValueError(unknown("kind of layers", strange[0], FIRST))
    named = isinstance(method, Approximation)
    run = Run(repr(method) if named else getattr(method, "__name__", repr(method)))
    if named:
        run.law("equal to its copy", "", _one_value, method)
    for kind in layers:
        found = problem(kind)
        one, where = Tried(method, found, captured(kind), indefinite), found.label
        if not run.law("a finite block of the layer's shape", where, one.built):
            continue
        run.law("symmetric and positive", where, one.symmetric)
        run.law("the same again, the capture unchanged", where, one.again)
        if reference is not None:
            run.law("the formula's matrix", where, one.is_reference, reference)
        if kind != "groups":
            run.law("compare measures it", where, one.measured)
        if not named:
            continue
        run.law("a damped inverse", where, one.damped)
        run.law("it reads what `needs` names", where, one.bare)
        if method.additive or method.recursive:
            run.law("parts of a batch are the batch", where, one.chunks)
            run.law("running means of a batch are the batch's", where, one.running)
        if method.additive:
            run.law("running means decay once per batch", where, one.remembered)
        if kind != "groups" and kind != "padded":
            run.law("the optimizer steps with it", where, one.stepped)
        single = Tried(
            method, problem(kind, torch.float32), captured(kind, torch.float32), indefinite
        )
        run.law("float32 is float64 rounded", single.found.label, _float32, single, one)
    if not indefinite and "full" in layers:
        block = method(captured("full"))
        for name, law in LAWS.items():
            run.law(f"its block: {name}", "full, float64", law, block, block.dense(), torch.float64)
    return run.report()
