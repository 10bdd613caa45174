"""Functions that multiply a weight: their arguments as a `Product`, whichever module calls them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from fisherlab import doors
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
        scale: of an element-wise product the factor of the weight, as large as the output or 1.
        axis: of an element-wise product the output's axis where the weight starts; None: aligned
            with the last axes, as in broadcasting.
        features: the width of `x`, where the weight has more than two axes.
        turned: brings the output to rows of features, and such rows back.
        swapped: the same call with the roles of the two arguments exchanged.
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
    features: int | None = None
    turned: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] | None = None
    swapped: Product | None = None

    @property
    def plain(self) -> bool:
        """Whether it is `x W^T` or `x W` of rows, with a matrix or the kernel of a convolution."""
        return not self.elementwise and self.turned is None and self.features is None

    @property
    def elementwise(self) -> bool:
        """Whether the weight is a vector of factors, one per feature."""
        return self.scale is not None


Parser = Callable[..., "Product | None"]
# Parsers by function. A parser takes the function's own arguments; None is no product.
PRODUCTS: dict[Callable[..., Any], Parser] = {}


def parses(*functions: Callable[..., Any]) -> Callable[[Parser], Parser]:
    """Register a parser for some functions."""

    def register(parser: Parser) -> Parser:
        PRODUCTS.update(dict.fromkeys(functions, parser))
        return parser

    return register


def parsed(
    function: Callable[..., Any], args: Sequence[Any], names: Mapping[str, Any]
) -> Product | None:
    """The product that a call is; None where it is none, or in a form that no parser takes."""
    parse = PRODUCTS.get(function)
    if parse is None:
        return None
    try:
        return parse(*args, **names)
    except TypeError:
        try:
            inspect.signature(parse).bind(*args, **names)
        except TypeError:  # an argument `out`, a deprecated order
            return None
        raise


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

    if not callable(function):
        raise TypeError(f"function must be f(x, W, b), got {doors.said(function)}")

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


@parses(
    *(torch.matmul, torch.mm, torch.bmm),
    *(Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__, Tensor.__rmatmul__),
)
def _matmul(input: Tensor, other: Tensor | None = None, **names: Tensor) -> Product | None:
    """`x W`, or `W x` of columns `x`, for a matrix that may be the same for all of a batch."""
    other = names.get("mat2", other)
    if not isinstance(other, Tensor) or min(input.ndim, other.ndim) < 2:
        return None
    product = swapped = None
    if (right := _matrix(other)) is not None and input.ndim >= other.ndim:
        product = Product(input, right, flipped=True)
    if (left := _matrix(input)) is not None and other.ndim >= input.ndim:
        swapped = Product(other.mT, left, turned=(_transpose, _transpose))
    if product is None:
        return swapped
    product.swapped = swapped
    return product


def _transpose(x: Tensor) -> Tensor:
    return x.mT


def _matrix(weight: Tensor) -> Tensor | None:
    """The matrix that all of a stack are; None where they may differ, or where it is sparse."""
    if not doors.is_strided(weight):
        return None
    same = all(
        size == 1 or not step
        for size, step in zip(weight.shape[:-2], weight.stride()[:-2], strict=True)
    )
    return weight[(0,) * (weight.ndim - 2)] if same else None


@parses(torch.einsum)
def _einsum(equation: Any, *operands: Any) -> Product | None:
    """A contraction of two tensors whose weight has no letter in common with the rows."""
    if len(operands) == 1 and isinstance(operands[0], tuple | list):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or len(operands) != 2 or "->" not in equation:
        return None
    terms, out = equation.replace(" ", "").split("->")
    one, other = terms.split(",")
    product = _contraction(other, operands[1], one, operands[0], out)
    swapped = _contraction(one, operands[0], other, operands[1], out)
    if product is None:
        return swapped
    product.swapped = swapped
    return product


def _contraction(w: str, weight: Tensor, x: str, input: Tensor, out: str) -> Product | None:
    """The product for letters `w` of the weight, `x` of the input and `out` of the output."""
    if "..." in x:
        rest = "ABCDEFGH"[: input.ndim - len(x) + 3]
        x, out = x.replace("...", rest), out.replace("...", rest)
    rows = [letter for letter in x if letter not in w]
    i, o = [c for c in w if c in x], [c for c in w if c not in x]
    once = all(len(set(term)) == len(term) for term in (w, x, out))
    if not once or not i or not o or set(out) != {*rows, *o}:
        return None
    if w not in ("".join(i + o), "".join(o + i)):
        return None
    lead = len(rows)
    to = [out.index(letter) for letter in rows + o]
    back = [to.index(k) for k in range(len(to))]
    sizes = [weight.shape[w.index(letter)] for letter in o]
    rows_of_x = input.permute([x.index(letter) for letter in rows + i]).flatten(lead)
    turned = (
        lambda y: y.permute(to).flatten(lead),
        lambda y: y.unflatten(lead, sizes).permute(back),
    )
    return Product(
        rows_of_x,
        weight,
        flipped=w == "".join(i + o),
        features=rows_of_x.shape[-1] if weight.ndim > 2 else None,
        turned=None if len(o) == 1 and to == sorted(to) else turned,
    )


# Arguments of a convolution after `padding`, by whether it is transposed.
_REST = {False: ("dilation", "groups"), True: ("output_padding", "groups", "dilation")}


def _convolution(dims: int, transposed: bool) -> Parser:
    def parse(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        *rest: Any,
        **names: Any,
    ) -> Product | None:
        if input.ndim != dims + 2:
            return None
        names |= dict(zip(_REST[transposed], rest, strict=False))
        kernel, dilation = tuple(weight.shape[2:]), _each(names.get("dilation", 1), dims)
        if isinstance(padding, str):
            same = padding == "same"
            total = [d * (k - 1) * same for d, k in zip(dilation, kernel, strict=True)]
            sides = [(t // 2, t - t // 2) for t in total]
        else:
            sides = [(p, p) for p in _each(padding, dims)]
        flat = tuple(p for side in reversed(sides) for p in side)
        conv = Convolution(kernel, _each(stride, dims), dilation, flat)
        role: dict[str, Any] = (
            {"transposed": conv, "flipped": True} if transposed else {"conv": conv}
        )
        return Product(input, weight, bias, groups=names.get("groups", 1), **role)

    return parse


def _each(value: Any, dims: int) -> tuple[int, ...]:
    """A hyper-parameter as one number per axis."""
    given = tuple(value) if isinstance(value, tuple | list | torch.Size) else (value,)
    return given * dims if len(given) == 1 else given


for _dims in (1, 2, 3):
    PRODUCTS[getattr(F, f"conv{_dims}d")] = _convolution(_dims, False)
    PRODUCTS[getattr(F, f"conv_transpose{_dims}d")] = _convolution(_dims, True)


@parses(F.embedding)
def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Product | None:
    if scale_grad_by_freq:  # its gradient is none of the loss, and counts words over the batch
        return None
    skipped = -1 if padding_idx is None else padding_idx % len(weight)
    return Product(input, weight, flipped=True, lookup=skipped)


def _norm(function: Callable[..., Tensor], names: str, axis: int | None) -> Parser:
    """A normalisation with some arguments; the weight's factor is its result without weight."""

    def parse(*args: Any, **given: Any) -> Product | None:
        given |= dict(zip(names.split(), args, strict=False))
        x, weight, bias = given["input"], given.pop("weight", None), given.pop("bias", None)
        if given.get("training"):  # examples interact
            return None
        if given.get("use_input_stats"):  # which a second call would move
            given |= {"running_mean": None, "running_var": None}
        if weight is None:
            return None if bias is None else added(x, bias, axis)
        return Product(x, weight, bias, scale=lambda: function(**given), axis=axis)

    return parse


