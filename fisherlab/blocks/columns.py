"""The columns of `U`: per-example gradients kept as inputs and output gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fisherlab.blocks import contractions
from fisherlab.blocks.basis import Basis, Coordinates, Space, matrix_of
from fisherlab.blocks.entry import check_columns
from fisherlab.blocks.numerics import (
    RANK_TOLERANCE,
    check_gram,
    eigh,
    qr,
    squares,
    sum_of,
    svd,
    symmetrise,
    trace_of,
)
from fisherlab.blocks.reads import together
from fisherlab.blocks.work import cached, once

# Output features per output gradient from which on these are taken in the space that they span.
WIDE_OUTPUTS = 4
# Up to this share of its features a row is sparse: a one-hot one, the tokens of one example.
SPARSE = 0.05


class Columns:
    """`U = [vec(D[m,n])]`, `D[m,n] = sum_t g[m,n,t] a[n,t]^T`; `a` `[n, t, i]`, `g` `[m, n, t, o]`.

    Everything here is a sum over columns, without any `1/M`, and is computed once. All holders of
    the same object share it: the exact block, the approximations of a layer, the metrics. `room` is
    how many bytes the gradients may take to be kept, where many products are to come. `careful`
    columns ask whether their positions cancel. `mixed` are the axes of `[o, i]` whose features are
    sums of a layer's own: each has the rounding of all.
    """

    mixed: tuple[int, ...] = ()

    def __init__(
        self,
        a: Tensor,
        g: Tensor,
        room: int = 0,
        careful: bool = False,
        mixed: tuple[int, ...] = (),
    ) -> None:
        check_columns(a, g)
        self.a, self.g, self.room, self.careful, self.mixed = a, g, room, careful, mixed

    @cached_property
    def shape(self) -> tuple[int, int]:
        """`(o, i)`."""
        return self.g.shape[-1], self.a.shape[-1]

    @cached_property
    def sizes(self) -> tuple[int, int]:
        """`(m, n)`."""
        return self.g.shape[0], self.g.shape[1]

    @cached_property
    def count(self) -> int:
        """`R = m n`."""
        m, n = self.sizes
        return m * n

    @property
    def positions(self) -> int:
        """t."""
        return self.a.shape[1]

    @cached_property
    def dtype(self) -> torch.dtype:
        return self.a.dtype

    @property
    def double(self) -> Columns:
        """The same columns in float64: many exact products convert them once."""
        return self if self.dtype == torch.float64 else self._double

    @cached_property
    def _double(self) -> Columns:
        return Doubled(self)

    @cached_property
    def device(self) -> torch.device:
        return self.a.device

    def tensors(self) -> Iterator[Tensor]:
        """The tensors that the columns are made of."""
        yield from (self.a, self.g)

    @cached
    def formed(self) -> Tensor | None:
        """The gradients, `[R, o i]`, where they take less room than `a` and `g`, or `room`."""
        m, n, t, o = self.g.shape
        fits = m * n * o * self.a.shape[2] * self.a.element_size() <= self.room
        if t == 1 or not (compact(m, t, *self.shape) or fits):
            return None
        return contractions.per_example(self.a, self.g).reshape(self.count, -1)

    @property
    def even(self) -> Columns:
        """The same columns with inputs near 1, where their own are far from it; themselves else.

        What is multiplied with one side first passes the range where the other side would take it
        back: products in float32 would be lost.
        """
        # an answer that waits is not kept: it may prove wrong
        return self._even if together() is None else self._found_even()

    @cached_property
    def _even(self) -> Columns:
        return self._found_even()

    def _found_even(self) -> Columns:
        a, g = contractions.evened(self.a, self.g)
        return self if a is self.a else Columns(a, g, self.room, self.careful, self.mixed)

    @cached_property
    def cancellation(self) -> float:
        """`sum ||D||^2` over `sum_{m,n} (sum_t |g| |a|)^2`; 1 at one position."""
        if self.positions == 1:
            return 1.0
        lengths = torch.linalg.vector_norm(self.a, dim=-1, dtype=torch.float64)
        slopes = torch.linalg.vector_norm(self.g, dim=-1, dtype=torch.float64)
        size = float((slopes * lengths).sum(-1).square().sum().detach())
        known = self.formed is not None
        found = self.energies if known else contractions.energies(self.a, self.g)
        return float(found.sum().detach()) / size if size else 1.0

    @property
    def cancels(self) -> bool:
        """Whether positions cancel so far that products of their pairs keep half of the digits."""
        return self.careful and self.cancellation < torch.finfo(self.dtype).eps ** 0.5

    @cached_property
    def apart(self) -> Columns:
        """The same columns of positions that do not cancel; themselves where theirs do not.

        With `a = U S V^T` of each example, `D = sum_r (U^T g)_r (S V^T)_r^T`.
        """
        if not self.cancels:
            return self.even
        # in float64, so that what is left has all digits of what was captured
        of = self.even
        U, S, V = svd(of.a.double(), "inputs of an example")
        a, g = S[..., None] * V, U.mT @ of.g.double()
        return Columns(a.to(self.a), g.to(self.g), self.room, mixed=self.mixed)

    @property
    def matrices(self) -> Tensor:
        """`formed` as `[R, o, i]`."""
        assert self.formed is not None
        return self.formed.view(-1, *self.shape)

    @cached
    def gram(self) -> Tensor:
        """`K = U^T U`, `[R, R]` in float64; raises `BlockTooLarge` past the memory budget."""
        check_gram(self.count, self.device)
        if self.formed is None:
            return symmetrise(contractions.gram(self.apart.a, self.apart.g))
        # the same materialised gradients as in products: the inverse relies on exact cancellation
        return formed_gram(self.formed)

    @property
    def short(self) -> bool:
        """Whether to materialise per-example gradients before a contraction (`m o < t`)."""
        m, _, t, o = self.g.shape
        return m * o < t and self.formed is not None

    def gram_tiles(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """`K` `[m, p, m, q]` in float64 over pairs of ranges of examples, p no later than q.

        The Gram matrix itself where it is known or small; else a workspace at a time, at any R.
        """
        m, n = self.sizes
        if Columns.gram.known(self) is not None or 8 * self.count**2 <= contractions.WORKSPACE:
            yield slice(0, n), slice(0, n), self.gram.view(m, n, m, n)
            return
        # a quarter of it, since a tile is made of three others
        step = max(1, int((contractions.WORKSPACE / 32) ** 0.5) // m)
        ranges = [slice(k, min(k + step, n)) for k in range(0, n, step)]
        for first, p in enumerate(ranges):
            a, g = self.a[p], self.g[:, p]
            for q in ranges[first:]:
                b, h = (a, g) if q is p else (self.a[q], self.g[:, q])
                K = contractions.cross_gram(a, g, b, h)
                yield p, q, K.view(m, len(a), m, len(b))

    @cached
    def pair_sums(self) -> tuple[Tensor, Tensor]:
        """`sum_k <F_n, F_k>` and `<F_n, F_n>` of the examples' own blocks, `[n]` in float64."""
        rows = torch.zeros(self.sizes[1], dtype=torch.float64, device=self.device)
        own = torch.zeros_like(rows)
        for p, q, K in self.gram_tiles():
            products = K.square().sum((0, 2))
            rows[p] += products.sum(1)
            if p == q:
                own[p] = products.diagonal()
            else:
                rows[q] += products.sum(0)
        return rows, own

    @cached
    def gram_eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues of the Gram matrix, ascending, and their vectors in its columns.

        From the smaller of `U^T U` and `U U^T`: with more columns than parameters `[R, o i]`.
        """
        if self.known_inside is not None:
            return self.known_inside.gram_eigen
        o, i = self.shape
        if self.count <= o * i:
            return self._independent_eigen()
        check_gram(self.count, self.device, o * i)
        if self.formed is None:
            # exact products of what the columns are made of, as the Gram matrix's own
            D = contractions.per_example(self.a.double(), self.g.double()).reshape(self.count, -1)
        else:
            D = self.formed.double()
        values, V = eigh(D.mT @ D, "Gram matrix")
        # D v has the length of its eigenvalue's root. Divided by it, the rounding of v along the
        # largest would stay in the smallest: QR takes it out, the largest first.
        Q, _ = qr((D @ V).flip(1), "eigenvectors of the Gram matrix")
        return values, Q.flip(1)

    def _independent_eigen(self) -> tuple[Tensor, Tensor]:
        """`gram_eigen` within what each example's own columns span.

        The C columns of an exact Fisher span C - 1 dimensions, and a dead example's none. Rounding
        in their complement is a null vector of the whole matrix, known without its eigensolver.
        """
        m, n = self.sizes
        K = self.gram.view(m, n, m, n)
        values, Q = eigh(K.diagonal(0, 1, 3).permute(2, 0, 1), "Gram matrix of an example")
        floor = RANK_TOLERANCE * m * torch.finfo(torch.float64).eps
        kept = (values > floor * values.amax()).sum(1)
        k = int(kept.max())
        if k == m or not k:
            return eigh(self.gram, "Gram matrix")
        T = Q[..., m - k :]  # [n, m, k], ascending: the last ones are the largest
        half = torch.bmm(T.mT, K.permute(1, 0, 2, 3).reshape(n, m, -1)).view(n * k, m, n)
        inner = torch.bmm(half.permute(2, 0, 1), T).transpose(0, 1).reshape(n * k, n * k)
        values, Z = eigh(inner, "Gram matrix")
        return values, torch.bmm(T, Z.view(n, k, -1)).transpose(0, 1).reshape(m * n, -1)

    @property
    def eigen_known(self) -> bool:
        """Whether `gram_eigen`, ten times the work of a Cholesky factor, is there already."""
        inside = self.known_inside
        return Columns.gram_eigen.known(self) is not None or (
            inside is not None and inside.eigen_known
        )

    @cached
    def energies(self) -> Tensor:
        """`||D[m,n]||^2`, `[m, n]` in float64."""
        gram = Columns.gram.known(self)
        if gram is not None:
            return gram.diagonal().view(self.sizes)
        if self.known_inside is not None:
            return self.known_inside.energies
        if self.formed is not None:
            return sum_of(map(squares, self._parts())).view(self.sizes)
        return contractions.energies(self.apart.a, self.apart.g)

    @cached
    def left(self) -> Tensor:
        """`sum D D^T`, `[o, o]`."""
        if not self.short:
            return contractions.left_moment(self.apart.a, self.apart.g)
        flat = self.matrices.transpose(0, 1).reshape(self.shape[0], -1)
        return symmetrise(flat @ flat.mT)

    @cached
    def right(self) -> Tensor:
        """`sum D^T D`, `[i, i]`."""
        if not self.short:
            return contractions.right_moment(self.apart.a, self.apart.g)
        return contractions.second_moment(self.matrices.reshape(-1, self.shape[1]))

    def left_diagonal(self, Q: Basis) -> Tensor:
        """`diag(Q^T left Q)`, `[o']` float64; of a thin basis without `left`, `[o, o]`."""
        if Q.shape[1] < len(Q):
            return contractions.left_moment(self.even.a, self.even.g @ Q).diagonal().double()
        return ((self.left @ Q) * Q).sum(0, dtype=torch.float64)

    def right_diagonal(self, Q: Basis) -> Tensor:
        """`diag(Q^T right Q)`, `[i']` float64; of a thin basis without `right`, `[i, i]`."""
        if Q.shape[1] < len(Q):
            return contractions.right_moment(self.even.a @ Q, self.even.g).diagonal().double()
        return ((self.right @ Q) * Q).sum(0, dtype=torch.float64)

    @property
    def trace(self) -> Tensor:
        """`sum ||D||^2`, 0-d float64; from `left` where that is known."""
        left = Columns.left.known(self)
        return self.energies.sum() if left is None else trace_of(left)

    @cached
    def squares(self) -> Tensor:
        """`sum D^2` entrywise, `[o, i]`."""
        if self.formed is None:
            return contractions.diagonal(self.even.a, self.even.g)
        return torch.cat([D.square().sum(0) for D in self._parts()]).view(self.shape)

    @cached
    def lengths(self) -> Tensor:
        """`(sum D^2)^{1/2}` entrywise, `[o, i]` in float64: a sum of columns is rounded to its eps.

        Larger where positions cancel.
        """
        if self.formed is None:
            found = contractions.diagonal(self.a.double(), self.g.double())
        else:
            parts = [D.square().sum(0) for _, D in _doubled(self.formed)]
            found = torch.cat(parts).view(self.shape)
        if self.mixed:
            found = found.mean(self.mixed, True).expand(self.shape)
        if self.careful and self.cancellation:
            found = found / self.cancellation
        return found.sqrt()

    def _parts(self) -> Iterator[Tensor]:
        """`formed`, some of the parameters at a time."""
        assert self.formed is not None
        size = self.count * self.formed.element_size()
        for part in contractions.slices(self.formed.shape[1], size, self.formed):
            yield self.formed[:, part]

    @cached_property
    def grouped(self) -> dict[tuple[int, int], Tensor]:
        """`grouped_moments` that have been asked for, by (c, k)."""
        return {}

    def grouped_moments(self, c: int, k: int) -> Tensor:
        """`sum D D^T` of every output feature and group of k inputs, `[o, c, k, k]`."""
        of = self.even
        return once(self.grouped, (c, k), lambda: contractions.grouped_moments(of.a, of.g, c, k))

    @cached_property
    def _rotated(self) -> dict[tuple[Any, ...], tuple[Basis, Basis, Tensor]]:
        """A basis and `rotated_squares` in it, by the ids of the basis."""
        return {}

    def knows(self, Q_G: Basis, Q_A: Basis) -> bool:
        """Whether `rotated_squares` of this basis costs nothing."""
        return (id(Q_G), id(Q_A)) in self._rotated

    def rotated_squares(self, Q_G: Basis, Q_A: Basis) -> Tensor:
        """`sum (Q_G^T D Q_A)^2` entrywise, `[o', i']` float64, remembered per basis."""
        key = id(Q_G), id(Q_A)
        # with the bases, so that no other tensor takes their place
        return once(self._rotated, key, lambda: (Q_G, Q_A, self._rotated_squares(Q_G, Q_A)))[2]

    def _rotated_squares(self, Q_G: Basis, Q_A: Basis) -> Tensor:
        inside = self.known_inside
        if inside is not None and self.space is not None:
            C_G, C_A = self.space.bases(Q_G, Q_A)
            if C_G is not None and C_A is not None:
                return inside.rotated_squares(C_G, C_A).double()
        Q_G, Q_A = (Q if isinstance(Q, Coordinates) else matrix_of(Q) for Q in (Q_G, Q_A))
        if not self.short:
            return contractions.rotated_diagonal(self.even.a, self.even.g, Q_G, Q_A).double()
        return contractions.rotated_squares(self.matrices, Q_G, Q_A).double()

    def project(self, V: Tensor, exact: bool = False) -> Tensor:
        """`U^T V`, `[..., m, n]`, in float64 where `exact`: an inverse cancels."""
        if self.formed is None:
            a, g = (self.a.double(), self.g.double()) if exact else (self.even.a, self.even.g)
            return contractions.project(a, g, V.to(a.dtype))
        flat = V.reshape(-1, self.formed.shape[1])
        if not exact:
            result = flat.to(self.formed.dtype) @ self.formed.mT
        else:
            parts = _doubled(self.formed)
            result = sum_of(flat[:, part].double() @ D.mT for part, D in parts)
        return result.view(*V.shape[:-2], *self.sizes)

    def project_pairs(self, q_G: Tensor, q_A: Tensor) -> Tensor:
        """`<D, q_G q_A^T>` of every column, for columns `[o, k]` and `[i, k]`: `[k, m, n]`."""
        # whichever is less to read
        if not self.short and (self.formed is None or self.formed.numel() > self.a.numel()):
            return contractions.project_pairs(self.even.a, self.even.g, q_G, q_A)
        return self.project(q_G.mT[:, :, None] * q_A.mT[:, None])

    def combine(self, weights: Tensor, exact: bool = False) -> Tensor:
        """`U c`, `[..., m, n] -> [..., o, i]`, in float64 where `exact`."""
        if self.formed is None:
            a, g = (self.a.double(), self.g.double()) if exact else (self.even.a, self.even.g)
            return contractions.combine(a, g, weights)
        flat = weights.reshape(-1, self.count)
        if not exact:
            result = flat.to(self.formed.dtype) @ self.formed
        else:
            result = torch.cat([flat.double() @ D for _, D in _doubled(self.formed)], 1)
        return result.view(*weights.shape[:-2], *self.shape)

    @cached
    def hadamard(self) -> tuple[Tensor, Tensor]:
        """At one position, eigenvalues `[n]` and `B_a^{1/2} p` `[n, n]` of two Hadamard squares.

        `p` are the eigenvectors of `B_a^{1/2} B_g B_a^{1/2}` with `B_a = (a a^T)^2` and
        `B_g[n, k] = <Gamma_n, Gamma_k>`, `Gamma_n = sum_m g g^T`: no division, however alike the
        inputs are. Ascending, float64.
        """
        m, n = self.g.shape[:2]
        a, flat = self.even.a[:, 0], self.even.g[:, :, 0].reshape(m * n, -1)
        B_a = (a @ a.mT).double().square()
        B_g = (flat @ flat.mT).double().square().view(m, n, m, n).sum((0, 2))
        values, vectors = eigh(B_a, "Hadamard square")
        root = vectors * values.clamp(min=0).sqrt()
        values, P = eigh(symmetrise(root.mT @ B_g @ root), "rearranged block")
        return values, root @ P

    @cached
    def input_span(self) -> tuple[Tensor, Tensor] | None:
        """Orthonormal `V` `[i, r]` that spans the inputs, and these in its coordinates, `a V`.

        None where r would not be clearly less than i.
        """
        # asked of the sizes first: the inputs may not be laid out
        rows = self.sizes[1] * self.positions
        return span_of(self.a) if few(rows, self.shape[1]) else None

    @cached
    def output_span(self) -> tuple[Tensor, Tensor] | None:
        """The same of the output gradients, `V` `[o, r]` and `g V` `[m, n, t, r]`."""
        return span_of(self.g)

    @property
    def wide(self) -> bool:
        """Whether the output gradients span far less than their space, as a vocabulary's do."""
        return WIDE_OUTPUTS * self.count * self.positions <= self.shape[0]

    @cached_property
    def of_inputs(self) -> Columns | None:
        """The columns in the coordinates of their inputs, `D V`: other columns, equal products."""
        if self.input_span is None:
            return None
        return Columns(self.input_span[1], self.g, self.room, self.careful, (1,))

    @cached_property
    def space(self) -> Space | None:
        """A space that holds all columns; None where it has not clearly fewer dimensions."""
        outputs = self.output_span if self.wide else None
        if outputs is None and self.input_span is None:
            return None
        return Space(outputs and outputs[0], self.input_span and self.input_span[0])

    @cached_property
    def inside(self) -> Columns | None:
        """The columns in the coordinates of `space`: other columns, equal products."""
        outputs = self.output_span if self.wide else None
        if outputs is None:
            return self.of_inputs
        if self.input_span is None:
            return Columns(self.a, outputs[1], self.room, self.careful, (0,))
        return Columns(self.input_span[1], outputs[1], self.room, self.careful, (0, 1))

    @property
    def known_inside(self) -> Columns | None:
        """`inside`, if its space is known already: energies and spectra are its."""
        rows = self.sizes[1] * self.positions
        missing = few(rows, self.shape[1]) and Columns.input_span.known(self) is None
        missing |= self.wide and Columns.output_span.known(self) is None
        return None if missing else self.inside

    @cached
    def input_products(self) -> Tensor:
        """`a a^T` of each example, `[n, t, t]`."""
        return self.a @ self.a.mT

    @cached
    def gradient_products(self) -> Tensor:
        """`sum_m g g^T` of each example, `[n, t, t]`."""
        return (self.g @ self.g.mT).sum(0)


