"""The effect of an approximate block on a gradient: direction and quadratic-model decrease.

`d = -P g` is the approximate natural-gradient step, `P = (X + lambda I)^{-1}` unless a
preconditioner with the damping placed elsewhere is given; `d* = -(F + lambda I)^{-1} g` the exact
one; `q(d) = g.d + d^T (F + lambda I) d / 2` the quadratic model. `g` is the gradient of the mean
loss at the observed labels, `[o, i]`, whatever the Fisher type; `damping` is the absolute lambda.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fisherlab.blocks import Block
from fisherlab.blocks.numerics import dot, over
from fisherlab.metrics.entry import entered


@dataclass(frozen=True)
class Step:
    """One pair of steps and the inner products that every direction metric is made of."""

    ours: Tensor
    exact: Tensor
    slope: Tensor  # g.d
    curvature: Tensor  # d^T (F + lambda I) d
    exact_slope: Tensor  # g.d*, which is -g^T (F + lambda I)^{-1} g
    square: Tensor  # d.d
    exact_square: Tensor  # d*.d*
    beside: float = 0.0  # the part of both squares and of d.d* outside these tensors

    @classmethod
    def of(
        cls,
        ours: Tensor,
        exact: Tensor,
        gradient: Tensor,
        quadratic: Tensor,
        damping: float,
        beside: float = 0.0,
    ) -> Step:
        """From two steps that are known, and `d^T F d` of ours.

        `beside` is the square length of what the gradient has beside these coordinates, where both
        blocks are zero and both steps are `-g / damping`.
        """
        common = beside / damping**2 if beside else 0.0
        square, slope = dot(ours, ours) + common, damping * common
        slopes = (
            dot(gradient, ours) - slope,
            quadratic + damping * square,
            dot(gradient, exact) - slope,
        )
        return cls(ours, exact, *slopes, square, dot(exact, exact) + common, common)

    @property
    def cosine(self) -> Tensor:
        """`d.d* / (|d| |d*|)`."""
        size = self.square.sqrt() * self.exact_square.sqrt()
        product = dot(self.ours, self.exact) + self.beside
        return over(product, size, 1.0)

    @property
    def error(self) -> Tensor:
        """`|d - d*| / |d*|`."""
        difference = self.ours - self.exact
        return (dot(difference, difference) / self.exact_square.clamp(min=1e-300)).sqrt()

    @property
    def decrease(self) -> Tensor:
        """`q(d) / q(d*)`, negative where the step overshoots."""
        return _ratio(self.slope + self.curvature / 2, self.exact_slope / 2)

    @property
    def decrease_scaled(self) -> Tensor:
        """`(g.d)^2 / (d^T (F + lambda) d g^T (F + lambda)^{-1} g)` in [0, 1]: the best length."""
        return _ratio(self.slope.square(), -self.curvature * self.exact_slope)


@entered
def step(
    X: Block,
    F: Block,
    gradient: Tensor,
    damping: float,
    preconditioner: Block | None = None,
    exact: Tensor | None = None,
) -> Step:
    """`d = P g` and `d* = (F + damping I)^{-1} g`.

    `P g` divides the rounding of a float32 gradient by the damping; `fl.compare` keeps it out.

    Args:
        X: the approximation.
        F: the exact block, in the shape of `X`.
        gradient: `g` `[o, i]`, of the mean loss.
        damping: lambda, absolute, on the scale of `F`.
        preconditioner: `P`; None: `(X + damping I)^{-1}`.
        exact: `d*` `[o, i]`, if it is known.

    Returns:
        Both steps.
    """
    gradient = gradient.to(F.dtype)
    P = X.power(-1, damping) if preconditioner is None else preconditioner
    ours = -(P @ gradient)
    exact = -F.solve(gradient, damping) if exact is None else exact
    return Step.of(ours, exact, gradient, F.quadratic(ours), damping)


@entered
def direction_cosine(X: Block, F: Block, gradient: Tensor, damping: float) -> Tensor:
    """Cosine of `d = (X + damping I)^{-1} g` and `d* = (F + damping I)^{-1} g`.

    Args:
        X: the approximation.
        F: the exact block, in the shape of `X`.
        gradient: `g` `[o, i]`, of the mean loss.
        damping: lambda, absolute, on the scale of `F`.

    Returns:
        0-d float64.

    Example:
        >>> import torch
        >>> from fisherlab import blocks, metrics
        >>> F = blocks.Diagonal(torch.tensor([[3.0, 0.0]]))
        >>> X = blocks.Diagonal(torch.tensor([[0.0, 0.0]]))
        >>> g = torch.tensor([[4.0, 1.0]])
        >>> round(float(metrics.direction_cosine(X, F, g, damping=1.0)), 3)
        0.857
    """
    return step(X, F, gradient, damping).cosine


@entered
def direction_error(X: Block, F: Block, gradient: Tensor, damping: float) -> Tensor:
    """`|d - d*| / |d*|` of the natural-gradient steps of `X` and `F`.

    Args:
        X: the approximation.
        F: the exact block, in the shape of `X`.
        gradient: `g` `[o, i]`, of the mean loss.
        damping: lambda, absolute, on the scale of `F`.

    Returns:
        0-d float64.

    Example:
        >>> import torch
        >>> from fisherlab import blocks, metrics
        >>> F = blocks.Diagonal(torch.tensor([[3.0, 0.0]]))
        >>> X = blocks.Diagonal(torch.tensor([[0.0, 0.0]]))
        >>> g = torch.tensor([[4.0, 0.0]])
        >>> round(float(metrics.direction_error(X, F, g, damping=1.0)), 3)
        3.0
    """
    return step(X, F, gradient, damping).error


@entered
def quadratic_decrease(X: Block, F: Block, gradient: Tensor, damping: float) -> Tensor:
    """`q(d) / q(d*)`: 1 for the exact step, negative if the step overshoots.

    Args:
        X: the approximation.
        F: the exact block, in the shape of `X`.
        gradient: `g` `[o, i]`, of the mean loss.
        damping: lambda, absolute, on the scale of `F`.

    Returns:
        0-d float64.
    """
    return step(X, F, gradient, damping).decrease


@entered
def quadratic_decrease_scaled(X: Block, F: Block, gradient: Tensor, damping: float) -> Tensor:
    """The share of the exact decrease `q(d*)` at the best step length along `d`.

    Args:
        X: the approximation.
        F: the exact block, in the shape of `X`.
        gradient: `g` `[o, i]`, of the mean loss.
        damping: lambda, absolute, on the scale of `F`.

    Returns:
        0-d float64 in [0, 1].
    """
    return step(X, F, gradient, damping).decrease_scaled


def _ratio(value: Tensor, base: Tensor) -> Tensor:
    # a zero gradient asks for no step, and any preconditioner gives it
    return torch.where(base == 0, torch.ones_like(value), value / base)
