"""`Approximation`: the sums it needs and the block their means make; defining one registers it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar

from torch import Tensor

from fisherlab.blocks import Block, BlockError
from fisherlab.blocks.moment import Moment
from fisherlab.blocks.work import once
from fisherlab.extract import LayerCapture
from fisherlab.names import nearest

_REGISTRY: dict[str, type[Approximation]] = {}

# Cheaper forms of a sum or a block, and the methods whose results they repeat.
_SHORTCUTS = {
    "origin": ("sums",),
    "diagonals": ("sums",),
    "moments": ("sums",),
    "of_whole": ("sums", "basis", "corrections", "block"),
}


class Later(Mapping[str, Tensor]):
    """Sums made one by one, when asked for: one that nobody needs costs nothing."""

    def __init__(self, **makers: Callable[[], Tensor]) -> None:
        self._makers = makers
        self._made: dict[str, Tensor] = {}

    def __getitem__(self, key: str) -> Tensor:
        return once(self._made, key, self._makers[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


class Means(Mapping[str, Tensor]):
    """The means of one layer's sums, divided when asked for, and the blocks made of them."""

    def __init__(
        self,
        sums: Mapping[str, Tensor],
        count: float,
        moments: Mapping[str, Moment] | None = None,
    ) -> None:
        self._sums, self._count = sums, count
        self._moments = moments or {}
        self._means: dict[str, Tensor] = {}
        self._blocks: dict[Approximation, Block] = {}

    def __getitem__(self, key: str) -> Tensor:
        return once(self._means, key, lambda: self._mean(key))

    def _mean(self, key: str) -> Tensor:
        factor = self.factor(key) if key in self._moments else self._sums[key] / self._count
        return factor if isinstance(factor, Tensor) else factor.formed()

    def factor(self, key: str) -> Tensor | Moment:
        """A mean as the rows it is a moment of, where they are few; else the matrix."""
        moment = self._moments.get(key)
        return self[key] if moment is None else moment.scaled(1 / self._count)

    def __iter__(self) -> Iterator[str]:
        return iter(self._sums)

    def __len__(self) -> int:
        return len(self._sums)

    def block(self, approximation: Approximation) -> Block:
        """The block of an approximation that needs nothing but these means; made once."""
        return once(self._blocks, approximation, lambda: self._block(approximation))

    def _block(self, approximation: Approximation) -> Block:
        return approximation.block(self, approximation.basis(self), {})


class Approximation:
    """An approximation of a layer's Fisher block: the sums it needs and the block their means make.

    `Running` and `Memo` (running.py) divide by the number of examples, remember and loop over
    batches, for every approximation alike. Subclasses are frozen dataclasses, so that equal ones
    are equal and share work. `class X(Approximation, name="x")` registers; the comparison, the
    optimizers, the command line and the law tests read the registry.

    `origin`, `diagonals`, `moments` and `of_whole` are shortcuts to `sums` and `block`. A subclass
    that redefines `sums` does not inherit them, so that every caller uses the new sums.
    """

    name: ClassVar[str] = ""
    exponent: ClassVar[float] = -1.0
    needs: ClassVar[frozenset[str]] = frozenset({"inputs", "output_gradients"})
    # the sums that are Kronecker factors, and the side of the layer they belong to
    sides: ClassVar[Mapping[str, str]] = {}
    # False where the block belongs to the batch at hand and cannot be averaged over batches
    additive: ClassVar[bool] = True

    def __init_subclass__(cls, name: str | None = None) -> None:
        super().__init_subclass__()
        cls._drop_stale_shortcuts()
        if name is None:
            return
        if name in _REGISTRY and _REGISTRY[name].__qualname__ != cls.__qualname__:
            raise ValueError(f"an approximation named {name!r} exists already: {_REGISTRY[name]}")
        cls.name = name
        _REGISTRY[name] = cls

    @classmethod
    def _drop_stale_shortcuts(cls) -> None:
        """Undo every inherited shortcut to a method that this class defines anew."""

        def depth(method: str) -> int:
            return next(k for k, base in enumerate(cls.__mro__) if method in vars(base))

        for shortcut, methods in _SHORTCUTS.items():
            if any(depth(method) < depth(shortcut) for method in methods):
                setattr(cls, shortcut, vars(Approximation)[shortcut])

    @property
    def origin(self) -> Approximation:
        """The approximation whose sums this one uses: itself, or the one it corrects."""
        return self

    @property
    def placement(self) -> str:
        """Where the damping goes: "tikhonov" is `F + lambda I`."""
        return "tikhonov"

    def sums(self, layer: LayerCapture) -> Mapping[str, Tensor]:
        """Terms additive over examples, output vectors, chunks, batches and ranks."""
        raise BlockError(f"{type(self).__name__} has no running sums; define `sums(layer)`")

    def diagonals(self, layer: LayerCapture) -> Mapping[str, Tensor]:
        """The diagonals of the sums named in `sides`, without forming their matrices."""
        return {}

    def moments(self, layer: LayerCapture) -> dict[str, Moment]:
        """Those of the sums that are second moments of few rows, kept as the rows."""
        return {}

    def basis(self, means: Means, previous: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The expensive part made of the means (eigenvectors, inverses); has its own interval."""
        return {}

    def corrections(self, layer: LayerCapture, basis: dict[str, Tensor]) -> dict[str, Tensor]:
        """Terms additive over examples in a given basis: a second sweep over the data."""
        return {}

    def carry(
        self, corrections: dict[str, Tensor], old: dict[str, Tensor], new: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The corrections, known in the old basis, expressed in the new one."""
        return {}

    def block(
        self, means: Means, basis: dict[str, Tensor], corrections: dict[str, Tensor]
    ) -> Block:
        """The approximate block."""
        raise BlockError(
            f"{type(self).__name__} makes no block of means; define `block(means, basis, "
            "corrections)`, or `additive = False` and `of_batch(layers)`"
        )

    def damped(self, block: Block, damping: float) -> Block:
        """The preconditioner `(block + damping I)^exponent`, or damped where the paper puts it."""
        return block.power(self.exponent, damping)

    def of_whole(self, layer: LayerCapture) -> Block | None:
        """The same block straight from one whole batch, where that is cheaper than by its sums."""
        return None

    def of_batch(self, layers: tuple[LayerCapture, ...]) -> Block:
        """The block of captures that cannot be reduced to sums (`additive = False`)."""
        raise BlockError(f"{type(self).__name__} is made of sums; call `block` on their means")

    def __call__(self, *layers: LayerCapture) -> Block:
        """The block of one batch, of chunks of it, or of many batches: the same number."""
        from fisherlab.approximations.running import Memo

        if not layers:
            raise BlockError(f"{type(self).__name__}() needs at least one LayerCapture")
        return Memo(layers).block(self)


def names() -> list[str]:
    """Every registered name, the exact block first."""
    return sorted(_REGISTRY, key=lambda name: (name != "exact", name))


def of_one_batch() -> list[str]:
    """Those that one capture can build; K-BFGS needs a pair of them."""
    return [name for name in names() if "pair" not in _REGISTRY[name]().needs]


def get(name: str) -> type[Approximation]:
    """The class registered under a name; an unknown one is refused with the nearest names."""
    if name not in _REGISTRY:
        near = nearest(name, _REGISTRY, names())
        raise ValueError(f"no approximation named {name!r}; nearest: {near}")
    return _REGISTRY[name]