for _function, _names, _axis in (
    (F.layer_norm, "input normalized_shape weight bias eps", None),
    (F.rms_norm, "input normalized_shape weight eps", None),
    (F.group_norm, "input num_groups weight bias eps", 1),
    (F.batch_norm, "input running_mean running_var weight bias training momentum eps", 1),
    (
        F.instance_norm,
        "input running_mean running_var weight bias use_input_stats momentum eps",
        1,
    ),
):
    PRODUCTS[_function] = _norm(_function, _names, _axis)


@parses(F.prelu, torch.prelu)
def _prelu(input: Tensor, weight: Tensor) -> Product:
    axis = None if weight.numel() == 1 else 1
    return Product(input, weight, scale=lambda: input.clamp(max=0), axis=axis)


def added(x: Tensor, bias: Tensor, axis: int | None = None, factor: float = 1.0) -> Product:
    """A parameter that is added to `x`: an element-wise product with 1."""
    return Product(x, bias, scale=lambda: x.new_full((), factor), axis=axis)


@parses(torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__)
def _times(input: Any, other: Any) -> Product | None:
    """A factor per feature: LayerScale, a norm written by hand."""
    if not isinstance(input, Tensor) or not isinstance(other, Tensor):
        return None
    return Product(
        input, other, scale=lambda: input, swapped=Product(other, input, scale=lambda: other)
    )


