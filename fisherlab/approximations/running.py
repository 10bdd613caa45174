"""Means of an approximation's statistics over chunks, batches, ranks and time."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fisherlab import doors
from fisherlab.approximations.base import Approximation
from fisherlab.approximations.means import Means, Sums, add, divide
from fisherlab.approximations.recursive import Recursive
from fisherlab.blocks import Block, BlockError
from fisherlab.blocks.factor import LARGEST_FACTOR
from fisherlab.blocks.numerics import all_finite
from fisherlab.blocks.reads import is_revocable
from fisherlab.extract import LayerCapture
from fisherlab.extract.joint import one_sample
from fisherlab.forms import form_of, is_finite


def too_large(
    approximation: Approximation, shape: tuple[int, int], largest: int
) -> dict[str, tuple[str, int]]:
    """The Kronecker factors with more than `largest` rows: the side of the layer, and the rows."""
    statistics = approximation.statistics_by_name
    found: dict[str, tuple[str, int]] = {}
    for side, rows in zip(("output", "input"), shape, strict=True):
        if rows > largest:
            found |= {key: (side, rows) for key, S in statistics.items() if S.side == side}
    return found


# How the past and a batch are blended; TEKFAC (3.6)-(3.8) leave it open.
EMAS = ("corrected", "averaged", "literal")


def _form(state: Mapping[str, Tensor]) -> Tensor:
    """The form of a state as a number, as all of it is tensors."""
    return torch.tensor([int(form_of(state)[:12], 16)], device="cpu")


def _check_numbers(total: Sums, layer: LayerCapture) -> None:
    """Refuse NaN and inf, which would stay for good."""
    if total and not all_finite(*total.values()):
        raise BlockError(
            f"the statistics of {layer.name!r} have NaN or inf entries, so have its input or the "
            "gradient at its output; what was there is as before"
        )


class Running:
    """Means of an approximation's statistics over time.

        mean = S / c,   S <- p S + q s,   c <- p c + q n,   from S = s, c = n

    `ema` says what p and q are: "corrected" `(decay, 1)`, "averaged" `(decay, 1 - decay)`,
    "literal" `(1 - decay, decay)`, which is TEKFAC (3.6)-(3.8) as printed. After ten batches the
    first one weighs 0.079, 0.630 and next to nothing at a decay of 0.95.

    A sum travels with the number of loss terms it covers, and both decay together. The first
    estimate is therefore the first batch's own mean, and a short batch counts less. Sums, basis and
    corrections are refreshed by separate calls, at whatever intervals the caller keeps. `reduce`
    adds those of all ranks, sums and count together in one call. `sums` and the state go by the
    names of the fields. A factor with a side above `largest_factor` keeps only its diagonal: its
    matrix would not fit, its eigenvectors would take minutes.

    A `Recursive` approximation has factors in place of sums. Each batch moves them by a step in
    which the past has the share `p c / (p c + q n)`.

    Raises `BlockError` for an approximation whose blocks are of the current batch only.
    """

    def __init__(
        self,
        approximation: Approximation,
        decay: float = 0.95,
        reduce: Callable[[Sums], Sums] | None = None,
        largest_factor: int = LARGEST_FACTOR,
        ema: str = "corrected",
    ) -> None:
        if not isinstance(approximation, Approximation):
            raise BlockError(
                f"approximation must be one such as fl.KFAC(), got {doors.said(approximation)}"
            )
        doors.choice(ema, "ema", EMAS, error=BlockError)
        what = "decay, the weight of the past,"
        decay = doors.number(decay, what, least=0.0, most=1.0, error=BlockError)
        largest_factor = doors.count(largest_factor, "largest_factor", 0, error=BlockError)
        if reduce is not None:
            doors.function(reduce, "reduce(sums)", error=BlockError)
        if not (approximation.additive or approximation.recursive):
            raise BlockError(
                f"{type(approximation).__name__} has no memory: its blocks are of the current "
                "batch; call it on the captures instead"
            )
        self.approximation, self.decay, self.reduce = approximation, decay, reduce
        self.largest_factor = largest_factor
        self.weights = {
            "corrected": (decay, 1.0),
            "averaged": (decay, 1 - decay),
            "literal": (1 - decay, decay),
        }[ema]
        self.statistics = approximation.statistics_by_name
        self.shape = (0, 0)
        self.sums: Sums = {}
        self.count = 0.0
        self.basis: Sums = {}
        self.corrections: Sums = {}
        self.corrections_count = 0.0

    @property
    def means(self) -> Means:
        """The current means."""
        names = {statistic: key for key, statistic in self.statistics.items()}
        means = Means(lambda S: self.sums[names[S]], self.count, self.shape)
        return means.read_by(self.approximation)

    def update(self, *layers: LayerCapture) -> None:
        """Add one batch, given whole or in chunks; the past decays once.

        Raises `BlockError` where its sums have NaN or inf entries, which would stay for good.
        """
        if isinstance(self.approximation, Recursive):
            return self._advance(self.approximation, layers)
        total = add(self._sums(layer) for layer in one_sample(layers))
        count = sum(layer.examples for layer in layers)
        _check_numbers(total, layers[0])
        self.shape = layers[0].shape
        self.count = self._blend(self.sums, self.count, total, count)

    def _advance(self, approximation: Recursive, layers: tuple[LayerCapture, ...]) -> None:
        shape, (past, new) = layers[0].shape, self.weights
        if max(shape) > self.largest_factor:
            raise BlockError(
                f"{type(approximation).__name__} keeps whole factors, and layer "
                f"{layers[0].name!r} has {shape[0]} outputs and {shape[1]} inputs, above "
                f"largest_factor={self.largest_factor}: leave it out, or raise largest_factor"
            )

        def weigh(examples: float) -> float:
            return past * self.count / (past * self.count + new * examples)

        found, examples = approximation.advance(layers, self.sums, weigh, self.reduce)
        _check_numbers(found, layers[0])
        self.count = past * self.count + new * examples if self.sums else examples
        self.sums, self.shape = found, shape

    def _sums(self, layer: LayerCapture) -> Sums:
        large = too_large(self.approximation, layer.shape, self.largest_factor)
        if len(self.statistics) > 1 and isinstance(layer, LayerCapture):
            # one layout of the columns for all of them
            layer = layer.at_hand()
        diagonals = {S: key in large for key, S in self.statistics.items()}
        found = {S: S.over(layer, diagonal) for S, diagonal in diagonals.items()}
        return {key: found[S] for key, S in self.statistics.items()}

    def new_basis(self, means: Means | None = None) -> Sums:
        """The basis of the current means, which a caller may hold: the expensive part."""
        return self.approximation.basis(self._held(means), self.basis or None)

    def _held(self, means: Means | None) -> Means:
        """The means that a caller holds, or the current ones."""
        if means is not None and not isinstance(means, Means):
            raise BlockError(f"means must be those of `means`, or None; got {doors.said(means)}")
        if not self.sums:
            raise BlockError("no batch has been seen yet: call update() first")
        return self.means if means is None else means

    def refresh_basis(self, new: Sums | None = None) -> None:
        """Take the basis of the means, or one made elsewhere; corrections are carried into it."""
        new = self.new_basis() if new is None else new
        if not isinstance(new, Mapping):
            raise BlockError(f"new must be a basis, a dict of tensors, got {doors.said(new)}")
        if self.basis and new.keys() != self.basis.keys():
            raise BlockError(
                f"new must be a basis of {', '.join(self.basis)}, got {', '.join(map(str, new))}"
            )
        for key, value in new.items():
            doors.tensor(value, f"new[{key!r}]", error=BlockError)
        if self.basis and self.corrections:
            self.corrections = self.approximation.carry(self.corrections, self.basis, new)
        self.basis = new

    def correct(self, *layers: LayerCapture) -> None:
        """Add one batch to the corrections, in the current basis."""
        whole = one_sample(layers)
        total = add(self.approximation.corrections(layer, self.basis) for layer in whole)
        if not total:
            return
        _check_numbers(total, layers[0])
        count = sum(layer.examples for layer in layers)
        self.corrections_count = self._blend(self.corrections, self.corrections_count, total, count)

    def block(self, means: Means | None = None) -> Block:
        """The block of the current means, which a caller may hold, basis and corrections."""
        means = self._held(means)
        if isinstance(self.approximation, Recursive):
            return self.approximation.factors(self.sums)
        if not self.basis and type(self.approximation).basis is not Approximation.basis:
            raise BlockError(
                f"{type(self.approximation).__name__} has no basis yet: call refresh_basis() first"
            )
        corrections = divide(self.corrections, self.corrections_count) if self.corrections else {}
        means = means.given(self.basis, corrections)
        return self.approximation.block(means, self.shape)

    def _blend(self, into: Sums, count: float, total: Sums, terms: float) -> float:
        if self.reduce is not None:
            counted = torch.tensor(terms, dtype=torch.float64, device="cpu")
            *reduced, counted = self.reduce({**total, "count": counted}).values()
            total, terms = dict(zip(total, reduced, strict=True)), float(counted)
        if not count:
            into |= {key: value.clone() for key, value in total.items()}
            return terms
        past, new = self.weights
        for key, value in total.items():
            # sums that may have to be taken back are not overwritten
            old = into[key].mul_(past) if not is_revocable() else into[key] * past
            into[key] = old.add_(value, alpha=new)
        return past * count + new * terms

    def kept(self) -> Callable[[], None]:
        """A call that takes back everything computed from now on, where it is revocable."""
        sums, basis, corrections = dict(self.sums), dict(self.basis), dict(self.corrections)
        counts = self.count, self.corrections_count

        def back() -> None:
            self.sums, self.basis, self.corrections = dict(sums), dict(basis), dict(corrections)
            self.count, self.corrections_count = counts

        return back

    def state_dict(self) -> dict[str, Tensor]:
        """Everything remembered, as flat named tensors."""
        state = {f"sums.{k}": v for k, v in self.sums.items()}
        state |= {f"basis.{k}": v for k, v in self.basis.items()}
        state |= {f"corrections.{k}": v for k, v in self.corrections.items()}
        counts = torch.tensor(
            [self.count, self.corrections_count], dtype=torch.float64, device="cpu"
        )
        state |= {"counts": counts, "shape": torch.tensor(self.shape, device="cpu")}
        return {**state, "form": _form(state)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` returned, dtypes included.

        Raises:
            ValueError: it is no such state, or has no shape, as before statistics were values.
        """
        if not isinstance(state, Mapping):
            raise ValueError(f"state must be a dict of tensors, got {doors.said(state)}")
        if "shape" not in state:
            raise ValueError(
                "this state of running means lacks the layer's shape, so an earlier version of "
                "FisherLab wrote it; start the run anew, or resume it with that version"
            )
        groups: dict[str, Sums] = {"sums": {}, "basis": {}, "corrections": {}}
        for key, value in state.items():
            group, _, field = str(key).partition(".")
            if field and group not in groups:
                raise ValueError(f"state has {key!r}, which is none of {', '.join(groups)}")
            if field:
                groups[group][field] = doors.tensor(value, f"state[{key!r}]").clone()
        count, corrections = self._pair(state, "counts", 0.0)
        o, i = self._pair(state, "shape", 0.0)
        if set(groups["sums"]) - self._kept_names():
            lost = ", ".join(sorted(set(groups["sums"]) - self._kept_names()))
            raise ValueError(f"state is of another method: {lost} are no statistics of this one")
        if not is_finite(groups):
            raise ValueError("state holds NaN or inf; load one from before")
        if "form" in state:  # an earlier version saved none
            parts = {key: value for key, value in state.items() if key != "form"}
            if doors.numbers(state["form"], "state['form']") != [float(_form(parts))]:
                raise ValueError(
                    "state is damaged: it has not the names and shapes that were saved; load it "
                    "from another file"
                )
        self.sums, self.basis, self.corrections = groups.values()
        self.count, self.corrections_count, self.shape = count, corrections, (int(o), int(i))

    def _kept_names(self) -> set[str]:
        """The names that `sums` may have."""
        recursive = isinstance(self.approximation, Recursive)
        return {"G", "A"} if recursive else set(self.statistics)

    @staticmethod
    def _pair(state: Mapping[str, Tensor], key: str, least: float) -> list[float]:
        found = doors.numbers(state.get(key), f"state[{key!r}]", least=least)
        if len(found) != 2:
            raise ValueError(f"state[{key!r}] must be two numbers, got {len(found)}")
        return found
