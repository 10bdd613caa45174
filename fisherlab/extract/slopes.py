"""`nu = E f'(z)` of each map: f is the element-wise function that its pre-activation ends in.

The autograd graph in front of the outputs says what f is: no list of activations and no order of
modules. Looked through and not counted are shapes, slices, concatenations and pooling,
normalisations, dropout, sums and products with other tensors, and gains that are parameters. `f` is
all that follows as a function of one tensor z alone, composed of nodes with a diagonal Jacobian.
These nodes, sent a vector of ones, return `f'(z)`.

Several functions of one unit count by their mean. A map that reaches the outputs through no
function has the identity there, `nu = 1`; a `log_softmax` in front of the outputs belongs to the
loss. Any other end, softmax or another map, leaves the map without `nu`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge

# A tensor of the graph: the node that made it, and which of the node's outputs it is.
Edge = tuple[Any, int]
# One number for every element of a tensor, or the same number for all.
Field = Tensor | float

# Backward nodes that copy in one order of elements; z and its copies are one tensor.
_RENAMED = frozenset(
    "View UnsafeView ReshapeAlias Squeeze Unsqueeze Clone Alias ToCopy BackwardHookFunction".split()
)
# Backward nodes that put the elements in another order.
_MOVED = frozenset({"Permute", "Transpose", "T", "Mt", "Flip", "Roll"})
# Backward nodes that pick, repeat, pad, join or pool elements: linear, without negative weights.
_PICKED = _MOVED | frozenset(
    "Split SplitWithSizes Unbind Select Slice Index IndexSelect Gather Cat Stack ConstantPadNd "
    "Expand Repeat MaxPool2DWithIndices MaxPool3DWithIndices AvgPool2D AvgPool3D "
    "AdaptiveAvgPool2D AdaptiveAvgPool3D Mean".split()
)
# Each element of the input is one of the outputs'.
_WHOLE = _RENAMED | _MOVED | frozenset({"Split", "SplitWithSizes", "Unbind"})
_SUMS = frozenset({"Add", "Sub", "Rsub", "Neg"})
_MASKS = frozenset({"NativeDropout", "FusedDropout", "MaskedFill"})
_NORMALISATION = re.compile(r"(Batch|Layer|Group|Instance|RMS|Rms)Norm")
# Backward nodes that are not asked whether their Jacobian is diagonal, which may be so by chance.
_PRODUCTS = frozenset(
    "Addmm Mm Bmm Baddbmm Addmv Mv Dot Linear MkldnnLinear Convolution ConvolutionOverrideable "
    "MkldnnConvolution CudnnConvolution Embedding".split()
)
_MIXING = _PRODUCTS | frozenset(
    "Softmax LogSoftmax Cumsum Cumprod Logcumsumexp Cummax Cummin Sum Prod CopySlices "
    "AsStrided CompiledFunction CheckpointFunction".split()
)
# How a node is passed: z stays z; by the identity; by the node itself; not at all.
_INSIDE, _IDENTITY, _ADJOINT, _END = "inside", "identity", "adjoint", "end"
# Whether the Jacobian of a built-in node was found diagonal.
_DIAGONAL: dict[str, bool] = {}


@dataclass
class Slopes:
    """Per example, `[n, 2]` in float64: the sum of `f'` over positions and units, and their number.

    `reason` says why there is no `nu`; "" where there is. `field` is `f'` at every element of the
    map's output, where that was asked for: a unit without a function has NaN.
    """

    sums: Tensor
    reason: str = ""
    field: Tensor | None = None


def slopes(
    outputs: Iterable[Tensor], maps: Sequence[GradientEdge], *, fields: bool = False
) -> list[Slopes]:
    """The mean derivative of the function that each map's pre-activation ends in.

    Args:
        outputs: what the model returned, with its graph.
        maps: the edge behind the output of each call of a map.
        fields: whether every element's own slope is wanted.

    Returns:
        Sums and counts of `f'`, call by call; where units feed several functions, their means.
    """
    edges = [(edge.node, edge.output_nr) for edge in maps]
    with torch.no_grad():
        readings = _Graph(outputs, set(edges)).readings()
        found = [_summed(readings.get(edge), edge) for edge in edges]
        for each, edge in zip(found, edges, strict=True):
            if fields and not each.reason:
                each.field = _field(readings[edge], edge)
        return found


@dataclass
class _Reading:
    """At each element of a tensor: the sum of `f'`, the number of its functions and dead ends."""

    slope: Field = 0.0
    count: Field = 0.0
    ends: Field = 0.0
    where: str = ""

    def add(self, other: _Reading) -> None:
        self.slope = _plus(self.slope, other.slope)
        self.count = _plus(self.count, other.count)
        self.ends = _plus(self.ends, other.ends)
        self.where = self.where or other.where

    def map(self, function: Callable[[Field], Field]) -> _Reading:
        return _Reading(function(self.slope), function(self.count), function(self.ends), self.where)


def _words(name: str) -> str:
    return f"a matrix product or a convolution ({name})" if name in _PRODUCTS else name


def _plus(one: Field, other: Field) -> Field:
    """The sum, without a pass over memory where one is 0."""
    if isinstance(one, float) and one == 0:
        return other
    return one if isinstance(other, float) and other == 0 else one + other


def _summed(reading: _Reading | None, edge: Edge) -> Slopes:
    shape, device = _shape(edge), edge[0]._input_metadata[edge[1]].device
    count_of_rows = shape[0] if len(shape) > 1 else 1  # one row of features may have no other axis
    empty = torch.zeros(count_of_rows, 2, dtype=torch.float64, device=device)
    if reading is None:
        return Slopes(empty, "the outputs of the model do not depend on it")

    def rows(field: Field) -> Tensor:
        every = torch.as_tensor(field, device=device).expand(shape)
        # a call may have no rows: an expert without tokens
        return every.flatten(1) if len(shape) > 1 else every.reshape(1, -1)

    if isinstance(reading.count, float) and reading.count > 0:
        terms = rows(reading.slope)
        total = terms.sum(1, dtype=torch.float64) / reading.count
        return Slopes(torch.stack([total, torch.full_like(total, terms.shape[1])], 1))
    count, ends = rows(reading.count), rows(reading.ends)
    known = count > 0
    whither = f"{_words(reading.where)}, not into an element-wise function"
    if not bool(known.any()):
        return Slopes(empty, f"its output goes into {whither}")
    if bool((~known & (ends > 0)).any()):
        return Slopes(empty, f"some of its units go into {whither}")
    mean = rows(reading.slope).double() / count.double().clamp(min=1e-300)
    return Slopes(torch.stack([(mean * known).sum(1), known.sum(1, dtype=torch.float64)], 1))


def _field(reading: _Reading, edge: Edge) -> Tensor:
    """`f'` at every element, in float64."""
    shape, device = _shape(edge), edge[0]._input_metadata[edge[1]].device

    def filled(field: Field) -> Tensor:
        return torch.as_tensor(field, device=device, dtype=torch.float64).expand(shape)

    return filled(reading.slope) / filled(reading.count)


@dataclass
class _Function:
    """An element-wise function: where it ends, and the nodes between z and there."""

    end: Edge
    nodes: list[Any]


class _Graph:
    """The graph in front of the outputs, and what of it the maps reach."""

    def __init__(self, outputs: Iterable[Tensor], maps: set[Edge]) -> None:
        self.maps = maps
        self.outputs = {(o.grad_fn, o.output_nr) for o in outputs if o.grad_fn is not None}
        self.order = _sorted([node for node, _ in self.outputs])
        self.position = {node: k for k, node in enumerate(self.order)}
        self.consumers: dict[Edge, list[Any]] = {}
        # tensors that depend on a map element by element, and the tensor z they depend on
        self.root: dict[Edge, Edge] = {}
        # the ones that are no linear function of z, and the first of the copies of each
        self.curved: dict[Edge, Edge] = {}
        self._copies: dict[Edge, list[Edge]] = {}
        # the ones that are an affine function of another one, as `1 - u` of a gate u
        self.affine: dict[Edge, Edge] = {}
        self.steps: dict[Any, str] = {}
        # nodes whose tensor is made of parameters alone
        self.parameters: set[Any] = set()
        for node in self.order:
            for edge in set(_sources(node)) - {None}:
                self.consumers.setdefault(edge, []).append(node)  # type: ignore[arg-type]
        for node in self.order:
            self._visit(node)

    # forwards: which tensors depend on which -----------------------------------------------------

    def _visit(self, node: Any) -> None:
        sources = _sources(node)
        if _is_leaf(node) or (
            _name(node) not in _PRODUCTS
            and all(edge is not None and edge[0] in self.parameters for edge in sources)
        ):
            self.parameters.add(node)
        made = [edge for edge in _made(node) if edge in self.maps]
        live = [k for k, edge in enumerate(sources) if edge is not None and edge in self.root]
        if live:
            step = self.steps[node] = _END if made else self._step(node, sources, live)
            flat = any(sources[k] not in self.curved for k in live)
            if step is _INSIDE:
                self._keep(node, sources, live)
            elif step is not _END and flat:
                self.root |= {edge: edge for edge in _made(node)}
        self.root |= {edge: edge for edge in made}

    def _step(self, node: Any, sources: list[Edge | None], live: list[int]) -> str:
        name = _name(node)
        if name in _RENAMED:
            return _INSIDE if len(_made(node)) == 1 else _END
        if name in _PICKED:
            return _ADJOINT
        if _NORMALISATION.search(name):
            return _IDENTITY if live[0] == 0 else _END
        if name in _MASKS:
            return _IDENTITY
        alone = self._of_one(node, sources, live)
        if name in _SUMS:
            return _INSIDE if alone else _IDENTITY
        if name in ("Mul", "Div"):
            if alone and not _by_a_tensor(node, sources):
                return _INSIDE
            return _IDENTITY if name == "Mul" or live[0] == 0 else _END
        if name == "Where":
            # with one branch it is a mask; with two it may be a function by cases
            return _INSIDE if alone and len(live) > 1 else _IDENTITY
        return _INSIDE if alone and _is_diagonal(node, live[0]) else _END

    def _of_one(self, node: Any, sources: list[Edge | None], live: list[int]) -> bool:
        """Whether the node's output depends on one z, by elements, and else on parameters alone."""
        roots = {self.root[edge] for k in live if (edge := sources[k]) is not None}
        if len(roots) > 1 or any(edge in self.consumers for edge in _made(node)[1:]):
            return False
        shape = _shape((node, 0))
        if any(_shape(sources[k]) != shape for k in live):  # type: ignore[arg-type]
            return False
        others = [e for k, e in enumerate(sources) if e is not None and k not in live]
        return all(edge[0] in self.parameters for edge in others)

    def _keep(self, node: Any, sources: list[Edge | None], live: list[int]) -> None:
        inputs = [edge for k in live if (edge := sources[k]) is not None]
        name = _name(node)
        linear = name in _RENAMED or name in _SUMS
        if name == "Mul":
            linear = len(live) == 1
        elif name == "Div":
            linear = live == [0]
        bent = [edge for edge in inputs if edge in self.curved]
        for out in _made(node):
            self.root[out] = self.root[inputs[0]]
            if name in _RENAMED and bent:
                self.curved[out] = self.curved[bent[0]]
            elif bent or not linear:
                self.curved[out] = out
                if linear and len(inputs) == 1:
                    self.affine[out] = self.curved[bent[0]]

    # backwards: what arrives at each tensor ------------------------------------------------------

    def readings(self) -> dict[Edge, _Reading]:
        """The functions and dead ends that each map's output meets."""
        found: dict[Edge, _Reading] = {}
        kept: dict[Edge, _Reading] = {}
        functions = self._functions()
        ends = self.outputs | self._under_the_loss()
        for node in reversed(self.order):
            made = _made(node)
            arrived = [self._at(out, found, functions.pop(out, []), ends) for out in made]
            for out, reading in zip(made, arrived, strict=True):
                if out in self.maps and reading is not None:
                    kept[out] = reading
            if any(reading is not None for reading in arrived) and node in self.steps:
                self._send(node, arrived, found)
        return kept

    def _at(
        self,
        out: Edge,
        found: dict[Edge, _Reading],
        functions: list[_Function],
        ends: set[Edge],
    ) -> _Reading | None:
        if out not in self.root or out in self.curved:
            return None
        reading = found.pop(out, None) or _Reading()
        for function in functions:
            reading.add(_Reading(self._derivative(out, function), 1.0))
        if out in ends:
            reading.add(_Reading(1.0, 1.0))
        for consumer in self.consumers.get(out, ()):
            divides = _name(consumer) == "Div" and _sources(consumer)[0] != out
            if self.steps[consumer] is _END or (divides and self.steps[consumer] is _IDENTITY):
                reading.add(_Reading(ends=1.0, where=_name(consumer)))
        return reading

    def _send(self, node: Any, arrived: list[_Reading | None], found: dict[Edge, _Reading]) -> None:
        step, name = self.steps[node], _name(node)
        if step is _END:
            return
        for k, edge in enumerate(_sources(node)):
            if edge is None or edge not in self.root or edge in self.curved:
                continue
            if name == "Div" and k == 1:
                continue
            if step is _ADJOINT or name in _RENAMED:
                reading = _through(node, k, arrived)
            else:
                assert arrived[0] is not None
                reading = arrived[0].map(_onto(edge, (node, 0)))
            found.setdefault(edge, _Reading()).add(reading)

    def _functions(self) -> dict[Edge, list[_Function]]:
        """The functions of each z alone, and the tensors at which they end."""
        for edge, first in self.curved.items():
            self._copies.setdefault(first, []).append(edge)
        used = {
            end: copies for end, copies in self._copies.items() if any(map(self._leaves, copies))
        }
        found: dict[Edge, list[_Function]] = {}
        for end in used:
            base = self.affine.get(end)
            while base is not None and base not in used:
                base = self.affine.get(base)
            # a gate u that is used as u and as 1 - u is one function, u
            if base is None and not self._is_statistic(end):
                nodes = self._between(end)
                z = self._behind_gains(self.root[end], nodes)
                found.setdefault(z, []).append(_Function(end, nodes))
        return found

    def _leaves(self, edge: Edge) -> bool:
        """Whether a function of z is used by what is no function of z alone."""
        readers = self.consumers.get(edge, ())
        return edge in self.outputs or any(self.steps[node] is not _INSIDE for node in readers)

    def _between(self, end: Edge) -> list[Any]:
        """The nodes between z and a tensor that is a function of it, the last ones first."""
        nodes, stack, first = set(), [end[0]], self.root[end][0]
        while stack:
            node = stack.pop()
            if node not in nodes and node is not first:
                nodes.add(node)
                stack += [e[0] for e in _sources(node) if e is not None and e in self.root]
        return sorted(nodes, key=self.position.__getitem__, reverse=True)

    def _under_the_loss(self) -> set[Edge]:
        """The inputs of a `log_softmax` whose output is the model's."""
        found, stack = set(), list(self.outputs)
        while stack:
            node, _ = stack.pop()
            if _name(node) in _RENAMED | _MOVED:
                stack += [edge for edge in _sources(node) if edge is not None]
            elif _name(node) == "LogSoftmax":
                found |= {edge for edge in _sources(node) if edge is not None}
        return found

    def _derivative(self, z: Edge, function: _Function) -> Tensor:
        """`f'(z)`, by the nodes between z and the end of f."""
        gradients = {function.end: _ones(function.end)}
        for node in function.nodes:
            if (node, 0) == z or (node, 0) not in gradients:
                continue
            for edge, gradient in zip(
                _sources(node), _call(node, gradients.pop((node, 0))), strict=True
            ):
                if edge is not None and edge in self.root and gradient is not None:
                    known = gradients.get(edge)
                    gradients[edge] = gradient if known is None else known + gradient
        slope = gradients[z] if z in gradients else 0 * _ones(z)
        return slope if slope.dtype.itemsize > 2 else slope.float()

    def _behind_gains(self, z: Edge, nodes: list[Any]) -> Edge:
        """z behind the products and sums with parameters, as behind a normalisation's own."""
        while True:
            readers = [node for node in self.consumers.get(z, ()) if node in nodes]
            if len(readers) != 1 or _name(readers[0]) not in ("Mul", "Add"):
                return z
            sources = _sources(readers[0])
            if None in sources or sum(edge == z for edge in sources) != 1:
                return z
            z = (readers[0], 0)

    def _is_statistic(self, end: Edge) -> bool:
        """Whether a function is only part of a mean that scales its own z: of a normalisation."""
        readers = [
            (edge, node)
            for edge in self._copies[end]
            for node in self.consumers.get(edge, ())
            if self.steps[node] is not _INSIDE
        ]
        if end in self.outputs or not readers:
            return False
        if any(_size((node, 0)) >= _size(edge) for edge, node in readers):
            return False
        # z and what is linear in it
        own, stack = {self.root[end]}, [self.root[end]]
        while stack:
            for node in self.consumers.get(stack.pop(), ()):
                flat = [e for e in _made(node) if e in self.root and e not in self.curved]
                new = [e for e in flat if e not in own and self.steps[node] is not _END]
                own |= set(new)
                stack += new
        return all(self._reaches((node, 0), own) for _, node in readers)

    def _reaches(self, start: Edge, own: set[Edge]) -> bool:
        stack, seen = [start], set()
        while stack:
            edge = stack.pop()
            for node in self.consumers.get(edge, ()):
                if node in seen or _name(node) in _PRODUCTS:
                    continue
                seen.add(node)
                made = _made(node)
                if any(out in own for out in made):
                    return True
                stack += made
        return False


