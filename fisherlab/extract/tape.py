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
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode_stack,
    _pop_mode,
    _push_mode,
)

from fisherlab.extract.geometry import CaptureError, Geometry
from fisherlab.extract.isolation import is_transformed
from fisherlab.extract.products import Product, added, affine_of, parsed
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


# Calls by which a user puts a hook on a tensor or on the node behind it.
_HOOKS = frozenset({Tensor.register_hook, Tensor.grad_fn.__get__})
# Kinds of products: linear maps and convolutions, embeddings, factors and terms per feature
# (normalisations, biases that no map has, positions).
KINDS = ("map", "embedding", "factors")


@dataclass(eq=False)
class Use:
    """One product of a weight: where, with what geometry, and which bias it adds."""

    name: str
    geometry: Geometry
    bias: Tensor | None
    product: Product
    function: str
    # whether the parameter itself is multiplied, as a matrix with rows or as a kernel
    plain: bool = True
    # the coarsest that the weight was cast to
    dtype: torch.dtype | None = None

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
    # an element-wise product has the factor of the weight, and the axis where the weight starts;
    # `weight_shape` is then the shape of the part that is used
    scale: Tensor | None = None
    axis: int | None = None
    # the coarsest that the weight was cast to
    dtype: torch.dtype | None = None
    # the example of every row, where the first axis is not the example; -1: no example
    examples: Tensor | None = None

    def __post_init__(self) -> None:
        """A sparse input as the dense one that it means."""
        if self.raw_input.layout != torch.strided:
            self.raw_input = self.raw_input.to_dense()

    @property
    def is_map(self) -> bool:
        """Whether it is a linear map or a convolution."""
        return self.scale is None and self.geometry.lookup is None

    @property
    def row_axes(self) -> int:
        """How many trailing axes of the output are the features of a row."""
        if self.scale is None:
            return 1
        rest = list(self.weight_shape)
        while rest and rest[0] == 1:
            rest.pop(0)
        return len(rest)


@dataclass(frozen=True)
class Known:
    """The place of a tensor on the tape: `factor W + c` of a weight, in the weight's layout."""

    name: str
    root: Tensor
    # the coarsest that it was cast to
    dtype: torch.dtype
    factor: float = 1.0
    version: int | None = None


