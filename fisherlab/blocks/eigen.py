"""A matrix that is diagonal in a Kronecker eigenbasis, full or thin."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fisherlab import doors
from fisherlab.blocks.base import Block
from fisherlab.blocks.basis import Basis, Coordinates, Space, Thin, matrix_of, size_of
from fisherlab.blocks.entry import check_rotated
from fisherlab.blocks.numerics import (
    BlockError,
    check_alike,
    check_orthonormal,
    chosen_squares,
    moved_squares,
    spectrum_power,
    turned,
)
from fisherlab.blocks.reads import together


@dataclass(frozen=True, eq=False)
class Complement:
    """The eigenvalues beside two bases that span less than their spaces."""

    G: Tensor  # [o'], of each output direction on the complement of the input basis
    A: Tensor  # [i'], of each input direction on the complement of the output basis
    both: Tensor  # 0-d, on both complements
    missing: tuple[int, int]  # dimensions that the output and the input basis leave out

    @cached_property
    def values(self) -> tuple[tuple[Tensor, int], ...]:
        """Each tail that there is, with its multiplicity."""
        every = zip((self.G, self.A, self.both.reshape(1)), self._counts, strict=True)
        return tuple((x, k) for x, k in every if k)

    @property
    def _counts(self) -> tuple[int, int, int]:
        G, A = self.missing
        return A, G, G * A

    @cached_property
    def level(self) -> Tensor | None:
        """The one value of all that is there, 0 of nothing; None where there are several."""
        if not self.values:
            return self.both.new_zeros(())
        every = torch.cat([x for x, _ in self.values])
        if not len(every):
            return self.both
        return every[0] if bool((every == every[0]).all()) else None

    @cached_property
    def zero(self) -> bool:
        """Whether nothing but 0 is there."""
        return not self.values or (self.level is not None and not bool(self.level))

    @property
    def at_hand(self) -> tuple[bool, Tensor | None]:
        """`zero` and `level`, or that neither is known while reads of the device wait."""
        if together() is None or not self.values:
            return self.zero, self.level
        return vars(self).get("zero", False), vars(self).get("level")

    @classmethod
    def of(cls, G: Tensor, A: Tensor, both: Tensor, missing: tuple[int, int]) -> Complement:
        """The tails that there are, and zeros in the place of the others."""
        counts = missing[1], missing[0], missing[0] * missing[1]
        tails = zip((G, A, both), counts, strict=True)
        G, A, both = (x if k else torch.zeros_like(x) for x, k in tails)
        return cls(G, A, both, missing)

    @classmethod
    def empty(cls, spectrum: Tensor, missing: tuple[int, int]) -> Complement:
        """Nothing but 0, and known to be."""
        G, A = (spectrum.new_zeros(length) for length in spectrum.shape)
        made = cls(G, A, spectrum.new_zeros(()), missing)
        vars(made).update(level=made.both, zero=True)
        return made

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Complement:
        """The same of another function of the eigenvalues that are there."""
        _, level = self.at_hand
        if level is not None and self.values:
            level = function(level)
            G, A, both = (
                level.expand(x.shape) if k else x
                for x, k in zip((self.G, self.A, self.both), self._counts, strict=True)
            )
            made = Complement(G, A, both, self.missing)
            vars(made).update(level=level)
            return made
        G, A, both = (
            function(x) if k else x
            for x, k in zip((self.G, self.A, self.both), self._counts, strict=True)
        )
        return Complement(G, A, both, self.missing)

    def sum(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        """The sum of a function of all of them, 0-d float64."""
        total = torch.zeros((), dtype=torch.float64, device=self.both.device)
        for x, k in self.values:
            total = total + function(x.double()).sum() * k
        return total

    def weighed(self, rows: Tensor, columns: Tensor, rest: Tensor) -> Tensor:
        """`sum G rows + sum A columns + both rest` over last axes, float64, of energies beside."""
        value = rows.double() @ self.G.double() + columns.double() @ self.A.double()
        return value + self.both.double() * rest


class Eigen(Block):
    """`F = (Q_G (x) Q_A) diag(spectrum) (Q_G (x) Q_A)^T`, plus the complement of thin bases.

    Where a basis is thin, the tails are eigenvalues on its orthogonal complement. They default to
    0, and together they are the `complement`.

    Args:
        Q_G: `[o, o']` with orthonormal columns; None: the coordinates of the outputs.
        Q_A: `[i, i']` with orthonormal columns; None: the coordinates of the inputs.
        spectrum: `[o', i']`.
        tail_G: `[o']`, for each output direction, on the complement of `Q_A`.
        tail_A: `[i']`, for each input direction, on the complement of `Q_G`.
        tail: 0-d, on both complements.

    Raises:
        BlockError: the spectrum does not fit the bases.
    """

    _factor_values: tuple[Tensor, Tensor] | None = None

    def __init__(
        self,
        Q_G: Basis | None,
        Q_A: Basis | None,
        spectrum: Tensor,
        tail_G: Tensor | None = None,
        tail_A: Tensor | None = None,
        tail: Tensor | None = None,
    ) -> None:
        doors.tensor(spectrum, "spectrum", ndim=(2,), error=BlockError)
        for Q, what in ((Q_G, "Q_G"), (Q_A, "Q_A")):
            if not isinstance(Q, Thin | Coordinates | None):
                doors.tensor(Q, what, ndim=(2,), error=BlockError)
                if not len(Q):
                    raise BlockError(f"{what} must have rows, got {doors.said(Q)}")
        Q_G = Coordinates(spectrum[:, 0]) if Q_G is None else Q_G
        Q_A = Coordinates(spectrum[0]) if Q_A is None else Q_A
        if tuple(spectrum.shape) != (Q_G.shape[1], Q_A.shape[1]):
            raise BlockError(
                f"bases of {Q_G.shape[1]} and {Q_A.shape[1]} vectors need a spectrum of that "
                f"shape, got {tuple(spectrum.shape)}"
            )
        check_alike(Q_G, Q_A, spectrum)
        for Q, what in ((Q_G, "Q_G"), (Q_A, "Q_A")):
            if isinstance(Q, Tensor):
                check_orthonormal(Q, f"the columns of {what}")
        self.Q_G, self.Q_A, self.spectrum = Q_G, Q_A, spectrum
        missing = len(Q_G) - Q_G.shape[1], len(Q_A) - Q_A.shape[1]
        if tail_G is None and tail_A is None and tail is None:
            self.complement = Complement.empty(spectrum, missing)
            return
        self.complement = Complement.of(
            _tail(tail_G, "tail_G", spectrum, (Q_G.shape[1],)),
            _tail(tail_A, "tail_A", spectrum, (Q_A.shape[1],)),
            _tail(tail, "tail", spectrum, ()),
            missing,
        )

    @classmethod
    def within(cls, other: Eigen, spectrum: Tensor, complement: Complement) -> Eigen:
        """Other eigenvalues in the bases of a block, which were looked at when it was made."""
        block = object.__new__(cls)
        block.Q_G, block.Q_A = other.Q_G, other.Q_A
        block.spectrum, block.complement = spectrum, complement
        return block

    @property
    def tail_G(self) -> Tensor:
        """Eigenvalues on the complement of `Q_A`, `[o']`."""
        return self.complement.G

    @property
    def tail_A(self) -> Tensor:
        """Eigenvalues on the complement of `Q_G`, `[i']`."""
        return self.complement.A

    @property
    def tail(self) -> Tensor:
        """The eigenvalue on both complements, 0-d."""
        return self.complement.both

    def tensors(self) -> Iterator[Tensor]:
        yield from super().tensors()
        yield from (self.complement.G, self.complement.A, self.complement.both)

    def formed_bytes(self) -> int:
        # a side in its own coordinates has no vectors
        bases = [Q for Q in (self.Q_G, self.Q_A) if not isinstance(Q, Coordinates)]
        entries = self.size * self.spectrum.element_size()
        return entries + sum(len(Q) ** 2 * Q.dtype.itemsize for Q in bases)

    def saved(self, name: str) -> Tensor | None:
        value = getattr(self, name)
        if value is None or isinstance(value, Coordinates):
            return None
        return matrix_of(value)

    def sizes(self) -> dict[int, int]:
        return super().sizes() | size_of(self.Q_G) | size_of(self.Q_A)

    @cached_property
    def shape(self) -> tuple[int, int]:
        return self.Q_G.shape[0], self.Q_A.shape[0]

    @cached_property
    def dtype(self) -> torch.dtype:
        return self.Q_A.dtype

    @cached_property
    def device(self) -> torch.device:
        return self.Q_A.device

    @property
    def thin(self) -> bool:
        """Whether a basis spans less than its space."""
        return self.complement.missing != (0, 0)

    @property
    def confined(self) -> bool:
        """Whether the matrix is zero outside its bases."""
        return self.complement.zero

    def __matmul__(self, V: Tensor) -> Tensor:
        return self.times(V, self.in_bases(V))

    def in_bases(self, V: Tensor) -> Tensor:
        """`Q_G^T V Q_A`, which all blocks in this basis need of `V`."""
        return self.Q_G.mT @ (V @ self.Q_A)

    def times(self, V: Tensor, rotated: Tensor) -> Tensor:
        """The product with a `V` whose `rotated` is known."""
        self.check(V)
        check_rotated(self, rotated)
        spectrum, (zero, level) = self.spectrum.to(self.dtype), self.complement.at_hand
        if zero:
            return self.from_bases(spectrum * rotated)
        if level is not None:
            level = level.to(self.dtype)
            inside = self.from_bases((spectrum - level) * rotated)
            return inside.addcmul_(V.to(inside), level)
        tail_G, tail_A, tail = (x.to(self.dtype) for x in (self.tail_G, self.tail_A, self.tail))
        GV = self.Q_G.mT @ V
        # rotated + (Q_G d Q_G^T) (x) I + I (x) (Q_A d Q_A^T) + tail I, every part relative to tail
        inside = self.Q_G @ ((spectrum - tail_G[:, None] - tail_A + tail) * rotated)
        result = inside.addcmul_(V @ self.Q_A, tail_A - tail) @ self.Q_A.mT
        return (result + self.Q_G @ ((tail_G - tail)[:, None] * GV)).addcmul_(V, tail)

    def from_bases(self, rotated: Tensor) -> Tensor:
        """`Q_G rotated Q_A^T`."""
        return self.Q_G @ rotated @ self.Q_A.mT

    def restricted_to(self, space: Space) -> Block | None:
        C_G, C_A = space.bases(self.Q_G, self.Q_A)
        beside_A = space.A is not None and self.tail_G.any()
        beside_G = space.G is not None and self.tail_A.any()
        if C_G is None or C_A is None or self.tail.any() or beside_A or beside_G:
            return None
        near = Eigen(C_G, C_A, self.spectrum, self.tail_G, self.tail_A)
        return near if self._factor_values is None else near.of_factors(*self._factor_values)

    def look(self) -> Block:
        _ = self.complement.zero, self.complement.level
        return self

    def power(self, exponent: float, damping: float = 0.0) -> Block:
        if exponent == 1 and damping == 0:
            return self
        name = type(self).__name__

        def powered(values: Tensor) -> Tensor:
            return spectrum_power(values, exponent, damping, name)

        rest = self.complement.mapped(powered)
        return Eigen.within(self, powered(self.spectrum), rest)

    def quadratic(self, V: Tensor) -> Tensor:
        rotated = (self.Q_G.mT @ V @ self.Q_A).double().square()
        value = (rotated * self.spectrum).sum((-2, -1))
        if not self.confined:
            rows = (self.Q_G.mT @ V).double().square().sum(-1) - rotated.sum(-1)
            columns = (V @ self.Q_A).double().square().sum(-2) - rotated.sum(-2)
            rest = V.double().square().sum((-2, -1)) - rotated.sum((-2, -1))
            rest = rest - rows.sum(-1) - columns.sum(-1)
            value = value + self.complement.weighed(rows, columns, rest)
        return value

    def column_quadratics(self, a: Tensor, g: Tensor) -> Tensor:
        if a.shape[1] != 1:
            return super().column_quadratics(a, g)
        # <D, F D> = sum_o (g Q_G)_o^2 sum_i spectrum_oi (a Q_A)_i^2, and the same of the tails
        outputs = (g[:, :, 0] @ self.Q_G).square().double()
        inputs = (a[:, 0] @ self.Q_A).square().double()
        value = (outputs * (inputs @ self.spectrum.double().mT)).sum(-1)
        if self.confined:
            return value
        rest_G = g[:, :, 0].double().square().sum(-1) - outputs.sum(-1)
        rest_A = a[:, 0].double().square().sum(-1) - inputs.sum(-1)
        value = value + outputs @ self.tail_G.double() * rest_A
        value = value + rest_G * (inputs @ self.tail_A.double())
        return value + self.tail.double() * rest_G * rest_A

    def _inner(self, other: Block) -> Tensor | None:
        return self.inner_with_rotated(other) if isinstance(other, Eigen) else None

    def inner_with_rotated(self, other: Block) -> Tensor:
        """`<F, other>` by `other.rotated_diagonal`, for a form where that is cheap."""
        if self.confined:
            return (self.spectrum * other.rotated_diagonal(self.Q_G, self.Q_A)).sum()
        inside = self.spectrum - self.tail_G[:, None] - self.tail_A + self.tail
        value = (inside * other.rotated_diagonal(self.Q_G, self.Q_A)).sum()
        eye_G = torch.eye(self.shape[0], dtype=self.dtype, device=self.device)
        eye_A = torch.eye(self.shape[1], dtype=self.dtype, device=self.device)
        ones_G = other.rotated_diagonal(self.Q_G, eye_A).sum(1)
        ones_A = other.rotated_diagonal(eye_G, self.Q_A).sum(0)
        value = value + ((self.tail_G - self.tail) * ones_G).sum()
        value = value + ((self.tail_A - self.tail) * ones_A).sum()
        return value + self.tail * other.trace()

    def _sum(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        return function(self.spectrum.double()).sum() + self.complement.sum(function)

    def trace(self) -> Tensor:
        return self._sum(lambda x: x)

    def squared_norm(self) -> Tensor:
        return self._sum(torch.square)

    def logdet(self, damping: float) -> Tensor:
        return self._sum(lambda x: (x.clamp(min=0) + damping).log())

    def diagonal(self) -> Tensor:
        G2, A2 = self.Q_G.square(), self.Q_A.square()
        value = G2 @ self.spectrum.to(self.dtype) @ A2.mT
        if not self.thin:
            return value
        rest_G, rest_A = 1 - G2.sum(1), 1 - A2.sum(1)
        value = value + torch.outer(G2 @ self.tail_G.to(self.dtype), rest_A)
        value = value + torch.outer(rest_G, A2 @ self.tail_A.to(self.dtype))
        return value + self.tail.to(self.dtype) * torch.outer(rest_G, rest_A)

    def eigenvalues(self) -> Tensor:
        parts = [self.spectrum.double().flatten()]
        parts += [x.double().repeat(k) for x, k in self.complement.values]
        return torch.cat(parts).sort(descending=True).values

    def leading(self, k: int) -> tuple[Tensor, Tensor]:
        """The largest eigenpairs within the bases; at most as many as those have."""
        values, q_G, q_A = self._leading(k)
        return values, torch.einsum("ok,ik->koi", q_G, q_A)

    def leading_values(self, k: int) -> Tensor:
        return self._leading(k)[0]

    def leading_factors(self, k: int) -> tuple[Tensor, Tensor]:
        _, q_G, q_A = self._leading(k)
        return q_G, q_A

    def _leading(self, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """The k largest of the spectrum, and the factors `[o, k]`, `[i, k]` of their vectors."""
        k = min(k, self.spectrum.numel())
        values, flat = self.spectrum.double().flatten().topk(k)
        rows, columns = flat // self.Q_A.shape[1], flat % self.Q_A.shape[1]
        return values, self.Q_G[:, rows], self.Q_A[:, columns]

    def diagonal_of(self, other: Block) -> Tensor:
        return other.rotated_diagonal(self.Q_G, self.Q_A)

    def of_factors(self, values_G: Tensor, values_A: Tensor) -> Eigen:
        """This block, which remembers the eigenvalues of the factors that its bases are of."""
        for values, what in ((values_G, "values_G"), (values_A, "values_A")):
            doors.tensor(values, what, ndim=(1,), error=BlockError)
        self._factor_values = values_G, values_A
        return self

    def chosen(self, other: Block) -> Tensor:
        if self._factor_values is None:
            return self.nothing_chosen  # the bases were given, not found
        values_G, values_A = (
            None if isinstance(Q, Coordinates) else values
            for values, Q in zip(self._factor_values, (self.Q_G, self.Q_A), strict=True)
        )
        found = self.diagonal_of(other)
        width = chosen_squares(found, values_G, values_A, other.trace())
        sides = ((self.Q_G, values_G), (self.Q_A, values_A))

        def again(draw: int) -> Tensor | None:
            turns = [
                None if values is None else turned(matrix_of(Q), values, draw)
                for Q, values in sides
            ]
            if all(turn is None for turn in turns):
                return None
            pairs = zip(sides, turns, strict=True)
            return other.rotated_diagonal(*(Q if turn is None else turn for (Q, _), turn in pairs))

        return width + moved_squares(found, again)

    def rotated_diagonal(self, Q_G: Basis, Q_A: Basis) -> Tensor:
        R_G = (self.Q_G.mT @ Q_G).double().square()
        R_A = (self.Q_A.mT @ Q_A).double().square()
        value = R_G.mT @ self.spectrum.double() @ R_A
        if not self.thin:
            return value
        norm_G, norm_A = (Q.double().square().sum(0) for Q in (Q_G, Q_A))
        rest_G, rest_A = norm_G - R_G.sum(0), norm_A - R_A.sum(0)
        value = value + torch.outer(R_G.mT @ self.tail_G.double(), rest_A)
        value = value + torch.outer(rest_G, R_A.mT @ self.tail_A.double())
        return value + self.tail.double() * torch.outer(rest_G, rest_A)

    @property
    def clamped(self) -> float:
        negative = -self._sum(lambda x: x.clamp(max=0))
        return float((negative / self._sum(torch.abs).clamp(min=1e-300)).detach())


def _tail(values: Tensor | None, what: str, spectrum: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Eigenvalues beside a thin basis; zeros of None."""
    if values is None:
        return spectrum.new_zeros(shape)
    doors.tensor(values, what, error=BlockError)
    if tuple(values.shape) != shape:
        raise BlockError(f"{what} must have shape {shape}, got {tuple(values.shape)}")
    check_alike(values, spectrum)
    return values