def _sorted(roots: Iterable[Any]) -> list[Any]:
    """Every node behind the roots, each behind those that its inputs come from."""
    order: list[Any] = []
    seen: set[Any] = set()
    stack = [(node, False) for node in roots]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(source, False) for source, _ in node.next_functions if source is not None]
    return order


def _is_leaf(node: Any) -> bool:
    return "AccumulateGrad" in node.name()


def _sources(node: Any) -> list[Edge | None]:
    return [None if source is None else (source, nr) for source, nr in node.next_functions]


def _made(node: Any) -> list[Edge]:
    return [(node, nr) for nr in range(len(node._input_metadata))]


def _name(node: Any) -> str:
    return _short(node.name())


@cache
def _short(name: str) -> str:
    """ "Relu" of "ReluBackward0"."""
    return re.sub(r"Backward\d*$", "", name.rpartition("::")[2])


def _shape(edge: Edge) -> torch.Size:
    return torch.Size(edge[0]._input_metadata[edge[1]].shape)


def _size(edge: Edge) -> int:
    return _shape(edge).numel()


def _ones(edge: Edge) -> Tensor:
    of = edge[0]._input_metadata[edge[1]]
    return torch.ones(of.shape, dtype=of.dtype, device=of.device)


def _call(node: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    """The node's gradients of its inputs; straight from the node, so that no hook runs."""
    made = node._input_metadata
    # nothing was made of a second output, such as the buffer of a log-sigmoid
    gradients += (None,) * (len(made) - len(gradients))
    # in autocast a node may be of another dtype than its neighbours
    gradients = tuple(
        None if g is None else g.to(of.dtype) for g, of in zip(gradients, made, strict=True)
    )
    if isinstance(node, BackwardCFunction):
        return _of_tensors(node, node.apply(*gradients))
    found = node(*gradients)
    return found if isinstance(found, tuple) else (found,)


def _of_tensors(node: Any, found: Any) -> tuple[Tensor | None, ...]:
    """The gradients that a user's own function has for each argument, tensor or not, by source."""
    given = found if isinstance(found, tuple) else (found,)
    needed = iter([g for g, need in zip(given, node.needs_input_grad, strict=False) if need])
    return tuple(None if source is None else next(needed, None) for source in _sources(node))


def _by_a_tensor(node: Any, sources: list[Edge | None]) -> bool:
    """Whether a product's other factor is a tensor without a graph: a mask, noise, a buffer."""
    if None not in sources:
        return False
    # a quotient keeps its divisor; a product keeps the factor of what has a graph
    other = node._saved_other if sources[1] is None else node._saved_self
    return other is not None and other.numel() > 1


def _is_diagonal(node: Any, k: int) -> bool:
    """Whether `J^T v = v * J^T 1`: each element of the output depends on its own input alone."""
    name = _name(node)
    if name in _MIXING:
        return False
    custom = isinstance(node, BackwardCFunction)
    if custom or name not in _DIAGONAL:
        ones = _ones((node, 0))
        with torch.no_grad():
            v = torch.arange(ones.numel(), device=ones.device).cos().view_as(ones).to(ones.dtype)
            slope, found = _call(node, ones)[k], _call(node, v)[k]
            if slope is None or found is None:
                return False
            size = (slope * v).norm()
            diagonal = bool((found - slope * v).norm() <= _rounding(ones.dtype) * size)
        if custom or not bool(size):
            return diagonal
        _DIAGONAL[name] = diagonal
    return _DIAGONAL[name]


def _rounding(dtype: torch.dtype) -> float:
    return min(1e3 * torch.finfo(dtype).eps, 1e-2)


def _onto(edge: Edge, out: Edge) -> Callable[[Field], Field]:
    """A field of a node's output as one of its input, which may be repeated in it."""
    shape, larger = _shape(edge), _shape(out)

    def carried(field: Field) -> Field:
        if shape == larger:
            return field
        if isinstance(field, float):
            return field * (larger.numel() / shape.numel())
        return field.expand(larger).sum_to_size(shape)

    return carried


def _through(node: Any, k: int, arrived: list[_Reading | None]) -> _Reading:
    """The reading of a node's outputs at the elements of its input `k` that they are made of."""
    present = [reading or _Reading() for reading in arrived]
    where = next((reading.where for reading in present if reading.where), "")

    def carried(fields: list[Field]) -> Field:
        first = fields[0]
        whole = _name(node) in _WHOLE
        if isinstance(first, float) and all(
            isinstance(field, float) and field == first for field in fields
        ):
            # nothing arrived, or the same at every element
            if first == 0 or whole:
                return first
        full = [
            (_ones(out) * field).expand(_shape(out))
            for field, out in zip(fields, _made(node), strict=True)
        ]
        found = _call(node, *full)[k]
        assert found is not None
        return found

    return _Reading(
        carried([reading.slope for reading in present]),
        carried([reading.count for reading in present]),
        carried([reading.ends for reading in present]),
        where,
    )