@dataclass(eq=False)
class Recorded(Call):
    """A call of a capture: the edge behind its output, and the gradients that arrive there."""

    edge: GradientEdge = field(kw_only=True)
    output: Tensor = field(kw_only=True)
    input_version: int = field(kw_only=True)
    slopes: Slopes | None = None
    # whether the graph keeps each row with its example
    own_rows: bool = False
    # gradients that arrived at the output: the loss's, and every column of the Fisher
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
        self.record = record
        self.weights: dict[str, Tensor] = {}
        self._known: dict[int, Known] = {}
        self.track(weights)
        # shifted, scaled and cast weights of the pass that runs, which are kept alive with it
        self._computed: dict[int, tuple[Tensor, Known]] = {}
        self._depth = 0
        # functions that use a weight in another way, by its name
        self.others: dict[str, set[str]] = {}
        # the weights and biases of products whose outputs carry no graph
        self.without_graph: set[str] = set()
        # the weight whose products add a bias, by the bias's name
        self.added: dict[str, str] = {}
        # whether the pass may have put a hook on a tensor or a node
        self.hooked = False
        # the bias in a weight's block, by the weight's name; a second one has a block of its own
        self._biases: dict[str, Tensor] = {}

    def track(self, weights: Mapping[str, Tensor]) -> None:
        """Know these weights, and none that was known before."""
        self.weights = dict(weights)
        self._known = {
            id(weight): Known(name, weight, weight.dtype) for name, weight in weights.items()
        }

    def __enter__(self) -> Tape:
        self._depth += 1
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._depth -= 1
        if not self._depth:
            self._computed.clear()

    def leave(self) -> None:
        """Leave the tape wherever it stands: a later one may have been entered over it."""
        above: list[TorchFunctionMode] = []
        while self in _get_current_function_mode_stack():
            above.append(_pop_mode())
        for mode in reversed(above):
            if mode is not self:
                _push_mode(mode)
        self._depth = 0
        self._computed.clear()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """The function's own result; its use of a weight is noted."""
        kwargs = kwargs or {}
        if func in _HOOKS:
            self.hooked = True
        if func is F.multi_head_attention_forward:
            with self:
                return _ATTENTION(*args, **kwargs)
        # an activation may overwrite what it reads, and a product is parsed before it is run
        product = None if is_transformed() else parsed(func, args, kwargs)
        uses = [] if product is None else self._uses(func, product)
        out = func(*args, **kwargs)
        # a block is one of real numbers: a complex product uses a weight in another way
        if uses and isinstance(out, Tensor) and not out.is_complex():
            return self._recorded(func, uses, out)
        if self._is_new(out) and not self._is_computed(func, args, kwargs, out):
            self._note(func, (*args, *kwargs.values()))
        return out

    def _recorded(self, func: Callable[..., Any], uses: Sequence[Use], out: Tensor) -> Tensor:
        for use in uses:
            bias = self.name(use.bias)
            if bias is not None:
                self.added.setdefault(bias, use.name)
            if not out.requires_grad:
                self.without_graph |= {use.name, bias or use.name}
                continue
            if not use.product.elementwise:
                self._note(func, (use.product.x,))
            turned = use.product.turned
            if turned is None:
                out = self.record(use, out)
            else:
                to, back = turned
                out = back(self.record(use, to(out)))
        return out

    def known(self, tensor: object) -> Known | None:
        """The place of a tensor on this tape, directly or through the tensor that it views."""
        if not isinstance(tensor, Tensor):
            return None
        for each in (tensor, tensor._base):
            if each is None:
                continue
            if id(each) in self._known:
                return self._known[id(each)]
            if id(each) in self._computed:
                known = self._computed[id(each)][1]
                if each._version == known.version:
                    return known
                self.others.setdefault(known.name, set()).add("an operation in place")
        return None

    def name(self, tensor: object) -> str | None:
        """The name of the tracked weight that a tensor is, or is a view of."""
        known = self.known(tensor)
        return None if known is None else known.name

    def _is_new(self, out: object) -> bool:
        """Whether a result depends on something trainable; a view of a weight is that weight."""
        if isinstance(out, Tensor):
            return out.requires_grad and self.name(out) is None
        return isinstance(out, tuple | list) and any(self._is_new(item) for item in out)

    def _is_computed(
        self, func: Callable[..., Any], args: Sequence[Any], names: Mapping[str, Any], out: object
    ) -> bool:
        """Whether a result is a weight, shifted, scaled or cast, which is then known as such."""
        found = affine_of(func, args, names)
        known = None if found is None else self.known(found[0])
        if found is None or known is None or not isinstance(out, Tensor):
            return False
        W, factor = found
        place = _part(W, known.root) or _part(W, known.root, flat=True)
        flat = out.detach()
        if out.shape != W.shape or place is None or place[2] is not None:
            return False
        if place[0]:
            flat = flat.mT
        if not flat.is_contiguous() or not known.root.is_contiguous():
            return False
        root = flat.view(known.root.shape)
        dtype = min(known.dtype, out.dtype, key=lambda each: each.itemsize)
        now = Known(known.name, root, dtype, factor * known.factor, out._version)
        self._computed[id(out)] = out, now
        return True

    def _note(self, func: Callable[..., Any], arguments: Sequence[Any]) -> None:
        for tensor in _tensors(arguments):
            name = self.name(tensor)
            if name is not None and tensor.requires_grad:
                self.others.setdefault(name, set()).add(_name(func))

    def _uses(self, func: Callable[..., Any], product: Product) -> list[Use]:
        """The use of a tracked weight, and that of a bias which is in no block of the weight's."""
        use = self._use(func, product)
        if use is None and product.swapped is not None:
            use = self._use(func, product.swapped)
        found = [] if use is None else [use]
        if product.bias is not None and (use is None or use.bias is None):
            images = product.conv is not None or product.transposed is not None
            alone = added(product.x, product.bias, 1 if images else product.axis)
            if (bias := self._use(func, alone)) is not None:
                found.append(bias)
        return found

    def _use(self, func: Callable[..., Any], product: Product) -> Use | None:
        """The use of a tracked weight that a product is; None where it is none."""
        known = self.known(product.weight)
        if known is None or not self.weights[known.name].requires_grad:
            return None
        # a product of two weights has no examples
        if product.elementwise and self.name(product.x) is not None:
            return None
        place = _part(product.weight, known.root, product.elementwise)
        if place is None:
            return None
        geometry = _geometry(product, known.root, *place)
        if geometry is None:
            return None
        bias = self._bias(product.bias, geometry, product)
        if bias is not None and self._biases.setdefault(known.name, bias) is not bias:
            bias = None
        geometry = replace(geometry, bias=bias is not None)
        plain = product.plain and known.root is self.weights[known.name]
        if known.factor != 1:
            if product.lookup is not None:
                return None
            product = _times(product, known.factor)
        return Use(known.name, geometry, bias, product, _name(func), plain, known.dtype)

    def _bias(self, bias: Tensor | None, geometry: Geometry, product: Product) -> Tensor | None:
        """The parameter that a product adds, if it belongs to the same rows as the weight."""
        known = self.known(bias)
        if bias is None or known is None or not bias.requires_grad or product.transposed:
            return None
        parameter = self.weights[known.name]
        if (parameter.ndim != 1 and not product.elementwise) or known.root is not parameter:
            return None
        whole = bias is parameter or bias.shape == parameter.shape
        start = bias.storage_offset() - parameter.storage_offset()
        rows = geometry.out_features * geometry.groups
        if geometry.width is None:
            return parameter if whole and parameter.numel() == rows else None
        if parameter.numel() != rows or start != geometry.start or len(bias) != geometry.width:
            return None
        return parameter


