"""FNGD: coefficients of the first epoch, shared afterwards at the cost of SGD."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fisherlab import doors
from fisherlab.blocks.reads import with_next_read
from fisherlab.optim.scale import OptimizerError
from fisherlab.optim.step import Directions
from fisherlab.optim.weight import Weight
from fisherlab.optim.weighted import Calls, columns_of, of_each_example
from fisherlab.optim.woodbury import Taken, Woodbury
from fisherlab.telling import warn

if TYPE_CHECKING:
    import pandas as pd

# Spread of the shared coefficients below which a run is SGD with a per-layer factor.
FLAT = 0.05


class FNGD(Woodbury):
    """Phase 1: `W <- W - lr U v`;  phase 2: `W <- W - lr U v~`, `v~` the mean of phase 1's `v`.

    FNGD Alg. 1, (9), (14). For `coefficient_steps` steps (one epoch) each layer solves for its own
    coefficients, `lambda = alpha ||U^T U||_F`. Afterwards no per-example gradient and no inverse is
    formed: row n of the output gradient is scaled by `M v~_n`, and the ordinary gradient of weight
    and bias is taken. After `backward()`, `p.grad` is that weighted gradient: clip and log it as
    such.

    `share`: "position" (the paper: slot n of every batch has one coefficient; with a shuffled
    loader they average to a constant, and the run says once that it now is SGD), "example" (one per
    data-set index, given by `set_batch(indices)` before each forward), "none" (NGD-SMW).
    `control=True` is the run to compare with: SGD with FNGD's per-layer factor `c_l = sum_n v~_n`.
    `accelerated=False` takes the same step as FNGD VI-D does without its acceleration.

    Args:
        model: the model.
        criterion: the very object that the loop calls; see `Preconditioner`.
        params: parameters, or groups of them with options of their own; None: all of the model.
        lr: learning rate.
        alpha: lambda relative to `||U^T U||_F`.
        fold: whether the coefficients are multiplied by lambda.
        coefficient_steps: steps of phase 1.
        share: "position", "example" or "none".
        control: whether to run SGD with FNGD's per-layer factors instead.
        accelerated: whether phase 2 weighs the examples inside the backward pass; else it forms
            the gradient of every example, `[n, o, i]`, and weighs those.
        options: further options of the step and its groups.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        criterion: Callable[..., Any] | None = None,
        params: Iterable[Any] | None = None,
        lr: float,
        alpha: float = 0.005,
        fold: bool = True,
        coefficient_steps: int = 100,
        share: str = "position",
        control: bool = False,
        accelerated: bool = True,
        **options: Any,
    ) -> None:
        doors.choice(share, "share", ("position", "example", "none"))
        steps = doors.count(coefficient_steps, "coefficient_steps")
        doors.flag(control, "control")
        super().__init__(
            model, criterion=criterion, params=params, lr=lr, alpha=alpha, fold=fold, **options
        )
        self.share, self.control, self.coefficient_steps = share, control, steps
        self.accelerated = doors.flag(accelerated, "accelerated")
        self.batch_size: int | None = None
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}
        # means of the second phase, whose sums no longer change, where they are needed
        self._settled: dict[str, Tensor] = {}
        self._indices: Tensor | None = None
        # `M v` of the step's passes, one after another
        self._coefficients = torch.zeros(0, device="cpu")
        self._told = False

    def set_batch(self, indices: Tensor) -> None:
        """The data-set indices of the next batch, for `share="example"`; under DDP on each rank."""
        indices = torch.as_tensor(indices, dtype=torch.long, device="cpu")
        self._indices = indices if self.ranks is None else self.ranks.gather(indices)

    @property
    def collecting(self) -> bool:
        """Whether the first phase is still going on."""
        return self.share == "none" or self.steps < self.coefficient_steps

    def due(self) -> tuple[str, ...]:
        """`coefficients` in the first phase."""
        return (*super().due(), *(("coefficients",) if self.collecting else ()))

    # the control begins with the second phase
    controls_solve = False

    def _rows(self, weight: Weight, calls: Calls, factor: float) -> tuple[Tensor, Tensor | None]:
        if self.collecting:
            found = super()._rows(weight, calls, factor)
            self._taken[weight.name][-1].indices = self._indices
            return found
        device = calls[0][1].device
        mine, total, factor = self._places(weight, calls, factor)
        every = self._shared(weight, total).to(device)
        self._take(weight, Taken(weight, calls, every[:, mine], factor, every))
        if self.accelerated:
            return every[:, mine], None
        columns = columns_of(weight, calls, factor)
        return every[:, mine], of_each_example(columns, every[:, mine]) / factor

    def _shared(self, weight: Weight, n: int) -> Tensor:
        """`M v~` of this layer for a batch of n, `[groups, n]`."""
        if weight.name not in self._sums:
            return torch.ones(weight.groups, n, dtype=torch.float64, device="cpu")
        if weight.name not in self._settled:
            self._settled[weight.name] = self._mean(weight.name).to(weight.weight)
        mean = self._settled[weight.name]
        if self.control:
            return mean.mean(1, keepdim=True).expand(-1, n)
        if self.share == "example":
            if self._indices is None or len(self._indices) != n:
                raise OptimizerError(
                    f"share='example' needs opt.set_batch(indices) with the {n} data-set indices "
                    "of this batch, before its forward pass"
                )
            return mean[:, self._indices.to(mean.device)]
        if n > mean.shape[1]:
            raise OptimizerError(
                f"a batch of {n} examples, but the first phase left coefficients for "
                f"{mean.shape[1]}; use the batch size of the first {self.coefficient_steps} steps"
            )
        # M v~ is already relative to the batch size: a short batch takes the matching slice
        return mean[:, :n]

    def _mean(self, name: str) -> Tensor:
        counts = self._counts[name]
        mean = self._sums[name] / counts.clamp(min=1)
        if bool((counts == 0).any()):
            # an example never seen in the first phase weighs what the average one does
            mean[:, counts == 0] = mean[:, counts > 0].mean(1, keepdim=True)
        return mean

    def _directions(self) -> dict[nn.Parameter, Tensor]:
        directions = super()._directions()
        if self.collecting and self.share != "none":
            every = [one.every for many in self._taken.values() for one in many]
            with_next_read(every, self._note)
        return directions

    def _note(self, numbers: list[float]) -> None:
        self._coefficients = torch.tensor(numbers, dtype=torch.float64, device="cpu")

    def _apply(self, directions: Directions) -> None:
        if self.collecting and self.share != "none":
            self._collect()
        if self.share != "none" and self.steps + 1 == self.coefficient_steps:
            self._tell()
        super()._apply(directions)

    def _collect(self) -> None:
        self._settled.clear()
        passes = [(name, one) for name, many in self._taken.items() for one in many]
        parts = self._coefficients.split([taken.every.numel() for _, taken in passes])
        for (name, taken), part in zip(passes, parts, strict=True):
            rows = part.view_as(taken.every)
            n = rows.shape[1]
            if self.batch_size is None:
                self.batch_size = n
            if self.share == "example":
                self._collect_examples(name, rows, taken.indices)
            elif n == self.batch_size:
                if name not in self._sums:
                    self._sums[name] = torch.zeros_like(rows)
                    self._counts[name] = torch.zeros(n, dtype=torch.float64, device="cpu")
                self._sums[name] += rows
                self._counts[name] += 1

    def _collect_examples(self, name: str, rows: Tensor, indices: Tensor | None) -> None:
        if indices is None or len(indices) != rows.shape[1]:
            raise OptimizerError(
                "share='example' needs opt.set_batch(indices) before each forward pass"
            )
        size = int(indices.max()) + 1
        known = self._counts.get(name, torch.zeros(0, dtype=torch.float64, device="cpu"))
        if len(known) < size:
            grown = torch.zeros(len(rows), size, dtype=torch.float64, device="cpu")
            grown[:, : len(known)] = self._sums.get(name, grown[:, :0])
            self._sums[name] = grown
            self._counts[name] = torch.cat([known, known.new_zeros(size - len(known))])
        self._sums[name].index_add_(1, indices, rows)
        ones = torch.ones(len(indices), dtype=torch.float64, device="cpu")
        self._counts[name].index_add_(0, indices, ones)

    def _tell(self) -> None:
        spread = self.summary()["spread"].dropna()
        if len(spread) and not self._told and spread.max() < FLAT:
            self._told = True
            warn(
                f"FNGD's shared coefficients are flat (spread at most {spread.max():.1%} over "
                "slots): from here on this is SGD with a per-layer factor; see opt.summary(), "
                "share='example' or share='none'"
            )

    def coefficients(self) -> dict[str, Tensor]:
        """`M v~` per layer, `[groups, slots]` (or data-set indices); 1 is SGD's weight."""
        return {name: self._mean(name) for name in self._sums}

    def summary(self) -> pd.DataFrame:
        """Per layer: the factor `c_l = sum v~` on SGD's step, the spread of `M v~`, the damping.

        The spread is over slots (or data-set indices); the damping is that of the last solve.
        """
        import pandas as pd

        rows = []
        for name, mean in self.coefficients().items():
            factor = mean.mean().item()
            spread = mean.std(1).max().item() / factor if mean.shape[1] > 1 and factor else 0.0
            batches = int(self._counts[name].max())
            rows.append({"layer": name, "factor": factor, "spread": spread, "batches": batches})
        coefficients = pd.DataFrame(rows, columns=["layer", "factor", "spread", "batches"])
        solved = super().summary()
        return coefficients.merge(solved, on="layer", how="outer") if len(solved) else coefficients

    def _extra_state(self) -> dict[str, Any]:
        sums = {name: value.clone() for name, value in self._sums.items()}
        counts = {name: value.clone() for name, value in self._counts.items()}
        return {"sums": sums, "counts": counts, "batch_size": self.batch_size, "told": self._told}

    def _reading(self, extra: dict[str, Any]) -> Callable[[], None]:
        sums = {name: value.clone() for name, value in extra["sums"].items()}
        counts = {name: value.clone() for name, value in extra["counts"].items()}

        def take() -> None:
            self._settled.clear()
            self._sums, self._counts = sums, counts
            self.batch_size, self._told = extra["batch_size"], extra["told"]

        return take
