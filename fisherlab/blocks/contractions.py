"""Sums over per-example gradients `D[m,n] = sum_t g[m,n,t] a[n,t]^T`, never keeping them all.

The alphabet of every einsum in FisherLab:

    n example    t, s position    m, l output vector    o, p output feature    i, j input feature

`a` is `[n, t, i]`, `g` is `[m, n, t, o]`; a column of `U` is `vec(D[m,n])`, columns run m major.
Each function chooses between contracting *position pairs* and forming `D` in chunks by counting
multiplications; the counts stand beside the choice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from fisherlab.blocks.basis import Basis
from fisherlab.blocks.numerics import are_near, squares, symmetrise, units

# Bytes one intermediate may take. Chunks are cut to it; results do not depend on it.
WORKSPACE = 256 * 1024**2
SMALLEST = 1024**2
# Bytes of the gradients in flight during a pass over them on a CPU: a buffer that stays in its
# cache and is used again (98 ms against 502 in new memory, 128 gradients of 512 x 2048).
IN_FLIGHT = 8 * 1024**2
# Output features of a gradient that are formed together where many matrices meet all gradients.
ROWS = 64
# Entries of a gradient from which on one pass per gradient beats a square and a sum of many.
WIDE = 2**16


@contextmanager
def workspace(size: int | None = None) -> Iterator[None]:
    """Intermediates of at most `size` bytes (None: as many as now) until the block is left."""
    global WORKSPACE
    before = WORKSPACE
    WORKSPACE = before if size is None else min(max(size, SMALLEST), before)
    try:
        yield
    finally:
        WORKSPACE = before


def halve_workspace() -> bool:
    """Half the bytes of an intermediate; False where less would not help."""
    global WORKSPACE
    if WORKSPACE <= SMALLEST:
        return False
    WORKSPACE //= 2
    return True


def slices(length: int, bytes_each: int, like: Tensor | None = None) -> Iterator[slice]:
    """`range(length)` in parts of at most `WORKSPACE` bytes.

    In a pass over tensors where `like` is, on a CPU of at most `IN_FLIGHT`.
    """
    cached = like is not None and like.device.type == "cpu"
    room = min(IN_FLIGHT, WORKSPACE) if cached else WORKSPACE
    step = max(1, int(room // max(1, bytes_each)))
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def joined(parts: Sequence[Tensor], axis: int) -> Tensor:
    """`torch.cat(parts, axis)`: without a copy of parts that lie so in one tensor."""
    first = parts[0]
    if len(parts) == 1:
        return first
    kinds = {(x.stride(), x.untyped_storage().data_ptr(), x.dtype) for x in parts}
    others = {(x.shape[:axis], x.shape[axis + 1 :]) for x in parts}
    step, start, lying = first.stride(axis), first.storage_offset(), len(kinds | others) == 2
    for part in parts:
        lying &= step > 0 and part.storage_offset() == start
        start += part.shape[axis] * step
    if not lying:
        return torch.cat(list(parts), axis)
    length = sum(part.shape[axis] for part in parts)
    shape = (*first.shape[:axis], length, *first.shape[axis + 1 :])
    return first.as_strided(shape, first.stride(), first.storage_offset())


def _sizes(a: Tensor, g: Tensor) -> tuple[int, int, int, int, int]:
    m, n, t, o = g.shape
    return m, n, t, o, a.shape[2]


def second_moment(x: Tensor) -> Tensor:
    """`sum x x^T` over all leading axes, `[..., d] -> [d, d]`: one flat matmul.

    A convolution's gradients lie in memory as `[..., d, t]`. There each example takes one small
    product; its `d d` numbers are no more than the `t d` that a new layout would write.
    """
    t, d = x.shape[-2:]
    if d <= t and x.stride(-2) == 1 and x.stride(-1) == t:
        channels = x.mT.reshape(-1, d, t)
        total = x.new_zeros(d, d)
        for part in slices(len(channels), d * d * x.element_size()):
            total += torch.bmm(channels[part], channels[part].mT).sum(0)
        return total
    flat = x.reshape(-1, d)
    return symmetric_product(flat, flat)


def symmetric_product(X: Tensor, Y: Tensor) -> Tensor:
    """`X^T Y` `[d, d]` that is known to be symmetric: wide ones take 5/8 of the n d d products."""
    d = X.shape[1]
    if d < 512 or X.is_cuda:
        return X.mT @ Y
    result = X.new_empty(d, d)
    step = -(-d // 4)
    for start in range(0, d, step):
        stop = min(start + step, d)
        result[start:, start:stop] = X[:, start:].mT @ Y[:, start:stop]
        result[start:stop, stop:] = result[stop:, start:stop].mT
    return result


def evened(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """The same gradients of inputs near 1: `a / u` and `u g`, `u` a power of two per position.

    `u` is 0 beside inputs that are all zero, whose `g` may be of any size. Inputs that are near 1
    remain as they are.
    """
    if are_near(a, (-1,)):
        return a, g
    near, u = units(a, (-1,))
    return near, g * torch.where(a.detach().any(-1, keepdim=True), u, 0)


def per_example(a: Tensor, g: Tensor) -> Tensor:
    """`D[m,n,o,i]`, all of them: m n t o i multiplications, m n o i numbers."""
    m, n, t, o, i = _sizes(a, g)
    if t == 1:
        return g[:, :, 0, :, None] * a[None, :, 0, None, :]
    return torch.bmm(stacked(g), a).view(n, m, o, i).transpose(0, 1)


def stacked(g: Tensor) -> Tensor:
    """The output vectors along o, `[n, m o, t]`: one bmm with `a` makes all gradients."""
    m, n, t, o = g.shape
    return g.permute(1, 0, 3, 2).reshape(n, m * o, t)


def per_example_chunks(a: Tensor, g: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """`(examples, D[m, chunk, o, i])` in one buffer: `D` may be changed, and is gone at the next.

    A chunk is inside the workspace, on a CPU inside `IN_FLIGHT`.
    """
    m, n, _, o, i = _sizes(a, g)
    size = m * o * i * a.element_size()
    parts = list(slices(n, size, a))
    buffer = a.new_empty(parts[0].stop, m * o, i)
    for part in parts:
        out = buffer[: part.stop - part.start]
        torch.bmm(stacked(g[:, part]).detach(), a[part].detach(), out=out)
        yield part, out.view(-1, m, o, i).transpose(0, 1)


def gram(a: Tensor, g: Tensor) -> Tensor:
    """`K = U^T U`, `[m n, m n]` in float64.      FNGD (12), NGM (41) are t = 1 by pairs."""
    return cross_gram(a, g, a, g)


def cross_gram(a: Tensor, g: Tensor, b: Tensor, h: Tensor) -> Tensor:
    """`U^T W` for the columns `U` of `a, g` and `W` of `b, h`, `[m n, p q]` in float64.

    Its products are made in float64 whatever the dtype. The damping of a wide layer lies 1e-9 below
    the largest eigenvalue; there a float32 Gram matrix is noise and not positive semi-definite.

    Position pairs `sum_{t,s} (g_t . h_s)(a_t . b_s)`: (n t)(q s) i + (m n t)(p q s)(o + 1).
    Per-example gradients: (m n t + p q s) o i + (m n)(p q) o i.
    """
    m, n, t, o, i = _sizes(a, g)
    p, q, s = h.shape[:3]
    pairs = n * t * q * s * i + m * n * t * p * q * s * (o + 1)
    formed = (m * n * t + p * q * s) * o * i + m * n * p * q * o * i
    if t == 1 and s == 1:
        return _gram_of_rows(a, g, b, h)
    if pairs <= formed:
        return _gram_by_pairs(a, g, b, h)
    result = a.new_zeros(m * n, p * q, dtype=torch.float64)
    same = b is a and h is g
    a, g = a.double(), g.double()
    b, h = (a, g) if same else (b.double(), h.double())
    # chunks over output rows, so that no gradient is formed twice
    for rows in slices(o, 8 * (m * n + p * q) * i):
        ours = per_example(a, g[..., rows]).reshape(m * n, -1)
        theirs = ours if same else per_example(b, h[..., rows]).reshape(p * q, -1)
        result += ours @ theirs.mT
    return result


def _gram_of_rows(a: Tensor, g: Tensor, b: Tensor, h: Tensor) -> Tensor:
    """`(g . h)(a . b)` of one position each, in the memory of the result."""
    (m, n, _, o), (p, q) = g.shape, h.shape[:2]
    inputs, gradients = a[:, 0].double(), g.double().reshape(m * n, o)
    others = inputs if b is a else b[:, 0].double()
    theirs = gradients if h is g else h.double().reshape(p * q, o)
    result = (gradients @ theirs.mT).view(m, n, p, q)
    return result.mul_((inputs @ others.mT)[:, None]).view(m * n, p * q)


def _gram_by_pairs(a: Tensor, g: Tensor, b: Tensor, h: Tensor) -> Tensor:
    m, n, t, o, i = _sizes(a, g)
    p, q, s = h.shape[:3]
    same = b is a and h is g
    a, g = a.double(), g.double()
    b, h = (a, g) if same else (b.double(), h.double())
    result = a.new_empty(m, n, p, q)
    for part in slices(n, 8 * m * t * p * q * s, a):
        # one set of columns has a symmetric matrix: the part left of the diagonal is known
        rest = slice(part.start if same else 0, q)
        aa = a[part].reshape(-1, i) @ b[rest].reshape(-1, i).mT
        gg = g[:, part].reshape(-1, o) @ h[:, rest].reshape(-1, o).mT
        products = gg.view(m, -1, t, p, q - rest.start, s)
        products *= aa.view(1, -1, t, 1, q - rest.start, s)
        result[:, part, :, rest] = products.sum((2, 5))
        if same:
            below = slice(part.stop, q)
            result[:, below, :, part] = result[:, part, :, below].permute(2, 3, 0, 1)
    return result.view(m * n, p * q)


def energies(a: Tensor, g: Tensor) -> Tensor:
    """`||D[m,n]||^2`, `[m, n]` in float64: the diagonal of the Gram matrix.

    Position pairs: n t^2 i + m n t^2 o.      Formed: m n t o i.
    """
    m, n, t, o, i = _sizes(a, g)
    if t == 1:
        return g[:, :, 0].double().square().sum(-1) * a[:, 0].double().square().sum(-1)
    result = a.new_empty(m, n, dtype=torch.float64)
    if t * (i + m * o) <= m * o * i:
        for part in slices(n, ((m + 1) * t * t + t * (i + m * o)) * a.element_size()):
            # fourth powers, in the unit of each example
            (x, s), (y, r) = units(a[part], (-2, -1)), units(g[:, part], (-2, -1))
            products = (y @ y.mT) * torch.bmm(x, x.mT)
            scale = (s.double() * r.double())[..., 0, 0]
            result[:, part] = products.sum((-2, -1), dtype=torch.float64) * scale.square()
        return result
    for part, D in per_example_chunks(a, g):
        result[:, part] = squares(D.flatten(-2))
    return result


def project(a: Tensor, g: Tensor, V: Tensor) -> Tensor:
    """`U^T V`: `<D[m,n], V>` for every matrix of `V` `[..., o, i] -> [..., m, n]`.

    Through `a V^T`, with b matrices: b n t o (i + m).      Formed: m n o i (t + b).
    """
    m, n, t, o, i = _sizes(a, g)
    flat = V.reshape(-1, o, i)
    b = flat.shape[0]
    result = a.new_empty(b, m, n)
    if b * t * (i + m) <= m * i * (t + b):
        for matrices in slices(b, n * t * o * a.element_size()):
            if t == 1:
                aV = (a[:, 0] @ flat[matrices].reshape(-1, i).mT).view(n, -1, o)
                result[matrices] = torch.bmm(aV, g[:, :, 0].permute(1, 2, 0)).permute(1, 2, 0)
                continue
            aV = torch.einsum("nti,boi->bnto", a, flat[matrices])
            result[matrices] = torch.einsum("bnto,mnto->bmn", aV, g)
        return result.view(*V.shape[:-2], m, n)
    result.zero_()
    # some rows of all matrices stay in the cache while the examples pass by
    for start in range(0, o, ROWS):
        some = flat[:, start : start + ROWS].flatten(1)
        for part, D in per_example_chunks(a, g[..., start : start + ROWS]):
            products = some @ D.transpose(0, 1).reshape(-1, some.shape[1]).mT
            result[:, :, part] += products.view(b, -1, m).transpose(1, 2)
    return result.view(*V.shape[:-2], m, n)


def project_pairs(a: Tensor, g: Tensor, q_G: Tensor, q_A: Tensor) -> Tensor:
    """`<D[m,n], q_G q_A^T>` for columns `[o, k]`, `[i, k]`: `[k, m, n]`, n t k (i + m o)."""
    n, t, i = a.shape
    # the few columns first: half the time of a tall product with few columns behind it
    inputs = (q_A.mT.contiguous() @ a.reshape(n * t, i).mT).view(-1, 1, n, t)
    return ((g @ q_G).permute(3, 0, 1, 2) * inputs).sum(-1)


def combine(a: Tensor, g: Tensor, coefficients: Tensor) -> Tensor:
    """`U c = sum_{m,n} c[m,n] D[m,n]`, `[..., m, n] -> [..., o, i]`: n t o (m + i) each."""
    m, n, t, o, i = _sizes(a, g)
    flat = coefficients.reshape(-1, m, n).to(g.dtype)
    rows = a.reshape(n * t, i)
    result = a.new_empty(flat.shape[0], o, i)
    for part in slices(flat.shape[0], n * t * o * a.element_size()):
        if t == 1:
            weights = flat[part].permute(2, 0, 1).contiguous()  # [n, b, m], as bmm reads it
            weighted = torch.bmm(weights, g[:, :, 0].transpose(0, 1)).view(n, -1)
            result[part] = (weighted.mT @ rows).view(-1, o, i)
            continue
        weighted = torch.einsum("bmn,mnto->bnto", flat[part], g)
        result[part] = weighted.reshape(-1, n * t, o).mT @ rows
    return result.view(*coefficients.shape[:-2], o, i)


def diagonal(a: Tensor, g: Tensor) -> Tensor:
    """`sum_{m,n} D[m,n]^2` entrywise, `[o, i]`.  t = 1: n o (m + i), otherwise formed."""
    _, _, t, o, i = _sizes(a, g)
    if t == 1:
        (a, s), (g, r) = units(a), units(g)
        squares = g[:, :, 0].square().sum(0).mT @ a[:, 0].square()
        return squares * (s * r) * (s * r)
    result = a.new_zeros(o, i)
    for _, D in per_example_chunks(a, g):
        if o * i < WIDE:
            result += D.square_().sum((0, 1))
            continue
        for gradient in D.transpose(0, 1).flatten(0, 1):
            result.addcmul_(gradient, gradient)
    return result


def grouped_diagonal(a: Tensor, g: Tensor, Q: Tensor) -> Tensor:
    """`sum_{m,n} <Q[o,c,:,l], D[m,n,o,c,:]>^2`, `[o, c, l]`: one basis per group of k inputs.

    t = 1: n o i k, the output vectors summed first.  Otherwise formed, m n o i k.
    """
    o, c, k, _ = Q.shape
    if a.shape[1] == 1:
        (a, s), (g, r) = units(a), units(g)
        rows = a[:, 0, : c * k].unflatten(-1, (c, k)).transpose(0, 1)  # [c, n, k]
        weights = g[:, :, 0].square().sum(0).mT.contiguous()  # [o, n]
        result = Q.new_empty(o, c, Q.shape[-1])
        for part in slices(o, len(a) * c * Q.shape[-1] * Q.element_size(), a):
            result[part] = (weights[part, None, None] @ (rows @ Q[part]).square())[:, :, 0]
        return result * (s * r) * (s * r)
    result = Q.new_zeros(o, c, Q.shape[-1])
    for _, D in per_example_chunks(a[..., : c * k], g):
        groups = D.reshape(-1, o, c, k)
        result += torch.einsum("rock,ockl->rocl", groups, Q).square().sum(0)
    return result


def grouped_moments(a: Tensor, g: Tensor, c: int, k: int) -> Tensor:
    """`sum_{m,n} D[m,n,o,c,:] D[m,n,o,c,:]^T`, `[o, c, k, k]`, of the first `c k` inputs.

    t = 1: n o i k, the output vectors summed first.  Otherwise formed, m n o i k.
    """
    o = g.shape[-1]
    a = a[..., : c * k]
    if a.shape[1] == 1:
        (a, s), (g, r) = units(a), units(g)
        weights = g[:, :, 0].square().sum(0).mT[:, None, None]  # [o, 1, 1, n]
        rows = a[:, 0].unflatten(-1, (c, k)).transpose(0, 1)  # [c, n, k]
        return ((weights * rows.mT) @ rows) * (s * r) * (s * r)
    result = a.new_zeros(o * c, k, k)
    for _, D in per_example_chunks(a, g):
        rows = D.reshape(-1, o * c, k).transpose(0, 1)
        result.baddbmm_(rows.mT, rows)
    return result.view(o, c, k, k)


def rotated_diagonal(a: Tensor, g: Tensor, Q_G: Basis, Q_A: Basis) -> Tensor:
    """`sum_{m,n} (Q_G^T D[m,n] Q_A)^2` entrywise, `[o', i']`: M times the corrected eigenvalues.

    t = 1: `((g Q_G)^2)^T ((a Q_A)^2)`, no per-example gradient.  Otherwise either the factors are
    rotated first, n t i i' + m n t o o' + m n t o' i', or the formed gradients,
    m n t o i + m n (o o' i + o' i i').
    """
    m, n, t, o, i = _sizes(a, g)
    p, j = Q_G.shape[1], Q_A.shape[1]
    factors_first = n * t * i * j + m * n * t * (o * p + p * j)
    formed_first = m * n * (t * o * i + o * p * i + p * i * j)
    if t == 1:
        return diagonal(a @ Q_A, g @ Q_G)
    result = a.new_zeros(p, j)
    if factors_first <= formed_first:
        buffer: Tensor | None = None
        for part in slices(n, t * max(i, j) * a.element_size(), a):
            rows = a[part].reshape(-1, i)
            # one buffer for all parts: new memory costs as much as a tenth of the product
            buffer = rows.new_empty(len(rows), j) if buffer is None else buffer
            if isinstance(Q_A, Tensor):
                inputs = torch.mm(rows.detach(), Q_A.detach(), out=buffer[: len(rows)])
            else:
                inputs = rows @ Q_A
            # g^T first: the gradients are stacked by rows [o', t], which are contiguous so
            result += diagonal(inputs.view(-1, t, j), (Q_G.mT @ g[:, part].mT).mT)
        return result
    for _, D in per_example_chunks(a, g):
        result += rotated_squares(D.reshape(-1, o, i), Q_G, Q_A)
    return result


def rotated_squares(D: Tensor, Q_G: Basis, Q_A: Basis) -> Tensor:
    """`sum_r (Q_G^T D_r Q_A)^2` entrywise of formed gradients `[r, o, i]`."""
    (o, i), (p, j) = D.shape[1:], (Q_G.shape[1], Q_A.shape[1])
    result = D.new_zeros(p, j)
    size = (o * i + max(p * i, o * j) + p * j) * D.element_size()
    # the side that shrinks the product more goes first
    output_first = p * i * (o + j) <= o * j * (i + p)
    for part in slices(len(D), size, D):
        rotated = (Q_G.mT @ D[part]) @ Q_A if output_first else Q_G.mT @ (D[part] @ Q_A)
        result += rotated.square().sum(0)
    return result


def kronecker_quadratic(a: Tensor, g: Tensor, G: Tensor, A: Tensor) -> Tensor:
    """`<D, G D A^T>` for every column, `[m, n]` in float64.

    Position pairs `sum_{t,s} (g_t^T G g_s)(a_t^T A a_s)`: n t (i^2 + t i) + m n t (o^2 + t o).
    Formed: m n o i (t + o + i).
    """
    if a.dtype != torch.float64:  # of fourth powers
        parts, scales = zip(*map(units, (a, g, G, A)), strict=True)
        s, r, u, v = (scale.double() for scale in scales)
        a, g, G, A = parts
        return _kronecker_quadratic(a, g, G, A) * (s * r).square() * (u * v)
    return _kronecker_quadratic(a, g, G, A)


def _kronecker_quadratic(a: Tensor, g: Tensor, G: Tensor, A: Tensor) -> Tensor:
    m, n, t, o, i = _sizes(a, g)
    result = a.new_empty(m, n, dtype=torch.float64)
    pairs = n * t * i * (i + t) + m * n * t * o * (o + t)
    if t == 1:
        aAa = ((a[:, 0] @ A) * a[:, 0]).sum(-1, dtype=torch.float64)
        return aAa * ((g[:, :, 0] @ G) * g[:, :, 0]).sum(-1, dtype=torch.float64)
    if pairs <= m * n * o * i * (t + o + i):
        for part in slices(n, ((m + 1) * t * t + t * i + m * t * o) * a.element_size()):
            aAa = torch.bmm(a[part] @ A, a[part].mT)
            gGg = (g[:, part] @ G) @ g[:, part].mT
            result[:, part] = (gGg.double() * aAa.double()).sum((-2, -1))
        return result
    for part, D in per_example_chunks(a, g):
        result[:, part] = ((G @ D @ A.mT) * D).sum((-2, -1), dtype=torch.float64)
    return result


def left_moment(a: Tensor, g: Tensor, A: Tensor | None = None) -> Tensor:
    """`sum_{m,n} D A D^T`, `[o, o]`; `A = I` by default (the output-side partial trace).

    Position pairs: n t i (t + i) + m n t o (t + o), the i^2 only with an `A`.
    Formed: m n o i (t + o + i), the last i only with an `A`.
    """
    m, n, t, o, i = _sizes(a, g)
    weight = a if A is None else a @ A
    if t == 1:
        weights = (a[:, 0] * weight[:, 0]).sum(-1)
        return (g[:, :, 0] * weights[:, None]).reshape(-1, o).mT @ g.reshape(-1, o)
    extra = 0 if A is None else i
    result = a.new_zeros(o, o)
    if n * t * i * t + m * n * t * o * (t + o) <= m * n * o * i * (t + o + extra):
        for part in slices(n, (t * t + m * t * o) * a.element_size()):
            aa = torch.bmm(a[part], weight[part].mT)
            result += (aa @ g[:, part]).reshape(-1, o).mT @ g[:, part].reshape(-1, o)
        return symmetrise(result) if A is None else result
    for _, D in per_example_chunks(a, g):
        DA = D if A is None else D @ A
        result += DA.transpose(0, 2).reshape(o, -1) @ D.transpose(0, 2).reshape(o, -1).mT
    return symmetrise(result) if A is None else result


def right_moment(a: Tensor, g: Tensor, G: Tensor | None = None) -> Tensor:
    """`sum_{m,n} D^T G D`, `[i, i]`; `G = I` by default (the input-side partial trace).

    Position pairs, with `S_n = sum_m g G g^T`: m n t o t + n t i (t + i).
    Formed: m n o i (t + i + o), the last o only with a `G`.
    """
    m, n, t, o, i = _sizes(a, g)
    weight = g if G is None else g @ G
    if t == 1:
        weights = (g[:, :, 0] * weight[:, :, 0]).sum((0, 2))
        return (a[:, 0] * weights[:, None]).mT @ a[:, 0]
    extra = 0 if G is None else o
    result = a.new_zeros(i, i)
    if m * n * t * o * t + n * t * i * (t + i) <= m * n * o * i * (t + i + extra):
        for part in slices(n, ((m + 1) * t * t + t * i) * a.element_size()):
            S = (g[:, part] @ weight[:, part].mT).sum(0)
            weighted, rows = torch.bmm(S, a[part]).reshape(-1, i), a[part].reshape(-1, i)
            # an antisymmetric G gives an antisymmetric product
            result += symmetric_product(weighted, rows) if G is None else weighted.mT @ rows
        return symmetrise(result) if G is None else result
    for _, D in per_example_chunks(a, g):
        GD = D if G is None else G @ D
        result += D.reshape(-1, i).mT @ GD.reshape(-1, i)
    return symmetrise(result) if G is None else result