def _times(product: Product, factor: float) -> Product:
    """The product of `factor W`, as one of W."""
    scale = product.scale
    if scale is None:
        return replace(product, x=factor * product.x)
    return replace(product, scale=lambda: factor * scale())


def _part(
    view: Tensor, parameter: Tensor, flat: bool = False
) -> tuple[bool, int, int | None] | None:
    """The place of a view: whether it is the transpose, its first row, its rows (None: all).

    Rows are those of the parameter as a matrix with its last axis, or its entries if `flat`; None
    where it is no such part.
    """
    if view is parameter:
        return False, 0, None
    offset = view.storage_offset() - parameter.storage_offset()
    if view.shape == parameter.shape and view.stride() == parameter.stride() and not offset:
        return False, 0, None
    if flat:
        if not (view.is_contiguous() and parameter.is_contiguous()):
            return None
        return False, int(offset), None if view.numel() == parameter.numel() else view.numel()
    if view.ndim == 2 and parameter.ndim == 2 and not offset:
        if view.shape == parameter.mT.shape and view.stride() == parameter.mT.stride():
            return True, 0, None
    width = parameter.shape[-1]
    rows = view.ndim == 2 and parameter.ndim > 1 and parameter.is_contiguous()
    if rows and view.shape[1] == width and view.stride() == (width, 1) and offset % width == 0:
        whole = view.numel() == parameter.numel()
        return False, offset // width, None if whole else len(view)
    return None