# Bytes of float64 gradients above which they are converted anew in every product.
STREAMED = 64 * 1024**2


class Doubled(Columns):
    """Columns converted to float64 where they are asked for, large gradients in every product.

    Their Gram matrix is the original's, in float64 already.
    """

    def __init__(self, single: Columns) -> None:
        self.single, self.room, self.careful = single, single.room, single.careful
        self.mixed = single.mixed
        self.shape, self.sizes, self.device = single.shape, single.sizes, single.device

    @cached_property
    def a(self) -> Tensor:  # type: ignore[override]
        """`[n, t, i]`."""
        return self.single.a.double()

    @cached_property
    def g(self) -> Tensor:  # type: ignore[override]
        """`[m, n, t, o]`."""
        return self.single.g.double()

    @cached_property
    def dtype(self) -> torch.dtype:
        return torch.float64

    @property
    def positions(self) -> int:
        return self.single.positions

    @property
    def _streamed(self) -> bool:
        formed = self.single.formed
        return formed is not None and 8 * formed.numel() > STREAMED

    def project(self, V: Tensor, exact: bool = False) -> Tensor:
        return self.single.project(V, True) if self._streamed else super().project(V, exact)

    def combine(self, weights: Tensor, exact: bool = False) -> Tensor:
        return (
            self.single.combine(weights, True)
            if self._streamed
            else super().combine(weights, exact)
        )

    @cached
    def formed(self) -> Tensor | None:
        # the choice that made the Gram matrix, not the one that float64 would make
        return None if self.single.formed is None else self.single.formed.double()

    @cached_property
    def cancellation(self) -> float:
        return self.single.cancellation

    @property
    def cancels(self) -> bool:
        return self.single.cancels

    @property
    def gram(self) -> Tensor:
        return self.single.gram

    @property
    def gram_eigen(self) -> tuple[Tensor, Tensor]:
        return self.single.gram_eigen

    @property
    def eigen_known(self) -> bool:
        return self.single.eigen_known


