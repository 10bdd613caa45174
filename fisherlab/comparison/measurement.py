"""One layer under measurement: every approximation of it, at every damping."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from threading import Event
from typing import Any

import torch
from torch import Tensor

from fisherlab import metrics
from fisherlab.approximations import Approximation, Memo
from fisherlab.approximations.exact import Exact
from fisherlab.blocks import (
    Block,
    BlockError,
    BlockTooLarge,
    DirectSum,
    Kronecker,
    Outer,
    contractions,
)
from fisherlab.blocks.direct_sum import layer_block, parts_of
from fisherlab.blocks.numerics import fits_gram, sum_of
from fisherlab.blocks.work import Ledger, Piece, seconds_of
from fisherlab.comparison.orders import NORMS, VALUES
from fisherlab.comparison.pool import Stopped, Work
from fisherlab.comparison.reference import ExactReference
from fisherlab.comparison.samples import Samples, by_layer
from fisherlab.comparison.table import (
    CHOSEN,
    MEASURES,
    NO_GAP,
    OVERFLOW,
    ROUNDING,
    STEP_ROUNDING,
    noted,
)
from fisherlab.doors import said
from fisherlab.extract import Captures, LayerCapture
from fisherlab.extract.memory import form_bytes, least_bytes
from fisherlab.metrics.frobenius import Pair

Candidate = Approximation | Block | Callable[[LayerCapture], Block] | Mapping[str, Block]

# Measures that are finite wherever the blocks are, and how a row says that they are not.
FINITE = ("relative_error", "trace_ratio", "cosine", "scaled_error", "direction_cosine")
# The share of a block's trace that rounding may hide before a row says so.
TRACE_BELOW_ROUNDING = 1e-3
# The share of its step, or of the gradients themselves, that may lie there.
UNSURE = 0.01
# The same of its Stein loss, beside 1.
UNSURE_STEIN = 0.02
# The same of the eigenvalues of its block, an estimate that was up to five times too low.
UNSURE_EIGENVALUES = 0.0067
# A Stein loss is at least 0; below this it is rounding, as the other numbers at its damping.
STEIN_BELOW = -1e-3
BELOW_DAMPING = (
    "its eigenvalues are rounded by more than this damping, so there is no Stein loss, and the "
    "condition and the step have few digits: measure in a finer dtype"
)
CANCELS = "its positions cancel, so measure in a finer dtype"


def _refuse_overflow(row: dict[str, Any]) -> None:
    """Take numbers out of a row that passed the range of the capture's dtype, with the reason."""
    beyond = [name for name in FINITE if math.isinf(row[name])]
    silent = [name for name in FINITE if math.isnan(row[name])] if not row["note"] else []
    if beyond or silent:
        row |= dict.fromkeys(beyond, math.nan)
        row["note"] = noted(row["note"], OVERFLOW)