def _geometry(
    product: Product, parameter: Tensor, transpose: bool, start: int, width: int | None
) -> Geometry | None:
    """The geometry of a product with a part of a parameter, without its bias."""
    flipped = product.flipped != transpose
    if product.elementwise:
        # one feature that is always 1; the same factor for all examples
        ndim, shape = product.x.ndim, product.weight.shape
        same = (
            product.axis is not None or ndim > len(shape) or (ndim == len(shape) and shape[0] == 1)
        )
        if not same or transpose:
            return None
        return Geometry(1, parameter.numel(), False, start=start, width=width)
    if product.conv is not None or product.transposed is not None:
        if transpose or width is not None:
            return None
        first, groups = len(parameter) // product.groups, product.groups
        rest = math.prod(parameter.shape[1:])
        i, o = (first, rest) if flipped else (rest, first)
        return Geometry(
            i, o, False, product.conv, groups=groups, transposed=product.transposed, flipped=flipped
        )
    if product.features is not None:
        i = product.features
        whole = width is None and not transpose
        return Geometry(i, parameter.numel() // i, False, flipped=flipped) if whole else None
    if product.weight.ndim != 2 or (flipped and width is not None):
        return None
    rows, last = parameter.numel() // parameter.shape[-1], parameter.shape[-1]
    i, o = (rows, last) if flipped else (last, rows)
    return Geometry(i, o, False, lookup=product.lookup, start=start, width=width, flipped=flipped)


def _name(func: Callable[..., Any]) -> str:
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
        # the weights that have a product of another kind
        self.other_kinds: set[str] = set()
        self.calls: dict[str, list[Recorded]] = {name: [] for name in wanted}
        self.tape = Tape(weights, self._add)
        # the gradient of the summed per-example loss at the outputs
        self.labels: Tensor
        # the gradients of weights and biases of that loss, by id
        self.gradients: dict[int, Tensor] = {}
        # the weights whose gradient the graph states to be that of their calls
        self.proven: set[str] = set()
        # why weights have no block, found while vectors were sent back
        self.unfit: dict[str, str] = {}
        # the weights whose masked positions have a gradient
        self.use_masked: list[str] = []

    def _add(self, use: Use, output: Tensor) -> Tensor:
        if use.name not in self.calls:
            return output
        if use.kind not in self.kinds:
            self.other_kinds.add(use.name)
            self.tape.others.setdefault(use.name, set()).add(use.function)
            return output
        # both are taken here, before an in-place activation can rewire and overwrite the output
        edge, kept = get_gradient_edge(output), output.detach().clone()
        product = use.product
        x, scale, shape = product.x, None, self.tape.weights[use.name].shape
        if product.scale is not None:
            with torch.no_grad():
                scale = product.scale().detach()
            # the part read of x is in the factor
            x, shape = kept, product.weight.shape
        call = Recorded(
            use.geometry,
            use.bias,
            x.detach(),
            tuple(shape),
            scale=scale,
            axis=product.axis,
            dtype=use.dtype,
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

    def leaves(self) -> list[Tensor]:
        """The weights with calls and the biases that they add, each once, if not yet proven."""
        calls = {name: found for name, found in self.calls.items() if name not in self.proven}
        found = [self.tape.weights[name] for name, each in calls.items() if each]
        found += [call.bias for each in calls.values() for call in each if call.bias is not None]
        return list({id(leaf): leaf for leaf in found}.values())

    def keep(self, leaves: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        """Keep gradients of weights and biases, dense and in their dtypes."""
        for leaf, gradient in zip(leaves, gradients, strict=True):
            self.gradients[id(leaf)] = or_zero(gradient, leaf)

    def check_inputs(self) -> None:
        """Refuse a model that overwrote a layer's input in place after the layer read it."""
        for name, calls in self.calls.items():
            if any(call.raw_input._version != call.input_version for call in calls):
                raise CaptureError(
                    f"the input of layer {name!r} was modified in place after the layer read it; "
                    "make that operation out of place"
                )


def or_zero(gradient: Tensor | None, target: Tensor) -> Tensor:
    """A dense gradient in the dtype of its target; zeros where none arrived."""
    if gradient is None:
        return torch.zeros_like(target)
    return (gradient.to_dense() if gradient.is_sparse else gradient).to(target.dtype)


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
