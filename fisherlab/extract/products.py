"""Functions that multiply a weight: their arguments as a `Product`, whichever module calls them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from fisherlab.extract.geometry import Convolution


@dataclass
class Product:
    """One call of a function with a weight.

    Args:
        x: the input that the weight is multiplied with.
        weight: the weight, or a view of it.
        bias: what is added, or None.
        flipped: whether the function computes `x W` and not `x W^T`.
        conv: the hyper-parameters of a convolution.
        transposed: the hyper-parameters of a transposed convolution.
        lookup: of an embedding the index without gradient, or -1.
        groups: the groups of a convolution.
        scale: of an element-wise product the factor `x` of the weight, as large as the output.
        axis: of an element-wise product the output's axis where the weight starts; None: aligned
            with the last axes, as in broadcasting.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None = None
    flipped: bool = False
    conv: Convolution | None = None
    transposed: Convolution | None = None
    lookup: int | None = None
    groups: int = 1
    scale: Callable[[], Tensor] | None = None
    axis: int | None = None

    @property
    def elementwise(self) -> bool:
        """Whether the weight is a vector of factors, one per feature."""
        return self.scale is not None


Parser = Callable[..., "Product | None"]
# Parsers by function. A parser takes the function's own arguments; None is no product.
PRODUCTS: dict[Callable, Parser] = {}


def parses(*functions: Callable) -> Callable[[Parser], Parser]:
    """Register a parser for some functions."""

    def register(parser: Parser) -> Parser:
        PRODUCTS.update(dict.fromkeys(functions, parser))
        return parser

    return register


def register_product(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`f(x, W, b) = x W^T + b` of a user's own, which FisherLab then sees as a layer.

    Args:
        function: takes the input `[n, ..., i]`, a weight `[o, i]` and, if it has one, a bias `[o]`;
            an `autograd.Function`'s `apply`, a fused or quantised kernel.

    Returns:
        The function to call in its place; usable as a decorator.

    Example:
        >>> import torch, fisherlab as fl
        >>> @fl.register_product
        ... def scaled(x, weight, bias=None):
        ...     return x.matmul(weight.T) if bias is None else x.matmul(weight.T) + bias
    """

    @wraps(function)
    def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
        given = (x, weight) if bias is None else (x, weight, bias)
        if has_torch_function(given):
            return handle_torch_function(product, given, *given, **options)
        return function(*given, **options)

    PRODUCTS[product] = lambda x, weight, bias=None, **_: Product(x, weight, bias)
    return product


@parses(F.linear)
def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Product:
    return Product(input, weight, bias)


@parses(torch.addmm, Tensor.addmm)
def _addmm(
    input: Tensor,
    mat1: Tensor,
    mat2: Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
) -> Product | None:
    return Product(mat1, mat2, input, flipped=True) if beta == alpha == 1 else None


@parses(torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)
def _matmul(input: Tensor, other: Tensor | None = None, **names: Tensor) -> Product | None:
    other = names.get("mat2", other)
    if not isinstance(other, Tensor) or input.ndim < 2 or other.ndim != 2:
        return None
    return Product(input, other, flipped=True)


def _convolution(dims: int) -> Parser:
    def parse(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Product | None:
        if input.ndim != dims + 2:
            return None
        kernel, dilation = tuple(weight.shape[2:]), _each(dilation, dims)
        if isinstance(padding, str):
            same = padding == "same"
            total = [d * (k - 1) * same for d, k in zip(dilation, kernel, strict=True)]
            sides = [(t // 2, t - t // 2) for t in total]
        else:
            sides = [(p, p) for p in _each(padding, dims)]
        flat = tuple(p for side in reversed(sides) for p in side)
        conv = Convolution(kernel, _each(stride, dims), dilation, flat)
        return Product(input, weight, bias, conv=conv, groups=groups)

    return parse


def _transposed(dims: int) -> Parser:
    def parse(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Product | None:
        if input.ndim != dims + 2:
            return None
        flat = tuple(p for side in reversed(_each(padding, dims)) for p in (side, side))
        conv = Convolution(
            tuple(weight.shape[2:]), _each(stride, dims), _each(dilation, dims), flat
        )
        return Product(input, weight, bias, flipped=True, transposed=conv, groups=groups)

    return parse


def _each(value: Any, dims: int) -> tuple[int, ...]:
    """A hyper-parameter as one number per axis."""
    given = tuple(value) if isinstance(value, tuple | list | torch.Size) else (value,)
    return given * dims if len(given) == 1 else given


for _dims in (1, 2, 3):
    PRODUCTS[getattr(F, f"conv{_dims}d")] = _convolution(_dims)
    PRODUCTS[getattr(F, f"conv_transpose{_dims}d")] = _transposed(_dims)


@parses(F.embedding)
def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    *_: Any,
    **__: Any,
) -> Product:
    skipped = -1 if padding_idx is None else padding_idx % len(weight)
    return Product(input, weight, flipped=True, lookup=skipped)


@parses(F.layer_norm)
def _layer_norm(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Product | None:
    return _normed(
        input, weight, bias, None, lambda: F.layer_norm(input, normalized_shape, eps=eps)
    )


@parses(F.rms_norm)
def _rms_norm(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Product | None:
    return _normed(input, weight, None, None, lambda: F.rms_norm(input, normalized_shape, eps=eps))


@parses(F.group_norm)
def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Product | None:
    return _normed(input, weight, bias, 1, lambda: F.group_norm(input, num_groups, eps=eps))


@parses(F.batch_norm)
def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Product | None:
    if training:
        return None
    return _normed(
        input, weight, bias, 1, lambda: F.batch_norm(input, running_mean, running_var, eps=eps)
    )


def _normed(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    axis: int | None,
    scale: Callable[[], Tensor],
) -> Product | None:
    return None if weight is None else Product(x, weight, bias, scale=scale, axis=axis)


@parses(torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__)
def _times(input: Any, other: Any) -> Product | None:
    """A factor per feature: LayerScale, a norm written by hand. The weight is the smaller one."""
    if not isinstance(input, Tensor) or not isinstance(other, Tensor):
        return None
    weight, x = (input, other) if input.numel() < other.numel() else (other, input)
    return Product(x, weight, scale=lambda: x)
