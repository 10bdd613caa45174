"""Both laws of a capture as the autograd graph states them; what it does not state is measured.

    gradient   a weight is used by the products of its recorded calls alone, each of its own input,
               so that autograd's gradient is the sum of g a^T over these calls
    rows       each node between a call and the outputs keeps example n in the n-th part of its
               elements, so that a row's gradient is made of the loss terms of its example alone

A node that is not known here, a hook or a packed tensor leaves them to the passes of `proof`.
Reading takes O(nodes), however large the tensors are.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import get_gradient_edge

from fisherlab.extract.broadcast import users_of
from fisherlab.extract.geometry import Geometry
from fisherlab.extract.slopes import Edge, _name, _shape, _sorted, _sources
from fisherlab.extract.tape import Record, Recorded

_RESHAPES = frozenset("View UnsafeView ReshapeAlias Squeeze Unsqueeze Alias Clone".split())
# Each element of the output is made of the same one of the first input.
_ELEMENTWISE = frozenset(
    "Relu Gelu Silu Sigmoid Tanh Elu LeakyRelu Softplus Hardtanh Hardswish Hardsigmoid Mish "
    "Threshold Exp Expm1 Log Log1p Sqrt Rsqrt Reciprocal Abs Neg Erf Sin Cos LogSigmoid Clamp "
    "ClampMin ClampMax NativeDropout ToCopy MaskedFill".split()
)
# The first axis has rows that do not meet: these inputs', and the output's.
_BY_ROWS: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(
        "Add Sub Rsub Mul Div Pow Where Addcmul Addcdiv Lerp Maximum Minimum".split(), (0, 1, 2)
    ),
    **dict.fromkeys(
        "Mm Convolution NativeGroupNorm Expand MaxPool2DWithIndices MaxPool3DWithIndices AvgPool2D "
        "AvgPool3D AdaptiveAvgPool2D AdaptiveAvgPool3D AdaptiveMaxPool2D".split(),
        (0,),
    ),
    **dict.fromkeys("Addmm Bmm".split(), (0, 1)),
    **dict.fromkeys("Baddbmm ScaledDotProductFlashAttentionForCpu".split(), (0, 1, 2)),
}
# They work along axes that the node states.
_ALONG = frozenset(
    "Mean Sum Softmax LogSoftmax Cumsum Slice Select Split SplitWithSizes Unbind Cat Stack "
    "Transpose".split()
)
_BATCH_NORMS = frozenset("NativeBatchNorm CudnnBatchNorm MiopenBatchNorm".split())
_TURNS = frozenset("T Mt Transpose Permute".split())
# Inputs that are W and the bias, and the name under which x is saved, by product.
_PRODUCTS = {
    "Addmm": (2, 0, "mat1"),
    "Mm": (1, -1, "self"),
    "Convolution": (1, 2, "input"),
}


def read(outputs: Tensor, record: Record, n: int) -> None:
    """Leave on the record what the graph proves: weights in `proven`, calls with `own_rows`.

    Args:
        outputs: the model's outputs `[n, ...]`, with their graph.
        record: the tape of the pass, before its backward passes.
        n: the number of examples.
    """
    if record.tape.hooked:
        return
    users = users_of(outputs)
    for name, calls in record.calls.items():
        if calls and _are_all_uses(record.tape.weights[name], calls, users):
            record.proven.add(name)
    if outputs.ndim and len(outputs) == n:
        kept = _in_parts(outputs, {_behind(call) for call in record.every()}, n)
        for call in record.every():
            call.own_rows = _behind(call) in kept


def _are_all_uses(W: Tensor, calls: Sequence[Recorded], users: dict[Edge, list[Any]]) -> bool:
    """Whether the graph uses a weight, and the bias of its calls, in the calls' products alone."""
    biases = {id(call.bias): call.bias for call in calls if call.bias is not None}
    leaves = [W, *biases.values()]
    # a forward pass may have frozen one
    if len(biases) > 1 or any(f._backward_hooks or not f.requires_grad for f in leaves):
        return False
    expected: dict[Edge, set[Any]] = {_edge(leaf): set() for leaf in leaves}
    products = set()
    for call in calls:
        node = _product(call, users)
        if node is None or node in products:
            return False
        products.add(node)
        weight, bias, saved = _PRODUCTS[_name(node)]
        if call.bias is not None:
            if bias < 0 or _sources(node)[bias] != _edge(call.bias):
                return False
            expected[_edge(call.bias)].add(node)
        user, edge, turns = node, _sources(node)[weight], 0
        while edge is not None and _name(edge[0]) in _TURNS and len(_shape(edge)) == 2:
            expected.setdefault(edge, set()).add(user)
            user, edge, turns = edge[0], _sources(edge[0])[0], turns + 1
        conv = _name(node) == "Convolution"
        flipped = not conv if turns % 2 == 0 else conv
        if edge != _edge(W) or flipped != call.geometry.flipped:
            return False
        expected[_edge(W)].add(user)
        if not _multiplies(node, saved, call) or (conv and not _fits(node, call.geometry)):
            return False
    return all(
        len(users[edge]) == len(found) and set(users[edge]) == found
        for edge, found in expected.items()
    )


