"""`Tape`: the products of a model's weights in one forward pass, whichever module computes them.

The tape stands at the level of functions: `F.linear`, convolutions, `torch.addmm`, embeddings,
normalisations. A weight is known by the parameter object, of which a product may use all, some rows
(a fused projection), or the transpose. Every other use of a weight is noted with its function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from fisherlab.extract.geometry import CaptureError, Geometry
from fisherlab.extract.products import PRODUCTS, Product
from fisherlab.extract.slopes import Slopes, slopes

# torch's own attention asks for a mode at its door only. This copy does not ask, so that the linear
# maps inside are seen.
_ATTENTION = FunctionType(
    F.multi_head_attention_forward.__code__,
    {**vars(F), "has_torch_function": lambda _: False},
    F.multi_head_attention_forward.__name__,
    F.multi_head_attention_forward.__defaults__,
)
_ATTENTION.__kwdefaults__ = F.multi_head_attention_forward.__kwdefaults__


# Kinds of products: linear maps and convolutions, embeddings, vectors of factors (normalisations).
KINDS = ("map", "embedding", "factors")


@dataclass(eq=False)
class Use:
    """One product of a weight: where, with what geometry, and which bias it adds."""

    name: str
    geometry: Geometry
    bias: Tensor | None
    product: Product
    function: str

    @property
    def kind(self) -> str:
        """One of `KINDS`."""
        if self.product.elementwise:
            return "factors"
        return "map" if self.geometry.lookup is None else "embedding"


@dataclass(eq=False)
class Call:
    """A product in the form that assembles into a capture."""

    geometry: Geometry
    bias: Tensor | None
    raw_input: Tensor
    weight_shape: tuple[int, ...]
    output: Tensor | None = None
    # of an element-wise product: the factor of the weight, and the axis where the weight starts
    scale: Tensor | None = None
    axis: int | None = None
    # the example of every row, where the first axis is not the example; -1: no example
    examples: Tensor | None = None

    @property
    def is_map(self) -> bool:
        """Whether it is a linear map or a convolution."""
        return self.scale is None and self.geometry.lookup is None


@dataclass(eq=False)
class Recorded(Call):
    """A call of a capture: the edge behind its output, and the gradients that arrive there."""

    edge: GradientEdge = field(kw_only=True)
    output: Tensor = field(kw_only=True)
    input_version: int = field(kw_only=True)
    slopes: Slopes | None = None
    # what arrived at the output: the loss gradient, and every column of the Fisher
    label_gradient: Tensor = field(init=False)
    gradients: Tensor = field(init=False)


class Tape(TorchFunctionMode):
    """Calls `record(use, output)` for every product of a tracked weight while it is entered.

    Args:
        weights: the tracked tensors by name.
        record: gets each use and its output, and returns the output or a tensor in its place.
    """

    def __init__(
        self, weights: Mapping[str, Tensor], record: Callable[[Use, Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.weights, self.record = dict(weights), record
        self._names = {id(weight): name for name, weight in self.weights.items()}
        # by name: the functions that use a weight in another way
        self.others: dict[str, set[str]] = {}
        # the weights and biases of products whose outputs carry no graph
        self.without_graph: set[str] = set()
        # by name of a bias: the weight whose products add it
        self.added: dict[str, str] = {}

    def __torch_function__(
        self, func: Callable, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """The function's own result; its use of a weight is noted."""
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            with self:
                return _ATTENTION(*args, **kwargs)
        # an activation may overwrite what it reads, and a product is parsed before it is run
        parse = PRODUCTS.get(func)
        use = None if parse is None else self._use(func, parse(*args, **kwargs))
        out = func(*args, **kwargs)
        if use is not None and isinstance(out, Tensor):
            bias = self.name(use.bias)
            if bias is not None:
                self.added.setdefault(bias, use.name)
            if not out.requires_grad:
                self.without_graph |= {use.name, bias or use.name}
                return out
            self._note(func, (use.product.x,))
            if use.bias is None and use.product.bias is not None:
                self._note(func, (use.product.bias,), " as a bias of several or no single weight")
            return self.record(use, out)
        if self._is_new(out):
            self._note(func, (*args, *kwargs.values()))
        return out

    def name(self, tensor: object) -> str | None:
        """The name of the tracked weight that a tensor is, or is a view of."""
        if not isinstance(tensor, Tensor):
            return None
        name = self._names.get(id(tensor))
        if name is not None or tensor._base is None:
            return name
        return self._names.get(id(tensor._base))

    def _is_new(self, out: object) -> bool:
        """Whether a result depends on something trainable; a view of a weight is that weight."""
        if isinstance(out, Tensor):
            return out.requires_grad and self.name(out) is None
        return isinstance(out, tuple | list) and any(self._is_new(item) for item in out)

    def _note(self, func: Callable, arguments: Sequence[Any], role: str = "") -> None:
        for tensor in _tensors(arguments):
            name = self.name(tensor)
            if name is not None and tensor.requires_grad:
                self.others.setdefault(name, set()).add(_name(func) + role)

    def _use(self, func: Callable, product: Product | None) -> Use | None:
        """The use of a tracked weight that a product is; None where it is none."""
        if product is None:
            return None
        name = self.name(product.weight)
        if name is None and product.elementwise and product.axis is None:
            weight, x = product.x, product.weight
            product, name = Product(x, weight, scale=lambda: x), self.name(weight)
        # a product of two weights has no examples
        if name is None or (product.elementwise and self.name(product.x) is not None):
            return None
        parameter = self.weights[name]
        place = _part(product.weight, parameter)
        if place is None:
            return None
        geometry = _geometry(product, parameter, *place)
        if geometry is None:
            return None
        bias = self._bias(product.bias, geometry, product)
        geometry = replace(geometry, bias=bias is not None)
        return Use(name, geometry, bias, product, _name(func))

    def _bias(self, bias: Tensor | None, geometry: Geometry, product: Product) -> Tensor | None:
        """The parameter that a product adds, if it belongs to the same rows as the weight."""
        name = self.name(bias)
        if bias is None or name is None or not bias.requires_grad or product.transposed:
            return None
        parameter = self.weights[name]
        if parameter.ndim != 1 and not product.elementwise:
            return None
        whole = bias is parameter or bias.shape == parameter.shape
        start = bias.storage_offset() - parameter.storage_offset()
        rows = geometry.out_features * geometry.groups
        if geometry.width is None:
            return parameter if whole and parameter.numel() == rows else None
        if parameter.numel() != rows or start != geometry.start or len(bias) != geometry.width:
            return None
        return parameter


