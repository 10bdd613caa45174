"""Sums over per-example gradients `D[m,n] = sum_t g[m,n,t] a[n,t]^T`, without ever keeping them all.

The alphabet of every einsum in FisherLab:

    n example    t, s position    m, l output vector    o, p output feature    i, j input feature

`a` is `[n, t, i]`, `g` is `[m, n, t, o]`; a column of `U` is `vec(D[m,n])`, columns run with m major.
Each function chooses between contracting *position pairs* and forming `D` in chunks by counting
multiplications; the counts stand beside the choice.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Bytes one intermediate may take. Chunks are cut to it; results do not depend on it.
WORKSPACE = 256 * 1024**2


def _slices(length: int, bytes_each: int) -> Iterator[slice]:
    step = max(1, int(WORKSPACE // max(1, bytes_each)))
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def _sizes(a: Tensor, g: Tensor) -> tuple[int, int, int, int, int]:
    m, n, t, o = g.shape
    return m, n, t, o, a.shape[2]


def second_moment(x: Tensor) -> Tensor:
    """`sum x x^T` over all leading axes, `[..., d] -> [d, d]`: one flat matmul."""
    flat = x.reshape(-1, x.shape[-1])
    return flat.mT @ flat


def per_example(a: Tensor, g: Tensor) -> Tensor:
    """`D[m,n,o,i]`, all of them: m n t o i multiplications, m n o i numbers."""
    m, n, t, o, i = _sizes(a, g)
    if t == 1:
        return g[:, :, 0, :, None] * a[None, :, 0, None, :]
    # one bmm over n, the output vectors stacked along o: [n, m o, t] @ [n, t, i]
    stacked = g.permute(1, 0, 3, 2).reshape(n, m * o, t)
    return torch.bmm(stacked, a).view(n, m, o, i).transpose(0, 1)


def per_example_chunks(a: Tensor, g: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """`(examples, D[m, chunk, o, i])` with each chunk inside the workspace."""
    m, n, _, o, i = _sizes(a, g)
    for part in _slices(n, m * o * i * a.element_size()):
        yield part, per_example(a[part], g[:, part])


def gram(a: Tensor, g: Tensor) -> Tensor:
    """`K = U^T U`, `[m n, m n]` in float64.

    Position pairs `sum_{t,s} (g_t . g_s)(a_t . a_s)`: (n t)^2 i + (m n t)^2 (o + 1).
    Per-example gradients: m n t o i + (m n)^2 o i.      FNGD (12), NGM (41) are t = 1 of the first.
    """
    m, n, t, o, i = _sizes(a, g)
    pairs = (n * t) ** 2 * i + (m * n * t) ** 2 * (o + 1)
    formed = m * n * t * o * i + (m * n) ** 2 * o * i
    if t == 1 or pairs <= formed:
        return _gram_by_pairs(a, g)
    result = a.new_zeros(m * n, m * n, dtype=torch.float64)
    # chunks over output rows, so that no gradient is formed twice
    for rows in _slices(o, m * n * i * a.element_size()):
        columns = per_example(a, g[..., rows]).reshape(m * n, -1)
        result += (columns @ columns.mT).double()
    return result


def _gram_by_pairs(a: Tensor, g: Tensor) -> Tensor:
    m, n, t, o, i = _sizes(a, g)
    if t == 1:
        aa = (a[:, 0] @ a[:, 0].mT).double()
        flat = g.reshape(m * n, o)
        gg = (flat @ flat.mT).double()
        return (gg.view(m, n, m, n) * aa[None, :, None, :]).reshape(m * n, m * n)
    result = a.new_empty(m, n, m, n, dtype=torch.float64)
    all_a, all_g = a.reshape(n * t, i), g.reshape(m * n * t, o)
    for part in _slices(n, m * t * m * n * t * a.element_size()):
        rows = part.stop - part.start
        aa = (a[part].reshape(rows * t, i) @ all_a.mT).view(1, rows, t, 1, n, t)
        gg = (g[:, part].reshape(-1, o) @ all_g.mT).view(m, rows, t, m, n, t)
        result[:, part] = (gg * aa).sum((2, 5), dtype=torch.float64)
    return result.view(m * n, m * n)


def energies(a: Tensor, g: Tensor) -> Tensor:
    """`||D[m,n]||^2`, `[m, n]` in float64: the diagonal of the Gram matrix.

    Position pairs: n t^2 i + m n t^2 o.      Formed: m n t o i.
    """
    m, n, t, o, i = _sizes(a, g)
    if t == 1:
        return g[:, :, 0].double().square().sum(-1) * a[:, 0].double().square().sum(-1)
    result = a.new_empty(m, n, dtype=torch.float64)
    if t * (i + m * o) <= m * o * i:
        for part in _slices(n, (m + 1) * t * t * a.element_size()):
            aa = torch.bmm(a[part], a[part].mT)
            result[:, part] = ((g[:, part] @ g[:, part].mT) * aa).sum((-2, -1), dtype=torch.float64)
        return result
    for part, D in per_example_chunks(a, g):
        result[:, part] = D.square().sum((-2, -1), dtype=torch.float64)
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
        for matrices in _slices(b, n * t * o * a.element_size()):
            aV = torch.einsum("nti,boi->bnto", a, flat[matrices])
            result[matrices] = torch.einsum("bnto,mnto->bmn", aV, g)
    else:
        for part, D in per_example_chunks(a, g):
            result[:, :, part] = torch.einsum("boi,mnoi->bmn", flat, D)
    return result.view(*V.shape[:-2], m, n)


def combine(a: Tensor, g: Tensor, coefficients: Tensor) -> Tensor:
    """`U c = sum_{m,n} c[m,n] D[m,n]`, `[..., m, n] -> [..., o, i]`: n t o (m + i) each."""
    m, n, t, o, i = _sizes(a, g)
    flat = coefficients.reshape(-1, m, n).to(g.dtype)
    rows = a.reshape(n * t, i)
    result = a.new_empty(flat.shape[0], o, i)
    for part in _slices(flat.shape[0], n * t * o * a.element_size()):
        weighted = torch.einsum("bmn,mnto->bnto", flat[part], g)
        result[part] = weighted.reshape(-1, n * t, o).mT @ rows
    return result.view(*coefficients.shape[:-2], o, i)


def diagonal(a: Tensor, g: Tensor) -> Tensor:
    """`sum_{m,n} D[m,n]^2` entrywise, `[o, i]`.  t = 1: n o (m + i), otherwise formed."""
    if a.shape[1] == 1:
        return g[:, :, 0].square().sum(0).mT @ a[:, 0].square()
    result = a.new_zeros(g.shape[-1], a.shape[-1])
    for _, D in per_example_chunks(a, g):
        result += D.square().sum((0, 1))
    return result


def rotated_diagonal(a: Tensor, g: Tensor, Q_G: Tensor, Q_A: Tensor) -> Tensor:
    """`sum_{m,n} (Q_G^T D[m,n] Q_A)^2` entrywise, `[o', i']`: M times the corrected eigenvalues.

    t = 1: `((g Q_G)^2)^T ((a Q_A)^2)`, no per-example gradient.  Otherwise either the factors are
    rotated first, n t i i' + m n t o o' + m n t o' i', or the formed gradients,
    m n t o i + m n (o o' i + o' i i').
    """
    m, n, t, o, i = _sizes(a, g)
    p, j = Q_G.shape[1], Q_A.shape[1]
    factors_first = n * t * i * j + m * n * t * (o * p + p * j)
    formed_first = m * n * (t * o * i + o * p * i + p * i * j)
    if t == 1 or factors_first <= formed_first:
        return diagonal(a @ Q_A, g @ Q_G)
    result = a.new_zeros(p, j)
    for _, D in per_example_chunks(a, g):
        result += (Q_G.mT @ D @ Q_A).square().sum((0, 1))
    return result


def kronecker_quadratic(a: Tensor, g: Tensor, G: Tensor, A: Tensor) -> Tensor:
    """`<D, G D A>` for every column, `[m, n]` in float64.

    Position pairs `sum_{t,s} (g_t^T G g_s)(a_t^T A a_s)`: n t (i^2 + t i) + m n t (o^2 + t o).
    Formed: m n o i (t + o + i).
    """
    m, n, t, o, i = _sizes(a, g)
    result = a.new_empty(m, n, dtype=torch.float64)
    pairs = n * t * i * (i + t) + m * n * t * o * (o + t)
    if t == 1 or pairs <= m * n * o * i * (t + o + i):
        for part in _slices(n, ((m + 1) * t * t + t * i + m * t * o) * a.element_size()):
            aAa = torch.bmm(a[part] @ A, a[part].mT)
            gGg = (g[:, part] @ G) @ g[:, part].mT
            result[:, part] = (gGg.double() * aAa.double()).sum((-2, -1))
        return result
    for part, D in per_example_chunks(a, g):
        result[:, part] = ((G @ D @ A) * D).sum((-2, -1), dtype=torch.float64)
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
        for part in _slices(n, (t * t + m * t * o) * a.element_size()):
            aa = torch.bmm(weight[part], a[part].mT)
            result += (aa @ g[:, part]).reshape(-1, o).mT @ g[:, part].reshape(-1, o)
        return symmetric(result)
    for _, D in per_example_chunks(a, g):
        DA = D if A is None else D @ A
        result += DA.transpose(0, 2).reshape(o, -1) @ D.transpose(0, 2).reshape(o, -1).mT
    return symmetric(result)


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
        for part in _slices(n, ((m + 1) * t * t + t * i) * a.element_size()):
            S = (weight[:, part] @ g[:, part].mT).sum(0)
            result += torch.bmm(S, a[part]).reshape(-1, i).mT @ a[part].reshape(-1, i)
        return symmetric(result)
    for _, D in per_example_chunks(a, g):
        GD = D if G is None else G @ D
        result += GD.reshape(-1, i).mT @ D.reshape(-1, i)
    return symmetric(result)


def symmetric(matrix: Tensor) -> Tensor:
    """`(S + S^T) / 2`, against the rounding of chunked sums."""
    return (matrix + matrix.mT) / 2