class LayerMeasurement:
    """One layer under measurement: its exact block, and a memo per group that all methods share."""

    def __init__(self, name: str, samples: Samples, memory: int | None) -> None:
        self.name, self.ledger = name, Ledger()
        # the blocks whose condition numbers are found together, with their rows
        self.waiting: list[tuple[ExactReference, Block, list[dict[str, Any]]]] = []
        with self.ledger:
            self._prepare(samples, memory)

    def _prepare(self, samples: Samples, memory: int | None) -> None:
        captures, held_out = samples.captures, samples.held_out
        self.keys = by_layer(captures[0])[self.name]
        self.parts = [[batch[key] for batch in captures] for key in self.keys]
        self.first = self.parts[0][0]
        self.memos = [Memo(part, memory) for part in self.parts]
        other = samples.target
        # the columns of the captures themselves, which all methods are made of
        shared = [] if other else [_exact(memo) for memo in self.memos]
        self.F = self._exact(other) if other else layer_block(shared)
        self.held_out = self._exact(held_out) if held_out else None
        self.hessian = (samples.hessians or {}).get(self.name)
        # gradient of the mean loss; groups are stacked row-wise
        sums = [sum_of(c.gradient * c.examples for c in memo.layers) for memo in self.memos]
        self.whole = ExactReference(self.F, torch.cat(sums) / self.memos[0].count)
        # every weight that matters is a combination of inputs: of few, in their coordinates
        self.inside = self.whole.inside() if not other and not held_out else None
        self.examples = int(self.memos[0].count)
        groups = len(self.keys)
        self.remark = ""
        if groups > 1:
            self.remark = (
                f"a convolution of {groups} groups: its exact block is taken as the direct sum of "
                "the groups' blocks, without what lies between groups"
            )
        if (share := max(_rounded(memo) for memo in self.memos)) > UNSURE:
            doubt = f"up to {min(share, 1.0):.1%} of its gradients may be rounding: {CANCELS}"
            self.remark = noted(self.remark, doubt)
        self.reference_examples = (
            float(sum(batch.labels.shape[0] for batch in held_out)) if held_out else math.nan
        )

    def _exact(self, captures: list[Captures]) -> Outer | DirectSum:
        return layer_block([Exact()(*(batch[key] for batch in captures)) for key in self.keys])

    def build(self, maker: Candidate) -> Block | None:
        """The block of one method on this layer; None where a given block is of another layer."""
        if isinstance(maker, Approximation):
            return layer_block([memo.block(maker) for memo in self.memos])
        if isinstance(maker, Block):
            return maker if maker.shape == self.F.shape else None
        if isinstance(maker, Mapping):
            parts = [maker[key] for key in self.keys if key in maker]
            return maker.get(self.name) or (layer_block(parts) if parts else None)
        if len(self.parts[0]) > 1:
            raise BlockError(
                f"a callable makes the block of one capture, and layer {self.name!r} has "
                f"{len(self.parts[0])}, one per batch: pass one batch, or an Approximation"
            )
        made = [maker(part[0]) for part in self.parts]
        for block in made:
            if not isinstance(block, Block):
                raise BlockError(f"the function made no block of fl.blocks, but {said(block)}")
        return layer_block(made)

    def rows(
        self,
        makers: dict[str, Candidate],
        dampings: Sequence[float],
        facts: dict[str, Any],
        stopped: Event,
    ) -> Work:
        """One row per method and damping; raises `Stopped` between two methods.

        A generator that yields after each method.
        """
        base = {
            "layer": self.name,
            "layer_type": self.first.layer_type,
            "n_parameters": self.F.size,
            "examples": self.examples,
            "reference_examples": self.reference_examples,
            "dtype": str(self.F.dtype).removeprefix("torch."),
            "diagonal_share": metrics.diagonal_share(
                self.held_out or (self.inside or self.whole).F
            ).item(),
            **facts,
        }
        measured: list[tuple[str, dict[str, Any]]] = []
        references = [reference for reference in (self.whole, self.inside) if reference is not None]
        with self.ledger:
            # in one order, whichever was asked for: a product of a stack rounds by the place in it
            for name in sorted(makers, key=str):
                if stopped.is_set():
                    raise Stopped
                measured += [(name, row) for row in self._measure(makers[name], dampings)]
                yield
            for reference in references:
                self._retried(reference.complete)
                self._retried(self._condition, reference)
        measured.sort(key=lambda found: list(makers).index(found[0]))
        rows = [{**base, "approximation": name, **row} for name, row in measured]
        share_out(rows)
        best = [r["relative_error"] for r in rows if r["approximation"] == "kronecker_optimal"]
        for row in rows:
            # for the Hessian another product is the best
            known = bool(best) and self.hessian is None
            row["optimality_gap"] = row["relative_error"] - best[0] if known else math.nan
            _refuse_overflow(row)
        return rows

    def _measure(self, maker: Candidate, dampings: Sequence[float]) -> Iterator[dict[str, Any]]:
        empty = dict.fromkeys(MEASURES, math.nan)
        del empty["diagonal_share"], empty["optimality_gap"]
        unit = self.F.trace().item() / self.F.size
        try:
            with self.ledger.piece() as building:
                X = self._retried(self.build, maker)
            if X is None:
                return
            if X.shape != self.F.shape:
                raise BlockError(f"a block of shape {X.shape} on a weight of {self.F.shape}")
            built = {"memory_bytes": X.memory_bytes(), "formed_bytes": X.formed_bytes()}
            with self.ledger.piece() as decomposing:
                near, reference = self._retried(self._nearest, X)
                for part in parts_of(near):
                    decompose(part)
            if not isinstance(maker, Block | Mapping):
                built |= self._seconds(building, decomposing)
            if self.hessian is not None:
                yield from self._against_hessian(X, {**empty, **built}, dampings, unit)
                return
            static, reasons = self._retried(self._static, near, reference.F)
            notes = [text for text in (self.remark, *reasons) if text]
            if X.trace_below_rounding > TRACE_BELOW_ROUNDING:
                notes.append(f"up to {X.trace_below_rounding:.1%} of its trace {ROUNDING}")
            common = {**empty, **built, **static}
        except BlockError as error:
            for share in dampings:
                damping = {"damping": share * unit, "damping_relative": share}
                yield {**empty, **damping, "placement": "", "note": str(error)}
            return
        note = "; ".join(notes)
        rows: list[dict[str, Any]] = []
        self.waiting.append((reference, near, rows))
        for share in dampings:
            row = {**common, "damping": share * unit, "damping_relative": share, "note": note}
            try:
                found, at, step = self._retried(
                    self._damped, maker, X, near, reference, share * unit
                )
                doubt = found.pop("note", "")
                row |= found | {"note": noted(note, doubt)}
                self._retried(at.add, row, step, share * unit)
                rows.append(row)
            except BlockError as error:
                row |= {"placement": "", "note": str(error)}
            yield row

    def _against_hessian(
        self, X: Block, known: dict[str, Any], dampings: Sequence[float], unit: float
    ) -> Iterator[dict[str, Any]]:
        """Rows of what needs no inverse of the reference, which is indefinite."""
        H = self.hessian
        assert H is not None
        pair = Pair(X, H)
        found = {
            "relative_error": pair.relative_error.item(),
            "trace_ratio": metrics.trace_ratio(X, H).item(),
            "cosine": pair.cosine.item(),
            "scaled_error": pair.scaled_error.item(),
            "clamped": X.clamped,
        }
        note = f"{self.remark}; " if self.remark else ""
        note += (
            f"{H.clamped:.1%} of the Hessian's spectrum is negative: nothing that needs its "
            "inverse is measured; reference='ggn' has one"
        )
        for share in dampings:
            damping = {"damping": share * unit, "damping_relative": share}
            yield {**known, **found, **damping, "placement": "", "note": note}

    def _condition(self, reference: ExactReference) -> None:
        """Fill in the condition numbers, which all blocks of a reference find together."""
        waiting = [(near, rows) for at, near, rows in self.waiting if at is reference and rows]
        dampings = sorted({row["damping"] for _, rows in waiting for row in rows})
        if waiting:
            blocks = [near for near, _ in waiting]
            found = metrics.conditions(blocks, reference.F, dampings, reference is self.inside)
            for (_, rows), values in zip(waiting, found.mT.tolist(), strict=True):
                for row in rows:
                    row["condition"] = values[dampings.index(row["damping"])]

    def _seconds(self, building: Piece, decomposing: Piece) -> dict[str, Any]:
        """The time of a method alone; its pieces, some shared with others, are for later."""
        block = building.closure()
        more = decomposing.closure() - block
        return {
            "build_seconds": seconds_of(block),
            "decompose_seconds": seconds_of(more),
            "shared_seconds": block | more,
        }

    def _retried(self, act: Callable[..., Any], *args: Any) -> Any:
        """`act(*args)`, again in half the memory each time the device runs out of it."""
        while True:
            try:
                return act(*args)
            except torch.OutOfMemoryError as error:
                message = str(error)
            # out of the handler, whose traceback holds on to the tensors that did not fit
            self._halve(message)

    def _halve(self, message: str) -> None:
        """Half the bytes of a chunk and of an intermediate; refused where that is not possible."""
        if self.F.device.type == "cuda":
            torch.cuda.empty_cache()
        halved = contractions.halve_workspace()
        for memo in self.memos:
            size = max(form_bytes(layer) for layer in memo.layers)
            half = min(size, memo.memory or size) // 2
            if half >= max(least_bytes(layer) for layer in memo.layers):
                memo.memory, halved = half, True
        if not halved:
            raise BlockTooLarge(
                f"layer {self.name!r} runs out of memory even in chunks of one example; its exact "
                f"block alone holds {self.F.memory_bytes():,} bytes: take a smaller batch or "
                f"another device ({message})"
            )

    def _nearest(self, X: Block) -> tuple[Block, ExactReference]:
        """A block in the coordinates of the inputs if it is known to be zero beside them."""
        if self.inside is None:
            return X, self.whole
        near = self.inside.F if X is self.F else X.restricted_to(self.inside.space)
        return (X, self.whole) if near is None else (near, self.inside)

    def _static(self, X: Block, F: Block) -> tuple[dict[str, Any], tuple[str, str]]:
        """Measures that do not depend on the damping, and the reason for missing ones."""
        population, few = population_columns(X, self.held_out)
        spectral = {"diagonalisation": math.nan, "subspace_overlap": math.nan}
        reason = ""
        try:
            spectral["diagonalisation"] = metrics.diagonalisation(X, F).item()
            spectral["subspace_overlap"] = metrics.subspace_overlap(X, F).item()
        except BlockError as refusal:
            reason = str(refusal)
        else:
            reasons = {"diagonalisation": CHOSEN, "subspace_overlap": NO_GAP}
            reason = "; ".join(reasons[key] for key, x in spectral.items() if math.isnan(x))
        # after the diagonalisation, whose rotated gradients the inner product uses
        pair = Pair(X, F)
        # a block whose entries' squares are below the range has no cosine
        below = pair.own_norm == 0 and X.trace() != 0
        return {
            **spectral,
            "relative_error": pair.relative_error.item(),
            **population,
            "trace_ratio": metrics.trace_ratio(X, F).item(),
            "cosine": math.nan if below else pair.cosine.item(),
            "scaled_error": math.nan if below else pair.scaled_error.item(),
        }, (reason, few)

    def _damped(
        self, maker: Candidate, X: Block, near: Block, reference: ExactReference, damping: float
    ) -> tuple[dict[str, Any], ExactReference, Tensor]:
        """Measures at one damping, and the step with the reference in which it is measured."""
        if damping == 0:
            raise BlockError("the exact block is zero, so a damping relative to its trace is zero")
        start = time.perf_counter()
        P, placement = self._preconditioner(maker, X, damping)
        # placed elsewhere, the damping may depend on the dimensions that the inputs miss
        plain = P is None
        at, P = (reference, near.power(-1, damping)) if P is None else (self.whole, P)
        inverted = time.perf_counter() - start
        product, seconds = at.product(P, damping, near if plain else None)
        most = 1 / damping if plain else math.inf
        at.step(damping)  # refused here where the Gram matrix would be too large
        loss = metrics.stein_loss(near, reference.F, damping, P if plain else None)
        found: dict[str, Any] = {
            "placement": placement,
            "stein_loss": loss.item(),
            "solve_seconds": inverted + seconds,
            "clamped": X.clamped,
        }
        if loss < STEIN_BELOW:
            found |= {"stein_loss": math.nan, "note": BELOW_DAMPING}
        # a trace T more in unknown eigenvalues moves log det (X + damping I) by this at most
        hidden = near.trace_below_rounding * near.trace().item() / (damping * near.size)
        # and the rounding of the largest eigenvalue, which smaller ones have as well, by this
        rounding = at.rounding_of_eigenvalues(near)
        moved = near.size * math.log1p(hidden) + rounding / damping
        if moved > UNSURE_STEIN * (1 + abs(loss.item())):
            doubt = f"up to {moved:.2g} of its Stein loss {ROUNDING}"
            found["note"] = noted(found.get("note"), doubt)
        # a root cuts eigenvalues as rounding, and 1 / damping stands for what they were
        doubt = ""
        if near.trace_below_rounding and (share := at.share_at_zero(P, damping)) > UNSURE:
            doubt = ROUNDING
        elif (
            plain and (share := at.hidden_share(product, P, rounding, damping)) > UNSURE_EIGENVALUES
        ):
            doubt = ROUNDING
        elif (share := at.share_left_out(product, P, damping)) > UNSURE:
            doubt = STEP_ROUNDING
        elif (share := at.rounding_of(product, P, most)) > UNSURE:
            doubt = STEP_ROUNDING
        if doubt:
            doubt = f"up to {min(share, 1.0):.1%} of its step {doubt}"
            found["note"] = noted(found.get("note"), doubt)
        return found, at, -product

    def _preconditioner(
        self, maker: Candidate, X: Block, damping: float
    ) -> tuple[Block | None, str]:
        """The damped inverse as its method places the damping; None is `(X + damping I)^{-1}`."""
        if not isinstance(maker, Approximation) or maker.exponent != -1:
            return None, "tikhonov"
        if maker.tikhonov:
            # do not invert X in the full space where a restricted form is known
            return None, maker.placement
        if isinstance(X, DirectSum):
            return DirectSum([maker.damped(part, damping) for part in X.parts]), maker.placement
        return maker.damped(X, damping), maker.placement