def _part(view: Tensor, parameter: Tensor) -> tuple[bool, int, int | None] | None:
    """The place of a view: whether it is the transpose, its first row, its rows (None: all).

    Rows are those of the parameter as a matrix with its last axis; None where it is no such part.
    """
    if view is parameter:
        return False, 0, None
    offset = view.storage_offset() - parameter.storage_offset()
    if view.shape == parameter.shape and view.stride() == parameter.stride() and not offset:
        return False, 0, None
    if view.ndim == 2 and parameter.ndim == 2 and not offset:
        if view.shape == parameter.mT.shape and view.stride() == parameter.mT.stride():
            return True, 0, None
    width = parameter.shape[-1]
    flat = view.ndim == 2 and parameter.ndim > 1 and parameter.is_contiguous()
    if flat and view.shape[1] == width and view.stride() == (width, 1) and offset % width == 0:
        return False, offset // width, len(view)
    return None


def _geometry(
    product: Product, parameter: Tensor, transpose: bool, start: int, width: int | None
) -> Geometry | None:
    """The geometry of a product with a part of a parameter, without its bias."""
    flipped = product.flipped != transpose
    if product.elementwise:
        # one feature that is always 1; the same factor for all examples
        spread = product.axis is not None or product.x.ndim > parameter.ndim
        same = spread or (product.x.ndim == parameter.ndim and parameter.shape[0] == 1)
        ok = same and width is None and not transpose
        return Geometry(1, parameter.numel(), False) if ok else None
    if product.conv is not None or product.transposed is not None:
        if transpose or width is not None:
            return None
        first, groups = len(parameter) // product.groups, product.groups
        rest = math.prod(parameter.shape[1:])
        i, o = (first, rest) if flipped else (rest, first)
        return Geometry(
            i, o, False, product.conv, groups=groups, transposed=product.transposed, flipped=flipped
        )
    if parameter.ndim < 2 or (flipped and width is not None):
        return None
    if parameter.ndim > 2 and width is None:
        return None
    rows, last = parameter.numel() // parameter.shape[-1], parameter.shape[-1]
    i, o = (rows, last) if flipped else (last, rows)
    return Geometry(i, o, False, lookup=product.lookup, start=start, width=width, flipped=flipped)


