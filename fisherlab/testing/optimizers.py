"""Laws of an optimizer: its steps are determined, resumable, and those of its batch."""

from __future__ import annotations

import contextlib
import inspect
import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fisherlab.approximations import Approximation
from fisherlab.optim import NaturalGradient, create
from fisherlab.testing.laws import Report, Run, near, other_stream

Maker = Callable[[nn.Module], torch.optim.Optimizer]
STEPS = 3


def _perceptron() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 7), nn.Tanh(), nn.Linear(7, 3))


def _convolution() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3, bias=False)
    )


MODELS = {"perceptron": _perceptron, "convolution": _convolution}


@dataclass(frozen=True)
class Loop:
    """A plain training loop of an optimizer on one small model, in float64."""

    make: Maker
    kind: str

    def model(self) -> nn.Sequential:
        """The model at its start, the same at each call."""
        model = MODELS[self.kind]().double()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.rand(p.shape, generator=generator, dtype=torch.float64) - 0.5)
        return model

    def batch(self, step: int, n: int = 20) -> tuple[Tensor, Tensor]:
        """Images whose brightest third is their class."""
        generator = torch.Generator().manual_seed(100 + step)
        y = torch.randint(3, (n,), generator=generator)
        x = torch.randn(n, 1, 4, 4, generator=generator, dtype=torch.float64)
        x[torch.arange(n), 0, y] += 2
        return x, y

    def closure(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        x: Tensor,
        y: Tensor,
        parts: int = 1,
    ) -> Callable[[], Tensor]:
        """The loop's closure: the mean loss of a batch in `parts` backward passes."""

        def closure() -> Tensor:
            optimizer.zero_grad()
            total = torch.zeros((), dtype=torch.float64)
            for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
                loss = nn.functional.cross_entropy(model(a), b) / parts
                loss.backward()
                total += loss.detach()
            return total

        return closure

    def step(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, parts: int = 1
    ) -> Tensor:
        """One step with a closure, of a batch in `parts` backward passes; the loss before it."""
        loss = optimizer.step(self.closure(model, optimizer, *self.batch(step), parts))  # type: ignore[arg-type]
        assert loss is not None, "step(closure) returns None, not the closure's loss"
        return torch.as_tensor(loss)

    def trained(self, steps: int = STEPS) -> tuple[nn.Module, torch.optim.Optimizer, list[float]]:
        """The model after some steps, its optimizer, and the losses."""
        model = self.model()
        optimizer = self.make(model)
        return model, optimizer, [float(self.step(model, optimizer, k)) for k in range(steps)]

    # the laws

    def made(self) -> None:
        """Creation changes neither the parameters nor the mode nor torch's random stream."""
        model, untouched = self.model().eval(), self.model()
        stream = torch.get_rng_state()
        optimizer = self.make(model)
        assert isinstance(optimizer, torch.optim.Optimizer), (
            f"it is a {type(optimizer).__name__}, not a torch.optim.Optimizer"
        )
        assert torch.equal(_flat(model), _flat(untouched)), "creation changes the parameters"
        assert not model.training, "creation changes the training mode"
        assert torch.equal(stream, torch.get_rng_state()), "creation moves torch's random stream"

    def descends(self) -> None:
        """Within thirty steps on one batch its loss falls by a tenth; every parameter stays finite.

        It may rise again: on a fitted batch the empirical Fisher matrix vanishes faster than the
        gradient.
        """
        model = self.model()
        optimizer = self.make(model)
        losses = [float(self.step(model, optimizer, 0)) for _ in range(30)]
        assert torch.isfinite(_flat(model)).all(), "parameters have NaN or inf entries"
        assert min(losses) < 0.9 * losses[0], (
            f"the loss of one batch starts at {losses[0]:.4f}; the least of 30 steps is "
            f"{min(losses):.4f}"
        )

    def repeated(self) -> None:
        """The same run twice is the same, whatever torch's random stream."""
        one, _, _ = self.trained()
        with other_stream():
            other, _, _ = self.trained()
        assert torch.equal(_flat(one), _flat(other)), "two runs with the same data differ"

    def resumed(self) -> None:
        """A run saved after three steps and loaded into a new optimizer goes on as if unbroken."""
        model, optimizer, _ = self.trained()
        file = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        again = self.model()
        fresh = self.make(again)
        again.load_state_dict(saved["model"])
        fresh.load_state_dict(saved["optimizer"])
        for step in range(STEPS, 2 * STEPS):
            self.step(model, optimizer, step)
            self.step(again, fresh, step)
        near(_flat(again), _flat(model), torch.float64, bound=1e-12)

    def rests(self) -> None:
        """With `lr` 0 in every group, a step moves nothing."""
        model, optimizer, _ = self.trained()
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        before = _flat(model)
        self.step(model, optimizer, STEPS)
        assert torch.equal(before, _flat(model)), "a step of length 0 moves parameters"

    def accumulated(self) -> None:
        """A gradient is what the backward passes leave: two half batches are the batch."""
        flat = []
        for parts in (1, 2):
            model, optimizer, _ = self.trained(0)
            self.step(model, optimizer, 0, parts)
            flat.append(_flat(model))
        near(
            flat[1] - _flat(self.model()), flat[0] - _flat(self.model()), torch.float64, bound=1e-7
        )

    def preconditions(self) -> None:
        """It is no plain gradient step in disguise, where it says that it has blocks."""
        model = self.model()
        x, y = self.batch(0)
        loss = nn.functional.cross_entropy(model(x), y)
        gradient = torch.cat(
            [g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]
        )
        optimizer: Any = self.make(model)
        before = _flat(model)
        self.step(model, optimizer, 0)
        assert optimizer.covered_share > 0, "no parameter has a block"
        step = _flat(model) - before
        cosine = float(-step @ gradient / (step.norm() * gradient.norm()))
        assert cosine > 0, f"the step goes uphill: cosine {cosine:.3f} to the descent direction"
        assert cosine < 0.9999, f"the step is the gradient's: cosine {cosine:.6f}"

    def refuses(self) -> None:
        """A NaN in the data is refused before any parameter changes; the next batch works."""
        model, optimizer, _ = self.trained()
        before = _flat(model)
        x, y = self.batch(STEPS)

        with contextlib.suppress(RuntimeError):
            optimizer.step(self.closure(model, optimizer, x * float("nan"), y))  # type: ignore[arg-type]
        assert torch.equal(before, _flat(model)), "a NaN in the data changes parameters"
        self.step(model, optimizer, STEPS)
        assert torch.isfinite(_flat(model)).all(), "the step after a refused one is not finite"

    def leaves(self) -> None:
        """`remove()` takes everything off the model."""
        model, optimizer, _ = self.trained()
        optimizer.remove()  # type: ignore[attr-defined]
        assert not any(_hooks(model)), "remove() leaves hooks on the model"


