"""Which example every row of a call belongs to, whatever the layout; and rows put in that order.

Time-first sequences, windows, packed sequences and folded axes have their rows in other orders than
the batch's. The examples are asked of autograd, never guessed from shapes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from fisherlab.extract.backward import pulled_back
from fisherlab.extract.tape import Call

SEVERAL = (
    "its rows are not one example each: examples interact (batch statistics, a graph, a mean over "
    "the batch), or one row serves several examples"
)
# A batch that says nothing about a layer, which another one may.
UNTOLD = "its rows cannot be told from a batch without examples, or whose gradients overflow"
# Part of the step between two codes that rounding may take up.
SLACK = 0.1
# The rounding of one row that its proof may keep, by bytes of a number; coarser ones go by halves.
ROUNDING = {8: 1e-10, 4: 1e-4}


def whole_rows(call: Call) -> bool:
    """Whether a row is all but the first axis: images, whose positions are one row together."""
    g = call.geometry
    return g.conv is not None or g.transposed is not None or call.axis is not None


def as_rows(call: Call, tensor: Tensor) -> Tensor:
    """An output or its gradient as `[rows, features]`."""
    if whole_rows(call):
        return tensor.flatten(1)
    features = tensor.shape[tensor.ndim - call.row_axes :].numel()
    return tensor.reshape(-1, features)


def find_examples(
    outputs: Tensor, calls: Sequence[Call], edges: Sequence[GradientEdge], shapes: Sequence[Any]
) -> list[str]:
    """Set `examples` of each call; returns why it has none, or "".

    Loss terms are sent back with codes for weights: a row of example n returns `w_n` times its
    gradient, which tells n. Two codes, the digits of n in base `sqrt(n)`, keep the steps between
    codes far above rounding. Several examples may make a code together by chance: random weights
    then prove what was read. Four backward passes to the layers' outputs, O(1) in n. Where large
    terms of a row's gradient cancel, rounding hides the codes. Calls that are not clear are asked
    once more, by halves.

    Args:
        outputs: the model's outputs `[n, ...]`, with their graph.
        calls: those whose rows are in doubt.
        edges: the edges behind their outputs.
        shapes: the shapes of their outputs.
    """
    n = outputs.shape[0]
    if not n:
        return [UNTOLD] * len(calls)
    base = max(2, math.isqrt(n - 1) + 1)
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(outputs.shape, generator=generator, device=generator.device)
    vector = vector.to(outputs) + 0.1
    index = torch.arange(n, device=outputs.device)
    digits = (index // base, index % base)
    plain = _arrived(outputs, vector, edges, shapes)
    coded = [_arrived(outputs, _times(vector, 1 + digit / base), edges, shapes) for digit in digits]
    drawn = 0.5 + torch.rand(n, generator=generator, device=generator.device, dtype=torch.float64)
    drawn = drawn.to(outputs)
    proof = _arrived(outputs, _times(vector, drawn), edges, shapes)
    reasons = []
    for k, call in enumerate(calls):
        g = as_rows(call, plain[k]).double()
        square = g.square().sum(1)
        there = square > 0
        example = torch.zeros(len(g), dtype=torch.long, device=g.device)
        clean = torch.ones_like(there)
        for place, weighted in zip((base, 1), coded, strict=True):
            w = as_rows(call, weighted[k]).double()
            ratio = (w * g).sum(1) / square.where(there, torch.ones_like(square))
            code = (ratio - 1) * base
            digit = code.round()
            rest = (w - ratio[:, None] * g).norm(dim=1) * base
            clean &= ((code - digit).abs() < SLACK) & (rest < SLACK * square.sqrt())
            example += place * digit.long()
        example = example.where(there, torch.full_like(example, -1))
        finite, right = torch.stack(
            [
                square.isfinite().all(),
                ((clean | ~there) & (example >= -1) & (example < n)).all(),
            ]
        ).tolist()
        if finite and right:
            left = as_rows(call, proof[k]).double() - drawn[example].double()[:, None] * g
            bound = ROUNDING.get(plain[k].element_size(), 0.0) * square.sqrt()
            right = bool((left.norm(dim=1) <= bound).all())
        call.examples = example if finite and right else None
        reasons.append(UNTOLD if not finite else "" if right else SEVERAL)
    doubtful = [k for k, why in enumerate(reasons) if why == SEVERAL]
    if doubtful:
        asked = [calls[k] for k in doubtful]
        found = _by_halves(
            outputs, vector, asked, [edges[k] for k in doubtful], [shapes[k] for k in doubtful]
        )
        for k, call, own in zip(doubtful, asked, found, strict=True):
            call.examples = own
            reasons[k] = SEVERAL if own is None else ""
    return reasons


def _by_halves(
    outputs: Tensor,
    vector: Tensor,
    calls: Sequence[Call],
    edges: Sequence[GradientEdge],
    shapes: Sequence[Any],
) -> list[Tensor | None]:
    """The example of each row by the bits of its number, `2 log2(n)` passes; None: several.

    The terms of half of the examples are sent back: a row of the other half gets zeros, which no
    rounding touches. It ends after the first bit where every call has a row that both halves reach.
    """
    n = outputs.shape[0]
    index = torch.arange(n, device=outputs.device)
    found: list[Tensor | None] = [None] * len(calls)
    seen: list[Tensor | None] = [None] * len(calls)
    several = [False] * len(calls)
    for bit in range(max(1, (n - 1).bit_length())):
        halves = [
            _arrived(outputs, _times(vector, (index >> bit & 1) == side), edges, shapes)
            for side in (0, 1)
        ]
        for k, call in enumerate(calls):
            zero, one = (as_rows(call, half[k]).ne(0).any(1) for half in halves)
            reached = zero | one
            before = seen[k]
            several[k] |= bool((zero & one).any())
            several[k] |= before is not None and not torch.equal(before, reached)
            seen[k] = reached
            so_far = one.long() << bit
            known = found[k]
            found[k] = so_far if known is None else known + so_far
        if all(several):
            break
    return [
        None if alone or f is None or s is None or bool((f >= n).any()) else f.where(s, -1)
        for f, s, alone in zip(found, seen, several, strict=True)
    ]


def _times(vector: Tensor, weights: Tensor) -> Tensor:
    return vector * weights.to(vector).view(-1, *[1] * (vector.ndim - 1))


def _arrived(
    outputs: Tensor, vector: Tensor, edges: Sequence[GradientEdge], shapes: Sequence[Any]
) -> list[Tensor]:
    return [
        outputs.new_zeros(shape) if gradient is None else gradient
        for gradient, shape in zip(pulled_back(outputs, vector, edges), shapes, strict=True)
    ]


def in_order(call: Call, n: int) -> bool:
    """Whether the rows that have an example are those of the batch, one example after another."""
    examples = call.examples
    if examples is None:
        return True
    if len(examples) % n:
        return False
    own = torch.arange(n, device=examples.device).repeat_interleave(len(examples) // n)
    return bool(((examples == own) | (examples < 0)).all())


def order(examples: Tensor, n: int) -> Tensor:
    """`[n, t]`: the rows of each example, in their order; the number of rows where it has fewer."""
    rows = len(examples)
    counts = torch.bincount(examples[examples >= 0], minlength=n)
    ranked = examples.argsort(stable=True)
    ranked = ranked[rows - int(counts.sum()) :]
    place = torch.arange(len(ranked), device=examples.device)
    place = place - (counts.cumsum(0) - counts)[examples[ranked]]
    found = examples.new_full((n, max(1, int(counts.max()))), rows)
    found[examples[ranked], place] = ranked
    return found


def take(tensor: Tensor, rows: Tensor, dim: int = 0) -> Tensor:
    """`tensor` at `rows`, zero where the index is the number of rows."""
    shape = list(tensor.shape)
    shape[dim] = 1
    padded = torch.cat([tensor, tensor.new_zeros(shape)], dim)
    return padded.index_select(dim, rows.flatten()).unflatten(dim, rows.shape)
