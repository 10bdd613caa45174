"""One picture per claim: both sides of every trial, or of the worst one."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from fisherlab.plots import theme

__all__ = [
    "claim",
    "formula",
    "verdicts",
    "worth_drawing",
]

TRUE, FALSE, LINE = theme.BLUE, theme.ORANGE, theme.GUIDE["color"]
POINTS = 300
COLOURS = {"holds": TRUE, "refuted": FALSE, "undecided": "#999999"}
HEADINGS = {
    "claim": "claims of the paper",
    "extension": "extensions of ours",
    "contrast": "denied by the paper",
}
# Commands that matplotlib's formulas lack.
_FORMULAS = (
    (r"\\tfrac|\\dfrac", r"\\frac"),
    (r"\\textstyle", ""),
    (r"\\iff", r"\\Leftrightarrow"),
    (r"\\le(?![a-z])", r"\\leq"),
    (r"\\ge(?![a-z])", r"\\geq"),
    (r"\\top", "T"),
    (r"\\sqrt (\w)", r"\\sqrt{\1}"),
    (r"\\text\{([^}]*)\}", lambda m: r"\mathrm{" + m[1].replace(" ", r"\ ") + "}"),
)


def formula(latex: str) -> str:
    """A claim's LaTeX as matplotlib draws it."""
    for pattern, instead in _FORMULAS:
        latex = re.sub(pattern, instead, latex)
    return f"${latex}$"


def worth_drawing(table: Any) -> list[str]:
    """All but the tensors that are equal: points on a diagonal explain nothing."""

    def worth(name: str, verdict: str) -> bool:
        trials = table.trials[name]
        order = hasattr(trials.claim, "order")
        return verdict == "refuted" or bool(trials.pairs) or order or _is_run(trials)

    frame = table.frame
    return [n for n, verdict in zip(frame.claim, frame.verdict, strict=True) if worth(n, verdict)]


@theme.themed
def claim(table: Any, name: str) -> theme.Picture:
    """Both sides of a claim: where a point or a curve lies on the wrong side, it is refuted.

    Numbers: one point per trial. Orders: the error at each step size. Runs and tensors: the worst
    trial, curve by curve and entry by entry. `table` is what `fl.claims.verify` returns.
    """
    trials = table.trials[name]
    row = table.frame.set_index("claim").loc[name]
    figure, (ax,) = theme.panels(1, width=theme.COLUMN * 1.25, height=2.5)
    if hasattr(trials.claim, "order"):
        _order(ax, trials)
    elif trials.pairs:
        _numbers(ax, trials)
    elif _is_run(trials):
        _run(ax, trials)
    else:
        _entries(ax, trials)
    kind = "" if row.kind == "claim" else f" ({row.kind})"
    theme.title(figure, f"{name.replace('_', ' ')}{kind}: {row.verdict}")
    ax.set_title(formula(trials.claim.latex), loc="left", fontsize=7, pad=9)
    return figure


def _is_run(trials: Any) -> bool:
    """Whether the sides are a quantity after each step, and its bound."""
    return not trials.pairs and hasattr(trials.claim, "rate")


def _order(ax: Axes, trials: Any) -> None:
    """The error, or the count, against the step size, beside the power on record."""
    claim = trials.claim
    sizes, errors = claim.errors(trials.left, trials.right)
    ax.loglog(sizes, errors, "o-", color=TRUE, label="measured")
    ideal = errors[0] * sizes**claim.order
    ax.loglog(sizes, ideal, "--", color=LINE, label=f"power {claim.order:g}, as stated")
    kind = "difference of both sides" if trials.right.any() else claim.sides[0]
    power = claim.power(trials.left, trials.right)
    ax.set(xlabel="size, relative to the largest", ylabel=f"{kind} (power {power:.2f})")
    ax.legend(frameon=False)


