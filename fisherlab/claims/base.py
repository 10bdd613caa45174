"""`Claim`: a sentence as two independent sides, its kind, a margin and the verdict on record."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from scipy.stats import binomtest, linregress
from torch import Tensor

from fisherlab import doors
from fisherlab.names import Registry, nearest

# Tensors, numbers and strings: what `torch.load(weights_only=True)` gives back.
Case = dict[str, Any]

PAPERS = {
    "ANG": "ANG: Tang et al. 2021",
    "DyKAF": "DyKAF: Yudin et al. 2025",
    "FNGD": "FNGD: Ou et al.",
    "KFAC": "KFAC: Martens and Grosse 2015",
    "KL-Shampoo": "KL-Shampoo: Lin et al. 2025",
    "NGM": "NGM: Shrestha",
    "Nystrom": "Nystrom: Frangella et al. 2023",
    "SNGD": "SNGD: Liu et al.",
    "SOAP": "SOAP: Vyas et al. 2024",
    "TEKFAC": "TEKFAC: Gao et al. 2021",
}
HOLDS, REFUTED, UNDECIDED = "holds", "refuted", "undecided"
CLAIM, EXTENSION, CONTRAST = "claim", "extension", "contrast"
KINDS = {
    CLAIM: "the paper says so; at most an assumption narrows it",
    EXTENSION: "ours: a correction, or a sentence taken further than the paper takes it",
    CONTRAST: "the paper itself says otherwise: refuted agrees with it",
}


class ClaimError(ValueError):
    """A claim that is unknown, or arguments that make no trial."""


_REGISTRY: Registry[type[Claim]] = Registry("claim", ClaimError)


class Claim(ABC):
    """A statement, its paper, and how to try it; its docstring is the statement.

    `kind` says whose statement it is: a key of `KINDS`. Only a refuted "claim" is an error of the
    paper.

    `draw` makes a random case. `left` (FisherLab's own code) and `right` (the definition, by
    separate code) compute the two sides. `compare` turns them into a margin, positive where the
    statement is true of the case. A margin below `-noise` violates the statement, one within
    `noise` is lost in rounding.

    `class X(Claim, name="x")` registers. A statement that is true under an `assumption` only checks
    it in `assume`, and names in `outside` the claim that tries it without.
    """

    name: ClassVar[str] = ""
    latex: ClassVar[str] = ""
    source: ClassVar[str] = ""
    kind: ClassVar[str] = CLAIM
    expected: ClassVar[str] = HOLDS
    trials: ClassVar[int] = 12
    noise: ClassVar[float] = 1e-9
    # a margin that much below zero is a counterexample worth looking at
    clear: ClassVar[float] = 1e-3
    assumption: ClassVar[str] = ""
    outside: ClassVar[str] = ""
    # names of the two sides, for the picture
    sides: ClassVar[tuple[str, str]] = ("FisherLab", "definition")
    # tensors of a case that the search may move
    free: ClassVar[tuple[str, ...]] = ()
    # margins looked at in a hunt for a counterexample
    effort: ClassVar[int] = 20

    def __init_subclass__(cls, name: str | None = None) -> None:
        super().__init_subclass__()
        if name is None:
            return
        if cls.kind not in KINDS:
            raise ClaimError(f"claim {name!r} has kind {cls.kind!r}; kinds: {', '.join(KINDS)}")
        _REGISTRY.add_class(name, cls)
        cls.name = name

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.statement} {self.source}, on record: {self.expected})"

    @property
    def statement(self) -> str:
        """The claim in words."""
        return " ".join((inspect.getdoc(self) or "").split())

    @property
    def paper(self) -> str:
        """The key of the paper in `PAPERS`."""
        return self.source.split()[0].rstrip(",")

    @abstractmethod
    def draw(self, generator: torch.Generator, size: float) -> Case:
        """A random case; `size` from 0, the smallest the claim speaks of, to 1."""

    def adapt(self, real: Case, generator: torch.Generator) -> Case | None:
        """A case made of one layer of a real network, or None where the claim speaks of none."""
        return None

    def assume(self, case: Case) -> bool:
        """Whether the claim's assumptions are true of the case."""
        return True

    @abstractmethod
    def left(self, case: Case) -> Any:
        """One side, by FisherLab's own code where it has some."""

    @abstractmethod
    def right(self, case: Case) -> Any:
        """The other side, by code of its own."""

    @abstractmethod
    def compare(self, left: Any, right: Any) -> float:
        """The margin of two sides."""

    def values(self, case: Case) -> tuple[Any, Any]:
        """Both sides."""
        return self.left(case), self.right(case)

    def margin(self, case: Case) -> float:
        """How far the case is from violating the claim; negative where it does."""
        return float(self.compare(*self.values(case)))

    def verdict(self, margins: Sequence[float]) -> tuple[str, float, str]:
        """The verdict of all trials, the margin to report, and a note."""
        worst = min(margins)
        ties = sum(abs(m) <= self.noise for m in margins)
        note = f"{ties} of {len(margins)} trials within rounding" if ties else ""
        if any(math.isnan(m) for m in margins):
            return UNDECIDED, math.nan, "a margin is not a number"
        if worst < -self.noise:
            violated = sum(m < -self.noise for m in margins)
            return REFUTED, worst, f"violated in {violated} of {len(margins)} trials"
        return (UNDECIDED if 2 * ties > len(margins) else HOLDS), worst, note

    def smaller(self, case: Case) -> Iterator[Case]:
        """Cases with less in them, for the search of the smallest counterexample."""
        return iter(())


