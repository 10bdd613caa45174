"""Damping: *where* it enters a block, and *how much* of it there is.

Where:

    tikhonov     (F + lambda I)^p
    factored     (G + sqrt(lambda)/pi I)^p (x) (A + pi sqrt(lambda) I)^p  Martens & Grosse 2015, 6.3
    factorwise   (G + lambda I)^p (x) (A + lambda I)^p                        ANG (8)
    eigenvalue   the products of the factors' eigenvalues, each + lambda: for a Kronecker product
                 the same matrix as tikhonov, named as FNGD VI runs KFAC

How much: a number, or a rule `dict[layer, Block] -> dict[layer, lambda]`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from fisherlab import doors
from fisherlab.blocks import Block, BlockError, Kronecker, Outer
from fisherlab.blocks.factor import decompose
from fisherlab.blocks.numerics import check_damping, check_exponent
from fisherlab.blocks.reads import holds, numbers_of, together

PLACEMENTS = ("tikhonov", "factored", "factorwise", "eigenvalue")
# Placements whose damped block is `(F + lambda I)^p`.
PLAIN = ("tikhonov", "eigenvalue")
Own = TypeVar("Own", bound=Block)
Rule = Callable[[dict[str, Block]], dict[str, float]]


def trace_ratio_pi(block: Kronecker) -> Tensor:
    """`pi = sqrt((tr A / dim A) / (tr G / dim G))`, 0-d; 1 where a trace is zero."""
    doors.instance(block, "block", Kronecker, "a Kronecker product")
    G, A = (trace / d for trace, d in zip(block.traces, block.shape, strict=True))
    both = (A > 0) & (G > 0)
    return torch.where(both, (A / torch.where(both, G, 1)).sqrt(), 1)


def check_placement(placement: str, pi: float | None = None) -> None:
    """Refuse an unknown placement, and what is no ratio of factors."""
    doors.choice(placement, "placement", PLACEMENTS, error=BlockError)
    if pi is not None:
        doors.number(pi, "pi", above=0.0, error=BlockError)


def place(
    block: Block, exponent: float, damping: float, placement: str, pi: float | None = None
) -> Block:
    """A Kronecker block to the power `exponent`, damped at `placement`; `pi` None: from traces."""
    sides = _of_sides(block, damping, placement, pi)
    if sides is None:
        return block.power(exponent, damping)
    assert isinstance(block, Kronecker)
    return block.factored_power(exponent, *sides)


def pairs_of(blocks: object, dampings: object) -> list[tuple[Block, Any]]:
    """Blocks with their dampings, as many of each.

    Raises:
        BlockError: it is no list of blocks, or there are not as many dampings.
    """
    found = doors.listed(blocks, "blocks", error=BlockError)
    for position, block in enumerate(found):
        check_block(block, f"blocks[{position}]")
    given = doors.listed(dampings, "dampings", error=BlockError)
    if len(given) != len(found):
        raise BlockError(f"{len(found)} blocks need as many dampings, got {len(given)}")
    return [(F, check_damping(x, F.dtype)) for F, x in zip(found, given, strict=True)]


def check_own(block: object, kind: type[Own], method: str) -> Own:
    """A block of the form that a method makes.

    Raises:
        BlockError: it is of another.
    """
    if not isinstance(block, kind):
        raise BlockError(f"{method} damps blocks that it made, got {doors.said(block)}")
    return block


def check_block(block: object, what: str = "block") -> Block:
    """Refuse what is no block."""
    if not isinstance(block, Block):
        raise BlockError(f"{what} must be a block of fl.blocks, got {doors.said(block)}")
    return block


def place_each(
    blocks: Sequence[Block],
    exponent: float,
    dampings: Sequence[float],
    placement: str,
    pi: float | None = None,
) -> list[Block]:
    """`place` of several blocks, whose small factors are decomposed together by their shapes."""
    check_placement(placement, pi)
    pairs = pairs_of(blocks, dampings)
    exponent = check_exponent(exponent)
    if not all(isinstance(block, Kronecker) for block in blocks) or exponent != -1:
        return [place(block, exponent, damping, placement, pi) for block, damping in pairs]
    products = cast(Sequence[Kronecker], blocks)
    if placement in PLAIN:
        decompose(F for block in products for F in block.factors)
        return [place(block, exponent, damping, placement, pi) for block, damping in pairs]
    sides = [cast(Any, _of_sides(block, damping, placement, pi)) for block, damping in pairs]
    return Kronecker.inverses(products, sides)


def _of_sides(block: Block, damping: float, placement: str, pi: float | None) -> Any:
    """The dampings of the output and the input factor; None where the whole block has one."""
    check_placement(placement)
    if not isinstance(block, Kronecker):
        got = doors.said(block)
        raise BlockError(f"placement {placement!r} is for a Kronecker product, got {got}")
    damping = check_damping(damping, block.dtype)
    if placement == "factored":
        ratio: Any = trace_ratio_pi(block) if pi is None else doors.number(pi, "pi", above=0.0)
        later = isinstance(ratio, Tensor) and together() is not None
        ratio = ratio if later else float(ratio)
        root = damping.sqrt() if isinstance(damping, Tensor) else math.sqrt(damping)
        # not `root * (1 / ratio)`, as a number over a tensor is
        over: Any = root
        if later:
            over = torch.as_tensor(root, dtype=torch.float64, device=ratio.device).to(ratio)
        return over / ratio, root * ratio
    return (damping, damping) if placement == "factorwise" else None


def as_rule(damping: float | Rule) -> Rule:
    """A rule as it is; a finite number >= 0 as the constant rule."""
    if callable(damping) and not isinstance(damping, type):
        return damping
    return constant(doors.number(damping, "damping, if it is no rule,", least=0.0))


def lambdas(rule: Rule, blocks: Mapping[str, Block]) -> dict[str, float]:
    """A rule's lambdas for the blocks of some layers, checked: a rule may be a user's own.

    Raises:
        BlockError: the rule returned no dict, left a layer out, or gave one no number >= 0.
    """
    doors.function(rule, "rule(blocks)", error=BlockError)
    found = rule(_checked(blocks))
    if not isinstance(found, Mapping):
        raise BlockError(
            f"a damping rule returns a dict of layer -> lambda, got {doors.said(found)}"
        )
    missing = [name for name in blocks if name not in found]
    if missing:
        raise BlockError(
            f"the damping rule returned no lambda for {', '.join(map(repr, missing))}; it has to "
            "return one for every layer that it is given"
        )
    return {name: _returned(found[name], name) for name in blocks}


def _asked_for(found: dict[str, Tensor]) -> dict[str, Any]:
    """The lambdas of a rule as numbers, in one read; as tensors while reads of the device wait."""
    if together() is not None or not found:
        return found
    return dict(zip(found, numbers_of(list(found.values())), strict=True))


def _returned(value: object, name: str) -> Any:
    if isinstance(value, Tensor) and value.ndim == 0 and together() is not None:
        holds((value >= 0) & (value < math.inf))
        return value
    if (found := doors.real(value)) is not None and math.isnan(found):
        raise BlockError(
            f"the damping of layer {name!r} is NaN: its block has NaN or inf entries, or the rule "
            "divides by zero; check the data, the model's weights and the loss"
        )
    what = f"the damping of layer {name!r}, as the rule returned it,"
    return doors.number(value, what, least=0.0, error=BlockError)


def _checked(blocks: object) -> dict[str, Block]:
    """The argument of a rule: a dict of blocks."""
    if not isinstance(blocks, Mapping):
        raise BlockError(f"a damping rule takes a dict of layer -> block, got {doors.said(blocks)}")
    for name, block in blocks.items():
        if not isinstance(block, Block):
            raise BlockError(f"blocks[{name!r}] must be a block, got {doors.said(block)}")
    return dict(blocks)


def constant(damping: float) -> Rule:
    """`lambda_l = damping` for every layer."""
    value = doors.number(damping, "damping", least=0.0)
    return lambda blocks: dict.fromkeys(_checked(blocks), value)


@dataclass(frozen=True)
class Share:
    """`lambda_l = max(share * tr F_l / N_l^power, floor)`; a class, so that optimizers print it."""

    share: float
    power: float
    floor: float
    name: str

    def __post_init__(self) -> None:
        """Refuse what is no share and no floor."""
        for key in ("share", "floor", "power"):
            object.__setattr__(self, key, doors.number(getattr(self, key), key, least=0.0))
        doors.name(self.name, "name")

    def __call__(self, blocks: dict[str, Block]) -> dict[str, float]:
        return _asked_for(
            {
                name: (self.share * block.trace() / block.size**self.power).clamp(min=self.floor)
                for name, block in _checked(blocks).items()
            }
        )

    def __repr__(self) -> str:
        return f"{self.name}({self.share:g})"


def relative(share: float, floor: float = 1e-10) -> Rule:
    """`lambda_l = max(share * tr F_l / N_l, floor)`: a share of the mean eigenvalue.

    The floor keeps the inverse of an all-zero block (a dead layer, a fitted batch) finite.
    """
    return Share(share, 1.0, floor, "relative")


def geometric(share: float, floor: float = 1e-10) -> Rule:
    """`lambda_l = max(share * tr F_l / sqrt(N_l), floor)`.

    The mean eigenvalue is `tr F / N` and none exceeds `tr F`; this is a share of their geometric
    mean. Most eigenvalues of a wide layer are zero, so a share of the mean one says little there.
    """
    return Share(share, 0.5, floor, "geometric")


def trace(
    vartheta: float, convolutions: set[str], constant: float = 1e-3, fc_expansion: bool = True
) -> Rule:
    """`lambda_l = max(tr Theta_l, vartheta) / dim Theta_l` for convolutions.  TEKFAC (3.4), (3.5).

    A fully-connected block is `beta (Theta + lambda I)` with `beta` the largest lambda of the
    convolutions and lambda the `constant`; the rule returns lambda, the caller reads `beta` from
    `fully_connected_scale`. Without `fc_expansion`, or without convolutions, beta is 1.

    Raises:
        ValueError: a number is negative or not finite, or `convolutions` are no names.
    """
    doors.number(vartheta, "vartheta", least=0.0)
    doors.number(constant, "constant", least=0.0)
    vartheta, constant = float(vartheta), float(constant)
    doors.flag(fc_expansion, "fc_expansion")
    names = isinstance(convolutions, Set | list | tuple)
    if not names or not all(isinstance(name, str) for name in convolutions):
        raise ValueError(
            f"convolutions must be a set of layers' names, got {doors.said(convolutions)}"
        )

    def rule(blocks: dict[str, Block]) -> dict[str, float]:
        blocks = _checked(blocks)
        own = {
            name: block.trace().clamp(min=vartheta) / block.size
            for name, block in blocks.items()
            if name in convolutions
        }
        return dict.fromkeys(blocks, constant) | _asked_for(own)

    rule.expands = fc_expansion and bool(convolutions)  # type: ignore[attr-defined]
    rule.fully_connected_scale = lambda lambdas: (  # type: ignore[attr-defined]
        max((lambdas[name] for name in convolutions if name in lambdas), default=1.0)
        if fc_expansion
        else 1.0
    )
    return rule


def expansion(damping: float | Rule) -> Callable[[dict[str, float]], float] | None:
    """The function from the lambdas of all layers to beta of fully-connected blocks; None: 1."""
    return getattr(damping, "fully_connected_scale", None)


def unexpanded(damping: float | Rule, method: str) -> Rule:
    """The rule, for a method whose blocks have no factor beta.

    Raises:
        BlockError: the rule has one.
    """
    if expansion(damping) is not None and getattr(damping, "expands", True):
        raise BlockError(
            f"the damping rule multiplies fully-connected blocks by beta, which {method} does not "
            "do; pass trace(..., fc_expansion=False), or take "
            "NaturalGradient(model, fl.Exact(), damping=...)"
        )
    return as_rule(damping)


def gram_norm(alpha: float) -> Rule:
    """`lambda_l = alpha ||U_l^T U_l||_F`, of exact blocks only.      FNGD (14)."""
    alpha = doors.number(alpha, "alpha", least=0.0)

    def rule(blocks: dict[str, Block]) -> dict[str, float]:
        norms = {}
        for name, block in _checked(blocks).items():
            if not isinstance(block, Outer):
                raise BlockError(
                    f"gram_norm needs the exact block of each layer; {name!r} is a "
                    f"{type(block).__name__}"
                )
            norms[name] = alpha * block.gram().norm()
        return _asked_for(norms)

    return rule


@dataclass
class LevenbergMarquardt:
    """`lambda_l = share tr F_l / N_l`, the share adapted to how well the quadratic model predicts.

        rho = (h(w + d) - h(w)) / (<g, d> + 1/2 <d, (F~ + lambda I) d>)

    every `every` steps: `share <- share omega^every` where rho > 3/4, `share / omega^every` where
    rho < 1/4, within `[smallest, largest]`.      Martens & Grosse 2015, 6.5.

    The optimizer then needs `step(closure)` and evaluates it once more after those steps.
    """

    share: float = 1.0
    every: int = 5
    omega: float = 0.95
    smallest: float = 1e-6
    largest: float = 1e6

    def __post_init__(self) -> None:
        """Refuse what is out of its range."""
        self.omega = doors.number(self.omega, "omega", above=0.0, below=1.0)
        self.every = doors.count(self.every, "every")
        for key in ("share", "smallest", "largest"):
            setattr(self, key, doors.number(getattr(self, key), key, above=0.0))
        if self.smallest > self.largest:
            raise ValueError(
                f"smallest, {self.smallest:g}, must not exceed largest, {self.largest:g}"
            )

    def __call__(self, blocks: dict[str, Block]) -> dict[str, float]:
        return relative(self.share)(blocks)

    def adapt(self, ratio: float) -> None:
        """Less damping after a step that was predicted well, more after one that was not.

        Args:
            ratio: rho; NaN, of a loss that is none, counts as a bad prediction.

        Raises:
            ValueError: it is no number.
        """
        value = doors.real(ratio)
        if value is None:
            raise ValueError(f"ratio must be a number, got {doors.said(ratio)}")
        ratio = value
        factor = self.omega**self.every
        if ratio > 0.75:
            self.share = max(self.share * factor, self.smallest)
        elif not ratio >= 0.25:
            self.share = min(self.share / factor, self.largest)


def levenberg_marquardt(share: float = 1.0, every: int = 5, omega: float = 0.95) -> Rule:
    """The damping rule adapted by reduction ratio; see `LevenbergMarquardt`."""
    return LevenbergMarquardt(share, every, omega)
