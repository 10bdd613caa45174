"""`Approximation`: the statistics it names and the block their means make; it registers itself."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cached_property
from numbers import Integral, Real
from typing import Any, ClassVar, cast

from torch import Tensor

from fisherlab import doors
from fisherlab.approximations.entry import DOORS
from fisherlab.approximations.means import Means
from fisherlab.approximations.memo import Memo
from fisherlab.blocks import Block, BlockError
from fisherlab.blocks.entry import guard
from fisherlab.blocks.factor import Factor
from fisherlab.extract import LayerCapture
from fisherlab.names import Registry, nearest
from fisherlab.statistics import COLUMNS, Statistic

_REGISTRY: Registry[type[Approximation]] = Registry("approximation", ValueError)


class _ByOption:
    def __repr__(self) -> str:
        return "given by an option"


# A field whose statistic follows from an option of the method.
BY_OPTION = cast(Statistic, _ByOption())

# Methods of the contract before statistics were values; no code would call them.
RETIRED = ("sums", "diagonals", "moments", "of_whole")


class Approximation:
    """An approximation of a layer's Fisher block: a block made of the means of its statistics.

    Its fields name the statistics, `block(mean, shape)` makes the block. `Memo` and `Running`
    divide by the number of examples, remember and loop over batches, for every approximation alike.
    Subclasses are frozen dataclasses, so that equal ones are equal and share work.
    `class X(Approximation, name="x")` registers; the comparison, the optimizers, the command line
    and the law tests read the registry.

    If a class body names a statistic, or another value of an inherited field, it is a field of the
    class. It needs neither an annotation nor `@dataclass(frozen=True)`.
    """

    name: ClassVar[str] = ""
    exponent: ClassVar[float] = -1.0
    # False where the block belongs to the batch at hand and cannot be averaged over batches
    additive: ClassVar[bool] = True
    # True where each batch moves the block of all batches before it (`Recursive`)
    recursive: ClassVar[bool] = False

    def __init_subclass__(cls, name: str | None = None) -> None:
        super().__init_subclass__()
        guard(cls, DOORS)
        retired = [old for old in RETIRED if callable(getattr(cls, old, None))]
        if retired:
            raise TypeError(
                f"{cls.__name__} defines {', '.join(retired)}, which nothing calls: name each sum "
                "as a field, `A: Statistic = ...`, and make `block(self, mean, shape)` of "
                "`mean(self.A)` (fisherlab.statistics)"
            )
        cls._pin_fields()
        if name is None:
            return
        _REGISTRY.add_class(name, cls)
        cls.name = name

    @classmethod
    def _pin_fields(cls) -> None:
        """Annotate what the class, or a class mixed in, sets: a dataclass looks at nothing else."""
        inherited = getattr(cls, "__dataclass_fields__", {})
        named = {k for base in cls.__mro__ for k, v in vars(base).items() if _is_statistic(v)}
        own = vars(cls).get("__annotations__", {})
        for key in {*inherited, *named} - set(own):
            value = getattr(cls, key, MISSING)
            known = inherited[key].default if key in inherited else MISSING
            if value is MISSING or value is known or hasattr(value, "__get__"):
                continue
            setattr(cls, key, value)
            cls.__annotations__[key] = inherited[key].type if key in inherited else "Statistic"

    def __new__(cls, *args: Any, **options: Any) -> Approximation:
        cls._dress()
        cls._check_fields(args, options)
        return super().__new__(cls)

    @classmethod
    def _dress(cls) -> None:
        """Make a dataclass of each class that names fields under no decorator."""
        for base in reversed(cls.__mro__):
            if issubclass(base, Approximation) and "__dataclass_fields__" not in vars(base):
                own = vars(base).get("__annotations__", {})
                inherited = getattr(base, "__dataclass_fields__", {})
                if any(key in inherited or _is_statistic(vars(base).get(key)) for key in own):
                    dataclass(frozen=True)(base)

    @classmethod
    def _check_fields(cls, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Refuse a value that is not of its field's type, such as a word for a number."""
        own: tuple[Field[Any], ...] = fields(cls) if is_dataclass(cls) else ()
        given = dict(zip((f.name for f in own if not f.kw_only), args, strict=False)) | options
        for field in (field for field in own if field.name in given):
            kind, _, optional = str(field.type).partition(" | ")
            value = given[field.name]
            if value is not field.default and not (optional and value is None):
                _check_field(kind, value, f"{field.name} of {cls.__name__}")

    @cached_property
    def statistics_by_name(self) -> dict[str, Statistic]:
        """The statistics among the fields, and those of the approximations among them."""
        found: dict[str, Statistic] = {}
        for key in getattr(self, "__dataclass_fields__", {}):
            value = getattr(self, key)
            if isinstance(value, Statistic):
                found[key] = value
            elif isinstance(value, Approximation):
                for name, statistic in value.statistics_by_name.items():
                    taken = found.get(name, statistic) != statistic
                    found[f"{key}.{name}" if taken else name] = statistic
        return found

    @property
    def options(self) -> dict[str, Any]:
        """Options that choose among the method's variants, by name: `weight_sharing`, `rank`, ...

        The factors of a corrected eigenbasis lend theirs, without where their own damping goes.
        """
        found: dict[str, Any] = {}
        for key, value in self._fields.items():
            if isinstance(value, Approximation):
                lent = {k: v for k, v in value.options.items() if k not in ("placement", "pi")}
                found = {**lent, **found}
            elif "Statistic" not in str(self.__dataclass_fields__[key].type):  # type: ignore[attr-defined]
                found[key] = value
        return found

    @property
    def _fields(self) -> dict[str, Any]:
        names: list[str] = [field.name for field in fields(self)] if is_dataclass(self) else []
        return {name: getattr(self, name) for name in names}

    def with_options(self, **chosen: Any) -> Approximation:
        """The method with other `options`; a statistic that follows from one follows.

        Raises:
            TypeError: The method has no such option.
            BlockError: An option has no such value.
        """
        known = self.options
        for option in chosen:
            if option not in known:
                has = f"It takes {', '.join(known)}" if known else "It has none"
                raise TypeError(f"{type(self).__name__} has no option {option!r}. {has}")
        own = {key: value for key, value in self._fields.items() if key in known}
        usual = type(self)(**own)._fields
        kept = {k: v for k, v in self._fields.items() if k not in own and v != usual[k]}
        for key, value in self._fields.items():
            if isinstance(value, Approximation):
                kept[key] = value.with_options(
                    **{k: v for k, v in chosen.items() if k not in own and k in value.options}
                )
        return type(self)(**{**own, **kept, **{k: v for k, v in chosen.items() if k in own}})

    @property
    def needs(self) -> frozenset[str]:
        """The fields that a capture must hold: all that the statistics need."""
        statistics = self.statistics_by_name.values()
        return frozenset().union(*(S.needs for S in statistics)) if statistics else COLUMNS

    @property
    def placement(self) -> str:
        """Where the damping goes: "tikhonov" is `F + lambda I`."""
        return "tikhonov"

    def _choose(self, option: str, choices: Mapping[Any, Mapping[str, Statistic]]) -> None:
        """Give the fields that are `BY_OPTION` the statistics of an option's value.

        Raises:
            BlockError: the value is unknown, or a field has the statistic of another value.
        """
        value, method = getattr(self, option), type(self).__name__
        if not isinstance(value, Hashable) or value not in choices:
            known = " or ".join(map(repr, choices))
            raise BlockError(f"{method}'s {option} is {known}, got {doors.said(value)}")
        for key, statistic in choices[value].items():
            own = getattr(self, key)
            if own is BY_OPTION:
                object.__setattr__(self, key, statistic)
            elif own != statistic and any(own == other[key] for other in choices.values()):
                raise BlockError(
                    f"{method}'s {key} follows from {option}={value!r} and is {statistic}, but got "
                    f"{own}, that of another {option}; leave {key} out"
                )

    def basis(self, mean: Means, previous: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
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

    def block(self, mean: Means, shape: tuple[int, int]) -> Block:
        """The block of a weight `[o, i]`.

        Args:
            mean: `mean(self.A)` is the mean of the statistic `A`, a tensor; `mean.factor(self.A)`
                the same as a side of a Kronecker product, which keeps its few rows and shares its
                eigenvectors with all methods; `mean.basis` and
                `mean.corrections` are what `basis` and `corrections` made.
            shape: `(o, i)`, the bias as last column.
        """
        raise BlockError(
            f"{type(self).__name__} makes no block of means; define `block(mean, shape)`, or "
            "`additive = False` and `of_batch(layers)`"
        )

    @property
    def tikhonov(self) -> bool:
        """Whether `damped` is known to be `(block + damping I)^exponent`."""
        return type(self).damped is Approximation.damped

    def damped(self, block: Block, damping: float) -> Block:
        """The preconditioner `(block + damping I)^exponent`, or damped where the paper puts it."""
        return block.power(self.exponent, damping)

    def damped_each(self, blocks: Sequence[Block], dampings: Sequence[float]) -> list[Block]:
        """`damped` of the blocks of several layers, whose decompositions may be made together."""
        return [self.damped(F, damping) for F, damping in zip(blocks, dampings, strict=True)]

    def decomposed(self, mean: Means) -> Sequence[Factor]:
        """The factors whose eigenvectors `basis` or `block` needs, to be found together."""
        return ()

    def of_batch(self, layers: tuple[LayerCapture, ...]) -> Block:
        """The block of captures that cannot be reduced to sums (`additive = False`)."""
        raise BlockError(f"{type(self).__name__} is made of sums; call `block` on their means")

    def __call__(self, *layers: LayerCapture) -> Block:
        """The block of one batch, of chunks of it, or of many batches: the same number."""
        if not layers:
            raise BlockError(f"{type(self).__name__}() needs at least one LayerCapture")
        return Memo(layers).block(self)


guard(Approximation, DOORS)


def check_iteration(tolerance: object, iterations: object) -> None:
    """Refuse what no iteration ends at: a tolerance None or above 0, iterations at least 1."""
    doors.count(iterations, "iterations", error=BlockError)
    if tolerance is not None:
        doors.number(tolerance, "tolerance", above=0.0, error=BlockError)


def _check_field(kind: str, value: object, what: str) -> None:
    if kind in ("float", "int") and not isinstance(value, Real):
        wanted = "a number" if kind == "float" else "a whole number"
        raise BlockError(f"{what} must be {wanted} of Python, got {doors.said(value)}")
    if kind == "float":
        doors.number(value, what, error=BlockError)
    elif kind == "int":
        doors.count(value, what, error=BlockError)
        if not isinstance(value, Integral):
            raise BlockError(f"{what} must be an int, got {doors.said(value)}")
    elif kind == "bool":
        doors.flag(value, what, error=BlockError)
    elif kind == "Statistic" and not isinstance(value, Statistic):
        raise BlockError(f"{what} must be a Statistic, got {doors.said(value)}")
    elif kind == "Approximation" and not isinstance(value, Approximation):
        got = doors.said(value)
        raise BlockError(f"{what} must be an approximation, such as fl.KFAC(); got {got}")


def _is_statistic(value: object) -> bool:
    return isinstance(value, Statistic)


def names() -> list[str]:
    """Every registered name, the exact block first."""
    return sorted(_REGISTRY, key=lambda name: (name != "exact", name))


def of_one_batch() -> list[str]:
    """The methods that one capture can build; K-BFGS needs a pair of them."""
    return [name for name in names() if "pair" not in _REGISTRY[name]().needs]


def get(name: str) -> type[Approximation]:
    """The class registered under a name; an unknown one is refused with the nearest names."""
    if not isinstance(name, str):
        raise ValueError(f"name must be that of an approximation, got {doors.said(name)}")
    if name not in _REGISTRY:
        near = nearest(name, _REGISTRY, names())
        raise ValueError(f"no approximation named {name!r}; nearest: {near}")
    return _REGISTRY[name]
