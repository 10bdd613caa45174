"""When the curvature of an optimizer is refreshed, and how long the past counts."""

from __future__ import annotations

from dataclasses import dataclass

from fisherlab import doors
from fisherlab.approximations.running import EMAS


@dataclass(frozen=True)
class Schedule:
    """`S <- decay S + s` every `statistics` steps, an inverse of `S` every `basis` steps.

    All are refreshed at step 0 and at each of the first `warmup` steps. The inverse of one batch is
    wrong outside that batch's span, and the next gradients lie there.

    Args:
        statistics: steps from one update of the statistics to the next (T_FIM).
        basis: steps from one basis and damped inverse to the next (T_EIG, T_INV).
        corrections: steps between updates of corrected eigenvalues (T_RE); None: `statistics`.
        warmup: steps at the start that refresh everything.
        decay: weight of the past at each update of the statistics.
        examples: the first rows of a batch that the statistics take; None: all.
        until: the step from which the gradient is left as it is; None: never.
        ema: how past and batch are blended: "corrected", "averaged" or "literal"; see `Running`.

    Raises:
        ValueError: a count of steps or examples is no whole number, or too small; no such `ema`.
    """

    statistics: int = 10
    basis: int = 100
    corrections: int | None = None
    warmup: int = 0
    decay: float = 0.95
    examples: int | None = None
    until: int | None = None
    ema: str = "corrected"

    def __post_init__(self) -> None:
        """Refuse counts that are none."""
        for key, value in {**self.intervals, "until": self.until, "warmup": self.warmup}.items():
            if value is not None or key not in ("until", "corrections_every"):
                doors.count(value, f"{key}, which counts steps,", 0 if key == "warmup" else 1)
        doors.choice(self.ema, "ema", EMAS)
        if self.examples is not None:
            doors.count(self.examples, "examples (statistics_examples)")
        doors.number(self.decay, "decay", least=0.0, most=1.0)

    @property
    def intervals(self) -> dict[str, int]:
        """The intervals as options of a parameter group, which may have its own."""
        corrections = self.statistics if self.corrections is None else self.corrections
        return {
            "statistics_every": self.statistics,
            "basis_every": self.basis,
            "corrections_every": corrections,
        }


USUAL = Schedule()