def compact(m: int, t: int, o: int, i: int) -> bool:
    """Whether the gradients of an example take no more room than its `a` and `g`."""
    return m * o * i <= t * (i + m * o)


def formed_gram(D: Tensor) -> Tensor:
    """`U^T U`, `[R, R]` in float64, of formed gradients `[R, o i]`."""
    check_gram(len(D), D.device)
    result = D.new_zeros(len(D), len(D), dtype=torch.float64)
    half = len(D) // 2
    for _, part in _doubled(D):
        # three quarters of it: the rest is known by symmetry
        result[half:].addmm_(part[half:], part.mT)
        result[:half, :half].addmm_(part[:half], part[:half].mT)
    result[:half, half:] = result[half:, :half].mT
    return symmetrise(result)


def _doubled(D: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """`(part, D[:, part])` in float64, some of the parameters at a time, in one buffer."""
    parts = list(contractions.slices(D.shape[1], 8 * len(D), D))
    if D.dtype == torch.float64:
        yield from ((part, D[:, part]) for part in parts)
        return
    # new memory for every part costs many times the conversion
    buffer = D.new_empty(len(D) * parts[0].stop, dtype=torch.float64)
    for part in parts:
        width = part.stop - part.start
        yield part, buffer[: len(D) * width].view(len(D), width).copy_(D[:, part])


def joined(parts: Sequence[Columns]) -> Columns:
    """All columns side by side; missing positions or output vectors are zeros."""
    m = max(of.g.shape[0] for of in parts)
    t = max(of.a.shape[1] for of in parts)
    a = [pad(of.a, (0, 0, 0, t - of.a.shape[1])) for of in parts]
    missing = ((t - of.a.shape[1], m - of.g.shape[0]) for of in parts)
    g = [pad(of.g, (0, 0, 0, s, 0, 0, 0, k)) for of, (s, k) in zip(parts, missing, strict=True)]
    return Columns(torch.cat(a), torch.cat(g, 1))


def span_of(rows: Tensor) -> tuple[Tensor, Tensor] | None:
    """Orthonormal `V` `[d, r]` that span rows `[..., d]` clearly fewer than d, and `rows V`."""
    flat = rows.reshape(-1, rows.shape[-1])
    if not few(*flat.shape):
        return None
    # a count that makes no copy of all entries
    entries = torch.linalg.vector_norm(flat, 0, 1)
    sparse = entries <= SPARSE * flat.shape[1]
    features = flat[sparse].any(0).nonzero()[:, 0]
    # a basis has at least one vector, of rows that are all zero as well
    if len(features) >= sparse.sum() or not entries.any():
        Q, R = qr(flat.mT, "rows")
        return Q, R.mT.reshape(*rows.shape[:-1], -1)
    # sparse rows lie in the coordinates of their few features, the others beside these
    dense = flat[~sparse]
    Q, R = qr(dense.index_fill(1, features, 0).mT, "rows")
    V = flat.new_zeros(flat.shape[1], len(features) + Q.shape[1])
    V[features, torch.arange(len(features), device=V.device)] = 1
    V[:, len(features) :] = Q
    inside = flat.new_zeros(len(flat), V.shape[1])
    inside[:, : len(features)] = flat[:, features]
    inside[~sparse, len(features) :] = R.mT
    return V, inside.reshape(*rows.shape[:-1], -1)


def few(rows: int, features: int) -> bool:
    """Whether a basis of the rows is clearly cheaper than one of the whole space."""
    return rows <= 0.7 * features