def _rounded(memo: Memo) -> float:
    """The share of the gradients that rounding may be, where their positions cancel."""
    found = [of for layer in memo.layers if (of := layer.columns).careful]
    shares = [torch.finfo(of.dtype).eps / max(of.cancellation, 1e-300) ** 0.5 for of in found]
    return max(shares, default=0.0)


def _exact(memo: Memo) -> Outer:
    """The block itself, of the same columns that the approximations use."""
    block = memo.block(Exact())
    assert isinstance(block, Outer)
    return block


def population_columns(X: Block, held_out: Block | None) -> tuple[dict[str, Any], str]:
    """The columns against the population, and why the error is NaN; NaN without such examples."""
    names = {"population_error": "error", "population_error_se": "error_se"}
    names |= {"population_error_low": "low", "population_error_high": "high"}
    kinds = ("cosine", "trace_ratio")
    ends = {"": "value", "_low": "low", "_high": "high"}
    if held_out is None:
        columns = [*names, *(f"population_{kind}{end}" for kind in kinds for end in ends)]
        return dict.fromkeys(columns, math.nan), ""
    found = metrics.population_estimate(X, held_out)
    row: dict[str, Any] = {column: getattr(found, name).item() for column, name in names.items()}
    for kind in kinds:
        interval = getattr(found, kind)
        row |= {f"population_{kind}{end}": getattr(interval, name) for end, name in ends.items()}
    # no column of the table: the orders of two rows are made of them
    row |= {VALUES: found.values.tolist(), NORMS: found.norms.tolist()}
    return row, found.reason


def share_out(rows: Sequence[dict[str, Any]]) -> None:
    """Put the seconds of those pieces in the rows that other methods use as well."""
    pieces = {row["approximation"]: row["shared_seconds"] for row in rows}
    uses = Counter(p for found in pieces.values() if isinstance(found, set) for p in found)
    for row in rows:
        if isinstance(found := row["shared_seconds"], set):
            row["shared_seconds"] = seconds_of(piece for piece in found if uses[piece] > 1)


def decompose(block: Block) -> None:
    """Find what an inverse needs at any damping: a product's eigenvectors, a Gram matrix."""
    if isinstance(block, Kronecker):
        _ = block.spectra
    elif isinstance(block, Outer) and fits_gram(block.num_columns, block.device):
        block.gram()