class Identity(Claim):
    """Two sides that are one tensor; the margin is in decades of relative difference to spare."""

    tolerance: ClassVar[float] = 1e-8
    noise = 1.0
    clear = 3.0

    def compare(self, left: Tensor, right: Tensor) -> float:
        if not (torch.isfinite(left).all() and torch.isfinite(right).all()):
            return -math.inf if torch.isfinite(right).all() else math.nan
        scale = max(left.norm().item(), right.norm().item(), 1e-30)
        difference = max((left - right).norm().item() / scale, 1e-17)
        return math.log10(self.tolerance / difference)


class AtMost(Claim):
    """`left <= right`, numbers; the margin is the difference relative to the larger, or `scale`.

    `scale` is 1 where the sides are relative errors: two errors of rounding's size are a tie.
    """

    scale: ClassVar[float] = 1e-30

    def compare(self, left: Tensor | float, right: Tensor | float) -> float:
        left, right = float(left), float(right)
        if left == math.inf:
            return -math.inf
        return (right - left) / max(abs(left), abs(right), self.scale)


class Order(Claim):
    """`|left - right|` at step sizes halved five times falls with the power `order`, within 0.1.

    Both sides are `[6]` or `[6, ...]`, the largest step first.
    """

    noise = 1e-6
    trials = 6
    order: ClassVar[float] = 1.0
    within: ClassVar[float] = 0.1

    def errors(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """The step sizes relative to the largest, and `|left - right|` at each."""
        errors = (left - right).reshape(len(left), -1).norm(dim=1)
        return 0.5 ** torch.arange(len(errors), dtype=torch.float64), errors

    def power(self, left: Tensor, right: Tensor) -> float:
        """The fitted power of the step size with which they fall; NaN where one is no number."""
        sizes, errors = self.errors(left, right)
        if not bool((errors > 0).all()) or not bool(torch.isfinite(errors).all()):
            return math.nan
        return float(linregress(sizes.double().log(), errors.double().log()).slope)

    def compare(self, left: Tensor, right: Tensor) -> float:
        return self.within - abs(self.power(left, right) - self.order)


class Usually(AtMost):
    """`left <= right` in most cases; the margin is Wilson's lower limit less 1/2."""

    trials = 60
    noise = 0.0

    def verdict(self, margins: Sequence[float]) -> tuple[str, float, str]:
        wins = sum(m >= 0 for m in margins)
        low, high = binomtest(wins, len(margins)).proportion_ci(0.95, "wilson")
        gain = sorted(margins)[len(margins) // 2]
        note = (
            f"true of {wins} of {len(margins)} cases, 95 % interval {low:.2f} to {high:.2f}; "
            f"median gain {gain:.2g}"
        )
        if low > 0.5:
            return HOLDS, low - 0.5, note
        return (REFUTED, high - 0.5, note) if high < 0.5 else (UNDECIDED, low - 0.5, note)


def names(paper: str | None = None) -> list[str]:
    """Every registered claim, grouped by paper, in the order of the files.

    Args:
        paper: the claims of this paper alone, such as "tekfac".

    Returns:
        Names for `verify` and `get`.

    Raises:
        ClaimError: no claim is of that paper.
    """
    found = list(_REGISTRY)
    if paper is not None:
        of = {name: get(name).paper.lower() for name in found}
        wanted = doors.name(paper, "paper", error=ClaimError).lower()
        doors.choice(wanted, "paper", sorted(set(of.values())), error=ClaimError)
        found = [name for name in found if of[name] == wanted]
    return sorted(found, key=lambda name: (get(name).paper, found.index(name)))


def get(name: str) -> Claim:
    """The claim of a name.

    Args:
        name: a name of `names()`.

    Returns:
        The claim, ready to draw and compare cases.

    Raises:
        ClaimError: the name is unknown; the message names the nearest.
    """
    if doors.name(name, "name", error=ClaimError) not in _REGISTRY:
        papers = sorted({get(claim).paper.lower() for claim in _REGISTRY})
        containing = [claim for claim in _REGISTRY if name.lower() in claim]
        near = nearest(name.lower(), [*papers, *_REGISTRY], containing)
        hint = f"nearest: {near}" if near else f"papers: {', '.join(papers)}"
        hint += "; `fisherlab verify --list` names all claims"
        raise ClaimError(f"no claim or paper named {name!r}; {hint}")
    return _REGISTRY[name]()
