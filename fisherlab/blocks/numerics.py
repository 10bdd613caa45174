"""Dense linear algebra that does not die quietly, and the memory budget of a dense block."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fisherlab import doors, heap
from fisherlab.blocks.reads import Together, Unmet, holds, together

GIB = 1024**3
# A Gram matrix up to this many bytes is always allowed, without querying free memory.
GRANTED = GIB // 4
# Rows up to which matrices are stacked for one decomposition, which copies them.
STACKED = 1024
# An eigenvalue is rounding below this multiple of eps * largest eigenvalue.
RANK_TOLERANCE = 8.0
# A residual of a gradient below this many eps of its length counts as rounding: the gradient
# itself has 40, and 260 where eigenvectors are rounded as well.
RESIDUAL_EPS = 400.0
# Up to so many eps of its scale an entry of a sum of columns is rounding. Of 130 gradients of
# networks none had more than 20 of it; what was real in raw units had 200 to 5e6.
ENTRY_EPS = 40.0
# How far columns may be from orthonormal, of which those of LAPACK in float32 are about 1e-6.
ORTHONORMAL = 1e-3
# Other bases in which a number is found again that might be an eigensolver's choice.
TURNS = 3
# Numbers beyond this power of a dtype's range, 2.6e6 of float32, are far from 1.
FAR = 1 / 6


class BlockError(ValueError):
    """A block cannot give what it was asked for: singular, too large, or of the wrong shape."""


class BlockTooLarge(BlockError):
    """A dense form would exceed the memory budget."""


def check_alike(*parts: Any) -> None:
    """Refuse parts of one block in several dtypes or on several devices."""
    kinds = {(part.dtype, part.device) for part in parts}
    if len(kinds) > 1:
        found = " and ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
        raise BlockError(f"the parts of a block must have one dtype and device, got {found}")


def symmetrise(matrix: Tensor) -> Tensor:
    """`(S + S^T) / 2`, the nearest symmetric matrix."""
    return (matrix + matrix.mT).div_(2)


def dot(one: Tensor, two: Tensor) -> Tensor:
    """The sum of products, 0-d float64: along rows in their own dtype, over rows in float64.

    A float64 sum of float32 numbers first makes a float64 copy of them all: three times the time.
    It is made where the products leave the range of their dtype.
    """
    if one.dtype != two.dtype:
        one, two = one.double(), two.double()
    total = torch.linalg.vecdot(one, two).sum(dtype=torch.float64)
    if one.dtype == torch.float64:
        return total
    kind = torch.finfo(one.dtype)
    # below, terms may have been lost that are not small beside the sum
    if not holds(torch.isfinite(total) & (total.abs() >= kind.tiny / kind.eps)):
        return torch.linalg.vecdot(one.double(), two.double()).sum()
    return total


def length_of(matrix: Tensor) -> Tensor:
    """`||S||_F`, 0-d float64, whatever the unit of the entries."""
    return dot(matrix, matrix).sqrt()


def units(x: Tensor, axes: tuple[int, ...] | None = None) -> tuple[Tensor, Tensor]:
    """`x / u` and `u`, a power of two near its largest entry: products of it stay in the range.

    Dividing by it rounds nothing. 1 for zeros, NaN and inf. With `axes`, each slice along them has
    its own, and `u` keeps them as axes of length 1.
    """
    if axes is None:
        size = x.detach().abs().amax() if x.numel() else x.new_zeros(())
    else:
        size = x.detach().abs().amax(axes, keepdim=True)
    _, exponent = torch.frexp(size)
    fits = (size > 0) & torch.isfinite(size)
    u = torch.where(fits, torch.ldexp(torch.ones_like(size), exponent - 1), 1)
    return x / u, u


def are_near(x: Tensor, axes: tuple[int, ...]) -> bool:
    """Whether slices along axes are zero or near 1: their largest entries."""
    size, far = x.detach().abs().amax(axes), torch.finfo(x.dtype).max ** FAR
    return holds(((size == 0) | ((size < far) & (size * far > 1))).all())


def squares(x: Tensor) -> Tensor:
    """`|x|^2` along the last axis in float64, whatever the unit."""
    x, u = units(x, (-1,))
    return torch.linalg.vecdot(x, x).double() * u[..., 0].double().square()


def over(value: Tensor, size: Tensor, empty: float = 0.0) -> Tensor:
    """`value / size`; `empty` where the size is 0, and NaN where it is NaN."""
    none = size == 0
    return torch.where(none, empty, value / torch.where(none, 1, size))


def trace_of(matrix: Tensor) -> Tensor:
    """`tr S`, 0-d float64."""
    return matrix.diagonal().sum(dtype=torch.float64)


def is_rounding(beside: Tensor, square: Tensor, dtype: torch.dtype) -> bool:
    """Whether a residual outside a space, of squared norm `beside`, is rounding in `dtype`.

    An inverse divides the residual by the damping, which may be far smaller than rounding.
    """
    return bool((beside <= (RESIDUAL_EPS * torch.finfo(dtype).eps) ** 2 * square).all())


def sum_of(tensors: Iterable[Tensor]) -> Tensor:
    """The sum of an iterable of tensors."""
    terms = iter(tensors)
    total = next(terms)
    for tensor in terms:
        total = total + tensor
    return total


def eigh(matrix: Tensor, name: str = "matrix") -> tuple[Tensor, Tensor]:
    """`S = Q diag(values) Q^T`, eigenvalues ascending.

    Raises:
        BlockError: the matrix is not finite, or LAPACK fails in float64, on the CPU, and for a
            shifted matrix.
    """
    check_finite(matrix, name, "eigendecomposition")
    symmetric = symmetrise(matrix)
    attempts = (
        lambda: (symmetric, None),
        lambda: (symmetric.double(), None),
        lambda: (symmetric.double().cpu(), None),
        lambda: _shifted(symmetric.double().cpu()),
    )
    for attempt in attempts:
        tried, shift = attempt()
        try:
            values, vectors = torch.linalg.eigh(tried)
        except torch.linalg.LinAlgError:
            continue
        if all_finite(values, vectors) and _orthonormal(vectors):
            values = values if shift is None else values - shift
            return values.to(matrix), vectors.to(matrix)
    raise BlockError(
        f"eigendecomposition of {name}, shape {tuple(matrix.shape)}, failed in {matrix.dtype}, in "
        "float64, on the CPU and shifted; the matrix is finite but LAPACK did not converge"
    )


def eigh_each(matrices: Sequence[Tensor], names: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
    """`eigh` of each matrix, those of one shape in one call, in one read of the device.

    Where that does not give finite, orthonormal vectors, one by one.

    Raises:
        BlockError: `eigh` of one of them does.
    """
    found: dict[int, tuple[Tensor, Tensor]] = {}
    try:
        with nullcontext() if together() is not None else Together():
            for group in alike(matrices):
                stacked = symmetrise(torch.stack([matrices[k] for k in group]))
                values, vectors = torch.linalg.eigh(stacked)
                all_finite(values, vectors)
                _orthonormal(vectors)
                found |= zip(group, zip(values, vectors, strict=True), strict=True)
    except (torch.linalg.LinAlgError, Unmet):
        return [eigh(matrix, name) for matrix, name in zip(matrices, names, strict=True)]
    return [found[k] for k in range(len(matrices))]


def alike(matrices: Sequence[Tensor]) -> list[list[int]]:
    """Indices of matrices that may be stacked: of one shape, dtype and device, and small."""
    groups: dict[Any, list[int]] = {}
    for k, matrix in enumerate(matrices):
        alone = k if len(matrix) > STACKED else None
        groups.setdefault((matrix.shape, matrix.dtype, matrix.device, alone), []).append(k)
    return list(groups.values())


def _shifted(S: Tensor) -> tuple[Tensor, Tensor]:
    """`S + c I` and `c`, a little of the largest entry: its eigenvectors are those of `S`."""
    shift = 1e-14 * S.abs().amax()
    return S + shift * torch.eye(S.shape[-1], dtype=S.dtype, device=S.device), shift


def _orthonormal(Q: Tensor) -> bool:
    """Whether `|Q^T Q - I|` is rounding; taken as true on the CPU, whose LAPACK says if it fails.

    Solvers of accelerators have returned other vectors without an error.
    """
    if Q.device.type == "cpu":
        return True
    d = Q.shape[-1]
    away = Q.mT @ Q - torch.eye(d, dtype=Q.dtype, device=Q.device)
    return not d or holds(away.abs().amax() <= 10 * d * torch.finfo(Q.dtype).eps)


def decomposed(
    function: Callable[[Tensor], Any], matrix: Tensor, name: str, wanted: str
) -> tuple[Tensor, ...]:
    """`function(matrix)`, in float64 and on the CPU where LAPACK fails.

    Args:
        function: one of `torch.linalg`.
        matrix: what it takes.
        name: what the matrix is, for messages.
        wanted: what it returns, for messages.

    Raises:
        BlockError: the matrix is not finite, or every attempt failed.
    """
    check_finite(matrix, name, wanted)
    for attempt in (lambda: matrix, matrix.double, lambda: matrix.double().cpu()):
        try:
            found = function(attempt())
        except torch.linalg.LinAlgError:
            continue
        parts = (found,) if isinstance(found, Tensor) else tuple(found)
        if all_finite(*parts):
            return tuple(part.to(matrix) for part in parts)
    raise BlockError(
        f"the {wanted} of {name}, shape {tuple(matrix.shape)}, failed in {matrix.dtype}, in "
        "float64 and on the CPU; the matrix is finite but LAPACK did not converge"
    )


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    """Standard normal numbers in float64, drawn where the generator is."""
    return torch.randn(shape, generator=generator, dtype=torch.float64, device=generator.device)


def svd(matrix: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """`X = U diag(s) V^T`, thin: `U` `[..., m, r]`, `s` `[..., r]`, `V^T` `[..., r, n]`."""
    U, sizes, V = decomposed(
        lambda X: torch.linalg.svd(X, full_matrices=False), matrix, name, "singular values"
    )
    return U, sizes, V


def svdvals(matrix: Tensor, name: str) -> Tensor:
    """The singular values of a matrix, descending."""
    return decomposed(torch.linalg.svdvals, matrix, name, "singular values")[0]


def qr(matrix: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """`X = Q R` with orthonormal columns `Q`."""
    # a reflection after another: it converges, and no number is read of a device
    try:
        Q, R = torch.linalg.qr(matrix)
    except torch.linalg.LinAlgError:
        Q, R = decomposed(torch.linalg.qr, matrix, name, "orthonormal basis")
    return Q, R


def least_norm(matrix: Tensor, b: Tensor, name: str) -> Tensor:
    """The `x` `[n]` of least norm among those with the least `|X x - b|`, of any rank."""
    U, sizes, V = svd(matrix, name)
    floor = torch.finfo(sizes.dtype).eps * max(matrix.shape) * sizes.amax()
    inverse = torch.where(sizes > floor, 1 / sizes, torch.zeros_like(sizes))
    return V.mT @ (inverse * (U.mT @ b))


def inverse(matrix: Tensor, name: str) -> Tensor:
    """`X^{-1}`; `BlockError` names a matrix that has none."""
    return decomposed(torch.linalg.inv, matrix, name, "inverse")[0]


def all_finite(*tensors: Tensor) -> bool:
    """Whether no entry is NaN or inf: one pass, and one number read, where the sums are finite."""
    # torch sums no numbers of eight bits
    tensors = tuple(
        tensor.float() if tensor.is_floating_point() and tensor.dtype.itemsize < 2 else tensor
        for tensor in tensors
    )
    finite = torch.stack([torch.isfinite(tensor.sum()) for tensor in tensors])
    # half precision overflows in sums of ordinary numbers, and an overflow is looked at closely
    return holds(finite.all()) or all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def check_finite(matrix: Tensor, name: str, wanted: str) -> None:
    """Refuse NaN and inf; `wanted` is what a matrix with them has not."""
    if not all_finite(matrix):
        raise BlockError(
            f"{name} of shape {tuple(matrix.shape)} has NaN or inf entries, so it has no {wanted}; "
            "check the data, the model's weights and the loss"
        )


def check_symmetric(matrix: Tensor, what: str) -> None:
    """Refuse matrices `[..., d, d]` that differ from their transposes by more than rounding."""
    away = (matrix - matrix.mT).abs().amax() if matrix.numel() else matrix.new_zeros(())
    # float64 has the bound of float32, from which a block may be cast; NaN is named elsewhere
    eps = max(torch.finfo(matrix.dtype).eps, torch.finfo(torch.float32).eps)
    if not holds(~(away > 10 * eps**0.5 * matrix.abs().amax())):
        raise BlockError(
            f"{what} must be symmetric, and differs from its transpose by {float(away):.1e}; pass "
            "(S + S.mT) / 2 where that is rounding"
        )


def check_orthonormal(Q: Tensor, what: str) -> None:
    """Refuse columns that are not orthonormal, by one product `Q^T Q v`: no `[k, k]` matrix."""
    v = torch.arange(1, Q.shape[1] + 1, dtype=Q.dtype, device=Q.device).cos()
    away = torch.linalg.vector_norm(Q.mT @ (Q @ v) - v)
    # float64 has the bound of float32, from which a block may be cast; users of NaN name it
    if not holds(~(away > ORTHONORMAL * torch.linalg.vector_norm(v))):
        raise BlockError(f"{what} must be orthonormal, as torch.linalg.qr(...)[0] is")


def cholesky(matrix: Tensor, name: str = "matrix") -> Tensor:
    """Lower `L` with `S = L L^T`; `BlockError` names a matrix that is not positive definite."""
    factor, info = torch.linalg.cholesky_ex(symmetrise(matrix))
    fits = holds((info == 0).all() & torch.isfinite(factor.sum()))
    if not fits and (info.any() or not all_finite(factor)):
        check_finite(matrix, name, "Cholesky factor")
        raise BlockError(
            f"{name} of shape {tuple(matrix.shape)} is not positive definite; use a larger damping"
        )
    return factor


def damped_inverse(matrix: Tensor, damping: float | Tensor) -> Tensor | None:
    """`(S + damping I)^{-1}` by Cholesky, a fifth of an eigendecomposition.

    None where rounding could exceed the damping: take the eigenvectors then.

    Args:
        matrix: `[..., d, d]`, one or several of a shape.
        damping: a number, or `[..., 1]`.
    """
    traces = matrix.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)
    rounding = RANK_TOLERANCE * torch.finfo(matrix.dtype).eps * traces
    damped = symmetrise(matrix)
    damped.diagonal(dim1=-2, dim2=-1).add_(damping)
    factor, info = torch.linalg.cholesky_ex(damped)
    fits = holds((damping > rounding).all() & (info == 0).all())
    return torch.cholesky_inverse(factor) if fits else None


def damped_inverses(
    matrices: Sequence[Tensor], dampings: Sequence[float | Tensor]
) -> list[Tensor | None]:
    """`damped_inverse` of each matrix, those of one shape in one call, in one read."""
    found: dict[int, Tensor | None] = {}
    for group in alike(matrices):
        stacked = torch.stack([matrices[k] for k in group])
        exact = [
            torch.as_tensor(dampings[k], dtype=torch.float64, device=stacked.device) for k in group
        ]
        added = torch.stack([x.to(stacked) for x in exact])
        inverses = damped_inverse(stacked, added[:, None])
        if inverses is None:
            found |= {k: damped_inverse(matrices[k], dampings[k]) for k in group}
        else:
            found |= zip(group, inverses, strict=True)
    return [found[k] for k in range(len(matrices))]


def chosen_squares(
    rotated: Tensor, values_G: Tensor | None, values_A: Tensor | None, trace: Tensor
) -> Tensor:
    """How far `sum rotated^2` may move with the basis that an eigensolver picks in null spaces.

    `rotated` is the diagonal of a matrix `F` in the basis `Q_G (x) Q_A`. For k null directions of a
    factor, only the sum s of the entries is defined: their squares sum to between `s^2 / k` and
    `s^2`. Energy beside a thin basis lies in such directions as well.

    Args:
        rotated: `diag(Q^T F Q)`, `[o', i']`.
        values_G: the eigenvalues `[o']` that the columns of `Q_G` belong to; None where these are
            coordinates, which nobody picks.
        values_A: the same of `Q_A`, `[i']`.
        trace: `tr F`.

    Returns:
        The width of the interval, 0-d float64: 0 where `F` has no energy in a null space.
    """
    rotated, trace = rotated.double(), trace.double()
    G, A = (
        torch.zeros(length, dtype=torch.bool, device=rotated.device)
        if values is None
        else null_of(values)
        for values, length in zip((values_G, values_A), rotated.shape, strict=True)
    )
    if values_G is not None and values_A is not None:
        size = values_G.double().abs().sum() * values_A.double().abs().sum()
        if size <= (RESIDUAL_EPS * torch.finfo(values_A.dtype).eps) ** 2 * trace:
            G, A = torch.ones_like(G), torch.ones_like(A)  # beside F it is nothing but rounding
    corner = rotated[G][:, A]
    spaces = (
        (rotated[~G][:, A].sum(1), int(A.sum())),
        (rotated[G][:, ~A].sum(0), int(G.sum())),
        (corner.sum().reshape(1), corner.numel()),
    )
    width = (trace - rotated.sum()).clamp(min=0).square()
    for sums, directions in spaces:
        if directions > 1:
            width = width + sums.square().sum() * (1 - 1 / directions)
    return width


def null_of(values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Which eigenvalues, along the last axis, are rounding of the largest; None: in their dtype."""
    if not values.numel():
        return torch.zeros_like(values, dtype=torch.bool)
    return values.abs() <= _rounding_of(values, dtype)