def _hooks(model: nn.Module) -> list[Any]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [hook for m in model.modules() for kind in kinds for hook in getattr(m, kind).values()]


def _flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def check_optimizer(optimizer: str | Approximation | Maker, *, accumulates: bool = True) -> Report:
    """An optimizer on a small perceptron and a small convolutional net, in float64.

    Args:
        optimizer: A name that `fl.optim.create` knows; an approximation, which
            `fl.optim.NaturalGradient` then steps with; or a function that makes the optimizer of a
            model, `lambda model: MyOptimizer(model, lr=0.1)`.
        accumulates: False where each backward pass is a batch of its own, as in TENGraD and FNGD.

    Returns:
        The laws that hold. Laws about blocks apply only to optimizers with a `covered_share`.

    Raises:
        LawError: a law is broken; the message lists each with its figures.
        TypeError: `optimizer` is none of the three.
    """
    make, what = _maker(optimizer)
    run = Run(what)
    for kind in MODELS:
        loop = Loop(make, kind)
        if not run.law("creation changes nothing", kind, loop.made):
            continue
        run.law("the loss falls", kind, loop.descends)
        run.law("a run is repeatable", kind, loop.repeated)
        run.law("a run is resumable", kind, loop.resumed)
        run.law("a learning rate of 0 is no step", kind, loop.rests)
        if hasattr(make(loop.model()), "covered_share"):
            if accumulates:
                run.law("two half batches are the batch", kind, loop.accumulated)
            run.law("no gradient step in disguise", kind, loop.preconditions)
            run.law("a NaN changes nothing", kind, loop.refuses)
            run.law("the model can be left alone", kind, loop.leaves)
    return run.report()


def _maker(optimizer: str | Approximation | Maker) -> tuple[Maker, str]:
    if isinstance(optimizer, str):
        return partial(create, optimizer), optimizer
    if isinstance(optimizer, Approximation):
        options = {"criterion": nn.CrossEntropyLoss(), "lr": 0.03, "damping": 0.1}
        made = partial(NaturalGradient, approximation=optimizer, **options)  # type: ignore[arg-type]
        return made, f"NaturalGradient with {optimizer!r}"
    if callable(optimizer) and not inspect.isclass(optimizer):
        return optimizer, getattr(optimizer, "__name__", repr(optimizer))
    raise TypeError(
        "check_optimizer takes a name, an approximation such as fl.KFAC(), or a function of the "
        f"model that makes the optimizer; got {optimizer!r}"
    )
