"""`TABLE`: every architecture by name, with what is expected of a capture of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from architectures.packages import package

# Standard deviation of what is added to every weight.
NOISE = 0.1


@dataclass(frozen=True)
class Problem:
    """A model with a batch: `criterion(forward(model, x), y)` is its loss.

    Args:
        model: in evaluation mode, float64, tiny.
        x: a tensor, a tuple or a dict of the model's arguments; the first axis is the example.
        y: the labels.
        criterion: a loss module.
        forward: how the model is called and which of its outputs counts; None for `model(x)`.
    """

    model: nn.Module
    x: Any
    y: Tensor
    criterion: nn.Module
    forward: Callable[[nn.Module, Any], Tensor] | None = None

    def outputs(self, x: Any) -> Tensor:
        """The outputs for a batch, or for some of its examples."""
        found = self.model(x) if self.forward is None else self.forward(self.model, x)
        return getattr(found, "logits", found)


@dataclass(frozen=True)
class Architecture:
    """How to build a problem, and the least share of parameters that must have a block.

    Args:
        name: as its paper or its package calls it.
        build: makes the model and a batch.
        share: the least share of the trainable parameters that have a block.
        exact: whether the exact Fisher type is checked, which takes outputs of few classes; else
            labels are drawn.
        float32: whether it normalises in float32, whatever the dtype of its input.
        cast: ends of the names of parameters that it casts to float32.
        quick: whether it belongs to the default run.
        packages: what it needs beside torch.
    """

    name: str
    build: Callable[..., Problem]
    share: float
    exact: bool = False
    float32: bool = False
    cast: tuple[str, ...] = ()
    quick: bool = False
    packages: tuple[str, ...] = ()

    @property
    def tolerance(self) -> float:
        """The relative error of gradients whose output vectors are equal to rounding."""
        return 1e-5 if self.float32 else 1e-10

    def problem(self, seed: int = 0) -> Problem:
        """The problem; the test is skipped where a package is absent."""
        modules = [package(name) for name in self.packages]
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a package about itself
            made = self.build(*modules)
        made.model.double().eval()
        with torch.no_grad():  # zeros and ones of an initialisation hide what is behind them
            for parameter in made.model.parameters():
                parameter += NOISE * torch.randn_like(parameter)
        return made


TABLE: dict[str, Architecture] = {}


def architecture(name: str, **options: Any) -> Callable:
    """Puts the problem that a function builds into the table."""

    def listed(build: Callable[..., Problem]) -> Callable[..., Problem]:
        assert name not in TABLE, name
        TABLE[name] = Architecture(name, build, **options)
        return build

    return listed