def _numbers(ax: Axes, trials: Any) -> None:
    """A point per trial; above the diagonal the left side is the larger."""
    left, right = np.array(trials.pairs).T
    wrong = np.array(trials.margins[: len(left)]) < -trials.claim.noise
    both = np.concatenate([left, right])
    span = np.abs(both[both != 0])
    # relative errors share an axis that ends at zero
    errors = getattr(trials.claim, "scale", 0.0) == 1.0
    logs = not errors and bool((both > 0).all()) and span.max() > 50 * span.min()
    ax.scatter(right[~wrong], left[~wrong], s=14, color=TRUE, label="as claimed")
    if wrong.any():
        ax.scatter(right[wrong], left[wrong], s=18, marker="X", color=FALSE, label="violated")
    if logs:
        ax.set(xscale="log", yscale="log")
    low, high = both.min(), both.max()
    ax.plot([low, high], [low, high], "--", color=LINE, lw=0.8, label="equal")
    ax.set(xlabel=trials.claim.sides[1], ylabel=trials.claim.sides[0])
    ax.legend(frameon=False)


def _run(ax: Axes, trials: Any) -> None:
    """The worst run, and the bound it should stay below."""
    claim = trials.claim
    left, right = theme.array_of(trials.left), theme.array_of(trials.right)
    wrong = min(trials.margins) < -claim.noise
    finite = np.isfinite(left) & (left > 0)
    steps = np.arange(len(left))
    ax.semilogy(
        steps[finite], left[finite], "o-", ms=3, color=FALSE if wrong else TRUE, label="worst run"
    )
    ax.semilogy(steps, right, "--", color=LINE, label="bound")
    ax.set(xlabel="step", ylabel="squared residual / its start")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(frameon=False)


def _entries(ax: Axes, trials: Any) -> None:
    """Every entry of the worst trial: on the diagonal where both sides are one tensor."""
    left, right = (_flat(side) for side in (trials.left, trials.right))
    if len(left) > POINTS:
        picked = torch.linspace(0, len(left) - 1, POINTS).long()
        left, right = left[picked], right[picked]
    wrong = min(trials.margins) < -trials.claim.noise
    ax.scatter(
        right, left, s=10, color=FALSE if wrong else TRUE, label="entries of the worst trial"
    )
    both = torch.cat([left, right])
    low, high = both.min().item(), both.max().item()
    ax.plot([low, high], [low, high], "--", color=LINE, lw=0.8, label="equal")
    ax.set(xlabel=trials.claim.sides[1], ylabel=trials.claim.sides[0])
    ax.legend(frameon=False)


def _flat(side: Tensor) -> Tensor:
    values = torch.nan_to_num(side.detach().flatten().double(), nan=0.0, posinf=0.0, neginf=0.0)
    return values.clamp(-1e9, 1e9)


@theme.themed
def verdicts(table: Any) -> theme.Picture:
    """How many statements of each paper hold and how many are refuted, a panel per kind."""
    frame = table.frame
    papers = list(dict.fromkeys(frame.paper))
    kinds = [kind for kind in HEADINGS if (frame.kind == kind).any()]
    width = theme.COLUMN * (0.5 + 0.5 * len(kinds))
    figure, axes = theme.panels(len(kinds), width=width, height=1.8, sharex=True, sharey=True)
    for ax, kind in zip(axes, kinds, strict=True):
        part = frame[frame.kind == kind]
        counts = part.groupby(["paper", "verdict"]).size().unstack(fill_value=0)
        counts = counts.reindex(papers, fill_value=0)
        start = np.zeros(len(papers))
        for verdict in (v for v in COLOURS if v in counts):
            bars = ax.barh(papers, counts[verdict], left=start, color=COLOURS[verdict])
            labels = [str(n) if n else "" for n in counts[verdict]]
            ax.bar_label(bars, labels, label_type="center", color="white", fontsize=7)
            start += counts[verdict].to_numpy()
        ax.grid(False)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_title(HEADINGS[kind], loc="left")
        ax.set(xlabel="statements")
    axes[0].invert_yaxis()
    found = [verdict for verdict in COLOURS if (frame.verdict == verdict).any()]
    patches = [Patch(color=COLOURS[verdict], label=verdict) for verdict in found]
    figure.legend(handles=patches, loc="outside right upper", frameon=False)
    theme.title(figure, "Verdicts")
    return figure