def equal_of(values: Tensor) -> Tensor:
    """Which of ascending eigenvalues `[..., d]` equal the next, rounding apart: `[..., d - 1]`."""
    equal = values.diff(dim=-1) <= _rounding_of(values)
    return equal & ~null_of(values)[..., :-1]


def _rounding_of(values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """How far eigenvalues, along the last axis, may be wrong, `[..., 1]`."""
    multiple = max(RANK_TOLERANCE, math.sqrt(values.shape[-1]))
    return multiple * torch.finfo(dtype or values.dtype).eps * values.abs().amax(-1, keepdim=True)


def negative_share(values: Tensor, dtype: torch.dtype) -> float:
    """Share of `sum |values|` in eigenvalues below 0; those that are rounding in `dtype` are 0."""
    values = values.detach().double()
    values = values.masked_fill(null_of(values, dtype), 0)
    return float(-values.clamp(max=0).sum() / values.abs().sum().clamp(min=1e-300))


def moved_squares(found: Tensor, measure: Callable[[int], Tensor | None]) -> Tensor:
    """How far `sum found^2` moves in a few other bases, the furthest of them; 0-d float64.

    `measure(draw)` is what is found in one of them; None where there is no other. A single one may
    agree by chance.
    """
    energy = found.double().square().sum()
    others = [measured for draw in range(TURNS) if (measured := measure(draw)) is not None]
    moved = [(other.double().square().sum() - energy).abs() for other in others]
    return torch.stack([torch.zeros_like(energy), *moved]).amax()


def is_coarse(dtype: torch.dtype) -> bool:
    """Whether dampings make the rounding of numbers of a dtype visible: not that of float64."""
    return torch.finfo(dtype).eps ** 2 >= torch.finfo(torch.float64).eps


def turned(Q: Tensor, values: Tensor, draw: int = 0) -> Tensor | None:
    """Eigenvectors with another basis of each space of equal eigenvalues, the null space apart.

    Args:
        Q: `[n, r]`, the eigenvectors as columns.
        values: `[r]`, their eigenvalues.
        draw: which of many.

    Returns:
        An eigenbasis as good as `Q`; None where all eigenvalues are apart.
    """
    if len(values) < 2:
        return None
    ordered, order = values.sort(descending=True)
    apart = (ordered[:-1] - ordered[1:] > _rounding_of(values)).nonzero()[:, 0] + 1
    starts = [0, *apart.tolist(), len(values)]
    null = null_of(ordered)
    spaces = [order[a:b] for a, b in pairwise(starts) if b - a > 1 and not null[a]]
    if not spaces:
        return None
    Q, draws = Q.clone(), torch.Generator().manual_seed(draw)
    for space in spaces:
        turn, _ = qr(normal(draws, len(space), len(space)), "turn of a space")
        Q[:, space] = Q[:, space] @ turn.to(Q)
    return Q


def spectrum_power(
    values: Tensor, exponent: float, damping: float | Tensor, name: str, *, rounded: bool = True
) -> Tensor:
    """`(values + damping)^exponent` for eigenvalues that are non-negative up to rounding.

    Raises `BlockError` for a negative power of a zero eigenvalue. `rounded` eigenvalues came out of
    a decomposition of `[..., d]` of them, so one below its rounding counts as zero.
    """
    shifted = values.clamp(min=0) + damping
    if exponent >= 0 or not shifted.numel():
        check_finite(values, name, "power")
        if exponent > 1 and shifted.numel():
            check_fits(shifted.max(), exponent, values.dtype, name)
    else:
        extremes = torch.stack([shifted.min(), shifted.max(), values.sum()]).double()
        floor = 0.0
        if rounded and is_none(damping):
            # LAPACK: 1 to 3 eps up to d = 500, 13 eps at 1500
            multiple = max(RANK_TOLERANCE, math.sqrt(values.shape[-1] if values.ndim else 1))
            floor = multiple * torch.finfo(values.dtype).eps
        # the smallest that has such a power in this dtype
        least = torch.finfo(values.dtype).max ** (1 / exponent)
        fits = (extremes[0] > floor * extremes[1]) & (extremes[0] >= least)
        if not holds(fits & torch.isfinite(extremes[2])):
            smallest, largest, total = extremes.tolist()
            if not math.isfinite(total):
                check_finite(values, name, "power")
            if smallest <= floor * largest:
                raise BlockError(
                    f"{name} is singular (smallest eigenvalue {smallest:.2e}, largest "
                    f"{largest:.2e}), so its power {exponent:g} needs damping > 0"
                )
            check_fits(extremes[0], exponent, values.dtype, name)
    return shifted.pow(exponent)


def check_fits(extreme: float | Tensor, exponent: float, dtype: torch.dtype, name: str) -> None:
    """Refuse a power that the dtype cannot hold; a zero eigenvalue is named elsewhere."""
    most = math.log(torch.finfo(dtype).max)
    if isinstance(extreme, Tensor):
        fits = holds(~(exponent * extreme.double().log() > most))
    else:
        fits = extreme <= 0 or exponent * math.log(extreme) <= most
    if not fits:
        raise BlockError(
            f"the power {exponent:g} of {name}, with the eigenvalue {float(extreme):.2e}, "
            f"overflows {dtype}; take the block in float64, or another damping"
        )


def is_none(damping: float | Tensor) -> bool:
    """Whether the damping is 0; one that is looked at later is taken as positive."""
    return not holds(damping > 0) if isinstance(damping, Tensor) else damping == 0


def check_damping(damping: Any, dtype: torch.dtype = torch.float64) -> Any:
    """The damping as a float that the dtype can hold; a tensor where it is looked at later.

    Raises:
        BlockError: it is no finite number >= 0, or overflows.
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise BlockError(f"dtype must be a floating dtype of torch, got {doors.said(dtype)}")
    most = math.inf if dtype == torch.float64 else torch.finfo(dtype).max
    if isinstance(damping, Tensor) and damping.ndim == 0 and together() is not None:
        holds((damping >= 0) & (damping <= most) & (damping < math.inf))
        return damping
    return doors.number(damping, "damping", least=0.0, most=most, error=BlockError)


def check_exponent(exponent: float) -> float:
    """The exponent of a power.

    Raises:
        BlockError: it is no finite number.
    """
    return doors.number(exponent, "exponent", error=BlockError)


def rank_of(values: Tensor, eps: float) -> int:
    """Number of eigenvalues above rounding, `values > 8 eps size max`."""
    if not values.numel():
        return 0
    floor = RANK_TOLERANCE * eps * values.numel() * values.abs().max()
    return int((values > floor).sum().item())


def free_memory(device: torch.device) -> int:
    """Bytes free on the device now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return heap.available()


def dense_budget(device: torch.device) -> int:
    """Bytes a dense block may take: a quarter of what is free, at most 4 GiB."""
    return min(free_memory(device) // 4, 4 * GIB)


def gram_budget(device: torch.device) -> int:
    """Bytes a Gram matrix may take: those of a dense block, and 256 MiB in any case."""
    return max(dense_budget(device), GRANTED)


def fits_gram(count: int, device: torch.device, width: int | None = None) -> bool:
    """Whether a float64 Gram matrix of so many columns stays within its budget."""
    needed = 8 * count * (width or count)
    return needed <= GRANTED or needed <= gram_budget(device)


def check_gram(count: int, device: torch.device, width: int | None = None) -> None:
    """Refuse a Gram matrix, or gradients of `width` parameters, past the budget."""
    if not fits_gram(count, device, width):
        needed, budget = 8 * count * (width or count), gram_budget(device)
        what = "the Gram matrix" if width is None else f"the gradients, of {width:,} parameters,"
        raise BlockTooLarge(
            f"{what} of {count:,} output vectors would take {needed / GIB:.3g} GiB, over the "
            f"budget of {budget / GIB:.3g} GiB; only its solves and spectrum need it: measure them "
            "on a batch, and pass the whole data set as `reference=`"
        )


def check_dense(size: int, dtype: torch.dtype, device: torch.device, form: str) -> None:
    """Refuse a dense `[size, size]` matrix past the budget, naming what to call instead."""
    needed = size * size * dtype.itemsize
    budget = dense_budget(device)
    if needed > budget:
        raise BlockTooLarge(
            f"the dense form of this {form} is {size} x {size}, {needed / GIB:.3g} GiB, over the "
            f"budget of {budget / GIB:.3g} GiB ({free_memory(device) / GIB:.3g} GiB free); stay "
            "matrix-free: `block @ V`, `quadratic`, `inner`, `trace`, `squared_norm`, `power`, "
            "`as_linear_operator` or the functions of fl.metrics"
        )