def _name(func: Callable) -> str:
    return getattr(func, "__name__", str(func))


def _tensors(arguments: Sequence[Any]) -> Iterator[Tensor]:
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, tuple | list):
            yield from _tensors(argument)


class Record:
    """The calls that a forward pass of a capture left on the tape.

    Args:
        weights: everything that the tape may know by name, biases included.
        wanted: the names whose products are kept.
        kinds: the kinds of products that are kept.
    """

    def __init__(
        self, weights: Mapping[str, Tensor], wanted: Collection[str], kinds: Collection[str]
    ) -> None:
        self.kinds = kinds
        self.calls: dict[str, list[Recorded]] = {name: [] for name in wanted}
        self.tape = Tape(weights, self._add)
        # the gradient of the summed per-example loss at the outputs
        self.labels: Tensor
        # whether a mask was found to fit a layer that is left out
        self.mask_fits = False

    def _add(self, use: Use, output: Tensor) -> Tensor:
        if use.name not in self.calls:
            return output
        if use.kind not in self.kinds:
            self.tape.others.setdefault(use.name, set()).add(use.function)
            return output
        # both are taken here, before an in-place activation can rewire and overwrite the output
        edge, kept = get_gradient_edge(output), output.detach().clone()
        product = use.product
        x, scale = product.x, None
        if product.scale is not None:
            with torch.no_grad():
                scale = product.scale().detach()
        call = Recorded(
            use.geometry,
            use.bias,
            x.detach(),
            tuple(self.tape.weights[use.name].shape),
            scale=scale,
            axis=product.axis,
            edge=edge,
            output=kept,
            input_version=x._version,
        )
        self.calls[use.name].append(call)
        # a Linear over [n, t, i] returns a view; an in-place operation on a view replaces the
        # view's history, and the edge would silently receive nothing
        return output.clone() if output._is_view() else output

    def every(self) -> list[Recorded]:
        """All calls, weight by weight."""
        return [call for calls in self.calls.values() for call in calls]

    def check_inputs(self) -> None:
        """Refuse a model that overwrote a layer's input in place after the layer read it."""
        for name, calls in self.calls.items():
            if any(call.raw_input._version != call.input_version for call in calls):
                raise CaptureError(
                    f"the input of layer {name!r} was modified in place after the layer read it; "
                    "make that operation out of place"
                )


def set_slopes(outputs: Tensor, calls: Sequence[Recorded]) -> None:
    """Leave at every call what its function's derivative is; before the graph is freed."""
    found = slopes([outputs], [call.edge for call in calls])
    for call, each in zip(calls, found, strict=True):
        call.slopes = each


def joined_slopes(name: str, calls: Sequence[Recorded]) -> tuple[Tensor, str]:
    """Over all calls of a map: the sums `[n, 2]`, and why there is no `nu`, or ""."""
    found = [call.slopes for call in calls if call.slopes is not None]
    reason = next((each.reason for each in found if each.reason), "")
    sums = torch.stack([each.sums for each in found]).sum(0)
    return sums, reason and f"layer {name!r} has no slope nu: {reason}"