@parses(torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__)
def _plus(input: Any, other: Any, *, alpha: float = 1.0) -> Product | None:
    """A parameter added to each example: a position's, a bias by hand."""
    if not isinstance(input, Tensor) or not isinstance(other, Tensor):
        return None
    product = added(input, other, factor=alpha)
    product.swapped = added(other, input)
    return product


@parses(torch.sub, Tensor.sub, Tensor.sub_, Tensor.__sub__, Tensor.__isub__)
def _minus(input: Any, other: Any, *, alpha: float = 1.0) -> Product | None:
    return _plus(input, other, alpha=-alpha)


@parses(Tensor.expand, Tensor.expand_as)
def _spread(input: Tensor, *sizes: Any) -> Product | None:
    """A parameter of one row that every example gets: a class token."""
    given = sizes[0] if len(sizes) == 1 else sizes
    wide = tuple(given.shape if isinstance(given, Tensor) else given)
    one_row = input.ndim == 1 or (input.ndim == len(wide) > 0 and input.shape[0] == 1)
    if not one_row or len(wide) < 2 or wide[0] in (1, -1):
        return None
    own = (1,) * (len(wide) - input.ndim) + input.shape
    size = [old if new == -1 else new for old, new in zip(own, wide, strict=True)]
    return Product(input.new_empty(()).expand(size), input, scale=lambda: input.new_ones(()))


_CASTS = frozenset("float double half bfloat16 to type type_as clone contiguous".split())
# Functions whose result is `s W + c` of a tensor W and numbers, and s, by name.
_AFFINE: dict[str, Callable[..., float]] = {
    **dict.fromkeys((*_CASTS, *"add __add__ __radd__ sub __sub__".split()), lambda *_: 1.0),
    **dict.fromkeys("rsub __rsub__ neg __neg__".split(), lambda *_: -1.0),
    **dict.fromkeys("mul __mul__ __rmul__".split(), lambda s: s),
    **dict.fromkeys("div __truediv__ true_divide".split(), lambda s: 1 / s),
}


def affine_of(
    func: Callable[..., Any], args: Sequence[Any], names: Mapping[str, Any]
) -> tuple[Tensor, float] | None:
    """The tensor W and the number s of a result `s W + c`; None where it is none."""
    factor = _AFFINE.get(getattr(func, "__name__", ""))
    if factor is None or not args or not isinstance(args[0], Tensor):
        return None
    W, *rest = args
    if func.__name__ in _CASTS:
        return W, 1.0
    numbers = not names and all(isinstance(value, int | float) and value for value in rest)
    return (W, factor(*rest)) if numbers else None