def _product(call: Recorded, users: dict[Edge, list[Any]]) -> Any:
    """The matrix product or convolution whose reshaped output a call's is; None if there is none.

    An element-wise product and a lookup are none.
    """
    if not call.is_map:
        return None
    node = call.edge.node
    while _name(node) in _RESHAPES:
        edge = _sources(node)[0]
        if edge is None or len(users[edge]) != 1:
            return None
        node = edge[0]
    return node if _name(node) in _PRODUCTS and not _is_custom(node) else None


def _multiplies(node: Any, saved: str, call: Recorded) -> bool:
    """Whether a product will multiply the very numbers that were recorded as its input."""
    x = call.raw_input
    if x._version != call.input_version or getattr(node, f"_raw_saved_{saved}").unpack_hook:
        return False
    own = getattr(node, f"_saved_{saved}")
    if own.layout != torch.strided or x.layout != torch.strided:
        return False
    return bool(
        own.data_ptr() == x.data_ptr()
        and own.numel() == x.numel()
        and own.dtype == x.dtype
        and own.is_contiguous()
        and x.is_contiguous()
    )


def _fits(node: Any, geometry: Geometry) -> bool:
    """Whether a convolution has the hyper-parameters of a geometry."""
    conv = geometry.conv
    if conv is None or node._saved_transposed or node._saved_groups != geometry.groups:
        return False
    sides = tuple(p for p in reversed(node._saved_padding) for _ in range(2))
    return (conv.stride, conv.dilation, conv.padding) == (
        tuple(node._saved_stride),
        tuple(node._saved_dilation),
        sides,
    )


def _in_parts(outputs: Tensor, edges: Collection[Edge], n: int) -> set[Edge]:
    """The edges whose n-th part, in the order of elements, has the gradient of example n alone.

    Args:
        outputs: `[n, ...]`, with their graph.
        edges: those in question.
        n: the number of examples.
    """
    order = _sorted([outputs.grad_fn])
    asked = {node for node, _ in edges}
    # nodes on a way to one of the edges
    on_way: set[Any] = set()
    for node in order:
        if node in asked or any(s is not None and s[0] in on_way for s in _sources(node)):
            on_way.add(node)
    lost: set[Edge] = set()
    for node in reversed(order):
        if node not in on_way:
            continue
        made = [(node, k) for k in range(len(node._input_metadata))]
        fine = _rows_of(node, n) if not lost.intersection(made) else ()
        for k, source in enumerate(_sources(node)):
            if source is not None and source[0] in on_way and k not in fine:
                lost.add(source)
    return {edge for edge in edges if edge not in lost and edge[0] in on_way}


def _rows_of(node: Any, n: int) -> Collection[int]:
    """The inputs of a node whose n-th part goes into the n-th part of its outputs alone."""
    name, sources = _name(node), _sources(node)
    if _is_custom(node):
        return ()
    out = _shape((node, 0))
    shapes = [torch.Size() if source is None else _shape(source) for source in sources]
    if name in _RESHAPES or name in _ELEMENTWISE:
        found: Sequence[int] = (0,)
    elif name in _BY_ROWS:
        # an input of fewer axes is broadcast: its rows serve several examples
        found = [k for k in _BY_ROWS[name] if k < len(shapes) and len(shapes[k]) == len(out)]
    elif name in _BATCH_NORMS:
        found = () if node._saved_training else (0,)
    elif name == "NativeLayerNorm":
        found = (0,) if len(node._saved_normalized_shape) < len(out) else ()
    elif name == "Permute":
        found = (0,) if node._saved_dims[0] == 0 else ()
    elif name in _ALONG and min(_axes(node, max(map(len, shapes))), default=0) > 0:
        found = range(len(shapes))
    else:
        found = ()
    moves = name not in _RESHAPES
    return [k for k in found if _parts(shapes[k], n) and (not moves or shapes[k][0] == out[0])]


def _parts(shape: torch.Size, n: int) -> bool:
    """Whether the first axis has as many rows for each of `n` examples."""
    return len(shape) > 0 and shape[0] % n == 0


def _axes(node: Any, ndim: int) -> list[int]:
    """The axes that a node states, counted from the first; none where it states none."""
    names = ("_saved_dim", "_saved_dim0", "_saved_dim1")
    given = [getattr(node, name) for name in names if hasattr(node, name)]
    flat = [d for each in given for d in (each if isinstance(each, tuple) else (each or 0,))]
    # negative ones are stored as if they had no sign
    return [d if d < 1 << 63 else d - (1 << 64) + ndim for d in flat]


def _is_custom(node: Any) -> bool:
    """Whether a node is a user's own `autograd.Function`."""
    return isinstance(node, BackwardCFunction)


def _behind(call: Recorded) -> Edge:
    return call.edge.node, call.edge.output_nr


def _edge(leaf: Tensor) -> Edge:
    edge = get_gradient_edge(leaf)
    return edge.node, edge.output_nr
