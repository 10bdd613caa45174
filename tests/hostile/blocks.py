"""Blocks: every form, every method, arguments right and wrong, against the dense matrix."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor

from fisherlab import blocks
from hostile import junk
from hostile.judge import Case


def randn(draw: random.Random, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(draw.randrange(2**31))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def psd(draw: random.Random, *shape: int, rank: int | None = None) -> Tensor:
    *more, d = shape
    X = randn(draw, *more, d, d if rank is None else rank)
    return X @ X.mT / d


def size(draw: random.Random) -> tuple[int, int]:
    return draw.randint(1, 5), draw.randint(1, 5)


# A form: its class, the arguments, and the matrix that they mean.
Form = tuple[type[blocks.Block], tuple[object, ...], Tensor]


def dense(draw: random.Random) -> Form:
    o, i = size(draw)
    S = psd(draw, o * i, rank=draw.choice([1, o * i]))
    return blocks.Dense, (S, (o, i)), S


def diagonal(draw: random.Random) -> Form:
    entries = randn(draw, *size(draw)).square()
    return blocks.Diagonal, (entries,), entries.flatten().diag()


def kronecker(draw: random.Random) -> Form:
    o, i = size(draw)
    G, A = psd(draw, o), psd(draw, i, rank=draw.choice([1, i]))
    return blocks.Kronecker, (G, A), torch.kron(G, A)


def kronecker_sum(draw: random.Random) -> Form:
    (o, i), k = size(draw), draw.randint(1, 3)
    G, A = psd(draw, k, o), psd(draw, k, i)
    return blocks.KroneckerSum, (G, A), sum(torch.kron(*pair) for pair in zip(G, A, strict=True))


def eigen(draw: random.Random) -> Form:
    o, i = size(draw)
    p, q = draw.randint(1, o), draw.randint(1, i)
    Q_G, Q_A = (torch.linalg.qr(randn(draw, d, d)).Q for d in (o, i))
    spectrum, along, across = (randn(draw, *s).square() for s in ((p, q), (p,), (q,)))
    tail = randn(draw).square()
    full = tail.expand(o, i).clone()
    full[:p, q:], full[p:, :q], full[:p, :q] = along[:, None], across, spectrum
    Q = torch.kron(Q_G, Q_A)
    args = (Q_G[:, :p].contiguous(), Q_A[:, :q].contiguous(), spectrum, along, across, tail)
    return blocks.Eigen, args, Q * full.flatten() @ Q.mT


def columns(draw: random.Random, t: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """a, g, and the gradients `[R, o i]`."""
    o, i = size(draw)
    m, n, t = draw.randint(1, 2), draw.randint(1, 5), t or draw.randint(1, 3)
    a, g = randn(draw, n, t, i), randn(draw, m, n, t, o)
    return a, g, torch.einsum("mnto,nti->mnoi", g, a).reshape(m * n, o * i)


def outer(draw: random.Random) -> Form:
    a, g, U = columns(draw)
    shift = draw.choice([0.0, 0.3])
    return blocks.Outer, (a, g, 0.5, shift), U.mT @ U / 2 + shift * torch.eye(U.shape[1])


def outer_sum(draw: random.Random) -> Form:
    a, g, U = columns(draw)
    core = psd(draw, len(U))
    return blocks.OuterSum, (a, g, core, 0.1), U.mT @ core @ U + 0.1 * torch.eye(U.shape[1])


def row_blocks(draw: random.Random) -> Form:
    a, g, U = columns(draw, 1)
    o, i = g.shape[-1], a.shape[-1]
    rows = U.view(-1, o, i)
    parts = 0.5 * torch.einsum("roi,roj->oij", rows, rows)
    return blocks.RowBlocks, (a, g, 0.5), torch.block_diag(*parts)


def mini_block(draw: random.Random) -> Form:
    o, c, k = draw.randint(1, 3), draw.randint(1, 3), draw.randint(1, 3)
    parts = psd(draw, o, c, k)
    if draw.random() < 0.5:
        return blocks.MiniBlock, (parts,), torch.block_diag(*parts.flatten(0, 1))
    bias = randn(draw, o).square()
    pieces = [x for row, b in zip(parts, bias, strict=True) for x in (*row, b.view(1, 1))]
    return blocks.MiniBlock, (parts, bias), torch.block_diag(*pieces)


def from_inverse(draw: random.Random) -> Form:
    G, A = (psd(draw, d) + torch.eye(d) for d in size(draw))
    P = blocks.Kronecker(G, A)
    return blocks.FromInverse, (P,), torch.linalg.inv(torch.kron(G, A))


def direct_sum(draw: random.Random) -> Form:
    i, parts, matrices = draw.randint(1, 4), [], []
    for _ in range(draw.randint(1, 3)):
        G, A = psd(draw, draw.randint(1, 3)), psd(draw, i)
        parts.append(blocks.Kronecker(G, A))
        matrices.append(torch.kron(G, A))
    return blocks.DirectSum, (parts,), torch.block_diag(*matrices)


def column_sum(draw: random.Random) -> Form:
    o, parts, pieces = draw.randint(1, 4), [], []
    for _ in range(draw.randint(1, 3)):
        G, A = psd(draw, o), psd(draw, draw.randint(1, 3))
        parts.append(blocks.Kronecker(G, A))
        pieces.append((G, A))
    # entry (row, column) of the weight: the columns of one part after those of another
    widths = [len(A) for _, A in pieces]
    i, whole = sum(widths), torch.zeros(o, sum(widths), o, sum(widths), dtype=torch.float64)
    for (G, A), width, start in zip(pieces, widths, _starts(widths), strict=True):
        part = slice(start, start + width)
        whole[:, part, :, part] = torch.einsum("oq,ij->oiqj", G, A)
    return blocks.ColumnSum, (parts,), whole.reshape(o * i, o * i)


def _starts(widths: list[int]) -> list[int]:
    return [sum(widths[:k]) for k in range(len(widths))]


FORMS: tuple[Callable[[random.Random], Form], ...] = (
    dense,
    diagonal,
    kronecker,
    kronecker_sum,
    eigen,
    outer,
    outer_sum,
    row_blocks,
    mini_block,
    from_inverse,
    direct_sum,
    column_sum,
)


def made(draw: random.Random) -> tuple[blocks.Block, Tensor]:
    """A block in float64 and its matrix."""
    kind, args, matrix = draw.choice(FORMS)(draw)
    return kind(*args), matrix


def near(found: object, wanted: Tensor, tolerance: float = 1e-7) -> str:
    """Why two tensors differ, or ""."""
    found = torch.as_tensor(found).double()
    if found.shape != wanted.shape:
        return f"shape {tuple(found.shape)} for {tuple(wanted.shape)}"
    scale = max(float(wanted.abs().max()) if wanted.numel() else 0.0, 1e-12)
    error = float((found - wanted).abs().max()) / scale if wanted.numel() else 0.0
    return "" if error <= tolerance else f"off by {error:.2e} of the largest"


def power(S: Tensor, exponent: float, damping: float) -> Tensor:
    values, Q = torch.linalg.eigh(S)
    return Q * (values.clamp(min=0) + damping).pow(exponent) @ Q.mT


def constructors(draw: random.Random) -> Case:
    """One argument of a constructor is junk, or all are right."""
    kind, args, matrix = draw.choice(FORMS)(draw)
    if draw.random() < 0.2:
        return Case(f"{kind.__name__}(...)", lambda: kind(*args).dense(), lambda D: near(D, matrix))
    wrong = draw.randrange(len(args))
    value = args[wrong]
    optional = kind in (blocks.Eigen,) and wrong in (0, 1, 3, 4, 5)
    optional |= kind is blocks.MiniBlock and wrong == 1
    optional |= kind is blocks.Outer and wrong == 2
    while True:
        bad = (
            junk.tensor(draw, value)
            if isinstance(value, Tensor)
            else junk.number(draw, None)
            if isinstance(value, float)
            else junk.anything(draw, blocks.Block)
        )
        if not (bad is None and optional):
            break
    given = (*args[:wrong], bad, *args[wrong + 1 :])
    label = f"{kind.__name__}: argument {wrong} = {str(bad)[:40]}"
    fits = _fits(kind, wrong, bad)

    def check(block: object) -> str:
        assert isinstance(block, blocks.Block)
        return "" if block.dense().isfinite().all() else "not finite"

    return Case(label, lambda: kind(*given), check if fits else None)


def _fits(kind: type, wrong: int, bad: object) -> bool:
    """Whether what was drawn as junk is an argument after all."""
    if not isinstance(bad, Tensor) or type(bad) is not Tensor:
        return False
    if bad.dtype != torch.float64 or bad.layout != torch.strided or bad.is_nested:
        return False
    if bad.is_meta:
        return False
    return (
        (kind is blocks.Diagonal and bad.ndim == 2)
        or (
            # a wider input, a larger factor: another weight; one more axis: another sum
            kind is blocks.Outer and (wrong, bad.ndim) in ((0, 3), (1, 4)) and len(bad) > 0
        )
        or (kind in (blocks.OuterSum, blocks.RowBlocks) and bad.ndim in (3, 4) and len(bad) > 0)
    )


def methods(draw: random.Random) -> Case:
    """A method of a block with an argument that is right or wrong."""
    block, S = made(draw)
    o, i = block.shape
    name = draw.choice(list(METHODS))
    right = draw.random() < 0.4
    label = f"{type(block).__name__}.{name} {'right' if right else 'junk'}"
    return METHODS[name](draw, block, S, right, label)


def _matmul(draw, block, S, right, label) -> Case:
    V = randn(draw, *draw.choice([(), (2,), (2, 1), (0,)]), *block.shape)
    wanted = (V.flatten(-2) @ S).view(V.shape)
    if right:
        return Case(label, lambda: block @ V, lambda found: near(found, wanted))
    bad = junk.tensor(draw, V)
    if _same_weight(bad, block):
        return Case(label, lambda: block @ bad, lambda found: "")
    return Case(f"{label} {str(bad)[:30]}", lambda: block @ bad, words=("V",))


def _same_weight(bad: object, block: blocks.Block) -> bool:
    """Whether junk is a batch of weights after all."""
    return (
        type(bad) is Tensor
        and not bad.is_nested
        and bad.dtype == torch.float64
        and bad.layout == torch.strided
        and not bad.is_meta
        and tuple(bad.shape[-2:]) == block.shape
    )


def _quadratic(draw, block, S, right, label) -> Case:
    V = randn(draw, *draw.choice([(), (3,)]), *block.shape)
    v = V.flatten(-2)
    if right:
        wanted = (v @ S * v).sum(-1)
        return Case(label, lambda: block.quadratic(V), lambda found: near(found, wanted))
    bad = junk.tensor(draw, V)
    if _same_weight(bad, block):
        return Case(label, lambda: block.quadratic(bad), lambda found: "")
    return Case(f"{label} {str(bad)[:30]}", lambda: block.quadratic(bad), words=("V",))


def _power(draw, block, S, right, label) -> Case:
    exponent, damping = draw.choice([-1, -0.5, 0.5, 1, -2, 0.25]), draw.choice([1e-3, 0.1, 1, 100])
    if right:
        wanted = power(S, exponent, damping)
        return Case(
            f"{label} {exponent} {damping}",
            lambda: block.power(exponent, damping).dense(),
            lambda found: near(found, wanted),
        )
    if draw.random() < 0.5:
        bad = junk.number(draw)
        word = "damping"
        call = lambda: block.power(exponent, bad)  # noqa: E731
    else:
        bad = junk.number(draw, None)
        word = "exponent"
        call = lambda: block.power(bad, damping)  # noqa: E731
    return Case(f"{label} {word}={str(bad)[:30]}", call, words=(word,))


def _solve(draw, block, S, right, label) -> Case:
    V, damping = randn(draw, *block.shape), draw.choice([1e-3, 0.1, 10])
    if right:
        wanted = (power(S, -1, damping) @ V.flatten()).view(V.shape)
        return Case(label, lambda: block.solve(V, damping), lambda found: near(found, wanted))
    if draw.random() < 0.5:
        bad = junk.tensor(draw, V)
        if _same_weight(bad, block):
            return Case(label, lambda: block.solve(bad, damping), lambda found: "")
        return Case(f"{label} {str(bad)[:30]}", lambda: block.solve(bad, damping), words=("V",))
    bad = junk.number(draw)
    return Case(f"{label} {bad!r}", lambda: block.solve(V, bad), words=("damping",))


def _logdet(draw, block, S, right, label) -> Case:
    damping = draw.choice([1e-3, 0.1, 10])
    if right:
        wanted = (torch.linalg.eigvalsh(S).clamp(min=0) + damping).log().sum()
        # near 0 it cancels: as many digits as its terms have
        size = (torch.linalg.eigvalsh(S).clamp(min=0) + damping).log().abs().sum() + 1
        return Case(
            label, lambda: block.logdet(damping), lambda f: near(f - wanted + size, size, 1e-6)
        )
    bad = junk.number(draw)
    return Case(f"{label} {bad!r}", lambda: block.logdet(bad), words=("damping",))


def _leading(draw, block, S, right, label) -> Case:
    k = draw.choice([1, 2, 3, block.size, block.size + 5])
    if not right:
        bad = junk.count(draw)
        name = draw.choice(["leading", "leading_values", "leading_factors"])
        return Case(f"{label} {bad!r}", lambda: getattr(block, name)(bad), words=("k",))
    wanted = torch.linalg.eigvalsh(S).flip(0)[:k]
    scale = float(wanted[0].abs()) + 1e-12
    # thin forms know the eigenpairs of their range alone, and say so
    thin = isinstance(block, blocks.Eigen | blocks.Outer | blocks.OuterSum)

    def check(found: tuple[Tensor, Tensor]) -> str:
        values, vectors = found
        if len(values) > len(wanted):
            return f"{len(values)} values of {len(wanted)}"
        flat = vectors.flatten(1)
        residual = float((flat @ S - values[:, None] * flat).abs().max()) if len(flat) else 0.0
        if residual > 1e-6 * scale:
            return f"a residual of {residual:.2e}"
        short = torch.cat([values, values.new_zeros(len(wanted) - len(values))])
        return "" if thin else near(short, wanted, 1e-6)

    return Case(f"{label} {k}", lambda: block.leading(k), check)


def _inner(draw, block, S, right, label) -> Case:
    if right:
        other, T = another(draw, block)
        wanted = (S * T).sum()
        return Case(
            f"{label} {type(other).__name__}",
            lambda: block.inner(other),
            lambda found: near(found, wanted, 1e-6),
        )
    bad = junk.anything(draw)
    if draw.random() < 0.3:
        bad = blocks.Diagonal(torch.ones(block.shape[0] + 1, block.shape[1], dtype=torch.float64))
    name = draw.choice(["inner", "diagonal_of", "chosen"])
    return Case(f"{label} {str(bad)[:30]}", lambda: getattr(block, name)(bad), words=("block",))


def another(draw: random.Random, block: blocks.Block) -> tuple[blocks.Block, Tensor]:
    """A block of another form on the same weight."""
    o, i = block.shape
    kind = draw.choice(["dense", "diagonal", "kronecker", "outer", "same"])
    if kind == "same":
        return block, block.dense()
    if kind == "dense":
        S = psd(draw, o * i)
        return blocks.Dense(S, (o, i)), S
    if kind == "diagonal":
        entries = randn(draw, o, i).square()
        return blocks.Diagonal(entries), entries.flatten().diag()
    if kind == "kronecker":
        G, A = psd(draw, o), psd(draw, i)
        return blocks.Kronecker(G, A), torch.kron(G, A)
    a, g = randn(draw, 3, 2, i), randn(draw, 1, 3, 2, o)
    U = torch.einsum("mnto,nti->mnoi", g, a).flatten(0, 1).flatten(1)
    return blocks.Outer(a, g), U.mT @ U / 3


def _plain(draw, block, S, right, label) -> Case:
    name, wanted = draw.choice(
        [
            ("trace", S.trace()),
            ("squared_norm", S.square().sum()),
            ("diagonal", S.diagonal().reshape(block.shape)),
            ("eigenvalues", torch.linalg.eigvalsh(S).flip(0)),
            ("dense", S),
        ]
    )
    return Case(
        f"{type(block).__name__}.{name}",
        lambda: getattr(block, name)(),
        lambda found: near(found, wanted, 1e-6),
    )


def _columns(draw, block, S, right, label) -> Case:
    o, i = block.shape
    a, g = randn(draw, 2, 3, i), randn(draw, 1, 2, 3, o)
    D = torch.einsum("mnto,nti->mnoi", g, a).flatten(-2)
    wanted = (D @ S * D).sum(-1)
    if right:
        return Case(label, lambda: block.column_quadratics(a, g), lambda f: near(f, wanted))
    bad = junk.tensor(draw, a)
    return Case(f"{label} {str(bad)[:30]}", lambda: block.column_quadratics(bad, g), words=("a",))


def _sample(draw, block, S, right, label) -> Case:
    if right:
        state = draw.randrange(100)

        def call() -> Tensor:
            return block.sample(0.1, torch.Generator().manual_seed(state))

        noise = torch.randn(
            block.shape, generator=torch.Generator().manual_seed(state), dtype=torch.float64
        )
        wanted = (power(S, -0.5, 0.1) @ noise.flatten()).view(block.shape)
        return Case(label, call, lambda found: near(found, wanted))
    bad = junk.anything(draw)
    if bad is None:
        return Case(label, lambda: block.sample(bad), words=("damping",))
    return Case(f"{label} {str(bad)[:30]}", lambda: block.sample(0.1, bad), words=("generator",))


METHODS = {
    "@": _matmul,
    "quadratic": _quadratic,
    "power": _power,
    "solve": _solve,
    "logdet": _logdet,
    "leading": _leading,
    "inner": _inner,
    "plain": _plain,
    "column_quadratics": _columns,
    "sample": _sample,
}


def case(seed: int) -> Case:
    draw = random.Random(seed)
    return constructors(draw) if draw.random() < 0.35 else methods(draw)
